"""What the loss of a node costs: two Ray nodes in network namespaces, the link between them cut for
20 s and for good, a node killed, and actors that join and leave. Needs root.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/nodes.py [--out nodes.json]

detect_s   from the blow until the run says that the actor is lost
recover_s  from there to the next step; of what joins: from the request until it serves
stall_s    the longest pause between two steps that the blow lies in
actors     that were lost
lost       finished rollouts on record before the blow that no step trained on, and that are due
twice      rollouts that were trained on more than once

Ray has its own defaults here, as has the run but for `run.max_restarts`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loopwright.orchestrator.ledger import FILE, audit
from tests.driven_run import ROOT, DrivenRun
from tests.ray_nodes import CPUS, RayNodes, ray_nodes, spread_run

CUT_S, LONG_S = 20.0, 240.0
Row = dict[str, float]
COLUMNS = ("detect_s", "recover_s", "stall_s", "actors", "lost", "twice")


def finished(run: DrivenRun) -> set[tuple[int, int]]:
    """(ticket, attempt) of every rollout on record."""
    return {(t, k) for t, attempts in run.ledger().rollouts.items() for k in attempts}


def steps(run: DrivenRun, more: int) -> None:
    """Wait until it has taken so many more."""
    wanted = run.steps() + more
    run.wait(f"step {wanted}", lambda: run.steps() >= wanted, LONG_S)


def pause_around(run: DrivenRun, moment: float) -> float:
    """The longest pause between two steps from the last before `moment` on."""
    times = [m["unix_s"] for m in run.metrics() if "rollout/reward_mean" in m]
    first = max((i for i, t in enumerate(times) if t <= moment), default=0)
    return max(b - a for a, b in zip(times[first:], times[first + 1 :], strict=False))


def short_cut(run: DrivenRun, nodes: RayNodes) -> Row:
    """The link is away for a while."""
    assert nodes.network is not None
    began, lost = time.time(), len(run.events("actor_lost"))
    nodes.network.cut()
    time.sleep(CUT_S)
    nodes.network.heal()
    steps(run, 3)
    gone = len(run.events("actor_lost")) - lost
    return {"stall_s": pause_around(run, began), "actors": float(gone)}


def blow(run: DrivenRun, strike: "Strike") -> Row:
    """Something is lost for good."""
    began, lost = time.time(), len(run.events("actor_lost"))
    strike()
    run.wait("a loss", lambda: len(run.events("actor_lost")) > lost, LONG_S)
    seen = run.events("actor_lost")[lost]["unix_s"]
    steps(run, 3)
    after = min(
        m["unix_s"] for m in run.metrics() if m["unix_s"] > seen and "rollout/reward_mean" in m
    )
    return {
        "detect_s": seen - began,
        "recover_s": after - seen,
        "stall_s": pause_around(run, began),
        "actors": float(len(run.events("actor_lost")) - lost),
    }


class Strike:
    """What is done to node b."""

    def __init__(self, nodes: RayNodes, *, cut: bool) -> None:
        self.nodes, self.cut = nodes, cut

    def __call__(self) -> None:
        """Do it."""
        if not self.cut:
            self.nodes.kill("b")
        elif self.nodes.network is not None:
            self.nodes.network.cut()


def scaled(run: DrivenRun, sizes: list[str], kind: str, count: int) -> Row:
    """Ask, and wait for so many events of `kind`."""
    before, began = len(run.events(kind)), time.time()
    command = [sys.executable, "-m", "orchestrator", "scale", str(run.folder), *sizes]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LONG_S)
    run.wait(kind, lambda: len(run.events(kind)) >= before + count, LONG_S)
    return {"recover_s": run.events(kind)[-1]["unix_s"] - began}


def measure(folder: Path) -> dict[str, Row]:
    """The table by what happens."""
    config, spread = spread_run(folder, steps=100_000)
    overrides = (
        *spread,
        "run.max_restarts=40",
        "cluster.hang_timeout_s=60",
        "cluster.ping_every_s=5",
        "environment.episode_timeout_s=120",
    )
    table: dict[str, Row] = {}
    seen: dict[str, set[tuple[int, int]]] = {}
    with ray_nodes() as nodes:
        if nodes.network is None:
            raise SystemExit(f"no network namespaces here: {nodes.why_not}")
        nodes.start_head(CPUS["a"])
        nodes.start_worker(CPUS["b"])
        with DrivenRun(
            config, *overrides, within=nodes.within("a"), variables=nodes.environment
        ) as run:
            run.wait("step 3", lambda: run.steps() >= 3, LONG_S)
            seen["link cut for 20 s"] = finished(run)
            table["link cut for 20 s"] = short_cut(run, nodes)
            seen["link cut for good"] = finished(run)
            table["link cut for good"] = blow(run, Strike(nodes, cut=True))
            nodes.network.heal()
            run.wait("the node to end", lambda: not nodes.processes("b"), LONG_S)
            back, began = len(run.events("actor_back")), time.time()
            nodes.start_worker(cpus=3)
            run.wait("its engine", lambda: len(run.events("actor_back")) > back, LONG_S)
            table["a node joins again"] = {"recover_s": time.time() - began}
            table["scale environments=3"] = scaled(run, ["environments=3"], "actor_joined", 1)
            steps(run, 2)
            seen["node killed"] = finished(run)
            table["node killed"] = blow(run, Strike(nodes, cut=False))
            smaller = ["rollout=1", "environments=2"]
            table["scale to fewer"] = scaled(run, smaller, "actor_left", 2)
            steps(run, 1)
            os.kill(run.process.pid, signal.SIGTERM)
            run.finish()
        state, found = run.ledger(), audit(run.folder / "ledger" / FILE)
    trained = {pair for step in state.trained.values() for pair in step}
    taken = {ticket for tickets in state.tickets.values() for ticket in tickets}
    for what, before in seen.items():
        due = {pair for pair in before if pair[0] in taken}
        table[what] |= {"lost": float(len(due - trained)), "twice": float(len(found.twice))}
    return table


def show(table: dict[str, Row]) -> str:
    """One line per kind."""
    lines = [f"{'':24}" + "".join(f"{c:>11}" for c in COLUMNS)]
    for what, row in table.items():
        cells = (f"{row[c]:11.1f}" if c in row else f"{'-':>11}" for c in COLUMNS)
        lines.append(f"{what:24}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = measure(Path(scratch))
    print(show(table))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
