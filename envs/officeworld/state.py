"""State of one world: a shared, immutable base and a copy-on-write overlay.

`reset` is a new overlay (a few microseconds), whatever the size of the base, and the overlay *is*
the difference that the unit tests of a task look at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Value = int | str | tuple[int, ...] | tuple[str, ...]  # bool is an int
Row = Mapping[str, Value]
Tables = Mapping[
    str, Mapping[int, Row]
]  # table -> id -> row; shared by all worlds of a seed, never changed
Overlay = dict[str, dict[int, Row | None]]  # table -> id -> row, None: removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What an episode did to its world. Rows written back to their first value do not count."""

    added: Mapping[tuple[str, int], Row]
    changed: Mapping[tuple[str, int], Row]  # only the fields that differ, with their new value
    removed: frozenset[tuple[str, int]]


class World:
    """The live state of one episode. Rows are replaced, never mutated, so the base may be shared
    freely."""

    __slots__ = ("_base", "_overlay", "_tops")

    def __init__(self, base: Tables) -> None:
        self._base = base
        self._overlay: Overlay = {}
        self._tops: dict[str, int] = {}  # highest id of the base's tables, once somebody asked

    def get(self, table: str, row_id: int) -> Row | None:
        """The row, or None if there is none (any more)."""
        over = self._overlay.get(table)
        if over is not None and row_id in over:
            return over[row_id]
        return self._base[table].get(row_id)

    def rows(self, table: str, /, **equals: Value) -> Iterator[tuple[int, Row]]:
        """Ids and rows whose fields equal `equals`: the base's in their order, then the added
        ones."""
        wanted = equals.items()
        over = self._overlay.get(table, {})
        for row_id, first in self._base[table].items():
            row = over.get(row_id, first) if over else first
            if row is not None and all(row[k] == v for k, v in wanted):
                yield row_id, row
        for row_id, added in list(over.items()):
            if added is None or row_id in self._base[table]:
                continue
            if all(added[k] == v for k, v in wanted):
                yield row_id, added

    def next_id(self, table: str) -> int:
        """The id that `insert` would give: the first one above the base's and all added ones."""
        if table not in self._tops:
            self._tops[table] = max(self._base[table], default=0)
        return max(self._tops[table], *self._overlay.get(table, ()), 0) + 1

    def insert(self, table: str, row: Row) -> int:
        """Add a row; returns its id."""
        row_id = self.next_id(table)
        self._overlay.setdefault(table, {})[row_id] = dict(row)
        return row_id

    def update(self, table: str, row_id: int, /, **changes: Value) -> None:
        """Replace fields of a row that exists."""
        row = self.get(table, row_id)
        if row is None:
            raise KeyError(f"{table} has no row {row_id}")
        self._overlay.setdefault(table, {})[row_id] = {**row, **changes}

    def remove(self, table: str, row_id: int) -> None:
        """Take a row away. One that was added is as if it had never been, its id included."""
        over = self._overlay.setdefault(table, {})
        if row_id in self._base[table]:
            over[row_id] = None
        else:
            over.pop(row_id, None)

    def snapshot(self) -> Overlay:
        """The state as a value, in O(rows touched): `restore` brings it back, in any world of the
        same base."""
        return {table: dict(over) for table, over in self._overlay.items()}

    def restore(self, state: Overlay) -> None:
        """Be as `snapshot` saw it."""
        self._overlay = {table: dict(over) for table, over in state.items()}

    def diff(self) -> Diff:
        """The difference to the base, in O(rows touched)."""
        added: dict[tuple[str, int], Row] = {}
        changed: dict[tuple[str, int], Row] = {}
        removed: set[tuple[str, int]] = set()
        for table, over in self._overlay.items():
            base = self._base[table]
            for row_id, row in over.items():
                before = base.get(row_id)
                if row is None:
                    removed.add((table, row_id))
                elif before is None:
                    added[table, row_id] = row
                elif fields := {k: v for k, v in row.items() if before[k] != v}:
                    changed[table, row_id] = fields
        return Diff(added=added, changed=changed, removed=frozenset(removed))
