"""The learning curve as a picture, drawn from the summary alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(path: Path, summary: Mapping[str, Any]) -> Path | None:
    """Held-out success and training reward over steps; None where nothing was measured yet."""
    curve, rewards, success = summary["curve"], summary["reward_curve"], summary["success"]
    if not curve:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if rewards:
        axes.plot(
            *zip(*rewards, strict=True), color="0.75", label="reward in training (mean of a step)"
        )
    axes.plot(*zip(*curve, strict=True), color="C0", marker="o", label="success on held-out tasks")
    for name, style in (("initial", ":"), ("warm_start", "--")):
        if name in success:
            axes.axhline(
                success[name],
                color="C1",
                linestyle=style,
                linewidth=1,
                label=f"{name.replace('_', ' ')}: {success[name]:.0%}",
            )
    axes.set(xlabel="step", ylim=(-0.02, 1.02), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    return path
