"""`python -m orchestrator …` from a checkout, and what `ray job submit` runs: the same as
`loopwright …`."""

from loopwright.orchestrator.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
