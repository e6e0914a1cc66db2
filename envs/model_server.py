"""An OpenAI-compatible address for the policy of one episode: for programs that run whole agent
harnesses, which speak HTTP.

    async def run(self, task, model):
        async with serving(model) as url:  # http://127.0.0.1:…/v1
            await self.harness(task, base_url=url)

`POST /v1/chat/completions`, streamed or not, and `GET /v1/models`. Where tools are given, a turn
that is a JSON tool call comes back as `tool_calls`; when the client sends it again, the policy's
own words stand in its place, so the conversation is continued, not tokenized anew. Sampling
settings of the client are ignored: training decides on them.
"""

import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from loopwright.envs.actions import Call, parse_action, render_action
from loopwright.envs.program import Model
from loopwright.envs.protocol import Message

_LIMIT_BYTES = 64 << 20
_ROLES = {"developer": "system", "function": "tool"}  # others are kept


class BadRequest(Exception):
    """What the client sent is no chat request; the text says why."""


@contextlib.asynccontextmanager
async def serving(model: Model) -> AsyncIterator[str]:
    """The address, for as long as the block lasts. Only this machine reaches it."""
    app = web.Application(client_max_size=_LIMIT_BYTES)
    front = _Front(model)
    app.router.add_post("/v1/chat/completions", front.complete)
    app.router.add_get("/v1/models", front.models)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        listening = socket.create_server(("127.0.0.1", 0))  # cleanup closes it
        await web.SockSite(runner, listening).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        await runner.cleanup()


class _Front:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._said: dict[str, str] = {}  # id of a tool call -> the policy's own words
        self._answers = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        try:
            data = json.loads(await request.read())
            messages, tools = self._messages(data), tuple(data.get("tools") or ())
        except (BadRequest, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = {"message": f"not a chat request: {error}", "type": "invalid_request_error"}
            return web.json_response({"error": problem}, status=400)
        text = await self._model.chat(messages, tools)
        self._answers += 1
        message = self._message(text, with_tools=bool(tools))
        finish = "tool_calls" if "tool_calls" in message else "stop"
        head = {"id": f"chat-{self._answers}", "created": int(time.time()), "model": "policy"}
        if data.get("stream"):
            return await self._streamed(request, head, message, finish)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return web.json_response({**head, "object": "chat.completion", "choices": [choice]})

    def _messages(self, data: Mapping[str, Any]) -> list[Message]:
        if not data["messages"]:
            raise BadRequest("'messages' is empty")
        return [self._read(m) for m in data["messages"]]

    def _read(self, given: Mapping[str, Any]) -> Message:
        role, content = str(given["role"]), given.get("content") or ""
        if isinstance(content, list):
            odd = [part.get("type") for part in content if part.get("type") != "text"]
            if odd:
                raise BadRequest(f"content of type {odd[0]!r}: the policy reads text alone")
            content = "".join(part["text"] for part in content)
        for call in given.get("tool_calls") or ():
            if call["id"] in self._said:
                return Message(role=role, content=self._said[call["id"]])
            named = call["function"]
            made = Call(name=named["name"], arguments=json.loads(named["arguments"] or "{}"))
            content += render_action(made, "json")
        return Message(role=_ROLES.get(role, role), content=str(content))

    def _message(self, text: str, *, with_tools: bool) -> dict[str, Any]:
        call = parse_action(text, "json") if with_tools else None
        if not isinstance(call, Call):
            return {"role": "assistant", "content": text}
        name = f"call_{self._answers}"
        self._said[name] = text
        function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
        made = {"id": name, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [made]}

    async def _streamed(
        self, request: web.Request, head: dict[str, Any], message: dict[str, Any], finish: str
    ) -> web.StreamResponse:
        """The same as server-sent events: all of it in one piece, since a turn is whole when it is
        known."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        calls = [{"index": i, **c} for i, c in enumerate(message.get("tool_calls", ()))]
        delta = {**message, "tool_calls": calls} if calls else message
        for part, reason in ((delta, None), ({}, finish)):
            choice = {"index": 0, "delta": part, "finish_reason": reason}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
