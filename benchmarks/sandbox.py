"""What confining model-written code costs: the seccomp zygote against a bare subprocess per cell,
an in-process `exec`, and pydantic-monty where it is installed.

    python benchmarks/sandbox.py [--cells 200] [--sessions 40]

Each figure is the median of single measurements in the same run, so the ratios hold on any machine.
"""

import argparse
import asyncio
import importlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loopwright.envs.sandbox import Session, Zygote

CELL = "total = sum(n * n for n in range(10)); print(total)"


def answer(_name: str, _arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """A world that costs nothing."""
    return {"value": 1}


async def timed(count: int, action: Callable[[], Awaitable[Any]]) -> float:
    """Median microseconds of `action`."""
    found = []
    for _ in range(count):
        before = time.perf_counter()
        await action()
        found.append((time.perf_counter() - before) * 1e6)
    return statistics.median(found)


async def zygote_figures(cells: int, sessions: int) -> dict[str, float]:
    """Start, session, first cell, cell, API call of the zygote, in microseconds."""
    zygote = Zygote()
    before = time.perf_counter()
    zygote.session().close()
    start = (time.perf_counter() - before) * 1e6
    opened: list[Session] = []

    async def open_one() -> None:
        opened.append(zygote.session())

    session_us = await timed(sessions, open_one)
    waiting = iter(opened)

    async def first_cell() -> None:
        await next(waiting).run(CELL, answer)

    first_us = await timed(sessions, first_cell)
    session = opened[0]

    async def cell() -> None:
        await session.run(CELL, answer)

    async def hundred_calls() -> None:
        await session.run("for _ in range(100): apis.a.b(c=1)", answer)

    figures = {
        "zygote start us": start,
        "zygote session us": session_us,
        "zygote first cell us": first_us,
        "zygote cell us": await timed(cells, cell),
        "zygote API call us": await timed(max(3, cells // 20), hundred_calls) / 100,
    }
    for session in opened:
        session.close()
    zygote.close()
    return figures


async def bare_subprocess() -> None:
    """A new Python per cell: no confinement, no variables kept."""
    subprocess.run([sys.executable, "-I", "-S", "-c", CELL], check=True, capture_output=True)


async def in_process() -> None:
    """`exec`: no confinement at all, the lower bound."""
    exec(compile(CELL.replace("print", "str"), "<cell>", "exec"), {})


async def monty_figures(cells: int, sessions: int) -> dict[str, float]:
    """Session and cell of pydantic-monty, an interpreter in Rust (its own worker processes); empty
    if it is not installed."""
    if importlib.util.find_spec("pydantic_monty") is None:
        return {}
    module = importlib.import_module("pydantic_monty")
    with module.Monty() as pool:

        async def session() -> None:
            with pool.checkout() as opened:
                opened.feed_run("1")

        opened_us = await timed(sessions, session)
        with pool.checkout() as kept:

            async def cell() -> None:
                kept.feed_run(CELL.replace("print(total)", "total"))

            cell_us = await timed(cells, cell)
    return {"monty session and first cell us": opened_us, "monty cell us": cell_us}


async def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--sessions", type=int, default=40)
    chosen = parser.parse_args()
    figures = await zygote_figures(chosen.cells, chosen.sessions)
    figures["bare subprocess cell us"] = await timed(max(5, chosen.cells // 20), bare_subprocess)
    figures["in-process exec cell us"] = await timed(chosen.cells, in_process)
    figures |= await monty_figures(chosen.cells, chosen.sessions)
    ratio = figures["bare subprocess cell us"] / figures["zygote cell us"]
    figures["bare subprocess / zygote cell"] = ratio
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures["host CPU s"] = usage.ru_utime + usage.ru_stime
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
