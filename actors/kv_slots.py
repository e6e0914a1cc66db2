"""Where the torch engine keeps keys and values: one slot per running sequence, and prefixes kept
for later.

Layout: `[layers, slots * kv_heads, max_context, head_dim]`, so that the first A slots are one
regular batch for a batched matrix product and nothing is gathered in the decode path. Memory is
committed by the operating system as it is touched, not when it is reserved.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one token's keys and values look like."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVSlots:
    """Keys and values of the running sequences."""

    def __init__(self, shape: KVShape, slots: int, max_context: int) -> None:
        """Reserve `slots` sequences of `max_context` tokens."""
        self.shape = shape
        self.slots = slots
        self.max_context = max_context
        full = (shape.layers, slots * shape.kv_heads, max_context, shape.head_dim)
        self.keys = _lazy_zeros(full, shape.dtype, shape.device)
        self.values = _lazy_zeros(full, shape.dtype, shape.device)
        # One row per (slot, head, position): what a step writes to, per layer.
        rows = (shape.layers, slots * shape.kv_heads * max_context, shape.head_dim)
        self.key_rows = self.keys.view(rows)
        self.value_rows = self.values.view(rows)

    def rows_of(self, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Indices `[N * kv_heads]` int64 into `key_rows[layer]` for N tokens, head fastest."""
        heads = np.arange(self.shape.kv_heads)
        rows = (slots[:, None] * self.shape.kv_heads + heads) * self.max_context + positions[
            :, None
        ]
        return torch.from_numpy(rows.reshape(-1)).to(self.shape.device)

    def save(self, slot: int, length: int) -> torch.Tensor:
        """A copy `[2, layers, kv_heads, length, head_dim]` of a slot's first `length` tokens."""
        heads = self._heads(slot)
        return torch.stack((self.keys[:, heads, :length], self.values[:, heads, :length]))

    def restore(self, slot: int, saved: torch.Tensor, length: int) -> None:
        """Put the first `length` tokens of what `save` returned into a slot."""
        heads = self._heads(slot)
        self.keys[:, heads, :length] = saved[0, :, :, :length]
        self.values[:, heads, :length] = saved[1, :, :, :length]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens from one slot to another."""
        here, there = self._heads(source), self._heads(target)
        self.keys[:, there, :length] = self.keys[:, here, :length]
        self.values[:, there, :length] = self.values[:, here, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot: a NaN left behind would reach the next sequence through 0 * NaN."""
        heads = self._heads(slot)
        self.keys[:, heads] = 0
        self.values[:, heads] = 0

    def _heads(self, slot: int) -> slice:
        return slice(slot * self.shape.kv_heads, (slot + 1) * self.shape.kv_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPrefix:
    """Tokens of a finished turn, n of them, and their keys and values."""

    token_ids: np.ndarray  # [n] int32
    kv: torch.Tensor  # [2, layers, kv_heads, n, head_dim]


class PrefixCache:
    """Finished turns by session, least recently used first out. Holds one policy version only."""

    def __init__(self) -> None:
        """An empty cache."""
        self._kept: OrderedDict[str, KeptPrefix] = OrderedDict()
        self.size_bytes = 0

    def keep(self, session: str, prefix: KeptPrefix) -> None:
        """Remember a session's tokens in place of its former ones."""
        self.forget(session)
        self._kept[session] = prefix
        self.size_bytes += prefix.kv.nbytes

    def find(self, session: str, prompt_ids: np.ndarray) -> tuple[KeptPrefix, int] | None:
        """The session's kept prefix and how many leading tokens it shares with the prompt."""
        prefix = self._kept.get(session)
        if prefix is None:
            return None
        self._kept.move_to_end(session)
        return prefix, shared_length(prefix.token_ids, prompt_ids)

    def forget(self, session: str) -> None:
        """Drop one session's prefix, if it is kept."""
        prefix = self._kept.pop(session, None)
        if prefix is not None:
            self.size_bytes -= prefix.kv.nbytes

    def shrink(self, limit_bytes: int) -> None:
        """Evict, least recently used first, until at most `limit_bytes` are kept."""
        while self._kept and self.size_bytes > limit_bytes:
            self.forget(next(iter(self._kept)))

    def clear(self) -> None:
        """Drop everything: the weights changed."""
        self._kept.clear()
        self.size_bytes = 0


def shared_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading tokens two sequences have in common."""
    n = min(len(left), len(right))
    differs = left[:n] != right[:n]
    return int(differs.argmax()) if differs.any() else n


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros that take no memory until written (on the host; a device commits them at once)."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size_bytes, dtype=np.uint8)).view(dtype).view(shape)
