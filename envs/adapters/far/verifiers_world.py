"""The far side of verifiers v1: its rollouts, whose model requests are our turns.

A rollout of verifiers owns its loop and asks an OpenAI-compatible endpoint. Here that endpoint is
ours: a request waits until our side has the policy's text, and what comes with the next request is
the next observation. The harness is a chat loop in this process that calls the tools of the task's
MCP servers. Needs `verifiers` 0.4 (the v1 interface).
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

REMEDY = f"{sys.executable} -m pip install 'verifiers>=0.4,<0.5'"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_numbers = itertools.count()


class Requests:
    """The endpoint: requests by episode, each with the future of its answer."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Queue[Any]] = {}
        self.url = ""

    async def start(self) -> None:
        """Listen, once."""
        if self.url:
            return
        web = importlib.import_module("aiohttp.web")

        async def answer(request: Any) -> Any:
            body = await request.json()
            reply = asyncio.get_running_loop().create_future()
            await self.waiting[request.match_info["episode"]].put((body, reply))
            return web.json_response(await reply)

        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/{episode}/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"


_requests = Requests()


def _package() -> Any:
    """The package. Raises `ImportError` with the remedy."""
    try:
        return importlib.import_module("verifiers.v1")
    except ImportError as error:
        raise ImportError(f"verifiers v1 is not here ({error}); remedy: {REMEDY}") from None


def _chat_harness(config: Any) -> Any:
    """A harness without a program: the chat loop runs here."""
    base = importlib.import_module("verifiers.v1.harnesses.null.harness").NullHarness
    result = importlib.import_module("verifiers.v1.runtimes").ProgramResult
    wire = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire

    class ChatHarness(base):  # type: ignore[misc, valid-type]
        """Ask, call the tools, ask again; an answer without calls is the last."""

        async def setup(self, runtime: Any) -> None:
            """Nothing to prepare."""

        async def launch(
            self,
            ctx: Any,
            trace: Any,
            runtime: Any,
            endpoint: str,
            secret: str,
            mcp_urls: dict[str, str],
            data: Any,
            tool_interception_url: str | None = None,
        ) -> Any:
            """The loop."""
            system, prompt = self.resolve_prompt(data)
            messages: list[dict[str, Any]] = []
            if system:
                messages.append({"role": "system", "content": system})
            if isinstance(prompt, str):
                messages.append({"role": "user", "content": prompt})
            else:
                messages += [wire(message) for message in prompt or ()]
            async with _Tools(mcp_urls) as tools:
                await _converse(endpoint, secret, ctx.model, messages, tools)
            return result(exit_code=0, stdout="", stderr="")

    return ChatHarness(config)


async def _converse(
    endpoint: str, secret: str, model: str, messages: list[dict[str, Any]], tools: _Tools
) -> None:
    httpx = importlib.import_module("httpx")
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(headers=headers, timeout=None) as http:
        while True:
            body: dict[str, Any] = {"model": model, "messages": messages}
            if tools.schemas:
                body["tools"] = tools.schemas
            answer = await http.post(f"{endpoint}/chat/completions", json=body)
            answer.raise_for_status()
            message = answer.json()["choices"][0]["message"]
            messages.append(message)
            if not message.get("tool_calls"):
                return
            for call in message["tool_calls"]:
                text = await tools.call(call["function"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})


class _Tools:
    """The tools of the task's MCP servers."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self._clients: dict[str, Any] = {}
        self.schemas: list[dict[str, Any]] = []
        self._stack = importlib.import_module("contextlib").AsyncExitStack()

    async def __aenter__(self) -> _Tools:
        for url in self._urls.values():
            client = importlib.import_module("mcp").Client(url)
            await self._stack.enter_async_context(client)
            for tool in (await client.list_tools()).tools:
                if tool.name in self._clients:
                    raise RuntimeError(f"verifiers: two tools of the task are called {tool.name}")
                self._clients[tool.name] = client
                function = {
                    "name": tool.name,
                    "description": tool.description or tool.name,
                    "parameters": tool.input_schema,
                }
                self.schemas.append({"type": "function", "function": function})
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._stack.aclose()

    async def call(self, function: dict[str, Any]) -> str:
        """What a tool says, or what is wrong with the call."""
        client = self._clients.get(function["name"])
        if client is None:
            return f"error: there is no tool {function['name'][:60]}"
        try:
            arguments = json.loads(function["arguments"])
            answer = await client.call_tool(function["name"], arguments)
        except Exception as error:  # noqa: BLE001 a tool's failure is the policy's to read
            return f"error: {error}"
        return "\n".join(part.text for part in answer.content if part.type == "text")


class World:
    """One session of a taskset."""

    def __init__(
        self,
        taskset: str,
        config: dict[str, Any] | None = None,
        max_tasks: int = 1000,
        answer_field: str = "",
        max_turns: int = 10,
    ) -> None:
        package = _package()
        loaders = importlib.import_module("verifiers.v1.utils.loaders")
        made = loaders.taskset_config_type(taskset)(id=taskset, **(config or {}))
        self._tasks = list(loaders.load_taskset(made).take(max_tasks))
        self._package, self._taskset = package, taskset
        self._answer, self._max_turns = answer_field, max_turns
        self._rollout: Any = None
        self._trace: Any = None
        self._reply: Any = None

    def spec(self) -> dict[str, Any]:
        """What is declared."""
        version = importlib.metadata.version("verifiers")
        return {
            "name": "verifiers",
            "version": f"{version}+{self._taskset}",
            "description": f"verifiers {self._taskset}: {len(self._tasks)} tasks.",
            "max_turns": self._max_turns,
        }

    def tasks(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """Every fourth task is held out; over and over, in another order each time."""
        mine = [i for i in range(len(self._tasks)) if (i % 4 == 0) == (split == "test")]
        rng = random.Random(f"{split}/{seed}")
        while mine:
            for index in rng.sample(mine, len(mine)):
                name = self._tasks[index].data.name or f"task-{index}"
                scenario = self._taskset
                yield {
                    "id": f"{index}-{name}",
                    "seed": index,
                    "scenario": scenario,
                    "payload": {"index": index},
                }

    async def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """Start a rollout and wait for its first request."""
        await self.close()
        await _requests.start()
        self._episode = f"e{next(_numbers)}"
        _requests.waiting[self._episode] = asyncio.Queue()
        vf = self._package
        configs = importlib.import_module("verifiers.v1.runtimes")
        harness = importlib.import_module("verifiers.v1.harnesses.null.harness").NullHarnessConfig
        agent = vf.Agent(
            vf.AgentConfig(
                model="policy",
                harness=harness(id="null"),
                runtime=configs.SubprocessConfig(),
                client=vf.EvalClientConfig(
                    base_url=f"{_requests.url}/{self._episode}/v1", api_key_var="NO_KEY"
                ),
            )
        )
        agent.harness = _chat_harness(agent.harness.config)
        self._task = self._tasks[task["payload"]["index"]]
        self._trace, self._seen = None, 0
        self._rollout = asyncio.ensure_future(agent.run(self._task))
        if not await self._next():
            raise RuntimeError(f"verifiers: the rollout asked nothing: {self._trace.errors}")
        self._seen = len(self._body["messages"])
        return {
            "messages": [_shown(message) for message in self._body["messages"]],
            "tools": self._body.get("tools", []),
        }

    async def step(self, text: str) -> dict[str, Any]:
        """The policy's turn is the answer to the request."""
        if self._rollout is None or self._trace is not None:
            return {"messages": [], "terminated": True}
        self._reply.set_result(_completion(text))
        if not await self._next():
            return {"messages": [], "terminated": True}
        messages = self._body["messages"]
        # The transcript goes on after the turn; a harness that rewrites it begins a fresh context.
        fresh = len(messages) <= self._seen + 1
        new = messages if fresh else messages[self._seen + 1 :]
        self._seen = len(messages)
        return {"messages": [_shown(message) for message in new], "fresh": fresh}

    async def evaluate(self) -> dict[str, Any]:
        """The rewards of the finished rollout; 0 before, since verifiers scores nothing earlier."""
        if self._trace is None:
            return {"reward": 0.0, "success": False, "parts": {}}
        rewards = {name: r.value for name, r in self._trace.rewards.items() if r is not None}
        total = float(self._trace.reward)
        return {"reward": total, "success": total >= 0.999, "parts": rewards}

    def oracle(self) -> Iterator[str]:
        """The field of the task's data that holds its answer, if one was named."""
        if self._answer:
            yield str(vars(self._task.data)[self._answer])

    async def close(self) -> None:
        """End the rollout. Idempotent."""
        if self._rollout is not None:
            self._rollout.cancel()
            await asyncio.gather(self._rollout, return_exceptions=True)
            _requests.waiting.pop(self._episode, None)
        self._rollout = None

    async def _next(self) -> bool:
        """Wait for a request; False if the rollout has ended instead. Raises if it failed."""
        asked = asyncio.ensure_future(_requests.waiting[self._episode].get())
        await asyncio.wait({asked, self._rollout}, return_when="FIRST_COMPLETED")
        if asked.done():
            self._body, self._reply = asked.result()
            return True
        asked.cancel()
        self._trace = self._rollout.result()
        if not self._trace.ok:
            raise RuntimeError(f"verifiers: the rollout failed: {self._trace.errors}")
        return False


def _shown(message: dict[str, Any]) -> dict[str, Any]:
    """A message as text."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(str(part.get("text", "")) for part in content)
    role = message["role"] if message["role"] != "developer" else "system"
    return {"role": role, "content": content}


def _completion(text: str) -> dict[str, Any]:
    """The policy's turn as an answer of OpenAI's: calls in <tool_call> tags are calls."""
    text = text.encode(errors="replace").decode()
    calls: list[dict[str, Any]] = []
    for found in _CALL.findall(text):
        try:
            call = json.loads(found)
            name, arguments = str(call["name"]), json.dumps(call.get("arguments", {}))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        function = {"name": name, "arguments": arguments}
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message = {**message, "content": _CALL.sub("", text).strip(), "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "completion",
        "object": "chat.completion",
        "created": 0,
        "model": "policy",
        "choices": [choice],
        "usage": usage,
    }
