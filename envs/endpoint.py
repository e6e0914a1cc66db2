"""A client of an OpenAI-compatible endpoint: bounded in time and tries, standard library only.

What goes wrong is an `EndpointError`: a fault of the infrastructure, never an answer.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from typing import Any, TypeVar

from loopwright.envs.protocol import EnvError

T = TypeVar("T")
_BACKOFF_S = 0.2  # before the second try, doubled before each further one
_RETRIED = (408, 409, 425, 429)  # and everything from 500 on
_AT_ONCE = 64  # requests of one process under way; more wait for a thread
_SHOWN = 200  # characters of a refusal that an error repeats


class EndpointError(EnvError):
    """The endpoint is down, refuses, or answers something else than what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask. `url` ends where paths such as `/chat/completions` begin (mostly `…/v1`)."""

    url: str
    model: str = ""
    timeout_s: float = 30.0  # of one try
    tries: int = 3
    api_key_env: str = ""  # name of the environment variable that holds the key; empty: no key

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"endpoint url {self.url!r}: expected http://… or https://…")
        if self.timeout_s <= 0 or self.tries < 1:
            raise EndpointError(
                f"endpoint timeout_s {self.timeout_s}, tries {self.tries}: expected more than 0 s "
                "and at least 1 try"
            )
        if self.api_key_env and self.api_key_env not in os.environ:
            raise EndpointError(f"endpoint api_key_env: there is no variable {self.api_key_env}")

    def check(self, path: str = "/models") -> None:
        """Raise `EndpointError` if nothing answers there; any HTTP answer will do."""
        try:
            with urllib.request.urlopen(self._request(path, None), timeout=self.timeout_s):
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise EndpointError(
                    f"{self.url}{path}: HTTP {error.code}; set api_key_env"
                ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise EndpointError(
                f"{self.url}: nothing answers ({_reason(error)}); start the endpoint, or correct "
                "its url"
            ) from error

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The text of one chat completion. Raises `EndpointError`."""
        body = {
            "model": self.model,
            "messages": [dict(m) for m in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        answer = await self.post("/chat/completions", body)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{self.url}: no message in {str(answer)[:_SHOWN]!r}") from error
        if not isinstance(text, str):
            raise EndpointError(f"{self.url}: the message's content is {text!r}, expected text")
        return text

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a JSON body, at most `tries` times. Raises `EndpointError`."""
        return await self.aside(self.post_now, path, body)

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` on a thread of those that ask endpoints: it may wait for one."""
        return await asyncio.get_running_loop().run_in_executor(_threads(), work, *arguments)

    def post_now(self, path: str, body: Mapping[str, Any]) -> Any:
        """As `post`, on this thread."""
        problem = ""
        for attempt in range(1, self.tries + 1):
            try:
                return self._post(path, body)
            except urllib.error.HTTPError as error:
                shown = error.read(_SHOWN).decode(errors="replace")
                error.close()
                problem = f"HTTP {error.code} {shown!r}"
                if error.code not in _RETRIED and error.code < 500:
                    raise EndpointError(f"{self.url}{path}: {problem}") from error
            except (OSError, HTTPException, ValueError) as error:
                problem = _reason(error)
            if attempt < self.tries:
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        raise EndpointError(
            f"{self.url}{path}: {problem}, after {self.tries} tries of at most {self.timeout_s:g} s"
        )

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        with urllib.request.urlopen(self._request(path, body), timeout=self.timeout_s) as answer:
            return json.loads(answer.read())

    def _request(self, path: str, body: Mapping[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.url.rstrip("/") + path, data=data, headers=headers)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="endpoint")


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None)
    return str(inner if inner is not None else error) or type(error).__name__
