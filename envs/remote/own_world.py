"""One of Loopwright's own environments as a world of plain data, for `ProcessEnv` with
`environment`: worlds that use a core each, one to a process. `shim.py` loads this file."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
sys.path[:] = [entry for entry in sys.path if entry != str(_HERE.parent)]  # `plain` is no package
if (_HERE.parents[2] / "loopwright.py").is_file():  # a checkout, which need not be installed
    sys.path.append(str(_HERE.parents[2]))

from loopwright.envs.protocol import Task  # noqa: E402
from loopwright.envs.registry import load  # noqa: E402
from loopwright.envs.remote.plain import plain  # noqa: E402


class World:
    """An environment of the registry, seen as `shim.py` wants it."""

    def __init__(self, environment: str, options: Mapping[str, Any]) -> None:
        self._env = load(environment, options)

    def spec(self) -> dict[str, Any]:
        """Its declaration."""
        return plain(self._env.spec)

    def tasks(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """Its stream."""
        return map(plain, self._env.tasks(split, seed))

    async def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """Its opening."""
        return plain(await self._env.reset(Task(**task)))

    async def step(self, text: str) -> dict[str, Any]:
        """Its reply."""
        return plain(await self._env.step(text))

    async def evaluate(self) -> dict[str, Any]:
        """Its grade."""
        return plain(await self._env.evaluate())

    def oracle(self) -> Iterator[str]:
        """Its oracle."""
        return self._env.oracle()

    async def close(self) -> None:
        """The end of the episode."""
        await self._env.close()
