"""`Search`: questions answered by searching, with simulated or real search engines.

    <think> … </think><search>query</search>      →  <information> … </information>
    <think> … </think><answer>answer</answer>     ends the episode

What a searcher gives back is an observation: the policy is never trained on it. In constant-memory
mode (MEM1, arXiv:2506.15841) the context is rebuilt each turn from the question, the policy's last
<state>, its query and the result.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, Literal
from zlib import crc32

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
from loopwright.envs.rewards.text import exact_match, token_f1
from loopwright.envs.search import questions as asking
from loopwright.envs.search.backends import build_searcher
from loopwright.envs.search.knowledge import SPLITS, Document, knowledge
from loopwright.envs.search.oracle import Solver
from loopwright.envs.search.questions import Question
from loopwright.envs.search.relations import SCHEMAS, Style
from loopwright.envs.search.searcher import Query, is_noisy
from loopwright.envs.search.tags import Act, Malformed, parse_turn

NAME = "search"
VERSION = "1"
USUAL_TURNS = 5
ENTITIES: Mapping[Style, int] = MappingProxyType({"compact": 600, "full": 3000})
MAX_DOCUMENTS = 100
MAX_OBJECTIVES = 16
MAX_HOPS = 4
MAX_ENTITIES = 500_000
_KEPT = ("turns", "useful", "noisy", "answer", "memory")  # of an episode, in a snapshot
Memory = Literal["full", "constant"]
Reward = Literal["f1", "em"]


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The live task."""

    task: Task
    questions: tuple[Question, ...]
    noise: float
    turns: int = 0
    useful: int = 0
    noisy: int = 0
    answer: str | None = None
    memory: str = ""  # in constant-memory mode: the last state, its query and the result
    last: list[Document] = field(default_factory=list)  # of the newest search


class Search:
    """Implements `Env` and `TaskSource`. Options:

    `questions`: "generated", or a JSONL file (`test_questions`: another one for the held-out
    split); `style`, `entities` (0: as many as the style usually has), `world_seed`, `hops`,
    `relations`: of the generated world;
    `objectives`: questions asked at once; `backend`, `backend_options`: who answers queries;
    `documents`: how many a query; `noise`: probability of a noisy answer, where training schedules
    none; `memory`: "full" keeps the transcript, "constant" rebuilds the context each turn;
    `reward`: "f1" or "em", summed over the objectives; `max_turns`: 0 = five, or as many as the
    questions need.
    """

    def __init__(
        self,
        questions: str = "generated",
        test_questions: str = "",
        style: Style = "full",
        entities: int = 0,
        world_seed: int = 0,
        hops: Sequence[int] = (1, 2),
        relations: Sequence[str] | None = None,
        objectives: int = 1,
        backend: str = "corpus",
        backend_options: Mapping[str, Any] | None = None,
        documents: int = 5,
        noise: float = 0.0,
        memory: Memory = "full",
        reward: Reward = "f1",
        max_turns: int = 0,
    ) -> None:
        if not 0 <= entities <= MAX_ENTITIES:
            raise EnvError(f"search entities = {entities}: must be 0 to {MAX_ENTITIES}")
        _check(style, hops, relations, objectives, documents, noise, memory, reward, max_turns)
        self._generated = questions == "generated"
        self._style: Style = style
        self._world = (style, entities or ENTITIES[style], world_seed)
        self._hops, self._relations = tuple(hops), relations
        self._objectives, self._documents, self._noise = objectives, documents, noise
        self._memory: Memory = memory
        self._reward: Reward = reward
        self._read: Mapping[str, tuple[Question, ...]] = {}
        try:
            if self._generated:
                world = knowledge(*self._world, "test")
                asking.generate(world, Random(0), max(self._hops), relations)
            else:
                test = Path(test_questions) if test_questions else None
                self._read = asking.split_questions(Path(questions), test)
        except ValueError as error:
            raise EnvError(f"search: {error}") from error
        self._searcher = build_searcher(
            backend, backend_options or {}, self._world if self._generated else None
        )
        if noise and not self._searcher.simulated:
            raise EnvError(
                f"search noise = {noise}: the back end {backend!r} is a real search engine, which "
                "cannot be told to mislead; set noise = 0"
            )
        needed = objectives * max(self._hops) + 1 if self._generated else 2 * objectives
        slack = 0 if not self._searcher.simulated else 2
        self._key = f"{crc32(repr((questions, *self._world)).encode()):x}"
        self._episode: _Episode | None = None
        self.spec = EnvSpec(
            name=NAME,
            version=f"{VERSION}+{self._key}",
            description="Questions answered by searching; token F1 or exact match.",
            max_turns=max_turns or max(USUAL_TURNS, needed + slack),
            deterministic=backend in ("corpus", "bm25"),
            scheduled=("noise",) if self._searcher.simulated else (),
            snapshots=True,
        )
        if self._generated and self.spec.max_turns < needed:
            raise EnvError(
                f"search max_turns = {max_turns}: {objectives} question(s) of {max(self._hops)} "
                f"hop(s) need {needed} turns"
            )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream for generated questions; a file's questions once, shuffled."""
        if split not in SPLITS:
            raise EnvError(f"search split {split!r}: must be 'train' or 'test'")
        rng = Random(f"tasks/{split}/{seed}")
        if self._generated:
            world = knowledge(*self._world, split)
            while True:
                hops = [rng.choice(self._hops) for _ in range(self._objectives)]
                chosen = [asking.generate(world, rng, h, self._relations) for h in hops]
                yield self._task(split, chosen, f"{max(hops)}hop", max(hops))
        questions = list(self._read[split])
        rng.shuffle(questions)
        for at in range(0, len(questions) - self._objectives + 1, self._objectives):
            yield self._task(split, questions[at : at + self._objectives], "questions", 1)

    def _task(self, split: str, chosen: Sequence[Question], scenario: str, hops: int) -> Task:
        text = asking.joined(chosen)
        number = crc32(text.encode(errors="replace"))
        return Task(
            environment=NAME,
            id=f"{scenario}-{len(chosen)}-{self._key}-{number:x}",
            seed=2 * number + (split == "test"),
            split=split,
            scenario=scenario if len(chosen) == 1 else f"{scenario}-x{len(chosen)}",
            difficulty=min(hops, 3),
            payload=asking.to_payload(chosen),
        )

    async def reset(self, task: Task) -> Observation:
        """Ask the question. Raises `TaskError` for a task that is not one of this environment's."""
        try:
            questions = asking.from_payload(task.payload)
            noise = float(task.payload.get("noise", self._noise))
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(f"{task.id}: no task of the search environment: {error!r}") from error
        if not questions or not 0 <= noise <= 1 or task.split not in SPLITS:
            raise TaskError(
                f"{task.id}: {len(questions)} questions, noise {noise}: cannot be played"
            )
        self._episode = _Episode(task=task, questions=questions, noise=noise)
        return self._opening(asking.joined(questions))

    async def step(self, action: str) -> Step:
        """A query, the answer, or a fault that costs a turn."""
        episode = self._live()
        if episode.answer is not None:
            return Step(observation=Observation(messages=()), terminated=True)
        step, episode.turns = episode.turns, episode.turns + 1
        act = parse_turn(action, "state" if self._memory == "constant" else "think")
        if isinstance(act, Malformed):
            hint = "error: search or answer" if self._style == "compact" else f"error: {act.hint}"
            return self._reply(episode, None, hint, {f"policy_fault/{act.category}": 1})
        if act.kind == "answer":
            episode.answer = act.text
            return Step(observation=Observation(messages=()), terminated=True)
        noisy = self._searcher.simulated and is_noisy(
            episode.task.id, act.text, step, episode.noise
        )
        episode.last = list(
            await self._searcher.search(self._query(episode, act.text, step, noisy))
        )
        episode.useful += not noisy
        episode.noisy += noisy
        text = f"<information>{self._render(episode.last)}</information>"
        return self._reply(episode, act, text, {f"search/{'noisy' if noisy else 'useful'}": 1})

    def _query(self, episode: _Episode, text: str, step: int, noisy: bool) -> Query:
        return Query(
            text=text,
            task_id=episode.task.id,
            split=episode.task.split,
            step=step,
            documents=self._documents,
            question=asking.joined(episode.questions),
            answers=tuple(answer for q in episode.questions for answer in q.answers),
            noisy=noisy,
        )

    async def evaluate(self) -> Verdict:
        """The reward summed over the objectives, answers taken by position. Parts: means of F1 and
        EM over the objectives, and the number of searches. Success: every answer is exact."""
        episode = self._live()
        count = len(episode.questions)
        answers = _by_position(episode.answer or "", count)
        pairs = list(zip(answers, episode.questions, strict=True))
        f1 = [token_f1(answer, q.answers) for answer, q in pairs]
        em = [exact_match(answer, q.answers) for answer, q in pairs]
        return Verdict(
            reward=sum(f1 if self._reward == "f1" else em),
            success=all(em),
            parts={
                "f1": sum(f1) / count,
                "em": sum(em) / count,
                "searches": float(episode.useful + episode.noisy),
            },
        )

    def oracle(self) -> Iterator[str]:
        """Searches every fact of every chain, again where the answer was noise, and answers."""
        episode = self._live()
        world = knowledge(*self._world, episode.task.split) if self._generated else None
        return Solver(
            questions=episode.questions,
            world=world,
            constant=self._memory == "constant",
            simulated=self._searcher.simulated,
            turns=self.spec.max_turns,
        ).actions(
            noise=lambda query: (
                self._searcher.simulated
                and is_noisy(episode.task.id, query, episode.turns, episode.noise)
            ),
            documents=lambda: episode.last,
            taken=lambda: episode.turns,
        )

    def answers(self) -> Sequence[str]:
        """The gold answers of generated questions; users' own may name theirs in the question."""
        questions = self._live().questions if self._generated else ()
        return [answer for q in questions for answer in q.answers]

    async def snapshot(self) -> bytes:
        """How far the episode is, as JSON."""
        episode = self._live()
        state = {name: getattr(episode, name) for name in _KEPT}
        state["last"] = [[d.id, d.title, d.text] for d in episode.last]
        return json.dumps({"task": episode.task.id, **state}).encode()

    async def restore(self, task: Task, blob: bytes) -> None:
        """Go on where `snapshot` was taken. Raises `EnvError` for a blob of another task."""
        await self.reset(task)
        episode = self._live()
        try:
            state = json.loads(blob)
            if state["task"] != task.id:
                raise EnvError(f"the snapshot is of task {state['task']!r}, not of {task.id!r}")
            for name in _KEPT:
                setattr(episode, name, state[name])
            episode.last = [Document(id=i, title=t, text=x) for i, t, x in state["last"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EnvError(f"not a snapshot of {task.id!r}: {error!r}") from error

    async def close(self) -> None:
        """Forget the episode and let the searcher go."""
        self._episode = None
        self._searcher.close()

    def _live(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("search: no task is being played; call reset(task) first")
        return self._episode

    def _render(self, documents: Sequence[Document]) -> str:
        if self._style == "compact":
            return " ; ".join(d.text for d in documents)
        lines = [f"Doc {n} (Title: {d.title}) {d.text}" for n, d in enumerate(documents, 1)]
        return "\n".join(lines) or "nothing found"

    def _opening(self, question: str, memory: str = "", *, fresh: bool = False) -> Observation:
        system = Message(
            role="system", content=_system(self._style, self._memory, self._objectives)
        )
        user = Message(role="user", content=question + memory)
        return Observation(messages=(system, user), fresh=fresh)

    def _reply(
        self, episode: _Episode, act: Act | None, text: str, signals: Mapping[str, int]
    ) -> Step:
        """The reply appended, or, in constant-memory mode, the context rebuilt around it."""
        if self._memory == "full":
            observation = Observation(messages=(Message(role="user", content=text),))
            return Step(observation=observation, signals=signals)
        gap = "\n" if self._style == "full" else " "
        if act is not None:
            state = f"<state>{act.thoughts}</state><search>{act.text}</search>"
            episode.memory = gap + state + text
        memory = episode.memory if act is not None else episode.memory + gap + text
        question = asking.joined(episode.questions)
        return Step(observation=self._opening(question, memory, fresh=True), signals=signals)


def _by_position(answer: str, count: int) -> list[str]:
    """The answer's parts, one for each question; those too many are ignored, missing ones empty."""
    if count == 1:
        return [answer]
    parts = [part.strip() for part in answer.split(asking.SEPARATOR.strip())]
    return (parts + [""] * count)[:count]


def _system(style: Style, memory: Memory, objectives: int) -> str:
    if style == "compact":
        return "use search"
    thoughts = "state" if memory == "constant" else "think"
    lines = [
        f"Answer the question. Reason inside <{thoughts}></{thoughts}> first, whenever you get new "
        "information. If you lack knowledge, write <search>query</search>: a search engine answers "
        "between <information> and </information>; its documents may be wrong or beside the point. "
        "Search as often as you need. When you know the answer, write <answer>answer</answer>: the "
        "answer alone, without explanation. Each turn ends with exactly one search or answer.",
    ]
    if memory == "constant":
        lines.append(
            "You will see only this question, your last <state> and its search with the result: "
            "keep in <state> everything that you need later."
        )
    if objectives > 1:
        lines.append(
            f"There are {objectives} questions, separated by semicolons: give the answers in the "
            "same order, separated by semicolons."
        )
    return "\n".join(lines)


def _check(
    style: str,
    hops: Sequence[int],
    relations: Sequence[str] | None,
    objectives: int,
    documents: int,
    noise: float,
    memory: str,
    reward: str,
    max_turns: int,
) -> None:
    """Refuse values that no episode can be played with."""
    choices = {"style": (style, SCHEMAS), "memory": (memory, ("full", "constant"))}
    choices["reward"] = (reward, ("f1", "em"))
    for name, (value, known) in choices.items():
        if value not in known:
            raise EnvError(f"search {name} = {value!r}: must be one of {', '.join(known)}")
    known_relations = SCHEMAS[style].relations  # type: ignore[index]
    unknown = [r for r in relations or () if r not in known_relations]
    if unknown or (relations is not None and not relations):
        raise EnvError(
            f"search relations {unknown or relations}: unknown; style {style!r} has "
            f"{', '.join(known_relations)}"
        )
    if not hops or not all(isinstance(h, int) and 1 <= h <= MAX_HOPS for h in hops):
        raise EnvError(f"search hops = {hops!r}: must be numbers from 1 to {MAX_HOPS}")
    bounds = (
        ("objectives", objectives, 1, MAX_OBJECTIVES),
        ("documents", documents, 1, MAX_DOCUMENTS),
        ("noise", noise, 0, 1),
        ("max_turns", max_turns, 0, 1000),
    )
    for name, number, low, high in bounds:
        if not low <= number <= high:
            raise EnvError(f"search {name} = {number}: must be {low} to {high}")
