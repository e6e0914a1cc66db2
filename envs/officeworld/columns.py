"""Columns of a resource: what they hold, who sets them, what they refer to."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from loopwright.envs.officeworld.api import LONG_TEXT_CHARS, MAX_INT, REQUIRED, Kind, Param

ME, TODAY = "@me", "@today"  # defaults: the user's email address, the date of the world
Given = Literal["always", "create", "never"]  # who sets a field: create and update, create, nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A column. `refers` names what its value must exist in: "email", "phone", or a table (by
    id)."""

    name: str
    kind: Kind
    doc: str
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()
    low: int = -MAX_INT
    high: int = MAX_INT
    refers: str = ""
    given: Given = "always"
    listed: bool = True  # shown in lists; the others only by `show`
    filters: bool = False  # lists can be narrowed to one value
    ordered: bool = False  # a list whose order means something; others are kept sorted

    def param(self, **changes: Any) -> Param:
        """The field as a parameter of an API."""
        made = Param(
            name=self.name, kind=self.kind, doc=self.doc, default=self.default,
            choices=self.choices, low=self.low, high=self.high,
            max_chars=LONG_TEXT_CHARS,
        )  # fmt: skip
        return replace(made, **changes)


def text(name: str, doc: str, **more: Any) -> Field:
    """A line of text."""
    return Field(name=name, kind="str", doc=doc, **more)


def number(name: str, doc: str, **more: Any) -> Field:
    """A whole number."""
    return Field(name=name, kind="int", doc=doc, **more)


def day(name: str, doc: str, **more: Any) -> Field:
    """A date."""
    return Field(name=name, kind="day", doc=doc, **more)


def clock(name: str, doc: str, **more: Any) -> Field:
    """A time of day."""
    return Field(name=name, kind="clock", doc=doc, **more)


def flag(name: str, doc: str, *, default: bool = False, **more: Any) -> Field:
    """Yes or no; lists can be narrowed by it."""
    return Field(name=name, kind="bool", doc=doc, default=default, filters=True, **more)


def choice(name: str, doc: str, choices: tuple[str, ...], **more: Any) -> Field:
    """One of a few words; lists can be narrowed by it."""
    return Field(name=name, kind="str", doc=doc, choices=choices, filters=True, **more)


def ref(name: str, table: str, doc: str, **more: Any) -> Field:
    """The id of a row of another table; lists can be narrowed by it."""
    return Field(name=name, kind="int", doc=doc, refers=table, filters=True, **more)


def many(name: str, doc: str, refers: str = "", **more: Any) -> Field:
    """A list: of email addresses, of phone numbers, of words, or of ids of a table."""
    kind: Kind = "strs" if refers in ("", "email", "phone") else "ints"
    return Field(name=name, kind=kind, doc=doc, refers=refers, default=(), **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """An API that sets one field to one value, from some values only."""

    verb: str
    field: str
    to: str
    source: tuple[str, ...] = ()  # empty: from everywhere but `to`
    doc: str = ""
