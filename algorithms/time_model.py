"""How long a step takes, before anything is started: LlamaRL's formulas, whole-device splits, and a
discrete-event simulation of this project's own loop.

The formulas are LlamaRL's (section on the efficiency of asynchronous RL): B0 sequences a step on G0
devices, m devices a replica, micro-batches of b that take η(b) seconds. They divide devices as if
they were a liquid and know no stragglers; `best_whole_split` divides whole devices, and `simulate`
adds what lengths of unequal size do. Pure numbers; seconds throughout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Training or generation: how its devices are grouped, and what a micro-batch costs."""

    replica_devices: int  # m: devices that hold one copy of the model together
    micro_batch: int  # b: sequences processed together by a replica
    micro_batch_s: float  # η(b)

    @property
    def device_s(self) -> float:
        """Device-seconds of one sequence: m · η(b) / b."""
        return self.replica_devices * self.micro_batch_s / self.micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How devices are shared between training and generation, and the seconds of a step then."""

    train_devices: float
    generate_devices: float
    step_s: float

    @property
    def train_frac(self) -> float:
        """θ: the trainer's share of all devices."""
        return self.train_devices / (self.train_devices + self.generate_devices)


def synchronous_s(sequences: int, devices: int, train: Side, generate: Side) -> float:
    """T_sync = B0/G0 · (m η_t/b_t + m η_g/b_g): all devices generate, then all of them train."""
    return sequences / devices * (train.device_s + generate.device_s)


def asynchronous_s(
    sequences: int, devices: int, train: Side, generate: Side, train_frac: float
) -> float:
    """T_async = max(B0 m_t η_t / (θ G0 b_t), B0 m_g η_g / ((1−θ) G0 b_g)), θ in (0, 1)."""
    if not 0 < train_frac < 1:
        raise ValueError(f"train_frac {train_frac}, expected a share between 0 and 1")
    each = sequences / devices
    return max(each * train.device_s / train_frac, each * generate.device_s / (1 - train_frac))


def best_split(sequences: int, devices: int, train: Side, generate: Side) -> Split:
    """The share at which both sides take equally long: θ* = t / (t + g) of their device-seconds."""
    train_frac = train.device_s / (train.device_s + generate.device_s)
    return Split(
        train_devices=train_frac * devices,
        generate_devices=(1 - train_frac) * devices,
        step_s=asynchronous_s(sequences, devices, train, generate, train_frac),
    )


def whole_splits(
    devices: int,
    train_device_s: float,
    generate_device_s: float,
    *,
    train_replica: int = 1,
    generate_replica: int = 1,
    tail_s: float = 0.0,
) -> Iterator[Split]:
    """Every split of whole replicas: a step takes as long as its slower side.

    `train_device_s` and `generate_device_s` are the work of one step in device-seconds; `tail_s` is
    what the slowest episode takes beyond that (0 where the buffer hides it). Devices that fit into
    no replica stay idle.
    """
    for train_devices in range(train_replica, devices, train_replica):
        generate_devices = (devices - train_devices) // generate_replica * generate_replica
        if generate_devices:
            generating_s = generate_device_s / generate_devices + tail_s
            yield Split(
                train_devices=train_devices,
                generate_devices=generate_devices,
                step_s=max(train_device_s / train_devices, generating_s),
            )


def best_whole_split(
    devices: int,
    train_device_s: float,
    generate_device_s: float,
    *,
    train_replica: int = 1,
    generate_replica: int = 1,
    tail_s: float = 0.0,
) -> Split | None:
    """The fastest of `whole_splits`; None where there are too few devices for both sides."""
    splits = whole_splits(
        devices,
        train_device_s,
        generate_device_s,
        train_replica=train_replica,
        generate_replica=generate_replica,
        tail_s=tail_s,
    )
    return min(splits, key=lambda split: split.step_s, default=None)


def by_turns_s(
    devices: int,
    train_device_s: float,
    generate_device_s: float,
    *,
    tail_s: float = 0.0,
    switch_s: float = 0.0,
) -> float:
    """A synchronous step on all devices: generate, wait for the last episode, switch, train."""
    return (train_device_s + generate_device_s) / devices + tail_s + switch_s


def overlap_bound(generate_s: float, train_s: float) -> float:
    """Largest possible speed-up of overlapping the two parts of a step: (g + t) / max(g, t)."""
    return (generate_s + train_s) / max(generate_s, train_s)


def lag_estimate(episode_s: float, step_s: float, buffered_steps: int) -> int:
    """Policy lag of an episode that takes `episode_s` while a step takes `step_s`, with
    `buffered_steps` steps of finished groups before its own: ceil(D/T) + Q."""
    return math.ceil(episode_s / step_s) + buffered_steps
