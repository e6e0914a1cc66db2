"""The ablations of the papers on our own world: levels, baselines, policy lag, corrections.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/loop_ablations.py --model FOLDER --work FOLDER
    PYTHONPATH=. python benchmarks/loop_ablations_report.py --work FOLDER --out benchmarks/results

One process, no Ray: officeworld's episodes, the decode batch of the torch engine and the trainer's
torch backend take turns, so that an arm depends on its seed alone. Every arm starts from the same
warm-started policy. The lag is deterministic: the batch of step t is sampled by the weights of
version t − 1 − lag (of version 0 while there is none as old). Arms differ in one thing from
`default`, with the same tasks and episode seeds; each (arm, seed) is one JSON file in `--work`,
and what is there is not run again. `loopwright warmstart quickstart` makes the model.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopwright.actors.chat import ChatFormat
from loopwright.actors.decode_batch import DecodeBatch
from loopwright.actors.engine import Completion, EngineError, GenerateRequest
from loopwright.actors.episode import EpisodeLimits, play_episode
from loopwright.actors.objective import LossSettings
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.torch_model import load_model
from loopwright.actors.trainer_backend import TrainerSettings, published_tensors
from loopwright.algorithms.advantages import CRITIC
from loopwright.algorithms.batching import build_batch
from loopwright.algorithms.records import Group, Rollout
from loopwright.envs import registry
from loopwright.envs.protocol import Task
from loopwright.orchestrator.pool import episode_seed

WORLD = {
    "action_format": "call",
    "style": "compact",
    "scenarios": ["ask_phone", "text_id", "text_person", "pay_person"],
}
LIMITS = EpisodeLimits(
    max_turns=8, max_new_tokens=24, max_context=256, timeout_s=3600.0, temperature=1.0
)
UNBOUNDED = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one series of runs does differently from the default."""

    name: str
    lag: int = 0
    advantage: str = "leave_one_out"
    loss: dict[str, Any] = field(default_factory=dict)  # of LossSettings
    trainer: dict[str, Any] = field(default_factory=dict)  # of TrainerSettings


_UNCLIPPED = {"loss": "aipo", "aipo_rho": UNBOUNDED}  # exp(lp − mu)·A·∇lp, not capped
# the sampler's logprobs as the proximal ones: PPO that takes its rollouts for fresh
_UNCORRECTED: dict[str, Any] = {
    "loss": {"mismatch": "none"},
    "trainer": {"proximal": "behavior"},
}
_LOGLINEAR: dict[str, Any] = {"loss": {"loss": "decoupled"}, "trainer": {"proximal": "loglinear"}}
LAGS = (0, 1, 2, 4, 8)
ARMS = (
    Arm(name="default"),
    Arm(name="turn", loss={"level": "turn"}),
    Arm(name="trajectory", loss={"level": "trajectory"}),
    # the ratio of tokens with the weights of trajectories: every token of a rollout counts alike
    Arm(name="token_sum", loss={"aggregation": "fixed_length", "fixed_length_tokens": 32.0}),
    Arm(name="token_narrow", loss={"clip": 0.01}),
    Arm(name="with_std", advantage="group_normalized"),
    *(Arm(name=f"default_lag{lag}", lag=lag) for lag in LAGS[1:]),
    *(Arm(name=f"unclipped_lag{lag}", lag=lag, loss=_UNCLIPPED) for lag in LAGS),
    Arm(name="gae_token", advantage=CRITIC),
    Arm(name="gae_turn", advantage=CRITIC, loss={"level": "turn"}),
    *(Arm(name=f"uncorrected_lag{lag}", lag=lag, **_UNCORRECTED) for lag in (2, 8)),
    *(Arm(name=f"loglinear_lag{lag}", lag=lag, **_LOGLINEAR) for lag in (2, 8)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything; the same for all arms."""

    steps: int
    groups: int
    group_size: int
    eval_tasks: int
    eval_every: int


class Player:
    """Plays episodes with a decode batch of its own, one step for all whenever all wait."""

    def __init__(self, model_path: str, slots: int) -> None:
        self._model = load_model(
            model_path, dtype="float32", device="cpu", max_context=LIMITS.max_context
        )
        self._batch = DecodeBatch(
            self._model, max_concurrency=slots, max_context=LIMITS.max_context, kv_bytes=1 << 30
        )
        self._chat = ChatFormat.load(model_path)
        self._envs: list[Any] = []
        self._waiting: deque[tuple[GenerateRequest, asyncio.Future[Completion]]] = deque()
        self._futures: dict[str, asyncio.Future[Completion]] = {}

    def take(self, weights: dict[str, torch.Tensor], version: int) -> None:
        """Sample from these weights from now on."""
        self._batch.install(self._model.prepare(weights), version)

    def play(self, episodes: Sequence[tuple[Task, int, int]]) -> list[Rollout]:
        """The rollouts of (task, attempt, seed), in that order."""
        return asyncio.run(self._play(episodes))

    async def _play(self, episodes: Sequence[tuple[Task, int, int]]) -> list[Rollout]:
        while len(self._envs) < len(episodes):
            self._envs.append(registry.load("officeworld", WORLD))
        playing = asyncio.gather(
            *(
                play_episode(
                    env, task, attempt, self._generate, self._chat, LIMITS, seed=seed, priority=0
                )
                for env, (task, attempt, seed) in zip(self._envs, episodes, strict=False)
            )
        )
        while not playing.done():
            await asyncio.sleep(0)  # every episode goes on until it waits for its next turn
            self._step()
        rollouts = playing.result()
        if faults := [r.fault for r in rollouts if r.fault]:
            raise SystemExit(f"{len(faults)} episodes failed, the first: {faults[0]}")
        return rollouts

    async def _generate(self, request: GenerateRequest) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        return await future

    def _step(self) -> None:
        later = []
        while self._waiting and self._batch.has_room(self._waiting[0][0], LIMITS.max_new_tokens):
            request, future = self._waiting.popleft()
            if self._batch.worth_waiting(request):
                later.append((request, future))
                continue
            limit = min(request.max_new_tokens, LIMITS.max_context - len(request.prompt_ids))
            self._batch.add(request, limit)
            self._futures[request.request_id] = future
        self._waiting.extendleft(reversed(later))
        with torch.inference_mode():
            ended = self._batch.step()
        for sequence in ended:
            future = self._futures.pop(sequence.request.request_id)
            if isinstance(sequence.result, EngineError):
                future.set_exception(sequence.result)
            else:
                future.set_result(sequence.result)


def run_arm(arm: Arm, seed: int, model: str, sizes: Sizes) -> dict[str, Any]:
    """Train one arm; what it measured, by step."""
    began = time.process_time()
    settings = TrainerSettings(
        model_path=model,
        seed=seed,
        critic=arm.advantage == CRITIC,
        **{
            "lr": 3e-4,
            "betas": (0.9, 0.95),
            "schedule": "linear",
            "warmup_steps": 3,
            "total_steps": sizes.steps,
            "epochs": 2,
            "minibatches": 4,
            "token_budget": 1024,
            **arm.trainer,
        },
        loss=LossSettings(**arm.loss),
    )
    backend = TorchBackend(settings)
    player = Player(model, max(sizes.groups * sizes.group_size, sizes.eval_tasks))
    source: Any = registry.load("officeworld", WORLD)
    tasks = itertools.islice(source.tasks("train", seed), sizes.steps * sizes.groups)
    held_out = list(itertools.islice(source.tasks("test", 0), sizes.eval_tasks))
    snapshots = deque([_snapshot(backend)], maxlen=arm.lag + 1)
    rows: list[dict[str, float]] = []
    curve = [(0, evaluate(player, snapshots[-1], 0, held_out))]
    for step in range(1, sizes.steps + 1):
        version = max(step - 1 - arm.lag, 0)
        player.take(snapshots[0], version)
        groups = _groups(player, [next(tasks) for _ in range(sizes.groups)], step, seed, sizes)
        batch, report = build_batch(groups, step, arm.advantage)
        metrics = backend.train(batch)
        snapshots.append(_snapshot(backend))
        rows.append(
            {"step": step, "reward": report.reward_mean, "success": report.success_mean}
            | {"lag": report.lag_mean}
            | {k: v for k, v in metrics.items() if k.startswith(("train/", "value/"))}
        )
        if step % sizes.eval_every == 0 or step == sizes.steps:
            curve.append((step, evaluate(player, snapshots[-1], step, held_out)))
    return {
        "arm": arm.name,
        "seed": seed,
        "lag": arm.lag,
        "curve": curve,
        "steps": rows,
        "cpu_s": round(time.process_time() - began, 1),
    }


def evaluate(
    player: Player, weights: dict[str, torch.Tensor], version: int, tasks: Sequence[Task]
) -> float:
    """Held-out success, 0–1; the same tasks and seeds each time."""
    player.take(weights, version)
    rollouts = player.play([(task, 0, episode_seed(0, task, 0)) for task in tasks])
    return sum(r.success for r in rollouts) / len(rollouts)


def _groups(
    player: Player, tasks: Sequence[Task], step: int, seed: int, sizes: Sizes
) -> list[Group]:
    size = sizes.group_size
    episodes = [
        (task, k, episode_seed(seed + step, task, k)) for task in tasks for k in range(size)
    ]
    rollouts = player.play(episodes)
    return [
        Group(ticket=i, task_id=task.id, rollouts=tuple(rollouts[i * size : (i + 1) * size]))
        for i, task in enumerate(tasks)
    ]


def _snapshot(backend: TorchBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in published_tensors(backend).items()}


def main() -> int:
    """Run what is missing, or report what is there."""
    arguments = _parse()
    sizes = Sizes(
        steps=arguments.steps,
        groups=arguments.groups,
        group_size=arguments.group_size,
        eval_tasks=arguments.eval_tasks,
        eval_every=arguments.eval_every,
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    arms = {arm.name: arm for arm in ARMS}
    if unknown := sorted(set(arguments.arms) - set(arms)):
        raise SystemExit(f"--arms {unknown}: expected some of {', '.join(arms)}")
    for seed in arguments.seeds:
        for name in arguments.arms or arms:
            path = arguments.work / f"{name}-{seed}.json"
            claim = path.with_suffix(".running")
            if path.exists() or not _claimed(claim):
                continue
            try:
                found = run_arm(arms[name], seed, arguments.model, sizes)
                aside = path.with_suffix(".partial")
                aside.write_text(json.dumps(found) + "\n")
                aside.rename(path)
            finally:
                claim.unlink()
            curve = " ".join(f"{step}: {value:.3f}" for step, value in found["curve"])
            print(f"{name} seed {seed}: {curve}  ({found['cpu_s']} CPU-s)", flush=True)
    return 0


def _claimed(path: Path) -> bool:
    """Whether this process, and no other one, runs this arm."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of the warm-started policy")
    parser.add_argument("--work", type=Path, required=True, help="one JSON file a run")
    parser.add_argument("--arms", nargs="+", default=[], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=16, help="tasks a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--eval-tasks", type=int, default=256)
    parser.add_argument("--eval-every", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
