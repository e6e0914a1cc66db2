"""What a death costs: each kind of process is killed in a run on Ray, and the driver last.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/faults.py [--out faults.json]

detect_s   SIGKILL → the run says that the actor is lost
recover_s  from there until it serves again; driver: from `--resume` to the next step
lost       finished rollouts on record before the blow that no step trained on, and that are due
twice      rollouts that the surviving steps trained on more than once

Most of recover_s is a new process importing what it needs.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from loopwright.orchestrator.ledger import FILE, audit
from tests.driven_run import DrivenRun, build_policy, write_config

STEPS, GROUPS_PER_STEP = 12, 4
ACTORS = {
    "rollout actor": "rollout 0",
    "environment worker": "environment worker 0",
    "trainer": "trainer",
}


def finished(run: DrivenRun) -> set[tuple[int, int]]:
    """(ticket, attempt) of every rollout on record."""
    return {(t, k) for t, attempts in run.ledger().rollouts.items() for k in attempts}


def kill_actor(run: DrivenRun, actor: str) -> dict[str, float]:
    """Kill it, wait until it is back and one more step is taken."""
    back = run.count("actor_back", actor)
    killed = time.time()
    os.kill(run.pid(actor), signal.SIGKILL)
    run.wait(f"{actor} back", lambda: run.count("actor_back", actor) > back)
    lost = [e for e in run.events("actor_lost") if e["actor"] == actor][-1]
    came = [e for e in run.events("actor_back") if e["actor"] == actor][-1]
    step = run.steps()
    run.wait("another step", lambda: run.steps() > step)
    return {"detect_s": lost["unix_s"] - killed, "recover_s": came["seconds"]}


def kill_driver(run: DrivenRun, config: Path) -> tuple[DrivenRun, dict[str, float]]:
    """Kill it, wait until its actors have ended, resume, and wait for one more step. Two idle
    agents of its Ray end by themselves a minute later."""
    actors = {run.pid(actor) for actor in ACTORS.values()}
    step, killed = run.steps(), time.time()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(timeout=10)
    while actors & set(run.processes()):
        if time.time() - killed > 60:
            raise SystemExit(f"actors of the killed driver still run: {actors}")
        time.sleep(0.05)
    gone = time.time() - killed
    resumed, began = DrivenRun(config, resume=True), time.time()
    resumed.wait("another step", lambda: resumed.steps() > step)
    return resumed, {"actors_gone_s": gone, "recover_s": time.time() - began}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """The table by kind, and what the ledger says in the end."""
    config = write_config(
        folder, build_policy(folder / "model"), environment="Slow", address="local", steps=STEPS
    )
    table: dict[str, dict[str, float]] = {}
    seen: dict[str, set[tuple[int, int]]] = {}
    with DrivenRun(config) as run:
        run.wait("step 1", lambda: run.steps() >= 1)
        for kind, actor in ACTORS.items():
            seen[kind] = finished(run)
            table[kind] = kill_actor(run, actor)
        seen["driver"] = finished(run)
        resumed, table["driver"] = kill_driver(run, config)
    with resumed:
        if code := resumed.finish():
            raise SystemExit(f"the resumed run ended with {code}: {resumed.reason()}")
    found = audit(run.folder / "ledger" / FILE)
    trained = {pair for step in resumed.ledger().trained.values() for pair in step}
    for kind, row in table.items():
        due = {pair for pair in seen[kind] if pair[0] < STEPS * GROUPS_PER_STEP}
        row |= {"lost": float(len(due - trained)), "twice": float(len(found.twice))}
    return table


def show(table: dict[str, dict[str, float]]) -> str:
    """One line per kind."""
    columns = ("detect_s", "recover_s", "lost", "twice")
    lines = [f"{'killed':20}" + "".join(f"{c:>12}" for c in columns)]
    for kind, row in table.items():
        cells = (f"{row[c]:12.1f}" if c in row else f"{'-':>12}" for c in columns)
        lines.append(f"{kind:20}" + "".join(cells))
    lines.append(f"actors gone {table['driver']['actors_gone_s']:.1f} s after their driver")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table: dict[str, Any] = measure(Path(scratch))
    print(show(table))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
