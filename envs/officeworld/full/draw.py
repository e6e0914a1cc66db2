"""What the scenarios of the full world draw from, and how they write down calls and goals."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.officeworld.full.apps import APP_OF, RESOURCES
from loopwright.envs.officeworld.full.declare import shifted
from loopwright.envs.officeworld.grading import Goal
from loopwright.envs.officeworld.scenario import Plan
from loopwright.envs.officeworld.state import Row, World

Rows = list[tuple[int, Any]]  # ids and rows; Any: a row's values are known by its table


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What `build` draws from: the world at its start (read it, never change it), the task's
    randomness, and which variant it is (1 to 3)."""

    world: World
    rng: Random
    page_size: int
    variant: int

    @property
    def me(self) -> Any:
        """The user's profile."""
        return self.world.get("profile", 1)

    @property
    def today(self) -> str:
        """The date of the world."""
        return str(self.me["today"])

    def day(self, low: int, high: int) -> str:
        """A date between `low` and `high` days after today."""
        return shifted(self.today, self.rng.randint(low, high))

    def rows(self, table: str, keep: Callable[[Any], bool] = lambda _row: True) -> Rows:
        """Rows that `keep` accepts."""
        return [(i, row) for i, row in self.world.rows(table) if keep(row)]

    def pick(self, table: str, keep: Callable[[Any], bool] = lambda _row: True) -> tuple[int, Any]:
        """A random one of them."""
        return self.rng.choice(self.rows(table, keep))

    def pick_many(
        self,
        table: str,
        key: str,
        low: int,
        high: int,
        keep: Callable[[Any], bool] = lambda _r: True,
    ) -> tuple[Any, Rows]:
        """A value of column `key` that `low` to `high` of the kept rows have (as near as there is),
        and those rows."""
        groups: dict[Any, Rows] = {}
        for row_id, row in self.rows(table, keep):
            groups.setdefault(row[key], []).append((row_id, row))
        fitting = [k for k, found in groups.items() if low <= len(found) <= high]
        if not fitting:
            fitting = [min(groups, key=lambda k: abs(len(groups[k]) - low))]
        value = self.rng.choice(fitting)
        return value, groups[value]

    def person(self, keep: Callable[[Any], bool] = lambda _row: True) -> Any:
        """A random person of the address book."""
        return self.pick("contacts", keep)[1]

    def relative(self) -> Any:
        """A person whose relation nobody else has: "your sister" is enough to know them."""
        counts: dict[str, int] = {}
        for _, row in self.world.rows("contacts"):
            counts[str(row["relation"])] = counts.get(str(row["relation"]), 0) + 1
        return self.person(lambda row: counts[row["relation"]] == 1)

    def by(self, column: str, value: str) -> Any:
        """The person with this email address or phone number."""
        return next(row for _, row in self.world.rows("contacts") if row[column] == value)

    def row(self, table: str, **given: Any) -> tuple[str, Row]:
        """A row that a solved task adds: given fields, and the defaults of the rest."""
        return table, RESOURCES[table].full_row(self.me, given)

    def pages(self, api: str, count: int, **arguments: Any) -> list[Call]:
        """The pages of a list that hold its first `count` entries (at least one page)."""
        last = max(1, -(-count // self.page_size))
        return [call(api, **arguments, page=page) for page in range(1, last + 1)]

    def listing(
        self, table: str, wanted: Iterable[int] | None = None, *, sort_by: str = "id",
        after: str | None = None, before: str | None = None, **filters: Any,
    ) -> list[Call]:  # fmt: skip
        """Calls of the table's list API, page after page until every `wanted` id was shown (None:
        all pages)."""
        r = RESOURCES[table]
        found = [
            (i, row) for i, row in self.world.rows(table, **filters)
            if (after is None or str(row[r.dated]) >= after)
            and (before is None or str(row[r.dated]) <= before)
        ]  # fmt: skip
        if (key := sort_by.removeprefix("-")) != "id":
            found.sort(key=lambda pair: pair[1][key], reverse=sort_by.startswith("-"))
        more = {"sort_by": sort_by} if sort_by != "id" else {}
        more |= {k: v for k, v in (("after", after), ("before", before)) if v is not None}
        count = _until([i for i, _ in found], wanted)
        return self.pages(f"{APP_OF[table]}.list_{r.plural}", count, **filters, **more)

    def search(self, table: str, query: str, wanted: int | None = None) -> list[Call]:
        """Calls of the table's search API, page after page until `wanted` was shown (None: all
        pages)."""
        r = RESOURCES[table]
        found = [i for i, row in self.world.rows(table) if r.matches(row, query)]
        count = _until(found, None if wanted is None else [wanted])
        return self.pages(f"{APP_OF[table]}.search_{r.plural}", count, query=query)

    def look_up(self, person: Any) -> list[Call]:
        """Find a person by name in the address book."""
        wanted = self.id_of(person)
        return self.search("contacts", person["name"], wanted)

    def look_up_relation(self, person: Any) -> list[Call]:
        """Find a person by relation."""
        return self.listing("contacts", relation=person["relation"])

    def id_of(self, person: Any) -> int:
        """The contact id of a person."""
        return next(i for i, row in self.world.rows("contacts") if row["email"] == person["email"])


def _until(ids: list[int], wanted: Iterable[int] | None) -> int:
    """How many entries have to be shown until all wanted ones were."""
    return len(ids) if wanted is None else max((ids.index(i) + 1 for i in wanted), default=1)


def call(name: str, /, **arguments: Any) -> Call:
    """One call of the oracle, by canonical names."""
    return Call(name=name, arguments=arguments)


def plan(
    values: dict[str, Any],
    calls: Iterable[Call],
    *,
    added: Iterable[tuple[str, Row]] = (),
    changed: Iterable[tuple[str, int, Row]] = (),
    removed: Iterable[tuple[str, int]] = (),
    answer: int | str | None = None,
) -> Plan:
    """A task: what its text says, how it is solved, what must be true at the end."""
    expected = ((t, i, RESOURCES[t].normal(c) if t in RESOURCES else c) for t, i, c in changed)
    goal = Goal(added=tuple(added), changed=tuple(expected), removed=tuple(removed), answer=answer)
    return Plan(values=values, goal=goal, calls=tuple(calls))
