"""A fictional world of facts: things with unique names, functional relations, documents, chains.

Everything follows from (style, size, seed, split). The two splits are two worlds whose names share
nothing: the n-th name of a kind is a bijection of n, and the splits take different n. So whatever a
policy reads in training, it has never met a held-out name. Relations are arrays, documents are
worded when they are asked for: 60,000 things cost tenths of a second, not a gigabyte.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random
from zlib import crc32

import numpy as np

from loopwright.envs.search.relations import NUMBER, SCHEMAS, Relation, Style

TEST_SHARE = 5  # one name in so many belongs to the held-out split
SPLITS = ("train", "test")
_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"
_SYLLABLES = [c + v for c in _CONSONANTS for v in _VOWELS]  # 75
_WORDS = len(_SYLLABLES) ** 3
_SPREAD = 99_991  # prime to every number of names below: neighbours get unlike names
_KIND_WORDS = 50_000  # words apart: no two kinds share one, unless a kind has more things
_FIRST_NAMES = 300
_LAST_NAMES = 5625  # two syllables
# fmt: off
COMPACT_NAMES = (
    "Ana", "Bo", "Cid", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo",
    "Mia", "Ned", "Ola", "Pia", "Rex", "Sue", "Tom", "Uma", "Vic", "Wes", "Zoe", "Abe",
)
# fmt: on
COMPACT_NUMBERS = range(10, 40)
COMPACT_LIMIT = len(COMPACT_NAMES) * len(COMPACT_NUMBERS)


@dataclass(frozen=True, slots=True)
class Fact:
    """Subject, relation, object: the subject is a thing's number within its kind."""

    relation: str
    subject: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A short text about one thing."""

    id: str
    title: str
    text: str


class Knowledge:
    """One split's world. Numbers of things count from 0 within each kind."""

    def __init__(self, style: Style, entities: int, seed: int, split: str) -> None:
        """`entities` things in both splits together; raises `ValueError` where names run out."""
        self.style, self.split, self.seed = style, split, seed
        self.schema = SCHEMAS[style]
        if style == "compact" and entities > COMPACT_LIMIT:
            raise ValueError(
                f"entities = {entities}: the compact style has {COMPACT_LIMIT} names; take fewer, "
                "or style 'full'"
            )
        self._key = f"{style}/{entities}/{seed}/{split}"
        self.names: dict[str, list[str]] = {}
        for place, kind in enumerate(self.schema.kinds):
            total = max(2 * TEST_SHARE, round(entities * kind.share))
            mine = [n for n in range(total) if (n % TEST_SHARE == 0) == (split == "test")]
            self.names[kind.name] = [
                _name(kind.pattern, n, seed + place * _KIND_WORDS) for n in mine
            ]
        rng = np.random.default_rng(crc32(self._key.encode()))
        self._objects = {r.name: self._draw(r, rng) for r in self.schema.relations.values()}

    def _draw(self, relation: Relation, rng: np.random.Generator) -> np.ndarray:
        """The object of each subject; nothing is related to itself."""
        subjects = len(self.names[relation.subject])
        if relation.object == NUMBER:
            return rng.integers(relation.numbers[0], relation.numbers[1] + 1, size=subjects)
        objects = len(self.names[relation.object])
        drawn = rng.integers(0, objects, size=subjects)
        if relation.object == relation.subject:
            clash = drawn == np.arange(subjects)
            drawn[clash] = (drawn[clash] + 1) % objects
        return drawn

    @property
    def entities(self) -> int:
        """How many things there are."""
        return sum(len(names) for names in self.names.values())

    @property
    def documents(self) -> int:
        """How many documents there are: one a fact."""
        return sum(len(objects) for objects in self._objects.values())

    def subject_name(self, fact: Fact) -> str:
        """The name of the thing that the fact is about."""
        return self.names[self.schema.relations[fact.relation].subject][fact.subject]

    def object_number(self, fact: Fact) -> int:
        """The object as a thing's number within its kind, or the number itself."""
        return int(self._objects[fact.relation][fact.subject])

    def object_name(self, fact: Fact) -> str:
        """The object as text."""
        kind = self.schema.relations[fact.relation].object
        number = self.object_number(fact)
        return str(number) if kind == NUMBER else self.names[kind][number]

    def document(self, fact: Fact) -> Document:
        """The document that states the fact, always worded the same."""
        rng = Random(f"document/{self._key}/{fact.relation}/{fact.subject}")
        relation = self.schema.relations[fact.relation]
        subject = self.subject_name(fact)
        sentence = rng.choice(relation.sentences).format(s=subject, o=self.object_name(fact))
        other = rng.choice(self.names[rng.choice(self.schema.kinds).name])
        filler = rng.choice(self.schema.fillers).format(other=other)
        return Document(
            id=f"{fact.relation}/{fact.subject}",
            title=subject,
            text=f"{sentence} {filler}".strip(),
        )

    def facts(self) -> list[Fact]:
        """Every fact, in a fixed order."""
        return [
            Fact(name, s) for name, objects in self._objects.items() for s in range(len(objects))
        ]

    def facts_about(self, relation: str) -> int:
        """How many subjects the relation has."""
        return len(self._objects[relation])

    def relations_of(self, kind: str) -> tuple[Relation, ...]:
        """The relations whose subject is of this kind."""
        return self._by_kind[kind]

    @cached_property
    def _by_kind(self) -> dict[str, tuple[Relation, ...]]:
        table: dict[str, list[Relation]] = defaultdict(list)
        for relation in self.schema.relations.values():
            table[relation.subject].append(relation)
        return {kind: tuple(relations) for kind, relations in table.items()}

    def find(self, text: str) -> list[tuple[str, int]]:
        """(kind, number) of each thing that the text names, in the text's order. Matches whole
        words, longest names first, whatever their case."""
        words = text.split()
        plain = [w.strip(".,;:!?\"'()").lower() for w in words]
        found: list[tuple[str, int]] = []
        at = 0
        while at < len(plain):
            for length in range(min(self._longest, len(plain) - at), 0, -1):
                thing = self._by_name.get(" ".join(plain[at : at + length]))
                if thing is not None:
                    found.append(thing)
                    at += length
                    break
            else:
                at += 1
        return found

    @cached_property
    def _by_name(self) -> dict[str, tuple[str, int]]:
        return {
            name.lower(): (kind, number)
            for kind, names in self.names.items()
            for number, name in enumerate(names)
        }

    @cached_property
    def _longest(self) -> int:
        return max(len(name.split()) for names in self.names.values() for name in names[:1])

    def chain(self, rng: Random, hops: int, relations: Sequence[str] | None = None) -> list[Fact]:
        """A chain of `hops` facts, each about the former's object, that meets no thing twice.

        Only a number can end it early, so a chain with a number has it last. Raises `ValueError`
        if none is found in a thousand tries.
        """
        allowed = set(relations or self.schema.relations)
        starts = [r for r in self.schema.relations.values() if r.name in allowed]
        for _ in range(1000):
            relation = rng.choice(starts)
            subject = rng.randrange(self.facts_about(relation.name))
            facts = [Fact(relation.name, subject)]
            seen = {(relation.subject, subject)}
            while len(facts) < hops:
                thing = (relation.object, self.object_number(facts[-1]))
                onward = [r for r in self._by_kind.get(thing[0], ()) if r.name in allowed]
                if thing in seen or not onward:
                    break
                seen.add(thing)
                relation = rng.choice(onward)
                facts.append(Fact(relation.name, thing[1]))
            last = (relation.object, self.object_number(facts[-1]))
            if len(facts) == hops and last not in seen:
                return facts
        raise ValueError(
            f"no chain of {hops} hops over the relations {sorted(allowed)} of style {self.style!r}"
        )


@lru_cache(maxsize=8)
def knowledge(style: Style, entities: int, seed: int, split: str) -> Knowledge:
    """The world of these arguments, made once a process: it never changes."""
    return Knowledge(style, entities, seed, split)


def _word(number: int) -> str:
    a, rest = divmod(number * _SPREAD % _WORDS, len(_SYLLABLES) ** 2)
    b, c = divmod(rest, len(_SYLLABLES))
    return (_SYLLABLES[a] + _SYLLABLES[b] + _SYLLABLES[c]).capitalize()


def _name(pattern: str, number: int, seed: int) -> str:
    """The n-th name of a pattern; different numbers give different names."""
    if pattern == "{f}{n}":
        at = (number * 7 + seed) % COMPACT_LIMIT
        first, digits = at % len(COMPACT_NAMES), at // len(COMPACT_NAMES)
        return f"{COMPACT_NAMES[first]}{COMPACT_NUMBERS[digits]}"
    if pattern == "{f} {l}":
        at = (number * _SPREAD + seed) % (_FIRST_NAMES * _LAST_NAMES)
        last, first = divmod(at, _FIRST_NAMES)
        ending = _SYLLABLES[last // 75] + _SYLLABLES[last % 75] + "nrsk"[last % 4]
        return f"{_word(first)[:4]}{'aeio'[first % 4]} {ending.capitalize()}"
    return pattern.format(w=_word(number + seed))
