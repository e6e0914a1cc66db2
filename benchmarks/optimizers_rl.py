"""Which optimizer for RL: every method trains the same policy on the same task.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/optimizers_rl.py \\
        [--model FOLDER] [--out FILE.json] [--only adamw,sgd] [--budget-s 3600]

All runs begin from one cloned policy of the quickstart (made first, where `--model` does not name
one), in one process, with the embedded engine. Learning rates come from small grids with seed 0;
methods whose steps are of equal size share one. The best rate is then run with seeds 1 to 3, which
alone make the table: success on held-out tasks at the end. Beside it stand the bytes of optimizer
state, the peak memory of a training step by the tensors it holds, and the CPU time of one optimizer
step on this model.

The JSON is written after every run, and what it holds is not run again; beside it come a table
(`.md`) and a picture (`.png`).
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwright.actors.allocator import keep_freed_memory
from loopwright.actors.memory_meter import MemoryMeter
from loopwright.actors.torch_backend import TorchBackend
from loopwright.algorithms.optimizers import METHODS, OptimizerError
from loopwright.algorithms.records import TrainBatch
from loopwright.configs.load import Loaded, load
from loopwright.orchestrator import assembly
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.offline import warm_start_only
from loopwright.orchestrator.run import run

CONFIG = "quickstart"
SEEDS = (1, 2, 3)
COMMON = (
    "run.eval_every=0",
    "run.checkpoint_every=0",
    'run.trackers=["jsonl"]',
    "warm_start.demonstrations=0",
    "cluster.address=none",
    "rollout.max_lag=0",
    "rollout.concurrency=128",
    "trainer.schedule=constant",
    "trainer.warmup_steps=2",
    "trainer.weight_decay=0.0",
    "evaluation.tasks=128",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the comparison."""

    label: str
    method: str
    rates: tuple[float, ...] = ()  # the grid
    like: str = ""  # takes the best rate of this entry instead: their steps are of equal size
    options: str = ""  # of the optimizer, as TOML without braces
    overrides: tuple[str, ...] = ()

    def settings(self, rate: float) -> tuple[str, ...]:
        """Overrides of the configuration."""
        chosen = [f"trainer.optimizer={self.method}", f"trainer.lr={rate}"]
        if self.method != "adamw":  # whose betas are keys of their own
            chosen.append("trainer.betas=[0.9, 0.999]")
        if self.options:
            chosen.append(f"trainer.optimizer_options={{{self.options}}}")
        return (*COMMON, *chosen, *self.overrides)


LOW_RANK = 'betas = [0.9, 0.95], rank = 32, gap = 20, embeddings = "same"'
BETAS = "betas = [0.9, 0.95]"
LORA = ("model.lora_rank=16",)
ENTRIES = (
    Entry(label="adamw", method="adamw", rates=(2e-4, 4e-4, 8e-4)),
    Entry(label="sgd", method="sgd", rates=(0.1, 0.3, 1.0)),
    Entry(label="lora", method="adamw", rates=(1e-3, 3e-3), overrides=LORA),
    Entry(label="galore", method="galore", rates=(1e-3, 3e-3), options=LOW_RANK),
    Entry(label="signsgd", method="signsgd", rates=(5e-5, 1.5e-4)),
    Entry(label="s2ft", method="s2ft", rates=(1e-3, 3e-3), options=f"{BETAS}, density = 0.1"),
    Entry(label="adamw 8-bit", method="adamw", like="adamw", options='state = "int8"'),
    Entry(
        label="galore 8-bit", method="galore", like="galore", options=f'{LOW_RANK}, state = "int8"'
    ),
    Entry(label="natural galore", method="natural_galore", like="galore", options=LOW_RANK),
    Entry(label="gradnormlorp", method="gradnormlorp", like="galore", options=LOW_RANK),
    Entry(
        label="owlore",
        method="owlore",
        like="adamw",
        options=f"{LOW_RANK}, layers = 1, switch_every = 20",
    ),
    Entry(
        label="spam",
        method="spam",
        like="adamw",
        options=f"{BETAS}, reset_every = 40, warmup = 10",
    ),
    Entry(
        label="low-rank restarts",
        method="low_rank_restarts",
        like="lora",
        options=f"{BETAS}, reset_every = 30",
        overrides=LORA,
    ),
    Entry(label="dora", method="adamw", like="lora", overrides=(*LORA, 'model.adapter="dora"')),
    Entry(label="mezo", method="mezo", rates=(1e-4, 1e-3, 1e-2), options="eps = 1e-3"),
    Entry(label="sparse mezo", method="sparse_mezo", like="mezo", options="eps = 1e-3"),
    Entry(label="apollo", method="apollo", like="adamw", options=LOW_RANK),
    Entry(label="fira", method="fira", like="adamw", options=LOW_RANK),
    Entry(label="ldadam", method="ldadam", like="adamw", options='rank = 32, embeddings = "same"'),
    Entry(
        label="lisa",
        method="lisa",
        like="adamw",
        options=f'{BETAS}, layers = 1, switch_every = 20, embeddings = "same"',
    ),
    Entry(label="badam", method="badam", like="adamw", options=f"{BETAS}, switch_every = 20"),
    Entry(
        label="spam d=.25",
        method="spam",
        like="adamw",
        options=f"{BETAS}, reset_every = 40, warmup = 10, density = 0.25",
    ),
    Entry(label="frugal", method="frugal", like="adamw", options=f"{LOW_RANK}, scale = 0.1"),
)


def main() -> int:
    """Run what is missing, as far as the budget goes; write table and picture."""
    arguments = _parse()
    results = _read(arguments.out)
    keep_freed_memory()
    model = arguments.model or _cloned(arguments)
    results["setting"] = {
        "steps": arguments.steps,
        "groups": arguments.groups,
        "minibatches": arguments.minibatches,
        "torch": torch.__version__,
    }
    began = time.process_time()
    for entry, rate, seed in _plan(results, arguments):
        if time.process_time() - began > arguments.budget_s:
            print("the budget is spent; the same command goes on from here")
            break
        row = _run(entry, rate, seed, model, arguments)
        results.setdefault("runs", {})[_key(entry, rate, seed)] = row
        print(f"{entry.label} lr {rate:g} seed {seed}: {row}", flush=True)
        _write(results, arguments.out)
    for entry in _chosen(arguments):
        if entry.label not in results.setdefault("probes", {}):
            results["probes"][entry.label] = _probe(entry, model, arguments)
            _write(results, arguments.out)
    lines = _table(results, arguments)
    print("\n".join(lines))
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _draw(results, arguments)
    return 0


def _plan(
    results: dict[str, Any], arguments: argparse.Namespace
) -> "Sequence[tuple[Entry, float, int]] | Any":
    """(entry, rate, seed) still to be run: all grids first, then the seeds of the best rates."""
    entries = _chosen(arguments)
    for entry in entries:
        if len(entry.rates) > 1:
            for rate in entry.rates:
                if _key(entry, rate, 0) not in results.get("runs", {}):
                    yield entry, rate, 0
    for seed in () if arguments.grid_only else SEEDS:
        for entry in entries:
            rate = _best_rate(results, entry)
            if _key(entry, rate, seed) not in results.get("runs", {}):
                yield entry, rate, seed


def _best_rate(results: dict[str, Any], entry: Entry) -> float:
    if entry.like:
        return _best_rate(results, next(e for e in ENTRIES if e.label == entry.like))

    def score(rate: float) -> float:
        row = results.get("runs", {}).get(_key(entry, rate, 0), {})
        return float(row.get("success") or 0.0)

    return max(entry.rates, key=score)


def _key(entry: Entry, rate: float, seed: int) -> str:
    return f"{entry.label}|{rate:g}|{seed}"


def _loaded(
    entry: Entry, rate: float, seed: int, model: str, arguments: argparse.Namespace, folder: str
) -> Loaded:
    return load(
        CONFIG,
        (
            *entry.settings(rate),
            f"model.path={model}",
            f"run.name=run-{seed}",
            f"run.dir={folder}",
            f"run.seed={seed}",
            f"environment.seed={1000 + seed}",
            f"run.steps={arguments.steps}",
            f"rollout.groups_per_step={arguments.groups}",
            f"trainer.minibatches={arguments.minibatches}",
        ),
    )


def _run(
    entry: Entry, rate: float, seed: int, model: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train once; success before and after, or why there is none."""
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="optimizers-rl-") as folder:
        loaded = _loaded(entry, rate, seed, model, arguments, folder)
        try:
            ended = asyncio.run(run(loaded, resume=False))
        except (RunError, OptimizerError, ExceptionGroup) as error:
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            return {"success": None, "why": str(cause)[:300]}
    success = ended.summary["success"]
    return {
        "success": success["final"],
        "start": success["warm_start"],
        "rewards": [round(reward, 4) for _, reward in ended.summary["reward_curve"]],
        "cpu_s": round(time.process_time() - started, 1),
    }


def _probe(entry: Entry, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes and times of one trainer, without rollouts."""
    loaded = _loaded(entry, 1e-3, 0, model, arguments, "unused")
    backend = TorchBackend(assembly.trainer_settings(loaded.config, model))
    batch = _batch(backend.model.config.vocab_size)
    backend.train(batch)  # makes whatever states are made late
    meter = MemoryMeter(vocab=backend.model.config.vocab_size)
    meter.hold("weights", backend.model.parameters())
    states = [v for s in backend.optimizer.state.values() for v in s.values()]
    meter.hold("optimizer", [v for v in states if isinstance(v, torch.Tensor)])
    with meter, meter.gradients_of(backend.model.parameters()):
        backend.train(_batch(backend.model.config.vocab_size, step=2))
    found = {
        "parameters": float(sum(p.numel() for p in backend.model.parameters())),
        "trained": float(sum(p.numel() for p in backend.model.parameters() if p.requires_grad)),
        "optimizer_bytes": float(backend.optimizer.state_bytes()),  # type: ignore[attr-defined]
        "peak_bytes": float(meter.peak().total),
    }
    if not METHODS[entry.method].forward_only:
        found["optimizer_step_ms"] = 1e3 * _step_seconds(backend)
    return found


def _step_seconds(backend: TorchBackend, repeats: int = 20) -> float:
    source = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(repeats):
        for p in backend.model.parameters():
            p.grad = torch.randn(p.shape, generator=source) * 1e-3 if p.requires_grad else None
        started = time.process_time()
        backend.optimizer.step()
        total += time.process_time() - started
    return total / repeats


def _batch(vocabulary: int, *, step: int = 1, rollouts: int = 16, length: int = 96) -> TrainBatch:
    random = np.random.default_rng(step)
    mask = np.tile(np.arange(length) % 4 == 3, rollouts)
    return TrainBatch(
        step=step,
        token_ids=random.integers(0, vocabulary, rollouts * length).astype(np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -2.0, 0).astype(np.float32),
        policy_versions=np.where(mask, step - 1, -1).astype(np.int32),
        turn_ids=np.where(mask, 0, -1).astype(np.int16),
        lengths=np.full(rollouts, length, dtype=np.int32),
        rollout_ids=np.arange(rollouts, dtype=np.int32),
        rewards=random.random(rollouts).astype(np.float32),
        advantages=random.normal(size=rollouts).astype(np.float32),
        rollout_count=rollouts,
    )


def _summary(results: dict[str, Any], entry: Entry) -> tuple[float, list[float]]:
    """The chosen rate, and success of the seeds at it."""
    rate = _best_rate(results, entry)
    rows = [results.get("runs", {}).get(_key(entry, rate, seed)) for seed in SEEDS]
    return rate, [row["success"] for row in rows if row and row["success"] is not None]


def _starts(results: dict[str, Any]) -> list[float]:
    return [r["start"] for r in results.get("runs", {}).values() if r.get("start") is not None]


def _ranked(results: dict[str, Any], arguments: argparse.Namespace) -> list[Entry]:
    done = [entry for entry in _chosen(arguments) if _summary(results, entry)[1]]
    return sorted(done, key=lambda e: -statistics.mean(_summary(results, e)[1]))


def _table(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    starts = _starts(results)
    lines = [
        f"Success of the clone that all runs begin from: {statistics.mean(starts):.1%} "
        f"(mean of {len(starts)} evaluations)."
        if starts
        else "No run yet.",
        "",
        "| optimizer | learning rate | held-out success | seeds | state, KiB | peak of a step, MiB "
        "| optimizer step, CPU ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in _ranked(results, arguments):
        rate, values = _summary(results, entry)
        probe = results.get("probes", {}).get(entry.label, {})
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        step = probe.get("optimizer_step_ms")
        lines.append(
            f"| {entry.label} | {rate:g} | {statistics.mean(values):.1%}{spread} "
            f"| {', '.join(f'{v:.0%}' for v in values)} "
            f"| {probe.get('optimizer_bytes', float('nan')) / 1024:.0f} "
            f"| {probe.get('peak_bytes', float('nan')) / 2**20:.1f} "
            f"| {'–' if step is None else f'{step:.1f}'} |"
        )
    return lines


def _draw(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Success against bytes of state, one mark an optimizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [e for e in _ranked(results, arguments) if e.label in results.get("probes", {})]
    if not entries:
        return
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, entry in enumerate(reversed(entries)):
        _, values = _summary(results, entry)
        probe = results["probes"][entry.label]
        axes.barh(place, statistics.mean(values), color="0.85")
        axes.plot(values, [place] * len(values), "o", color="C0", markersize=4)
        size = probe["optimizer_bytes"] / 1024
        axes.text(1.01, place, f"{size:.0f} KiB", va="center", fontsize="x-small")
    axes.set_yticks(range(len(entries)), [e.label for e in reversed(entries)], fontsize="small")
    if starts := _starts(results):
        axes.axvline(
            statistics.mean(starts), color="C1", linestyle="--", linewidth=1, label="the clone"
        )
        axes.legend(loc="lower right", fontsize="small")
    axes.set(xlabel="success on held-out tasks (dots: seeds); right: optimizer state", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(arguments.out.with_suffix(".png"), dpi=110)


def _cloned(arguments: argparse.Namespace) -> str:
    """Clone the quickstart's policy once, beside the results; its folder."""
    folder = arguments.out.resolve().parent / "optimizers_rl_policy"
    if not (folder / "warm_start").exists():
        overrides = (f"run.dir={folder.parent}", f"run.name={folder.name}", "cluster.address=none")
        asyncio.run(warm_start_only(load(CONFIG, overrides)))
    return str(folder / "warm_start")


def _chosen(arguments: argparse.Namespace) -> list[Entry]:
    wanted = set(arguments.only.split(",")) if arguments.only else None
    unknown = (wanted or set()) - {entry.label for entry in ENTRIES}
    if unknown:
        known = ", ".join(entry.label for entry in ENTRIES)
        raise SystemExit(f"--only: no entry {sorted(unknown)[0]!r}; known: {known}")
    return [entry for entry in ENTRIES if wanted is None or entry.label in wanted]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(results: dict[str, Any], path: Path) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    aside.replace(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="cloned policy; made where not given")
    parser.add_argument("--out", type=Path, default=Path("optimizers_rl.json"))
    parser.add_argument("--only", default="", help="labels of entries, separated by commas")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16, help="groups of 8 rollouts a step")
    parser.add_argument("--minibatches", type=int, default=8)
    parser.add_argument("--grid-only", action="store_true", help="no seeds, only rates")
    parser.add_argument("--budget-s", type=float, default=1e9, help="CPU seconds of this call")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
