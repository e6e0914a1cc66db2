"""The small office: five apps, a few hundred words, bare values as observations. For policies that
are trained from nothing, as in the quickstart."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from loopwright.envs.actions import Call, Fault
from loopwright.envs.officeworld.api import Api, ApiError, App, Office
from loopwright.envs.officeworld.dialect import draw_parameters
from loopwright.envs.officeworld.edition import NAME, WORLDS, OracleCall
from loopwright.envs.officeworld.scenario import Plan, Scenario
from loopwright.envs.officeworld.small.apps import APIS, APPS
from loopwright.envs.officeworld.small.draw import Draw
from loopwright.envs.officeworld.small.population import generate
from loopwright.envs.officeworld.small.scenarios import SCENARIOS
from loopwright.envs.officeworld.state import World
from loopwright.envs.protocol import Task

VARIANTS: Mapping[str, tuple[int, ...]] = {"train": (0, 1), "test": (2,)}
PAGE_SIZE = 3
MAX_ECHO_CHARS = 24  # of the policy's own text in an error
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "to": ("to", "payee", "person"),
    "amount": ("amount", "sum", "value"),
    "text": ("text", "body", "note"),
    "id": ("id", "item", "ref"),
    "guest": ("guest", "person", "who"),
    "name": ("name", "person", "who"),
    "phone": ("phone", "number", "line"),
    "day": ("day", "date", "on"),
    "hour": ("hour", "time", "at"),
    "title": ("title", "topic", "label"),
}


class SmallOffice:
    """The edition of style `compact`. Variants 1 and 2 of every scenario are for training, variant
    3 is held out, with seeds and worlds of the other parity."""

    formats: Sequence[str] = ("call", "json")
    sizes = (10, 6, 40)
    max_turns = 12
    apps: Mapping[str, App] = APPS
    apis: Mapping[str, Api] = APIS
    scenarios: Mapping[str, Scenario] = SCENARIOS

    def tasks(self, chosen: Sequence[Scenario], split: str, seed: int) -> Iterator[Task]:
        """Scenario, variant and seed drawn anew for each task."""
        rng = Random(f"tasks/{split}/{seed}")
        while True:
            scenario = rng.choice(chosen)
            variant = rng.choice(VARIANTS[split])
            task_seed = 2 * rng.getrandbits(46) + (split == "test")
            yield Task(
                environment=NAME,
                id=f"{scenario.name}-{variant + 1}-{task_seed:x}",
                seed=task_seed,
                split=split,
                scenario=scenario.name,
                difficulty=scenario.difficulty,
                payload={"variant": variant + 1},
            )

    def open(self, task: Task, variant: int, people: int) -> tuple[Plan, Office]:
        """A world and the task in it, from the task's seed."""
        rng = Random(f"task/{task.scenario}/{variant}/{task.seed}")
        world_seed = 2 * rng.randrange(WORLDS) + task.seed % 2
        base = generate(world_seed, people)
        draw = Draw(world=World(base), rng=rng, page_size=PAGE_SIZE)
        plan = SCENARIOS[task.scenario].build(draw)
        dialect = draw_parameters(world_seed, APIS, SYNONYMS)
        office = Office(
            world=World(base), apps=APPS, apis=APIS, dialect=dialect, page_size=PAGE_SIZE
        )
        return plan, office

    def oracle(self, plan: Plan, office: Office) -> Sequence[OracleCall]:
        """The plan's calls with the parameter names of this world."""
        found = []
        for call in plan.calls:
            names = office.dialect.names(call.name) if call.name in APIS else {}
            arguments = {names.get(k, k): v for k, v in call.arguments.items()}
            found.append(OracleCall(call=Call(name=call.name, arguments=arguments), phase="call"))
        return found

    def system(self, action_format: str, office: Office) -> str:
        """Two words."""
        return "use docs"

    def shown(self, api: str, value: Any) -> str:
        """Bare values."""
        if api == "docs.show":
            return f"{value['api']}({', '.join(p['name'] for p in value['params'])})"
        return _compact(value)

    def refused(self, error: ApiError) -> str:
        """The category in words."""
        name = f" {_echo(error.name)}" if error.name else ""
        return f"error {error.category.replace('_', ' ')}{name}"

    def misread(self, fault: Fault) -> str:
        """The same for every fault."""
        return "error one call"


def _compact(value: Any) -> str:
    if value is None:
        return "ok"
    if isinstance(value, list):
        return " ; ".join(_compact(item) for item in value) or "none"
    if isinstance(value, dict) and "items" in value:
        more = "" if value["next"] is None else f" ; next {value['next']}"
        return _compact(value["items"]) + more
    if isinstance(value, dict):
        return " ".join(_compact(v) for k, v in value.items() if k != "doc")
    return str(value)


def _echo(text: str) -> str:
    """A short, printable, encodable piece of the policy's own text."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_ECHO_CHARS])
