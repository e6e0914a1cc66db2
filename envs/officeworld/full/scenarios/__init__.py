"""The scenarios of the full world: every module here that has `SCENARIOS`."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from loopwright.envs.officeworld.scenario import Scenario


def _found() -> Iterator[Scenario]:
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        yield from importlib.import_module(f"{__name__}.{module.name}").SCENARIOS


SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _found()}
