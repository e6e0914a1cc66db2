"""Survival: a quickstart-size run on Ray under a seeded schedule of blows, against undisturbed
ones.

    loopwright warmstart quickstart --set cluster.address=none --set run.name=policy
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/chaos.py --model runs/policy/warm_start \\
        [--work runs/chaos] [--out benchmarks/results/chaos.json] [--only disturbed]

Each disturbed run gets SIGKILL and SIGSTOP for the trainer, the rollout actor, the environment
worker and a world in a process of its own, SIGKILL and a stop of 30 s for the driver, and one death
at each of three points inside a publish and three inside the writing of a checkpoint
(tests/kill_points). The next blow comes a random part of a step after the run has got over the last
one.

detect_s   from the blow until the run says that the process is lost (worlds: an infra fault)
recover_s  from there until it serves again (worlds: until the next step; driver: from `--resume`,
           or SIGCONT, to the next step)
lost       rollouts of finished groups that were on record before the blow, and due, and that no
           step trained on
twice      rollouts that steps trained on more than once

Then resume equality: the driver is killed at five random steps of a synchronous run on Ray, and
every published checksum must be that of the undisturbed run. The JSON is written after every run;
what it holds is not run again. A table (`.md`) comes beside it. Several may run at the same time
with `--only`, each with its part; `--out` of the last one collects them from `--work`.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loopwright.configs.load import load
from loopwright.orchestrator.ledger import FILE, read
from loopwright.orchestrator.run import run
from tests.blows import ACTORS, DRIVER, POINTS, WORLD, Battered, Blow, at_point
from tests.driven_run import NAME, build_policy, write_config

SEEDS = (0, 1, 2)  # undisturbed
DISTURBED = (0, 1)  # each with its own schedule
STEPS, GROUPS, GROUP_SIZE = 48, 8, 8
OFFICE = Path(__file__).resolve().parent.parent / "tests" / "office_process.py"
WORLD_OPTIONS = f"""{{ target = "{OFFICE}:Office", sessions = 16, \
call_timeout_s = 20.0, options = {{ action_format = "call", style = "compact", \
scenarios = ["ask_phone", "text_id", "text_person", "pay_person"] }} }}"""
COMMON = (
    "run.eval_every=0",
    "run.checkpoint_every=4",
    'run.trackers=["jsonl"]',
    "run.max_restarts=1000",
    "run.infra_fault_limit=0.8",  # a world's death is a fault of up to 16 episodes
    "warm_start.demonstrations=0",
    'environment.name="loopwright.envs.remote:ProcessEnv"',
    f"environment.options={WORLD_OPTIONS}",
    "environment.episode_timeout_s=90",
    f"rollout.groups_per_step={GROUPS}",
    f"rollout.group_size={GROUP_SIZE}",
    "trainer.minibatches=4",
    "evaluation.tasks=256",
    "cluster.ping_every_s=2",
    "cluster.hang_timeout_s=20",
)


def settings(model: str, seed: int, steps: int) -> tuple[str, ...]:
    """Overrides of the quickstart."""
    return (
        *COMMON,
        f"model.path={model}",
        f"run.seed={seed}",
        f"environment.seed={1000 + seed}",
        f"run.steps={steps}",
    )


def schedule(seed: int) -> list[Blow]:
    """Every kind by both signals, every point once, in an order of the seed's."""
    kinds = (*ACTORS, WORLD)
    blows = [Blow(kind=kind, how=how) for kind in kinds for how in ("SIGKILL", "SIGSTOP")]
    blows += [Blow(kind=kind, how="SIGKILL") for kind in kinds]
    blows += [Blow(kind=DRIVER, how="SIGKILL"), Blow(kind=DRIVER, how="SIGSTOP")]
    blows += [at_point(point) for point in POINTS]
    random.Random(seed).shuffle(blows)
    return blows


def undisturbed(model: str, seed: int, steps: int) -> dict[str, Any]:
    """The same in this process, without Ray and without blows."""
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        where = (f"run.dir={folder}", "run.name=calm", "cluster.address=none")
        ended = asyncio.run(
            run(load("quickstart", (*settings(model, seed, steps), *where)), resume=False)
        )
    success = ended.summary["success"]
    return {
        "success": success["final"],
        "start": success["warm_start"],
        "cpu_s": round(time.process_time() - began, 1),
    }


def disturbed(model: str, seed: int, steps: int) -> dict[str, Any]:
    """On Ray, under all blows of the seed's schedule, as far as the steps go."""
    began = time.monotonic()
    chance = random.Random(100 + seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # stays if this fails
    config = folder / "chaos.toml"
    config.write_text(Path("configs/quickstart.toml").read_text())
    where = (f"run.dir={folder / 'runs'}", f"run.name={NAME}", "cluster.address=local")
    blows = schedule(seed)
    with Battered(config, *settings(model, seed, steps), *where, patience_s=300) as battered:
        battered.until_step(2)
        for number, blow in enumerate(blows, 1):
            if battered.run.steps() > steps - 4:
                print(f"no steps are left for {len(blows) - number + 1} blows", flush=True)
                break
            time.sleep(chance.uniform(0, 3))  # anywhere in a step
            print(f"{number}/{len(blows)} {battered.strike(blow).row()}", flush=True)
        code, found = battered.over(900)
        summary = battered.run.summary() if code == 0 else {}
        told = {
            "code": code,
            "reason": battered.run.reason() if code else "",
            "success": summary.get("success", {}).get("final"),
            "restarts": summary.get("restarts"),
            "blows": [cost.row() for cost in battered.costs],
            "left_out": len(blows) - len(battered.costs),
            "finished": found.finished,
            "trained": found.trained,
            "expected": steps * GROUPS * GROUP_SIZE,
            "unused": len(found.unused),
            "twice": len(found.twice),
            "unknown": len(found.unknown),
            "unasked": unasked(battered),
            "resumed": summary.get("resumed"),
            "seconds": round(time.monotonic() - began, 1),
        }
    shutil.rmtree(folder)
    return told


def unasked(battered: Battered) -> list[str]:
    """Losses that the run told of beyond those that it was dealt."""
    told = battered.run.events("actor_lost")
    dealt = sum(cost.kind in ACTORS for cost in battered.costs)
    more = [f"{e['actor']}: {e['why']}"[:200] for e in told] if len(told) > dealt else []
    return [*battered.unasked, *more]


def equality(kills: int = 5, steps: int = 24) -> dict[str, Any]:
    """Checksums of every version, with the driver killed at random steps and without."""
    chance = random.Random(5)
    at = sorted(chance.sample(range(2, steps - 1), kills))
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = Path(scratch)
        model = build_policy(folder / "model")
        found = []
        for name, address in (("calm", "none"), ("killed", "local")):
            (folder / name).mkdir()
            config = write_config(
                folder / name, model, environment="Slow", address=address, steps=steps
            )
            with Battered(config, patience_s=240) as battered:
                for step in at if name == "killed" else ():
                    while battered.run.steps() < step:
                        battered.until_step()
                    battered.strike(Blow(kind=DRIVER, how="SIGKILL"))
                    print(f"equality: killed at step {step}", flush=True)
                code, _ = battered.over(600)
                if code:
                    raise SystemExit(f"{name}: ended with {code}: {battered.run.reason()}")
            found.append(read(folder / name / "runs" / NAME / "ledger" / FILE).checksums)
    calm, killed = found
    return {
        "killed_at": at,
        "steps": steps,
        "different": [step for step in calm if calm[step] != killed.get(step)],
    }


def table(results: dict[str, Any]) -> list[str]:
    """What was dealt, found and lost, as Markdown."""
    runs = results.get("disturbed", {}).values()
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cost in (cost for one in runs for cost in one["blows"]):
        rows[cost["kind"], cost["how"]].append(cost)
    lines = [
        "Median and largest. `cluster.ping_every_s` 2, `cluster.hang_timeout_s` 20, a world's "
        "`call_timeout_s` 20.",
        "",
        "| who | how | blows | detected | s to detect | s to recover | finished rollouts lost |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    order = {how: i for i, how in enumerate(("SIGKILL", "SIGSTOP", *POINTS))}
    for (kind, how), costs in sorted(rows.items(), key=lambda r: (order[r[0][1]], r[0][0])):
        detected = [c["detect_s"] for c in costs if c["detect_s"] >= 0]
        lines.append(
            f"| {kind} | {how} | {len(costs)} | {len(detected) or '–'} | {_range(detected)} "
            f"| {_range(c['recover_s'] for c in costs)} | {sum(c['lost'] for c in costs)} |"
        )
    lines.append("")
    for seed, one in results.get("disturbed", {}).items():
        lines.append(
            f"Disturbed run {seed}: {len(one['blows'])} blows; {one['trained']} of "
            f"{one['expected']} rollouts trained, {one['twice']} of them twice, {one['unused']} "
            f"finished and unused; held-out success {_percent([one['success']])}."
        )
        lines += [f"Beside the blows: {what}" for what in one["unasked"]]
    calm = [one["success"] for one in results.get("undisturbed", {}).values()]
    if len(calm) > 1:
        mean, spread = statistics.mean(calm), 2 * statistics.stdev(calm)
        ends = [one["success"] for one in runs if one["success"] is not None]
        within = sum(abs(end - mean) <= spread for end in ends)
        lines.append(
            f"Undisturbed, seeds {', '.join(results['undisturbed'])}: {_percent(calm)}, mean "
            f"{mean:.1%} ± {spread:.1%} (two standard deviations); {within} of {len(ends)} "
            "disturbed runs are within."
        )
    if "equality" in results:
        e = results["equality"]["0"]
        lines.append(
            f"Driver killed at steps {e['killed_at']} of {e['steps']}, max_lag 0: "
            f"{len(e['different'])} versions differ from the undisturbed run."
        )
    return lines


def _range(values: Iterable[float]) -> str:
    """Median and largest of what was measured."""
    found = [v for v in values if v >= 0]
    if not found:
        return "–"
    return (
        f"{statistics.median(found):.1f} (≤ {max(found):.1f})"
        if len(found) > 1
        else (f"{found[0]:.1f}")
    )


def _percent(values: Sequence[float | None]) -> str:
    return ", ".join("–" if v is None else f"{v:.1%}" for v in values)


def main() -> None:
    """Run what is missing; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="the cloned policy of the quickstart")
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="one file a run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chaos.json"))
    parser.add_argument("--only", choices=("disturbed", "undisturbed", "equality"))
    parser.add_argument("--seed", type=int, help="of what --only names, this one")
    arguments = parser.parse_args()
    model, only = arguments.model, arguments.only
    if not model and not (only or "").startswith("equality"):
        parser.error("--model: the clone that all runs begin from")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.seed is not None:
        only = f"{only}-{arguments.seed}"
    todo: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        *((f"disturbed-{s}", partial(disturbed, model, s, STEPS)) for s in DISTURBED),
        *((f"undisturbed-{s}", partial(undisturbed, model, s, STEPS)) for s in SEEDS),
        ("equality-0", equality),
    ]
    for name, play in todo:
        file = arguments.work / f"{name}.json"
        if name.startswith(only or "") and not file.exists():
            print(name, flush=True)
            file.write_text(json.dumps(play()))
    results: dict[str, Any] = {"steps": STEPS}
    for file in sorted(arguments.work.glob("*-*.json")):
        kind, _, seed = file.stem.partition("-")
        results.setdefault(kind, {})[seed] = json.loads(file.read_text())
    lines = table(results)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
