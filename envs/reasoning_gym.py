"""Adapter to the `reasoning-gym` package: procedurally generated puzzles with their own scorers.

Options: `dataset` (default `chain_sum`), `size` (items to draw from, per data set), `data_seed`,
`tries` (answers allowed), and every option of that data set's own configuration. The policy writes
`<answer>…</answer>`.

The splits are disjoint by question: a hash of the text decides whether a question may be trained
on. Reward is the package's own score, clipped to [0, 1], non-finite scores count as 0; success is a
score of at least 0.999. A scorer that raises on the policy's text gives 0 and the signal
`policy_fault/scorer_error`: the text is to blame.
"""

import difflib
import importlib
import importlib.metadata
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

# fmt: off
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

# fmt: on

NAME = "reasoning_gym"
SUCCESS_SCORE = 0.999
MAX_REDRAWS = 1000  # questions drawn in a row that all belong to the other split
MAX_ANSWER_CHARS = 10_000
SYSTEM = "Solve the problem. Write your final answer between <answer> and </answer>."
# What scorers raise when text is not what they parse; anything else is a fault of the environment.
_PARSING = (SyntaxError, TypeError, ValueError, AssertionError)
SCORER_ERRORS = (*_PARSING, ArithmeticError, AttributeError, LookupError, RecursionError)


@dataclass(slots=True, kw_only=True)
class _Episode:
    """The live task."""

    entry: Mapping[str, Any]
    tries: int = 0
    score: float = 0.0


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise ImportError(
            "the environment reasoning_gym needs a package that is not installed; "
            "remedy: pip install 'loopwright[reasoning-gym]'"
        ) from error


def _dataset(name: str, size: int, seed: int, config: Mapping[str, Any]) -> Any:
    factory = _package()
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, n=3)
        raise EnvError(
            f"reasoning_gym dataset {name!r}: unknown; nearest: {', '.join(near) or '-'}"
        )
    known = [f.name for f in fields(factory.DATASETS[name][1])]
    for option in config:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1) or known
            raise EnvError(f"reasoning_gym {name}: unknown option {option!r}; nearest: {near}")
    try:
        return factory.create_dataset(name, size=size, seed=seed, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise EnvError(f"reasoning_gym {name} refuses {dict(config)}: {error}") from error


def _split_of(question: str) -> str:
    return "test" if zlib.crc32(question.encode()) % 4 == 0 else "train"


class ReasoningGym:
    """Single-turn puzzles; implements `Env` and `TaskSource`. Raises `EnvError` for bad options."""

    def __init__(
        self,
        dataset: str = "chain_sum",
        size: int = 10_000,
        data_seed: int = 0,
        tries: int = 1,
        **config: Any,
    ) -> None:
        if size < 1 or tries < 1:
            raise EnvError(f"reasoning_gym size {size}, tries {tries}: both must be at least 1")
        self._name = dataset
        self._data = _dataset(dataset, size, data_seed, config)
        self._size = size
        self._tries = tries
        self._key = f"{zlib.crc32(repr((size, data_seed, sorted(config.items()))).encode()):x}"
        self._episode: _Episode | None = None
        version = importlib.metadata.version("reasoning-gym")
        self.spec = EnvSpec(
            name=NAME,
            version=f"{version}+{dataset}.{self._key}",
            description=f"reasoning-gym {dataset}: generated puzzles with a verifier.",
            max_turns=tries,
        )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream of this split's questions. Raises `EnvError` if the split has none."""
        if split not in ("train", "test"):
            raise EnvError(f"reasoning_gym split {split!r}: must be 'train' or 'test'")
        rng = Random(f"tasks/{split}/{seed}")
        redraws = 0
        while redraws < MAX_REDRAWS:
            index = rng.randrange(self._size)
            question = str(self._data[index]["question"])
            if _split_of(question) != split:
                redraws += 1
                continue
            redraws = 0
            yield Task(
                environment=NAME,
                id=f"{self._name}-{self._key}-{index}",
                seed=index,
                split=split,
                scenario=self._name,
                payload={"index": index, "crc": zlib.crc32(question.encode())},
            )
        raise EnvError(f"reasoning_gym {self._name}: no {split} question in {MAX_REDRAWS} draws")

    async def reset(self, task: Task) -> Observation:
        """Ask the question. Raises `TaskError` if the package does not repeat it."""
        entry = self._data[task.payload["index"]]
        if zlib.crc32(str(entry["question"]).encode()) != task.payload["crc"]:
            raise TaskError(f"{task.id}: {self._name} gave another question for the same seed")
        self._episode = _Episode(entry=entry)
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
            episode.score, raised = self._score(answer.strip(), episode.entry)
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

    def _score(self, answer: str, entry: Mapping[str, Any]) -> tuple[float, bool]:
        """The package's score in [0, 1], and whether its scorer raised."""
        try:
            score = float(self._data.score_answer(answer, entry))
        except SCORER_ERRORS:
            return 0.0, True
        return (min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0), False

    def _live(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("reasoning_gym: no live task; call reset(task) first")
        return self._episode
