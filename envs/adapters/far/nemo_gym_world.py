"""The far side of NeMo-Gym: a resources server of the package, asked in its own protocol.

A resources server is a web application: `POST /seed_session`, then a `POST` to each tool's name,
then `POST /verify` with what the agent did as an OpenAI response. It is called here without a
socket.
Needs `nemo-gym` (Python 3.12 or newer).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import json
import pathlib
import random
import sys
import zlib
from collections.abc import Iterator
from typing import Any

REMEDY = f"{sys.executable} -m pip install 'nemo-gym>=0.4,<0.5'   (it wants Python 3.12 or newer)"


@functools.cache
def _application(server: str) -> Any:
    """The web application of a resources server. Raises `ImportError` with the remedy."""
    try:
        base = importlib.import_module("nemo_gym.base_resources_server")
        package = importlib.import_module("resources_servers")
    except ImportError as error:
        raise ImportError(
            f"NeMo-Gym is not in this interpreter ({error}); remedy: {REMEDY}"
        ) from None
    folders = sorted(p.parent.name for p in pathlib.Path(package.__path__[0]).glob("*/app.py"))
    if server not in folders:
        near = difflib.get_close_matches(server, folders, n=3) or folders
        raise ValueError(
            f"NeMo-Gym resources server {server!r}: unknown; nearest: {', '.join(near)}"
        )
    module = importlib.import_module(f"resources_servers.{server}.app")
    classes: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base.SimpleResourcesServer)
        and value.__module__ == module.__name__
    ]
    config = classes[0].model_fields["config"].annotation
    settings = {"host": "127.0.0.1", "port": 0, "entrypoint": "app.py", "name": server}
    made = classes[0].model_construct(config=config(**settings), server_client=None)
    return made.setup_webserver()


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The tasks of a file, one JSON object a line. Raises `ValueError` with the line's number."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                row["responses_create_params"]["input"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no task of NeMo-Gym: {error!r}") from None
            rows.append(row)
    return rows


@functools.cache
def _splits(server: str, data: str, test_data: str) -> dict[str, list[dict[str, Any]]]:
    """The tasks of both splits: of two files, or every fourth of one held out."""
    if not data:
        module = importlib.import_module(f"resources_servers.{server}")
        data = str(pathlib.Path(module.__path__[0]) / "data" / "example.jsonl")
    rows = _rows(pathlib.Path(data).expanduser())
    if test_data:
        return {"train": rows, "test": _rows(pathlib.Path(test_data).expanduser())}
    return {
        "train": [row for i, row in enumerate(rows) if i % 4],
        "test": [row for i, row in enumerate(rows) if i % 4 == 0],
    }


class World:
    """One session of a resources server."""

    def __init__(
        self,
        server: str = "workplace_assistant",
        data: str = "",
        test_data: str = "",
        max_turns: int = 10,
    ) -> None:
        self._server, self._max_turns = server, max_turns
        self._app = _application(server)
        self._splits = _splits(server, data, test_data)
        self._data = zlib.crc32(json.dumps(self._splits, sort_keys=True).encode())
        self._http: Any = None

    def spec(self) -> dict[str, Any]:
        """What is declared."""
        version = importlib.metadata.version("nemo-gym")
        return {
            "name": "nemo_gym",
            "version": f"{version}+{self._server}.{self._data:x}",
            "description": f"NeMo-Gym {self._server}: tools of a stateful world, its own verifier.",
            "max_turns": self._max_turns,
        }

    def tasks(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """The split's tasks, over and over, in another order each time."""
        count = len(self._splits[split])
        rng = random.Random(f"{split}/{seed}")
        while count:
            for index in rng.sample(range(count), count):
                category = str(self._splits[split][index].get("category", self._server))
                yield {
                    "id": f"{split}-{index}",
                    "seed": 2 * index + (split == "test"),
                    "scenario": category,
                    "payload": {"index": index},
                }

    async def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """A new session; the input and the tools of the task."""
        httpx = importlib.import_module("httpx")
        await self.close()
        self._row = self._splits[task["split"]][task["payload"]["index"]]
        transport = httpx.ASGITransport(app=self._app)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://nemo-gym")
        self._done: list[dict[str, Any]] = []
        asked = self._row["responses_create_params"]
        await self._post("/seed_session", self._row)
        given = asked["input"]
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        tools: list[dict[str, Any]] = [
            {
                "type": "function",
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description") or tool["name"],
                    "parameters": tool.get("parameters") or {"type": "object", "properties": {}},
                },
            }
            for tool in asked.get("tools", ())
        ]
        self._tools = {tool["function"]["name"] for tool in tools}
        messages = [{"role": m["role"], "content": _text(m["content"])} for m in given]
        return {"messages": messages, "tools": tools}

    async def step(self, text: str) -> dict[str, Any]:
        """One call, `{"name", "arguments"}`, of a tool of this task; or `{"answer"}`, the end."""
        action = json.loads(text)
        if "answer" in action:
            content = [{"type": "output_text", "text": action["answer"], "annotations": []}]
            message: dict[str, Any] = {
                "type": "message",
                "id": "msg",
                "role": "assistant",
                "status": "completed",
            }
            self._done.append({**message, "content": content})
            return {"messages": [], "terminated": True}
        name, arguments = action["name"], action["arguments"]
        if name not in self._tools:
            near = difflib.get_close_matches(name[:60], self._tools, n=1)
            hint = f"did you mean {near[0]}?" if near else "see the list of tools"
            return _told(f"error: there is no such tool; {hint}", "tool_error/unknown_tool")
        answer = await self._http.post(f"/{name}", json=arguments)
        if answer.status_code >= 500:
            raise RuntimeError(f"{name}: HTTP {answer.status_code}: {answer.text[:500]}")
        call = f"call_{len(self._done)}"
        told = _output(answer)
        written = json.dumps(arguments)
        item = {"type": "function_call", "call_id": call, "name": name, "arguments": written}
        self._done.append(item)
        self._done.append({"type": "function_call_output", "call_id": call, "output": told})
        failed = answer.status_code >= 400 or told.startswith("Error executing tool")
        return _told(told, "tool_error/failed" if failed else "")

    async def evaluate(self) -> dict[str, Any]:
        """What the server's verifier says of what was done."""
        response = {
            "id": "resp",
            "created_at": 0.0,
            "model": "policy",
            "object": "response",
            "output": self._done,
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": self._row["responses_create_params"].get("tools", []),
        }
        reward = float((await self._post("/verify", {**self._row, "response": response}))["reward"])
        return {"reward": reward, "success": reward >= 0.999, "parts": {"reward": reward}}

    def oracle(self) -> Iterator[str]:
        """The calls that the data calls the truth, and an empty answer."""
        truth = self._row.get("ground_truth")
        if isinstance(truth, list) and all(isinstance(c, dict) and "arguments" in c for c in truth):
            for call in truth:
                arguments = json.loads(call["arguments"])
                yield json.dumps({"name": call["name"], "arguments": arguments})
            yield json.dumps({"name": "finish", "arguments": {}})

    async def close(self) -> None:
        """Forget the session."""
        if self._http is not None:
            await self._http.aclose()
        self._http = None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post(path, json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: HTTP {answer.status_code}: {answer.text[:500]}")
        return dict(answer.json())


def _output(answer: Any) -> str:
    """What a tool's answer says."""
    try:
        data = answer.json()
    except ValueError:
        return str(answer.text)
    found = data.get("output", data) if isinstance(data, dict) else data
    return found if isinstance(found, str) else json.dumps(found)


def _text(content: Any) -> str:
    """A message's content as text."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def _told(text: str, signal: str) -> dict[str, Any]:
    message = {"role": "tool", "content": text}
    return {"messages": [message], "signals": {signal: 1} if signal else {}}
