"""Stub: tasks, tasksets, and an agent whose model requests pass a server, as in the package."""

import itertools
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel

Data = TypeVar("Data")
Of = TypeVar("Of")
Config = TypeVar("Config")


class TaskData(BaseModel):
    """What a task is."""

    name: str | None = None
    prompt: str
    system_prompt: str | None = None


class TasksetConfig(BaseModel):
    """What a taskset is told."""

    id: str = ""
    task: Any = None


class Trace(SimpleNamespace):
    """What came of a rollout."""

    @property
    def reward(self) -> float:
        """The sum."""
        return sum(reward.value for reward in self.rewards.values())


def reward(weight: float) -> Any:
    """Mark a method as a reward."""

    def marked(method: Any) -> Any:
        method.weight = weight
        return method

    return marked


class Task(Generic[Data]):
    """A task and its rewards."""

    def __init__(self, data: Any, config: Any = None) -> None:
        self.data = data


class Taskset(Generic[Of, Config]):
    """Tasks."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def take(self, count: int) -> Any:
        """The first of them."""
        return itertools.islice(iter(self.load()), count)  # type: ignore[attr-defined]


class EvalClientConfig(BaseModel):
    """The endpoint."""

    base_url: str
    api_key_var: str


class AgentConfig(BaseModel):
    """Who plays."""

    model: str
    harness: Any
    runtime: Any
    client: EvalClientConfig


class Agent:
    """Plays a task by its harness, through a server that records what the model says."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.harness = SimpleNamespace(config=config.harness)

    async def run(self, task: Any) -> Trace:
        """One rollout."""
        trace = Trace(rewards={}, ok=False, errors=[], last_reply="")

        async def relay(request: web.Request) -> web.Response:
            url = f"{self.config.client.base_url}/chat/completions"
            body = await request.json()
            async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
                data = await answer.json()
            trace.last_reply = data["choices"][0]["message"]["content"]
            return web.json_response(data)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", relay)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            model = SimpleNamespace(model=self.config.model)
            await self.harness.launch(model, trace, None, endpoint, "secret", {}, task.data)
            for name, method in vars(type(task)).items():
                if "weight" in getattr(method, "__dict__", {}):
                    value = method.weight * await method(task, trace)
                    trace.rewards[name] = SimpleNamespace(value=value)
            trace.ok = True
        except RuntimeError as error:
            trace.errors.append(repr(error))
        finally:
            await runner.cleanup()
        return trace
