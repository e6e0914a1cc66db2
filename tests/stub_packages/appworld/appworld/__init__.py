"""Stub of appworld 0.1.3.post1: the calls that the adapter makes, with apps and tasks of its own.

As the real one does, it keeps the state of a task's world in the process: two worlds of one task in
one process are the same world.
"""

import contextlib
import io
import json
import os
import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.1.3.post1"
_STATE = {}


def _root():
    return Path(os.environ["APPWORLD_ROOT"])


def update_root(root):
    """Where data and experiments lie from now on."""
    os.environ["APPWORLD_ROOT"] = root


def load_task_ids(dataset_name="train", difficulty=None):
    """The tasks of a data set, of one difficulty."""
    names = (_root() / "data" / "datasets" / f"{dataset_name}.txt").read_text().split()
    truth = {n: _root() / "data" / "tasks" / n / "ground_truth" / "metadata.json" for n in names}
    return [n for n in names if json.loads(truth[n].read_text())["difficulty"] == difficulty]


class AppWorld:
    """One world."""

    def __init__(self, task_id, experiment_name, load_ground_truth=True, timeout_seconds=100):
        folder = _root() / "data" / "tasks" / task_id
        if load_ground_truth:
            json.loads((folder / "ground_truth" / "metadata.json").read_text())
        specs = json.loads((folder / "specs.json").read_text())
        self.task = SimpleNamespace(
            instruction=specs["instruction"], supervisor=specs["supervisor"], datetime="2001-01-01"
        )
        self._state = _STATE.setdefault(task_id, {"notes": [], "completed": False})
        self._out = (
            _root() / "experiments" / "outputs" / experiment_name / "tasks" / task_id / "dbs"
        )
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir(parents=True)
        notes = SimpleNamespace(add=self._state["notes"].append)
        supervisor = SimpleNamespace(complete_task=self._complete)
        self._names = {"apis": SimpleNamespace(notes=notes, supervisor=supervisor)}
        self._save()

    def _complete(self):
        self._state["completed"] = True

    def _save(self):
        (self._out / "state.json").write_text(json.dumps(self._state))

    def execute(self, code):
        """Run a cell; what it printed, or its traceback."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, self._names)
            output = printed.getvalue() or "Execution successful."
        except Exception:  # noqa: BLE001
            output = "Execution failed. Traceback:\n" + traceback.format_exc()
        self._save()
        return output

    def task_completed(self):
        """Whether the agent has said that it is done."""
        return self._state["completed"]


def evaluate_task(task_id, experiment_name, save_report=True):
    """The tests, over what is on disk."""
    out = _root() / "experiments" / "outputs" / experiment_name / "tasks" / task_id / "dbs"
    state = json.loads((out / "state.json").read_text())
    truth = _root() / "data" / "tasks" / task_id / "ground_truth" / "metadata.json"
    wanted = json.loads(truth.read_text())["notes"]
    tests = [state["notes"] == wanted, state["completed"], len(state["notes"]) < 3]
    return SimpleNamespace(pass_count=sum(tests), num_tests=len(tests), success=all(tests))
