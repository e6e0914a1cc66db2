"""An office of apps over one fictional population, with documentation that must be consulted.

The policy reads the documentation, looks things up, acts, and ends with `done()`. What the world
differs in at the end is compared with the task's goal by unit tests; the reward is the share that
passed. Style `compact` is a small office for tiny policies (`small/`), style `full` the whole one
(`full/`); what they share stands beside this file.

**Add an app** to the full office: one file in `full/apps/` with an `APP`. Resources
(`resources.py`) give their list, search, show, create, update and delete APIs, flags, members and
moves; what else the app does is a handler `(office, **arguments)`, which returns None ("ok"), a
row, or a list, and raises `ApiError(category, detail)` for everything the agent did wrong. Login,
documentation, dialects, paging and grading come by themselves.

**Add a scenario**: one `Scenario` in a file of `full/scenarios/`. `build(draw)` draws the
parameters and returns a `Plan`: values for the three texts, the goal (every row added, changed,
removed, and the answer of a question), and the oracle's calls by canonical names. The tests then
check, for every variant, that the oracle passes, that doing nothing fails, and that mutants of the
oracle fail. `docs/officeworld.md` has an example of both.
"""

from loopwright.envs.officeworld.environment import OfficeWorld

__all__ = ["OfficeWorld"]
