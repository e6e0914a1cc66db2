"""Low-rank restarts: LoRA factors brought to equal size, now and then (weight refactorization).

B·A stays what it is; B = U·√S and A = √S·Vᵀ from its SVD, so that a fresh Adam takes equal steps in
both.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from loopwright.algorithms.optimizers.options import OptimizerError
from loopwright.algorithms.optimizers.parts import Slot

_FACTOR = re.compile(r"^(.*)lora_([AB])(\..*)?$")


def pairs_of(slots: Sequence[Slot]) -> list[tuple[Slot, Slot]]:
    """(A, B) of every adapter. Raises `OptimizerError` if there is none, or half of one."""
    found: dict[str, dict[str, Slot]] = {}
    for slot in slots:
        match = _FACTOR.match(slot.name)
        if match and slot.parameter.ndim == 2:
            found.setdefault(f"{match[1]}*{match[3] or ''}", {})[match[2]] = slot
    if not found:
        raise OptimizerError(
            "low_rank_restarts rebalances LoRA factors, and no parameter is named lora_A or "
            "lora_B: train adapters (model.lora_rank > 0), or use 'adamw'"
        )
    for name, both in found.items():
        if len(both) != 2:
            raise OptimizerError(f"{name}: there is lora_{next(iter(both))} alone, not its partner")
    return [(both["A"], both["B"]) for both in found.values()]


def rebalanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """√S·Vᵀ [r, n] and U·√S [m, r] with the product b·a, from A [r, n] and B [m, r].

    By QR of the tall factors and an SVD of r×r, in float64: the product is never formed.
    """
    left, right_factor = torch.linalg.qr(b.double())
    right, left_factor = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(right_factor @ left_factor.mT)
    root = s.sqrt()
    new_a = root.unsqueeze(1) * (vh @ right.mT)
    new_b = (left @ u) * root
    return new_a.to(a.dtype), new_b.to(b.dtype)
