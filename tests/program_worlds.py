"""Programs for tests: agents that own their loop."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp

from loopwright.envs.model_server import serving
from loopwright.envs.program import Model
from loopwright.envs.protocol import EnvSpec, Message, Task, Verdict


def user(text: str) -> Message:
    """One message of the user."""
    return Message(role="user", content=text)


class Relay:
    """Plans in one conversation of two turns, asks two helpers side by side, and answers in a
    fresh context."""

    spec = EnvSpec(name="relay", version="1", description="Say a number.", max_turns=6)

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.wanted = self.said = ""
        self.refusal: Any = None

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """Numbers, odd ones held out."""
        for i in range(200 * seed, 200 * seed + 200):
            number = 2 * i + (split == "test")
            yield Task(
                environment="relay", id=f"r{number}", seed=number, split=split, scenario="relay"
            )

    async def run(self, task: Task, model: Model) -> None:
        """Five requests."""
        self.wanted, self.said = f"n{task.seed}", ""
        talk = [user(f"plan {self.wanted}")]
        plan = await model.chat(talk)
        if self.fails:
            raise ConnectionError("the tool is away")
        talk += [Message(role="assistant", content=plan), user("shorter")]
        short = await model.chat(talk)
        await asyncio.gather(*(model.chat([user(f"help {n}")]) for n in range(2)))
        self.said = await model.chat([user(f"now say it: {short[:20]}")])

    async def evaluate(self) -> Verdict:
        """Was it said at last?"""
        right = bool(self.wanted) and self.said == self.wanted
        return Verdict(reward=float(right), success=right)

    async def close(self) -> None:
        """Nothing is held."""


class Silent(Relay):
    """Never asks."""

    async def run(self, task: Task, model: Model) -> None:
        """Ends at once."""


class Harness(Relay):
    """An agent that speaks HTTP: one tool call, then its answer, streamed."""

    async def run(self, task: Task, model: Model) -> None:
        """Two requests of one conversation, after one that is refused."""
        self.wanted, self.said = f"n{task.seed}", ""
        async with serving(model) as url, aiohttp.ClientSession() as client:
            self.refusal = await _post(client, url, {"messages": []})
            talk: list[Any] = [{"role": "user", "content": f"plan {self.wanted}"}]
            first = await _post(client, url, {"messages": talk, "tools": [_LOOK]})
            called = first["choices"][0]["message"]
            if "tool_calls" in called:
                result = {"role": "tool", "content": self.wanted}
                talk += [called, result | {"tool_call_id": called["tool_calls"][0]["id"]}]
            else:
                talk += [called, {"role": "user", "content": [{"type": "text", "text": "look"}]}]
            asked = {"messages": talk, "tools": [_LOOK], "stream": True}
            async with client.post(f"{url}/chat/completions", json=asked) as answer:
                lines = [line.decode() async for line in answer.content]
            parts = [line[6:] for line in lines if line.startswith("data: {")]
            deltas = [json.loads(part)["choices"][0]["delta"] for part in parts]
            self.said = "".join(d.get("content") or "" for d in deltas)


_LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"shelf": {"type": "integer"}}},
    },
}


async def _post(client: aiohttp.ClientSession, url: str, data: Any) -> Any:
    async with client.post(f"{url}/chat/completions", json=data) as answer:
        return await answer.json()
