"""Asynchronous against synchronous training on the same work, one run after the other.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/async_vs_sync.py [--model FOLDER] [--out ...]

The same configuration, seed, policy and number of steps, with `rollout.max_lag` 0, 1 and 2; the
world is one of long-tailed lengths (`--lengths world`: the configuration's own); all of
a run (Ray, trainer, engine, environment worker, controller) shares `--cores` CPUs. The learning
rate is close to 0, so that every run samples from the same policy and its episodes are as long.
A step's seconds are those between the records of two steps, after the first `--skip` steps; the
runs hold no evaluation and no checkpoint in between. With `--repeats` the fastest run of each lag
counts: other work on the machine only ever slows a run down.

Beside the measured ratio stands the bound 1 / max(g, t): g and t are the shares of a synchronous
step spent generating and training (with publishing); perfect overlap leaves the longer of the two.
Below it stand the CPU seconds of every process of the run a step, and what all other processes of
the machine took of the cores meanwhile: where that is not close to 0 the seconds say little, while
the CPU seconds still say what a step costs.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loopwright.algorithms.records import decode
from loopwright.orchestrator import ledger

_ALWAYS = (
    "run.eval_every=0",
    "run.checkpoint_every=0",
    'run.trackers=["jsonl"]',
    "evaluation.tasks=4",
    "trainer.lr=1e-9",
    "warm_start.demonstrations=0",
    "cluster.address=local",
)
_LONG_TAIL = (  # log-normal turns, cv 1, at most ten times the mean
    f"environment.name={Path(__file__).with_name('long_tail_world.py')}:LongTail",
    "environment.options={mean_turns=3.0, cv=1.0}",
    "environment.max_turns=0",
    "environment.max_new_tokens=12",
)
_TIME_LIMIT_S = 1800
_MARK = "LOOPWRIGHT_BENCHMARK_RUN"  # in the environment of a run's processes
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Means over the measured steps of one run."""

    max_lag: int
    steps: int
    step_s: float
    take_s: float  # the controller waits for rollouts; in a synchronous run: generation
    train_s: float
    publish_s: float
    tokens: float  # generated, per step
    lag_mean: float
    lengths: dict[str, float] = field(default_factory=dict)  # tokens of a trained rollout
    cpu_s: dict[str, float] = field(default_factory=dict)  # a step, by kind of process
    others_frac: float = 0.0  # of all CPUs, taken by what is not of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """CPU seconds used so far."""

    at_s: float  # monotonic
    step: int  # the newest on record
    run_s: dict[str, float]  # by kind of process
    machine_s: float


def main() -> int:
    """Measure, print the table, write it."""
    arguments = _parse()
    prefix = _pinned(arguments.cores)
    with tempfile.TemporaryDirectory(prefix="async-vs-sync-") as scratch:
        folder = Path(scratch)
        model = arguments.model or _warm_start(prefix, arguments, folder)
        repeats: dict[int, list[Timing]] = {lag: [] for lag in arguments.lags}
        for repeat in range(arguments.repeats):
            for lag in arguments.lags:
                rows, used = _train(prefix, arguments, folder, model, lag, repeat)
                found = lengths(folder / _name(lag, repeat))
                repeats[lag].append(timing(lag, rows[arguments.skip :], used, found))
                print(f"  {repeats[lag][-1].step_s:.2f} s a step", flush=True)
    timings = [min(found, key=lambda t: t.step_s) for found in repeats.values()]
    print(table(timings))
    if arguments.out:
        figures = {
            "cores": arguments.cores,
            "load_1min": os.getloadavg()[0],
            "settings": [arguments.config, arguments.lengths, *arguments.overrides],
            "bound": bound(timings[0]),
            "timings": [asdict(t) for t in timings],
            "repeats_step_s": {lag: [t.step_s for t in ts] for lag, ts in repeats.items()},
        }
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def lengths(run: Path) -> dict[str, float]:
    """How long a run's rollouts are, in generated tokens: mean, cv, and longest over mean."""
    state = ledger.read(run / "ledger" / ledger.FILE)
    tokens = [
        float(decode(rollout).generated_tokens)
        for attempts in state.rollouts.values()
        for rollout in attempts.values()
    ]
    mean = statistics.fmean(tokens)
    return {"mean": mean, "cv": statistics.pstdev(tokens) / mean, "longest": max(tokens) / mean}


def timing(
    max_lag: int,
    rows: Sequence[dict[str, Any]],
    used: tuple[Used, Used],
    lengths: dict[str, float],
) -> Timing:
    """Means of `rows`, metrics of consecutive steps with `step_s` added, and of what was `used`
    from one step to another."""
    first, last = used
    steps = max(last.step - first.step, 1)
    ours = sum(last.run_s.values()) - sum(first.run_s.values())
    elsewhere = last.machine_s - first.machine_s - ours

    def mean(name: str) -> float:
        return sum(row.get(name, 0.0) for row in rows) / len(rows)

    return Timing(
        max_lag=max_lag,
        steps=len(rows),
        step_s=mean("step_s"),
        take_s=mean("time/take_s"),
        train_s=mean("time/train_s"),
        publish_s=mean("time/publish_s"),
        tokens=mean("rollout/generated_tokens"),
        lag_mean=mean("rollout/lag_mean"),
        lengths=lengths,
        cpu_s={k: (v - first.run_s.get(k, 0.0)) / steps for k, v in sorted(last.run_s.items())},
        others_frac=elsewhere / (last.at_s - first.at_s) / (os.cpu_count() or 1),
    )


def bound(sync: Timing) -> float:
    """1 / max(g, t): the ratio if the shorter of the two were hidden completely."""
    return sync.step_s / max(sync.take_s, sync.train_s + sync.publish_s)


def table(timings: Sequence[Timing]) -> str:
    """One line a lag; ratios to the first, which is synchronous."""
    sync = timings[0]
    lines = ["max_lag  s/step   take  train  publish  tokens/step  lag mean  ratio   bound  of it"]
    for t in timings:
        ratio, most = sync.step_s / t.step_s, bound(sync)
        limit = f"{most:5.2f}x  {ratio / most:4.0%}" if t.max_lag else "     –     –"
        lines.append(
            f"{t.max_lag:7d}  {t.step_s:6.2f} {t.take_s:6.2f} {t.train_s:6.2f} {t.publish_s:8.2f}"
            f"  {t.tokens:11.0f}  {t.lag_mean:8.2f}  {ratio:4.2f}x  {limit}"
        )
    generating = sync.take_s / sync.step_s
    training = (sync.train_s + sync.publish_s) / sync.step_s
    lines.append(f"shares of a synchronous step: g {generating:.2f}, t {training:.2f}")
    lines.append(
        "tokens of a rollout: mean {mean:.0f}, cv {cv:.2f}, longest {longest:.1f} means".format(
            **sync.lengths
        )
    )
    kinds = sorted({kind for t in timings for kind in t.cpu_s})
    lines.append("CPU s a step   all  " + "  ".join(f"{kind:>11}" for kind in kinds) + "  others")
    for t in timings:
        each = "  ".join(f"{t.cpu_s.get(kind, 0.0):11.2f}" for kind in kinds)
        whole = sum(t.cpu_s.values())
        lines.append(f"max_lag {t.max_lag:2d}   {whole:5.2f}  {each}  {t.others_frac:6.0%}")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="preset or .toml file")
    parser.add_argument("--model", default="", help="policy; default: a short warm start here")
    parser.add_argument("--lengths", choices=["long-tail", "world"], default="long-tail")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2], help="0 comes first")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--skip", type=int, default=2, help="first steps left out, at least 1")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; each lag's fastest counts")
    parser.add_argument("--cores", default="0,1", help="CPUs of everything; empty: not pinned")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if arguments.lags[0] != 0 or not 1 <= arguments.skip < arguments.steps:
        parser.error("--lags begins with 0, and 1 <= --skip < --steps")
    return arguments


def _pinned(cores: str) -> list[str]:
    return ["taskset", "-c", cores] if cores and shutil.which("taskset") else []


class _Run:
    """`loopwright ...` in a process of its own, which the block waits for."""

    def __init__(self, prefix: Sequence[str], arguments: Sequence[str], mark: str) -> None:
        self._arguments, self._mark = arguments, f"{_MARK}={mark}".encode()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the run
        # Ray runs its workers at nice 15: beside other work that would measure the other work
        environment = {"RAY_worker_niceness": "0", **os.environ, _MARK: mark}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "loopwright.orchestrator", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
        )

    def finish(self) -> None:
        """Wait for the end; raises `SystemExit` with what the run said if it failed."""
        code = self.process.wait(timeout=_TIME_LIMIT_S)
        self._errors.seek(0)
        if code:
            text = self._errors.read()
            raise SystemExit(f"{' '.join(self._arguments)}: exit code {code}\n{text}")

    def used_at(self, folder: Path, step: int) -> Used:
        """CPU seconds used when `step` gets on record, or when the run ends before."""
        ends = time.monotonic() + _TIME_LIMIT_S
        found = 0
        while found < step and self.process.poll() is None and time.monotonic() < ends:
            time.sleep(0.02)
            found = _steps_on_record(folder)
        return self._used(folder, found)

    def _used(self, folder: Path, step: int) -> Used:
        kinds = {self.process.pid: "driver"}
        for line in _whole_lines(folder / "events.jsonl"):
            if line["kind"] == "actor_up":
                kinds[int(line["pid"])] = str(line["actor"]).rstrip(" 0123456789")
        run_s: Counter[str] = Counter()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self._mark not in (entry / "environ").read_bytes():
                    continue
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended, or is another user's
            kind = kinds.get(int(entry.name), "Ray")
            run_s[kind] += (int(stat[11]) + int(stat[12])) / _TICKS
        busy = Path("/proc/stat").read_text().split(maxsplit=9)
        machine = sum(int(busy[i]) for i in (1, 2, 3, 6, 7)) / _TICKS
        return Used(at_s=time.monotonic(), step=step, run_s=dict(run_s), machine_s=machine)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"]


def _steps_on_record(folder: Path) -> int:
    return sum("time/take_s" in row for row in _whole_lines(folder / "metrics.jsonl"))


def _settings(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _warm_start(prefix: Sequence[str], arguments: argparse.Namespace, folder: Path) -> str:
    print("warm start ...", flush=True)
    overrides = ["warm_start.demonstrations=400", "warm_start.steps=300", *arguments.overrides]
    overrides += ["cluster.address=local", f"run.dir={folder}", "run.name=policy"]
    _Run(prefix, ["warmstart", arguments.config, *_settings(overrides)], "warm-start").finish()
    return str(folder / "policy" / "warm_start")


def _name(lag: int, repeat: int) -> str:
    return f"lag-{lag}-{repeat}"


def _train(
    prefix: Sequence[str],
    arguments: argparse.Namespace,
    folder: Path,
    model: str,
    lag: int,
    repeat: int,
) -> tuple[list[dict[str, Any]], tuple[Used, Used]]:
    """One run; the metrics of its steps, from the second on with the seconds since the last, and
    what was used at the first and the last measured one."""
    name = _name(lag, repeat)
    print(f"{name}: {arguments.steps} steps, load {os.getloadavg()[0]:.1f} ...", flush=True)
    overrides = [*(_LONG_TAIL if arguments.lengths == "long-tail" else ()), *arguments.overrides]
    overrides += [*_ALWAYS, f"model.path={model}", f"run.dir={folder}"]
    overrides += [f"run.name={name}", f"run.steps={arguments.steps}", f"rollout.max_lag={lag}"]
    run = _Run(prefix, ["train", arguments.config, *_settings(overrides)], f"{folder}/{name}")
    first = run.used_at(folder / name, arguments.skip)
    last = run.used_at(folder / name, arguments.steps - 1)  # after the last one its actors end
    run.finish()
    rows = [row for row in _whole_lines(folder / name / "metrics.jsonl") if "time/take_s" in row]
    for before, row in itertools.pairwise(rows):
        row["step_s"] = row["time/elapsed_s"] - before["time/elapsed_s"]
    return rows, (first, last)


if __name__ == "__main__":
    raise SystemExit(main())
