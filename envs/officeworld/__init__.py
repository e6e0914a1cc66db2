"""An office of apps over one fictional population, with documentation that must be consulted.

The policy reads the documentation, looks ids up, acts, and ends with `done()`. What the world
differs in at the end is compared with the task's goal by unit tests; the reward is the share that
passed.

**Add an app**: one module in `apps/` with handlers `(office, **arguments)` and an `APP` table of
`Api`s; list it in `apps/__init__.py`; add its tables to `population.generate`. Handlers return None
("ok"), a row, a list of rows or `page_of(...)`, and raise `ApiError(category, detail)` for
everything the agent did wrong. A new parameter of an API with `writes=True` needs its synonyms in
`api.SYNONYMS`.

**Add a scenario**: one `Scenario` in a module of `scenarios/`. `build(draw)` draws the parameters
and returns a `Plan`: values for the templates, the `Goal` (every row added, changed, removed, and
the answer of a question), and the oracle's calls by canonical parameter names. The tests then
check, for every variant, that the oracle passes, that doing nothing fails, that mutants of the
oracle fail, and that the held-out template has no new word.
"""

from loopwright.envs.officeworld.environment import OfficeWorld

__all__ = ["OfficeWorld"]
