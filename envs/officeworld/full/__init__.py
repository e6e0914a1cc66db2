"""The full office: a dozen apps with accounts, hundreds of documented APIs, a population with
relations, scenarios of three variants. An app is one file in `apps/`, a family of scenarios one
file in `scenarios/`; both are found by being there.
"""
