"""The pipeline that every optimizer of this package is a choice of parts for.

    gradient → Basis.down → R → [Conditioner] → Inner (states in a Codec) → N → Emit → weights
       └──────────────────── whole, where the basis is due or Emit needs it ──────┘

One `Recipe` holds the parts for a kind of parameter, one `Plan` the recipes and what concerns the
whole optimizer. `Pipeline` is a torch optimizer: parameter groups with `lr` and `weight_decay`,
states of tensors and whole numbers only.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.bases import Basis, Identity, LowRank
from loopwright.algorithms.optimizers.emits import Back, Emit, Step
from loopwright.algorithms.optimizers.inner import ALL_ROWS, Inner
from loopwright.algorithms.optimizers.layout import Layout, total_over_ranks
from loopwright.algorithms.optimizers.options import OnRefresh, OptimizerError, Options
from loopwright.algorithms.optimizers.state_codecs import CODECS, Codec, Noise, State
from loopwright.algorithms.optimizers.transport import transport
from loopwright.algorithms.optimizers.write_back import WriteBack

CHUNK = 1 << 20  # entries updated at a time where rows are independent: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts that update one kind of parameter."""

    inner: Inner
    basis: Basis = field(default_factory=Identity)
    emit: Emit = field(default_factory=Back)
    codec: Codec = field(default_factory=lambda: CODECS["fp32"])
    basis_codec: Codec = field(default_factory=lambda: CODECS["fp32"])
    on_refresh: OnRefresh = "keep"
    decay_last: bool = False  # decay after the update (GaLore's family), or before (torch)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameter gets which recipe; None freezes it."""

    recipe_of: Callable[[str, torch.Size], Recipe | None]


@dataclass(slots=True, kw_only=True)
class Slot:
    """One parameter in the pipeline."""

    name: str
    parameter: Tensor
    layout: Layout
    recipe: Recipe
    write_back: WriteBack
    index: int  # its place among all parameters: seeds depend on it
    coordinates: Tensor | None = None  # R of the update being prepared

    def noise(self, seed: int, t: int, rows: int, row_start: int) -> Noise:
        """Noise for a tensor of `rows` rows in all, of which those from `row_start` are here."""
        return Noise((seed, self.index, t), rows, row_start)


class Pipeline(torch.optim.Optimizer):
    """An optimizer made of parts. Made by `build`."""

    def __init__(self, slots: Sequence[Slot], options: Options, method: str) -> None:
        """`slots` in the order of the model's parameters."""
        self.slots = list(slots)
        self.options = options
        self.method = method
        self._factor = 1.0  # by which clipping shortens the update being prepared
        self._prepared = False
        decayed = [s.parameter for s in slots if s.parameter.ndim >= 2]
        plain = [s.parameter for s in slots if s.parameter.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        for group in groups:
            group["lr"], group["updates"] = options.lr, 0
            group["method"] = method_id(method)
        super().__init__(groups, {})
        self._group_of = {id(p): g for g in self.param_groups for p in g["params"]}
        for slot in self.slots:
            self._allocate(slot)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Parameters without a gradient, or with one that is all zero, are left as they
        are, moments and decay included.

        Raises `OptimizerError` on a gradient that is not finite, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        for slot in self.slots:
            if slot.coordinates is not None:
                self._update(slot)
                slot.coordinates = None
        for group in self.param_groups:
            group["updates"] += 1
        self._prepared, self._factor = False, 1.0
        return loss

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Shorten the next update's gradients to `max_norm` together; the norm they had.

        Where only projected gradients are used, the norm is theirs. Bases are renewed first.
        """
        self._prepare()
        live = [slot for slot in self.slots if slot.coordinates is not None]
        if not live:
            return 0.0
        squares = [self._clipped(slot).float().square().sum() for slot in live]
        cut = [
            s.layout
            if s.recipe.emit.needs_gradient or s.recipe.basis.sharded(s.layout)
            else Layout.of(s.name, s.layout.local(s.parameter))
            for s in live
        ]
        norm = math.sqrt(float(total_over_ranks(torch.stack(squares), cut).sum()))
        if max_norm > 0:
            self._factor = min(1.0, max_norm / (norm + 1e-6))
        return norm

    def _clipped(self, slot: Slot) -> Tensor:
        """What of a gradient the update uses, and clipping measures."""
        if slot.recipe.emit.needs_gradient or slot.coordinates is None:
            return self._gradient(slot)
        return slot.coordinates

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, projected ones included."""
        super().zero_grad(set_to_none)
        for slot in self.slots:
            slot.coordinates = None
        self._prepared, self._factor = False, 1.0

    def state_bytes(self) -> int:
        """Bytes of all state tensors of this process."""
        return sum(
            slot.layout.local(value).numel() * value.element_size()
            for slot in self.slots
            for value in self.state[slot.parameter].values()
            if isinstance(value, Tensor)
        )

    def state_sizes(self, slot: Slot) -> list[tuple[int, bool]]:
        """(bytes, is it cut by rows as the parameter is?) of each state tensor of one parameter, as
        if it were whole."""
        recipe, layout = slot.recipe, slot.layout
        cut = recipe.basis.sharded(layout)
        return [
            (value.numel() * value.element_size(), layout.batched or (cut and key[:5] != "basis"))
            for key, value in self.state[slot.parameter].items()
            if isinstance(value, Tensor)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state. Raises `OptimizerError` if it is of another method or model."""
        self._refuse_other(state_dict)
        super().load_state_dict(state_dict)
        # torch casts states to the weights' dtype: masters would lose their bits, codes their
        # meaning
        order = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            parameter = order[int(number)]
            device = parameter.device
            self.state[parameter] = {
                key: value.to(device=device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
        self._group_of = {id(p): g for g in self.param_groups for p in g["params"]}

    def _refuse_other(self, saved: dict[str, Any]) -> None:
        groups = saved.get("param_groups", [])
        found = groups[0].get("method") if groups else None
        if found != method_id(self.method):
            raise OptimizerError(
                f"the saved state is of {method_named(found)}, this optimizer is {self.method!r}: "
                "its states mean nothing here. Resume with the optimizer of the checkpoint, or "
                "start a new run from the checkpoint's weights"
            )
        own = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in groups]
        if own != theirs:
            raise OptimizerError(
                f"the saved state has groups of {theirs} parameters, this model {own}: load a "
                "checkpoint of the same model with the same parameters trained"
            )
        order = [p for group in self.param_groups for p in group["params"]]
        names = {id(slot.parameter): slot.name for slot in self.slots}
        for number, values in saved["state"].items():
            parameter = order[int(number)]
            mine = self.state[parameter]
            for key, value in mine.items():
                other = values.get(key)
                if isinstance(value, Tensor) and (
                    not isinstance(other, Tensor)
                    or other.shape != value.shape
                    or other.dtype != value.dtype
                ):
                    got = "nothing" if other is None else f"{tuple(other.shape)} {other.dtype}"
                    raise OptimizerError(
                        f"{names[id(parameter)]}: the saved state has {got} for {key}, expected "
                        f"{tuple(value.shape)} {value.dtype}: rank, side, state and write_back "
                        "must be those of the checkpoint"
                    )

    def _allocate(self, slot: Slot) -> None:
        state: State = {"step": 0}
        recipe, layout = slot.recipe, slot.layout
        recipe.basis.allocate(state, layout, recipe.basis_codec, slot.index)
        recipe.inner.allocate(
            state,
            recipe.basis.shape(layout),
            layout,
            recipe.codec,
            sharded=recipe.basis.sharded(layout),
        )
        recipe.emit.allocate(state, layout, recipe.codec)
        slot.write_back.allocate(state, layout)
        self.state[slot.parameter] = state

    def _gradient(self, slot: Slot) -> Tensor:
        assert slot.parameter.grad is not None
        return slot.layout.local(slot.parameter.grad)

    def _prepare(self) -> None:
        """Check gradients, renew bases that are due, project."""
        if self._prepared:
            return
        live = [slot for slot in self.slots if slot.parameter.grad is not None]
        squares = self._squares(live)
        for slot, square in zip(live, squares, strict=True):
            if square > 0:
                self._project(slot)
        self._prepared = True

    def _squares(self, live: Sequence[Slot]) -> list[float]:
        """Squared norm of each gradient over all ranks. Raises on those that are not finite."""
        if not live:
            return []
        norms = torch._foreach_norm([self._gradient(slot) for slot in live])
        squares = torch.stack([norm.float() for norm in norms]).double().square()
        found = total_over_ranks(squares, [slot.layout for slot in live]).tolist()
        bad = [slot.name for slot, s in zip(live, found, strict=True) if not math.isfinite(s)]
        if bad:
            raise OptimizerError(
                f"the gradient of {len(bad)} parameters is not finite ({', '.join(bad[:5])}); "
                "nothing was changed: skip this minibatch, and look for a loss, reward or logprob "
                "that is not finite"
            )
        return found

    def _project(self, slot: Slot) -> None:
        state, recipe, layout = self.state[slot.parameter], slot.recipe, slot.layout
        gradient, t = self._gradient(slot), int(state["step"])
        if recipe.basis.due(state, t):
            change = recipe.basis.refresh(state, gradient, layout, recipe.basis_codec, t)
            if recipe.on_refresh == "reset":
                self._forget(slot)
            elif recipe.on_refresh == "transport" and change is not None:
                self._transport(slot, change, t)
        slot.coordinates = (
            gradient
            if isinstance(recipe.basis, Identity)
            else recipe.basis.down(state, gradient, layout, recipe.basis_codec)
        )

    def _transport(self, slot: Slot, change: Tensor, t: int) -> None:
        state, recipe, layout = self.state[slot.parameter], slot.recipe, slot.layout
        shape = recipe.basis.shape(layout)
        right = not isinstance(recipe.basis, LowRank) or recipe.basis.side_of(layout) == "right"
        local = torch.empty(shape, device="meta")
        noise = self._noise(slot, local, t, ALL_ROWS, recipe.basis.sharded(layout))
        transport(state, recipe.inner, recipe.codec, change, right=right, t=t, noise=noise)

    def _forget(self, slot: Slot) -> None:
        """Zero the moments."""
        state, recipe, layout = self.state[slot.parameter], slot.recipe, slot.layout
        recipe.inner.allocate(
            state,
            recipe.basis.shape(layout),
            layout,
            recipe.codec,
            sharded=recipe.basis.sharded(layout),
        )

    def _update(self, slot: Slot) -> None:
        assert slot.coordinates is not None
        state, layout = self.state[slot.parameter], slot.layout
        weights = layout.local(slot.parameter.detach())
        if isinstance(slot.recipe.basis, Identity) and weights.ndim >= 2:
            per_row = max(weights[:1].numel(), 1)
            size = max(CHUNK // per_row, 1)
            pieces = [slice(i, i + size) for i in range(0, weights.shape[0], size)]
        else:
            pieces = [ALL_ROWS]
        for rows in pieces:
            self._update_rows(slot, state, weights, rows)
        state["step"] = int(state["step"]) + 1

    def _update_rows(self, slot: Slot, state: State, weights: Tensor, rows: slice) -> None:
        recipe, layout, t = slot.recipe, slot.layout, int(state["step"])
        group = self._group_of[id(slot.parameter)]
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        assert slot.coordinates is not None
        coordinates = slot.coordinates if rows == ALL_ROWS else slot.coordinates[rows]
        coordinates = coordinates.float()
        if self._factor < 1:
            coordinates = coordinates * self._factor
        noise = self._noise(slot, coordinates, t, rows, recipe.basis.sharded(layout))
        direction, size = recipe.inner.direction(state, coordinates, t, recipe.codec, rows, noise)
        opened = slot.write_back.open(state, weights, rows)
        if decay and not recipe.decay_last:
            opened.mul_(1 - lr * decay)
        gradient = None
        if recipe.emit.needs_gradient:
            gradient = self._gradient(slot).float()
            gradient = gradient * self._factor if self._factor < 1 else gradient
        recipe.emit.apply(
            Step(
                state=state,
                layout=layout,
                codec=recipe.basis_codec,
                basis=recipe.basis,
                weights=opened,
                gradient=gradient,
                coordinates=coordinates,
                direction=direction,
                factor=-lr * size,
            )
        )
        if decay and recipe.decay_last:
            opened.mul_(1 - lr * decay)
        noise = self._noise(slot, weights, t, rows, True)
        slot.write_back.close(state, weights, opened, rows, noise)

    def _noise(self, slot: Slot, local: Tensor, t: int, rows: slice, cut: bool) -> Noise:
        """Noise for a tensor whose rows are the parameter's (`cut`), or all here."""
        per_row = local[:1].numel() // max(local.shape[-1], 1) if local.ndim > 1 else 1
        if not cut or local.ndim < 2:
            count = local.numel() // max(local.shape[-1], 1) if local.ndim else 1
            return slot.noise(self.options.seed, t, count, 0)
        start = slot.layout.row_start + (rows.start or 0)
        return slot.noise(self.options.seed, t, slot.layout.shape[0] * per_row, start * per_row)


def method_id(name: str) -> int:
    """The whole number that stands for a method in saved states."""
    return zlib.crc32(name.encode())


_NAMES: dict[int, str] = {}


def method_named(number: object) -> str:
    """The method that a saved number stands for."""
    known = _NAMES.get(number) if isinstance(number, int) else None
    return repr(known) if known else "an optimizer that is none of this package"


def register_names(names: Iterable[str]) -> None:
    """Let error texts name the methods."""
    _NAMES.update({method_id(name): name for name in names})
