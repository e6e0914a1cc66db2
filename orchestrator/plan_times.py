"""Seconds of a step for `loopwright plan`: from given or measured times to splits of devices."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopwright.algorithms.time_model import (
    Side,
    Split,
    best_split,
    by_turns_s,
    synchronous_s,
    whole_splits,
)
from loopwright.orchestrator.faults import Refused
from loopwright.orchestrator.measured import Measured

_ETA = re.compile(r"(train|generate):(.+)")
_SHOWN_SPLITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a step costs on either side."""

    train: Side
    generate: Side
    sequences: int  # of one step
    tail_s: float
    source: str  # where the numbers are from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments about time."""
    group = parser.add_argument_group("seconds of a step (else a run's own measurement is used)")
    for name, what in (("train", "training"), ("generate", "generation")):
        group.add_argument(
            f"--{name}-s",
            type=float,
            default=0.0,
            metavar="S",
            help=f"device-seconds of {what}: its seconds times its devices",
        )
    group.add_argument(
        "--eta",
        action="append",
        default=[],
        metavar="SIDE:m=8,b=2,s=2.0",
        help="instead: train or generate, devices m of a replica, sequences b of a micro-batch, "
        "its seconds s",
    )
    group.add_argument(
        "--tail-s",
        type=float,
        default=0.0,
        metavar="S",
        help="what the slowest episode of a step takes beyond the others",
    )


def times(arguments: argparse.Namespace, sequences: int, measured: Measured | None) -> Times | None:
    """The given times, else the measured ones, else None. Raises `Refused` for half of them or for
    both kinds."""
    given = {"train": arguments.train_s, "generate": arguments.generate_s}
    if arguments.tail_s < 0 or min(given.values()) < 0:
        raise Refused("--train-s, --generate-s and --tail-s: expected seconds, at least 0")
    sides = dict(_eta(text) for text in arguments.eta)
    if sides and any(given.values()):
        raise Refused("--eta gives the times of both sides: leave --train-s and --generate-s out")
    if any(given.values()):
        sides = {
            name: Side(replica_devices=1, micro_batch=sequences, micro_batch_s=seconds)
            for name, seconds in given.items()
            if seconds
        }
    source = "given"
    if not sides and measured is not None and measured.train_s and measured.generate_s:
        source = f"measured in {measured.folder}"
        sides = {
            name: Side(replica_devices=1, micro_batch=sequences, micro_batch_s=seconds)
            for name, seconds in (("train", measured.train_s), ("generate", measured.generate_s))
        }
    if not sides:
        return None
    if missing := {"train", "generate"} - set(sides):
        raise Refused(
            f"the times of {', '.join(missing)} are missing: give both sides, by --train-s and "
            "--generate-s or by two --eta"
        )
    return Times(
        train=sides["train"],
        generate=sides["generate"],
        sequences=sequences,
        tail_s=arguments.tail_s,
        source=source,
    )


def _eta(text: str) -> tuple[str, Side]:
    expected = f"--eta {text!r}: expected train:m=8,b=2,s=2.0 or generate:m=8,b=8,s=3.8"
    match = _ETA.fullmatch(text)
    pairs = dict(p.partition("=")[::2] for p in match[2].split(",")) if match else {}
    if match is None or set(pairs) != {"m", "b", "s"}:
        raise Refused(expected)
    try:
        side = Side(
            replica_devices=int(pairs["m"]),
            micro_batch=int(pairs["b"]),
            micro_batch_s=float(pairs["s"]),
        )
    except ValueError:
        raise Refused(expected) from None
    if side.replica_devices < 1 or side.micro_batch < 1 or not side.micro_batch_s > 0:
        raise Refused(expected)
    return match[1], side


def split(found: Times, devices: int) -> dict[str, Any]:
    """Synchronous and asynchronous seconds of a step on so many devices, and the best whole
    splits."""
    train, generate, sequences = found.train, found.generate, found.sequences
    ideal = best_split(sequences, devices, train, generate)
    work = sequences * train.device_s, sequences * generate.device_s
    whole = sorted(
        whole_splits(
            devices,
            *work,
            train_replica=train.replica_devices,
            generate_replica=generate.replica_devices,
            tail_s=found.tail_s,
        ),
        key=lambda s: (s.step_s, s.train_devices),
    )
    return {
        "source": found.source,
        "devices": devices,
        "synchronous_s": synchronous_s(sequences, devices, train, generate),
        "synchronous_with_tail_s": by_turns_s(devices, *work, tail_s=found.tail_s),
        "asynchronous_s": ideal.step_s,
        "train_frac": ideal.train_frac,
        "whole_splits": [_plain(s) for s in whole[:_SHOWN_SPLITS]],
    }


def _plain(s: Split) -> dict[str, float]:
    return {
        "train_devices": s.train_devices,
        "generate_devices": s.generate_devices,
        "step_s": s.step_s,
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `split` for eyes."""
    shown = [
        f"seconds of a step on {report['devices']} devices ({report['source']})",
        f"  in turns (max_lag = 0)   {report['synchronous_with_tail_s']:.4g} s",
        f"  overlapped, ideal        {report['asynchronous_s']:.4g} s at "
        f"{report['train_frac']:.1%} of the devices for training",
    ]
    for place, s in enumerate(report["whole_splits"]):
        label = "overlapped, whole" if place == 0 else ""
        shown.append(
            f"  {label:25}{s['step_s']:.4g} s with {s['train_devices']:.0f} training and "
            f"{s['generate_devices']:.0f} generating"
        )
    if not report["whole_splits"]:
        shown.append("  too few devices for a replica of each side: they take turns")
    elif report["whole_splits"][0]["step_s"] >= report["synchronous_with_tail_s"]:
        shown.append("  whole devices do not overlap well here: taking turns is as fast")
    return shown
