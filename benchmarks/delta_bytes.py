"""What a lossless delta sends of a real run: its recorded batches, trained again at several rates.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/delta_bytes.py runs/quickstart --steps 6

The trainer holds float32 weights; they are published as bfloat16 and as float32. Bytes are those
that travel, against those of all weights; every publish is received and proven.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loopwright.actors.channels.channel import open_channel
from loopwright.actors.channels.delta import bits_of
from loopwright.actors.channels.receiver import Receiver
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.trainer import Trainer
from loopwright.algorithms.records import encode
from loopwright.orchestrator import assembly
from loopwright.orchestrator.replay import batch_of, first_weights, recorded_run


class Observer:
    """A delta channel and an engine's end of it, in one published dtype."""

    def __init__(self, dtype: str, level: int) -> None:
        chosen = ChannelSettings(channel="delta", dtype=dtype, full_every=1 << 30, level=level)
        self.dtype = dtype
        self.channel: Any = open_channel(chosen, f"delta-bytes-{dtype}")
        self.receiver = Receiver()
        self.former: dict[str, torch.Tensor] = {}

    def publish(self, version: int, backend: Any) -> dict[str, float]:
        """Publish, receive, compare; what it cost."""
        manifest = self.channel.publish(version, backend, ("engine/0",))
        received = self.receiver.receive(manifest)
        self.receiver.serving(received)
        changed = total = 0
        for name, tensor in received.weights.items():
            if name in self.former:
                changed += int((bits_of(tensor) != bits_of(self.former[name])).sum())
            total += tensor.numel()
        self.former = {name: tensor.clone() for name, tensor in received.weights.items()}
        whole = sum(t.nbytes for t in received.weights.values())
        return {
            "changed": changed / total,
            "bytes": float(manifest.size_bytes),
            "of_full": manifest.size_bytes / whole,
        }


def measure(folder: Path, lr: float, steps: int, level: int) -> Iterator[dict[str, Any]]:
    """One row a step and dtype."""
    config, state = recorded_run(folder)
    settings = assembly.trainer_settings(config, first_weights(config, folder))
    settings = replace(settings, lr=lr, schedule="constant", warmup_steps=0)
    observers = [Observer("bfloat16", level), Observer("float32", level)]
    try:
        with closing(Trainer(settings, "delta-bytes")) as trainer:
            for observer in observers:
                observer.publish(0, trainer.backend)
            for step in sorted(state.trained)[:steps]:
                trainer.step(step, encode(batch_of(config, state, step)))
                for observer in observers:
                    row = observer.publish(step, trainer.backend)
                    yield {"lr": lr, "step": step, "dtype": observer.dtype} | row
    finally:
        for observer in observers:
            observer.receiver.close()
            observer.channel.close()


def main() -> None:
    """Measure and print the mean over the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of a run with a ledger")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--level", type=int, default=1, help="of zstd")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for lr in given.lr for row in measure(given.run, lr, given.steps, given.level)]
    print("      lr     dtype  changed  bytes/full")
    for lr in given.lr:
        for dtype in ("bfloat16", "float32"):
            those = [r for r in rows if (r["lr"], r["dtype"]) == (lr, dtype)]
            changed = sum(r["changed"] for r in those) / len(those)
            share = sum(r["of_full"] for r in those) / len(those)
            print(f"{lr:8.0e} {dtype:>9s} {changed:8.2%} {share:11.2%}")
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
