"""Two environments on the real OpenEnv (`pip install openenv`), for an interpreter that has it:

python openenv_server.py guess|tools PORT
"""

import random
import sys
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation


class Guess(Action):
    """Guess the number."""

    number: int


class Hint(Observation):
    """What a guess gives."""

    hint: str


class GuessEnvironment(Environment[Guess, Hint, State]):
    """A number from 0 to 7."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Hint:
        """From the seed."""
        self._wanted = random.Random(seed).randrange(8)
        self._tries = 0
        return Hint(hint="a number from 0 to 7")

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Hint:
        """Too small, too big, or right."""
        if action.number == -12345:
            raise RuntimeError("the environment broke")
        self._tries += 1
        right = action.number == self._wanted
        hint = "right" if right else "bigger" if action.number < self._wanted else "smaller"
        done = right or self._tries == 4
        return Hint(hint=hint, reward=float(right), done=done)

    @property
    def state(self) -> State:
        """Nothing."""
        return State()


class ToolEnvironment(MCPEnvironment):
    """The same as a tool."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        mcp = FastMCP("guess")
        self._inner = GuessEnvironment()

        @mcp.tool
        def guess(number: int) -> str:
            """Guess the number."""
            self._last = self._inner.step(Guess(number=number))
            return self._last.hint

        super().__init__(mcp)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Hint:
        """From the seed."""
        self._last = self._inner.reset(seed)
        return self._last

    def _step_impl(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Hint:
        """No action beside the tool."""
        raise ValueError(f"{action}: call the tool")

    def _graded(self, seen: Any) -> Any:
        if isinstance(seen, CallToolObservation):
            seen.reward, seen.done = self._last.reward, self._last.done
        return seen

    def step(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """The tool's answer, graded."""
        return self._graded(super().step(action, timeout_s, **kwargs))

    async def step_async(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """The tool's answer, graded."""
        return self._graded(await super().step_async(action, timeout_s, **kwargs))

    @property
    def state(self) -> State:
        """Nothing."""
        return State()


if __name__ == "__main__":
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "guess":
        app = create_fastapi_app(GuessEnvironment, Guess, Hint, max_concurrent_envs=200)
    else:
        app = create_fastapi_app(
            ToolEnvironment, CallToolAction, CallToolObservation, max_concurrent_envs=200
        )
    uvicorn.run(app, host="127.0.0.1", port=port)
