"""What a run says of itself: metrics of each step, events, and the summary that remains.

Seconds are taken around the verbs of the loop, counters come from the reports those verbs return.
Nothing here decides anything.
"""

import json
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from loopwright.actors.engine import EngineStats, UpdateReport
from loopwright.actors.weights import WeightManifest
from loopwright.algorithms.batching import BatchReport
from loopwright.algorithms.records import Group, Rollout
from loopwright.algorithms.unused import Unused
from loopwright.orchestrator.buffer import GroupBuffer
from loopwright.orchestrator.environment_metrics import environment_metrics
from loopwright.orchestrator.pool import Pool

_OF_THE_LOSS = (
    "train/ratio_clipped_frac",
    "train/mismatch_capped_frac",
    "train/mismatch_ess_frac",
    "train/entropy_mean",
    "train/kl_reference_mean",
    "value/explained_variance",
)


class Trackers(Protocol):
    """Where everything goes (orchestrator/trackers.py)."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once."""
        ...

    def span(self, name: str, seconds: float, **attributes: Any) -> None:
        """Something that took so long has just ended."""
        ...

    def phase(self, text: str) -> None:
        """What the run is doing."""
        ...

    def progress(self, text: str, done: int, total: int) -> None:
        """How far it has come with `text`."""
        ...


class Recorder:
    """Metrics by step, totals by run."""

    def __init__(self, trackers: Trackers, *, resumed: Mapping[str, Any] | None = None) -> None:
        self._trackers = trackers
        self._started = time.monotonic()
        self._pending: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._mismatch: dict[str, float] = {}
        self._lags: list[tuple[int, float]] = []  # (max, mean) of each step
        self._curve: list[tuple[int, float]] = []  # (step, held-out success)
        self._rewards: list[tuple[int, float]] = []
        self._last_stats: dict[int, EngineStats] = {}
        self._engine_totals: dict[int, Counter[str]] = defaultdict(Counter)
        self._pause_max_s = 0.0
        self._loss: dict[str, float] = {}  # of the last step
        self._last_step_s = 0.0  # when the last step was recorded; 0: none was
        self.success: dict[str, float] = {}
        self.weights_checksum = 0
        self.memory: dict[str, Any] = {}  # of the trainer, from its dry run
        if resumed:
            self._restore(resumed)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Seconds of the block, as `time/<phase>_s`."""
        before = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - before
            self.spent(phase, seconds)
            self._trackers.span(phase, seconds)

    def spent(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self._seconds[phase] += seconds
        self._pending[f"time/{phase}_s"] = self._pending.get(f"time/{phase}_s", 0.0) + seconds

    def add(self, metrics: Mapping[str, float]) -> None:
        """Metrics to go out with the current step."""
        self._pending.update(metrics)

    def event(self, kind: str, **fields: Any) -> None:
        """Something happened once: a restart, a fault, a checkpoint."""
        self._counts[f"event/{kind}"] += 1
        self._trackers.event(kind, **fields)

    def phase(self, text: str) -> None:
        """What the run is doing before (or after) its steps."""
        self._trackers.phase(text)

    def progress(self, text: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows progress of `text`."""
        return lambda done, total: self._trackers.progress(text, done, total)

    def played(self, rollout: Rollout) -> None:
        """An episode came back."""
        self._counts["episodes"] += 1
        self._counts[f"end/{rollout.end_reason.value}"] += 1
        self._counts["tokens"] += rollout.generated_tokens
        self._counts.update({f"signal/{k}": v for k, v in rollout.tool_errors.items()})
        self._trackers.span(
            "episode",
            rollout.seconds.get("total", 0.0),
            task=rollout.task_id,
            attempt=rollout.attempt,
            outcome=rollout.outcome.value,
            reward=rollout.reward,
            turns=rollout.turns,
            tokens=rollout.generated_tokens,
            **{f"{part}_s": s for part, s in rollout.seconds.items() if part != "total"},
        )

    def unused(self, unused: Unused) -> None:
        """What a step's tickets sampled beside its batch."""
        self._counts["cancelled"] += len(unused.cancelled)
        self._counts["cancelled_tokens"] += unused.cancelled_tokens
        self._counts["discarded"] += unused.discarded_rollouts
        self._counts["discarded_tokens"] += unused.discarded_tokens
        self._counts["resumed"] += unused.resumed_rollouts
        self._counts["saved_tokens"] += unused.saved_tokens
        self.add(
            {
                "rollout/cancelled": float(len(unused.cancelled)),
                "rollout/cancelled_tokens_mean": unused.cancelled_tokens_mean,
                "rollout/cancelled_turns_mean": unused.cancelled_turns_mean,
                "rollout/discarded_groups": float(unused.discarded_groups),
                "rollout/discarded_rollouts": float(unused.discarded_rollouts),
                "rollout/draws_spent_groups": float(unused.draws_spent),
                "rollout/resumed": float(unused.resumed_rollouts),
                "rollout/saved_tokens": float(unused.saved_tokens),
            }
        )

    def rehearsed(self, text: str, memory: Mapping[str, Any]) -> None:
        """The trainer's longest micro-batch was tried out before step 1: what it took."""
        self.memory = dict(memory)
        self.event("memory", text=text, **self.memory)

    def published(self, manifest: WeightManifest, reports: Sequence[UpdateReport]) -> None:
        """All engines hold a version."""
        self._counts["publishes"] += 1
        self.weights_checksum = checksum_of(manifest)
        pause_s = max((r.pause_s for r in reports), default=0.0)
        self._counts["publish_bytes"] += manifest.size_bytes
        self._pause_max_s = max(self._pause_max_s, pause_s)
        self.add(
            {
                "publish/size_bytes": float(manifest.size_bytes),
                "publish/pause_max_s": pause_s,
                "publish/engine_s_max": max((r.seconds for r in reports), default=0.0),
            }
        )

    def step(
        self,
        step: int,
        report: BatchReport,
        groups: Sequence[Group],
        pool: Pool,
        buffer: GroupBuffer,
    ) -> None:
        """Everything known of a step goes out."""
        rollouts = [r for g in groups for r in g.rollouts]
        self._counts["steps"] += 1
        self._counts["trained_tokens"] += report.tokens
        self._lags.append((report.lag_max, report.lag_mean))
        self._rewards.append((step, report.reward_mean))
        self._mismatch.update(
            {k: v for k, v in self._pending.items() if k.startswith("train/mismatch")}
        )
        self._loss = {k: v for k, v in self._pending.items() if k in _OF_THE_LOSS}
        self._counts.update({f"lag/{lag}": n for lag, n in enumerate(report.lag_tokens)})
        metrics = {f"rollout/{name}": value for name, value in report.metrics().items()} | {
            "rollout/turns_mean": _mean([float(r.turns) for r in rollouts]),
            "rollout/seconds_mean": _mean([r.seconds.get("total", 0.0) for r in rollouts]),
            "queue/playing_episodes": float(pool.playing),
            "queue/running_groups": float(buffer.admitted - buffer.ready),
            "queue/ready_groups": float(buffer.ready),
            "queue/episodes_limit": float(pool.episodes_limit),
            "queue/engines": float(pool.membership.serving("rollout")),
            "queue/workers": float(pool.membership.serving("environments")),
            "fault/infra_total": float(pool.infra_faults),
            "fault/actors_lost_total": float(self._counts["event/actor_lost"]),
            "time/elapsed_s": self.elapsed_s(),
            **self._trainer_idle(),
            **environment_metrics(rollouts, "environment"),
            **self._engines(pool),
        }
        self._flush(step, metrics)

    def untouched(self, metrics: Mapping[str, float]) -> None:
        """Held-out success of the policy before anything was cloned or trained."""
        self.success["initial"] = metrics["eval/success"]
        self._trackers.log(0, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out success at `step`."""
        self._curve.append((step, metrics["eval/success"]))
        self._trackers.log(
            step, dict(metrics) | {"time/evaluate_s": self._pending.pop("time/evaluate_s", 0.0)}
        )

    def elapsed_s(self) -> float:
        """Seconds since the run began, earlier parts of a resumed run included."""
        return time.monotonic() - self._started + self._seconds.get("before_resume", 0.0)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {
            "success": self.success,
            "counts": dict(self._counts),
            "seconds": dict(self._seconds),
            "lags": self._lags,
            "curve": self._curve,
            "rewards": self._rewards,
            "elapsed_s": self.elapsed_s(),
        }

    def summary(self) -> dict[str, Any]:
        """The final figures (`summary.json`)."""
        return {
            "success": self.success,
            "lag": {
                "max": max((m for m, _ in self._lags), default=0),
                "mean": _mean([mean for _, mean in self._lags]),
                "tokens": _named(self._counts, "lag/"),
            },
            "seconds": {k: round(v, 3) for k, v in sorted(self._seconds.items())}
            | {"total": round(self.elapsed_s(), 3)},
            "memory": self.memory,
            "steps": self._counts["steps"],
            "episodes": self._counts["episodes"],
            "tokens": {
                "generated": self._counts["tokens"],
                "trained": self._counts["trained_tokens"],
            },
            "mismatch": {k.removeprefix("train/mismatch_"): v for k, v in self._mismatch.items()},
            "unused": {
                "cancelled_rollouts": self._counts["cancelled"],
                "cancelled_tokens": self._counts["cancelled_tokens"],
                "discarded_rollouts": self._counts["discarded"],
                "discarded_tokens": self._counts["discarded_tokens"],
            },
            "resumed": {
                "rollouts": self._counts["resumed"],
                "saved_tokens": self._counts["saved_tokens"],
            },
            "publishes": self._counts["publishes"],
            "publish": {
                "size_bytes": self._counts["publish_bytes"],
                "seconds": round(self._seconds.get("publish", 0.0), 3),
                "pause_max_s": round(self._pause_max_s, 4),
            },
            "idle": self._idle()
            | {
                f"engine_{index}_frac": 1.0 - totals["busy_us"] / max(totals["us"], 1)
                for index, totals in sorted(self._engine_totals.items())
            },
            "tokens_per_s": {
                f"engine_{index}": 1e6 * totals["tokens"] / max(totals["us"], 1)
                for index, totals in sorted(self._engine_totals.items())
            },
            "loss": {k.removeprefix("train/"): v for k, v in self._loss.items()},
            "restarts": self._counts["event/actor_lost"],
            "infra_faults": self._counts["event/infra_fault"],
            "end_reasons": _named(self._counts, "end/"),
            "signals": _named(self._counts, "signal/"),
            "curve": self._curve,
            "reward_curve": self._rewards,
        }

    def _flush(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackers.log(step, {**self._pending, **metrics})
        self._pending = {}

    def _trainer_idle(self) -> dict[str, float]:
        """Share of the time since the last step in which the trainer neither trained nor
        published."""
        now_s = time.monotonic()
        busy_s = sum(self._pending.get(f"time/{verb}_s", 0.0) for verb in ("train", "publish"))
        since_s = busy_s + self._pending.get("time/take_s", 0.0)  # of the first step
        if self._last_step_s:
            since_s = now_s - self._last_step_s
        self._last_step_s = now_s
        self._seconds["between_steps"] += since_s
        return {"trainer/idle_frac": max(0.0, 1.0 - busy_s / since_s) if since_s > 0 else 0.0}

    def _idle(self) -> dict[str, float]:
        """Share of the training steps' time in which the trainer was idle."""
        whole_s = self._seconds.get("between_steps", 0.0)
        busy_s = self._seconds.get("train", 0.0) + self._seconds.get("publish", 0.0)
        return {"trainer_frac": max(0.0, 1.0 - busy_s / whole_s) if whole_s else 0.0}

    def _engines(self, pool: Pool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for index, stats in sorted(pool.engine_stats().items()):
            before = self._last_stats.get(index)
            if before is not None and stats.uptime_s > before.uptime_s:
                seconds = stats.uptime_s - before.uptime_s
                metrics[f"engine/{index}/tokens_per_s"] = (
                    stats.generated_tokens - before.generated_tokens
                ) / seconds
                busy_s = stats.busy_s - before.busy_s
                metrics[f"engine/{index}/busy_frac"] = busy_s / seconds
                metrics[f"engine/{index}/idle_frac"] = max(0.0, 1.0 - busy_s / seconds)
                totals = self._engine_totals[index]
                totals["tokens"] += stats.generated_tokens - before.generated_tokens
                totals["busy_us"] += round(1e6 * busy_s)
                totals["us"] += round(1e6 * seconds)
                cached = stats.cached_prefix_tokens - before.cached_prefix_tokens
                prompts = cached + stats.prefill_tokens - before.prefill_tokens
                metrics[f"engine/{index}/prefix_hit_frac"] = cached / max(prompts, 1)
            metrics[f"engine/{index}/running"] = float(stats.running)
            metrics[f"engine/{index}/waiting"] = float(stats.waiting)
            metrics[f"engine/{index}/kv_used_frac"] = stats.kv_used_frac
            self._last_stats[index] = stats
        return metrics

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.success = dict(state["success"])
        self._counts.update(state["counts"])
        self._seconds.update(state["seconds"])
        self._seconds["before_resume"] = state["elapsed_s"]
        self._lags = [tuple(pair) for pair in state["lags"]]
        self._curve = [tuple(pair) for pair in state["curve"]]
        self._rewards = [tuple(pair) for pair in state["rewards"]]


def checksum_of(manifest: WeightManifest) -> int:
    """One crc32 over the checksums of all published tensors: equal where the weights are."""
    return zlib.crc32(repr(manifest.checksums).encode())


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _named(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): v for k, v in sorted(counts.items()) if k.startswith(prefix)}
