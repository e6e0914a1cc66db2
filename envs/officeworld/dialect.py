"""Dialects: what the APIs of one world are called. Drawn from a seed, shown by the documentation.

The small world renames parameters of writing APIs. The full world also renames routes (an app says
`list`, `browse` or `view`), access tokens, and pages its lists in one of three ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from loopwright.envs.officeworld.api import Api, ApiError, Param

# fmt: off
VERBS: Mapping[str, tuple[str, ...]] = {
    "list": ("list", "browse", "view"), "show": ("show", "get", "read"),
    "search": ("search", "find", "query"), "create": ("create", "add", "make"),
    "update": ("update", "edit", "modify"), "delete": ("delete", "remove", "erase"),
    "count": ("count", "tally"), "send": ("send", "dispatch"), "star": ("star", "favor"),
    "add": ("add", "attach", "put"), "accept": ("accept", "approve"), "mark": ("mark", "set"),
    "cancel": ("cancel", "revoke"), "archive": ("archive", "shelve"), "move": ("move", "shift"),
    "complete": ("complete", "finish"), "pin": ("pin", "stick"), "post": ("post", "write"),
    "request": ("request", "demand"), "reply": ("reply", "answer"), "assign": ("assign", "give"),
    "share": ("share", "grant"), "like": ("like", "heart"), "decline": ("decline", "refuse"),
}
PARAMS: Mapping[str, tuple[str, ...]] = {
    "access_token": ("access_token", "token", "session"), "query": ("query", "text_query", "q"),
    "sort_by": ("sort_by", "order", "sort"), "title": ("title", "label", "heading"),
    "subject": ("subject", "topic", "headline"), "body": ("body", "text", "content"),
    "text": ("text", "body", "content"), "date": ("date", "day", "on_date"),
    "start": ("start", "start_time", "begins"), "end": ("end", "end_time", "until"),
    "time": ("time", "at_time", "clock"), "amount": ("amount", "sum", "value"),
    "note": ("note", "memo", "remark"), "name": ("name", "label", "called"),
    "recipient": ("recipient", "to", "addressee"), "recipients": ("recipients", "to", "addressees"),
    "quantity": ("quantity", "number", "pieces"), "due": ("due", "deadline", "due_date"),
    "assignee": ("assignee", "owner", "responsible"), "guest": ("guest", "person", "attendee"),
    "phone": ("phone", "number", "phone_number"), "email": ("email", "mail", "address"),
    "path": ("path", "location", "full_path"), "after": ("after", "from_date", "since"),
    "before": ("before", "to_date", "up_to"), "label": ("label", "tag", "category"),
}
# fmt: on
ID_FORMS = ("{}_id", "{}", "{}_ref")  # of a parameter "event_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """One way to page a list. `style` is `page`, `offset` or `cursor`."""

    style: str

    @property
    def params(self) -> tuple[Param, ...]:
        """What a caller may give."""
        size = Param(name="size", kind="int", doc="entries wanted", default=None, low=1, high=20)
        if self.style == "page":
            page = Param(name="page", kind="int", doc="page, counted from 1", default=1, low=1)
            return (page,)
        if self.style == "offset":
            doc = "entries to leave out at the beginning"
            return (Param(name="offset", kind="int", doc=doc, default=0, low=0), size)
        doc = "`next_cursor` of the page before; empty for the first one"
        return (Param(name="cursor", kind="str", doc=doc, default="", max_chars=40),)

    def window(self, values: dict[str, Any], page_size: int) -> tuple[int, int]:
        """First entry and number of entries; takes its parameters out of `values`."""
        size = values.pop("size", None) or page_size
        if self.style == "page":
            return (values.pop("page") - 1) * page_size, page_size
        if self.style == "offset":
            return values.pop("offset"), size
        cursor = values.pop("cursor")
        if not cursor:
            return 0, page_size
        start = cursor.removeprefix("after-")
        if not (cursor.startswith("after-") and start.isascii() and start.isdigit()):
            raise ApiError("invalid_value", "this is no cursor of a page", name="cursor")
        return int(start), page_size

    def page(self, rows: Sequence[Any], start: int, size: int) -> dict[str, Any]:
        """The page and how to get the next one."""
        end = start + size
        items, more = list(rows[start:end]), end < len(rows)
        if self.style == "page":
            return {"items": items, "next_page": start // size + 2 if more else None}
        if self.style == "offset":
            return {"items": items, "total": len(rows)}
        return {"items": items, "next_cursor": f"after-{end}" if more else None}

    def arguments(self, page: int, page_size: int) -> dict[str, Any]:
        """How the oracle asks for page number `page`."""
        if page == 1:
            return {}
        start = (page - 1) * page_size
        if self.style == "page":
            return {"page": page}
        return {"offset": start} if self.style == "offset" else {"cursor": f"after-{start}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The names of one world."""

    routes: Mapping[str, str]  # shown "app.api" → canonical
    shown: Mapping[str, str]  # canonical → shown
    params: Mapping[str, Mapping[str, Param]]  # canonical API → shown parameter → parameter
    paging: Mapping[str, Paging]  # app → how it pages

    def names(self, api: str) -> dict[str, str]:
        """Canonical parameter → how this world calls it."""
        return {param.name: label for label, param in self.params[api].items()}


def draw_parameters(
    seed: int, apis: Mapping[str, Api], options: Mapping[str, Sequence[str]]
) -> Dialect:
    """Only parameters of writing APIs are renamed, each drawn by itself from `options`."""
    rng = Random(f"dialect/{seed}")
    params = {
        name: {rng.choice(options[p.name]) if api.writes else p.name: p for p in api.params}
        for name, api in apis.items()
    }
    same = {name: name for name in apis}
    return Dialect(routes=same, shown=same, params=params, paging={})


def draw_dialect(seed: int, apis: Mapping[str, Api], fixed: frozenset[str]) -> Dialect:
    """Routes, parameters and paging, drawn per app; the apps in `fixed` speak plainly."""
    rng = Random(f"full-dialect/{seed}")
    apps = list(dict.fromkeys(name.partition(".")[0] for name in apis))
    paging = {app: Paging(style=rng.choice(("page", "offset", "cursor"))) for app in apps}
    verbs = {app: {v: rng.choice(options) for v, options in VERBS.items()} for app in apps}
    params: dict[str, dict[str, Param]] = {}
    shown: dict[str, str] = {}
    given: set[str] = set()
    for name, api in apis.items():
        app, _, route = name.partition(".")
        plain = app in fixed
        verb, underscore, rest = route.partition("_")
        renamed = f"{app}.{verbs[app].get(verb, verb)}{underscore}{rest}"
        taken = renamed != name and (renamed in apis or renamed in given)
        shown[name] = name if plain or taken or not underscore else renamed
        given.add(shown[name])
        labels: dict[str, Param] = {}
        for param in (*api.params, *(paging[app].params if api.paged else ())):
            free = [form for form in _forms(param.name) if form not in labels]
            label = param.name if plain else rng.choice(free or [f"the_{param.name}"])
            labels[label] = param
        if not api.public:
            labels[rng.choice(PARAMS["access_token"])] = TOKEN
        params[name] = labels
    return Dialect(
        routes={v: k for k, v in shown.items()}, shown=shown, params=params, paging=paging
    )


TOKEN = Param(name="access_token", kind="str", doc="from login of this app", max_chars=80)


def _forms(name: str) -> Sequence[str]:
    if name.endswith("_id"):
        return [form.format(name.removesuffix("_id")) for form in ID_FORMS]
    return PARAMS.get(name, (name,))
