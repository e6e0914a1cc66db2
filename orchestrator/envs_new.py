"""`loopwright envs new`: a working plugin package to start from."""

import keyword
import re
from pathlib import Path
from string import Template

from loopwright.orchestrator.faults import Refused

_MODULE = Template('''\
"""$title: turn a dial to the number on a note. Replace the world, keep the rest."""

from collections.abc import Iterator
from random import Random

from loopwright.envs.actions import Call
from loopwright.envs.protocol import Task
from loopwright.envs.toolenv import ToolEnv, ToolError

LOWEST, HIGHEST = 0, 9


class $title(ToolEnv):
    """A dial that shows a number, and a note that says which one it should show.

    Every public method is a tool; its type hints and docstring are what the policy sees.
    """

    name = "$name"
    version = "1"
    description = "Turn a dial to the number that is written on a note."
    max_turns = 6

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """An endless stream. Even seeds are for training, odd ones held out: never the same task
        in both."""
        rng = Random(f"{split}/{seed}")
        while True:
            task_seed = 2 * rng.getrandbits(40) + (split == "test")
            yield Task(
                environment=self.name,
                id=f"dial-{task_seed:x}",
                seed=task_seed,
                split=split,
                scenario="dial",
            )

    def start(self, task: Task) -> str:
        """Build the world from the task's seed, its only randomness; the instruction."""
        rng = Random(task.seed)
        self._shown, self._wanted = rng.sample(range(LOWEST, HIGHEST + 1), 2)
        self._turns = 0
        return "Read the note, then turn the dial until it shows that number. Then finish."

    def reward(self) -> dict[str, float]:
        """Named parts; the reward is their mean. From the world's state, not from what was said."""
        return {"shown": float(self._shown == self._wanted), "calm": float(self._turns <= 1)}

    def solve(self) -> Iterator[Call]:
        """The oracle. It makes a warm start possible, and the conformance kit plays it."""
        yield Call(name="read_note", arguments={})
        yield Call(name="turn", arguments={"by": self._wanted - self._shown})

    def read_note(self) -> dict[str, int]:
        """What the note says, and what the dial shows."""
        return {"wanted": self._wanted, "shown": self._shown}

    def turn(self, by: int) -> str:
        """Turn the dial.

        by: how far; negative is backwards
        """
        if not LOWEST <= self._shown + by <= HIGHEST:
            raise ToolError("out_of_range", f"the dial goes from {LOWEST} to {HIGHEST}")
        self._shown += by
        self._turns += 1
        return f"the dial shows {self._shown}"
''')
_TEST = Template('''"""The world keeps every rule that training relies on."""

import asyncio

from $package import $title

from loopwright.envs.conformance import check


def test_conforms() -> None:
    assert asyncio.run(check($title)) == []
''')
_PROJECT = Template("""[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "$title, an environment for Loopwright"
requires-python = ">=3.11"
dependencies = ["loopwright"]

[project.entry-points."loopwright.environments"]
$name = "$package:$title"

[tool.setuptools]
packages = ["$package"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
""")
_CONFIG = Template("""\
# A tiny policy learns $name on a laptop. From this folder: loopwright train train.toml
[run]
name = "$name"
steps = 20
eval_every = 10

[environment]
name = "$package:$title"
max_new_tokens = 48
max_context = 1024

[tiny]
layers = 2

[warm_start]
demonstrations = 400
steps = 400
batch = 8
until_match = 0.25

[rollout]
groups_per_step = 8

[evaluation]
tasks = 64

[trainer]
lr = 2e-4
""")
_README = Template("""# $title

    loopwright envs play $package:$title --oracle     # watch the oracle
    loopwright envs play $package:$title              # or play it yourself
    loopwright envs check $package:$title             # does it keep the rules?
    loopwright train train.toml                       # a tiny policy learns it
    python -m pytest                                  # the same rules as a test

All from this folder. After `pip install -e .` it loads as `$name`, from anywhere.
""")


def create(name: str, parent: Path) -> Path:
    """Write the package `name` below `parent`; its folder. Raises `Refused` for a name that cannot
    be one, or a folder that is there already."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise Refused(
            f"envs new {name!r}: expected lower-case letters, digits and _, beginning with a letter"
        )
    folder = parent / name
    if folder.exists():
        raise Refused(f"{folder} is there already: choose another name, or remove it")
    package = f"{name}_env"
    words = {
        "name": name,
        "package": package,
        "title": "".join(part.capitalize() for part in name.split("_")),
        "distribution": f"loopwright-{name.replace('_', '-')}",
    }
    files = {
        folder / package / "__init__.py": _MODULE,
        folder / "tests" / f"test_{name}.py": _TEST,
        folder / "pyproject.toml": _PROJECT,
        folder / "train.toml": _CONFIG,
        folder / "README.md": _README,
    }
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.substitute(words))
    return folder
