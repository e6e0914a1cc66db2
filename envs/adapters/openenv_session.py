"""A session on an OpenEnv server: its pages, and its WebSocket, usable from any thread and loop."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import aiohttp

from loopwright.envs.adapters import background
from loopwright.envs.protocol import EnvError
from loopwright.envs.remote.plain import RemoteError

_LIMIT_BYTES = 64 << 20


class OpenEnvSession:
    """One WebSocket, opened by a reset and again by the next reset after it broke."""

    def __init__(self, url: str, timeout_s: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise EnvError(f"openenv url {url!r}: expected http://host:port")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def page(self, path: str) -> dict[str, Any]:
        """A page of the server as JSON. Raises `RemoteError`."""
        return background.run(self._got(path)).result()

    async def ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """One message and its answer. Raises `RemoteError`."""
        return await asyncio.wrap_future(background.run(self._asked(kind, data)))

    async def close(self) -> None:
        """End the session. Idempotent."""
        await asyncio.wrap_future(background.run(self._closed()))

    async def _got(self, path: str) -> dict[str, Any]:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                aiohttp.ClientSession() as http,
                http.get(self.url + path) as answer,
            ):
                answer.raise_for_status()
                return dict(await answer.json())
        except (TimeoutError, aiohttp.ClientError, TypeError, ValueError) as error:
            raise RemoteError(f"openenv {self.url}{path}: no answer ({error!r})") from error

    async def _asked(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        used = self._socket is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._socket is None:
                    if kind != "reset":
                        raise RemoteError(f"openenv {self.url}: the connection is gone")
                    self._http = aiohttp.ClientSession()
                    address = self.url.replace("http", "ws", 1) + "/ws"
                    self._socket = await self._http.ws_connect(address, max_msg_size=_LIMIT_BYTES)
                await self._socket.send_json({"type": kind, "data": data})
                return dict(await self._socket.receive_json())
        except (TimeoutError, aiohttp.ClientError, TypeError, ValueError) as error:
            await self._closed()
            if used and kind == "reset":  # the server has ended an idle session: a new one will do
                return await self._asked(kind, data)
            raise RemoteError(f"openenv {self.url}: {kind} failed ({error!r})") from error

    async def _closed(self) -> None:
        if self._socket is not None and not self._socket.closed:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                await self._socket.send_json({"type": "close"})
            await self._socket.close()
        if self._http is not None:
            await self._http.close()
        self._socket = self._http = None
