"""What `rollout.channel_options` may hold: each option with its channels, type, bounds, meaning and
only default.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOption:
    """One option of `rollout.channel_options`."""

    default: int | str
    channels: tuple[str, ...]  # that read it
    meaning: str
    least: int = 0  # of a number
    choices: tuple[str, ...] = ()  # of a word; none: any

    def expected(self, value: Any) -> str:
        """What is expected instead of `value`; empty if it is right."""
        if isinstance(self.default, int):
            right = isinstance(value, int) and not isinstance(value, bool) and value >= self.least
            return "" if right else f"a whole number of at least {self.least} ({self.meaning})"
        if isinstance(value, str) and (not self.choices or value in self.choices):
            return ""
        return f"{' or '.join(self.choices) or 'a text'} ({self.meaning})"


_CODED = ("delta", "lowrank_delta")
_CARRIED = ("adapter", *_CODED)
CARRIERS = ("shared_memory", "collective")

CHANNEL_OPTIONS: Mapping[str, ChannelOption] = {
    "carrier": ChannelOption(
        default="shared_memory",
        channels=_CARRIED,
        choices=CARRIERS,
        meaning="what moves the bytes: shared memory of one host, or the network",
    ),
    "host": ChannelOption(
        default="",
        channels=("collective", *_CARRIED),
        meaning="the trainer's address as engines reach it; empty: found out",
    ),
    "bucket_bytes": ChannelOption(
        default=16 << 20,
        channels=("collective", *_CARRIED),
        least=4096,
        meaning="of one message on the network",
    ),
    "full_every": ChannelOption(
        default=20,
        channels=_CODED,
        least=1,
        meaning="versions from one publish of all weights to the next",
    ),
    "level": ChannelOption(
        default=1, channels=_CODED, least=1, meaning="of zstd; higher is smaller and slower"
    ),
}


def channel_option(options: Mapping[str, Any], name: str) -> Any:
    """The value of an option: as given, or its default."""
    return options.get(name, CHANNEL_OPTIONS[name].default)


def carrier_of(channel: str, options: Mapping[str, Any]) -> str:
    """What moves the bytes of a channel, by its name: shared_memory, collective or ipc."""
    return channel_option(options, "carrier") if channel in _CARRIED else channel


def option_problems(
    channel: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str, str]]:
    """(option, value, what is expected, nearest name) for each that is wrong with `channel`."""
    for name, value in options.items():
        known = CHANNEL_OPTIONS.get(name)
        if known is None:
            nearest = next(iter(get_close_matches(name, CHANNEL_OPTIONS, 1)), "")
            yield name, value, f"one of {', '.join(sorted(CHANNEL_OPTIONS))}", nearest
        elif channel == "auto":
            yield name, value, "no such setting: name rollout.channel to set options of one", ""
        elif channel not in known.channels:
            why = f"no such setting: it has no effect with rollout.channel = {channel!r}"
            yield name, value, why, ""
        elif expected := known.expected(value):
            yield name, value, expected, ""
