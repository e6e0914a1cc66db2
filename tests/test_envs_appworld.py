"""The adapter to AppWorld: its contract against a stub with the package's calls, and the real one
in the interpreter that `LOOPWRIGHT_APPWORLD_PYTHON` names, with the data under `APPWORLD_ROOT`."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from loopwright.envs.adapters.appworld import AppWorld
from loopwright.envs.conformance import RULES, Kit, check
from loopwright.envs.protocol import EnvError
from loopwright.envs.remote.plain import RemoteError

STUB = Path(__file__).parent / "stub_packages" / "appworld"
REAL = os.environ.get("LOOPWRIGHT_APPWORLD_PYTHON", "")
ROOT = os.environ.get("APPWORLD_ROOT", "")
DONE = "apis.supervisor.complete_task()"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stub, and data for it: two sets of three tasks."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOOPWRIGHT_APPWORLD_PYTHON", raising=False)
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    for split, first in (("train", 0), ("dev", 3)):
        names = [f"scene{number}_1" for number in range(first, first + 3)]
        listing = tmp_path / "data" / "datasets" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names))
        for number, name in enumerate(names):
            task = tmp_path / "data" / "tasks" / name
            (task / "ground_truth").mkdir(parents=True)
            told = {"instruction": f"Add the note secret-{name}.", "supervisor": {"name": "Ada"}}
            (task / "specs.json").write_text(json.dumps(told))
            truth = {"difficulty": 1 + number, "notes": [f"secret-{name}"]}
            (task / "ground_truth" / "metadata.json").write_text(json.dumps(truth))
    return tmp_path


def cell(code: str) -> str:
    return f"Let me see.\n```python\n{code}\n```"


def test_the_stub_conforms(root: Path) -> None:
    """All but the rules that play oracles, which it has none of; those are satisfied by nothing."""
    assert asyncio.run(check(lambda: AppWorld(root=str(root)), tasks_per_split=1)) == []


def test_an_episode_and_its_grades(root: Path) -> None:
    async def play() -> None:
        env, shared = (AppWorld(root=str(root), sessions=2) for _ in range(2))
        tasks = {
            task.scenario: task for task, _ in zip(env.tasks("train", 0), range(9), strict=False)
        }
        assert {s: t.difficulty for s, t in tasks.items()} == {
            "scene0": 1,
            "scene1": 2,
            "scene2": 3,
        }
        task = tasks["scene1"]
        opening = await env.reset(task)
        await shared.reset(task)
        assert "complete_task" in opening.messages[0].content
        assert opening.messages[1].content.startswith(
            "Add the note secret-scene1_1.\n\nWho asks: name: Ada"
        )
        assert (await env.evaluate()).parts == {"tests": pytest.approx(1 / 3), "solved": 0.0}
        step = await env.step(cell("1 / 0"))
        assert step.signals == {"tool_error/failed": 1}
        assert "ZeroDivisionError" in step.observation.messages[0].content
        assert (await env.step("```python\n```")).signals == {"policy_fault/empty": 1}
        await env.step(cell("x = 'secret-scene1_1'"))
        step = await env.step(cell("apis.notes.add(x); print('y' * 20_000)"))
        assert step.observation.messages[0].content.endswith("… 10001 characters more")
        assert not step.terminated
        assert (await env.step(cell(DONE))).terminated
        assert (await env.step(cell(DONE))).terminated
        verdict = await env.evaluate()
        assert verdict.success and verdict.reward == 1.0
        assert not (await shared.evaluate()).success  # a world of its own
        await env.close()
        await shared.close()
        strict = AppWorld(root=str(root), reward="all")
        await strict.reset(task)
        assert (await strict.evaluate()).reward == 0.0
        await strict.close()

    asyncio.run(play())


def test_the_ground_truth_is_neither_in_the_world_nor_under_its_root(root: Path) -> None:
    look = (
        "import os, pathlib\n"
        "here = pathlib.Path(os.environ['APPWORLD_ROOT'])\n"
        "print(sorted({p.name for p in here.rglob('*')}))\n"
        "print(any(p.is_symlink() for p in here.rglob('*')))"
    )

    async def seen() -> str:
        env = AppWorld(root=str(root))
        await env.reset(next(env.tasks("train", 0)))
        text = (await env.step(cell(look))).observation.messages[0].content
        await env.close()
        return text

    text = asyncio.run(seen())
    assert "specs.json" in text and "ground_truth" not in text and "metadata" not in text
    assert text.splitlines()[-1] == "False"


def test_a_world_that_dies_ends_its_episode_and_none_outlives_its_zygote(root: Path) -> None:
    async def play() -> int:
        env = AppWorld(root=str(root), call_timeout_s=20.0)
        task = next(env.tasks("train", 0))
        await env.reset(task)
        step = await env.step(cell("import os; os._exit(3)"))
        assert step.terminated and step.signals == {"cell_error/died": 1}
        assert not (await env.evaluate()).success
        await env.reset(task)
        step = await env.step(cell("import os; print(os.getpid(), os.getppid())"))
        world, zygote = map(int, step.observation.messages[0].content.split())
        os.kill(zygote, signal.SIGKILL)
        with pytest.raises(RemoteError, match="its process ended"):
            await env.step(cell("1"))
        await env.close()
        return world

    world, ends = asyncio.run(play()), time.monotonic() + 60.0
    while Path(f"/proc/{world}").exists():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"root": ""}, "no root"),
        ({"root": "/no/such"}, "no folder data/tasks in /no/such"),
        ({"test": "train"}, "must be disjoint"),
        ({"reward": "al"}, "nearest: all"),
    ],
)
def test_what_does_not_fit_is_said_at_once(root: Path, options: dict[str, str], why: str) -> None:
    with pytest.raises(EnvError, match=why):
        AppWorld(**{"root": str(root), **options})  # type: ignore[arg-type]


def test_a_missing_package_gives_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(EnvError, match="-m pip install appworld"):
        AppWorld(root=str(root))


@pytest.mark.skipif(not REAL, reason="set LOOPWRIGHT_APPWORLD_PYTHON to a Python with appworld")
def test_the_real_package_without_data_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="no folder data/tasks"):
        AppWorld(python=REAL, root=str(tmp_path))


@pytest.mark.skipif(not (REAL and ROOT), reason="set APPWORLD_ROOT too, to a folder with its data")
@pytest.mark.parametrize("rule", ["determinism", "idle_fails", "survives_text", "interleaved"])
def test_the_real_appworld_keeps_the_rule(rule: str) -> None:
    async def findings() -> list[tuple[str, str]]:
        tasks = [next(AppWorld(python=REAL).tasks(split, 0)) for split in ("train", "test")]
        kit = Kit(factory=lambda: AppWorld(python=REAL), tasks=tasks, seed=0)
        return [found async for found in RULES[rule](kit)]

    assert asyncio.run(findings()) == []
