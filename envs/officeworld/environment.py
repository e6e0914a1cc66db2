"""`OfficeWorld`: the environment and its source of tasks."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from loopwright.envs.actions import (
    ActionFormat,
    Call,
    Fault,
    parse_action,
    render_action,
)
from loopwright.envs.officeworld.api import ApiError, Office, draw_dialect, invoke
from loopwright.envs.officeworld.apps import APIS, APPS
from loopwright.envs.officeworld.grading import unit_tests
from loopwright.envs.officeworld.observe import (
    Style,
    error_text,
    fault_text,
    result_text,
    system_message,
)
from loopwright.envs.officeworld.population import generate
from loopwright.envs.officeworld.scenario import Draw, Plan, Scenario
from loopwright.envs.officeworld.scenarios import SCENARIOS
from loopwright.envs.officeworld.state import World
from loopwright.envs.protocol import EnvSpec, Message, Observation, Step, Task, TaskError, Verdict

NAME = "officeworld"
WORLDS = 4096  # worlds a split; even seeds are for training, odd ones held out
VARIANTS: Mapping[str, tuple[int, ...]] = {"train": (0, 1), "test": (2,)}
PAGE_SIZE: Mapping[Style, int] = {"compact": 3, "full": 5}
PEOPLE: Mapping[Style, int] = {"compact": 10, "full": 60}


@lru_cache(maxsize=1)
def data_hash() -> str:
    """Hash of the API tables and the templates: stored with every rollout through the version."""
    apis = [(n, a.doc, [(p.name, p.kind, p.doc) for p in a.params]) for n, a in APIS.items()]
    texts = [(s.name, s.difficulty, s.compact, s.full) for s in SCENARIOS.values()]
    return hashlib.sha256(repr((apis, texts)).encode()).hexdigest()[:8]


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The live task."""

    plan: Plan
    office: Office
    finished: bool = False
    answer: Any = None


def _chosen(
    scenarios: Sequence[str] | None, difficulty: Sequence[int] | None
) -> tuple[Scenario, ...]:
    unknown = set(scenarios or ()) - set(SCENARIOS)
    if unknown:
        raise ValueError(
            f"officeworld scenarios {sorted(unknown)}: unknown; there are {', '.join(SCENARIOS)}"
        )
    chosen = tuple(
        s
        for s in SCENARIOS.values()
        if (scenarios is None or s.name in scenarios)
        and (difficulty is None or s.difficulty in difficulty)
    )
    if not chosen:
        raise ValueError(
            f"officeworld: no scenario among {scenarios} has a difficulty in {difficulty} (1 to 3)"
        )
    return chosen


class OfficeWorld:
    """A small office of apps over one population; implements `Env` and `TaskSource`.

    `action_format`: how the policy writes calls. `style`: `compact` for tiny policies, `full` for
    language models. `scenarios`, `difficulty`: which families to draw from (default all).
    `world_size`: people (default 10 compact, 60 full).
    """

    def __init__(
        self,
        action_format: ActionFormat = "call",
        style: Style = "compact",
        scenarios: Sequence[str] | None = None,
        difficulty: Sequence[int] | None = None,
        world_size: int | None = None,
        max_turns: int = 12,
    ) -> None:
        if action_format not in ("call", "json"):
            raise ValueError(
                f"officeworld action_format {action_format!r}: must be 'call' or 'json'"
            )
        if style not in PEOPLE:
            raise ValueError(f"officeworld style {style!r}: must be 'compact' or 'full'")
        self._size = PEOPLE[style] if world_size is None else world_size
        largest = 40 if style == "compact" else 500
        if not 6 <= self._size <= largest:
            raise ValueError(
                f"officeworld world_size {self._size}: must be 6 to {largest} in style {style!r}"
            )
        self._format: ActionFormat = action_format
        self._style: Style = style
        self._scenarios = _chosen(scenarios, difficulty)
        self._episode: _Episode | None = None
        self.spec = EnvSpec(
            name=NAME,
            version=f"0.1+{data_hash()}",
            description="Stateful office apps with documentation; graded by what changed.",
            max_turns=max_turns,
        )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream. Test tasks have held-out variants, and seeds and worlds of the other
        parity."""
        if split not in VARIANTS:
            raise ValueError(f"officeworld split {split!r}: must be 'train' or 'test'")
        rng = Random(f"tasks/{split}/{seed}")
        while True:
            scenario = rng.choice(self._scenarios)
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

    async def reset(self, task: Task) -> Observation:
        """Start the task. Raises `TaskError` for a task that is not one of this environment's."""
        scenario = SCENARIOS.get(task.scenario)
        variant = task.payload.get("variant")
        if scenario is None or variant not in (1, 2, 3):
            raise TaskError(
                f"{task.id}: scenario {task.scenario!r} variant {variant!r} does not exist"
            )
        rng = Random(f"task/{task.scenario}/{variant}/{task.seed}")
        world_seed = 2 * rng.randrange(WORLDS) + task.seed % 2
        base = generate(world_seed, self._size, self._style == "full")
        page_size = PAGE_SIZE[self._style]
        plan = scenario.build(Draw(world=World(base), rng=rng, page_size=page_size))
        dialect = draw_dialect(world_seed, APIS)
        office = Office(
            world=World(base), apps=APPS, apis=APIS, dialect=dialect, page_size=page_size
        )
        self._episode = _Episode(plan=plan, office=office)
        template = (scenario.compact if self._style == "compact" else scenario.full)[variant - 1]
        system = Message(role="system", content=system_message(self._style, self._format, APPS))
        return Observation(
            messages=(system, Message(role="user", content=template.format(**plan.values)))
        )

    async def step(self, action: str) -> Step:
        """Play one action; text that is none is a policy fault and costs a turn."""
        episode = self._live()
        if episode.finished:
            return Step(observation=Observation(messages=()), terminated=True)
        call = parse_action(action, self._format)
        if isinstance(call, Fault):
            return self._reply(fault_text(self._style, call), f"policy_fault/{call.category}")
        try:
            if call.name == "done":
                return self._finish(episode, call)
            value = invoke(episode.office, call.name, call.arguments)
        except ApiError as error:
            return self._reply(error_text(self._style, error), f"tool_error/{error.category}")
        return self._reply(result_text(self._style, call.name, value))

    def unit_tests(self) -> dict[str, bool]:
        """Every unit test of the task against the world as it is now."""
        episode = self._live()
        diff = episode.office.world.diff()
        return unit_tests(episode.plan.goal, diff, finished=episode.finished, answer=episode.answer)

    async def evaluate(self) -> Verdict:
        """Reward: the share of unit tests passed. Parts: the same by group. Success: all passed."""
        tests = self.unit_tests()
        groups: dict[str, list[bool]] = {}
        for name, passed in tests.items():
            groups.setdefault(name.split("/")[0], []).append(passed)
        return Verdict(
            reward=sum(tests.values()) / len(tests),
            success=all(tests.values()),
            parts={name: sum(passed) / len(passed) for name, passed in groups.items()},
        )

    def oracle(self) -> Iterator[str]:
        """The actions that solve the task, in the world's dialect."""
        episode = self._live()
        for call in episode.plan.calls:
            dialect = episode.office.dialect
            arguments = {dialect.get((call.name, k), k): v for k, v in call.arguments.items()}
            yield render_action(Call(name=call.name, arguments=arguments), self._format)

    async def close(self) -> None:
        """Forget the episode."""
        self._episode = None

    def _live(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("officeworld: no task is being played; call reset(task) first")
        return self._episode

    def _finish(self, episode: _Episode, call: Call) -> Step:
        for name in call.arguments:
            if name != "answer":
                raise ApiError("unknown_argument", "done takes only an answer", name=name)
        episode.finished, episode.answer = True, call.arguments.get("answer")
        return Step(observation=Observation(messages=()), terminated=True)

    def _reply(self, text: str, signal: str | None = None) -> Step:
        message = Message(role="tool", content=text)
        return Step(
            observation=Observation(messages=(message,)), signals={signal: 1} if signal else {}
        )
