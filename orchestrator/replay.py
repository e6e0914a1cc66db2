"""Replay: train every step of a run again from its ledger alone, and compare the weights.

What an asynchronous run sampled, and under which versions, depended on the moment; what it trained
on is on record. The same batches in the same order give the same weights, bit for bit, where the
arithmetic is deterministic (one thread on a CPU is). One step can be taken again by itself, from
the checkpoint before it, and then says where each of its numbers came from.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.policy_step import TokenRecord, take_step
from loopwright.actors.trainer import Trainer
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Group, Rollout, TrainBatch, decode, encode
from loopwright.configs.load import load
from loopwright.configs.schema import Config
from loopwright.orchestrator import anatomy, assembly, ledger
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.parts import checkpoints
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
    config, state = recorded_run(folder)
    with closing(open_trainer(config, folder)) as trainer:
        for step in sorted(state.trained):
            trainer.step(step, encode(batch_of(config, state, step)))
            now = published_checksum(trainer, step)
            yield Replayed(step=step, recorded=state.checksums[step], now=now)


def replay_step(folder: Path, step: int, rollout: tuple[int, int] | None = None) -> dict[str, Any]:
    """Take one step again, from the newest checkpoint before it or from the first weights, and say
    where its numbers came from (`anatomy.describe`); `rollout`, as (ticket, attempt), token by
    token. Raises `RunError` for a step or rollout that the run does not have.
    """
    config, state = recorded_run(folder)
    if step not in state.trained:
        last = max(state.trained, default=0)
        raise RunError(f"{folder} has no step {step}: it trained steps 1 to {last}")
    before = [(s, path) for s, path in checkpoints(folder) if s < step]
    with closing(open_trainer(config, folder)) as trainer:
        began = trainer.load(str(before[-1][1])) if before else 0
        for earlier in range(began + 1, step):
            trainer.step(earlier, encode(batch_of(config, state, earlier)))
        groups = groups_of(state, step)
        batch = batch_of(config, state, step)
        record = TokenRecord(len(batch.token_ids))
        metrics = take_step(trainer.backend, batch, record)
        now = published_checksum(trainer, step)
    report = {
        "run": str(folder),
        "step": step,
        "from": f"checkpoint of step {began}" if began else "first weights",
        "recorded": state.checksums[step],
        "now": now,
        "equal": state.checksums[step] == now,
        "metrics": metrics,
        "groups": anatomy.describe(groups, batch, record, advantage=config.algorithm.advantage),
    }
    if rollout is not None:
        try:
            report["rollout"] = anatomy.tokens_of(
                groups, batch, record, *rollout, _decoder(first_weights(config, folder))
            )
        except KeyError:
            known = ", ".join(f"{g.ticket}/{r.attempt}" for g in groups for r in g.rollouts[:1])
            raise RunError(
                f"step {step} trained no rollout {rollout[0]}/{rollout[1]}; it has {known}, …"
            ) from None
    return report


def recorded_run(folder: Path) -> tuple[Config, ledger.LedgerState]:
    """Configuration and ledger of the run in `folder`. Raises `RunError` where there is none."""
    if not (folder / "config.toml").is_file():
        raise RunError(f"{folder} is not a run's folder: no config.toml there")
    return load(folder / "config.toml").config, ledger.read(folder / "ledger" / ledger.FILE)


def open_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer in this process with the weights that the run began from. Raises `RunError` where
    one process cannot give the bits of that run."""
    settings = assembly.trainer_settings(config, first_weights(config, folder))
    if settings.ranks > 1:
        raise RunError(
            f"{folder}: trained by {settings.ranks} ranks, whose sums differ in the last bits from "
            "those of the one process here: only runs with trainer.ranks = 1 replay bit for bit"
        )
    # An adapter's publish is the adapter alone, and so are its checksums.
    adapters = recorded_channel(folder) == "adapter"
    channel = ChannelSettings(
        channel="adapter" if adapters else "shared_memory", dtype=config.model.dtype
    )
    return Trainer(settings, f"{config.run.name}-replay", channel=channel)


def recorded_channel(folder: Path) -> str:
    """The channel by which the run in `folder` published; empty if it does not say."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    placed = [event for event in map(json.loads, lines) if event["kind"] == "placement"]
    return str(placed[-1]["channel"]) if placed else ""


def published_checksum(trainer: Trainer, version: int) -> int:
    """Checksum of what the trainer publishes now."""
    manifest = trainer.publish(version)
    assert manifest is not None, "rank 0 has one"
    return checksum_of(manifest)


def first_weights(config: Config, folder: Path) -> str:
    """The model that the run in `folder` began to train from: version 0."""
    for name in ("warm_start", "initial"):
        if (folder / name).is_dir():
            return str((folder / name).resolve())
    return config.model.path


def groups_of(state: ledger.LedgerState, step: int) -> list[Group]:
    """The groups that `step` trained on, from the rollouts on record."""
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
    return groups


def batch_of(config: Config, state: ledger.LedgerState, step: int) -> TrainBatch:
    """The batch of `step`, built again from the rollouts on record."""
    drop_below = assembly.drop_below(config)
    groups = groups_of(state, step)
    return build_batch(groups, step, config.algorithm.advantage, drop_below)[0]


def _decoder(model_path: str) -> anatomy.Decode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def decoded(ids: Any) -> str:
        return str(tokenizer.decode(ids))

    return decoded
