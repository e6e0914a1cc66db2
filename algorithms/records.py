"""Records that cross a process boundary: frozen, checked once, numpy leaves.

`encode` and `decode` turn any of them into msgpack and back: arrays travel as raw bytes with dtype
and shape, never as lists or pickles, under a schema version; unknown versions are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import msgpack
import numpy as np

SCHEMA_VERSION = 1


class RecordError(ValueError):
    """A record whose parts contradict each other, or bytes that are not a record of this schema."""


class EndReason(StrEnum):
    """Why an episode ended."""

    DONE = "done"
    MAX_TURNS = "max_turns"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ERROR = "error"


class Outcome(StrEnum):
    """What a rollout counts as: `infra_fault` is never scored, never trained on, and retried."""

    SCORED = "scored"
    POLICY_FAULT = "policy_fault"
    INFRA_FAULT = "infra_fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One context instance: the exact tokens a sampler saw and produced, T of them."""

    token_ids: np.ndarray  # [T] int32
    action_mask: np.ndarray  # [T] bool, True where the policy chose the token
    # [T] float32, at the sampling temperature; 0 where the mask is False
    behavior_logprobs: np.ndarray
    policy_versions: np.ndarray  # [T] int32; -1 where the mask is False
    turn_ids: np.ndarray  # [T] int16, turn that produced the token; -1 where the mask is False

    def __post_init__(self) -> None:
        dtypes = {
            "token_ids": np.int32,
            "action_mask": np.bool_,
            "behavior_logprobs": np.float32,
            "policy_versions": np.int32,
            "turn_ids": np.int16,
        }
        for name, dtype in dtypes.items():
            value = getattr(self, name)
            if value.dtype != dtype or value.shape != self.token_ids.shape or value.ndim != 1:
                raise RecordError(
                    f"Context.{name}: {value.dtype}{list(value.shape)}, expected "
                    f"{np.dtype(dtype)}{list(self.token_ids.shape)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The frozen record of one episode."""

    task_id: str
    environment: str
    environment_version: str
    scenario: str
    attempt: int  # 0 … K-1 within the group
    contexts: tuple[Context, ...]
    reward: float
    success: bool  # every test of the task passed
    reward_parts: dict[str, float] = field(default_factory=dict)
    end_reason: EndReason
    outcome: Outcome
    turns: int
    # by phase: generate, environment, total
    seconds: dict[str, float] = field(default_factory=dict)
    tool_errors: dict[str, int] = field(default_factory=dict)  # category -> count
    fault: str = ""  # what broke, for infra faults
    saved_tokens: int = 0  # sampled before an engine or a worker died, and kept

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.INFRA_FAULT and not np.isfinite(self.reward):
            raise RecordError(
                f"Rollout.reward of {self.task_id}: {self.reward}, expected a finite number"
            )

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled one of the rollout's tokens; -1 if it sampled
        none."""
        versions = [c.policy_versions[c.action_mask] for c in self.contexts]
        return min((int(v.min()) for v in versions if v.size), default=-1)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens the policy chose."""
        return sum(int(c.action_mask.sum()) for c in self.contexts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one task: the unit of baseline, admission and lag. Infra faults are not in
    it."""

    ticket: int
    task_id: str
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        for rollout in self.rollouts:
            if rollout.task_id != self.task_id:
                raise RecordError(f"Group of {self.task_id} holds a rollout of {rollout.task_id}")
            if rollout.outcome is Outcome.INFRA_FAULT:
                raise RecordError(f"Group of {self.task_id} holds an infra fault: {rollout.fault}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one step trains on: S sequences laid end to end, N tokens in all.

    A sequence is one context instance. `rollout_ids` ties the instances of one rollout together, so
    that a rollout counts once however many contexts it has. Dropped rollouts (no advantage) are not
    in it, but `rollout_count` counts them: the constant the loss is divided by. Sequences of one
    rollout stand in the order in which they were played.
    """

    step: int
    token_ids: np.ndarray  # [N] int32
    action_mask: np.ndarray  # [N] bool
    behavior_logprobs: np.ndarray  # [N] float32
    policy_versions: np.ndarray  # [N] int32; -1 where the mask is False
    turn_ids: np.ndarray  # [N] int16
    lengths: np.ndarray  # [S] int32, sums to N
    rollout_ids: np.ndarray  # [S] int32, index of the rollout within the step
    rewards: np.ndarray  # [S] float32, of the sequence's rollout
    # [S] float32, of the sequence's rollout; 0 where the trainer's critic is to find them (`gae`)
    advantages: np.ndarray
    rollout_count: int  # rollouts in the step, dropped ones included

    def __post_init__(self) -> None:
        tokens, sequences = int(self.lengths.sum()), len(self.lengths)
        for name in (
            "token_ids",
            "action_mask",
            "behavior_logprobs",
            "policy_versions",
            "turn_ids",
        ):
            if getattr(self, name).shape != (tokens,):
                raise RecordError(
                    f"TrainBatch.{name}: {getattr(self, name).shape}, expected ({tokens},)"
                )
        for name in ("rollout_ids", "rewards", "advantages"):
            if getattr(self, name).shape != (sequences,):
                raise RecordError(
                    f"TrainBatch.{name}: {getattr(self, name).shape}, expected ({sequences},)"
                )


_RECORDS: dict[str, type] = {cls.__name__: cls for cls in (Context, Rollout, Group, TrainBatch)}
_ENUMS = {"end_reason": EndReason, "outcome": Outcome}


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            "__array__": value.dtype.str,
            "shape": list(value.shape),
            "data": np.ascontiguousarray(value).tobytes(),
        }
    if isinstance(value, (Context, Rollout, Group, TrainBatch)):
        return {
            "__record__": type(value).__name__,
            **{f.name: _pack(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_pack(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _pack(v) for k, v in value.items()}
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        return np.frombuffer(value["data"], dtype=np.dtype(value["__array__"])).reshape(
            value["shape"]
        )
    name = value.pop("__record__", None)
    parts = {k: _unpack(v) for k, v in value.items()}
    if name is None:
        return parts
    if name not in _RECORDS:
        raise RecordError(f"unknown record {name!r}, expected one of {sorted(_RECORDS)}")
    return _RECORDS[name](**{k: _ENUMS[k](v) if k in _ENUMS else v for k, v in parts.items()})


def encode(record: Context | Rollout | Group | TrainBatch) -> bytes:
    """The record as msgpack bytes under the current schema version."""
    return msgpack.packb({"v": SCHEMA_VERSION, "record": _pack(record)})


def decode(data: bytes) -> Any:
    """The record in `data`; arrays are read-only views on it. Raises `RecordError` if it is not
    one."""
    try:
        frame = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError(f"{len(data)} bytes that are not msgpack: {error}") from error
    if not isinstance(frame, dict) or frame.get("v") != SCHEMA_VERSION:
        found = frame.get("v") if isinstance(frame, dict) else type(frame).__name__
        raise RecordError(f"record schema {found}, this build reads {SCHEMA_VERSION}")
    return _unpack(frame["record"])
