"""Families of scenarios that differ in table and API only: act on one row, act on all rows that
match, count or add up."""

from collections.abc import Callable, Mapping
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.full.apps import APP_OF, RESOURCES
from loopwright.envs.officeworld.full.draw import Draw, call, plan
from loopwright.envs.officeworld.scenario import Plan, Scenario
from loopwright.envs.officeworld.state import Row

Texts = tuple[str, str, str]
Keep = Callable[[Any], bool]
Changes = Callable[[Draw, Any], tuple[Mapping[str, Any], Row | None, Mapping[str, Any]]]
"""(draw, row) → further arguments of the call, what changes (None: the row is removed), further
values of the text"""


def _all(_row: Any) -> bool:
    return True


def _where(row: Any, keep: Keep, fixed: Mapping[str, Any]) -> bool:
    return keep(row) and all(row[k] == v for k, v in fixed.items())


def sets(**changes: Any) -> Changes:
    """The API takes only the row, and sets these fields."""
    return lambda _draw, _row: ({}, changes, {})


def removes() -> Changes:
    """The API takes only the row, and removes it."""
    return lambda _draw, _row: ({}, None, {})


def one(
    name: str,
    api: str,
    table: str,
    effect: Changes,
    texts: Texts,
    *,
    by: str,
    keep: Keep = _all,
    difficulty: int = 1,
    held_out: bool = False,
) -> Scenario:
    """Act on the row whose column `by` the text names: it is searched, then changed."""
    r = RESOURCES[table]

    def build(draw: Draw) -> Plan:
        names = [row[by] for _, row in draw.rows(table)]
        row_id, row = draw.pick(table, lambda row: keep(row) and names.count(row[by]) == 1)
        arguments, change, values = effect(draw, row)
        acting = call(f"{APP_OF[table]}.{api}", **{r.id_param.name: row_id}, **arguments)
        return plan(
            {**row, **values},
            [*draw.search(table, row[by], row_id), acting],
            changed=[(table, row_id, change)] if change is not None else [],
            removed=[(table, row_id)] if change is None else [],
        )

    return Scenario(name=name, difficulty=difficulty, texts=texts, build=build, held_out=held_out)


def every(
    name: str,
    api: str,
    table: str,
    effect: Changes,
    texts: Texts,
    *,
    key: str,
    keep: Keep = _all,
    filters: Mapping[str, Any] | None = None,
    describe: Callable[[Draw, Any], tuple[Mapping[str, Any], list[Call]]] | None = None,
    difficulty: int = 2,
    held_out: bool = False,
) -> Scenario:
    """Act on all rows of one value of column `key` (and of `filters` and `keep`). `describe` gives
    from that value what the text says of it, and how it is looked up."""
    r = RESOURCES[table]
    fixed = dict(filters or {})

    def build(draw: Draw) -> Plan:
        value, rows = draw.pick_many(table, key, 2, 5, lambda row: _where(row, keep, fixed))
        values, first = describe(draw, value) if describe is not None else ({}, [])
        calls = [*first, *draw.listing(table, **{**fixed, key: value})]
        changed: list[tuple[str, int, Row]] = []
        removed: list[tuple[str, int]] = []
        for row_id, row in rows:
            arguments, change, _ = effect(draw, row)
            calls.append(call(f"{APP_OF[table]}.{api}", **{r.id_param.name: row_id}, **arguments))
            if change is None:
                removed.append((table, row_id))
            else:
                changed.append((table, row_id, change))
        return plan({key: value, **values}, calls, changed=changed, removed=removed)

    return Scenario(name=name, difficulty=difficulty, texts=texts, build=build, held_out=held_out)


def total(
    name: str,
    table: str,
    texts: Texts,
    *,
    key: str,
    value_of: Callable[[Any], int],
    keep: Keep = _all,
    filters: Mapping[str, Any] | None = None,
    describe: Callable[[Draw, Any], tuple[Mapping[str, Any], list[Call]]] | None = None,
    difficulty: int = 2,
    held_out: bool = False,
) -> Scenario:
    """A question: the sum of `value_of` over all rows of one value of column `key`."""
    fixed = dict(filters or {})

    def build(draw: Draw) -> Plan:
        value, rows = draw.pick_many(table, key, 2, 9, lambda row: _where(row, keep, fixed))
        values, first = describe(draw, value) if describe is not None else ({}, [])
        reading = draw.listing(table, **{**fixed, key: value})
        answer = sum(value_of(row) for _, row in rows)
        return plan({key: value, **values}, [*first, *reading], answer=answer)

    return Scenario(name=name, difficulty=difficulty, texts=texts, build=build, held_out=held_out)


def by_email(draw: Draw, email: Any) -> tuple[Mapping[str, Any], list[Call]]:
    """Text and look-up of somebody by email address: their name."""
    person = draw.by("email", email)
    return {"name": person["name"]}, draw.look_up(person)


def by_phone(draw: Draw, phone: Any) -> tuple[Mapping[str, Any], list[Call]]:
    """Text and look-up of somebody by phone number: their name."""
    person = draw.by("phone", phone)
    return {"name": person["name"]}, draw.look_up(person)


def named(table: str, column: str = "name") -> Callable[[Draw, Any], tuple[Mapping[str, Any], list[Call]]]:  # fmt: skip # noqa: E501
    """Text and look-up of a row by its id: its name, as `{owner}`."""

    def describe(draw: Draw, row_id: Any) -> tuple[Mapping[str, Any], list[Call]]:
        row: Any = draw.world.get(table, row_id)
        return {"owner": row[column]}, draw.search(table, row[column], row_id)

    return describe
