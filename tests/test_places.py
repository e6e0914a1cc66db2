"""Which bundle an actor gets, what it lacks, and what becomes of its place."""

from types import SimpleNamespace
from typing import Any

import pytest

from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.places import Places
from loopwright.orchestrator.processes import Placement
from loopwright.orchestrator.resources import Needs

HEAD, OTHER = "id-of-head", "id-of-other"


class FakeRay:
    """The few functions of Ray that places ask for; groups are what they were made of."""

    def __init__(self, **resources: float) -> None:
        self.resources = {"CPU": 8.0, **resources}
        self.made: list[Any] = []
        self.removed: list[Any] = []
        self.holds: dict[int, dict[int, str]] = {}  # id(group) -> bundle -> node
        self.util = SimpleNamespace(
            placement_group=self._group,
            remove_placement_group=self.removed.append,
            placement_group_table=lambda group: {"bundles_to_node_id": self.holds[id(group)]},
        )
        self.exceptions = SimpleNamespace(RayError=RuntimeError)

    def _group(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        assert strategy == "PACK"
        group = SimpleNamespace(bundles=bundles)
        self.made.append(group)
        self.holds[id(group)] = dict.fromkeys(range(len(bundles)), "")
        return group

    def cluster_resources(self) -> dict[str, float]:
        """Of all nodes."""
        return self.resources

    def available_resources(self) -> dict[str, float]:
        """Half a CPU."""
        return {"CPU": 0.5}

    def nodes(self) -> list[dict[str, Any]]:
        """Two, the other one is dead."""
        return [
            {"NodeID": i, "NodeManagerAddress": a, "Alive": i == HEAD, "Resources": {"CPU": 3.0}}
            for i, a in ((HEAD, "10.0.0.1"), (OTHER, "10.0.0.2"))
        ]


ENGINE, WORKER = Placement(cpus=1), Placement(cpus=0.5, plays=True)
BESIDE = Placement(cpus=1, shares_memory=True)


def reserved(ray: FakeRay, needs: Needs) -> Places:
    """As at the start of a run; the head holds all of it."""
    group = ray.util.placement_group(needs.bundles, strategy="PACK")
    ray.holds[id(group)] = dict.fromkeys(range(len(needs.bundles)), HEAD)
    return Places(ray, group, needs.bundles)


def test_what_was_reserved_is_used_first_and_again_after_one_left() -> None:
    ray = FakeRay()
    needs = Needs(one_node_cpus=2, engines=((1.0, 0.0),) * 2, elsewhere_cpus=(0.5,))
    places = reserved(ray, needs)
    trainer = places.take(Placement(cpus=2, shares_memory=True))
    engines, worker = [places.take(ENGINE) for _ in range(2)], places.take(WORKER)
    assert [p.index for p in (trainer, *engines, worker)] == [0, 1, 2, 3]
    more = places.take(WORKER)
    assert more.group is not trainer.group and more.group.bundles == [{"CPU": 0.5}]
    places.give_back(engines[0])
    assert places.take(ENGINE).index == 1
    places.give_back(more)
    assert ray.removed == [more.group]
    places.close()
    assert ray.removed == [more.group, trainer.group]


def test_engines_that_share_memory_are_on_the_trainers_node() -> None:
    ray = FakeRay()
    places = reserved(ray, Needs(one_node_cpus=3))
    places.take(Placement(cpus=1, shares_memory=True))
    first, second = places.take(BESIDE), places.take(BESIDE)
    assert (first.index, second.index, len(ray.made)) == (0, 0, 1)
    places.give_back(first)
    assert places.take(BESIDE).group is first.group
    joins = places.take(BESIDE)
    assert joins.group.bundles == [{"CPU": 1, "node:10.0.0.1": 0.001}]
    assert joins.lack() == (
        "with rollout.channel = 'collective' any node would do; the trainer's, 10.0.0.1, has no "
        "room for 1 CPUs (its nodes have 3 CPUs, free in all: 0.5 CPUs)"
    )
    ray.holds[id(ray.made[0])][0] = ""
    with pytest.raises(RunError, match="the trainer's node is lost"):
        places.take(BESIDE)


def test_workers_go_to_nodes_set_aside_for_them_and_lack_what_was_lost() -> None:
    ray = FakeRay(loopwright_environment=1000.0)
    places = reserved(ray, Needs(one_node_cpus=1, elsewhere_cpus=(0.5,)))
    worker = places.take(WORKER)
    assert (worker.index, worker.lack()) == (1, "")
    ray.holds[id(worker.group)][1] = ""  # its node died
    assert worker.lack() == (
        "no node has room for 0.5 CPUs (its nodes have 3 CPUs, free in all: 0.5 CPUs)"
    )
    joins = places.take(WORKER)
    assert joins.group.bundles == [{"CPU": 0.5, "loopwright_environment": 0.001}]
    assert (
        places.take(Placement(cpus=1, gpus=1))
        .lack()
        .startswith("no node has room for 1 CPUs and 1 GPUs")
    )
