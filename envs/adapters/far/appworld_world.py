"""The far side of AppWorld: each world in a process of its own, the ground truth outside of it.

Two worlds of one task in one process share their state, and a world freezes the time of its whole
process. So this process imports the package once, and forks: a child for each episode, which plays
the world without its ground truth and under a root that does not hold it, and a child for each
grade, which sees what the world has left on disk. Needs `appworld` and its data.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

REMEDY = f"{sys.executable} -m pip install appworld && {sys.executable} -m appworld.cli install"
DATA = "its data (`appworld download data`) belongs where APPWORLD_ROOT or options.root says"
TRUTH = "ground_truth"  # folder of a task
_PR_SET_PDEATHSIG = 1
_START_S = 120.0
_GRACE_S = 20.0  # beyond the time that the package gives a cell
_numbers = itertools.count()


@functools.cache
def _package(root: str) -> Any:
    """The package, imported as far as it goes without a world. Raises with the remedy."""
    os.environ["APPWORLD_ROOT"] = root
    try:
        package = importlib.import_module("appworld")
        apps = importlib.import_module("appworld.apps")
    except ImportError as error:
        raise ImportError(f"AppWorld is not here ({error}); remedy: {REMEDY}; {DATA}") from None
    if not (pathlib.Path(root) / "data" / "tasks").is_dir():
        raise FileNotFoundError(f"AppWorld: there is no folder data/tasks in {root}; {DATA}")
    for app in apps.get_all_apps():  # so that children need not
        importlib.import_module(f"appworld.apps.{app}.apis")
    return package


@functools.cache
def _roots(root: str) -> tuple[str, str]:
    """Two roots beside each other: of the worlds, hard links to all data but the ground truth, and
    of the grades, all data. What worlds write is in both."""
    parent = pathlib.Path(tempfile.mkdtemp(prefix=".loopwright-", dir=root))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    played, graded = parent / "worlds", parent / "grades"
    (played / "experiments").mkdir(parents=True)
    graded.mkdir()

    def without_truth(folder: str, names: list[str]) -> set[str]:
        return {TRUTH} & set(names)

    source = pathlib.Path(root) / "data"
    shutil.copytree(source, played / "data", ignore=without_truth, copy_function=_link)
    (graded / "data").symlink_to(source.resolve())
    (graded / "experiments").symlink_to(played / "experiments")
    return str(played), str(graded)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


class ChildDied(Exception):
    """A child is gone, or is silent and was killed."""


class Child:
    """A forked process that answers one message at a time."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_begin, args=(os.getpid(), theirs, work, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, message: Any, timeout_s: float) -> Any:
        """The answer. Raises `ChildDied` where it is gone or late, else what it raised."""
        try:
            if message is not None:
                self._ours.send(message)
            if not self._ours.poll(timeout_s):
                self.end()
                raise ChildDied(f"no answer within {timeout_s:g} s")
            kind, value = self._ours.recv()
        except (EOFError, OSError):
            raise ChildDied("its process died") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()
        self._ours.close()


def _begin(parent: int, connection: Any, work: Callable[..., None], arguments: Any) -> None:
    """In the child: die with the parent, and report what goes wrong."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    try:
        work(connection, *arguments)
    except BaseException:  # noqa: BLE001 whatever it is goes to the parent
        connection.send(("error", traceback.format_exc()))


def _play(connection: Any, package: Any, root: str, task_id: str, name: str, cell_s: int) -> None:
    """In the child of an episode: the world. Answers code with output, and whether it is over."""
    package.update_root(root)
    world = package.AppWorld(
        task_id=task_id, experiment_name=name, load_ground_truth=False, timeout_seconds=cell_s
    )
    supervisor = ", ".join(f"{k}: {v}" for k, v in dict(world.task.supervisor).items())
    told = {
        "instruction": world.task.instruction,
        "supervisor": supervisor,
        "now": str(world.task.datetime),
    }
    connection.send(("value", told))
    while True:
        code = connection.recv()
        try:
            output = world.execute(code)
        except (SystemExit, KeyboardInterrupt) as error:  # the package lets these through
            output = f"Execution failed. Traceback:\n{type(error).__name__}"
        connection.send(("value", {"output": output, "over": bool(world.task_completed())}))


def _grade(connection: Any, package: Any, root: str, task_id: str, name: str) -> None:
    """In the child of a grade: the package's own tests over what the world has left."""
    package.update_root(root)
    tracker = package.evaluate_task(task_id=task_id, experiment_name=name, save_report=False)
    counts = {"passed": tracker.pass_count, "tests": tracker.num_tests}
    connection.send(("value", {**counts, "success": bool(tracker.success)}))


class World:
    """One session."""

    def __init__(
        self,
        root: str = "",
        train: str = "train",
        test: str = "dev",
        max_turns: int = 40,
        cell_timeout_s: int = 60,
        max_output_chars: int = 10_000,
    ) -> None:
        root = root or os.environ.get("APPWORLD_ROOT", "")
        if not root:
            raise ValueError(f"AppWorld: no root; {DATA}")
        self._root = str(pathlib.Path(root).expanduser().resolve())
        self._package = _package(self._root)
        self._sets = {"train": train, "test": test}
        self._max_turns, self._cell_s, self._most = max_turns, cell_timeout_s, max_output_chars
        self._world: Child | None = None
        self._over = False

    def spec(self) -> dict[str, Any]:
        """What is declared."""
        return {
            "name": "appworld",
            "version": f"{self._package.__version__}+{'/'.join(self._sets.values())}",
            "description": "AppWorld: code over APIs of nine apps, graded by tests of their state.",
            "max_turns": self._max_turns,
        }

    def tasks(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """The data set's tasks, over and over, in another order each time."""
        found = [
            (task_id, difficulty)
            for difficulty in (1, 2, 3)
            for task_id in self._package.load_task_ids(self._sets[split], difficulty=difficulty)
        ]
        rng = random.Random(f"{split}/{seed}")
        while found:
            for number in rng.sample(range(len(found)), len(found)):
                task_id, difficulty = found[number]
                yield {
                    "id": task_id,
                    "seed": number,
                    "scenario": task_id.rpartition("_")[0],
                    "difficulty": difficulty,
                }

    def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """A new world in a new process."""
        self.close()
        self._task_id, self._name = task["id"], f"episode-{os.getpid()}-{next(_numbers)}"
        played, _ = _roots(self._root)
        self._over = False
        self._world = Child(_play, self._package, played, self._task_id, self._name, self._cell_s)
        told = self._world.ask(None, _START_S)
        text = f"{told['instruction']}\n\nWho asks: {told['supervisor']}\nNow: {told['now']}"
        return {"messages": [{"role": "user", "content": text}]}

    def step(self, code: str) -> dict[str, Any]:
        """One cell."""
        if self._world is None or self._over:
            return {"messages": [], "terminated": True}
        try:
            answer = self._world.ask(code, self._cell_s + _GRACE_S)
        except ChildDied as error:  # by the cell's own doing; what it had written is graded
            self._over = True
            text = f"The world is gone: {error}."
            return {
                "messages": [{"role": "user", "content": text}],
                "terminated": True,
                "signals": {"cell_error/died": 1},
            }
        self._over = answer["over"]
        output = str(answer["output"]).encode(errors="replace").decode()
        cut = len(output) - self._most
        shown = output if cut <= 0 else f"{output[: self._most]}\n… {cut} characters more"
        failed = output.startswith("Execution failed")
        return {
            "messages": [{"role": "user", "content": shown}],
            "terminated": self._over,
            "signals": {"tool_error/failed": 1} if failed else {},
        }

    def evaluate(self) -> dict[str, Any]:
        """The package's tests, in a second process."""
        _, graded = _roots(self._root)
        child = Child(_grade, self._package, graded, self._task_id, self._name)
        try:
            found = child.ask(None, _START_S)
        finally:
            child.end()
        share = found["passed"] / max(1, found["tests"])
        success = found["success"]
        return {"reward": share, "success": success, "parts": {"tests": share, "solved": success}}

    def close(self) -> None:
        """End the world and remove what it has written."""
        if self._world is not None:
            self._world.end()
            played, _ = _roots(self._root)
            written = pathlib.Path(played) / "experiments" / "outputs" / self._name
            shutil.rmtree(written, ignore_errors=True)
        self._world = None
