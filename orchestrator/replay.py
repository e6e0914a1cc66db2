"""Replay: train every step of a run again from its ledger alone, and compare the weights.

What an asynchronous run sampled, and under which versions, depended on the moment; what it trained
on is on record. The same batches in the same order give the same weights, bit for bit, where the
arithmetic is deterministic (one thread on a CPU is).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.trainer import Trainer
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Group, Rollout, TrainBatch, decode, encode
from loopwright.configs.load import load
from loopwright.configs.schema import Config
from loopwright.orchestrator import assembly, ledger
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.recorder import checksum_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One step, taken again."""

    step: int
    recorded: int  # checksum of the weights that the run published after the step
    now: int  # checksum of the weights that the step gives now

    @property
    def equal(self) -> bool:
        """Whether both are the same weights."""
        return self.recorded == self.now


def replay(folder: Path) -> Iterator[Replayed]:
    """Take the steps of the run in `folder` again, one at a time, in a trainer of this process.

    Raises `RunError` where the folder holds no run, or its ledger lacks a rollout that was trained
    on.
    """
    if not (folder / "config.toml").is_file():
        raise RunError(f"{folder} is not a run's folder: no config.toml there")
    config = load(folder / "config.toml").config
    state = ledger.read(folder / "ledger" / ledger.FILE)
    settings = assembly.trainer_settings(config, first_weights(config, folder))
    if settings.ranks > 1:
        raise RunError(
            f"{folder}: trained by {settings.ranks} ranks, whose sums differ in the last bits from "
            "those of the one process here: only runs with trainer.ranks = 1 replay bit for bit"
        )
    # An adapter's publish is the adapter alone, and so are its checksums.
    adapters = recorded_channel(folder) == "adapter"
    channel = ChannelSettings(channel="adapter" if adapters else "shared_memory")
    trainer = Trainer(settings, f"{config.run.name}-replay", channel=channel)
    try:
        for step in sorted(state.trained):
            trainer.step(step, encode(batch_of(config, state, step)))
            manifest = trainer.publish(step)
            assert manifest is not None, "rank 0 has one"
            now = checksum_of(manifest)
            yield Replayed(step=step, recorded=state.checksums[step], now=now)
    finally:
        trainer.close()


def recorded_channel(folder: Path) -> str:
    """The channel by which the run in `folder` published; empty if it does not say."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    placed = [event for event in map(json.loads, lines) if event["kind"] == "placement"]
    return str(placed[-1]["channel"]) if placed else ""


def first_weights(config: Config, folder: Path) -> str:
    """The model that the run in `folder` began to train from: version 0."""
    for name in ("warm_start", "initial"):
        if (folder / name).is_dir():
            return str((folder / name).resolve())
    return config.model.path


def batch_of(config: Config, state: ledger.LedgerState, step: int) -> TrainBatch:
    """The batch of `step`, built again from the rollouts on record."""
    groups: list[Group] = []
    for ticket, pairs in groupby(state.trained[step], key=lambda pair: pair[0]):
        attempts = [attempt for _, attempt in pairs]
        missing = [k for k in attempts if k not in state.rollouts.get(ticket, {})]
        if missing:
            raise RunError(
                f"step {step} trained attempts {missing} of ticket {ticket}, which the ledger lacks"
            )
        rollouts: list[Rollout] = [decode(state.rollouts[ticket][k]) for k in attempts]
        groups.append(Group(ticket=ticket, task_id=rollouts[0].task_id, rollouts=tuple(rollouts)))
    drop_below = assembly.drop_below(config)
    batch, _ = build_batch(groups, step, config.algorithm.advantage, drop_below)
    return batch
