"""A publish over each channel against its floor, with 1, 2 and 4 engines in processes of their own.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/publish.py [--sizes-mb 10 100] [--out FILE]

The floor of a publish is one copy of the bytes by the trainer and one reading of them by each
engine, both measured in the same run. Ratios are of CPU time of all processes together, for wall
time on a busy machine measures the others; it stands beside, from the trainer's first copy to the
last engine's proof.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from loopwright.actors.channels.channel import open_channel
from loopwright.actors.channels.receiver import Receiver
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.weights import decode, encode

TENSOR_BYTES = 2 << 20  # a tensor of a small model
CHANNELS = (
    ("shared_memory", "shared_memory"),
    ("collective", "collective"),
    ("delta", "shared_memory"),
    ("delta", "collective"),
)
CHANGED = 0.01  # of the elements, in what the delta channel publishes
DEADLINE_S = 120


class Weights:
    """As much of a model as `size_mb` MiB of bf16 tensors are."""

    def __init__(self, size_mb: int) -> None:
        count = max(1, (size_mb << 20) // TENSOR_BYTES)
        self.tensors = {
            f"layer.{i}": torch.randn(TENSOR_BYTES // 2).to(torch.bfloat16) for i in range(count)
        }

    def nudge(self, version: int) -> None:
        """Change one element in a hundred, at random, by its last bit."""
        generator = torch.Generator().manual_seed(version)
        for tensor in self.tensors.values():
            count = int(len(tensor) * CHANGED)
            places = torch.randint(len(tensor), (count,), generator=generator)
            tensor.view(torch.int16)[places.unique()] ^= 1

    def published_shapes(self) -> dict[str, Tensor]:
        """On the meta device."""
        return {name: tensor.to("meta") for name, tensor in self.tensors.items()}

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        """One tensor at a time."""
        for name, tensor in self.tensors.items():
            yield {name: tensor}


def engine(pipe: Connection) -> None:
    """One engine: takes every manifest that comes and answers with its CPU seconds."""
    torch.set_num_threads(1)
    receiver = Receiver()
    while data := pipe.recv_bytes():
        began = time.process_time()
        receiver.serving(receiver.receive(decode(data)))
        pipe.send(time.process_time() - began)
    receiver.close()


def best_s(work: Callable[[], Any], repeats: int = 5) -> float:
    """The least CPU time of several runs, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def floor_s(weights: Weights) -> tuple[float, float]:
    """CPU seconds of one plain copy of all bytes, and of one reading (xxh3)."""
    targets = {name: torch.empty_like(tensor) for name, tensor in weights.tensors.items()}

    def copy() -> None:
        for name, tensor in weights.tensors.items():
            targets[name].copy_(tensor)

    def read() -> None:
        for tensor in weights.tensors.values():
            xxhash.xxh3_64_intdigest(tensor.view(torch.uint8).numpy().data)

    return best_s(copy), best_s(read)


def measure(
    weights: Weights, name: Any, carrier: Any, pipes: list[Connection], repeats: int
) -> dict[str, Any]:
    """One row: the fastest of `repeats` publishes after one to warm up."""
    run_name = f"benchmark-{os.getpid()}"
    chosen = ChannelSettings(channel=name, carrier=carrier, full_every=1000, timeout_s=DEADLINE_S)
    channel = open_channel(chosen, run_name)
    members = tuple(f"engine {i}/0" for i in range(len(pipes)))
    rows = []
    try:
        for version in range(repeats + 2):
            weights.nudge(version)
            began, cpu = time.perf_counter(), time.process_time()
            manifest = channel.publish(version, weights, members)
            assert manifest is not None
            handed_s = time.perf_counter() - began
            for pipe in pipes:
                pipe.send_bytes(encode(manifest))
            engines_s = 0.0
            for pipe in pipes:
                if not pipe.poll(DEADLINE_S):
                    raise TimeoutError(f"an engine did not take {name} within {DEADLINE_S} s")
                engines_s += pipe.recv()
            seconds = time.perf_counter() - began
            cpu_s = time.process_time() - cpu + engines_s
            rows.append((seconds, handed_s, cpu_s, manifest.size_bytes))
    finally:
        channel.close()
    seconds, handed_s = min(row[0] for row in rows[2:]), min(row[1] for row in rows[2:])
    cpu_s, size_bytes = min(row[2] for row in rows[2:]), rows[-1][3]
    return {
        "channel": f"{name}/{carrier}" if name == "delta" else name,
        "engines": len(pipes),
        "publish_ms": 1e3 * seconds,
        "trainer_ms": 1e3 * handed_s,
        "cpu_ms": 1e3 * cpu_s,
        "travels_mb": size_bytes / (1 << 20),
    }


def rows_of(size_mb: int, engines: int, repeats: int) -> Iterator[dict[str, Any]]:
    """All channels for one size and number of engines."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(engines)]
    processes = [context.Process(target=engine, args=(there,)) for _, there in pairs]
    for process in processes:
        process.start()
    pipes = [here for here, _ in pairs]
    weights = Weights(size_mb)
    copy_s, read_s = floor_s(weights)
    try:
        for name, carrier in CHANNELS:
            row = measure(weights, name, carrier, pipes, repeats)
            total_ms = 1e3 * (copy_s + engines * read_s)
            yield (
                {"size_mb": size_mb}
                | row
                | {
                    "copy_ms": 1e3 * copy_s,
                    "floor_ms": total_ms,
                    "cpu_over_floor": row["cpu_ms"] / total_ms,
                }
            )
    finally:
        for pipe in pipes:
            pipe.send_bytes(b"")
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.terminate()


def main() -> None:
    """Measure what was asked for; print and write one row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in given.sizes_mb:
        for engines in given.engines:
            for row in rows_of(size, engines, given.repeats):
                if not rows:
                    print(" ".join(f"{key:>20s}" for key in row), flush=True)
                rows.append(row)
                texts = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
                print(" ".join(f"{text:>20s}" for text in texts), flush=True)
    print("floor: one copy by the trainer and one reading by each engine", file=sys.stderr)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
