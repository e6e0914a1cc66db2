"""Training by forward passes alone: MeZO and Sparse MeZO. There is no gradient and no state but a
seed.

The direction z is drawn again from its seed whenever it is needed, and added to the weights in
place: +ε z, loss, −2ε z, loss, +ε z, and with ĝ = (L₊ − L₋)/2ε the update W −= lr·(ĝ·z + decay·W).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import OptimizerError, Options
from loopwright.algorithms.optimizers.saved_state import method_id, refuse_other_groups
from loopwright.algorithms.optimizers.state_codecs import Noise, generator, round_stochastically


class ZerothOrder(torch.optim.Optimizer):
    """MeZO (Malladi et al. 2023, Algorithm 1) and, with `sparse`, Sparse MeZO (Liu et al. 2024):
    only the `density` smallest weights of each matrix move, chosen at the start of each update.

    `step(closure)` calls `closure` twice, without gradients; it returns the loss, or minus the
    return of a batch of episodes (evolution strategies). Made by `build`.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], options: Options, method: str, *, sparse: bool
    ) -> None:
        """`named` in the order in which z is drawn."""
        for name, parameter in named:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise OptimizerError(f"{name}: {parameter.dtype}, expected a floating point type")
        self.options, self.method, self.sparse = options, method, sparse
        self.names = [name for name, _ in named]
        decayed = [p for _, p in named if p.ndim >= 2]
        plain = [p for _, p in named if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        for group in groups:
            group["lr"], group["updates"] = options.lr, 0
            group["method"] = method_id(method)
        super().__init__(groups, {})
        self._order = [(p, Layout.of(name, p)) for name, p in named]
        self.projected_gradient = 0.0  # ĝ of the last update

    @property
    def updates(self) -> int:
        """Updates made so far: with the options' seed, all there is to resume from."""
        return int(self.param_groups[0]["updates"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from two calls of `closure`; the mean of the two losses.

        Raises `OptimizerError` without a closure, and on a loss that is not finite, the weights
        being as they were.
        """
        if closure is None:
            raise OptimizerError(
                f"optimizer {self.method!r} trains by forward passes: call step(closure) with a "
                "function that returns the loss"
            )
        seed = self.step_seed(self.updates)
        masks = self._masks()
        epsilon = self.options.eps
        self._move(seed, masks, epsilon)
        higher = float(closure())
        self._move(seed, masks, -2 * epsilon)
        lower = float(closure())
        self._move(seed, masks, epsilon)
        if not (math.isfinite(higher) and math.isfinite(lower)):
            raise OptimizerError(
                f"losses {higher} and {lower} at two perturbed weights, expected finite numbers; "
                "the weights are unchanged: lower eps, or look for a loss that is not finite"
            )
        self.projected_gradient = (higher - lower) / (2 * epsilon)
        self._descend(seed, masks, self.projected_gradient)
        for group in self.param_groups:
            group["updates"] += 1
        return (higher + lower) / 2

    def step_seed(self, updates: int) -> int:
        """Seed of z in the update after `updates` others."""
        source = generator(self.options.seed, updates)
        return int(torch.randint(0, 1_000_000_000, (1,), generator=source))

    def state_bytes(self) -> int:
        """None: the state is a seed and a count."""
        return 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved count and rates. Raises `OptimizerError` if they are of another method."""
        refuse_other_groups(self.method, self.param_groups, state_dict.get("param_groups", []))
        super().load_state_dict(state_dict)

    def _masks(self) -> list[Tensor | None]:
        """For each parameter its small weights, eight of them a byte; None: all of them."""
        return [
            _packed(_small(layout.local(p.detach()), layout, self.options.density))
            if self.sparse and p.ndim >= 2
            else None
            for p, layout in self._order
        ]

    def _directions(self, seed: int, masks: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Each parameter's local z, in order, one at a time."""
        source = torch.Generator().manual_seed(seed)
        for (_, layout), mask in zip(self._order, masks, strict=True):
            z = torch.randn(layout.shape, generator=source)
            if layout.shape:
                z = z[layout.row_start : layout.row_start + layout.rows]
            z = z.to(layout.device)
            yield z if mask is None else z * _unpacked(mask, z.shape)

    def _move(self, seed: int, masks: Sequence[Tensor | None], factor: float) -> None:
        for (p, layout), z in zip(self._order, self._directions(seed, masks), strict=True):
            local = layout.local(p.detach())
            local.add_(z.to(local.dtype), alpha=factor)

    def _descend(self, seed: int, masks: Sequence[Tensor | None], slope: float) -> None:
        settings = {id(p): group for group in self.param_groups for p in group["params"]}
        for (p, layout), z in zip(self._order, self._directions(seed, masks), strict=True):
            group, local = settings[id(p)], layout.local(p.detach())
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            change = z.mul_(slope).add_(local.float(), alpha=decay)
            if local.dtype == torch.bfloat16 and local.ndim:  # which would lose nearly all of it
                per_row = math.prod(local.shape[1:-1])
                noise = Noise(
                    (seed, self.updates), layout.shape[0] * per_row, layout.row_start * per_row
                )
                moved = local.float().sub_(change, alpha=lr)
                bits = noise.bits(local.shape, 1, local.device)
                local.copy_(round_stochastically(moved, bits))
            else:
                local.add_(change.to(local.dtype), alpha=-lr)


def _small(local: Tensor, layout: Layout, density: float) -> Tensor:
    """Which entries are among the `density` smallest of their matrix, by magnitude."""
    sizes = local.float().abs()
    whole = layout.gather(sizes).flatten(-2)
    count = max(int(density * whole.shape[-1]), 1)
    limit = whole.kthvalue(count, dim=-1).values
    return sizes <= limit.unsqueeze(-1).unsqueeze(-1)


def _packed(mask: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) & powers).ne(0).flatten()[: shape.numel()].view(shape)
