"""Steps happen exactly once, whatever dies: a trainer that keeps its history, and one that is
real."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings
from loopwright.algorithms.records import TrainBatch, encode
from loopwright.orchestrator.faults import (
    ActorGone,
    ActorLost,
    DeadlinePassed,
    RestartBudget,
    RunError,
)
from loopwright.orchestrator.in_process import InProcessActor
from loopwright.orchestrator.training import Training


@dataclass(slots=True)
class HistoryActor:
    """A trainer process whose weights are the list of steps they were trained on. `faults` maps the
    n-th call of a method (from 1) to the death it dies of, before or after doing the work."""

    faults: dict[tuple[str, int], tuple[Exception, str]] = field(default_factory=dict)
    name: str = "trainer"
    history: list[tuple[int, bytes]] = field(default_factory=list)
    disk: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    published: dict[int, list[int]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    pid: int = 1
    restarts: int = 0

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """Do it, or die of it."""
        if method != "ping":
            self.calls.append(method)
        error, when = self.faults.get((method, self.calls.count(method)), (None, ""))
        if when != "before":
            answer = self._do(method, *args)
        if error is None:
            return answer
        if not isinstance(error, DeadlinePassed):
            self._die()
        raise error

    async def restart(self) -> None:
        """Killed and back."""
        self.restarts += 1
        self._die()

    def end(self) -> None:
        """Never asked for here."""
        raise AssertionError("end")

    async def lacks(self) -> str:
        """It has its place."""
        return ""

    def generate_client(self) -> Any:
        """A trainer generates nothing."""
        raise AssertionError("nobody asks a trainer to generate")

    def _die(self) -> None:
        self.pid += 1
        self.history = []

    def _do(self, method: str, *args: Any) -> Any:
        if method == "ping":
            return {"step": float(len(self.history)), "pid": float(self.pid)}
        if method == "reset":
            self.history = []
        elif method == "step":
            step, batch = args
            assert step == len(self.history) + 1, f"step {step} after {len(self.history)}"
            self.history.append((step, batch))
            return {"step": float(step)}
        elif method == "publish":
            self.published[args[0]] = [step for step, _ in self.history]
        elif method == "save":
            self.disk[Path(args[0]).name] = list(self.history)
        elif method == "load":
            self.history = list(self.disk[Path(args[0]).name])
        return None


def training_of(actor: Any, *, restarts: int = 5, events: list[Any] | None = None) -> Training:
    """A `Training` over `actor`."""
    return Training(
        actor,
        initial="model",
        start_s=20,
        step_s=20,
        restarts=RestartBudget(restarts),
        event=lambda kind, **fields: (events if events is not None else []).append((kind, fields)),
    )


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine, with an end."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


async def five_steps(training: Training, folder: Path, batch: Callable[[int], bytes]) -> None:
    """Start, five steps, each published, a checkpoint after the second."""
    await training.start(None)
    for step in range(1, 6):
        await training.step(step, batch(step))
        await training.publish(step)
        if step == 2:
            await training.save(folder / "step-2", step)
            training.saved(folder / "step-2", step)


def _batch(step: int) -> bytes:
    return b"batch %d" % step


WHOLE = [(step, _batch(step)) for step in range(1, 6)]
DEATH, HANG = ActorLost("died"), DeadlinePassed("silence")
FAULTS = [
    {("step", 1): (DEATH, "before")},
    {("step", 1): (DEATH, "after")},
    {("step", 2): (DEATH, "after")},
    {("step", 4): (DEATH, "before")},
    {("step", 4): (DEATH, "after")},
    {("step", 5): (HANG, "before")},
    {("step", 5): (HANG, "after")},
    {("publish", 4): (DEATH, "before")},
    {("save", 1): (DEATH, "before")},
    {("save", 1): (DEATH, "after")},
    {("reset", 1): (DEATH, "after")},
    {("step", 4): (DEATH, "after"), ("load", 1): (DEATH, "after")},
    {("step", 4): (DEATH, "after"), ("step", 5): (DEATH, "before")},
]


def _name(faults: dict[tuple[str, int], tuple[Exception, str]]) -> str:
    return "-".join(f"{method}{n}_{when}_{error}" for (method, n), (error, when) in faults.items())


@pytest.mark.parametrize("faults", FAULTS, ids=_name)
def test_whatever_dies_every_step_is_in_the_history_once(
    faults: dict[tuple[str, int], tuple[Exception, str]], tmp_path: Path
) -> None:
    events: list[Any] = []
    actor = HistoryActor(faults=dict(faults))
    run(five_steps(training_of(actor, events=events), tmp_path, _batch))
    assert actor.history == WHOLE
    assert actor.published == {n: list(range(1, n + 1)) for n in range(1, 6)}
    assert actor.disk["step-2"] == WHOLE[:2]
    kinds = [kind for kind, _ in events]
    assert kinds.count("actor_lost") == len(faults)
    assert "actor_back" in kinds
    assert actor.restarts == sum(e is HANG for e, _ in faults.values()), "only what hangs is killed"


def test_only_steps_after_the_checkpoint_are_taken_again(tmp_path: Path) -> None:
    events: list[Any] = []
    actor = HistoryActor(faults={("step", 5): (DEATH, "after")})
    run(five_steps(training_of(actor, events=events), tmp_path, _batch))
    after = actor.calls[actor.calls.index("load") :]
    assert after.count("step") == 3, "3 and 4 again, then the one that was cut off"
    assert [f["steps_again"] for kind, f in events if kind == "actor_back"] == [2]


def test_a_process_restarted_between_two_calls_is_noticed(tmp_path: Path) -> None:
    """Nobody's call ran into the death: the fresh process would publish version 0's weights."""

    async def scenario() -> None:
        actor = HistoryActor()
        training = training_of(actor)
        await training.start(None)
        await training.step(1, _batch(1))
        actor._die()
        await training.publish(1)
        assert actor.published == {1: [1]}

    run(scenario())


def test_a_spent_restart_budget_ends_the_run(tmp_path: Path) -> None:
    faults: dict[tuple[str, int], tuple[Exception, str]]
    faults = {("step", n): (DEATH, "before") for n in range(1, 9)}
    with pytest.raises(RunError, match=r"3 actors were lost, run\.max_restarts allows 2"):
        run(five_steps(training_of(HistoryActor(faults=faults), restarts=2), tmp_path, _batch))


def test_a_trainer_that_cannot_come_back_ends_the_run_at_once(tmp_path: Path) -> None:
    actor = HistoryActor(faults={("step", 1): (ActorGone("constructor failed"), "before")})
    with pytest.raises(ActorGone, match="constructor failed"):
        run(five_steps(training_of(actor), tmp_path, _batch))
    assert actor.calls == ["reset", "step"]


def _real_batch(step: int) -> bytes:
    random = np.random.default_rng(step)
    lengths = random.integers(6, 20, 6).astype(np.int32)
    tokens = int(lengths.sum())
    mask = random.random(tokens) < 0.5
    mask[np.cumsum(lengths) - lengths] = False
    batch = TrainBatch(
        step=step,
        token_ids=random.integers(0, 200, tokens).astype(np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -5.0, 0).astype(np.float32),
        policy_versions=np.where(mask, step - 1, -1).astype(np.int32),
        turn_ids=np.where(mask, 0, -1).astype(np.int16),
        lengths=lengths,
        rollout_ids=np.arange(6, dtype=np.int32),
        rewards=random.random(6).astype(np.float32),
        advantages=random.normal(size=6).astype(np.float32),
        rollout_count=6,
    )
    return encode(batch)


class DyingActor(InProcessActor):
    """The real trainer in this process; loses everything once, right after its n-th step."""

    def __init__(self, build: Callable[[], Trainer], dies_after: int) -> None:
        super().__init__("trainer", build)
        self._left = dies_after

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """As the actor's, until it dies."""
        answer = await super().call(method, *args, timeout_s=timeout_s, waiting_for=waiting_for)
        self._left -= method == "step"
        if method == "step" and self._left == 0:
            # a dead process would leave its shared memory to the next of its run; here it is ours
            await super().call("close", timeout_s=timeout_s, waiting_for="close")
            await self.restart()
            raise ActorLost("trainer: died before it could answer")
        return answer


def test_a_rebuilt_trainer_has_the_same_weights_bit_for_bit(policy: str, tmp_path: Path) -> None:
    settings = TrainerSettings(model_path=policy, minibatches=2, lr=1e-3)
    checksums = []
    for dies_after in (0, 4):

        async def scenario(dies_after: int = dies_after) -> None:
            actor = DyingActor(lambda: Trainer(settings, "dying"), dies_after)
            training = Training(
                actor,
                initial=policy,
                start_s=60,
                step_s=60,
                restarts=RestartBudget(1),
                event=lambda kind, **fields: None,
            )
            await five_steps(training, tmp_path / str(dies_after), _real_batch)
            checksums.append(
                await actor.call("weights_checksum", timeout_s=60, waiting_for="checksum")
            )
            await training.close()

        run(scenario())
    assert checksums[0] == checksums[1]
