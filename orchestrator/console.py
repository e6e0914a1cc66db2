"""The live console: what a run is doing, for eyes. A dashboard on a terminal, plain lines
elsewhere.

`Board` is the state (plain numbers), `plain_line` and `dashboard` turn it into text, and `Console`
is the tracker that keeps the first and prints the second. Metrics are found by their names; what a
run does not report is not shown.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PLAIN_PROGRESS_PARTS = (
    5  # a phase of known length prints this many lines where there is no terminal
)
_EVENTS_SHOWN = 4


@dataclass(slots=True, kw_only=True)
class Board:
    """Everything the console shows. `metrics` holds the latest value of each name."""

    name: str
    total_steps: int
    started_s: float
    step: int = 0
    first_step: int | None = None  # a resumed run does not begin at 1
    first_step_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    success: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out success 0-1)
    phase: str = ""
    done: int = 0
    total: int = 0
    events: list[str] = field(default_factory=list)

    def take(self, step: int, metrics: Mapping[str, float], now_s: float) -> None:
        """Keep what was logged at `step`."""
        if "eval/success" in metrics:
            self.success.append((step, metrics["eval/success"]))
        if _is_training(metrics):
            if self.first_step is None:
                self.first_step, self.first_step_s = step, now_s
            self.step, self.phase = max(self.step, step), ""
        self.metrics.update(metrics)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds to the last step at the pace so far; None before two steps are known."""
        if self.first_step is None or self.step <= self.first_step:
            return None
        pace = (now_s - self.first_step_s) / (self.step - self.first_step)
        return pace * max(self.total_steps - self.step, 0)


def _is_training(metrics: Mapping[str, float]) -> bool:
    """An evaluation is logged apart from the step it follows."""
    return any(name.startswith(("rollout/", "train/")) for name in metrics)


def duration(seconds: float) -> str:
    """`42s`, `3m07s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def success_text(success: list[tuple[int, float]]) -> str:
    """Held-out success as `initial -> warm start -> now`; the warm start is a second one at step
    0."""
    if not success:
        return ""
    before = [value for step, value in success if step == 0]
    shown = [success[0][1]] + before[-1:] * (len(before) > 1)
    shown += [success[-1][1]] if success[-1][0] > 0 and len(success) > 1 else []
    return " → ".join(f"{value:.0%}" for value in shown)


def _numbers(metrics: Mapping[str, float], prefix: str, suffix: str) -> dict[str, float]:
    """The metrics `prefix…suffix`, by the part between."""
    return {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in sorted(metrics.items())
        if name.startswith(prefix) and name.endswith(suffix)
    }


def facts(board: Board, now_s: float) -> list[tuple[str, str]]:
    """What there is to show, as (label, text), in the order of interest."""
    m = board.metrics
    found: list[tuple[str, str]] = []
    if board.success:
        found.append(("held-out success", success_text(board.success)))
    if "rollout/reward_mean" in m:
        found.append(("reward", f"{m['rollout/reward_mean']:.3f}"))
    if "rollout/lag_max" in m:
        lag = f"mean {m.get('rollout/lag_mean', 0):.2f}, max {m['rollout/lag_max']:.0f}"
        found.append(("policy lag", lag))
    if "train/ratio_clipped_frac" in m:
        found.append(("off-policy", _off_policy(m)))
    left_out = {name: m.get(f"rollout/{name}", 0.0) for name in ("cancelled", "discarded_rollouts")}
    if any(left_out.values()):
        found.append(
            (
                "left out",
                f"{left_out['cancelled']:.0f} cancelled after "
                f"{m.get('rollout/cancelled_tokens_mean', 0.0):.0f} tokens, "
                f"{left_out['discarded_rollouts']:.0f} discarded",
            )
        )
    speeds = _numbers(m, "engine/", "/tokens_per_s")
    if speeds:
        found.append(("tokens/s", ", ".join(f"{k}: {v:,.0f}" for k, v in speeds.items())))
    idle = _numbers(m, "engine/", "/idle_frac")
    if idle and "trainer/idle_frac" in m:
        engines = ", ".join(f"engine {k} {v:.0%}" for k, v in idle.items())
        found.append(("idle", f"trainer {m['trainer/idle_frac']:.0%}, {engines}"))
    queues = _numbers(m, "queue/", "")
    if queues:
        text = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in queues.items())
        found.append(("queues", text))
    # the verbs of the loop; `train_forward` is a part of one, and `elapsed` is not a phase
    verbs = {k: v for k, v in _numbers(m, "time/", "_s").items() if "_" not in k and k != "elapsed"}
    if verbs:
        found.append(("seconds", ", ".join(f"{k} {v:.1f}" for k, v in verbs.items())))
    faults = _numbers(m, "fault/", "_total")
    if faults:
        text = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in faults.items())
        found.append(("faults", text))
    eta_s = board.eta_s(now_s)
    elapsed = duration(now_s - board.started_s)
    left = f", about {duration(eta_s)} left" if eta_s is not None else ""
    found.append(("time", f"{elapsed}{left}"))
    return found


def _off_policy(m: Mapping[str, float]) -> str:
    """How far the rollouts were from the policy that trains, and what the loss did about it."""
    return (
        f"mismatch KL {m.get('train/mismatch_kl_k3_mean', 0.0):.4f}, "
        f"{m['train/ratio_clipped_frac']:.1%} clipped, "
        f"{m.get('train/mismatch_capped_frac', 0.0):.1%} capped, "
        f"{m.get('train/mismatch_ess_frac', 0.0):.0%} effective"
    )


def plain_line(board: Board, step: int, metrics: Mapping[str, float], now_s: float) -> str:
    """One line for what was logged at `step`."""
    head = f"step {step}/{board.total_steps}"
    if not _is_training(metrics):
        if "eval/success" not in metrics:
            return ""
        held_out = f"{metrics['eval/success']:.1%}"
        return f"{head}  held-out success {held_out} ({success_text(board.success)})"
    here = replace(board, metrics=dict(metrics))  # of this step alone, nothing left from earlier
    shown = [(k, text) for k, text in facts(here, now_s) if k not in ("held-out success", "queues")]
    return "  ".join([head, *(f"{label} {text}" for label, text in shown)])


def dashboard(board: Board, now_s: float) -> RenderableType:
    """The whole state as one panel."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right", no_wrap=True)
    grid.add_column()
    bar = ProgressBar(total=max(board.total_steps, 1), completed=board.step, width=40)
    grid.add_row("step", Group(Text(f"{board.step} of {board.total_steps}"), bar))
    if board.phase:
        count = f"  {board.done}/{board.total}" if board.total else ""
        grid.add_row("now", Text(f"{board.phase}{count}", style="yellow"))
    for label, text in facts(board, now_s):
        grid.add_row(label, Text(text, style="bold green" if "success" in label else ""))
    for event in board.events[-_EVENTS_SHOWN:]:
        grid.add_row("event", Text(event, style="dim"))
    return Panel(grid, title=f"loopwright · {board.name}", title_align="left", expand=False)


class Console:
    """The tracker for eyes: a live dashboard if `out` is a terminal, else one plain line per
    report.

    `clock` gives seconds on a monotonic scale. Close it before printing anything else.
    """

    def __init__(
        self,
        *,
        name: str,
        total_steps: int,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out if out is not None else sys.stdout
        self._clock = clock
        self._board = Board(name=name, total_steps=total_steps, started_s=clock())
        self._printed_part = 0
        self._live: Live | None = None
        if self._out.isatty():
            terminal = Terminal(file=self._out)
            self._live = Live(console=terminal, get_renderable=self._view, refresh_per_second=4)
            self._live.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step or an evaluation."""
        now_s = self._clock()
        self._board.take(step, metrics, now_s)
        self._print(plain_line(self._board, step, metrics, now_s))

    def event(self, kind: str, **fields: Any) -> None:
        """Show that something happened once: its `text` if it has one, else its fields."""
        pairs = (f"{name}={value}" for name, value in fields.items())
        details = str(fields["text"]) if "text" in fields else ", ".join(pairs)
        text = f"{kind.replace('_', ' ')}: {details}" if details else kind.replace("_", " ")
        self._board.events.append(text)
        self._print(f"event  {text}")

    def phase(self, text: str) -> None:
        """Say what the run is doing now, such as `starting Ray`."""
        self._board.phase, self._board.done, self._board.total = text, 0, 0
        self._print(f"{text} …")

    def progress(self, text: str, done: int, total: int) -> None:
        """Say how far `text` has come: `done` of `total`."""
        board = self._board
        if text != board.phase or done < board.done:
            self._printed_part = 0
        board.phase, board.done, board.total = text, done, total
        part = done * _PLAIN_PROGRESS_PARTS // max(total, 1)
        if part > self._printed_part:
            self._printed_part = part
            self._print(f"{text} {done}/{total}")
        if done >= total:
            board.phase, self._printed_part = "", 0

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _view(self) -> RenderableType:
        return dashboard(self._board, self._clock())

    def _print(self, line: str) -> None:
        if line and not self._out.isatty():
            print(line, file=self._out, flush=True)
