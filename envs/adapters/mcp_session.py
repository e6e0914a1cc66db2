"""A connection to an MCP server, over stdio or streamable HTTP, usable from any thread and loop.

The client wants to be opened and closed by one task of one event loop. So all connections of this
process live in a loop of their own, in a thread of their own.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loopwright.envs.adapters import background, foreign
from loopwright.envs.protocol import EnvError
from loopwright.envs.remote.plain import RemoteError

T = TypeVar("T")
_TIED = Path(__file__).with_name("far") / "tied.py"
_BAD_ARGUMENTS = (-32602, -32601)  # JSON-RPC: what the caller, here the agent, did wrong
_CONNECT_S = 30.0
_GRACE_S = 10.0  # for a connection to close, its process included


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Which server: an address, or a command."""

    url: str = ""
    command: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()  # of the command, beside a few inherited ones
    folder: str = ""  # where the command runs
    token_env: str = ""  # name of the variable that holds a bearer token for the address

    def __post_init__(self) -> None:
        if self.token_env and self.token_env not in os.environ:
            raise EnvError(f"mcp token_env: there is no variable {self.token_env}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise EnvError(f"mcp server {self.url!r}: expected http://… or a command as a list")
        if self.command and shutil.which(self.command[0]) is None:
            raise EnvError(f"mcp server {self.command[0]!r}: there is no such program")

    def __str__(self) -> str:
        return self.url or " ".join(self.command)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """The package's client of it, connected."""
        package = foreign.imported("mcp", "mcp", "mcp")
        async with contextlib.AsyncExitStack() as stack:
            transport: Any = self.url
            if self.command:
                tied = ["-I", "-S", str(_TIED), str(os.getpid()), *self.command]
                transport = package.StdioServerParameters(
                    command=sys.executable,
                    args=tied,
                    env=dict(self.variables),
                    cwd=self.folder or None,
                )
            elif self.token_env:
                http = foreign.imported("httpx2", "mcp", "mcp")
                headers = {"Authorization": f"Bearer {os.environ[self.token_env]}"}
                limits = http.Timeout(_CONNECT_S, read=None)  # calls have deadlines of their own
                within = http.AsyncClient(headers=headers, timeout=limits)
                streams = foreign.imported("mcp.client.streamable_http", "mcp", "mcp")
                opened = await stack.enter_async_context(within)
                transport = streams.streamable_http_client(self.url, http_client=opened)
            yield await stack.enter_async_context(package.Client(transport, cache=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a tool said. `failed`: the tool or its arguments were wrong."""

    text: str
    failed: bool = False


class Session:
    """One open connection, and with a command one process."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        """Connect and ask for the tools. Raises `RemoteError` if that does not work in time."""
        self._server, self._timeout_s = server, timeout_s
        self._client: Any = None
        self._task: asyncio.Task[Any] | None = None
        self._ends = asyncio.Event()
        self.broken = ""  # why no further call can be made
        foreign.imported("mcp", "mcp", "mcp")  # a missing package is said on the caller's thread
        ready: Future[None] = Future()
        self._life = background.run(self._live(ready))
        try:
            ready.result(timeout_s)
            self.tools: Sequence[Any] = self._run(self._listed(), "tools/list").result(timeout_s)
        except TimeoutError:
            self.close()
            raise RemoteError(f"mcp {server}: no answer within {timeout_s:g} s") from None
        except BaseException:
            self.close()
            raise

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Answer:
        """Call a tool. Raises `RemoteError` where the server failed, is gone or takes too long."""
        if self.broken:
            raise RemoteError(f"mcp {self._server}: {self.broken}")
        return await asyncio.wrap_future(self._run(self._called(name, dict(arguments)), name))

    def end(self) -> None:
        """Begin to end the connection and its process. Idempotent; waits for nothing."""
        self.broken = self.broken or "closed"
        background.loop().call_soon_threadsafe(self._ends.set)

    def close(self) -> None:
        """End the connection and its process, and wait until they have ended."""
        self.end()
        with contextlib.suppress(Exception):
            self._life.result(_GRACE_S)
        self._life.cancel()

    async def _live(self, ready: "Future[None]") -> None:
        self._task = asyncio.current_task()
        try:
            async with self._server.client() as self._client:
                ready.set_result(None)
                await self._ends.wait()
        except Exception as error:  # noqa: BLE001 whatever it is goes to who waits
            self.broken = f"the connection failed: {_reason(error)}"
            if not ready.done():
                ready.set_exception(RemoteError(f"mcp {self._server}: {self.broken}"))

    async def _listed(self) -> Sequence[Any]:
        found, cursor = [], None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found

    async def _called(self, name: str, arguments: dict[str, Any]) -> Answer:
        errors = foreign.imported("mcp", "mcp", "mcp")
        try:
            result = await self._client.call_tool(name, arguments)
        except errors.MCPError as error:
            if error.code in _BAD_ARGUMENTS:
                return Answer(text=error.message, failed=True)
            raise
        texts = [c.text if c.type == "text" else f"[{c.type}]" for c in result.content]
        if not texts and result.structured_content is not None:
            texts = [json.dumps(result.structured_content)]
        return Answer(text="\n".join(texts), failed=result.is_error)

    def _run(self, work: Coroutine[Any, Any, T], what: str) -> "Future[T]":
        return background.run(self._in_time(work, what))

    async def _in_time(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """The result, unless time or the connection ends first."""
        working = asyncio.ensure_future(work)
        both = {working, self._task} if self._task is not None else {working}
        await asyncio.wait(both, timeout=self._timeout_s, return_when="FIRST_COMPLETED")
        if not working.done():
            working.cancel()
            self.broken = self.broken or f"no answer to {what} within {self._timeout_s:g} s"
        elif (error := working.exception()) is None:
            return working.result()
        else:
            self.broken = self.broken or f"{what} failed: {_reason(error)}"
        raise RemoteError(f"mcp {self._server}: {self.broken}")


def _reason(error: BaseException) -> str:
    """What an exception says; of a group, its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
