"""Adapter to OpenEnv servers, over their WebSocket protocol; no package is needed on our side.

    [environment]
    name = "openenv"
    options = { url = "http://127.0.0.1:8000", solve = "coding.py:solve" }

Each instance is one session of the server (`/ws`). The policy writes tool calls. An environment
made of MCP tools (its action is `CallToolAction`) offers those; any other one offers the tool
`act`, whose parameters are the server's action schema; `text_field` takes the policy's whole turn
as that field instead. The observation's only field is shown as text, or the one named `show`, or
all as JSON.

The task's seed goes to `reset(seed, episode_id)`; every fourth seed is held out. Reward is the
last, the largest or the sum of the rewards (`reward`), on the scale `worth`, clipped; solved from
`success` on. `solve = "file.py:function"` is an oracle: called with the task and the last
observation, it returns an action, or None at its end.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from loopwright.envs.actions import Call, Fault, render_action
from loopwright.envs.adapters import foreign
from loopwright.envs.adapters.openenv_session import OpenEnvSession
from loopwright.envs.protocol import (
    EnvError,
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    Verdict,
)
from loopwright.envs.registry import object_at
from loopwright.envs.remote.plain import RemoteError

NAME = "openenv"
ACT = "act"
REWARDS: Mapping[str, Callable[[list[float]], float]] = {
    "last": lambda rewards: rewards[-1],
    "max": max,
    "sum": sum,
}
_HIDDEN = ("metadata", "type")  # fields of an action that are not the policy's


class OpenEnv:
    """One session of an OpenEnv server; implements `Env` and `TaskSource`."""

    def __init__(
        self,
        url: str,
        reward: str = "last",
        worth: Sequence[float] = (0.0, 1.0),
        success: float | None = None,
        instruction: str = "",
        text_field: str = "",
        show: str = "",
        solve: str = "",
        max_turns: int = 20,
        deterministic: bool = True,
        call_timeout_s: float = 60.0,
    ) -> None:
        """Asks for the server's schemas at once. Raises `RemoteError` if nobody answers."""
        if reward not in REWARDS:
            raise foreign.unknown("openenv reward", reward, REWARDS)
        if len(worth) != 2 or not worth[0] < worth[1]:
            raise EnvError(f"openenv worth {list(worth)}: expected [reward of 0, reward of 1]")
        self._session = OpenEnvSession(url, call_timeout_s)
        self._reward, self._worth = REWARDS[reward], worth
        self._success = worth[1] if success is None else success
        self._instruction, self._text_field, self._show = instruction, text_field, show
        self._solve = object_at(solve, "openenv solve") if solve else None
        self._task: Task | None = None
        self._over = False
        self._seen: Mapping[str, Any] = {}
        self._rewards: list[float] = []
        self._tools: list[dict[str, Any]] = []
        action = self._session.page("/schema")["action"]
        self._is_mcp = action.get("title") == "CallToolAction"
        self._schema = self._acting(action)
        about = self._session.page("/metadata")
        self.spec = EnvSpec(
            name=NAME,
            version=f"{about.get('name', '?')}-{about.get('version', '?')}",
            description=f"OpenEnv {about.get('name', '')} at {url}: {about.get('description', '')}",
            max_turns=max_turns,
            deterministic=deterministic,
            license="unknown",
        )

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream of seeds; every fourth belongs to the test split."""
        foreign.check_split(NAME, split)
        rng = Random(f"tasks/{split}/{seed}")
        while True:
            number = rng.randrange(2**31)
            if (number % 4 == 0) == (split == "test"):
                scenario = self.spec.version
                yield Task(
                    environment=NAME,
                    id=f"seed-{number}",
                    seed=number,
                    split=split,
                    scenario=scenario,
                )

    async def reset(self, task: Task) -> Observation:
        """Connect if need be, and reset there."""
        self._task, self._over, self._rewards = task, False, []
        data = {"seed": task.seed, "episode_id": task.id}
        opened = self._result(await self._session.ask("reset", data))
        self._tools = [self._schema] if self._schema else []
        if self._is_mcp:
            listed = self._result(await self._session.ask("step", {"type": "list_tools"}))
            self._tools = [
                _tool(t["name"], t["description"], t["input_schema"]) for t in listed["tools"]
            ]
        self._seen = opened
        texts = [text for text in (self._instruction, self._text(opened)) if text]
        user = Message(role="user", content="\n\n".join(texts) or "Begin.")
        return Observation(messages=(user,), tools=self._tools)

    async def step(self, action: str) -> Step:
        """One action; the server's word on one that does not validate comes back."""
        self._live()
        if self._over:
            return Step(observation=Observation(messages=()), terminated=True)
        if self._text_field:
            text = action.rpartition("</think>")[2].strip().encode(errors="replace").decode()
            return await self._act({self._text_field: text})
        call = foreign.tool_call(action)
        if isinstance(call, Fault):
            return foreign.no_call(call)
        names = [tool["function"]["name"] for tool in self._tools]
        if call.name not in names:
            return foreign.reply(
                f"error: the tools are {', '.join(names)}", "tool_error/unknown_tool"
            )
        if self._is_mcp:
            arguments = dict(call.arguments)
            return await self._act(
                {"type": "call_tool", "tool_name": call.name, "arguments": arguments}
            )
        return await self._act(dict(call.arguments))

    async def evaluate(self) -> Verdict:
        """The rewards so far, on their scale; 0 before the first."""
        self._live()
        raw = float(self._reward(self._rewards)) if self._rewards else 0.0
        low, high = self._worth
        scaled = (raw - low) / (high - low) if self._rewards else 0.0
        reward = min(1.0, max(0.0, scaled)) if math.isfinite(scaled) else math.nan
        solved = bool(self._rewards) and raw >= self._success
        return Verdict(reward=reward, success=solved, parts={"raw": raw})

    def oracle(self) -> Iterator[str]:
        """The user's `solve`, if there is one."""
        while self._solve is not None and not self._over:
            arguments = self._solve(self._live(), self._seen)
            if arguments is None:
                return
            if self._text_field:
                yield str(arguments[self._text_field])
            elif self._is_mcp:
                yield render_action(
                    Call(name=arguments["tool_name"], arguments=arguments["arguments"]), "json"
                )
            else:
                yield render_action(Call(name=ACT, arguments=arguments), "json")

    async def close(self) -> None:
        """End the session. Idempotent."""
        self._task = None
        await self._session.close()

    async def _act(self, data: Mapping[str, Any]) -> Step:
        answer = await self._session.ask("step", data)
        if answer["type"] == "error" and answer["data"].get("code") == "VALIDATION_ERROR":
            first = (answer["data"].get("errors") or [{}])[0]
            place = ".".join(map(str, first.get("loc", ())))
            problem = f"error: {place}: {first.get('msg', 'not valid')}"
            return foreign.reply(problem, "tool_error/bad_argument")
        self._seen = self._result(answer)
        reward = answer["data"].get("reward")
        if reward is not None:
            self._rewards.append(float(reward))
        self._over = bool(answer["data"].get("done"))
        result = self._seen.get("result") if self._is_mcp else None
        wrong = self._seen.get("error") or (isinstance(result, dict) and result.get("is_error"))
        failed = "tool_error/failed" if wrong else ""
        said = foreign.reply(self._text(self._seen), failed, role="tool")
        return Step(observation=said.observation, terminated=self._over, signals=said.signals)

    def _result(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The observation of an answer. Raises `RemoteError` for any other."""
        if answer["type"] != "observation":
            data = answer["data"]
            raise RemoteError(
                f"openenv {self._session.url}: {data.get('code')}: {data.get('message')}"
            )
        return dict(answer["data"]["observation"])

    def _text(self, observation: Mapping[str, Any]) -> str:
        """What the policy reads of it."""
        if self._show and self._show not in observation:
            raise foreign.unknown("openenv show", self._show, observation)
        told = {k: v for k, v in observation.items() if k != "metadata" and v is not None}
        if self._is_mcp and "tool_name" in told:
            told = {"result": _said(told.get("result")), "error": told.get("error")}
            told = {key: value for key, value in told.items() if value is not None}
        shown = told[self._show] if self._show else told
        if isinstance(shown, dict) and len(shown) == 1:
            shown = next(iter(shown.values()))
        if isinstance(shown, str):
            return shown
        return json.dumps(shown) if shown else ""

    def _acting(self, action: Mapping[str, Any]) -> dict[str, Any] | None:
        """The tool `act`, or none where the policy's text or MCP tools take its place."""
        fields = {k: v for k, v in action.get("properties", {}).items() if k not in _HIDDEN}
        if self._text_field:
            if self._text_field not in fields:
                raise foreign.unknown("openenv text_field", self._text_field, fields)
            return None
        if self._is_mcp:
            return None
        required = [key for key in action.get("required", ()) if key in fields]
        parameters = {**action, "type": "object", "properties": fields, "required": required}
        return _tool(ACT, action.get("description") or "Act.", parameters)

    def _live(self) -> Task:
        if self._task is None:
            raise RuntimeError("openenv: no live task; call reset(task) first")
        return self._task


def _said(result: Any) -> Any:
    """The text of an MCP result, or what there is instead."""
    if isinstance(result, dict) and isinstance(result.get("content"), list):
        return "\n".join(str(part.get("text", f"[{part['type']}]")) for part in result["content"])
    return result


def _tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}
