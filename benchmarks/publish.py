"""A publish against its floor: the trainer's write and the engine's reading, beside a plain memory
copy.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/publish.py [--out publish.json]

The floor of a publish is one copy of the bytes (into shared memory) and one reading of them by each
engine (to prove them); an engine that serves from the shared memory itself needs nothing more.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loopwright.actors.shared_memory import SharedWeights, attach
from loopwright.actors.weights import manifest_checksums, verify

REPEATS = 7
TENSOR_BYTES = 2 << 20  # a tensor of a small model


def best_s(work: Callable[[], Any]) -> float:
    """The shortest of several runs, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def measure(size_mb: int) -> dict[str, float]:
    """Milliseconds of each part for `size_mb` MiB of float32 weights."""
    count = max(1, (size_mb << 20) // TENSOR_BYTES)
    tensors = {f"layer.{i}": torch.randn(TENSOR_BYTES // 4) for i in range(count)}
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    writer = SharedWeights.create("benchmark", tensors)
    try:
        manifest = writer.write(1, tensors)
        checksums = manifest_checksums(manifest)

        def copy() -> None:
            for name, tensor in tensors.items():
                targets[name].copy_(tensor)

        def read() -> None:
            for tensor in tensors.values():
                zlib.crc32(tensor.numpy().data)

        copy_s, read_s = best_s(copy), best_s(read)
        write_s = best_s(lambda: writer.write(2, tensors))
        attach_s = best_s(lambda: attach(manifest))
        verify_s = best_s(lambda: verify(attach(manifest), checksums)) - attach_s
    finally:
        writer.close()
    total_s, floor_s = write_s + attach_s + verify_s, copy_s + 2 * read_s
    return {
        "size_mb": size_mb,
        "copy_ms": copy_s * 1e3,
        "crc32_ms": read_s * 1e3,
        "write_ms": write_s * 1e3,
        "attach_ms": attach_s * 1e3,
        "verify_ms": verify_s * 1e3,
        "publish_ms": total_s * 1e3,
        "copy_gb_per_s": size_mb * (1 << 20) / copy_s / 1e9,
        "publish_over_floor": total_s / floor_s,
        "publish_over_copy": total_s / copy_s,
    }


def main() -> None:
    """Measure the sizes asked for and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(size) for size in given.sizes_mb]
    print(" ".join(f"{key:>18s}" for key in rows[0]))
    for row in rows:
        print(" ".join(f"{value:18.2f}" for value in row.values()))
    print("floor: one copy, and one crc32 on each side of it", file=sys.stderr)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
