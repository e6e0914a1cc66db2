"""Officeworld as a world of `ProcessEnv`: the quickstart's errands, in a process of their own."""

from collections.abc import Iterator
from typing import Any

from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.remote.plain import plain, task_from


class Office:
    """As `OfficeWorld`, in plain data."""

    def __init__(self, **options: Any) -> None:
        self._world = OfficeWorld(**options)

    def spec(self) -> dict[str, Any]:
        """Of officeworld."""
        spec: dict[str, Any] = plain(self._world.spec)
        return spec

    def tasks(self, split: str, seed: int) -> Iterator[Any]:
        """Officeworld's stream."""
        return map(plain, self._world.tasks(split, seed))

    async def reset(self, task: dict[str, Any]) -> Any:
        """Begin a task."""
        return plain(await self._world.reset(task_from(task, "officeworld", task["split"], "")))

    async def step(self, text: str) -> Any:
        """One action."""
        return plain(await self._world.step(text))

    async def evaluate(self) -> Any:
        """The grade."""
        return plain(await self._world.evaluate())

    def oracle(self) -> Iterator[str]:
        """Officeworld's own."""
        return self._world.oracle()

    async def close(self) -> None:
        """Free what the world holds."""
        await self._world.close()
