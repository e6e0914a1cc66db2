"""Before step 1: the largest micro-batch there can be, forward and backward, and what it took.

Two passes over rows of the longest context, the second onto the gradient of the first, as in a
minibatch of several micro-batches. Nothing is updated: weights, optimizer and random numbers stay
as they are, and the gradient is forgotten. With an optimizer that needs no gradient there is no
backward pass. The loss is not the policy's but the mean logprob: its
gradient takes the same memory.
"""

import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.actors.memory_meter import MemoryMeter, local
from loopwright.actors.out_of_memory import explain, is_out_of_memory
from loopwright.actors.packed_forward import MicroBatch, Sequences, micro_batches
from loopwright.actors.trainer_backend import TrainerBackend, TrainerSettings
from loopwright.algorithms import optimizers
from loopwright.algorithms.memory_model import MemoryTable, size_text


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a rank needs at its peak, the largest of all ranks."""

    peak: MemoryTable
    largest: MemoryTable  # of each class by itself, not at the same moment
    rows: int
    columns: int  # tokens of a row
    device_peak_bytes: int  # by the device's own allocator; 0 on a CPU
    seconds: float

    def event(self) -> dict[str, Any]:
        """Plain values, for the records of a run."""
        return {
            "peak_bytes": max(self.peak.total, self.device_peak_bytes),
            **{f"{name}_bytes": value for name, value in self.peak.classes().items()},
            **{f"{name}_max_bytes": value for name, value in self.largest.classes().items()},
            "rows": self.rows,
            "columns": self.columns,
            "seconds": round(self.seconds, 3),
        }

    def sentence(self) -> str:
        """`peak 1.20 GB = weights 300 MB + …`, largest first, for eyes."""
        parts = sorted(self.peak.classes().items(), key=lambda item: -item[1])
        shown = [f"{name} {size_text(size)}" for name, size in parts if size]
        more = self.device_peak_bytes - self.peak.total
        if more > 0:
            shown.append(f"{size_text(more)} that the device's allocator adds")
        return (
            f"peak {size_text(max(self.peak.total, self.device_peak_bytes))} = "
            f"{' + '.join(shown)}, at {self.rows} x {self.columns} tokens"
        )


def held_tensors(
    models: Iterable[nn.Module | None], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, list[Tensor]]:
    """What these hold on this rank between two steps, by class: `weights` (buffers included) and
    `optimizer` (states and masters)."""
    modules = [model for model in models if model is not None]
    return {
        "weights": [local(t) for m in modules for t in (*m.parameters(), *m.buffers())],
        "optimizer": [
            local(value)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ],
    }


def dry_run(backend: TrainerBackend, *, longest: int) -> DryRun:
    """Run the largest micro-batch and report its peak. `longest` is the number of tokens of the
    longest context. Raises `OutOfMemory`. Every rank calls it."""
    started = time.perf_counter()
    settings = backend.settings
    micro = _largest(settings, longest)
    rows, columns = micro.input_ids.shape
    vocab = int(backend.model.config.vocab_size)
    meter = MemoryMeter(vocab=vocab, resized=backend.ranks.size > 1)
    for kind, tensors in backend.held().items():
        meter.hold(kind, tensors)
    cuda = torch.device(settings.device).type == "cuda"
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            _twice(backend, micro, meter)
        device_peak = torch.cuda.max_memory_allocated() if cuda else 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        had = ", ".join(f"{k} {size_text(v)}" for k, v in meter.peak().classes().items() if v)
        doing = f"in the dry run of {rows} x {columns} tokens, holding {had}"
        kind = meter.failed_on or "activations"
        raise explain(kind, error, settings, longest, doing) from error
    finally:
        backend.drop_gradient()
    most = _over_ranks(backend, meter.peak().classes(), meter.largest().classes(), device_peak)
    return DryRun(
        peak=MemoryTable(**most[0]),
        largest=MemoryTable(**most[1]),
        rows=rows,
        columns=columns,
        device_peak_bytes=most[2],
        seconds=time.perf_counter() - started,
    )


def process_peak_bytes(device: str) -> int:
    """Most memory this process has had: resident on the host, or allocated on its device."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _over_ranks(
    backend: TrainerBackend, peak: Mapping[str, int], largest: Mapping[str, int], device_peak: int
) -> tuple[dict[str, int], dict[str, int], int]:
    values = np.array([*peak.values(), *largest.values(), device_peak], dtype=np.int64)
    found = [int(v) for v in backend.ranks.max(values)]
    count = len(peak)
    return (
        dict(zip(peak, found[:count], strict=True)),
        dict(zip(largest, found[count:-1], strict=True)),
        found[-1],
    )


def _twice(backend: TrainerBackend, micro: MicroBatch, meter: MemoryMeter) -> None:
    with_gradient = not optimizers.method(backend.settings.optimizer).forward_only
    with meter, meter.gradients_of(backend.model.parameters()):
        for _ in range(2):
            with torch.set_grad_enabled(with_gradient):
                loss = backend.forward(micro, temperature=backend.settings.temperature).mean()
            if with_gradient:
                with meter.phase("backward"):
                    backend.backward(loss)
                grads = [p.grad for p in backend.model.parameters() if p.grad is not None]
                meter.hold("gradients", map(local, grads))
            del loss


def _largest(settings: TrainerSettings, longest: int) -> MicroBatch:
    """As many rows of the longest context as the token budget takes, all tokens but the first of
    each chosen by the policy."""
    rows = max(1, settings.token_budget // longest)
    mask = np.ones(rows * longest, dtype=bool)
    mask[::longest] = False
    sequences = Sequences.of(
        np.arange(rows * longest, dtype=np.int32) % 8, mask, np.full(rows, longest)
    )
    (micro,) = micro_batches(
        sequences, np.arange(rows), token_budget=rows * longest, device=settings.device
    )
    return micro
