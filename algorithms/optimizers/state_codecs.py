"""How optimizer states are stored: fp32, bf16 with stochastic rounding, block-wise 8 and 4 bit.

Blocks lie along the last dimension and never cross a row, so cutting a tensor by rows (FSDP2,
chunked updates) changes no number. All of this is deterministic: noise comes from a seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import StateFormat

State = dict[str, Tensor | int]
BLOCK_8, BLOCK_4 = 256, 128  # entries that share a scale (bitsandbytes' optimizers; Li et al. 2023)


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by several numbers, all of which matter."""
    mixed = 0x9E3779B97F4A7C15
    for part in key:
        mixed = (mixed ^ (part & (2**64 - 1))) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        mixed ^= mixed >> 31
    return torch.Generator(device=device).manual_seed(mixed & (2**63 - 1))


@dataclass(frozen=True, slots=True)
class Noise:
    """Random bits for stochastic rounding that depend on (key, row, column), not on which rows are
    here."""

    key: tuple[int, ...]  # seed, parameter, update
    rows: int  # of the whole tensor, all leading dimensions together
    row_start: int

    def bits(self, shape: torch.Size, salt: int, device: torch.device) -> Tensor:
        """Uniform integers in [0, 2^16), int32, for the local rows: `shape`."""
        if len(shape) == 1:  # every entry a row, as a cut vector has it
            return self.bits(torch.Size((shape[0], 1)), salt, device).view(shape)
        source = generator(*self.key, salt)
        row = torch.randint(0, 1 << 31, (self.rows,), generator=source, dtype=torch.int64)
        column = torch.randint(0, 1 << 30, (shape[-1],), generator=source, dtype=torch.int64)
        count = shape.numel() // max(shape[-1], 1)
        own = row[self.row_start : self.row_start + count] | 1
        own, odd = own.to(torch.int32).to(device), (column * 2 + 1).to(torch.int32).to(device)
        product = own.unsqueeze(1) * odd.unsqueeze(0)
        return product.bitwise_right_shift_(15).bitwise_and_(0xFFFF).view(shape)


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16, up or down at random so that the mean is exact: `bits` are uniform in
    [0, 2^16)."""
    whole = value.contiguous().view(torch.int32) + bits
    rounded = whole.bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


@lru_cache
def dynamic_map(signed: bool, bits: int = 8) -> Tensor:
    """The 2^bits values of the dynamic data type, ascending in [-1, 1] (Dettmers et al. 2022,
    section 2.2).

    Decade i of `bits` − 1 has 2^i values (twice as many unsigned): the middles of equal parts of
    [0.1, 1]·10^(i+2−bits); with 0 and 1 that makes 2^bits.
    """
    values = [0.0, 1.0]
    for decade in range(bits - 1):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 2 - bits)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def linear_map(bits: int = 4) -> Tensor:
    """(k + 1)/2^bits: no zero, because a second moment that becomes 0 makes a huge update (Li et
    al. 2023, 4-bit optimizers, section 4)."""
    return torch.arange(1, 2**bits + 1, dtype=torch.float32) / 2**bits


class Codec(Protocol):
    """Keeps a named fp32 tensor of a state in some format."""

    def allocate(
        self, state: State, name: str, shape: tuple[int, ...], layout: Layout, *, sharded: bool
    ) -> None:
        """Put a tensor of zeros of local `shape` into `state`; `sharded`: its rows are cut as the
        parameter's."""

    def read(self, state: Mapping[str, Tensor | int], name: str, rows: slice) -> Tensor:
        """Its `rows` as fp32: changed in place and given to `write`."""

    def write(self, state: State, name: str, value: Tensor, rows: slice, noise: Noise) -> None:
        """Keep `value` for its `rows`."""


def _put(state: State, name: str, local: Tensor, layout: Layout, sharded: bool) -> None:
    state[name] = layout.sharded(local) if sharded else local


def part(tensor: Tensor, rows: slice) -> Tensor:
    """The `rows` of a tensor, a view; of a scalar, itself."""
    return tensor[rows] if tensor.ndim else tensor


def stored(state: Mapping[str, Tensor | int], name: str) -> Tensor:
    """The local part of a state tensor."""
    value = state[name]
    assert isinstance(value, Tensor), f"{name} is no tensor"
    return value.to_local() if isinstance(value, DTensor) else value


class Fp32:
    """As it is."""

    def allocate(
        self, state: State, name: str, shape: tuple[int, ...], layout: Layout, *, sharded: bool
    ) -> None:
        _put(state, name, torch.zeros(shape, device=layout.device), layout, sharded)

    def read(self, state: Mapping[str, Tensor | int], name: str, rows: slice) -> Tensor:
        return part(stored(state, name), rows)

    def write(self, state: State, name: str, value: Tensor, rows: slice, noise: Noise) -> None:
        target = part(stored(state, name), rows)
        if target.data_ptr() != value.data_ptr():
            target.copy_(value)


class Bf16:
    """bfloat16 with stochastic rounding: without it a slow second moment never grows."""

    def allocate(
        self, state: State, name: str, shape: tuple[int, ...], layout: Layout, *, sharded: bool
    ) -> None:
        zeros = torch.zeros(shape, device=layout.device, dtype=torch.bfloat16)
        _put(state, name, zeros, layout, sharded)

    def read(self, state: Mapping[str, Tensor | int], name: str, rows: slice) -> Tensor:
        return stored(state, name)[rows].float()

    def write(self, state: State, name: str, value: Tensor, rows: slice, noise: Noise) -> None:
        salt = sum(map(ord, name))
        target = stored(state, name)[rows]
        target.copy_(round_stochastically(value, noise.bits(value.shape, salt, value.device)))


@dataclass(frozen=True, slots=True)
class Blockwise:
    """`bits`-bit codes and one fp32 scale (the largest magnitude) a block. Names ending in `_sq`
    hold no negative numbers and get an unsigned map."""

    bits: int  # 8, or 4: two codes a byte
    block: int

    def allocate(
        self, state: State, name: str, shape: tuple[int, ...], layout: Layout, *, sharded: bool
    ) -> None:
        width = shape[-1]
        codes = width if self.bits == 8 else -(-width // 2)
        zero = int(torch.searchsorted(self._map(name), torch.tensor(0.0)))
        fill = zero if self.bits == 8 else zero * 17
        made = torch.full((*shape[:-1], codes), fill, device=layout.device, dtype=torch.uint8)
        scales = torch.zeros((*shape[:-1], -(-width // self.block)), device=layout.device)
        _put(state, f"{name}.codes", made, layout, sharded)
        _put(state, f"{name}.scales", scales, layout, sharded)
        state[f"{name}.width"] = width

    def read(self, state: Mapping[str, Tensor | int], name: str, rows: slice) -> Tensor:
        codes = stored(state, f"{name}.codes")[rows]
        scales = stored(state, f"{name}.scales")[rows]
        width = int(state[f"{name}.width"])
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :width]
        table = self._map(name).to(codes.device)
        values = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return values.mul_(_spread(scales, self.block, width))

    def write(self, state: State, name: str, value: Tensor, rows: slice, noise: Noise) -> None:
        width = value.shape[-1]
        padded = torch.nn.functional.pad(value, (0, -width % self.block))
        blocks = padded.view(*value.shape[:-1], -1, self.block)
        scales = torch.linalg.vector_norm(blocks, float("inf"), dim=-1)
        unit = value / _spread(scales.clamp(min=1e-38), self.block, width)
        codes = nearest_code(unit, self._map(name).to(value.device))
        if self.bits == 4:
            if width % 2:
                codes = torch.nn.functional.pad(codes, (0, 1))
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        stored(state, f"{name}.codes")[rows].copy_(codes)
        stored(state, f"{name}.scales")[rows].copy_(scales)

    def _map(self, name: str) -> Tensor:
        second = name.endswith("_sq")
        if self.bits == 4 and second:
            return linear_map(4)
        return dynamic_map(not second, self.bits)


def _spread(scales: Tensor, block: int, width: int) -> Tensor:
    return scales.repeat_interleave(block, dim=-1)[..., :width] if block < width else scales


def nearest_code(unit: Tensor, table: Tensor) -> Tensor:
    """Index (uint8) of the entry of the ascending `table` nearest to each number in [-1, 1].

    A table over the upper 16 bits of a float gives a code that is right or one too low, because no
    two middles between neighbouring entries share these bits; one comparison makes it exact. Four
    times faster than a binary search.
    """
    low, middles = _prefix_table(table)
    prefix = unit.contiguous().view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    guess = low.index_select(0, prefix.view(-1))
    bound = middles.index_select(0, guess)
    return (guess + (unit.reshape(-1) > bound)).to(torch.uint8).view(unit.shape)


_PREFIXES: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}


def _prefix_table(table: Tensor) -> tuple[Tensor, Tensor]:
    key = (len(table), float(table[0]), table.device)
    if key not in _PREFIXES:
        ascending = table.cpu()
        middles = (ascending[:-1] + ascending[1:]) / 2
        prefix = torch.arange(1 << 16, dtype=torch.int32) << 16
        # the smallest number with these upper bits: largest magnitude where negative
        least = torch.where(prefix < 0, prefix | 0xFFFF, prefix).view(torch.float32)
        low = torch.searchsorted(middles, torch.nan_to_num(least, nan=0.0)).to(torch.int32)
        bounds = torch.cat([middles, torch.tensor([float("inf")])])
        _PREFIXES[key] = (low.to(table.device), bounds.to(table.device))
    return _PREFIXES[key]


CODECS: dict[StateFormat, Codec] = {
    "fp32": Fp32(),
    "bf16": Bf16(),
    "int8": Blockwise(8, BLOCK_8),
    "int4": Blockwise(4, BLOCK_4),
}
