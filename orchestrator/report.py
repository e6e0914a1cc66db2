"""What a run says at its end, in a few lines a person reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopwright.algorithms.memory_model import CLASSES, size_text


def tell(folder: Path, summary: Mapping[str, Any]) -> str:
    """Before → after, what it took, where it lies."""
    success = summary["success"]
    lines = []
    if "final" in success:
        gained = 100 * (success["final"] - success["warm_start"])
        lines.append(
            f"held-out success: untouched {success['initial']:.1%} → "
            f"cloned {success['warm_start']:.1%} → "
            f"after RL {success['final']:.1%}  ({gained:+.1f} points from RL alone)"
        )
    else:
        lines.append(f"stopped after step {summary['steps']}; go on with --resume")
    tokens, lag, seconds = summary["tokens"], summary["lag"], summary["seconds"]
    lines += [
        f"{summary['steps']} steps, {summary['episodes']} episodes, "
        f"{tokens['generated']} tokens generated, "
        f"{summary['publishes']} publishes, policy lag mean {lag['mean']:.2f} max {lag['max']}, "
        f"{summary['restarts']} restarts, {seconds['total']:.0f} s",
        *_use(summary),
        *_memory(summary.get("memory") or {}),
        f"run folder: {folder}  (curve.png, summary.json, metrics.jsonl, checkpoints/)",
    ]
    return "\n".join(lines)


def _use(summary: Mapping[str, Any]) -> list[str]:
    """What was sampled for nothing, and who waited."""
    unused, idle, publish = summary["unused"], summary["idle"], summary["publish"]
    engines = ", ".join(
        f"{name.replace('_', ' ')} {idle[f'{name}_frac']:.0%} ({speed:.0f} tokens/s)"
        for name, speed in summary["tokens_per_s"].items()
    )
    resumed, kept = summary["resumed"], ""
    if resumed["rollouts"]:
        kept = f"; kept {resumed['saved_tokens']} tokens that lost processes had paid for"
    return [
        f"idle: trainer {idle['trainer_frac']:.0%}{', ' if engines else ''}{engines}; published "
        f"{publish['size_bytes'] / 1e6:.1f} MB in {publish['seconds']:.1f} s; cancelled "
        f"{unused['cancelled_rollouts']} rollouts ({unused['cancelled_tokens']} tokens), discarded "
        f"{unused['discarded_rollouts']} ({unused['discarded_tokens']} tokens){kept}"
    ]


def _memory(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    classes = ", ".join(f"{k} {size_text(found[f'{k}_bytes'])}" for k in CLASSES)
    return [f"memory of the trainer: peak {size_text(found['peak_bytes'])} ({classes})"]
