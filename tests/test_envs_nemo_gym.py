"""The adapter to NeMo-Gym: its contract against a stub of the package's shape, and the real package
in the interpreter that `LOOPWRIGHT_NEMO_GYM_PYTHON` names."""

import asyncio
import os
from pathlib import Path

import pytest

from loopwright.envs.actions import Call, render_action
from loopwright.envs.adapters.nemo_gym import NemoGym
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, Verdict
from loopwright.envs.registry import load
from loopwright.envs.remote.plain import RemoteError

STUB = Path(__file__).parent / "stub_packages" / "nemo"
REAL = os.environ.get("LOOPWRIGHT_NEMO_GYM_PYTHON", "")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's stand-in, for the interpreter of the tests."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.delenv("LOOPWRIGHT_NEMO_GYM_PYTHON", raising=False)


def act(name: str, **arguments: object) -> str:
    return render_action(Call(name=name, arguments=arguments), "json")


async def play(env: NemoGym, *actions: str) -> tuple[list[dict[str, int]], Verdict]:
    await env.reset(next(env.tasks("train", 0)))
    steps = [await env.step(action) for action in actions or env.oracle()]
    verdict = await env.evaluate()
    return [dict(step.signals) for step in steps], verdict


@pytest.mark.usefixtures("stub")
def test_the_stub_conforms() -> None:
    assert asyncio.run(check(lambda: load("nemo_gym"), tasks_per_split=1)) == []


@pytest.mark.usefixtures("stub")
def test_calls_faults_and_grades() -> None:
    async def scenes() -> None:
        env = NemoGym()
        signals, verdict = await play(
            env,
            "hm",
            act("notes_wrte", text="x"),
            act("verify"),  # the server has it, the task does not
            act("notes_write", words=1),
            act("notes_write", text=5),
        )
        assert [next(iter(s)) for s in signals] == [
            "policy_fault/parse",
            "tool_error/unknown_tool",
            "tool_error/unknown_tool",
            "tool_error/failed",
            "tool_error/failed",
        ]
        assert verdict.reward == 0.0
        opening = await env.reset(next(env.tasks("train", 0)))
        assert [m.role for m in opening.messages] == ["system", "user"]
        assert [t["function"]["name"] for t in opening.tools] == ["notes_write", "finish"]
        assert (await env.step(act("finish", answer="done"))).terminated
        signals, verdict = await play(env)
        assert not any(signals) and verdict.success
        with pytest.raises(RemoteError, match="HTTP 500"):
            await play(env, act("notes_write", text="crash"))
        await env.close()

    asyncio.run(scenes())


@pytest.mark.usefixtures("stub")
def test_files_of_tasks_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    rows = (STUB / "resources_servers/workplace_assistant/data/example.jsonl").read_text()
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(rows)
    test.write_text(rows.splitlines()[0] + "\n\n{}\n")
    with pytest.raises(EnvError, match=r"test.jsonl:3: no task of NeMo-Gym"):
        NemoGym(data=str(train), test_data=str(test))
    test.write_text(rows.splitlines()[0])
    env = NemoGym(data=str(train), test_data=str(test))
    assert len({task.id for task, _ in zip(env.tasks("train", 0), range(20), strict=False)}) == 5
    assert next(env.tasks("test", 0)).scenario == "notes"
    asyncio.run(env.close())


@pytest.mark.usefixtures("stub")
def test_unknown_servers_give_the_nearest() -> None:
    with pytest.raises(
        EnvError, match="'workplace_asistant': unknown; nearest: workplace_assistant"
    ):
        NemoGym(server="workplace_asistant")


def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.delenv("LOOPWRIGHT_NEMO_GYM_PYTHON", raising=False)
    with pytest.raises(EnvError, match=r"-m pip install 'nemo-gym>=0.4,<0.5'"):
        NemoGym(max_turns=11)  # another world than the stub's of the tests above


@pytest.mark.skipif(not REAL, reason="set LOOPWRIGHT_NEMO_GYM_PYTHON to a Python with nemo-gym")
def test_the_real_workplace_assistant_conforms() -> None:
    env = NemoGym(python=REAL)
    opening = asyncio.run(env.reset(next(env.tasks("train", 0))))
    assert len(opening.tools) == 28  # 27 of its own, and finish
    asyncio.run(env.close())
    found = asyncio.run(check(lambda: NemoGym(python=REAL), tasks_per_split=3))
    assert found == []
