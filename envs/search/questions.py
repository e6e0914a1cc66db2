"""Questions with their gold answers: generated from a world of facts, or read from the user's file.

A generated question names one thing and a chain of relations from it; its answer is unique because
relations are functional, and verifiable because every fact of the chain is a document. Several
questions are joined by "; " and answered by position (MEM1, arXiv:2506.15841).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from loopwright.envs.protocol import EnvError
from loopwright.envs.search.knowledge import SPLITS, TEST_SHARE, Fact, Knowledge

SEPARATOR = "; "


class DataError(EnvError):
    """A data file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question. `facts` are the chain that leads to the answer, empty for a user's data."""

    text: str
    answers: tuple[str, ...]  # any of them is right
    facts: tuple[Fact, ...] = ()
    titles: tuple[str, ...] = ()  # of the documents that support the answer, where they are known


def generate(
    world: Knowledge, rng: Random, hops: int, relations: Sequence[str] | None = None
) -> Question:
    """A question of `hops` hops. Raises `ValueError` where the relations have no such chain."""
    facts = world.chain(rng, hops, relations)
    phrase = world.subject_name(facts[0])
    for fact in facts:
        phrase = world.schema.relations[fact.relation].phrase.format(x=phrase)
    return Question(
        text=rng.choice(world.schema.questions).format(x=phrase),
        answers=(world.object_name(facts[-1]),),
        facts=tuple(facts),
    )


def to_payload(questions: Sequence[Question]) -> dict[str, Any]:
    """Plain data for a task."""
    return {
        "questions": [
            {
                "text": q.text,
                "answers": list(q.answers),
                "facts": [[f.relation, f.subject] for f in q.facts],
                "titles": list(q.titles),
            }
            for q in questions
        ]
    }


def from_payload(payload: Mapping[str, Any]) -> tuple[Question, ...]:
    """What `to_payload` wrote. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    return tuple(
        Question(
            text=str(q["text"]),
            answers=tuple(map(str, q["answers"])),
            facts=tuple(Fact(str(relation), int(subject)) for relation, subject in q["facts"]),
            titles=tuple(map(str, q["titles"])),
        )
        for q in payload["questions"]
    )


def joined(questions: Sequence[Question]) -> str:
    """The text that asks all of them."""
    return SEPARATOR.join(q.text for q in questions)


def jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line that is not blank. Raises `DataError` with the line's number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: {type(record).__name__}, expected an object")
        yield place, record


@lru_cache(maxsize=8)
def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a JSONL file. One object a line: `question`, and `answer`, `answers` or
    `golden_answers` (a text or a list of texts), as Natural Questions (open) and HotpotQA have
    them; HotpotQA's `supporting_facts` become titles. Raises `DataError` with the line's number."""
    questions: list[Question] = []
    first: dict[str, str] = {}  # question -> the place that asks it first
    for place, record in jsonl(path):
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: no text under 'question'")
        text = text.strip()
        if text in first:
            raise DataError(f"{place}: asks the same as {first[text]}: {text[:80]!r}")
        first[text] = place
        questions.append(
            Question(text=text, answers=_answers(record, place), titles=_titles(record, place))
        )
    if not questions:
        raise DataError(f"{path}: holds no question")
    return tuple(questions)


def _answers(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    keys = [key for key in ("answer", "answers", "golden_answers") if key in record]
    if len(keys) != 1:
        raise DataError(
            f"{place}: {' and '.join(keys) or 'nothing'} given, expected exactly one of "
            "'answer', 'answers', 'golden_answers'"
        )
    value = record[keys[0]]
    answers = [value] if isinstance(value, str) else value
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise DataError(f"{place}: {keys[0]!r} must be a text or a list of texts, none empty")
    return tuple(answers)


def _titles(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    facts = record.get("supporting_facts", [])
    if isinstance(facts, dict):  # the form of the Hugging Face data set
        facts = [[title] for title in facts.get("title", [])]
    try:
        return tuple(dict.fromkeys(str(fact[0]) for fact in facts))
    except (TypeError, IndexError, KeyError) as error:
        raise DataError(
            f"{place}: 'supporting_facts' must be a list of [title, sentence number]"
        ) from error


def split_questions(path: Path, test_path: Path | None) -> Mapping[str, tuple[Question, ...]]:
    """The two splits: by file, or, with one file, by a hash of the question (one in five is held
    out). Raises `DataError` for a question that is in both files, and for an empty split."""
    questions = read_questions(path)
    if test_path is None:
        held_out = [crc32(q.text.encode()) % TEST_SHARE == 0 for q in questions]
        splits = {
            split: tuple(
                q for q, held in zip(questions, held_out, strict=True) if held == (split == "test")
            )
            for split in SPLITS
        }
    else:
        splits = {"train": questions, "test": read_questions(test_path)}
        known = {q.text for q in questions}
        shared = [q.text for q in splits["test"] if q.text in known]
        if shared:
            raise DataError(
                f"{test_path}: {len(shared)} of its questions are in {path} too, the first: "
                f"{shared[0][:80]!r}; held-out questions must not be trained on"
            )
    for split, found in splits.items():
        if not found:
            raise DataError(
                f"{path}: no question is left for the {split} split; give a larger file"
            )
    return splits
