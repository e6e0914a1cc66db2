"""Adapters to environments that others wrote, one file each (docs/environment-adapters.md).

Those whose packages get along with ours play in our process. The others play in an interpreter of
their own: their far sides are in `far/`, and `envs/remote` carries what is said.
"""
