"""Resources: a table declared once gives its list, search, show, create, update and delete APIs,
flags, members and moves, with documentation, checks and errors.

    Resource(
        name="alarm", plural="alarms", table="alarms", doc="an alarm of your phone",
        fields=(clock("time", "when it rings"), text("title", "what for"),
                flag("enabled", "whether it rings", default=True)),
        flags={"enabled": ("enable", "disable")},
    )

gives `list_alarms`, `search_alarms`, `show_alarm`, `create_alarm`, `update_alarm`, `delete_alarm`,
`count_alarms`, `enable_alarm` and `disable_alarm`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loopwright.envs.officeworld.api import (
    REQUIRED,
    Api,
    ApiError,
    Office,
    Param,
)
from loopwright.envs.officeworld.columns import ME, TODAY, Field, Move
from loopwright.envs.officeworld.state import Row, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A table and the APIs it gives."""

    name: str
    plural: str
    table: str
    doc: str  # with its article: "an event of your calendar"
    fields: tuple[Field, ...]
    verbs: tuple[str, ...] = ("list", "search", "show", "create", "update", "delete", "count")
    search: tuple[str, ...] = ()  # default: all fields of kind str without choices
    dated: str = ""  # a field of kind day: lists take `after` and `before`
    flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # field → (on, off) verbs
    members: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    # field → (add verb, remove verb, parameter), for fields of kind strs and ints
    moves: tuple[Move, ...] = ()
    guard: Callable[[Office, Row], None] | None = None  # refuses changes of a row
    check: Callable[[Office, int, Row], None] | None = None
    # refuses a row as it would become; its id is 0 before it is created

    def full_row(self, profile: Row, given: Mapping[str, Value]) -> dict[str, Value]:
        """A row with every field: given ones, and defaults for the rest."""
        unknown = set(given) - {f.name for f in self.fields}
        if unknown:
            raise KeyError(f"{self.table} has no {sorted(unknown)}")
        whole = {f.name: given.get(f.name) for f in self.fields}
        return self.normal(
            {
                f.name: _default(f, profile) if whole[f.name] is None else given[f.name]
                for f in self.fields
            }
        )

    def normal(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """The same values, with lists whose order means nothing sorted."""
        loose = {f.name for f in self.fields if f.kind in ("ints", "strs") and not f.ordered}
        return {k: _sorted(v) if k in loose else v for k, v in given.items()}

    def apis(self, *, public: bool) -> Iterator[Api]:
        """Everything it gives; `public`: without access token."""
        made = [_MAKERS[verb](self) for verb in self.verbs]
        made += [api for name, verbs in self.flags.items() for api in _flag_apis(self, name, verbs)]
        made += [api for name, how in self.members.items() for api in _member_apis(self, name, how)]
        made += [_move_api(self, move) for move in self.moves]
        for api in made:
            yield replace(api, public=public)

    def matches(self, row: Row, query: str) -> bool:
        """Whether a search for `query` finds the row."""
        needle = query.casefold()
        columns = self.search or tuple(
            f.name for f in self.fields if f.kind == "str" and not f.choices
        )
        return any(needle in str(row[c]).casefold() for c in columns)

    @property
    def id_param(self) -> Param:
        """The parameter that names a row."""
        return Param(name=f"{self.name}_id", kind="int", doc=f"id of the {self.name}")

    def view(self, row_id: int, row: Row, *, whole: bool) -> dict[str, Any]:
        """The row as an API shows it."""
        shown: dict[str, Any] = {"id": row_id}
        for f in self.fields:
            if whole or f.listed:
                value = row[f.name]
                shown[f.name] = list(value) if isinstance(value, tuple) else value
        return shown

    def row(self, office: Office, row_id: int, *, change: bool = False) -> Row:
        """A row that must be there, and with `change` one that the user may change."""
        row = office.world.get(self.table, row_id)
        if row is None:
            raise ApiError("not_found", f"no {self.name} with id {row_id}")
        if change and self.guard is not None:
            self.guard(office, row)
        return row

    def put(self, office: Office, row_id: int, changes: Mapping[str, Value]) -> None:
        """Check and write changes of a row."""
        row = self.row(office, row_id, change=True)
        check_references(office, self.fields, changes)
        if self.check is not None:
            self.check(office, row_id, {**row, **changes})
        office.world.update(self.table, row_id, **self.normal(changes))

    def add(self, office: Office, given: Mapping[str, Value]) -> int:
        """Check and write a new row; its id."""
        check_references(office, self.fields, given)
        row = self.full_row(office.profile, given)
        if self.check is not None:
            self.check(office, 0, row)
        return office.world.insert(self.table, row)


def _sorted(value: Value) -> Value:
    assert isinstance(value, tuple), "lists are kept as tuples"
    items: Any = sorted(value)
    return tuple(items)


def _default(f: Field, profile: Row) -> Value:
    if f.default is REQUIRED:
        raise KeyError(f"{f.name} has no default")
    if f.default == ME:
        return profile["email"]
    if f.default == TODAY:
        return profile["today"]
    value: Value = f.default
    return value


def known(office: Office, what: str, value: str) -> bool:
    """Whether a person with this email address or phone number exists."""
    people = office.world.rows("contacts")
    return value == office.profile[what] or any(row[what] == value for _, row in people)


def check_references(office: Office, fields: tuple[Field, ...], given: Mapping[str, Value]) -> None:
    """Refuse values that must exist elsewhere and do not."""
    for f in fields:
        if not f.refers or f.name not in given:
            continue
        value = given[f.name]
        for item in value if isinstance(value, tuple) else (value,):
            if item in ("", 0) and f.default in ("", 0):
                continue  # a reference that may be left open
            if f.refers in ("email", "phone"):
                found = known(office, f.refers, str(item))
            else:
                found = office.world.get(f.refers, int(item)) is not None
            if not found:
                raise ApiError("not_found", f"{f.name}: nothing known as {item!r}", name=f.name)


def _list_api(r: Resource) -> Api:
    filters = tuple(
        f.param(default=None, doc=f"only with this {f.name}") for f in r.fields if f.filters
    )
    dated: tuple[Param, ...] = ()
    if r.dated:
        dated = (
            Param(name="after", kind="day", doc=f"only {r.dated} on or after", default=None),
            Param(name="before", kind="day", doc=f"only {r.dated} on or before", default=None),
        )
    names = [f.name for f in r.fields if f.kind not in ("ints", "strs", "bool") and f.listed]
    choices = ("id", *names, *(f"-{n}" for n in names))
    sort = Param(name="sort_by", kind="str", doc="field; with - downwards", default="id", choices=choices)  # fmt: skip # noqa: E501

    def handler(
        office: Office,
        sort_by: str,
        after: str | None = None,
        before: str | None = None,
        **wanted: Any,
    ) -> Any:
        equals = {k: v for k, v in wanted.items() if v is not None}
        rows = list(office.world.rows(r.table, **equals))
        if after is not None:
            rows = [(i, row) for i, row in rows if str(row[r.dated]) >= after]
        if before is not None:
            rows = [(i, row) for i, row in rows if str(row[r.dated]) <= before]
        key = sort_by.removeprefix("-")
        if key != "id":
            rows.sort(key=lambda pair: pair[1][key], reverse=sort_by.startswith("-"))
        return _Views(r, rows)

    return Api(
        name=f"list_{r.plural}", doc=f"List {r.plural}, not with all their fields.",
        params=(*filters, *dated, sort), handler=handler, paged=True,
        returns=f"items: {_columns(r, whole=False)}",
    )  # fmt: skip


class _Views:
    """Rows that are made presentable only where a page shows them."""

    def __init__(self, resource: Resource, rows: list[tuple[int, Row]]) -> None:
        self._resource = resource
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> list[dict[str, Any]]:
        return [self._resource.view(i, row, whole=False) for i, row in self._rows[part]]


def _columns(r: Resource, *, whole: bool) -> str:
    return ", ".join(["id", *(f.name for f in r.fields if whole or f.listed)])


def _search_api(r: Resource) -> Api:
    columns = r.search or tuple(f.name for f in r.fields if f.kind == "str" and not f.choices)

    def handler(office: Office, query: str) -> Any:
        rows = [(i, row) for i, row in office.world.rows(r.table) if r.matches(row, query)]
        return _Views(r, rows)

    query = Param(name="query", kind="str", doc=f"part of {', '.join(columns)}; any case")
    return Api(
        name=f"search_{r.plural}", doc=f"Find {r.plural} by text.", params=(query,),
        handler=handler, paged=True, returns=f"items: {_columns(r, whole=False)}",
    )  # fmt: skip


def _show_api(r: Resource) -> Api:
    def handler(office: Office, **given: int) -> Any:
        row_id = given[r.id_param.name]
        return r.view(row_id, r.row(office, row_id), whole=True)

    return Api(
        name=f"show_{r.name}", doc=f"Show {r.doc} with all its fields.", params=(r.id_param,),
        handler=handler, returns=_columns(r, whole=True),
    )  # fmt: skip


def _create_api(r: Resource) -> Api:
    params = tuple(
        f.param(default=REQUIRED if f.default is REQUIRED else None) if f.default in (ME, TODAY)
        else f.param() for f in r.fields if f.given != "never"
    )  # fmt: skip

    def handler(office: Office, **given: Any) -> Any:
        return {"id": r.add(office, {k: v for k, v in given.items() if v is not None})}

    return Api(
        name=f"create_{r.name}", doc=f"Create {r.doc}.", params=params, handler=handler,
        writes=True, returns="id",
    )  # fmt: skip


def _update_api(r: Resource) -> Api:
    params = tuple(
        f.param(default=None, doc=f"{f.doc}; unchanged if not given")
        for f in r.fields
        if f.given == "always"
    )

    def handler(office: Office, **given: Any) -> None:
        row_id = given.pop(r.id_param.name)
        changes = {k: v for k, v in given.items() if v is not None}
        if not changes:
            raise ApiError("missing_argument", "nothing to change was given")
        r.put(office, row_id, changes)

    return Api(
        name=f"update_{r.name}", doc=f"Change fields of {r.doc}.", params=(r.id_param, *params),
        handler=handler, writes=True,
    )  # fmt: skip


def _delete_api(r: Resource) -> Api:
    def handler(office: Office, **given: int) -> None:
        row_id = given[r.id_param.name]
        r.row(office, row_id, change=True)
        office.world.remove(r.table, row_id)

    return Api(
        name=f"delete_{r.name}", doc=f"Delete {r.doc} for good.", params=(r.id_param,),
        handler=handler, writes=True,
    )  # fmt: skip


def _count_api(r: Resource) -> Api:
    params = tuple(
        f.param(default=None, doc=f"only with this {f.name}") for f in r.fields if f.filters
    )

    def handler(office: Office, **wanted: Any) -> Any:
        equals = {k: v for k, v in wanted.items() if v is not None}
        return {"count": sum(1 for _ in office.world.rows(r.table, **equals))}

    return Api(
        name=f"count_{r.plural}", doc=f"How many {r.plural} there are.", params=params,
        handler=handler, returns="count",
    )  # fmt: skip


def _flag_apis(r: Resource, name: str, verbs: tuple[str, str]) -> Iterator[Api]:
    doc = next(f.doc for f in r.fields if f.name == name)
    for verb, value in zip(verbs, (True, False), strict=True):

        def handler(office: Office, value: bool = value, **given: int) -> None:
            row_id = given[r.id_param.name]
            if r.row(office, row_id)[name] is value:
                raise ApiError("conflict", f"{name} is {str(value).lower()} already")
            office.world.update(r.table, row_id, **{name: value})

        yield Api(
            name=f"{verb}_{r.name}", params=(r.id_param,), handler=handler, writes=True,
            doc=f"Set {name} ({doc}) of {r.doc} to {str(value).lower()}.",
        )  # fmt: skip


def _member_apis(r: Resource, name: str, how: tuple[str, str, str]) -> Iterator[Api]:
    add, remove, label = how
    f = next(f for f in r.fields if f.name == name)
    item = Param(name=label, kind="int" if f.kind == "ints" else "str", doc=f"one of its {name}")

    def adding(office: Office, **given: Any) -> None:
        row_id, value = given[r.id_param.name], given[label]
        items = _items(r.row(office, row_id)[name])
        if value in items:
            raise ApiError("conflict", f"{value!r} is among the {name} already")
        r.put(office, row_id, {name: (*items, value)})

    def removing(office: Office, **given: Any) -> None:
        row_id, value = given[r.id_param.name], given[label]
        items = _items(r.row(office, row_id)[name])
        if value not in items:
            raise ApiError("not_found", f"{value!r} is not among the {name}")
        r.put(office, row_id, {name: tuple(i for i in items if i != value)})

    params = (r.id_param, item)
    yield Api(name=add, doc=f"Add one to the {name} of {r.doc}.", params=params, handler=adding, writes=True)  # fmt: skip # noqa: E501
    yield Api(name=remove, doc=f"Take one off the {name} of {r.doc}.", params=params, handler=removing, writes=True)  # fmt: skip # noqa: E501


def _items(value: Value) -> tuple[Any, ...]:
    assert isinstance(value, tuple), "only fields of kind ints and strs have members"
    return value


def _move_api(r: Resource, move: Move) -> Api:
    def handler(office: Office, **given: int) -> None:
        row_id = given[r.id_param.name]
        now = r.row(office, row_id)[move.field]
        if now == move.to or (move.source and now not in move.source):
            raise ApiError("conflict", f"{move.field} is {now}")
        r.put(office, row_id, {move.field: move.to})

    source = f", from {' or '.join(move.source)} only" if move.source else ""
    return Api(
        name=f"{move.verb}_{r.name}", params=(r.id_param,), handler=handler, writes=True,
        doc=move.doc or f"Set {move.field} of {r.doc} to {move.to}{source}.",
    )  # fmt: skip


_MAKERS: Mapping[str, Callable[[Resource], Api]] = {
    "list": _list_api,
    "search": _search_api,
    "show": _show_api,
    "create": _create_api,
    "update": _update_api,
    "delete": _delete_api,
    "count": _count_api,
}
