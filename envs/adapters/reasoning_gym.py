"""Adapter to the `reasoning-gym` package: procedurally generated puzzles with their own scorers.

    [environment]
    name = "reasoning_gym"
    options = { dataset = "basic_arithmetic", level = [0, 1, 2] }

Options: `dataset`; `level`, of the data set's own curriculum, one or several (each is a scenario of
its own); every option of the data set's configuration, which wins over the level; `size` (items to
draw from, per data set), `data_seed`, `tries` (answers allowed). Instead of one data set,
`datasets = [{ name, weight, level, config }, …]` mixes some, as the package's `composite` does. The
policy writes `<answer>…</answer>`.

The splits are disjoint by question: a hash of the text decides whether a question may be trained
on. Reward is the package's own score, clipped to [0, 1], non-finite scores count as 0; success is a
score of at least 0.999. A scorer that raises on the policy's text gives 0 and the signal
`policy_fault/scorer_error`: the text is to blame.
"""

import importlib.metadata
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from loopwright.envs.adapters import foreign
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

NAME = "reasoning_gym"
SUCCESS_SCORE = 0.999
MAX_ANSWER_CHARS = 10_000
SYSTEM = "Solve the problem. Write your final answer between <answer> and </answer>."
# What scorers raise when text is not what they parse; anything else is a fault of the environment.
_PARSING = (SyntaxError, TypeError, ValueError, AssertionError)
SCORER_ERRORS = (*_PARSING, ArithmeticError, AttributeError, LookupError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One data set at one level."""

    data: Any  # of the package: items by index, and their scorer
    name: str
    scenario: str
    difficulty: int
    weight: float
    key: str  # of its configuration


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The live task."""

    source: _Source
    entry: Mapping[str, Any]
    tries: int = 0
    score: float = 0.0


def _levels(name: str, wanted: Sequence[int]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Scenario, difficulty 1 … 3 and configuration of each level. Raises `EnvError` for those that
    do not exist."""
    package = foreign.imported("reasoning_gym.factory", NAME, "reasoning-gym")
    if name not in package.CURRICULA:
        raise EnvError(f"reasoning_gym {name}: it has no curriculum, so no levels {list(wanted)}")
    for level in wanted:
        curriculum = package.create_curriculum(name)
        attributes = curriculum.attributes.values()
        highest = max(len(attribute.levels) for attribute in attributes) - 1
        if not 0 <= level <= highest:
            raise EnvError(f"reasoning_gym {name}: level {level}, must be 0 to {highest}")
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration()
        names = ("field_name", "lower_field_name", "upper_field_name")
        chosen = [vars(a)[n] for a in attributes for n in names if n in vars(a)]
        difficulty = 1 + 3 * level // (highest + 1)
        yield f"{name}/level-{level}", difficulty, {n: vars(made)[n] for n in chosen}


def _dataset(name: str, size: int, seed: int, config: Mapping[str, Any]) -> Any:
    package = foreign.imported("reasoning_gym.factory", NAME, "reasoning-gym")
    if name == "composite":
        raise EnvError("reasoning_gym composite: write datasets = [{ name, weight, config }, …]")
    if name not in package.DATASETS:
        raise foreign.unknown("reasoning_gym dataset", name, package.DATASETS)
    known = [f.name for f in fields(package.DATASETS[name][1])]
    for option in config:
        if option not in known:
            raise foreign.unknown(f"reasoning_gym {name}: option", option, known)
    try:
        return package.create_dataset(name, size=size, seed=seed, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise EnvError(f"reasoning_gym {name} refuses {dict(config)}: {error}") from error


def _sources(entry: Mapping[str, Any], size: int, seed: int) -> Iterator[_Source]:
    """The sources of one entry of `datasets`."""
    if set(entry) - {"name", "weight", "level", "config"} or "name" not in entry:
        raise EnvError(
            f"reasoning_gym datasets {dict(entry)}: expected name, and perhaps weight, level, "
            "config; nothing else"
        )
    name, level, weight = str(entry["name"]), entry.get("level"), float(entry.get("weight", 1.0))
    if not 0.0 < weight < math.inf:
        raise EnvError(f"reasoning_gym {name}: weight {weight}, must be more than 0")
    own = dict(entry.get("config", {}))
    _dataset(name, 1, seed, own)  # an unknown name or option is said before a level is
    levels = [(name, 1, dict[str, Any]())]
    if level is not None:
        levels = list(_levels(name, [level] if isinstance(level, int) else level))
    for scenario, difficulty, from_level in levels:
        config = {**from_level, **own}
        yield _Source(
            data=_dataset(name, size, seed, config),
            name=name,
            scenario=scenario,
            difficulty=difficulty,
            weight=weight / len(levels),
            key=f"{foreign.content_hash(repr((size, seed, sorted(config.items())))):x}",
        )


class ReasoningGym:
    """Single-turn puzzles; implements `Env` and `TaskSource`. Raises `EnvError` for bad options."""

    def __init__(
        self,
        dataset: str = "",
        size: int = 10_000,
        data_seed: int = 0,
        tries: int = 1,
        level: int | Sequence[int] | None = None,
        datasets: Sequence[Mapping[str, Any]] = (),
        **config: Any,
    ) -> None:
        """Without `dataset` and `datasets` it is `chain_sum`."""
        if size < 1 or tries < 1:
            raise EnvError(f"reasoning_gym size {size}, tries {tries}: both must be at least 1")
        if datasets and (config or level is not None or dataset not in ("", "composite")):
            raise EnvError("reasoning_gym datasets: name, level and config belong into its entries")
        single = {"name": dataset or "chain_sum", "level": level, "config": config}
        entries = datasets or [single]
        self._sources = [s for entry in entries for s in _sources(entry, size, data_seed)]
        if len({s.scenario for s in self._sources}) < len(self._sources):
            raise EnvError("reasoning_gym: a data set occurs twice at the same level")
        self._size, self._tries = size, tries
        self._episode: _Episode | None = None
        version = importlib.metadata.version("reasoning-gym")
        names = ", ".join(s.scenario for s in self._sources)
        keys = "+".join(f"{s.scenario}.{s.key}" for s in self._sources)
        self.spec = EnvSpec(
            name=NAME,
            version=f"{version}+{keys if len(keys) < 80 else foreign.content_hash(keys)}",
            description=f"reasoning-gym {names}: generated puzzles with a verifier.",
            max_turns=tries,
        )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream of this split's questions. Raises `EnvError` if the split has none."""
        weights = list(itertools.accumulate(s.weight for s in self._sources))

        def draw(rng: Random) -> tuple[Mapping[str, Any], str]:
            number = rng.choices(range(len(weights)), cum_weights=weights)[0] if weights[1:] else 0
            index = rng.randrange(self._size)
            question = str(self._sources[number].data[index]["question"])
            return {"source": number, "index": index}, question

        where = f"reasoning_gym {', '.join(s.scenario for s in self._sources)}"
        for origin, question in foreign.drawn_for(split, seed, where, draw):
            source, index = self._sources[origin["source"]], origin["index"]
            yield Task(
                environment=NAME,
                id=f"{source.scenario}-{source.key}-{index}",
                seed=index,
                split=split,
                scenario=source.scenario,
                difficulty=source.difficulty,
                payload={**origin, "crc": foreign.content_hash(question)},
            )

    async def reset(self, task: Task) -> Observation:
        """Ask the question. Raises `TaskError` if the package does not repeat it."""
        source = self._sources[task.payload["source"]]
        entry = source.data[task.payload["index"]]
        if foreign.content_hash(str(entry["question"])) != task.payload["crc"]:
            raise TaskError(f"{task.id}: {source.name} gave another question for the same seed")
        self._episode = _Episode(source=source, entry=entry)
        user = Message(role="user", content=str(entry["question"]))
        return Observation(messages=(Message(role="system", content=SYSTEM), user))

    async def step(self, action: str) -> Step:
        """Take an answer; the last tagged one counts."""
        episode = self._live()
        if episode.tries >= self._tries:
            return Step(observation=Observation(messages=()), terminated=True)
        episode.tries += 1
        _, opened, rest = action.rpartition("<answer>")
        answer, closed, _ = rest.partition("</answer>")
        signals: dict[str, int] = {}
        reply = "That is not right."
        if opened and closed and len(answer) <= MAX_ANSWER_CHARS:
            episode.score, raised = _score(answer.strip(), episode)
            if raised:
                signals["policy_fault/scorer_error"] = 1
        else:
            signals["policy_fault/parse"] = 1
            reply = "Write the answer between <answer> and </answer>."
        if episode.score >= SUCCESS_SCORE or episode.tries >= self._tries:
            episode.tries = self._tries
            return Step(observation=Observation(messages=()), terminated=True, signals=signals)
        return Step(
            observation=Observation(messages=(Message(role="user", content=reply),)),
            signals=signals,
        )

    async def evaluate(self) -> Verdict:
        """The score of the last answer; 0 without one."""
        score = self._live().score
        return Verdict(reward=score, success=score >= SUCCESS_SCORE, parts={"score": score})

    def oracle(self) -> Iterator[str]:
        """The data set's own answer, if it has one."""
        answer = self._live().entry["answer"]
        if answer is not None:
            yield f"<answer>{answer}</answer>"

    async def close(self) -> None:
        """Forget the episode."""
        self._episode = None

    def _live(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("reasoning_gym: no live task; call reset(task) first")
        return self._episode


def _score(answer: str, episode: _Episode) -> tuple[float, bool]:
    """The package's score in [0, 1], and whether its scorer raised."""
    try:
        score = float(episode.source.data.score_answer(answer, episode.entry))
    except SCORER_ERRORS:
        return 0.0, True
    return (min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0), False
