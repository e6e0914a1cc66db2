"""How many groups are played at the same time: as many as keep the engines busy, whatever number of
them there is."""

import asyncio


class Room:
    """A number of places that may change while they are in use."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        """Take a place, as soon as there is one; who waits longest is first."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._taken < self._size)
            self._taken += 1

    async def __aexit__(self, *_: object) -> None:
        """Leave it."""
        async with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    async def resize(self, size: int) -> None:
        """Fewer places: nobody is sent away, but as many leave before the next may come."""
        async with self._changed:
            self._size = size
            self._changed.notify_all()
