"""What the full office costs: reset, API calls, snapshot and diff against an in-memory SQLite of
the same tables and against plain Python; whole episodes of one worker process; code cells.

    python benchmarks/environments.py [--calls 2000] [--episodes 128]

CPU seconds of this process, so the figures hold on a busy machine; wall seconds where a process is
waited for. Prints one JSON object.
"""

import argparse
import asyncio
import copy
import itertools
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from loopwright.actors.chat import ChatFormat
from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.officeworld.api import invoke
from loopwright.envs.officeworld.full.office import FullOffice, generate
from loopwright.envs.officeworld.state import Tables, World
from loopwright.envs.protocol import Task

LIMITS = EpisodeLimits(
    max_turns=50, max_new_tokens=4096, max_context=1 << 20, timeout_s=600, temperature=1.0
)


def cpu_us(count: int, action: Callable[[], Any]) -> float:
    """CPU microseconds of one `action`: the least mean of three batches."""
    means = []
    for _ in range(3):
        before = time.process_time()
        for _ in range(count):
            action()
        means.append((time.process_time() - before) / count * 1e6)
    return min(means)


def sqlite_of(tables: Tables) -> sqlite3.Connection:
    """The same rows in memory, one JSON column beside the id and an index on it: what a database
    would hold."""
    connection = sqlite3.connect(":memory:")
    for table, rows in tables.items():
        connection.execute(f'create table "{table}" (id integer primary key, row text)')
        data = [(i, json.dumps(dict(row))) for i, row in rows.items()]
        connection.executemany(f'insert into "{table}" values (?, ?)', data)
    connection.commit()
    return connection


def state_figures(calls: int) -> dict[str, float]:
    """Reset, snapshot, diff and reads: overlay, SQLite, deep copy."""
    base = generate(0, 120)
    world = World(base)
    events = [i for i, _ in world.rows("events")][:12]

    def touch(touched: World) -> None:
        for row_id in events:
            touched.update("events", row_id, title="changed")

    touch(world)
    image = sqlite_of(base).serialize()
    other = sqlite3.connect(":memory:")
    other.deserialize(image)
    ids = itertools.cycle(events)
    read = "select row from events where id = ?"
    return {
        "rows": float(sum(map(len, base.values()))),
        "base generated once, CPU ms": cpu_us(3, lambda: generate.__wrapped__(0, 120)) / 1e3,
        "reset overlay us": cpu_us(calls, lambda: World(base)),
        "reset SQLite deserialize us": cpu_us(
            50, lambda: sqlite3.connect(":memory:").deserialize(image)
        ),
        "reset deepcopy us": cpu_us(2, lambda: copy.deepcopy(base)),
        "snapshot overlay us": cpu_us(calls, world.snapshot),
        "diff overlay us": cpu_us(calls, world.diff),
        "read overlay us": cpu_us(calls, lambda: world.get("events", next(ids))),
        "read SQLite us": cpu_us(
            calls, lambda: json.loads(other.execute(read, (next(ids),)).fetchone()[0])
        ),
        "read dict us": cpu_us(calls, lambda: base["events"][next(ids)]),
    }  # fmt: skip


def call_figures(calls: int) -> dict[str, float]:
    """API calls through all checks, against the bare work in plain Python and SQLite."""
    env = OfficeWorld(style="full")
    task = next(env.tasks("train", 0))
    edition = FullOffice()
    _, office = edition.open(task, 1, 120)
    office.tokens["t"] = "calendar"
    dialect = office.dialect
    events = [i for i, _ in office.world.rows("events")]
    ids = itertools.cycle(events)

    def shown(api: str, **given: Any) -> tuple[str, dict[str, Any]]:
        names = dialect.names(api)
        return dialect.shown[api], {names[k]: v for k, v in {**given, "access_token": "t"}.items()}

    show, show_given = shown("calendar.show_event", event_id=0)
    label = dialect.names("calendar.show_event")["event_id"]
    rows, row_given = shown("calendar.list_events")
    base = office.world
    database = sqlite_of(generate(0, 120))
    page = "select id, row from events order by id limit 6"

    def plain_list() -> Any:
        return [{"id": i, **row} for i, row in itertools.islice(base.rows("events"), 6)]

    figures = {
        "call show us": cpu_us(
            calls, lambda: invoke(office, show, {**show_given, label: next(ids)})
        ),
        "call list us": cpu_us(calls, lambda: invoke(office, rows, row_given)),
        "plain show us": cpu_us(calls, lambda: {"id": 0, **(base.get("events", next(ids)) or {})}),
        "plain list us": cpu_us(calls, plain_list),
        "SQLite list us": cpu_us(
            calls, lambda: [(i, json.loads(row)) for i, row in database.execute(page)]
        ),
    }
    both = (figures["call show us"] + figures["call list us"]) / 2
    return {**figures, "API calls per CPU s": 1e6 / both}


class Scripted:
    """A policy that says what the oracle would: the engine's side of the real episode loop."""

    def __init__(self, chat: ChatFormat, actions: Mapping[str, list[str]]) -> None:
        self._chat = chat
        self._actions = actions

    async def __call__(self, request: GenerateRequest) -> Completion:
        """The next action of the session's task, as tokens; yields once, as an engine would."""
        await asyncio.sleep(0)
        task_id = request.session.rpartition("/")[0].rpartition("/")[0]
        turn = int(request.request_id.rpartition("/")[2].partition(".")[0])
        text = self._actions[task_id][turn]
        ids = [*self._chat.tokenizer.encode(text, add_special_tokens=False)]
        tokens = np.asarray([*ids, self._chat.stop_token_ids[0]], np.int32)
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=np.zeros(tokens.size, np.float32),
            versions=np.zeros(tokens.size, np.int32),
            finish_reason=FinishReason.STOP,
        )


async def episode_figures(count: int, action_format: Any) -> dict[str, float]:
    """Episodes per CPU second of one process at 1, 16 and 128 at a time."""
    env = OfficeWorld(style="full", action_format=action_format)
    tasks = list(itertools.islice(env.tasks("train", 0), count))
    actions: dict[str, list[str]] = {}
    texts: list[str] = []
    for task in tasks:
        texts += [m.content for m in (await env.reset(task)).messages]
        actions[task.id] = list(env.oracle())
        texts += actions[task.id]
    chat = ChatFormat(train_tokenizer(texts[:400], vocab_size=4096))
    engine = Scripted(chat, actions)
    figures: dict[str, float] = {}
    for at_once in (1, 16, 128):
        envs = [OfficeWorld(style="full", action_format=action_format) for _ in range(at_once)]
        waiting, rewards = iter(tasks), list[float]()

        async def play(env: OfficeWorld, waiting: Any = waiting, rewards: Any = rewards) -> None:
            for task in waiting:
                rewards.append(await _episode(env, task, engine, chat))

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(play(env) for env in envs))
        used = time.process_time() - cpu
        for env in envs:
            await env.close()
        assert rewards == [1.0] * count, "the oracle solves every task"
        figures[f"{action_format}: {at_once} at once, CPU ms an episode"] = used / count * 1e3
        figures[f"{action_format}: {at_once} at once, episodes per wall s"] = count / (
            time.perf_counter() - wall
        )
    return figures


async def _episode(env: OfficeWorld, task: Task, engine: Scripted, chat: ChatFormat) -> float:
    rollout = await play_episode(env, task, 0, engine, chat, LIMITS, seed=0, priority=0)
    if rollout.fault:
        raise RuntimeError(rollout.fault)
    return rollout.reward


async def cell_figures(count: int) -> dict[str, float]:
    """A cell of the environment against a bare Python process per cell, wall microseconds."""
    env = OfficeWorld(style="full", action_format="code")
    await env.reset(next(env.tasks("train", 0)))

    async def cell() -> float:
        before = time.perf_counter()
        await env.step("```python\nx = 1\n```")
        return (time.perf_counter() - before) * 1e6

    def bare() -> float:
        before = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", "x = 1"], check=True)
        return (time.perf_counter() - before) * 1e6

    await cell()
    ours = statistics.median([await cell() for _ in range(count)])
    theirs = statistics.median([bare() for _ in range(max(5, count // 20))])
    await env.close()
    return {"code cell us": ours, "bare subprocess cell us": theirs, "ratio": theirs / ours}


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=128)
    chosen = parser.parse_args()
    figures = {
        "state": state_figures(chosen.calls),
        "calls": call_figures(chosen.calls),
        "episodes": {
            **await episode_figures(chosen.episodes, "json"),
            **await episode_figures(chosen.episodes, "code"),
        },
        "cells": await cell_figures(200),
    }
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    figures["process"] = {
        "CPU s": own.ru_utime + children.ru_utime,
        "peak MB": own.ru_maxrss / 1024,
    }
    print(
        json.dumps(
            {k: {n: round(v, 3) for n, v in f.items()} for k, f in figures.items()}, indent=1
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
