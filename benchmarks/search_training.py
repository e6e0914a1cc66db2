"""Training on search, curriculum on against off, and on a mix of environments: held-out reward.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/search_training.py --folder DIR [--seeds 0 1 2]

One warm start an environment, shared by all its runs; then for each seed the preset `search` as it
is (noise scheduled from 0 to 0.5), the same with the noise of the end from the first step on, and
the preset `mix`. Held-out tasks always have the noise of the end. A run that is already in DIR is
not made again, so the command goes on where it stopped. The figures are in DIR/figures.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopwright.algorithms.curricula import scheduled

_ALWAYS = (
    "cluster.address=none",
    'run.trackers=["jsonl"]',
    "run.checkpoint_every=10",
    "run.eval_every=0",
)
_TIME_LIMIT_S = 3600
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "curriculum": ("search", ()),
    "fixed": ("search", ("environment.sampler_options={}",)),
    "mix": ("mix", ()),
}


def main() -> None:
    """Make what is missing, then print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    for arm in chosen.arms:
        preset, overrides = ARMS[arm]
        base = _warm_start(chosen.folder, preset)
        for seed in chosen.seeds:
            name = f"{arm}-{seed}"
            settings = (
                f"model.path={base}",
                "warm_start.demonstrations=0",
                f"run.seed={seed}",
                f"environment.seed={seed + 1}",
                f"run.steps={chosen.steps}",
                f"evaluation.tasks={chosen.tasks}",
                *overrides,
            )
            _train(chosen.folder, preset, name, settings)
            figures[name] = _figures(chosen.folder / name, preset, arm)
            print(name, json.dumps(figures[name]), flush=True)
    (chosen.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def _warm_start(folder: Path, preset: str) -> Path:
    name = f"warm-{preset}"
    _train(folder, preset, name, ("run.steps=0", "evaluation.tasks=128"))
    return (folder / name / "warm_start").resolve()


def _train(folder: Path, preset: str, name: str, settings: Sequence[str]) -> None:
    if (folder / name / "summary.json").exists():
        return
    command = [sys.executable, "-m", "loopwright.orchestrator", "train", preset]
    for setting in (*_ALWAYS, f"run.name={name}", f"run.dir={folder}", *settings):
        command += ["--set", setting]
    if (folder / name / "config.toml").exists():
        command.append("--resume")
    began = time.perf_counter()
    subprocess.run(command, check=True, timeout=_TIME_LIMIT_S, stdout=subprocess.DEVNULL)
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _figures(folder: Path, preset: str, arm: str) -> dict[str, Any]:
    """Held-out success before and after, by environment, and the noise that training really had."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/success" in row]
    labels = ("errands", "search") if preset == "mix" else ("search",)
    found: dict[str, Any] = {
        "success": [round(row["eval/success"], 3) for row in (evaluated[0], evaluated[-1])],
        "reward": [round(row["eval/reward_mean"], 3) for row in (evaluated[0], evaluated[-1])],
        "lag_max": max((row.get("rollout/lag_max", 0) for row in rows), default=0),
    }
    for label in labels:
        key = f"eval_environment/{label}/success_mean"
        found[f"success_{label}"] = [round(row[key], 3) for row in (evaluated[0], evaluated[-1])]
    key = "environment/search/signal/search/noisy_share"
    shares = [(row["step"] - 1, row.get(key, 0.0)) for row in rows if "rollout/reward_mean" in row]
    steps = len(shares)
    end = [scheduled(step, start=0.0, end=0.5, steps=steps) for step, _ in shares]
    wanted = [0.5] * steps if arm == "fixed" else end
    found["noisy_share"] = round(sum(share for _, share in shares) / max(steps, 1), 3)
    found["noisy_formula"] = round(sum(wanted) / max(steps, 1), 3)
    return found


if __name__ == "__main__":
    main()
