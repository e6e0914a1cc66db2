"""How much memory a piece of training takes, by class, counted tensor by tensor.

`MemoryMeter` sees every operator below autograd and keeps a ledger of storages: when each was
born, how large, when it was freed. What a storage was for is often known only later (a gradient is
one when it reaches its parameter), so the ledger is written first and added up by class
afterwards. The count is of bytes that tensors hold: the same on a CPU, on a device, and on fake
tensors, which have shapes and no memory. It misses what kernels allocate inside themselves and
what the allocator rounds up: a few percent (docs/memory.md has the comparison with resident
memory).
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from loopwright.algorithms.memory_model import CLASSES, MemoryTable


class MemoryMeter(TorchDispatchMode):
    """Count while entered: `with meter: …`. Classes are those of `memory_model.CLASSES`.

    A storage born under `phase("optimizer")` is of the optimizer; one whose last dimension is
    `vocab` is of the logits; one that reaches a parameter as its gradient, or has the shape of a
    trained matrix in the backward pass, is a gradient; one that is emptied and filled again holds
    weights gathered from ranks (FSDP2); everything else is an activation.
    """

    def __init__(self, *, vocab: int, resized: bool = False) -> None:
        """Nothing is counted yet. `vocab` is the width of the logits. `resized`: storages may be
        emptied and filled again, and are looked at after each operator."""
        super().__init__()
        self._vocab = vocab
        self._phase = "forward"
        self._ledger: list[tuple[int, int]] = []  # (storage, bytes born or, negative, freed)
        self._class: dict[int, str] = {}
        self._living: dict[int, int] = {}  # address of the storage -> its number in the ledger
        self._references: dict[int, weakref.ref[Any]] = {}
        self._resized = resized
        self._sizes: dict[int, int] = {}  # of living storages, by number, where they may change
        self._trained: set[tuple[int, ...]] = set()
        self.failed_on = ""  # class of what an operator that raised was to make

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Enter tensors of class `kind`, or say of those entered already that they are of it."""
        for tensor in tensors:
            self._enter(tensor, kind)
            number = self._living.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._class[number] = kind

    @contextmanager
    def gradients_of(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Recognise the gradients of these leaves while inside."""
        trained = [p for p in parameters if p.requires_grad]
        self._trained = {tuple(p.shape) for p in trained if p.ndim > 1}
        hooks = [p.register_hook(self._is_gradient) for p in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is born inside belongs to `forward`, `backward` or `optimizer`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def peak(self) -> MemoryTable:
        """The classes at the moment when their sum was largest."""
        now = dict.fromkeys(CLASSES, 0)
        total, highest, best = 0, -1, dict(now)
        for number, size_bytes in self._ledger:
            now[self._class[number]] += size_bytes
            total += size_bytes
            if total > highest:
                highest, best = total, dict(now)
        return MemoryTable(**best)

    def largest(self) -> MemoryTable:
        """The largest value each class had by itself; they need not have come together."""
        now = dict.fromkeys(CLASSES, 0)
        best = dict(now)
        for number, size_bytes in self._ledger:
            kind = self._class[number]
            now[kind] += size_bytes
            best[kind] = max(best[kind], now[kind])
        return MemoryTable(**best)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and enter what it returns."""
        try:
            out = func(*args, **(kwargs or {}))
        except RuntimeError:
            self.failed_on = self._kind_of_result(func, args, kwargs or {})
            raise
        for tensor in _tensors(out):
            self._enter(tensor, self._guess(tensor))
        self._follow()
        return out

    def _kind_of_result(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> str:
        """What an operator would have made, by the shape of its result."""
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                made = _tensors(func(*args, **kwargs))
        except Exception:  # noqa: BLE001 the error that matters is the operator's own
            made = []
        return self._guess(max(made, key=lambda t: t.nbytes)) if made else "activations"

    def _guess(self, tensor: Tensor) -> str:
        if self._phase == "optimizer":
            return "optimizer"
        if tensor.ndim > 1 and tensor.shape[-1] == self._vocab:
            return "logits"
        if self._phase == "backward" and tuple(tensor.shape) in self._trained:
            return "gradients"
        return "activations"

    def _follow(self) -> None:
        """Storages are resized without an operator that could be seen."""
        for number, size_bytes in list(self._sizes.items()):
            reference = self._references.get(number)
            storage = reference() if reference is not None else None
            if storage is not None and storage.nbytes() != size_bytes:
                self._ledger.append((number, storage.nbytes() - size_bytes))
                self._sizes[number] = storage.nbytes()
                self._class[number] = "weights"

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address, size_bytes = storage._cdata, storage.nbytes()
        if address in self._living or not size_bytes:
            return
        number = len(self._class)
        self._class[number] = kind
        self._living[address] = number
        self._ledger.append((number, size_bytes))

        def freed(_: object) -> None:
            self._ledger.append((number, -self._sizes.pop(number, size_bytes)))
            del self._living[address], self._references[number]

        self._references[number] = weakref.ref(storage, freed)
        if self._resized:
            self._sizes[number] = size_bytes

    def _is_gradient(self, gradient: Tensor) -> None:
        number = self._living.get(local(gradient).untyped_storage()._cdata)
        if number is not None:
            self._class[number] = "gradients"


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in tree_leaves(found) if isinstance(t, Tensor) and not _wraps(t)]


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: its shard, if it is a DTensor."""
    inside: Any = tensor
    return inside.to_local() if isinstance(inside, DTensor) else tensor


def _wraps(tensor: Any) -> bool:
    """Is it a shell around other tensors, such as a DTensor? Those are counted themselves."""
    return bool(is_traceable_wrapper_subclass(tensor))
