"""State of one world: a shared, immutable base and a copy-on-write overlay.

`reset` is a new overlay (a few microseconds), whatever the size of the base, and the overlay *is*
the difference that the unit tests of a task look at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Value = int | str | tuple[int, ...]
Row = Mapping[str, Value]
Tables = Mapping[
    str, Mapping[int, Row]
]  # table -> id -> row; shared by all worlds of a seed, never changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What an episode did to its world. Rows written back to their first value do not count."""

    added: Mapping[tuple[str, int], Row]
    changed: Mapping[tuple[str, int], Row]  # only the fields that differ, with their new value
    removed: frozenset[tuple[str, int]]


class World:
    """The live state of one episode. Rows are replaced, never mutated, so the base may be shared
    freely."""

    __slots__ = ("_base", "_overlay")

    def __init__(self, base: Tables) -> None:
        self._base = base
        self._overlay: dict[tuple[str, int], Row | None] = {}  # None: removed

    def get(self, table: str, row_id: int) -> Row | None:
        """The row, or None if there is none (any more)."""
        key = (table, row_id)
        return self._overlay[key] if key in self._overlay else self._base[table].get(row_id)

    def rows(self, table: str, /, **equals: Value) -> Iterator[tuple[int, Row]]:
        """Ids and rows whose fields equal `equals`: the base's in their order, then the added
        ones."""
        base = self._base[table]
        added = [i for (t, i) in self._overlay if t == table and i not in base]
        for row_id in (*base, *added):
            row = self.get(table, row_id)
            if row is not None and all(row[k] == v for k, v in equals.items()):
                yield row_id, row

    def insert(self, table: str, row: Row) -> int:
        """Add a row; returns its id, the first one above all that the table ever held."""
        overlaid = (i for (t, i) in self._overlay if t == table)
        row_id = max((*self._base[table], *overlaid), default=0) + 1
        self._overlay[table, row_id] = dict(row)
        return row_id

    def update(self, table: str, row_id: int, /, **changes: Value) -> None:
        """Replace fields of a row that exists."""
        row = self.get(table, row_id)
        if row is None:
            raise KeyError(f"{table} has no row {row_id}")
        self._overlay[table, row_id] = {**row, **changes}

    def remove(self, table: str, row_id: int) -> None:
        """Take a row away."""
        self._overlay[table, row_id] = None

    def diff(self) -> Diff:
        """The difference to the base, in O(rows touched)."""
        added: dict[tuple[str, int], Row] = {}
        changed: dict[tuple[str, int], Row] = {}
        removed: set[tuple[str, int]] = set()
        for (table, row_id), row in self._overlay.items():
            before = self._base[table].get(row_id)
            if row is None:
                if before is not None:
                    removed.add((table, row_id))
            elif before is None:
                added[table, row_id] = row
            elif fields := {k: v for k, v in row.items() if before[k] != v}:
                changed[table, row_id] = fields
        return Diff(added=added, changed=changed, removed=frozenset(removed))
