"""A correct little environment, and `defect`s that break it: one at least for each rule of the
conformance kit, `DEFECTS` says which."""

import asyncio
import itertools
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from loopwright.envs.protocol import EnvError, EnvSpec, Message, Observation, Step, Task, Verdict

DEFECTS: Mapping[str, tuple[str, str]] = {  # defect -> (the rule it breaks, what the finding says)
    "no_tasks": ("tasks", "both splits are empty"),
    "tasks_raise": ("tasks", "KeyError"),
    "hangs": ("deadline", "did not end within"),
    "no_turns": ("spec", "max_turns is 0"),
    "negative_concurrency": ("spec", "max_concurrency is -1"),
    "other_name": ("spec", "Task.environment is 'echo', spec.name 'ecco'"),
    "snapshots_promised": ("spec", "no snapshot() and restore()"),
    "odd_payload": ("task_records", "does not go into msgpack"),
    "odd_difficulty": ("task_records", "difficulty 9"),
    "other_stream": ("repeated_stream", "two different streams"),
    "shared_tasks": ("held_out", "occurs in both splits"),
    "schema_is_no_json": ("tool_schemas", "the schema of tool 'say' is not JSON"),
    "schema_name": ("tool_schemas", "must match"),
    "schema_required": ("tool_schemas", "requires undeclared ['number']"),
    "other_words": ("determinism", "other observations"),
    "oracle_fails": ("oracle_solves", "the oracle reached 0.0"),
    "idle_succeeds": ("idle_fails", "doing nothing counts as success"),
    "all_succeed": ("random_fails", "succeed in 100% of the episodes"),
    "oracle_dawdles": ("budget", "the oracle took 5 turns, max_turns is 3"),
    "no_grade_early": ("budget", "its budget cut off raised RuntimeError"),
    "raises_on_text": ("survives_text", "unexpected brace"),
    "no_step": ("survives_text", "gave a str"),
    "odd_role": ("messages", "role 'narrator'"),
    "no_opening": ("messages", "reset gave no message"),
    "surrogates": ("messages", "not encodable"),
    "odd_signal": ("signals", "signal 'heard' is 0.5"),
    "grading_counts": ("evaluate_idempotent", "two evaluations in a row differ"),
    "nan": ("reward_range", "reward is nan"),
    "odd_success": ("reward_range", "success is 0"),
    "remembers": ("starts_over", "a used instance"),
    "shared_state": ("interleaved", "of 8 interleaved sessions"),
    "goes_on": ("ends", "after the end changed the verdict"),
    "closes_once": ("ends", "raised RuntimeError('closed already')"),
    "snapshot_forgets": ("snapshots", "goes on differently"),
    "tells_answer": ("answer_leak", "unasked"),
    "opens_with_answer": ("answer_leak", "stands in the task or its opening"),
    "leaves_task": ("cancel_leaks", "asyncio task(s): Echo._tick"),
    "leaves_thread": ("cancel_leaks", "thread(s): echo"),
    "leaves_process": ("cancel_leaks", "process(es): sleep 60"),
    "leaves_descriptor": ("cancel_leaks", "file descriptor(s): pipe"),
    "ignores_cancellation": ("cancel_leaks", "a cancelled episode did not end"),
    "keeps_everything": ("memory", "broken_worlds/__init__.py"),
}
SHARED: list[str] = []  # what the defect `shared_state` shares
STARTED: list[Any] = []  # what the defects that leave something started, for tests to end


class Echo:
    """Say the double of the number that is shown."""

    spec = EnvSpec(name="echo", version="1", description="Say twice the number.", max_turns=3)
    instances: ClassVar["itertools.count[int]"] = itertools.count()

    def __init__(self, defect: str = "") -> None:
        if defect and defect not in DEFECTS:
            raise EnvError(f"broken defect = {defect!r}: must be one of {', '.join(DEFECTS)}")
        self.defect = defect
        self.number = next(self.instances)
        self.grades = 0
        self.said: list[str] = []
        self.wanted = ""
        self.kept: list[bytes] = []
        self.closed = False
        changes: dict[str, dict[str, Any]] = {
            "no_turns": {"max_turns": 0},
            "negative_concurrency": {"max_concurrency": -1},
            "other_name": {"name": "ecco"},
            "snapshots_promised": {"snapshots": True},
        }
        self.spec = replace(Echo.spec, **changes.get(defect, {}))

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """150 numbers, odd ones held out."""
        if self.defect == "tasks_raise":
            raise KeyError(split)
        odd = split == "test" and self.defect != "shared_tasks"
        start = 1000 * seed + (self.number if self.defect == "other_stream" else 0)
        for i in range(start, start + (0 if self.defect == "no_tasks" else 150)):
            number = 2 * i + odd
            payload: dict[str, Any] = {"x": object()} if self.defect == "odd_payload" else {}
            yield Task(
                environment="echo",
                id=f"echo-{number}",
                seed=number,
                split=split,
                scenario="echo",
                difficulty=9 if self.defect == "odd_difficulty" else 1,
                payload=payload,
            )

    async def reset(self, task: Task) -> Observation:
        """Show a number."""
        self.wanted = str(2 * (1000 + task.seed))
        if self.defect == "shared_state":
            SHARED.clear()
            self.said = SHARED
        elif self.defect != "remembers":
            self.said = []
        if self.defect == "keeps_everything":
            self.kept.append(bytes(10_000))
        await self._leave()
        if self.defect == "no_opening":
            return Observation(messages=())
        text = f"say the double of {1000 + task.seed}"
        if self.defect == "other_words":
            text += str(self.number)
        if self.defect == "surrogates":
            text += "\ud800"
        if self.defect == "opens_with_answer":
            text += f" (it is {self.wanted})"
        role = "narrator" if self.defect == "odd_role" else "user"
        return Observation(messages=[Message(role=role, content=text)], tools=self._tools())

    def _tools(self) -> list[dict[str, Any]]:
        function = {
            "schema_is_no_json": {"name": "say", "parameters": {"default": {1, 2}}},
            "schema_name": {"name": "has space"},
            "schema_required": {
                "name": "say",
                "description": "Say it.",
                "parameters": {"type": "object", "required": ["number"]},
            },
        }.get(self.defect)
        return [{"type": "function", "function": function}] if function else []

    async def step(self, action: str) -> Any:
        """Take the number; the first one counts."""
        if self.defect == "hangs":
            await asyncio.Event().wait()
        if self.defect == "raises_on_text" and "{" in action:
            raise ValueError("unexpected brace")
        if self.defect == "no_step":
            return "heard"
        twice = self.defect in ("remembers", "shared_state", "goes_on")
        if twice or not self.said:
            self.said.append(action)
        if self.defect == "ignores_cancellation":
            await self._stubborn()
        reply = f"heard {len(self.said)}"
        ends = self.defect not in ("tells_answer", "oracle_dawdles")
        if self.defect == "tells_answer":
            reply += f", not {self.wanted}"
        signals: dict[str, Any] = {"heard": 0.5 if self.defect == "odd_signal" else 1}
        observation = Observation(messages=[Message(role="user", content=reply)])
        return Step(observation=observation, terminated=ends, signals=signals)

    async def evaluate(self) -> Verdict:
        """Was it the number?"""
        if self.defect == "no_grade_early" and self.said[-1:] != [self.wanted]:
            raise RuntimeError("this episode is not over")
        self.grades += 1
        right = self.said[-1:] == [self.wanted]
        if self.defect == "goes_on":
            right = self.said == [self.wanted]
        if self.defect in ("oracle_fails", "all_succeed"):
            right = self.defect == "all_succeed" and bool(self.said)
        if self.defect == "idle_succeeds" and not self.said:
            right = True
        reward = float(right)
        if self.defect == "grading_counts":
            reward += self.grades
        if self.defect == "nan" and not right:
            reward = float("nan")
        return Verdict(reward=reward, success=int(right) if self.defect == "odd_success" else right)  # type: ignore[arg-type]

    def oracle(self) -> Iterator[str]:
        """The number."""
        if self.defect == "oracle_dawdles":
            yield from ["wait"] * 4
        yield self.wanted

    def answers(self) -> list[str]:
        """What is not to be told."""
        return [self.wanted]

    async def close(self) -> None:
        """Nothing is held."""
        if self.defect == "closes_once" and self.closed:
            raise RuntimeError("closed already")
        self.closed = True

    async def _leave(self) -> None:
        """Start something that nobody ends, and let others run."""
        if self.defect == "leaves_task":
            STARTED.append(asyncio.create_task(self._tick()))
        if self.defect == "leaves_thread":
            ended = threading.Event()
            threading.Thread(target=ended.wait, args=(60,), daemon=True, name="echo").start()
            STARTED.append(ended)
        if self.defect == "leaves_process":
            STARTED.append(subprocess.Popen(["sleep", "60"]))
        if self.defect == "leaves_descriptor":
            STARTED.append(os.pipe())
        await asyncio.sleep(0)

    async def _tick(self) -> None:
        await asyncio.sleep(60)

    async def _stubborn(self) -> None:
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            ended = asyncio.Event()
            STARTED.append(ended)
            await ended.wait()


class Forgetful(Echo):
    """With snapshots; `snapshot_forgets` leaves out what was said."""

    def __init__(self, defect: str = "") -> None:
        super().__init__(defect)
        self.spec = replace(self.spec, snapshots=True)

    async def snapshot(self) -> bytes:
        """What was said."""
        return b"" if self.defect == "snapshot_forgets" else "\n".join(self.said).encode()

    async def restore(self, task: Task, blob: bytes) -> None:
        """It again."""
        await self.reset(task)
        self.said = blob.decode().split("\n") if blob else []
