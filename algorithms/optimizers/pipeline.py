"""The pipeline that every optimizer of this package is a choice of parts for.

    gradient → Basis.down → R → [Conditioner] → Inner (states in a Codec) → N → Emit → weights
       └──────────────────── whole, where the basis is due or Emit needs it ──────┘

`Pipeline` is a torch optimizer: parameter groups with `lr` and `weight_decay`, states of tensors
and whole numbers only, allocated when it is built.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loopwright.algorithms.optimizers.bases import LowRank
from loopwright.algorithms.optimizers.layer_sampling import scores_in_order
from loopwright.algorithms.optimizers.layout import Layout, total_over_ranks
from loopwright.algorithms.optimizers.options import OptimizerError, Options
from loopwright.algorithms.optimizers.parts import Plan, Slot
from loopwright.algorithms.optimizers.restarts import pairs_of, rebalanced
from loopwright.algorithms.optimizers.saved_state import (
    method_id,
    refuse_other_format,
    refuse_other_groups,
)
from loopwright.algorithms.optimizers.sparse_bases import Mask
from loopwright.algorithms.optimizers.state_codecs import Noise, State
from loopwright.algorithms.optimizers.transport import transport
from loopwright.algorithms.optimizers.update import Update, noise_for, update

SCORE_UNIT = 10**9  # of a layer's score of 1


class Pipeline(torch.optim.Optimizer):
    """An optimizer made of parts. Made by `build`."""

    def __init__(self, slots: Sequence[Slot], plan: Plan, options: Options, method: str) -> None:
        """`slots` in the order of the model's parameters."""
        self.slots = list(slots)
        self.plan = plan
        self.options = options
        self.method = method
        self._factor = 1.0  # by which clipping shortens the update being prepared
        self._prepared = False
        groups = _groups(slots, options, method)
        super().__init__(groups, {})
        self._group_of = {id(p): g for g in self.param_groups for p in g["params"]}
        self._pairs = pairs_of(self.slots) if plan.restarts else []
        self.layers = list(dict.fromkeys(s.layer for s in self.slots if s.layer is not None))
        self._active: frozenset[str] = frozenset()
        if plan.sampler is not None:
            self._keep_scores(torch.ones(len(self.layers)))
        self._choose_layers()

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return int(self.param_groups[0]["updates"])

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
        for group in self.param_groups:
            group["updates"] += 1
        self._forget_gradients()
        if self._pairs and self.updates % self.plan.reset_every == 0:
            self._rebalance()
        if self.plan.sampler is not None and self.updates % self.plan.sampler.every == 0:
            self._choose_layers()
        return loss

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Shorten the next update's gradients to `max_norm` together; the norm they had.

        Where only projected gradients are used, the norm is theirs. Bases are renewed first. Raises
        `OptimizerError` on a gradient that is not finite.
        """
        self._prepare()
        live = [slot for slot in self.slots if slot.coordinates is not None]
        if not live:
            return 0.0
        squares, layouts = [], []
        for slot in live:
            keeps = slot.recipe.keeps_gradient
            measured = self._gradient(slot) if keeps else slot.coordinates
            cut = keeps or slot.recipe.basis.sharded(slot.layout)
            assert measured is not None
            squares.append(measured.float().square().sum())
            layouts.append(slot.layout if cut else Layout.of(slot.name, torch.empty(())))
        norm = math.sqrt(float(total_over_ranks(torch.stack(squares), layouts).sum()))
        if max_norm > 0:
            self._factor = min(1.0, max_norm / (norm + 1e-6))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, projected ones included."""
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def set_layer_scores(self, scores: Mapping[str, float]) -> None:
        """Weights by which layers are drawn from now on (`outlier_scores`), by layer name."""
        if self.plan.sampler is None or self.plan.sampler.kind != "outliers":
            raise OptimizerError(f"optimizer {self.method!r} does not draw layers by scores")
        self._keep_scores(scores_in_order(self.layers, scores))
        if self.updates == 0:
            self._choose_layers()

    def is_trained(self, slot: Slot) -> bool:
        """Is this parameter's layer among those trained at present?"""
        return self.plan.sampler is None or slot.layer is None or slot.layer in self._active

    def seek(self, updates: int) -> None:
        """Allocate the states that there are after so many updates, so that a distributed
        checkpoint finds them to load into."""
        for group in self.param_groups:
            group["updates"] = updates
        self._choose_layers()

    def state_bytes(self) -> int:
        """Bytes of all state tensors of this process."""
        return sum(
            slot.layout.local(value).numel() * value.element_size()
            for slot in self.slots
            if slot.parameter in self.state
            for value in self.state[slot.parameter].values()
            if isinstance(value, Tensor)
        )

    def state_sizes(self, slot: Slot) -> list[tuple[int, bool]]:
        """(bytes, is it cut by rows as the parameter is?) of each state tensor of one parameter, as
        if it were whole."""
        if slot.parameter not in self.state:
            return []
        cut = slot.recipe.basis.sharded(slot.layout)
        whole = ("basis", "last_norm")
        own = ("master", "compensation", "error", "mask", "gain")
        return [
            (
                value.numel() * value.element_size(),
                slot.layout.batched or key.startswith(own) or (cut and not key.startswith(whole)),
            )
            for key, value in self.state[slot.parameter].items()
            if isinstance(value, Tensor)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state. Raises `OptimizerError` if it is of another method, model or
        format."""
        refuse_other_groups(self.method, self.param_groups, state_dict.get("param_groups", []))
        # saved states go by number, or by name (torch's distributed checkpoint): by place, then
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [
            (p, state_dict["state"][n])
            for n, p in zip(numbers, own, strict=True)
            if n in state_dict["state"]
        ]
        names = {id(slot.parameter): slot.name for slot in self.slots}
        for parameter, values in saved:
            if parameter in self.state:
                refuse_other_format(names[id(parameter)], self.state[parameter], values)
        super().load_state_dict(state_dict)
        # torch casts states to the weights' dtype: masters would lose bits, codes their meaning
        for parameter, values in saved:
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
        self._group_of = {id(p): g for g in self.param_groups for p in g["params"]}
        self._active = self._drawn()
        self._cut_whole_states()
        self._forget_gradients()

    def _cut_whole_states(self) -> None:
        """States saved whole, of layers that were not trained when a checkpoint was read: each rank
        keeps its rows."""
        for slot in self.slots:
            loaded = self.state.get(slot.parameter)
            if slot.layout.group is None or not loaded:
                continue
            if any(isinstance(value, DTensor) for value in loaded.values()):
                continue
            self._allocate(slot)
            for key, wanted in self.state[slot.parameter].items():
                if isinstance(wanted, DTensor):
                    first = slot.layout.row_start
                    loaded[key] = slot.layout.sharded(loaded[key][first : first + slot.layout.rows])
            self.state[slot.parameter] = loaded

    def _gradient(self, slot: Slot) -> Tensor:
        assert slot.parameter.grad is not None
        return slot.layout.local(slot.parameter.grad)

    def _forget_gradients(self) -> None:
        for slot in self.slots:
            slot.coordinates = slot.collected = None
        self._prepared, self._factor = False, 1.0

    def _prepare(self) -> None:
        """Check gradients, renew bases that are due, project."""
        if self._prepared:
            return
        live = [
            slot
            for slot in self.slots
            if self.is_trained(slot)
            and (slot.parameter.grad is not None or slot.collected is not None)
        ]
        for slot, square in zip(live, self._squares(live), strict=True):
            if square > 0:
                self._project(slot)
        self._prepared = True

    def _squares(self, live: Sequence[Slot]) -> list[float]:
        """Squared norm of each gradient over all ranks. Raises on those that are not finite."""
        if not live:
            return []
        seen = [self._gradient(s) if s.collected is None else s.collected for s in live]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(seen)])
        squares = norms.double().square()
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
        if slot.collected is not None:
            slot.coordinates = slot.collected
            return
        gradient, t = self._gradient(slot), int(state["step"])
        if recipe.whole or recipe.late:
            slot.coordinates = gradient
            return
        self.renew(slot, state, gradient, t)
        slot.coordinates = recipe.basis.down(state, gradient, layout, recipe.basis_codec)

    def renew(self, slot: Slot, state: State, gradient: Tensor, t: int) -> None:
        """Take a new basis if one is due, and bring the moments into it."""
        recipe, layout = slot.recipe, slot.layout
        if not recipe.basis.due(state, t):
            return
        change = recipe.basis.refresh(state, gradient, layout, recipe.basis_codec, t)
        if recipe.conditioner is not None or recipe.on_refresh == "reset":
            self._allocate_moments(slot, state, all_of_them=recipe.on_refresh == "reset")
        if recipe.on_refresh == "transport" and change is not None:
            shape = recipe.basis.shape(layout)
            noise: Noise = noise_for(
                slot, shape, t, 0, self.options.seed, cut=recipe.basis.sharded(layout)
            )
            right = isinstance(recipe.basis, LowRank) and recipe.basis.side_of(layout) == "right"
            transport(state, recipe.inner, recipe.codec, change, right=right, t=t, noise=noise)

    def _allocate(self, slot: Slot) -> None:
        state: State = {"step": 0, "age": 1, "resets": 0}
        recipe, layout = slot.recipe, slot.layout
        recipe.basis.allocate(state, layout, recipe.basis_codec, slot.index)
        self._allocate_moments(slot, state, all_of_them=True)
        recipe.emit.allocate(state, layout)
        slot.write_back.allocate(state, layout)
        self.state[slot.parameter] = state

    def _allocate_moments(self, slot: Slot, state: State, *, all_of_them: bool) -> None:
        """Moments of zero; or only what the conditioner remembers."""
        recipe, layout = slot.recipe, slot.layout
        shape, cut = recipe.basis.shape(layout), recipe.basis.sharded(layout)
        if all_of_them:
            recipe.inner.allocate(state, shape, layout, recipe.codec, sharded=cut)
        if recipe.conditioner is not None:
            recipe.conditioner.allocate(state, shape, layout, recipe.codec, sharded=cut)

    def _reset(self, slot: Slot) -> None:
        state = self.state[slot.parameter]
        self._allocate_moments(slot, state, all_of_them=True)
        state["age"], state["resets"] = 0, int(state["resets"]) + 1
        if isinstance(slot.recipe.basis, Mask):
            slot.recipe.basis.redraw(state, slot.layout)

    def _update(self, slot: Slot) -> None:
        group, state = self._group_of[id(slot.parameter)], self.state[slot.parameter]
        lr, plan = float(group["lr"]), self.plan
        age = int(state["age"])
        if plan.warmup and int(state["resets"]) and age < plan.warmup:
            lr *= 1 - 0.99 * (1 + math.cos(math.pi * age / (plan.warmup + 1))) / 2
        context = Update(
            slot=slot,
            state=state,
            lr=lr,
            decay=float(group["lr"]) * float(group["weight_decay"]),
            factor=self._factor,
            seed=self.options.seed,
            renew=self.renew,
        )
        update(context)
        state["step"], state["age"] = int(state["step"]) + 1, age + 1
        if plan.reset_every and not plan.restarts and (state["step"] + 1) % plan.reset_every == 0:
            self._reset(slot)

    def _rebalance(self) -> None:
        for a, b in self._pairs:
            whole = [s.layout.gather(s.layout.local(s.parameter.detach())) for s in (a, b)]
            for slot, new in zip((a, b), rebalanced(*whole), strict=True):
                state = self.state[slot.parameter]
                slot.layout.local(slot.parameter.detach()).copy_(slot.layout.own_rows(new))
                slot.write_back.allocate(state, slot.layout)
                self._reset(slot)
                state["step"] = 0

    def _keep_scores(self, scores: Tensor) -> None:
        """As whole numbers in the first group, so that they are saved like any counter."""
        for k, score in enumerate(scores.tolist()):
            self.param_groups[0][f"layer_score_{k}"] = round(score * SCORE_UNIT)

    def _drawn(self) -> frozenset[str]:
        if self.plan.sampler is None:
            return frozenset()
        group = self.param_groups[0]
        scores = torch.tensor([group[f"layer_score_{k}"] for k in range(len(self.layers))])
        return self.plan.sampler.chosen(self.layers, scores, self.updates)

    def _choose_layers(self) -> None:
        """Draw layers, evict the states of the others, allocate those of new ones."""
        self._active = self._drawn()
        for slot in self.slots:
            if not self.is_trained(slot):
                self.state.pop(slot.parameter, None)
            elif slot.parameter not in self.state:
                self._allocate(slot)


def _groups(slots: Sequence[Slot], options: Options, method: str) -> list[dict[str, Any]]:
    """Parameters that decay, and those with fewer than two dimensions, which do not."""
    groups: list[dict[str, Any]] = [
        {
            "params": [s.parameter for s in slots if s.parameter.ndim >= 2],
            "weight_decay": options.weight_decay,
        },
        {"params": [s.parameter for s in slots if s.parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["lr"], group["updates"] = options.lr, 0
        group["method"] = method_id(method)
    return groups
