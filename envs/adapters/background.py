"""An event loop of this process in a thread of its own, for connections that must be opened, used
and closed in one loop while episodes come and go in others, and while oracles ask without any."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def loop() -> asyncio.AbstractEventLoop:
    """That loop; it runs until the process ends."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="env-connections", daemon=True).start()
    return made


def run(work: Coroutine[Any, Any, T]) -> "Future[T]":
    """Start the work in that loop; its result."""
    return asyncio.run_coroutine_threadsafe(work, loop())
