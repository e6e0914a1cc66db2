"""Rules of what an episode leaves behind: after a cancellation, in memory, in what it tells."""

import asyncio
import gc
import os
import re
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Sequence

from loopwright.envs.conformance.held import Held, descendants, resident_bytes
from loopwright.envs.conformance.kit import Kit, transcript
from loopwright.envs.conformance.noise import hostile
from loopwright.envs.protocol import HasAnswers, Message, Task
from loopwright.envs.registry import Environment

_GRACE_S = 5.0  # for what was ended to be gone
_CANCELLED = 12  # episodes
_EPISODES = {True: 200, False: 24}  # played for the rule `memory`, by `Kit.full`
_KEPT_BYTES = 2048  # an episode may leave behind, on average
_KEPT_CHILDREN_BYTES = 4 << 20  # half of the episodes may add to the processes of a world
_KEPT_RESIDENT_BYTES = 16 << 20  # and to this one: allocators keep some
_WORD = re.compile(r"\w+")
_LEAST_CHARS = 3  # of a declared answer: shorter ones occur by chance


async def cancel_leaks(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """An episode that is cancelled at any point, and closed, leaves no asyncio task, thread,
    process or file descriptor behind."""
    task = kit.tasks[0]
    actions = (await kit.oracle(task))[0] or kit.noise(task, 5)[-5:]
    await transcript(env := kit.make(), task, actions)
    await kit.close()
    del env
    gc.collect()
    before = Held.now()
    for number in range(_CANCELLED):
        env = kit.make()
        playing = asyncio.create_task(_play(env, task, actions))
        for _ in range(number):
            await asyncio.sleep(0.001 if number % 2 else 0)
        playing.cancel()
        _, running = await asyncio.wait([playing], timeout=_GRACE_S)
        if running:
            yield task.id, f"a cancelled episode did not end within {_GRACE_S:g} s"
            return
        await env.close()
        del env
    del playing
    gc.collect()
    ends = time.monotonic() + _GRACE_S
    while (left := Held.now().beyond(before)) and time.monotonic() < ends:
        await asyncio.sleep(0.02)
    for what in left:
        yield task.id, f"{_CANCELLED} cancelled and closed episodes left {what}"


async def _play(env: Environment, task: Task, actions: Sequence[str]) -> None:
    while True:
        await env.reset(task)
        for action in actions:
            await env.step(action)
        await env.evaluate()
        await asyncio.sleep(0)


async def memory(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Memory does not grow with the number of episodes that an instance has played."""
    env = kit.make()
    plan = [(task, (await kit.oracle(task))[0] or kit.noise(task, 3)[-3:]) for task in kit.tasks]
    half = _EPISODES[kit.full] // 2
    await _episodes(env, plan, len(plan))  # what is loaded at first use is there now
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        first = await _growth(env, plan, half)
        middle = tracemalloc.take_snapshot()
        resident = _resident()
        second = await _growth(env, plan, half)
        grown = [now - then for now, then in zip(_resident(), resident, strict=True)]
        if min(first, second) > half * _KEPT_BYTES:
            where = tracemalloc.take_snapshot().compare_to(middle, "lineno")[0].traceback[0]
            yield (
                "",
                f"each episode leaves {second // half} bytes behind, most of it allocated in "
                f"{where.filename}:{where.lineno}",
            )
    finally:
        if not tracing:
            tracemalloc.stop()
    limits = (("this process", _KEPT_RESIDENT_BYTES), ("its processes", _KEPT_CHILDREN_BYTES))
    for (name, limit), added in zip(limits, grown, strict=True):
        if added > limit:
            yield "", f"{half} episodes added {added >> 20} MB to {name}"


async def _episodes(env: Environment, plan: Sequence[tuple[Task, list[str]]], count: int) -> None:
    for number in range(count):
        task, actions = plan[number % len(plan)]
        await env.reset(task)
        for action in actions:
            if (await env.step(action)).terminated:
                break
        await env.evaluate()


async def _growth(env: Environment, plan: Sequence[tuple[Task, list[str]]], count: int) -> int:
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    await _episodes(env, plan, count)
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


def _resident() -> tuple[int, int]:
    """Bytes of this process, and of all below it."""
    return resident_bytes(os.getpid()), sum(map(resident_bytes, descendants()))


async def answer_leak(kit: Kit) -> AsyncIterator[tuple[str, str]]:
    """Nothing that only the oracle knows is told to a policy that writes nonsense, and no declared
    answer stands in the task's id, its scenario or its opening."""
    nonsense = hostile(f"nonsense/{kit.seed}", 20)
    told: dict[str, list[set[str]]] = {}
    known: dict[str, set[str]] = {}
    env = kit.make()
    for task in kit.tasks:
        opening = await env.reset(task)
        public = [task.id, task.scenario, *(m.content for m in opening.messages)]
        if isinstance(env, HasAnswers):
            for answer in env.answers():
                if len(answer) >= _LEAST_CHARS and _holds(public, answer):
                    yield task.id, f"the answer {answer!r} stands in the task or its opening"
        known[task.id] = await _unshown(env, _words(opening.messages))
        told[task.id] = await _told(env, task, nonsense)
    for task_id, heard in told.items():
        others = [replies for other, replies in told.items() if other != task_id]
        for at, words in enumerate(heard):
            common = set().union(*(replies[at] for replies in others), _split(nonsense[at]))
            if leaked := (words & known[task_id]) - common:
                said = ascii(nonsense[at][:40])
                yield task_id, f"the reply to {said} tells {sorted(leaked)[0]!r}, unasked"
                break


async def _unshown(env: Environment, shown: set[str]) -> set[str]:
    """Words of the live task's oracle that no observation had shown when it wrote them."""
    known: set[str] = set()
    for action in env.oracle():
        known |= set(_split(action)) - shown
        step = await env.step(action)
        shown |= _words(step.observation.messages)
        if step.terminated:
            break
    return known


async def _told(env: Environment, task: Task, nonsense: Sequence[str]) -> list[set[str]]:
    """Words of the replies to nonsense. What comes with the end of an episode is read by nobody."""
    await env.reset(task)
    heard: list[set[str]] = []
    for action in nonsense:
        step = await env.step(action)
        heard.append(set() if step.terminated else _words(step.observation.messages))
        if step.terminated:
            await env.reset(task)
    return heard


def _words(messages: Iterable[Message]) -> set[str]:
    return {word for message in messages for word in _split(message.content)}


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower()[:20_000])


def _holds(texts: Iterable[str], answer: str) -> bool:
    whole = re.compile(rf"(?<!\w){re.escape(answer.lower())}(?!\w)")
    return any(whole.search(text.lower()) for text in texts)
