"""What an app is: a table of APIs. Arguments are checked here, once for all apps; handlers see
canonical names.

Every world has a seeded *dialect*: APIs that change something name their parameters differently
from world to world (`to`, `payee`, `person`), so the documentation has to be looked up, not learned
by heart.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from loopwright.envs.officeworld.state import Row, World

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "to": ("to", "payee", "person"),
    "amount": ("amount", "sum", "value"),
    "text": ("text", "body", "note"),
    "id": ("id", "item", "ref"),
    "guest": ("guest", "person", "who"),
    "name": ("name", "person", "who"),
    "phone": ("phone", "number", "line"),
    "day": ("day", "date", "on"),
    "hour": ("hour", "time", "at"),
    "title": ("title", "topic", "label"),
}

MAX_INT = 10**9
MAX_TEXT_CHARS = 200


class ApiError(Exception):
    """The agent's mistake, or a refusal of the world: comes back as an observation with this
    category."""

    def __init__(self, category: str, detail: str, *, name: str = "") -> None:
        super().__init__(detail)
        self.category = category
        self.detail = detail
        self.name = name  # the argument at fault, if it is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One required parameter."""

    name: str  # canonical; the world's dialect may show another one
    kind: Literal["int", "str"]
    doc: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One API of an app. Only APIs with `writes` change the world, and only they speak a
    dialect."""

    name: str
    doc: str
    handler: "Handler"
    params: tuple[Param, ...] = ()
    writes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One app: a name, a line of documentation, its APIs."""

    name: str
    doc: str
    apis: tuple[Api, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Office:
    """What a handler may touch: the world of this episode, and the API table for the documentation
    app."""

    world: World
    apps: Mapping[str, App]
    apis: Mapping[str, Api]  # "app.api" -> Api
    dialect: Mapping[tuple[str, str], str]  # (api, canonical parameter) -> name in this world
    page_size: int


Handler = Callable[
    ..., Any
]  # (office, **canonical arguments) -> None | row | list of rows | page; raises ApiError


def draw_dialect(seed: int, apis: Mapping[str, Api]) -> dict[tuple[str, str], str]:
    """The parameter names of world `seed`, drawn independently for every parameter of every writing
    API."""
    rng = Random(f"dialect/{seed}")
    return {
        (name, param.name): rng.choice(SYNONYMS[param.name])
        for name, api in apis.items()
        if api.writes
        for param in api.params
    }


def shown_name(office: Office, api: str, param: str) -> str:
    """How this world calls a parameter."""
    return office.dialect.get((api, param), param)


def invoke(office: Office, name: str, arguments: Mapping[str, Any]) -> Any:
    """Check the arguments against the table and call the handler. Raises `ApiError` for every
    mistake."""
    api = office.apis.get(name)
    if api is None:
        near = difflib.get_close_matches(name[:60], office.apis, n=1)
        raise ApiError(
            "unknown_api", "there is no such API" + (f"; did you mean {near[0]}?" if near else "")
        )
    shown = {shown_name(office, name, p.name): p for p in api.params}
    for given in arguments:
        if given not in shown:
            raise ApiError(
                "unknown_argument", f"{name} has no such argument; see docs.show", name=given
            )
    for label, param in shown.items():
        if label not in arguments:
            raise ApiError("missing_argument", f"{name} lacks an argument; see docs.show")
        if not _fits(arguments[label], param):
            raise ApiError("wrong_type", f"{label} must be of type {param.kind}", name=label)
        if not _bounded(arguments[label]):
            raise ApiError("invalid_value", f"{label} is too large or not text", name=label)
    return api.handler(office, **{p.name: arguments[label] for label, p in shown.items()})


def _fits(value: Any, param: Param) -> bool:
    # bool is an int in Python, but not in an API
    return type(value) is (int if param.kind == "int" else str)


def _bounded(value: int | str) -> bool:
    """Whether a value may enter the world: it can come back in observations."""
    if isinstance(value, int):
        return abs(value) <= MAX_INT
    return len(value) <= MAX_TEXT_CHARS and value.encode(errors="replace").decode() == value


def require(office: Office, table: str, row_id: int) -> Row:
    """The row, or the `not_found` error."""
    row = office.world.get(table, row_id)
    if row is None:
        raise ApiError("not_found", f"no entry with id {row_id}")
    return row


def page_of(office: Office, items: Sequence[Row], page: int) -> dict[str, Any]:
    """One page, counted from 1, and the number of the next one or None."""
    if page < 1:
        raise ApiError("invalid_value", "pages count from 1", name="page")
    start = (page - 1) * office.page_size
    end = start + office.page_size
    return {"items": list(items[start:end]), "next": page + 1 if end < len(items) else None}


def positive(amount: int, name: str = "amount") -> None:
    """Refuse amounts below 1."""
    if amount < 1:
        raise ApiError("invalid_value", f"{name} must be at least 1", name=name)
