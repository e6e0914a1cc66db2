"""The client of `loopwright envs serve`: an environment named by its address.

    [environment]
    name = "http://127.0.0.1:8790"

A server that is down, full or gone in the middle is an infrastructure fault; `LOOPWRIGHT_ENV_TOKEN`
holds the server's token, if it wants one.
"""

import asyncio
import contextlib
import http.client
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgpack

from loopwright.envs.protocol import EnvSpec, Observation, Step, Task, TaskError, Verdict
from loopwright.envs.remote.plain import (
    RemoteError,
    observation_from,
    plain,
    spec_from,
    step_from,
    task_from,
    verdict_from,
)

TOKEN_VARIABLE = "LOOPWRIGHT_ENV_TOKEN"
_TASKS_AT_ONCE = 64


class HttpEnv:
    """One session on a server. One kept-alive connection; blocking calls run on threads."""

    def __init__(self, url: str, call_timeout_s: float = 60.0) -> None:
        """Asks for the declaration at once. Raises `RemoteError` if nobody answers."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RemoteError(f"environment {url!r}: expected http://host:port")
        self._url = url.rstrip("/")
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._connection = kind(parts.hostname, parts.port, timeout=call_timeout_s)
        self._prefix = parts.path.rstrip("/")
        self._session = ""
        self.spec: EnvSpec = spec_from(self._ask("GET", "/spec"), self._url)

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The server's stream, drawn some at a time."""
        start = 0
        while True:
            wanted = {"split": split, "seed": seed, "start": start, "count": _TASKS_AT_ONCE}
            found = self._ask("POST", "/tasks", wanted)
            for data in found:
                yield task_from(data, self.spec.name, split, self._url)
            start += len(found)
            if len(found) < _TASKS_AT_ONCE:
                return

    async def reset(self, task: Task) -> Observation:
        """Start the task in this session, or in a new one if the server has forgotten it."""
        if self._session:
            try:
                return observation_from(await self._do("reset", task=plain(task)), self._url)
            except RemoteError:
                self._session = ""
        data = await asyncio.to_thread(self._ask, "POST", "/sessions", {"task": plain(task)})
        self._session = str(data["session"])
        return observation_from(data["observation"], self._url)

    async def step(self, action: str) -> Step:
        """One action over there."""
        data = await self._do("step", action=action.encode("utf-8", "surrogatepass"))
        return step_from(data, self._url)

    async def evaluate(self) -> Verdict:
        """The grade over there."""
        return verdict_from(await self._do("evaluate"), self._url)

    def oracle(self) -> Iterator[str]:
        """The server's oracle, one action at a time."""
        while (action := self._ask("POST", f"/sessions/{self._session}/oracle", {})) is not None:
            yield str(action)

    async def close(self) -> None:
        """End the session. Idempotent."""
        if self._session:
            with contextlib.suppress(RemoteError):  # the server closes idle sessions itself
                await self._do("close")
            self._session = ""
        self._connection.close()

    async def _do(self, verb: str, **data: Any) -> Any:
        if not self._session:
            raise RemoteError(f"{self._url}: {verb} before reset")
        path = f"/sessions/{self._session}/{verb}"
        return await asyncio.to_thread(self._ask, "POST", path, data)

    def _ask(self, method: str, path: str, data: Any = None) -> Any:
        headers = {"Content-Type": "application/msgpack"}
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        body = None if data is None else msgpack.packb(data, unicode_errors="surrogatepass")
        try:
            self._connection.request(method, f"{self._prefix}{path}", body, headers)
            answer = self._connection.getresponse()
            content = msgpack.unpackb(answer.read(), unicode_errors="surrogatepass")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise RemoteError(
                f"{self._url}{path}: no answer ({error!r}); is `loopwright envs serve` running?"
            ) from error
        if answer.status != 200:
            kind, text = content.get("kind", ""), content.get("error", answer.reason)
            if kind == "task":
                raise TaskError(text)
            raise RemoteError(f"{self._url}{path}: HTTP {answer.status}: {text}")
        return content["value"]
