"""What evaluations report beside reward: goal completion, and how agents behave.

The counts are those of the LOOP paper: code cells per turn, look-ups of API documentation, mentions
of assumptions and dummy values, and how often an agent gives up on an API that refused it.
Environments report them as signals `behavior/…`; everything here is pure.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ASSUME = re.compile(r"\bassum\w*", re.IGNORECASE)
DUMMY = re.compile(r"\bdummy\b", re.IGNORECASE)
PREFIX = "behavior/"
DOC_APP = "docs."


def task_goal_completion(successes: Sequence[bool]) -> float:
    """TGC: percentage of tasks with every unit test passed. Raises `ValueError` for no tasks."""
    if not successes:
        raise ValueError("no task was played: its completion is not defined")
    return 100.0 * sum(successes) / len(successes)


def scenario_goal_completion(played: Iterable[tuple[str, bool]]) -> float:
    """SGC: percentage of scenarios whose variants all succeeded, from (scenario, success) of each
    task. Raises `ValueError` for no tasks."""
    whole: dict[str, bool] = {}
    for scenario, success in played:
        whole[scenario] = whole.get(scenario, True) and success
    return task_goal_completion(list(whole.values()))


def mentions(text: str) -> dict[str, int]:
    """How often the policy's text speaks of assuming, and of dummy values."""
    return {"assume": len(ASSUME.findall(text)), "dummy": len(DUMMY.findall(text))}


def give_up_rate(failed: int, recovered: int) -> float:
    """(failed − recovered) / failed; 0 if nothing failed. An API that failed is recovered if a
    later call of it works."""
    if not 0 <= recovered <= failed:
        raise ValueError(f"{recovered} of {failed} APIs recovered: must be 0 to all of them")
    return (failed - recovered) / failed if failed else 0.0


@dataclass(slots=True)
class CallLog:
    """The API calls of one episode, as they come."""

    failed: set[str] = field(default_factory=set)
    recovered: set[str] = field(default_factory=set)
    _news: Counter[str] = field(default_factory=Counter)

    def note(self, api: str, *, ok: bool) -> None:
        """A call of `api` was made."""
        if ok and api.startswith(DOC_APP):
            self._news["doc_lookups"] += 1
        if not ok and api not in self.failed:
            self.failed.add(api)
            self._news["failed_apis"] += 1
        if ok and api in self.failed and api not in self.recovered:
            self.recovered.add(api)
            self._news["recovered_apis"] += 1

    def news(self) -> dict[str, int]:
        """What was counted since the last time."""
        found = dict(self._news)
        self._news.clear()
        return found


def behavior(signals: Sequence[Mapping[str, int]], turns: Sequence[int]) -> dict[str, float]:
    """Behaviour of episodes from their signals and turns; empty if no environment counts it.

    `code_cells_per_turn`, `doc_lookups_mean`, `assume_mean`, `dummy_mean` (per episode), and
    `give_up_rate` over all episodes together.
    """
    total: Counter[str] = Counter()
    for found in signals:
        total.update({k.removeprefix(PREFIX): n for k, n in found.items() if k.startswith(PREFIX)})
    if not total:
        return {}
    means = {f"{k}_mean": total[k] / len(signals) for k in ("doc_lookups", "assume", "dummy")}
    return {
        "code_cells_per_turn": total["code_cells"] / max(1, sum(turns)),
        **means,
        "give_up_rate": give_up_rate(total["failed_apis"], total["recovered_apis"]),
    }
