"""One protocol for everything that answers a query, and the simulator that needs no model.

A simulated searcher (ZeroSearch, arXiv:2505.04588) is told whether to be useful or noisy; a real
one is not asked. Whether a query is answered with noise is drawn from a hash of (task, query,
step): the same in every process, and for every rollout of the task that asks the same.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from loopwright.envs.search.knowledge import Document, Fact, Knowledge, knowledge
from loopwright.envs.search.relations import Style

_TRIES = 20  # draws of a near miss before it is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of one episode."""

    text: str
    task_id: str
    split: str
    step: int  # of the episode, from 0
    documents: int  # how many are wanted
    question: str  # the episode's own, for a simulator that is told
    answers: Sequence[str]  # the gold answers to it
    noisy: bool  # the simulator is to mislead


class Searcher(Protocol):
    """What answers queries."""

    simulated: bool  # it can be told to be noisy

    async def search(self, query: Query) -> Sequence[Document]:
        """At most `query.documents` documents. An exception is an infrastructure fault."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def draw(*parts: object) -> float:
    """A number in [0, 1) from a hash of the parts: the same in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_noisy(task_id: str, query: str, step: int, probability: float) -> bool:
    """Whether this query is to be answered with noise."""
    return draw("noise", task_id, " ".join(query.lower().split()), step) < probability


class CorpusSimulator:
    """Simulates a search engine over a generated world, without a model.

    Useful: the documents that state what the query asks for (a thing that it names and, where it
    names one, a relation), among near misses. Noisy: near misses alone, the same relation of other
    things, none of which states what was asked for.
    """

    simulated = True

    def __init__(self, style: Style, entities: int, seed: int) -> None:
        self._world = (style, entities, seed)

    async def search(self, query: Query) -> Sequence[Document]:
        """The documents, in an order that says nothing."""
        world = knowledge(*self._world, query.split)
        rng = Random(draw("documents", query.task_id, query.text, query.step))
        things = list(dict.fromkeys(world.find(query.text)))
        asked = asked_facts(world, query.text, things)
        shown = [] if query.noisy else [world.document(f) for f in asked[: query.documents]]
        shown += _near_misses(world, asked, things, query, rng, query.documents - len(shown))
        rng.shuffle(shown)
        return shown

    def close(self) -> None:
        """Nothing to free: worlds are shared."""


def asked_facts(world: Knowledge, text: str, things: Sequence[tuple[str, int]]) -> list[Fact]:
    """What a query that names these things asks for: their relations that it names, or all."""
    words = _words(text)
    facts: list[Fact] = []
    for kind, number in things:
        relations = world.relations_of(kind)
        named = [r for r in relations if words.intersection(r.words)]
        facts += [Fact(r.name, number) for r in named or relations]
    return facts


def _near_misses(
    world: Knowledge,
    asked: Sequence[Fact],
    things: Iterable[tuple[str, int]],
    query: Query,
    rng: Random,
    count: int,
) -> list[Document]:
    """`count` documents of the same relations about other things, none of which holds an answer."""
    relations = list(dict.fromkeys(f.relation for f in asked))
    if not relations:
        words = _words(query.text)
        every = world.schema.relations.values()
        named = [r.name for r in every if words.intersection(r.words)]
        relations = named or [r.name for r in every]
    named_things = set(things)
    right = {world.object_name(f) for f in asked} | set(query.answers)
    found: dict[Fact, Document] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        relation = rng.choice(relations)
        fact = Fact(relation, rng.randrange(world.facts_about(relation)))
        about = (world.schema.relations[relation].subject, fact.subject)
        if fact not in found and about not in named_things:
            document = world.document(fact)
            if not any(answer in document.text for answer in right):
                found[fact] = document
    return list(found.values())


def _words(text: str) -> set[str]:
    return {w.strip(".,;:!?\"'()").lower() for w in text.split()}
