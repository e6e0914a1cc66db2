"""The table of scenarios. A family is one module with `SCENARIOS`; adding it here is all it
takes."""

from collections.abc import Mapping

from loopwright.envs.officeworld.scenario import Scenario
from loopwright.envs.officeworld.small.scenarios import money, people, schedule

SCENARIOS: Mapping[str, Scenario] = {
    s.name: s for s in (*money.SCENARIOS, *people.SCENARIOS, *schedule.SCENARIOS)
}
