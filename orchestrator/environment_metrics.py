"""What episodes say of their environment: each environment of a mix apart.

Names are `<group>/<environment>/<what>`. Signals that an environment counts under one family, such
as `search/noisy` and `search/useful`, also give each one's share of the family.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from loopwright.algorithms.records import Rollout


def environment_metrics(rollouts: Iterable[Rollout], group: str) -> dict[str, float]:
    """Success, reward and its parts, turns, signals and context lengths by environment, as means
    over its episodes; the peak context is the longest of *all* of them. Infra faults are not
    meant to be among the rollouts."""
    by_name: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_name[rollout.environment].append(rollout)
    return {
        f"{group}/{name}/{what}": value
        for name, found in sorted(by_name.items())
        for what, value in _of_one(found).items()
    }


def _of_one(rollouts: Sequence[Rollout]) -> dict[str, float]:
    count = len(rollouts)
    peaks = [max((len(c.token_ids) for c in r.contexts), default=0) for r in rollouts]
    parts = {name for r in rollouts for name in r.reward_parts}
    signals = sum((Counter(r.tool_errors) for r in rollouts), Counter[str]())
    return {
        "episodes": float(count),
        "success_mean": sum(r.success for r in rollouts) / count,
        "reward_mean": sum(r.reward for r in rollouts) / count,
        "turns_mean": sum(r.turns for r in rollouts) / count,
        "context_peak_tokens_max": float(max(peaks)),
        "context_peak_tokens_mean": sum(peaks) / count,
        "contexts_mean": sum(len(r.contexts) for r in rollouts) / count,
        **{
            f"part/{name}_mean": sum(r.reward_parts.get(name, 0.0) for r in rollouts) / count
            for name in sorted(parts)
        },
        **{f"signal/{name}_mean": total / count for name, total in sorted(signals.items())},
        **_shares(signals),
    }


def _shares(signals: Counter[str]) -> dict[str, float]:
    """Each signal's share of its family, which is what stands before the slash."""
    families: Counter[str] = Counter()
    for name, total in signals.items():
        families[name.partition("/")[0]] += total
    return {
        f"signal/{name}_share": total / families[name.partition("/")[0]]
        for name, total in sorted(signals.items())
    }
