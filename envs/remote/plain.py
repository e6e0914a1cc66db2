"""The protocol's records as plain data and back: what travels to worlds that live elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from loopwright.envs.protocol import (
    EnvError,
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    Verdict,
)


class RemoteError(EnvError):
    """The far side failed, is gone, or does not speak the protocol: an infrastructure fault."""


def observation_from(data: Any, where: str) -> Observation:
    """`{"messages": [{"role", "content"}], "tools": [], "fresh": false}` as an `Observation`."""
    fields = _fields(data, where)
    try:
        messages = tuple(
            Message(role=str(m["role"]), content=str(m["content"]))
            for m in fields.get("messages", ())
        )
        tools = tuple(dict(tool) for tool in fields.get("tools", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(f"{where}: not messages and tools: {error!r}") from error
    return Observation(messages=messages, tools=tools, fresh=bool(fields.get("fresh", False)))


def step_from(data: Any, where: str) -> Step:
    """An observation with `terminated` and `signals` as a `Step`."""
    fields = _fields(data, where)
    signals = fields.get("signals", {})
    if not isinstance(signals, Mapping):
        raise RemoteError(f"{where}: signals are {signals!r}, expected name: count")
    return Step(
        observation=observation_from(fields, where),
        terminated=bool(fields.get("terminated", False)),
        signals={str(k): int(v) for k, v in signals.items()},
    )


def verdict_from(data: Any, where: str) -> Verdict:
    """`{"reward", "success", "parts"}` as a `Verdict`; numbers are left as they are, NaN too."""
    fields = _fields(data, where)
    try:
        parts = {str(k): float(v) for k, v in fields.get("parts", {}).items()}
        return Verdict(reward=float(fields["reward"]), success=bool(fields["success"]), parts=parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"{where}: no verdict: {error!r}") from error


def spec_from(data: Any, where: str) -> EnvSpec:
    """The declared fields as an `EnvSpec`."""
    fields = _fields(data, where)
    try:
        return EnvSpec(
            name=str(fields["name"]),
            version=str(fields["version"]),
            description=str(fields.get("description", "")),
            max_turns=int(fields["max_turns"]),
            deterministic=bool(fields.get("deterministic", True)),
            scheduled=tuple(map(str, fields.get("scheduled", ()))),
            license=str(fields.get("license", "unknown")),
            max_concurrency=int(fields.get("max_concurrency", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(f"{where}: no environment's declaration: {error!r}") from error


def task_from(data: Any, environment: str, split: str, where: str) -> Task:
    """The fields of one task as a `Task`."""
    fields = _fields(data, where)
    try:
        return Task(
            environment=environment,
            id=str(fields["id"]),
            seed=int(fields["seed"]),
            split=split,
            scenario=str(fields["scenario"]),
            difficulty=int(fields.get("difficulty", 1)),
            payload=dict(fields.get("payload", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(f"{where}: no task: {error!r}") from error


def plain(record: Task | Observation | Step | Verdict | EnvSpec) -> dict[str, Any]:
    """A record as plain data, a step's observation laid out flat."""
    data = asdict(record)
    return {**data.pop("observation"), **data} if isinstance(record, Step) else data


def _fields(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RemoteError(f"{where}: gave a {type(data).__name__}, expected fields by name")
    return data
