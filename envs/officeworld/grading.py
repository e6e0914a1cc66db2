"""Grading: a goal says what the world must differ in at the end; unit tests compare it with the
real difference."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from loopwright.envs.officeworld.state import Diff, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The whole difference a solved task leaves behind, and the answer if the task is a
    question."""

    added: tuple[tuple[str, Row], ...] = ()  # (table, row)
    changed: tuple[tuple[str, int, Row], ...] = ()  # (table, id, the fields that differ)
    removed: tuple[tuple[str, int], ...] = ()  # (table, id)
    answer: int | str | None = None


def unit_tests(goal: Goal, diff: Diff, *, finished: bool, answer: object) -> dict[str, bool]:
    """Name → passed, at least four for every goal. Names are `group/what`; groups are the verdict's
    parts."""
    tests = {"finished/done": finished}
    if goal.answer is not None:
        tests["answer/given"] = answer is not None
        tests["answer/right"] = type(answer) is type(goal.answer) and answer == goal.answer
    for index, (table, row) in enumerate(goal.added):
        rows = [r for (t, _), r in diff.added.items() if t == table]
        for name, value in row.items():
            tests[f"goal/added_{table}_{index}_{name}"] = any(r[name] == value for r in rows)
        tests[f"goal/added_{table}_{index}"] = any(r == row for r in rows)
    for table, row_id, fields in goal.changed:
        tests[f"goal/changed_{table}_{row_id}"] = diff.changed.get((table, row_id)) == fields
    for table, row_id in goal.removed:
        tests[f"goal/removed_{table}_{row_id}"] = (table, row_id) in diff.removed
    wanted, found = _touched(goal), _touched_by(diff)
    for table in wanted:
        tests[f"goal/count_{table}"] = wanted[table] == found[table]
    tests["collateral/none"] = not _collateral(goal, diff)
    return tests


def _touched(goal: Goal) -> Counter[str]:
    return Counter(
        [t for t, _ in goal.added] + [t for t, _, _ in goal.changed] + [t for t, _ in goal.removed]
    )


def _touched_by(diff: Diff) -> Counter[str]:
    return Counter(table for table, _ in (*diff.added, *diff.changed, *diff.removed))


def _collateral(goal: Goal, diff: Diff) -> bool:
    """Whether anything differs that the goal does not name."""
    open_rows = list(goal.added)
    for (table, _), row in diff.added.items():
        if (table, row) not in open_rows:
            return True
        open_rows.remove((table, row))
    allowed: Mapping[tuple[str, int], Row] = {(t, i): fields for t, i, fields in goal.changed}
    unasked = any(allowed.get(key) != fields for key, fields in diff.changed.items())
    return unasked or not diff.removed <= set(goal.removed)
