"""What asynchrony buys, by the spread of rollout lengths and by `max_lag`: the loop itself against
its time model, on a simulated engine and a simulated trainer.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/async_model.py [--out benchmarks/results/...]

The loop, buffer, groups, pool, episodes and ledger are the real ones, in one process. The engine is
`DelayEngine`, which sleeps as a larger model would, and so is the trainer: generation and training
of a step take equally long if nothing waits. So this says how well the scheduling overlaps them,
and nothing about how fast any engine or trainer is.

Beside each measured speed-up stand two predictions: the discrete-event simulation of the same
schedule with the same lengths (`algorithms/loop_simulation.py`), and LlamaRL's formula, which knows
no stragglers: (g + t) / max(g, t) = 2. Results are kept as they come: run it again to go on.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopwright.actors.delay_engine import DelayEngine, Delays
from loopwright.actors.engine import EngineSettings
from loopwright.actors.env_worker import EnvWorker, WorkerSettings
from loopwright.actors.episode import EpisodeLimits, turn_seed
from loopwright.actors.rollout import RolloutActor
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.admission import Schedule
from loopwright.algorithms.loop_simulation import Episode, simulate
from loopwright.algorithms.time_model import overlap_bound
from loopwright.envs.protocol import EnvSpec, Message, Observation, Step, Task, Verdict
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.faults import RestartBudget
from loopwright.orchestrator.groups import Groups
from loopwright.orchestrator.in_process import InProcessActor
from loopwright.orchestrator.ledger import Ledger
from loopwright.orchestrator.loop import train
from loopwright.orchestrator.membership import Deadlines
from loopwright.orchestrator.parts import Parts
from loopwright.orchestrator.pool import FaultLimits, Pool, episode_seed
from loopwright.orchestrator.recorder import Recorder
from loopwright.orchestrator.tasks import TaskStream
from loopwright.orchestrator.training import Training
from loopwright.orchestrator.watchdog import Watchdog

P, K, SLOTS = 8, 4, 16
TOKENS, LONGEST = 100, 1000  # of a turn: on average, and at most
SEED = 1


class OneWord:
    """One turn, and whatever was said is worth nothing: only time is of interest here."""

    spec = EnvSpec(name="one-word", version="1", description="Say a word.", max_turns=1)

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """Numbered."""
        number = 0
        while True:
            yield Task(
                environment="one-word", id=f"{number}", seed=number, split=split, scenario="word"
            )
            number += 1

    async def reset(self, task: Task) -> Observation:
        """Ask."""
        return Observation(messages=[Message(role="user", content="word")])

    async def step(self, action: str) -> Step:
        """The word is said."""
        return Step(observation=Observation(messages=[]), terminated=True)

    async def evaluate(self) -> Verdict:
        """Nothing."""
        return Verdict(reward=0.0, success=False)

    def oracle(self) -> Iterator[str]:
        """The word."""
        yield "word"

    async def close(self) -> None:
        """Nothing is held."""


class SleepingTrainer:
    """A trainer that sleeps."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._step = 0

    def ping(self) -> dict[str, float]:
        """A sign of life."""
        return {"step": float(self._step), "pid": 1.0}

    def reset(self, model_path: str) -> None:
        """Nothing to load."""

    def step(self, step: int, batch: bytes) -> dict[str, float]:
        """Sleep."""
        time.sleep(self._step_s)
        self._step = step
        return {}

    def publish(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """No weights at all."""
        return WeightManifest(
            version=version,
            kind="full",
            segment="none",
            names=(),
            shapes=(),
            dtypes=(),
            offsets=(),
            checksums=(),
            size_bytes=0,
        )

    def save(self, path: str) -> None:
        """Nothing to save."""

    def close(self) -> None:
        """Nothing is held."""


class Rows:
    """A tracker that keeps the metrics of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep."""
        if "time/take_s" in metrics:
            self.rows.append(dict(metrics))

    def event(self, kind: str, **fields: Any) -> None:
        """Not kept."""

    def span(self, name: str, seconds: float, **attributes: Any) -> None:
        """Not wanted."""

    def phase(self, text: str) -> None:
        """Not kept."""

    def progress(self, text: str, done: int, total: int) -> None:
        """Not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One curve point."""

    cv: float
    max_lag: int
    window: int = 1
    cut: float = 1.0

    @property
    def name(self) -> str:
        """Its key in the results."""
        relief = f" window {self.window}" if self.window > 1 else ""
        relief += f" cut {self.cut:g}" if self.cut < 1 else ""
        return f"cv {self.cv:g} lag {self.max_lag}{relief}"

    @property
    def schedule(self) -> Schedule:
        """What the loop runs on."""
        return Schedule(
            groups_per_step=P,
            max_lag=self.max_lag,
            group_size=K,
            window=self.window,
            cut=self.cut,
            cut_group=0.75,
        )


def cases() -> list[Case]:
    """Tail × staleness, then the reliefs where tails are longest."""
    grid = [Case(cv=cv, max_lag=lag) for cv in (0.0, 0.5, 1.0, 2.0) for lag in (0, 1, 2, 4)]
    reliefs = [
        Case(cv=cv, max_lag=lag, **relief)
        for cv in (1.0, 2.0)
        for lag, relief in ((0, {"cut": 0.9}), (1, {"cut": 0.9}), (2, {"window": 8}))
    ]
    return grid + reliefs


async def measure(case: Case, *, token_s: float, steps: int, folder: Path) -> dict[str, float]:
    """Run the loop; seconds a step and what went with them."""
    delays = {"token_s": token_s, "mean_tokens": TOKENS, "cv": case.cv}
    settings = EngineSettings(
        model_path="none", max_concurrency=SLOTS, max_context=LONGEST + 100, options=delays
    )
    worker = WorkerSettings(
        environment=f"{Path(__file__).resolve()}:OneWord",
        options={},
        tokenizer_path=str(folder),
    )
    rows = Rows()
    recorder = Recorder(rows)
    restarts = RestartBudget(0)
    pool = Pool(
        [InProcessActor("rollout 0", lambda: RolloutActor(DelayEngine, settings))],
        [InProcessActor("environment worker 0", lambda: EnvWorker(worker))],
        deadlines=Deadlines(start_s=60, publish_s=60, ping_every_s=5, hang_s=60),
        faults=FaultLimits(retries=0, infra_fault_share=0.0),
        restarts=restarts,
        on_update="continue",
        event=recorder.event,
    )
    train_s = P * K * TOKENS * token_s / SLOTS
    training = Training(
        InProcessActor("trainer", lambda: SleepingTrainer(train_s)),
        initial="none",
        start_s=60,
        step_s=600,
        restarts=restarts,
        event=recorder.event,
    )
    limits = EpisodeLimits(
        max_turns=1, max_new_tokens=LONGEST, max_context=LONGEST + 100, timeout_s=600, temperature=1
    )
    stream = TaskStream(OneWord(), "train", 0)
    buffer = GroupBuffer(case.schedule)
    ledger = Ledger(folder / f"ledger-{case.name}")
    parts = Parts(
        folder=folder / case.name,
        steps=steps,
        samplers=case.schedule.outstanding,
        advantage="leave_one_out",
        drop_below=0.0,
        step_timeout_s=600,
        max_seconds=0,
        eval_every=0,
        checkpoint_every=0,
        keep_checkpoints=1,
        eval_limits=limits,
        eval_tasks=stream.first(1),
        eval_seed=0,
        stream=stream,
        buffer=buffer,
        groups=Groups(
            group_size=K,
            least=2,
            seed=SEED,
            limits=limits,
            stream=stream,
            buffer=buffer,
            pool=pool,
            ledger=ledger,
            recorder=recorder,
        ),
        pool=pool,
        training=training,
        watchdog=Watchdog(recorder.event, ping_every_s=5, hang_s=600),
        by_turns=False,
        ledger=ledger,
        recorder=recorder,
    )
    await training.start(None)
    await pool.start(await training.publish(0))
    (folder / case.name / "checkpoints").mkdir(parents=True)
    await train(parts)
    await pool.close()
    ledger.close()
    return figures(rows.rows)


def figures(rows: list[dict[str, float]], skip: int = 3) -> dict[str, float]:
    """Means over the steps after the first `skip`."""
    ends = [row["time/elapsed_s"] for row in rows]
    late = rows[skip:]
    return {
        "step_s": (ends[-1] - ends[skip - 1]) / len(late),
        "take_s": sum(row["time/take_s"] for row in late) / len(late),
        "lag_mean": sum(row["rollout/lag_mean"] for row in late) / len(late),
        "lag_max": max(row["rollout/lag_max"] for row in rows),
        "cancelled": sum(row["rollout/cancelled"] for row in late) / len(late),
    }


def predict(case: Case, *, token_s: float, steps: int) -> dict[str, float]:
    """The simulation of the same schedule with the very lengths of the same seeds."""
    delays = Delays(token_s=token_s, mean_tokens=TOKENS, cv=case.cv)
    stream = TaskStream(OneWord(), "train", 0)

    def episode(ticket: int, attempt: int) -> Episode:
        seed = episode_seed(SEED + ticket, stream[ticket], attempt)
        tokens = min(LONGEST, delays.length(turn_seed(seed, 0)))
        return Episode(seconds=tokens * token_s)

    train_s = P * K * TOKENS * token_s / SLOTS
    run = simulate(case.schedule, episode, slots=SLOTS, train_s=lambda step: train_s, steps=steps)
    return {
        "step_s": run.step_s(skip=3),
        "lag_mean": run.lag_mean,
        "trainer_idle_frac": run.trainer_idle_frac,
    }


def table(found: Mapping[str, Any]) -> str:
    """Speed-up over the synchronous run of the same lengths, measured and predicted."""
    lines = [
        "| cv of lengths | max_lag | relief | s a step | speed-up | simulated | of simulated "
        "| formula | mean lag | cancelled a step |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases():
        if case.name not in found:
            continue
        sync = found[Case(cv=case.cv, max_lag=0).name]
        measured, predicted = found[case.name]["measured"], found[case.name]["predicted"]
        speed = sync["measured"]["step_s"] / measured["step_s"]
        simulated = sync["predicted"]["step_s"] / predicted["step_s"]
        formula = f"{overlap_bound(1, 1):.2f}×" if case.max_lag else ""
        relief = case.name.partition(f"lag {case.max_lag}")[2].strip() or "–"
        lines.append(
            f"| {case.cv:g} | {case.max_lag} | {relief} | {measured['step_s']:.2f} | {speed:.2f}× "
            f"| {simulated:.2f}× | {speed / simulated:.0%} | {formula} "
            f"| {measured['lag_mean']:.2f} | {measured['cancelled']:.1f} |"
        )
    return "\n".join(lines)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Speed-up against the spread of lengths, one line a lag; dashed: simulated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spreads = (0.0, 0.5, 1.0, 2.0)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for lag, colour in ((1, "C0"), (2, "C1"), (4, "C2")):
        for kind, style in (("measured", "-o"), ("predicted", "--")):
            speeds = [
                found[Case(cv=cv, max_lag=0).name][kind]["step_s"]
                / found[Case(cv=cv, max_lag=lag).name][kind]["step_s"]
                for cv in spreads
            ]
            label = f"max_lag {lag}, {kind}"
            axes.plot(spreads, speeds, style, color=colour, label=label, alpha=0.9)
    axes.axhline(overlap_bound(1, 1), color="grey", linewidth=0.8, label="(g + t) / max(g, t)")
    axes.set_xlabel("coefficient of variation of rollout lengths")
    axes.set_ylabel("speed-up over max_lag 0")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure what is not there yet, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--token-s", type=float, default=0.004, help="seconds of a decoding step")
    parser.add_argument("--steps", type=int, default=18, help="of each run; 3 are left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/async_model.json"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="async-model-") as scratch:
        folder = Path(scratch)
        train_tokenizer(["word a b c d e f"] * 3, vocab_size=300).save_pretrained(folder)
        for case in cases():
            if case.name in found:
                continue
            predicted = predict(case, token_s=given.token_s, steps=given.steps)
            measured = asyncio.run(
                measure(case, token_s=given.token_s, steps=given.steps, folder=folder)
            )
            found[case.name] = {
                "measured": measured,
                "predicted": predicted,
                "token_s": given.token_s,
                "load_1min": os.getloadavg()[0],
            }
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{case.name}: {measured['step_s']:.2f} s a step", file=sys.stderr, flush=True)
    print(table(found))
    plot(found, given.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    np.seterr(all="raise")
    raise SystemExit(main())
