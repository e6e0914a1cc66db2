"""A whole run in one process, in seconds: real world, engine, trainer, ledger; tiny sizes."""

import asyncio
from itertools import islice
from pathlib import Path
from typing import Any

from loopwright.actors.demonstrations import Demonstration, demonstrate
from loopwright.actors.warm_start import WarmStarter
from loopwright.envs import registry
from loopwright.orchestrator.cli import main

WORLD: dict[str, Any] = {"action_format": "call", "style": "compact", "scenarios": ["ask_phone"]}

_CONFIG = """
[run]
name = "tiny"
dir = "{dir}"
steps = 3
seed = 3
eval_every = 0
checkpoint_every = 2
trackers = ["jsonl"]

[model]
path = "{model}"

[tiny]
hidden_size = 32
layers = 1
heads = 2
kv_heads = 1
intermediate_size = 48
vocab_size = 400

[environment]
name = "officeworld"
options = {{ action_format = "call", style = "compact", scenarios = ["ask_phone"] }}
max_turns = 4
max_new_tokens = 12
max_context = 256

[rollout]
group_size = 4
groups_per_step = 2
max_lag = 1

[evaluation]
tasks = 3

[trainer]
lr = 1e-3
minibatches = 2

[cluster]
address = "none"
"""


async def recorded(count: int) -> list[Demonstration]:
    """Oracle episodes of the first training tasks."""
    env: Any = registry.load("officeworld", WORLD)
    return [await demonstrate(env, task) for task in islice(env.tasks("train", 1), count)]


def clone_policy(folder: Path, *, demonstrations: int = 60, steps: int = 80) -> str:
    """Build a tiny policy in `folder` and clone a few demonstrations into it; its path."""
    found = asyncio.run(recorded(demonstrations))
    shape = {
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 400,
        "max_context": 256,
    }
    starter = WarmStarter(1)
    base = starter.build_tiny(found, str(folder / "base"), shape)
    starter.clone(found, base, str(folder / "cloned"), {"steps": steps, "batch": 8, "lr": 1e-2})
    return str(folder / "cloned")


def write_config(folder: Path, model: str) -> Path:
    """A configuration that trains `model` for three steps in this process, runs below `folder`."""
    path = folder / "tiny.toml"
    path.write_text(_CONFIG.format(dir=folder / "runs", model=model))
    return path


def train(
    folder: Path, model: str, *overrides: str, resume: bool = False, auto_resume: bool = False
) -> tuple[int, Path]:
    """`loopwright train` in this process; its exit code and the run's folder."""
    arguments = ["train", str(write_config(folder, model))]
    for override in overrides:
        arguments += ["--set", override]
    arguments += ["--resume"] if resume else ["--auto-resume"] if auto_resume else []
    code = main(arguments)
    return code, folder / "runs" / "tiny"
