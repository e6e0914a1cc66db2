"""The example passes the conformance kit; so should yours."""

import asyncio
from pathlib import Path

from loopwright.envs.conformance import check
from loopwright.envs.registry import load

SOURCE = Path(__file__).parents[1] / "loopwright_pantry" / "__init__.py"


def test_conforms() -> None:
    assert asyncio.run(check(lambda: load(f"{SOURCE}:Pantry"))) == []
