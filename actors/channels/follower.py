"""The channel of a trainer's other ranks: they help to gather what rank 0 publishes."""

from typing import Any

from loopwright.actors.channels.adapter import BackendAdapters


class Follower:
    """Sends nothing; goes through the same buckets in the same order as rank 0."""

    def __init__(self) -> None:
        """The base below adapters is gathered once, as by rank 0."""
        self._owner: object = None

    def publish(self, version: int, source: Any, members: tuple[str, ...]) -> None:
        """Take part in gathering."""
        if isinstance(source, BackendAdapters) and source.owner is not self._owner:
            self._owner = source.owner
            _drain(source.base())
        _drain(source)

    def resend(self, version: int, members: tuple[str, ...]) -> None:
        """Nothing: rank 0 has what it published."""

    def close(self) -> None:
        """Nothing is held."""


def _drain(source: Any) -> None:
    for _ in source.published_buckets():
        pass
