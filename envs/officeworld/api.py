"""What an app is: a table of APIs. Names, arguments, access and pages are checked here, once for
all apps; handlers see canonical names.

A call arrives in the *dialect* of its world (`dialect.py`): the same API may be called
`mail.list_emails(page=2)` in one and `mail.browse_emails(offset=10)` in the next, so the
documentation has to be looked up, not learned by heart.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from loopwright.envs.officeworld.state import Row, World

if TYPE_CHECKING:
    from loopwright.envs.officeworld.dialect import Dialect

Kind = Literal["int", "str", "bool", "day", "clock", "ints", "strs"]
MAX_INT = 10**9
MAX_TEXT_CHARS = 200  # of an argument, unless its parameter says otherwise
LONG_TEXT_CHARS = 2000  # of fields that people write into
MAX_ITEMS = 100
STATUS: Mapping[str, int] = {  # category → the HTTP status a real service would give
    "unknown_api": 404,
    "unknown_argument": 400,
    "missing_argument": 400,
    "wrong_type": 400,
    "invalid_value": 422,
    "unauthorized": 401,
    "insufficient_funds": 402,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
}
_CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
_SHOWN_KIND: Mapping[str, str] = {
    "int": "integer",
    "str": "string",
    "bool": "boolean",
    "day": "string, YYYY-MM-DD",
    "clock": "string, HH:MM",
    "ints": "list of integers",
    "strs": "list of strings",
}


class ApiError(Exception):
    """The agent's mistake, or a refusal of the world: comes back as an observation with this
    category."""

    def __init__(self, category: str, detail: str, *, name: str = "") -> None:
        super().__init__(detail)
        self.category = category
        self.detail = detail
        self.name = name  # the argument at fault, if it is one


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = Required()


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter. `default` None means "not given" and accepts null."""

    name: str  # canonical; the world's dialect may show another one
    kind: Kind
    doc: str
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()
    low: int = -MAX_INT
    high: int = MAX_INT
    max_chars: int = MAX_TEXT_CHARS

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is REQUIRED

    @property
    def shown_kind(self) -> str:
        """Its type for readers of the documentation."""
        return _SHOWN_KIND[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One API of an app. Only APIs with `writes` change the world."""

    name: str
    doc: str
    handler: "Handler"
    params: tuple[Param, ...] = ()
    writes: bool = False
    paged: bool = False  # the handler gives all rows, the caller asks for a page of them
    public: bool = True  # needs no access token
    returns: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One app: a name, a line of documentation, its APIs."""

    name: str
    doc: str
    apis: tuple[Api, ...]


@dataclass(slots=True, kw_only=True)
class Office:
    """What a handler may touch: the world of this episode, and the API table for the documentation
    app."""

    world: World
    apps: Mapping[str, App]
    apis: Mapping[str, Api]  # canonical "app.api" → Api
    dialect: "Dialect"
    page_size: int
    tokens: dict[str, str] = field(default_factory=dict)  # access token → app

    @property
    def profile(self) -> Row:
        """The user: name, email, phone, today's date. Only worlds with accounts have one."""
        return require(self, "profile", 1)


Handler = Callable[
    ..., Any
]  # (office, **canonical arguments) → None | row | list of rows; raises ApiError


def invoke(office: Office, name: str, arguments: Mapping[str, Any]) -> Any:
    """Check the call against the table, in the world's dialect, and make it. Raises `ApiError` for
    every mistake."""
    canonical = office.dialect.routes.get(name)
    if canonical is None:
        raise ApiError("unknown_api", "there is no such API; the docs app lists those of an app")
    api = office.apis[canonical]
    shown = office.dialect.params[canonical]
    for given in arguments:
        if given not in shown:
            raise ApiError("unknown_argument", f"{name} has no such argument; see docs", name=given)
    values: dict[str, Any] = {}
    for label, param in shown.items():
        if label not in arguments:
            if param.required:
                raise ApiError("missing_argument", f"{name} lacks the argument {label}; see docs")
            values[param.name] = param.default
            continue
        value = arguments[label]
        values[param.name] = value if value is None and param.default is None else _checked(
            value, param, label
        )  # fmt: skip
    if not api.public and office.tokens.get(values.pop("access_token")) != name.partition(".")[0]:
        raise ApiError("unauthorized", "the access token is not valid; log in to this app first")
    if not api.paged:
        return api.handler(office, **values)
    paging = office.dialect.paging[canonical.partition(".")[0]]
    start, size = paging.window(values, office.page_size)
    return paging.page(api.handler(office, **values), start, size)


def _checked(value: Any, param: Param, label: str) -> Any:
    """The value as handlers want it (lists as tuples)."""
    if not _fits(value, param.kind):
        raise ApiError("wrong_type", f"{label} must be of type {param.shown_kind}", name=label)
    if not _bounded(value, param):
        raise ApiError("invalid_value", f"{label} is too large or not text", name=label)
    if param.choices and value not in param.choices:
        allowed = ", ".join(param.choices)
        raise ApiError("invalid_value", f"{label} must be one of {allowed}", name=label)
    if param.kind == "int" and not param.low <= value <= param.high:
        limits = f"{param.low} to {param.high}" if param.high < MAX_INT else f"at least {param.low}"
        raise ApiError("invalid_value", f"{label} must be {limits}", name=label)
    if param.kind == "day" and not is_day(value):
        raise ApiError("invalid_value", f"{label} must be a date, YYYY-MM-DD", name=label)
    if param.kind == "clock" and not _CLOCK.fullmatch(value):
        raise ApiError("invalid_value", f"{label} must be a time, HH:MM", name=label)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Kind) -> bool:
    # bool is an int in Python, but not in an API
    if kind in ("ints", "strs"):
        inner = int if kind == "ints" else str
        return isinstance(value, list) and all(type(item) is inner for item in value)
    return type(value) is {"int": int, "bool": bool}.get(kind, str)


def _bounded(value: Any, param: Param) -> bool:
    """Whether a value may enter the world: it can come back in observations."""
    if isinstance(value, list):
        return len(value) <= MAX_ITEMS and all(_bounded(item, param) for item in value)
    if isinstance(value, int):
        return abs(value) <= MAX_INT
    return len(value) <= param.max_chars and value.encode(errors="replace").decode() == value


def is_day(text: str) -> bool:
    """Whether `text` is a date as APIs write it, YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


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


def table_of(apps: Iterable[App]) -> dict[str, Api]:
    """All APIs of `apps` by their canonical names, "app.api"."""
    return {f"{app.name}.{api.name}": api for app in apps for api in app.apis}
