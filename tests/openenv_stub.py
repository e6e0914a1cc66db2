"""A stand-in for OpenEnv servers: the messages of 0.10 on aiohttp (`/schema`, `/metadata`, `/ws`),
with the environments of `openenv_server.py`."""

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from aiohttp import WSMsgType, web

from loopwright.envs.adapters import background


class Session:
    """One session: a number from 0 to 7."""

    def __init__(self) -> None:
        self.wanted, self.tries = 0, 0

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        """From the seed."""
        self.wanted, self.tries = random.Random(data["seed"]).randrange(8), 0
        return _observed({"hint": "a number from 0 to 7"}, None, False)

    def guess(self, number: int) -> tuple[str, float, bool]:
        """The hint, the reward, whether it is over."""
        self.tries += 1
        right = number == self.wanted
        hint = "right" if right else "bigger" if number < self.wanted else "smaller"
        return hint, float(right), right or self.tries == 4


class Guessing(Session):
    """A typed action, validated as pydantic does."""

    action: ClassVar[dict[str, Any]] = {
        "title": "Guess",
        "description": "Guess the number.",
        "type": "object",
        "properties": {"metadata": {"type": "object"}, "number": {"type": "integer"}},
        "required": ["number"],
    }

    def step(self, data: dict[str, Any]) -> dict[str, Any]:
        """A guess."""
        if set(data) != {"number"} or type(data["number"]) is not int:
            wrong = {"loc": ["number"], "msg": "Input should be a valid integer"}
            raise _Problem("VALIDATION_ERROR", "Invalid message", [wrong])
        if data["number"] == -12345:
            raise _Problem("EXECUTION_ERROR", "the environment broke")
        hint, reward, done = self.guess(data["number"])
        return _observed({"hint": hint}, reward, done)


class Tools(Session):
    """MCP tools behind `CallToolAction`."""

    action: ClassVar[dict[str, Any]] = {
        "title": "CallToolAction",
        "type": "object",
        "properties": {"tool_name": {}},
    }

    def step(self, data: dict[str, Any]) -> dict[str, Any]:
        """List the tools or call one."""
        if data["type"] == "list_tools":
            schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
            tool = {"name": "guess", "description": "Guess.", "input_schema": schema}
            return _observed({"tools": [tool]}, None, False)
        number = data["arguments"].get("number")
        if type(number) is not int:
            content = [{"type": "text", "text": "number: not an integer"}]
            result = {"content": content, "is_error": True}
            return _observed({"tool_name": "guess", "result": result, "error": None}, 0.0, False)
        hint, reward, done = self.guess(number)
        result = {"content": [{"type": "text", "text": hint}], "is_error": False}
        return _observed({"tool_name": "guess", "result": result, "error": None}, reward, done)


class _Problem(Exception):
    def __init__(self, code: str, message: str, errors: Any = None) -> None:
        super().__init__(message)
        self.data = {"code": code, "message": message, "errors": errors}


def _observed(observation: dict[str, Any], reward: float | None, done: bool) -> dict[str, Any]:
    return {"observation": {**observation, "metadata": {}}, "reward": reward, "done": done}


@contextmanager
def served(kind: type[Guessing] | type[Tools], room: int = 200) -> Iterator[str]:
    """The address of a server of it, in the loop of the connections."""
    open_now: set[object] = set()

    async def schema(request: web.Request) -> web.Response:
        return web.json_response({"action": kind.action, "observation": {}})

    async def metadata(request: web.Request) -> web.Response:
        about = {"name": kind.__name__, "version": "1", "description": "A number."}
        return web.json_response(about)

    async def socket(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        if len(open_now) >= room:
            full = {"code": "CAPACITY_REACHED", "message": f"{room} sessions are open"}
            await answer.send_json({"type": "error", "data": full})
            return answer
        session = kind()
        open_now.add(session)
        try:
            async for message in answer:
                if message.type != WSMsgType.TEXT:
                    break
                asked = json.loads(message.data)
                if asked["type"] == "close":
                    break
                try:
                    act = session.reset if asked["type"] == "reset" else session.step
                    await answer.send_json({"type": "observation", "data": act(asked["data"])})
                except _Problem as problem:
                    await answer.send_json({"type": "error", "data": problem.data})
        finally:
            open_now.discard(session)
        return answer

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_get("/schema", schema)
        app.router.add_get("/metadata", metadata)
        app.router.add_get("/ws", socket)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = background.run(start()).result()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), background.loop()).result()
