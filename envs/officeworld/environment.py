"""`OfficeWorld`: the environment and its source of tasks."""

import builtins
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from loopwright.envs.actions import Call, Fault, parse_action, parse_cell, render_action
from loopwright.envs.metrics import CallLog, mentions
from loopwright.envs.officeworld.api import ApiError, Office, invoke
from loopwright.envs.officeworld.cells import render_cells
from loopwright.envs.officeworld.edition import NAME, BadOption, Edition
from loopwright.envs.officeworld.full.office import FullOffice, clipped, failure
from loopwright.envs.officeworld.grading import unit_tests
from loopwright.envs.officeworld.scenario import Plan, Scenario
from loopwright.envs.officeworld.small import SmallOffice
from loopwright.envs.officeworld.snapshot import pack, unpack
from loopwright.envs.protocol import (
    EnvError,
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    TaskError,
    Verdict,
)
from loopwright.envs.sandbox import CellStatus, Session, Zygote, shared_zygote

Style = Literal["compact", "full"]
OfficeFormat = Literal["call", "json", "code"]
EDITIONS: Mapping[str, Edition] = MappingProxyType({"compact": SmallOffice(), "full": FullOffice()})


@lru_cache(maxsize=2)
def data_hash(style: str) -> str:
    """Hash of the API tables and the templates: stored with every rollout through the version."""
    edition = EDITIONS[style]
    apis = [
        (n, a.doc, [(p.name, p.kind, p.doc) for p in a.params]) for n, a in edition.apis.items()
    ]
    texts = [(s.name, s.difficulty, s.texts, s.held_out) for s in edition.scenarios.values()]
    return hashlib.sha256(repr((apis, texts)).encode()).hexdigest()[:8]


def _exception(name: str) -> str:
    """How a cell failed, as a metric: Python's exceptions and the sandbox's endings by name, the
    policy's inventions together."""
    return name if name in vars(builtins) or name in tuple(CellStatus) else "other"


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The live task."""

    task: Task
    plan: Plan
    office: Office
    log: CallLog = field(default_factory=CallLog)
    finished: bool = False
    answer: Any = None
    session: Session | None = None


def _chosen(
    edition: Edition, scenarios: Sequence[str] | None, difficulty: Sequence[int] | None
) -> tuple[Scenario, ...]:
    there = edition.scenarios
    unknown = set(scenarios or ()) - set(there)
    if unknown:
        raise BadOption(
            f"officeworld scenarios {sorted(unknown)}: unknown; there are {', '.join(there)}"
        )
    chosen = tuple(
        s
        for s in there.values()
        if (scenarios is None or s.name in scenarios)
        and (difficulty is None or s.difficulty in difficulty)
    )
    if not chosen:
        raise BadOption(
            f"officeworld: no scenario among {scenarios} has a difficulty in {difficulty} (1 to 3)"
        )
    return chosen


class OfficeWorld:
    """An office of apps over one population; implements `Env` and `TaskSource`.

    `style`: `compact`, the small office for tiny policies, or `full`, the full one for language
    models. `action_format`: how the policy acts: `call`, `json`, or (full) `code`, Python cells in
    a sandbox. `scenarios`, `difficulty`: which families to draw from (default all). `world_size`:
    people. `max_turns`: default 12 (compact) or 50 (full). `cell_timeout_s`: after which a code
    cell is killed. `zygote`: what starts the sandboxes (default: the one of this process).
    """

    def __init__(
        self,
        action_format: OfficeFormat = "call",
        style: Style = "compact",
        scenarios: Sequence[str] | None = None,
        difficulty: Sequence[int] | None = None,
        world_size: int | None = None,
        max_turns: int | None = None,
        cell_timeout_s: float = 5.0,
        zygote: Zygote | None = None,
    ) -> None:
        if style not in EDITIONS:
            raise BadOption(f"officeworld style {style!r}: must be 'compact' or 'full'")
        self._edition = EDITIONS[style]
        if action_format not in self._edition.formats:
            allowed = " or ".join(map(repr, self._edition.formats))
            raise BadOption(
                f"officeworld action_format {action_format!r}: must be {allowed} in style {style!r}"
            )
        usual, least, most = self._edition.sizes
        self._size = usual if world_size is None else world_size
        if not least <= self._size <= most:
            raise BadOption(
                f"officeworld world_size {self._size}: must be {least} to {most} in style {style!r}"
            )
        if max_turns is not None and max_turns < 1:
            raise BadOption(f"officeworld max_turns {max_turns}: must be at least 1")
        if not cell_timeout_s > 0:
            raise BadOption(f"officeworld cell_timeout_s {cell_timeout_s}: must be above 0 s")
        self._style = style
        self._format: OfficeFormat = action_format
        self._scenarios = _chosen(self._edition, scenarios, difficulty)
        self._cell_timeout_s = cell_timeout_s
        self._episode: _Episode | None = None
        self._zygote: Zygote | None = None
        if action_format == "code":
            self._zygote = zygote or shared_zygote()
            self._zygote.session().close()  # refuses here what could not run later
        self.spec = EnvSpec(
            name=NAME,
            version=f"0.2+{data_hash(style)}",
            description=self._describe(),
            max_turns=max_turns or self._edition.max_turns,
            snapshots=action_format != "code",  # an interpreter's variables cannot be copied
        )

    def _describe(self) -> str:
        e = self._edition
        held_out = sum(s.held_out for s in e.scenarios.values())
        return (
            "Stateful office apps with documentation; graded by what changed.\n"
            f"style {self._style}: {len(e.apps)} apps, {len(e.apis)} APIs, {self._size} people, "
            f"{len(e.scenarios)} scenarios x 3 variants ({held_out} held out)"
        )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream. Nothing of the test split is ever trained on."""
        if split not in ("train", "test"):
            raise BadOption(f"officeworld split {split!r}: must be 'train' or 'test'")
        return self._edition.tasks(self._scenarios, split, seed)

    async def reset(self, task: Task) -> Observation:
        """Start the task. Raises `TaskError` for a task that is not one of this environment's."""
        await self.close()
        scenario = self._edition.scenarios.get(task.scenario)
        variant = task.payload.get("variant")
        if scenario is None or variant not in (1, 2, 3):
            raise TaskError(
                f"{task.id}: scenario {task.scenario!r} variant {variant!r} does not exist in "
                f"style {self._style!r}"
            )
        plan, office = self._edition.open(task, variant, self._size)
        self._episode = _Episode(task=task, plan=plan, office=office)
        rules = self._edition.system(self._format, office)
        text = scenario.texts[variant - 1].format(**plan.values)
        return Observation(
            messages=(Message(role="system", content=rules), Message(role="user", content=text))
        )

    async def step(self, action: str) -> Step:
        """Play one action; text that is none is a policy fault and costs a turn."""
        episode = self._live()
        if episode.finished:
            return Step(observation=Observation(messages=()), terminated=True)
        if self._format == "code":
            text, signals = await self._run_cells(episode, action)
        else:
            text, signals = self._make_call(episode, action, self._format)
        if self._style == "full":
            signals |= {f"behavior/{k}": n for k, n in mentions(action).items() if n}
            signals |= {f"behavior/{k}": n for k, n in episode.log.news().items() if n}
        shown = (Message(role="tool", content=text),) if text else ()
        ended = self._live().finished
        return Step(observation=Observation(messages=shown), terminated=ended, signals=signals)

    def _make_call(
        self, episode: _Episode, action: str, action_format: Literal["call", "json"]
    ) -> tuple[str, dict[str, int]]:
        call = parse_action(action, action_format)
        if isinstance(call, Fault):
            return self._edition.misread(call), {f"policy_fault/{call.category}": 1}
        try:
            value = self._invoke(episode, call)
            return "" if call.name == "done" else self._edition.shown(call.name, value), {}
        except ApiError as error:
            return self._edition.refused(error), {f"tool_error/{error.category}": 1}

    async def _run_cells(self, episode: _Episode, action: str) -> tuple[str, dict[str, int]]:
        cell = parse_cell(action)
        if isinstance(cell, Fault):
            return self._edition.misread(cell), {f"policy_fault/{cell.category}": 1}
        code, count = cell
        errors: dict[str, int] = {}

        def answer(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
            try:
                return {"value": self._invoke(episode, Call(name=name, arguments=arguments))}
            except ApiError as error:
                key = f"tool_error/{error.category}"
                errors[key] = errors.get(key, 0) + 1
                return {"error": failure(error)}

        assert self._zygote is not None, "made by the constructor for action_format 'code'"
        if episode.session is None or not episode.session.alive:
            episode.session = self._zygote.session()
        result = await episode.session.run(code, answer, timeout_s=self._cell_timeout_s)
        signals = {**errors, "behavior/code_cells": count}
        if episode.finished:
            episode.session.close()  # no further cell will run; evaluation needs none
        if result.error and result.error != "ApiError":
            signals[f"cell_error/{_exception(result.error)}"] = 1
        return clipped(result.output) or "[no output]", signals

    def _invoke(self, episode: _Episode, call: Call) -> Any:
        """One call, in the log of the episode. `done` is a call too."""
        try:
            if episode.finished:
                raise ApiError("conflict", "the task is finished")
            if call.name == "done":
                return self._finish(episode, call)
            value = invoke(episode.office, call.name, call.arguments)
        except ApiError:
            episode.log.note(call.name, ok=False)
            raise
        episode.log.note(call.name, ok=True)
        return value

    def _finish(self, episode: _Episode, call: Call) -> None:
        for name in call.arguments:
            if name != "answer":
                raise ApiError("unknown_argument", "done takes only an answer", name=name)
        episode.finished, episode.answer = True, call.arguments.get("answer")

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
        calls = self._edition.oracle(episode.plan, episode.office)
        if self._format == "code":
            yield from render_cells(calls)
            return
        for step in calls:
            yield render_action(step.call, self._format)

    def answers(self) -> Sequence[str]:
        """The answer, where the task is a question whose answer does not occur by chance."""
        answer = self._live().plan.goal.answer
        return (answer,) if isinstance(answer, str) else ()

    async def snapshot(self) -> bytes:
        """The world's difference to its base, and how far the episode is. Raises `EnvError` with
        code actions."""
        episode = self._live()
        if self._format == "code":
            raise EnvError("officeworld: the variables of code cells cannot be saved")
        return pack(
            episode.task,
            episode.office,
            log=episode.log,
            finished=episode.finished,
            answer=episode.answer,
        )

    async def restore(self, task: Task, blob: bytes) -> None:
        """Go on where `snapshot` was taken. Raises `EnvError` for a blob of another task."""
        await self.reset(task)
        episode = self._live()
        episode.finished, episode.answer = unpack(blob, task, episode.office, episode.log)

    async def close(self) -> None:
        """Forget the episode, and end its interpreter."""
        if self._episode is not None and self._episode.session is not None:
            self._episode.session.close()
        self._episode = None

    def _live(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("officeworld: no task is being played; call reset(task) first")
        return self._episode
