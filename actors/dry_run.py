"""Before step 1: the largest micro-batch there can be, forward and backward, and what it took.

Two passes over rows of the longest context, the second onto the gradient of the first, as in a
minibatch of several micro-batches. Nothing is updated: weights, optimizer and random numbers stay
as they are, and the gradient is forgotten. The optimizer makes its states only at its first step:
until then its share is what it says it will need, and on a device that much is held free.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loopwright.actors.memory_meter import MemoryMeter
from loopwright.actors.packed_forward import MicroBatch, Sequences, micro_batches
from loopwright.actors.trainer_backend import BackendError, TrainerBackend, TrainerSettings
from loopwright.algorithms.memory_model import MemoryTable, size_text

_TRIED = re.compile(r"(?i)tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a rank needs at its peak; the largest of all ranks."""

    table: MemoryTable
    optimizer_measured: bool  # False: it has no states yet, and says what it will need
    rows: int
    columns: int  # tokens of a row
    device_peak_bytes: int  # by the device's own allocator; 0 on a CPU
    seconds: float

    def event(self) -> dict[str, object]:
        """Plain values, for the records of a run."""
        return {
            "peak_bytes": max(self.table.total, self.device_peak_bytes),
            **{f"{name}_bytes": value for name, value in self.table.classes().items()},
            "optimizer_measured": self.optimizer_measured,
            "rows": self.rows,
            "columns": self.columns,
            "seconds": round(self.seconds, 3),
        }

    def sentence(self) -> str:
        """`peak 1.2 GB = weights 300 MB + …`, largest first, for eyes."""
        parts = sorted(self.table.classes().items(), key=lambda item: -item[1])
        predicted = "" if self.optimizer_measured else " (predicted)"
        shown = [
            f"{name} {size_text(size)}{predicted if name == 'optimizer' else ''}"
            for name, size in parts
            if size
        ]
        return (
            f"peak {size_text(self.table.total)} = {' + '.join(shown)}, "
            f"at {self.rows} x {self.columns} tokens"
        )


class OutOfMemory(BackendError):
    """The largest micro-batch does not fit; the text names the class and the setting."""


class Rehearsable(TrainerBackend, Protocol):
    """A backend that can say what its optimizer holds."""

    def optimizer_bytes(self) -> tuple[int, int]:
        """Bytes of states and masters on this rank: now, and from the first step on."""
        ...


def dry_run(backend: Rehearsable, *, longest: int) -> DryRun:
    """Run the largest micro-batch and report its peak. `longest` is the number of tokens of the
    longest context. Raises `OutOfMemory`. Every rank calls it."""
    started = time.perf_counter()
    settings = backend.settings
    micro = _largest(settings, longest)
    rows, columns = micro.input_ids.shape
    meter = MemoryMeter(vocab=int(backend.model.config.vocab_size))
    meter.hold("weights", (*backend.model.parameters(), *backend.model.buffers()))
    held, needed = backend.optimizer_bytes()
    cuda = torch.device(settings.device).type == "cuda"
    devices = [torch.cuda.current_device()] if cuda else []
    reserved: Tensor | None = None
    try:
        with torch.random.fork_rng(devices=devices):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                reserved = torch.empty(needed - held, dtype=torch.uint8, device=settings.device)
            _twice(backend, micro, meter)
        device_peak = torch.cuda.max_memory_allocated() if cuda else 0
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        kind = meter.failed_on or "optimizer"  # whose share is asked for before any operator
        raise OutOfMemory(_explain(kind, str(error), backend, meter, micro, longest)) from error
    finally:
        backend.drop_gradient()
        del reserved
    table = replace(meter.peak(), optimizer=needed)
    _check_room(table, needed - held, backend, longest, host=not cuda)
    values = backend.ranks.max(np.array([*table.classes().values(), device_peak], dtype=np.int64))
    return DryRun(
        table=MemoryTable(**dict(zip(table.classes(), map(int, values[:-1]), strict=True))),
        optimizer_measured=held > 0 or needed == 0,
        rows=rows,
        columns=columns,
        device_peak_bytes=int(values[-1]),
        seconds=time.perf_counter() - started,
    )


def _twice(backend: Rehearsable, micro: MicroBatch, meter: MemoryMeter) -> None:
    with meter, meter.gradients_of(backend.model.parameters()):
        for _ in range(2):
            logprobs = backend.forward(micro, temperature=backend.settings.temperature)
            loss = logprobs.mean()
            del logprobs
            with meter.phase("backward"):
                backend.backward(loss)
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text


def _explain(
    kind: str,
    text: str,
    backend: Rehearsable,
    meter: MemoryMeter,
    micro: MicroBatch,
    longest: int,
) -> str:
    rows, columns = micro.input_ids.shape
    had = ", ".join(f"{k} {size_text(v)}" for k, v in meter.peak().classes().items() if v)
    match = _TRIED.search(text)
    wanted = f" ({match[1]} {match[2] or 'bytes'} more were asked for)" if match else ""
    return (
        f"out of memory in the dry run of {rows} x {columns} tokens: {kind} do not fit{wanted}; "
        f"until then {had or 'nothing'} were held. {remedy(kind, backend.settings, longest)}; "
        "`loopwright plan` shows what each setting saves"
    )


def remedy(kind: str, settings: TrainerSettings, longest: int) -> str:
    """Which setting makes class `kind` smaller."""
    if kind == "logits":
        return f"Lower trainer.logprob_chunk (now {settings.logprob_chunk})"
    if kind == "optimizer":
        return (
            'Choose a trainer.optimizer with less state ("sgd" has none, "galore" projects it), '
            "or train adapters: model.lora_rank"
        )
    if kind == "activations":
        ways = []
        if settings.gradient_checkpointing == "off":
            ways.append('set trainer.gradient_checkpointing = "on"')
        elif settings.gradient_checkpointing == "on" and settings.device != "cpu":
            ways.append('set trainer.gradient_checkpointing = "offload"')
        if settings.token_budget >= 2 * longest:
            ways.append(f"lower trainer.token_budget (now {settings.token_budget})")
        else:
            ways.append(f"lower environment.max_context (now {longest})")
        text = " or ".join(ways)
        return text[0].upper() + text[1:]
    return "Train adapters (model.lora_rank), or spread the model over more devices"


def _check_room(
    table: MemoryTable, to_come: int, backend: Rehearsable, longest: int, *, host: bool
) -> None:
    """Refuse an optimizer whose states, still to be made, have no room in the host's memory."""
    free = available_bytes() if host else None
    if free is not None and to_come > free:
        raise OutOfMemory(
            f"the optimizer will hold {size_text(table.optimizer)}, of which {size_text(to_come)} "
            f"are still to be made, and {size_text(free)} of memory are free. "
            f"{remedy('optimizer', backend.settings, longest)}"
        )


def available_bytes(files: Mapping[str, str] | None = None) -> int | None:
    """Memory this process can still have: the kernel's estimate, or less where a control group sets
    a limit; None where neither is known. `files` replaces the file system, by path."""

    def read(path: str) -> str:
        if files is not None:
            return files.get(path, "")
        try:
            return Path(path).read_text()
        except OSError:
            return ""

    found = []
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = read("/sys/fs/cgroup/memory.max"), read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        found.append(max(int(limit) - int(used), 0))
    return min(found, default=None)
