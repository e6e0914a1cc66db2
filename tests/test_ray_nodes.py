"""A Ray cluster of two nodes loses one: the link between them is cut, the node is killed. One run
goes through all of it. (Growing and shrinking: test_scale_command.py.)

    node a, 6 CPUs   driver, trainer (3), rollout actor (2), two environment workers
    node b, 2 CPUs   rollout actor (2)
"""

import os
import signal
import time
from pathlib import Path

import pytest

from loopwright.orchestrator.cli import STOPPED
from loopwright.orchestrator.ledger import FILE, audit
from tests.driven_run import DrivenRun
from tests.ray_nodes import CPUS, RayNodes, ray_nodes, spread_run

# Ray calls a node dead after 4 checks that were not answered within 3 s each, a second apart
_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
_SHORT_CUT_S = 5.0
_GROUP, _GROUPS = 3, 4


class TwoNodes:
    """The run, and what is done to it."""

    def __init__(self, run: DrivenRun, nodes: RayNodes) -> None:
        self.run, self.nodes = run, nodes
        self.seen = self.finished()
        self._counted: dict[str, int] = {}

    def finished(self) -> set[tuple[int, int]]:
        """(ticket, attempt) of every rollout on record."""
        return {(t, k) for t, found in self.run.ledger().rollouts.items() for k in found}

    def steps(self, more: int) -> None:
        """Wait until it has taken so many more."""
        wanted = self.run.steps() + more
        self.run.wait(f"step {wanted}", lambda: self.run.steps() >= wanted, 120)

    def event(self, kind: str, more: int = 1, timeout_s: float = 120) -> None:
        """Wait for so many of a kind beyond those there were at the last call for it."""
        wanted = self._counted.get(kind, 0) + more
        self.run.wait(f"{kind} {wanted}", lambda: len(self.run.events(kind)) >= wanted, timeout_s)
        self._counted[kind] = len(self.run.events(kind))


def test_a_run_outlives_cuts_and_the_loss_of_a_node(tmp_path: Path) -> None:
    config, spread = spread_run(tmp_path, steps=1000)
    overrides = (*spread, "cluster.hang_timeout_s=40", "environment.episode_timeout_s=200")
    with ray_nodes(**_CHECKS) as nodes:
        nodes.start_head(CPUS["a"])
        nodes.start_worker(CPUS["b"])
        with DrivenRun(
            config, *overrides, within=nodes.within("a"), variables=nodes.environment
        ) as run:
            two = TwoNodes(run, nodes)
            run.wait("step 1", lambda: run.steps() >= 1, 180)
            (placed,) = run.events("placement")
            assert (placed["channel"], placed["carrier"]) == ("collective", "collective")
            if nodes.network is not None:
                _short_cut(two)
                _cut_for_good(two)
            else:
                _killed(two, lost=1)
            two.seen |= two.finished()
            _a_node_joins(two)
            _killed(two, lost=1)
            two.seen |= two.finished()
            os.kill(run.process.pid, signal.SIGTERM)
            assert run.finish() == STOPPED, run.errors()
        assert "Traceback" not in run.errors(), run.errors()
        assert run.events("infra_fault") == []
        found = audit(run.folder / "ledger" / FILE)
        assert (found.unused, found.twice, found.unknown) == ((), (), ())
        state = run.ledger()
        assert found.trained == len(state.trained) * _GROUP * _GROUPS
        due = {pair for pair in two.seen if any(pair[0] in t for t in state.tickets.values())}
        assert due <= {pair for step in state.trained.values() for pair in step}
    if nodes.network is None:
        pytest.skip(f"no network namespaces here, so no link was cut: {nodes.why_not}")


def _short_cut(two: TwoNodes) -> None:
    """Calls under way wait; the run stands still where it needs the other side, and goes on."""
    network, run = two.nodes.network, two.run
    assert network is not None
    network.cut()
    time.sleep(_SHORT_CUT_S)
    network.heal()
    two.steps(2)
    assert run.events("actor_lost") == []


def _cut_for_good(two: TwoNodes) -> None:
    """The engine beyond it is lost; there is no room for it here, so the run goes on with one."""
    network = two.nodes.network
    assert network is not None
    network.cut()
    two.event("actor_lost")
    two.event("actor_waits")
    two.steps(2)
    network.heal()
    # Ray tells the node that it is dead, and it ends itself
    two.run.wait("the node to end", lambda: not two.nodes.processes("b"), 60)


def _a_node_joins(two: TwoNodes) -> None:
    two.nodes.start_worker(cpus=3)
    two.event("actor_back")
    two.steps(1)


def _killed(two: TwoNodes, *, lost: int) -> None:
    assert two.nodes.kill("b"), "there was a node"
    two.event("actor_lost", lost)
    two.event("actor_waits", lost)
    two.steps(2)
