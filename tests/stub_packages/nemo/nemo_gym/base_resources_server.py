"""Stub: a server is a model with a configuration, and makes a web application."""

import uuid
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class BaseResourcesServerConfig(BaseModel):
    """What a server must be told."""

    host: str
    port: int
    entrypoint: str
    name: str


class SimpleResourcesServer(BaseModel):
    """Routes by session."""

    config: BaseResourcesServerConfig
    server_client: Any

    def setup_webserver(self) -> Starlette:
        """`/seed_session`, `/verify` and a tool for every other path."""

        async def answer(request: Request) -> JSONResponse:
            body = await request.json()
            path, session = request.path_params["path"], request.cookies.get("session")
            session = session or uuid.uuid4().hex
            if path == "seed_session":
                response = JSONResponse(self.seed(session))
            elif path == "verify":
                response = JSONResponse({**body, "reward": self.verify(body)})
            else:
                response = JSONResponse(*self.tool(session, path, body))
            response.set_cookie("session", session)
            return response

        return Starlette(routes=[Route("/{path}", answer, methods=["POST"])])
