"""Jobs on the servers of the tests."""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from loopwright.envs.actions import Call
from loopwright.envs.adapters.mcp_tools import McpEpisode, McpJob


def _numbered(split: str, seed: int, scenario: str) -> Iterator[Mapping[str, Any]]:
    rng = random.Random(f"{split}/{seed}")
    while True:
        number = 2 * rng.randrange(10**6) + (split == "test")
        yield {"id": f"{scenario}-{number}", "seed": number, "scenario": scenario}


class Fetch(McpJob):
    """Take what lies on a shelf."""

    name, version, max_turns = "fetch", "1", 4
    description = "Take what lies on a shelf."

    def tasks(self, split: str, seed: int) -> Iterator[Mapping[str, Any]]:
        """Without end."""
        return _numbered(split, seed, "fetch")

    async def start(self, episode: McpEpisode) -> str:
        """A world of its own; its handle is nothing for the policy."""
        handle = await episode.call("new_world", seed=episode.task.seed)
        if handle:
            episode.fixed["world"] = handle
        return f"Take what lies on shelf {self._shelf(episode)}, nothing else."

    async def reward(self, episode: McpEpisode) -> Mapping[str, float]:
        """By what the server holds, asked unseen."""
        world = episode.fixed
        wanted = await episode.call("look", shelf=self._shelf(episode), **world)
        taken = await episode.call("taken", **world)
        right = taken == wanted
        return {"right": float(right), "finished": float(right and episode.answer is not None)}

    def solve(self, episode: McpEpisode) -> Iterator[Call]:
        """Look, then take what was seen."""
        yield Call(name="look", arguments={"shelf": self._shelf(episode)})
        yield Call(name="take", arguments={"item": episode.calls[-1].answer.text})

    @staticmethod
    def _shelf(episode: McpEpisode) -> int:
        return 1 + episode.task.seed // 2 % 6


class Count(McpJob):
    """Bring the counter to a number and say it."""

    name, version, max_turns = "count", "1", 4
    description = "Bring a counter to a number."

    def tasks(self, split: str, seed: int) -> Iterator[Mapping[str, Any]]:
        """Without end."""
        return _numbered(split, seed, "count")

    async def start(self, episode: McpEpisode) -> str:
        """Nothing to prepare in a new process; in one that is used again, back to zero."""
        await episode.call("add", by=-json.loads(await episode.call("read")))
        return f"Bring the counter to {self._wanted(episode)} and finish with that number."

    async def reward(self, episode: McpEpisode) -> float:
        """Right, and said."""
        reads = json.loads(await episode.call("read"))
        return float(reads == self._wanted(episode) and episode.answer == str(reads))

    def solve(self, episode: McpEpisode) -> Iterator[Call]:
        """Two calls."""
        yield Call(name="add", arguments={"by": self._wanted(episode)})
        yield Call(name="finish", arguments={"answer": episode.calls[-1].answer.text})

    @staticmethod
    def _wanted(episode: McpEpisode) -> int:
        return 1 + episode.task.seed % 97


class NoJob:
    """Not a job."""
