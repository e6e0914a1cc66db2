"""Rewards of an answer in text, 0 … 1 each, and how rewards are put together.

All of them are total: any answer gives a number, never an exception. What is wrong with the *gold*
side is the caller's mistake and raises `ValueError`.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
MAX_PATTERN_TEXT = 10_000  # characters a pattern is tried on: some patterns take exponential time


def normalise(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the, single spaces (SQuAD's rule)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """F1 of the answer's words, best over the gold answers; 0 for no answer.

    ZeroSearch (arXiv:2505.04588), section 3: against the reward hacking of longer answers that
    containment invites.
    """
    return max(
        (_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds), default=0
    )


def _f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    common = (Counter(answer) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised gold answer: equality, not containment."""
    found = normalise(answer)
    return float(bool(found) and any(found == normalise(gold) for gold in golds))


def numeric(answer: str, gold: float, *, relative: float = 0.0, absolute: float = 1e-9) -> float:
    """1 if the answer is one number within max(absolute, relative · |gold|) of `gold`.

    Thousands may be set apart by commas; a unit, a second number or no number give 0. Raises
    `ValueError` for a gold that is not finite or a negative tolerance.
    """
    if not math.isfinite(gold) or relative < 0 or absolute < 0:
        raise ValueError(
            f"gold {gold}, relative {relative}, absolute {absolute}: expected a finite number and "
            "tolerances of 0 or more"
        )
    text = answer.strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII):
        return 0.0
    return float(abs(float(text) - gold) <= max(absolute, relative * abs(gold)))


def matches(answer: str, pattern: str) -> float:
    """1 if the regular expression matches the whole answer. Raises `ValueError` for a pattern that
    does not compile."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from error
    return float(len(answer) <= MAX_PATTERN_TEXT and compiled.fullmatch(answer.strip()) is not None)


def json_equal(answer: str, gold: Any) -> float:
    """1 if the answer is JSON of the same value: key order does not matter, types do."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    return float(same_value(value, gold))


def same_value(a: Any, b: Any) -> bool:
    """Equality of plain values that keeps types apart: `True` is not 1, "1" is not 1, but 1 is 1.0.

    Lists and tuples are the same; NaN equals nothing.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


def passed_share(tests: Mapping[str, bool]) -> float:
    """Share of the tests that passed. Raises `ValueError` without tests."""
    if not tests:
        raise ValueError("no tests: nothing says whether the task is solved")
    return sum(map(bool, tests.values())) / len(tests)


def passed_all(tests: Mapping[str, bool]) -> float:
    """1 if every test passed. Raises `ValueError` without tests."""
    return float(passed_share(tests) == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A reward and its parts, all of them unweighted, those of weight 0 included."""

    reward: float
    parts: Mapping[str, float]


def weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> Weighted:
    """Σ weight · part; a part without a weight counts 0 and is reported all the same.

    Raises `ValueError` for a weight of no part, and for a part or a weight that is not finite.
    """
    unknown = sorted(set(weights) - set(parts))
    if unknown:
        raise ValueError(f"weights of {unknown}, the parts are {sorted(parts)}")
    broken = {k: v for k, v in [*parts.items(), *weights.items()] if not math.isfinite(v)}
    if broken:
        raise ValueError(f"not finite: {broken}")
    return Weighted(reward=sum(w * parts[k] for k, w in weights.items()), parts=dict(parts))
