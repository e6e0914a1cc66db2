"""The tables of the fictional world: kinds of things, relations between them, and how texts name
them.

A relation is functional (one object a subject), so a chain of relations from one thing has exactly
one answer. `{s}` is the subject, `{o}` the object, `{x}` the inner phrase of a question. Original
content.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Style = Literal["compact", "full"]
NUMBER = "number"  # object kind of relations whose object is a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One typed relation."""

    name: str  # also how the oracle words its query
    subject: str  # kind
    object: str  # kind, or NUMBER
    phrase: str  # noun phrase for the object, around {x}
    words: tuple[str, ...]  # lower case; a query that holds one of them asks for this relation
    sentences: tuple[str, ...]  # ways a document states the fact
    numbers: tuple[int, int] = (0, 0)  # first and last, for NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of thing."""

    name: str
    share: float  # of all things
    pattern: str  # of its names: {w} a word of its own, {f} a first name that many share


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Everything a style of world is made of."""

    kinds: tuple[Kind, ...]
    relations: Mapping[str, Relation]
    fillers: tuple[str, ...]  # second sentence of a document; {other} is a thing that is not meant
    questions: tuple[str, ...]  # around the phrase {x}


def _table(*relations: Relation) -> Mapping[str, Relation]:
    return MappingProxyType({r.name: r for r in relations})


def _compact(name: str) -> Relation:
    return Relation(
        name=name,
        subject="person",
        object="person",
        phrase=f"{name} of {{x}}",
        words=(name,),
        sentences=(f"{name} {{s}} = {{o}}",),
    )


COMPACT = Schema(
    kinds=(Kind(name="person", share=1.0, pattern="{f}{n}"),),
    relations=_table(*(_compact(name) for name in ("boss", "pal", "aunt", "chef"))),
    fillers=("",),
    questions=("{x}",),
)

_FULL_RELATIONS = _table(
    Relation(
        name="birthplace",
        subject="person",
        object="city",
        phrase="the city where {x} was born",
        words=("born", "birth", "birthplace", "birthtown", "native"),
        sentences=(
            "{s} was born in {o}.",
            "{s}, a native of {o}, grew up in modest circumstances there.",
            "The parish register of {o} records the birth of {s}.",
            "Born and raised in {o}, {s} left the town only as an adult.",
        ),
    ),
    Relation(
        name="employer",
        subject="person",
        object="company",
        phrase="the company that employs {x}",
        words=("employer", "employs", "employed", "works", "job"),
        sentences=(
            "{s} has worked for {o} for many years.",
            "The payroll of {o} lists {s} among its longest-serving staff.",
            "{o} hired {s} as an engineer and never regretted it.",
            "Since leaving the civil service, {s} has been employed by {o}.",
        ),
    ),
    Relation(
        name="headquarters",
        subject="company",
        object="city",
        phrase="the city where {x} has its headquarters",
        words=("headquarters", "headquartered", "based", "seat"),
        sentences=(
            "{s} has its headquarters in {o}.",
            "The head office of {s} stands on the main square of {o}.",
            "{s} is a firm based in {o}.",
            "From its seat in {o}, {s} directs all its branches.",
        ),
    ),
    Relation(
        name="founder",
        subject="company",
        object="person",
        phrase="the person who founded {x}",
        words=("founder", "founded", "established"),
        sentences=(
            "{s} was founded by {o}.",
            "{o} established {s} with a small inheritance.",
            "The founder of {s}, {o}, ran the business alone at first.",
        ),
    ),
    Relation(
        name="region",
        subject="city",
        object="region",
        phrase="the region in which {x} lies",
        words=("region", "province", "lies"),
        sentences=(
            "{s} is a town in the region of {o}.",
            "{s} lies in the north of {o}.",
            "Travellers who cross {o} usually stop at {s}.",
        ),
    ),
    Relation(
        name="river",
        subject="city",
        object="river",
        phrase="the river that flows through {x}",
        words=("river", "flows"),
        sentences=(
            "{s} stands on the banks of the {o}.",
            "The {o} flows through the middle of {s}.",
            "Two old bridges cross the {o} at {s}.",
        ),
    ),
    Relation(
        name="location",
        subject="school",
        object="city",
        phrase="the city in which {x} is located",
        words=("location", "located", "campus"),
        sentences=(
            "{s} is located in {o}.",
            "The campus of {s} fills a whole quarter of {o}.",
            "Students of {s} rent their rooms in {o}.",
        ),
    ),
    Relation(
        name="rector",
        subject="school",
        object="person",
        phrase="the person who leads {x}",
        words=("rector", "leads", "headed"),
        sentences=(
            "{s} is headed by {o}.",
            "The rector of {s} is {o}.",
            "{o} was elected rector of {s} without an opposing vote.",
        ),
    ),
    Relation(
        name="author",
        subject="book",
        object="person",
        phrase="the person who wrote {x}",
        words=("author", "wrote", "written"),
        sentences=(
            "{s} is a novel by {o}.",
            "{o} wrote {s} in a single winter.",
            "The author of {s} is {o}.",
        ),
    ),
    Relation(
        name="year",
        subject="book",
        object=NUMBER,
        phrase="the year in which {x} was published",
        words=("year", "published", "publication"),
        sentences=(
            "{s} was first published in {o}.",
            "The first edition of {s} came out in {o}.",
        ),
        numbers=(1700, 2020),
    ),
    Relation(
        name="capital",
        subject="region",
        object="city",
        phrase="the capital of {x}",
        words=("capital",),
        sentences=(
            "The capital of {s} is {o}.",
            "{o} has been the capital of {s} since the treaty.",
        ),
    ),
    Relation(
        name="governor",
        subject="region",
        object="person",
        phrase="the person who governs {x}",
        words=("governor", "governs", "governed"),
        sentences=(
            "{s} is governed by {o}.",
            "The governor of {s}, {o}, was sworn in last spring.",
        ),
    ),
    Relation(
        name="mouth",
        subject="river",
        object="city",
        phrase="the city where {x} reaches the sea",
        words=("mouth", "sea", "harbour"),
        sentences=(
            "The {s} reaches the sea at {o}.",
            "At the mouth of the {s} lies the harbour of {o}.",
        ),
    ),
    Relation(
        name="length",
        subject="river",
        object=NUMBER,
        phrase="the length of {x} in kilometres",
        words=("length", "long", "kilometres"),
        sentences=(
            "The {s} is {o} kilometres long.",
            "From source to mouth the {s} measures {o} kilometres.",
        ),
        numbers=(20, 3000),
    ),
)

FULL = Schema(
    kinds=(
        Kind(name="person", share=0.50, pattern="{f} {l}"),
        Kind(name="company", share=0.15, pattern="{w} Works"),
        Kind(name="city", share=0.12, pattern="{w}ton"),
        Kind(name="school", share=0.08, pattern="{w} College"),
        Kind(name="book", share=0.10, pattern="The {w} Letters"),
        Kind(name="region", share=0.02, pattern="{w}land"),
        Kind(name="river", share=0.03, pattern="{w} River"),
    ),
    relations=_FULL_RELATIONS,
    fillers=(
        "A short notice in the almanac says little more, and confuses it with {other}.",
        "Older accounts, which also speak of {other}, differ in details but agree on this point.",
        "This was confirmed in a letter that was found among the papers of {other}.",
        "The archive holds several photographs, most of them misfiled under {other} by mistake.",
        "No connection with {other} has ever been shown, although guides like to claim one.",
        "The same source devotes a much longer chapter to {other} and its surroundings.",
        "Readers of the gazette will remember a similar notice about {other} from last year.",
    ),
    questions=("What is {x}?", "Name {x}.", "Please tell me {x}.", "I am looking for {x}."),
)

SCHEMAS: Mapping[Style, Schema] = MappingProxyType({"compact": COMPACT, "full": FULL})
