"""`loopwright envs serve`: an environment behind HTTP, for workers that cannot hold it themselves.

msgpack both ways, the same protocol: `GET /spec`, `POST /tasks`, `POST /sessions` (reset), then
`/sessions/ID/step | evaluate | oracle | close`. A session that nobody has used for `idle_s` is
closed. With a token, requests must carry it (`Authorization: Bearer …`).
"""

import asyncio
import contextlib
import hmac
import itertools
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
from aiohttp import web

from loopwright.envs.protocol import Task, TaskError
from loopwright.envs.registry import Environment
from loopwright.envs.remote.plain import plain

_LIMIT_BYTES = 64 << 20
_SWEEPS_S = 10.0


@dataclass(slots=True)
class _Session:
    env: Environment
    used: float = field(default_factory=time.monotonic)
    oracle: Iterator[str] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class EnvServer:
    """Sessions of one environment."""

    def __init__(
        self,
        make: Callable[[], Environment],
        *,
        token: str = "",
        max_sessions: int = 256,
        idle_s: float = 600.0,
    ) -> None:
        self._make = make
        self._first = make()
        self._token, self._max_sessions, self._idle_s = token, max_sessions, idle_s
        self._sessions: dict[str, _Session] = {}
        self._spare: list[Environment] = []

    def app(self) -> web.Application:
        """The aiohttp application; closes every session when it ends."""
        app = web.Application(client_max_size=_LIMIT_BYTES)
        app.router.add_get("/spec", self._answer(self._spec))
        app.router.add_post("/tasks", self._answer(self._tasks))
        app.router.add_post("/sessions", self._answer(self._open))
        for name in ("step", "evaluate", "oracle", "close", "reset"):
            handler = self._answer(getattr(self, f"_{name}"))
            app.router.add_post(f"/sessions/{{session}}/{name}", handler)
        app.cleanup_ctx.append(self._life)
        return app

    def _answer(
        self, handle: Callable[[web.Request, Any], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            given = request.headers.get("Authorization", "")
            if self._token and not hmac.compare_digest(given, f"Bearer {self._token}"):
                return _packed({"error": "this server wants its token", "kind": "refused"}, 401)
            try:
                data = msgpack.unpackb(await request.read()) if request.can_read_body else {}
                return _packed({"value": await handle(request, data)}, 200)
            except KeyError as error:
                return _packed({"error": f"no session or field {error}", "kind": "gone"}, 404)
            except TaskError as error:
                return _packed({"error": str(error), "kind": "task"}, 422)
            except _Full as error:
                return _packed({"error": str(error), "kind": "full"}, 503)
            except Exception:  # noqa: BLE001 what an environment raises goes back to who asked
                return _packed({"error": traceback.format_exc(), "kind": "raised"}, 500)

        return answer

    async def _life(self, app: web.Application) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(self._sweep())
        yield
        sweeping.cancel()
        for session in [*self._sessions.values()]:
            await session.env.close()
        for env in (self._first, *self._spare):
            await env.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEPS_S, self._idle_s))
            for name, session in list(self._sessions.items()):
                if time.monotonic() - session.used > self._idle_s and not session.lock.locked():
                    del self._sessions[name]
                    with contextlib.suppress(Exception):
                        await session.env.close()

    async def _spec(self, request: web.Request, data: Any) -> Any:
        return plain(self._first.spec)

    async def _tasks(self, request: web.Request, data: Any) -> Any:
        start, count = int(data["start"]), min(int(data["count"]), 1000)
        stream = self._first.tasks(str(data["split"]), int(data["seed"]))
        return [plain(task) for task in itertools.islice(stream, start, start + count)]

    async def _open(self, request: web.Request, data: Any) -> Any:
        if len(self._sessions) >= self._max_sessions:
            raise _Full(f"{self._max_sessions} sessions are open, the most this server holds")
        name = secrets.token_hex(8)
        session = _Session(self._spare.pop() if self._spare else self._make())
        self._sessions[name] = session
        observation = await session.env.reset(Task(**data["task"]))
        return {"session": name, "observation": plain(observation)}

    async def _reset(self, request: web.Request, data: Any) -> Any:
        async with self._used(request) as session:
            session.oracle = None
            return plain(await session.env.reset(Task(**data["task"])))

    async def _step(self, request: web.Request, data: Any) -> Any:
        async with self._used(request) as session:
            action = data["action"].decode("utf-8", "surrogatepass")
            return plain(await session.env.step(action))

    async def _evaluate(self, request: web.Request, data: Any) -> Any:
        async with self._used(request) as session:
            return plain(await session.env.evaluate())

    async def _oracle(self, request: web.Request, data: Any) -> Any:
        async with self._used(request) as session:
            session.oracle = session.oracle or session.env.oracle()
            return next(session.oracle, None)

    async def _close(self, request: web.Request, data: Any) -> Any:
        session = self._sessions.pop(request.match_info["session"], None)
        if session is not None:
            self._spare.append(session.env)

    @contextlib.asynccontextmanager
    async def _used(self, request: web.Request) -> AsyncIterator[_Session]:
        session = self._sessions[request.match_info["session"]]
        async with session.lock:
            session.used = time.monotonic()
            yield session


class _Full(Exception):
    """No room for another session."""


def _packed(data: Any, status: int) -> web.Response:
    body = msgpack.packb(data, unicode_errors="surrogatepass")
    return web.Response(body=body, status=status, content_type="application/msgpack")
