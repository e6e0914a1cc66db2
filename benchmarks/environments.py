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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from loopwright.actors.chat import ChatFormat
from loopwright.actors.engine import Completion, FinishReason, GenerateRequest
from loopwright.actors.env_worker import EnvWorker, EpisodeOrder, WorkerSettings
from loopwright.actors.episode import EpisodeLimits
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.records import Rollout, decode
from loopwright.envs import registry
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.officeworld.api import invoke
from loopwright.envs.officeworld.full.office import FullOffice, generate
from loopwright.envs.officeworld.state import Tables, World
from loopwright.envs.protocol import Task, encode_task

GROUP = 8  # rollouts of a task
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
    """A rollout actor that says what the oracle would, at once."""

    def __init__(self, chat: ChatFormat, actions: Mapping[str, list[str]]) -> None:
        stop = chat.stop_token_ids[0]
        self._said = {
            task_id: [
                np.asarray([*chat.tokenizer.encode(a, add_special_tokens=False), stop], np.int32)
                for a in texts
            ]
            for task_id, texts in actions.items()
        }

    async def __call__(self, request: GenerateRequest) -> Completion:
        """The next action of the session's task; yields once, as an engine would."""
        await asyncio.sleep(0)
        task_id = request.session.rpartition("/")[0].rpartition("/")[0]
        turn = int(request.request_id.rpartition("/")[2].partition(".")[0])
        tokens = self._said[task_id][turn]
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=np.zeros(tokens.size, np.float32),
            versions=np.zeros(tokens.size, np.int32),
            finish_reason=FinishReason.STOP,
        )

    async def cancel(self, request_id: str) -> bool:
        """Nothing waits here."""
        return False


async def episode_figures(count: int, name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Episodes of one worker process, in groups, at 1, 16 and 128 at a time, each time other tasks;
    the engine's answers are free: CPU milliseconds each, and episodes per second of the wall clock.
    What the oracle says is tokenized before, so that the figures are the worker's."""
    env = registry.load(name, options)
    tasks = list(itertools.islice(env.tasks("train", 0), 4 * count // GROUP))
    actions: dict[str, list[str]] = {}
    texts: list[str] = []
    for task in tasks:
        texts += [m.content for m in (await env.reset(task)).messages]
        actions[task.id] = list(env.oracle()) if name == "officeworld" else await said(env)
        texts += actions[task.id]
    await env.close()
    tasks = [task for task in tasks for _ in range(GROUP)]  # as training plays them
    label = " ".join([name, *map(str, options.values())])
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts[:400], vocab_size=4096).save_pretrained(folder)
        engine = Scripted(ChatFormat.load(folder), actions)
        settings = WorkerSettings(environment=name, options=options, tokenizer_path=folder)
        worker = EnvWorker(settings)
        await worker.start({0: engine})
        await play(worker, tasks[:count], 128)  # everything loaded, and every instance built
        for number, at_once in enumerate((1, 16, 128), 1):
            part = tasks[number * count : (number + 1) * count]
            cpu, wall = await play(worker, part, at_once)
            figures[f"{label}: {at_once} at once, CPU ms an episode"] = cpu / count * 1e3
            figures[f"{label}: {at_once} at once, episodes per wall s"] = count / wall
        turns = statistics.mean(map(len, actions.values()))
        figures[f"{label}: turns an episode"] = turns
        await worker.close()
    return figures


async def said(env: Any) -> list[str]:
    """What the oracle of the live task says, drawn between steps."""
    found = []
    for action in env.oracle():
        found.append(action)
        await env.step(action)
    return found


async def play(worker: EnvWorker, tasks: Sequence[Task], at_once: int) -> tuple[float, float]:
    """CPU and wall seconds of playing all tasks, so many at a time; each must be solved."""
    waiting = iter(enumerate(tasks))

    async def one_after_another() -> None:
        for number, task in waiting:
            order = EpisodeOrder(
                key=str(number),
                task=encode_task(task),
                attempt=0,
                engine=0,
                seed=0,
                priority=number,
                limits=LIMITS,
            )
            outcome = await worker.play(order)
            assert isinstance(outcome, bytes)
            rollout: Rollout = decode(outcome)
            if rollout.fault or not rollout.success:
                raise RuntimeError(rollout.fault or "the oracle solves every task")

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return time.process_time() - cpu, time.perf_counter() - wall


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
    full = {"style": "full"}
    figures = {
        "state": state_figures(chosen.calls),
        "calls": call_figures(chosen.calls),
        "episodes": {
            **await episode_figures(
                chosen.episodes, "officeworld", full | {"action_format": "json"}
            ),
            **await episode_figures(
                chosen.episodes, "officeworld", full | {"action_format": "code"}
            ),
            **await episode_figures(chosen.episodes, "search", {"style": "full"}),
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
