"""Tables and pictures of `loop_ablations.py`'s runs.

    PYTHONPATH=. python benchmarks/loop_ablations_report.py --work FOLDER --out benchmarks/results

Writes loop_ablations.json (every run's figures), loop_ablations.md (means over seeds with their
standard errors) and two pictures. *Held out*: success on the held-out tasks after the last step.
*Training*: mean success of the rollouts of the last five steps, which under lag are those of older
policies. Differences are paired by seed: the same tasks and the same first policy.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAST = 5  # steps that the training figure averages over
LAGS = (0, 1, 2, 4, 8)
GROUPS = {
    "level of the ratio": ("default", "turn", "trajectory", "token_sum", "token_narrow"),
    "baseline": ("default", "with_std", "gae_token", "gae_turn"),
    "lag, default": ("default", *(f"default_lag{lag}" for lag in LAGS[1:])),
    "lag, unclipped importance sampling": tuple(f"unclipped_lag{lag}" for lag in LAGS),
    "lag 8, other corrections": ("default_lag8", "uncorrected_lag8", "loglinear_lag8"),
}
CALLED = {
    "default": "token, leave one out",
    "with_std": "with std",
    "token_sum": "token, summed",
    "token_narrow": "token, clip 0.01",
    "gae_token": "critic, token",
    "gae_turn": "critic, turn",
    "uncorrected_lag8": "PPO without correction",
    "loglinear_lag8": "decoupled, log-linear",
}


HEADER = """# LOOP's ablations on officeworld

Written by `benchmarks/loop_ablations_report.py`. Means over seeds with their standard errors; a
single seed has none. What it means: `docs/algorithms.md`.
"""


def main() -> int:
    """Read the runs, write what they say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(arguments.work.glob("*-*.json"))]
    if not runs:
        raise SystemExit(f"{arguments.work}: no run there")
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = [figure_of(run) for run in runs]
    (arguments.out / "loop_ablations.json").write_text(json.dumps(figures, indent=0) + "\n")
    text = tables(figures)
    (arguments.out / "loop_ablations.md").write_text(text)
    draw(arguments.out, figures)
    print(text)
    return 0


def figure_of(run: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    steps = run["steps"]

    def mean(name: str) -> float:
        found = [row[name] for row in steps if name in row]
        return sum(found) / len(found) if found else 0.0

    prefix = "" if "ratio_clipped_frac" in steps[0] else "train/"
    return {
        "arm": run["arm"],
        "seed": run["seed"],
        "held_out": [[step, round(value, 4)] for step, value in run["curve"]],
        "training": [round(row["success"], 4) for row in steps],
        "clipped_frac": round(mean(f"{prefix}ratio_clipped_frac"), 4),
        "mismatch_kl": round(mean(f"{prefix}mismatch_kl_k3_mean"), 4),
        "entropy_last": round(steps[-1][f"{prefix}entropy_mean"], 3),
        "stopped_early": sum(row[f"{prefix}stopped_early"] for row in steps),
        "cpu_s": run["cpu_s"],
    }


def final(figure: dict[str, Any]) -> float:
    """Held-out success after the last step, in percent."""
    return 100 * float(figure["held_out"][-1][1])


def training(figure: dict[str, Any]) -> float:
    """Success of the last steps' rollouts, in percent."""
    return 100 * sum(figure["training"][-LAST:]) / LAST


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (0 for one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _text(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard error; the mean alone of one value."""
    mean, error = spread(values)
    return f"{mean:{form}} ± {error:.1f}" if len(values) > 1 else f"{mean:{form}}"


def tables(figures: Sequence[dict[str, Any]]) -> str:
    """Markdown, one table a question."""
    parts = [HEADER]
    for title, arms in GROUPS.items():
        rows = [_row(arm, arms[0], figures) for arm in arms]
        if any(rows):
            parts += [
                f"### {title}\n",
                "| arm | seeds | held out % | worst seed | against "
                f"{CALLED.get(arms[0], arms[0])}, paired | training % | clipped | mismatch KL |",
                "|---|---:|---:|---:|---:|---:|---:|---:|",
                *(row for row in rows if row),
                "",
            ]
    return "\n".join(parts)


def _row(arm: str, first: str, figures: Sequence[dict[str, Any]]) -> str:
    mine = {f["seed"]: f for f in figures if f["arm"] == arm}
    others = {f["seed"]: f for f in figures if f["arm"] == first}
    if not mine:
        return ""
    shared = [final(mine[s]) - final(others[s]) for s in mine if s in others]
    difference = ""
    if arm != first and shared:
        difference = _text(shared, "+.1f")
    held, reward = ([of(f) for f in mine.values()] for of in (final, training))
    clipped = spread([100 * f["clipped_frac"] for f in mine.values()])[0]
    mismatch = spread([f["mismatch_kl"] for f in mine.values()])[0]
    return (
        f"| {CALLED.get(arm, arm)} | {len(mine)} | {_text(held)} | {min(held):.1f} | {difference} "
        f"| {_text(reward)} | {clipped:.1f} % | {mismatch:.3f} |"
    )


def draw(folder: Path, figures: Sequence[dict[str, Any]]) -> None:
    """Curves of levels and baselines; success against lag."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title in ((left, "level of the ratio"), (right, "baseline")):
        for number, arm in enumerate(GROUPS[title]):
            mine = [f for f in figures if f["arm"] == arm]
            if not mine:
                continue
            steps = [step for step, _ in mine[0]["held_out"]]
            points = [spread([100 * f["held_out"][i][1] for f in mine]) for i in range(len(steps))]
            label = f"{CALLED.get(arm, arm)} ({len(mine)} seeds)"
            axes.errorbar(
                steps, *zip(*points, strict=True), marker="o", capsize=3, color=f"C{number}",
                label=label,
            )  # fmt: skip
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    left.set(ylabel="held-out success, %")
    figure.savefig(folder / "loop_ablations_levels.png", dpi=100)
    _draw_lags(folder, figures)


def _draw_lags(folder: Path, figures: Sequence[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, title in enumerate(("lag, default", "lag, unclipped importance sampling")):
        shown = [
            (lag, [final(f) for f in figures if f["arm"] == arm])
            for lag, arm in zip(LAGS, GROUPS[title], strict=True)
        ]
        shown = [(lag, values) for lag, values in shown if values]
        points = [spread(values) for _, values in shown]
        axes.errorbar(
            [lag for lag, _ in shown], *zip(*points, strict=True), marker="o", capsize=3,
            color=f"C{number}", label=title.partition(", ")[2],
        )  # fmt: skip
        for lag, values in shown:
            axes.plot([lag] * len(values), values, ".", color=f"C{number}", alpha=0.4)
    start = [100 * f["held_out"][0][1] for f in figures]
    axes.axhline(start[0], color="0.6", linestyle="--", linewidth=1, label="before RL")
    axes.set(xlabel="policy lag, versions", ylabel="held-out success after 20 steps, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(folder / "loop_ablations_lag.png", dpi=100)


if __name__ == "__main__":
    raise SystemExit(main())
