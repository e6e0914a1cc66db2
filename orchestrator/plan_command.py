"""`loopwright plan`: what a configuration needs, what that fits on, and which setting to turn."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopwright.algorithms.memory_model import (
    DEVICES,
    MemoryModelError,
    MemoryTable,
    device,
    devices,
    size_text,
)
from loopwright.orchestrator import plan_times
from loopwright.orchestrator.faults import Refused
from loopwright.orchestrator.measured import Measured, read_measured
from loopwright.orchestrator.memory_plan import Knob, Planner, Prediction

ABOUT = """What a configuration needs before anything is started: memory of trainer and engines by
class, which devices that fits on, which setting saves how much, and how to split devices.

  loopwright plan quickstart
  loopwright plan my.toml --model Qwen3-8B --gpus 8xH100
  loopwright plan my.toml --model ./my-model --set model.lora_rank=16 --json
  loopwright plan my.toml --gpus 8xH100 --train-s 40 --generate-s 80

Nothing is loaded: the trainer's passes run over tensors that have shapes and no memory. Sizes are
decimal (1 GB = 10^9 bytes). Where a run's folder holds measurements, they stand beside."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loopwright plan`, beside CONFIG and --set."""
    parser.add_argument(
        "--model",
        default="",
        metavar="MODEL",
        help="instead of model.path: a folder, a config.json, a hub id, or a name such as Qwen3-8B",
    )
    parser.add_argument(
        "--gpus",
        default="",
        metavar="N×NAME",
        help=f"devices to plan for, e.g. 8xH100 ({', '.join(DEVICES)}, or custom-48GB)",
    )
    parser.add_argument(
        "--run", default="", metavar="FOLDER", help="a run to compare with; run.dir/run.name if any"
    )
    plan_times.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="all numbers, for programs")


def execute(arguments: argparse.Namespace) -> int:
    """Plan and print; the exit code. Raises `ConfigError`, `Refused`."""
    try:
        chosen = devices(arguments.gpus) if arguments.gpus else None
    except MemoryModelError as error:
        raise Refused(str(error)) from error
    planner = Planner(arguments.config, arguments.overrides, arguments.model)
    c = planner.config
    folder = Path(arguments.run) if arguments.run else Path(c.run.dir) / c.run.name
    measured = read_measured(folder, required=bool(arguments.run))
    times = plan_times.times(arguments, c.rollout.group_size * c.rollout.groups_per_step, measured)
    prediction = planner.predict()
    knobs = planner.knobs()
    count = chosen[0] if chosen else prediction.sharding.ranks + c.rollout.engines
    report = {
        "prediction": asdict(prediction),
        "peak_bytes": prediction.trainer.total,
        "knobs": [_knob(knob, prediction.trainer) for knob in knobs],
        "fits": list(_fits(planner, prediction, knobs, chosen)),
        "measured": asdict(measured) if measured else None,
        "times": plan_times.split(times, count) if times else None,
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    comparable = measured if measured and not arguments.model else None
    print("\n".join(_text(prediction, report, comparable)))
    return 0


def _knob(knob: Knob, before: MemoryTable) -> dict[str, Any]:
    return {
        "set": list(knob.settings),
        "peak_bytes": knob.trainer.total,
        "saved_bytes": before.total - knob.trainer.total,
        "costs": knob.costs,
    }


def _fits(
    planner: Planner,
    prediction: Prediction,
    knobs: Sequence[Knob],
    chosen: tuple[int, str, int] | None,
) -> Iterator[dict[str, Any]]:
    """For each device: does a rank of the trainer fit, does an engine, and if not, with what."""
    c = planner.config
    wanted = prediction.sharding.ranks + c.rollout.engines
    for name in [chosen[1]] if chosen else DEVICES:
        _, usable = device(name)
        trainer_free = usable - prediction.trainer.total
        remedy = planner.make_fit(usable, knobs) if trainer_free < 0 else None
        yield {
            "device": name,
            "usable_bytes": usable,
            "trainer_free_bytes": trainer_free,
            "engine_free_bytes": usable - prediction.engine.total,
            "make_fit": list(remedy.settings) if remedy else [],
            "make_fit_peak_bytes": remedy.trainer.total if remedy else 0,
            "devices_wanted": wanted,
            "devices_missing": max(wanted - chosen[0], 0) if chosen else 0,
        }


def _text(p: Prediction, report: dict[str, Any], measured: Measured | None) -> Iterator[str]:
    frozen = f", {p.trained:,} of them trained" if p.trained != p.parameters else ""
    yield f"{p.model}: {p.parameters:,} parameters in {p.dtype}{frozen}"
    yield ""
    yield from _trainer_lines(p, measured)
    yield ""
    yield from _engine_lines(p)
    yield ""
    yield from _device_lines(report["fits"])
    if report["knobs"]:
        yield ""
        yield "what would make the trainer smaller (--set …), its peak then, and the price"
        width = max(len(" ".join(knob["set"])) for knob in report["knobs"])
        for knob in report["knobs"]:
            yield (
                f"  {' '.join(knob['set']):{width}}  -{size_text(knob['saved_bytes']):<9} → "
                f"{size_text(knob['peak_bytes']):>9}  {knob['costs']}"
            )
    if report["times"]:
        yield ""
        yield from plan_times.lines(report["times"])


def _trainer_lines(p: Prediction, measured: Measured | None) -> Iterator[str]:
    ranks = f", each of {p.sharding.ranks} ranks" if p.sharding.ranks > 1 else ""
    yield f"trainer{ranks}, at its peak: {p.rows} x {p.columns} tokens, gradients accumulated"
    there = measured.memory if measured else None
    if there is not None:
        yield f"  {'':12}{'predicted':>10}{'measured':>11}"
    copy = f"{size_text(p.reference_bytes)} of it the frozen copy for algorithm.kl"
    notes = {
        "weights": copy if p.reference_bytes else "",
        "optimizer": p.optimizer,
        "activations": f"checkpointing {p.checkpointing}",
        "logits": f"{p.chunk} tokens at a time",
    }
    for name, size in p.trainer.classes().items():
        found = f"{size_text(there.classes()[name]):>11}" if there is not None else ""
        note, most = notes.get(name, ""), p.largest.classes()[name]
        if most > size + 0.01 * p.trainer.total:
            note = f"{note}, up to {size_text(most)} at another moment".removeprefix(", ")
        yield f"  {name:12}{size_text(size):>10}{found}  {note}".rstrip()
    total, line = p.trainer.total, ""
    if measured is not None and there is not None:
        line = f"{size_text(measured.peak_bytes):>11}  ({total / measured.peak_bytes - 1:+.1%})"
    yield f"  {'peak':12}{size_text(total):>10}{line}"
    if measured is not None and there is not None and measured.columns != p.columns:
        yield (
            f"  (measured at {measured.rows} x {measured.columns} tokens in {measured.folder}: "
            "another setting)"
        )


def _engine_lines(p: Prediction) -> Iterator[str]:
    e = p.engine
    yield "each engine"
    yield f"  {'weights':12}{size_text(e.weights):>10}"
    long = e.kv_pool // max(e.kv_token * p.columns, 1)
    yield (
        f"  {'KV cache':12}{size_text(e.kv_pool):>10}  rollout.kv_bytes: {long:,} sequences of "
        f"{p.columns} tokens at {size_text(e.kv_token)} a token"
    )
    yield f"  {'step':12}{size_text(e.working):>10}"
    yield f"  {'total':12}{size_text(e.total):>10}"
    if e.kv_pool < e.kv_wanted:
        yield (
            f"  all {p.concurrency} concurrent sequences at full length would take "
            f"{size_text(e.kv_wanted)} of KV; with less, some wait"
        )
    yield f"  shared memory of the host, two versions of the weights: {size_text(p.shared_bytes)}"


def _device_lines(fits: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'device':12}{'usable':>10}  {'trainer':24}{'engine':24}"

    def verdict(free: int) -> str:
        return f"fits, {size_text(free)} free" if free >= 0 else f"{size_text(-free)} too small"

    for row in fits:
        hint = ""
        if row["make_fit"]:
            hint = f"fits with --set {' --set '.join(row['make_fit'])}"
        line = (
            f"{row['device']:12}{size_text(row['usable_bytes']):>10}  "
            f"{verdict(row['trainer_free_bytes']):24}{verdict(row['engine_free_bytes']):24}{hint}"
        )
        yield line.rstrip()
        if row["devices_missing"]:
            yield (
                f"  {row['devices_wanted']} devices are asked for, one for each rank of the "
                f"trainer and each engine: {row['devices_missing']} too few"
            )
