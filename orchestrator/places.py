"""Places on a Ray cluster: which actor runs in which bundle of which placement group.

Ray is imported in cluster.py, and handed in.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.processes import Placement
from loopwright.orchestrator.resources import ENVIRONMENT_NODES


class Places:
    """Room on the cluster for each actor: a bundle of what was reserved before the start, or, for
    those that join later, a reservation of its own, which an autoscaler sees as a wish."""

    def __init__(self, ray: Any, reserved: Any, bundles: Sequence[Mapping[str, float]]) -> None:
        """`ray` is the module. `reserved` is a placement group with these bundles; the first is for
        all that share memory."""
        self._ray = ray
        self.reserved = reserved
        self._free = [(b.get("CPU", 0.0), b.get("GPU", 0.0)) for b in bundles]
        self._own: list[Any] = []  # placement groups

    def take(self, placement: Placement) -> "Place":
        """A place, which may have to wait for room (`Place.lack`)."""
        wanted = (placement.cpus, placement.gpus)
        for index, free in enumerate(self._free):
            left = (free[0] - wanted[0], free[1] - wanted[1])
            shared = index == 0 and placement.shares_memory and min(left) > -1e-6
            if shared or (index > 0 and not placement.shares_memory and free == wanted):
                self._free[index] = left
                return Place(self._ray, self.reserved, index, wanted)
        return self._make(placement)

    def _make(self, placement: Placement) -> "Place":
        wanted = {"CPU": placement.cpus, "GPU": placement.gpus}
        bundle = {name: amount for name, amount in wanted.items() if amount}
        lack = "no node has room for"
        if placement.plays and ENVIRONMENT_NODES in self._ray.cluster_resources():
            bundle[ENVIRONMENT_NODES] = 0.001
        if placement.shares_memory:
            node = self._node_of_the_trainer()
            bundle[f"node:{node}"] = 0.001
            lack = (
                f"with rollout.channel = 'collective' any node would do; the trainer's, {node}, "
                "has no room for"
            )
        group = self._ray.util.placement_group([bundle], strategy="PACK")
        self._own.append(group)
        return Place(self._ray, group, 0, (placement.cpus, placement.gpus), lack)

    def _node_of_the_trainer(self) -> str:
        identity = _bundle_nodes(self._ray, self.reserved)[0]
        found = [n["NodeManagerAddress"] for n in self._ray.nodes() if n["NodeID"] == identity]
        if not found:
            raise RunError("the trainer's node is lost: an engine beside it has no place")
        return str(found[0])

    def give_back(self, place: "Place") -> None:
        """Its actor has ended."""
        if place.group is self.reserved:
            cpus, gpus = self._free[place.index]
            self._free[place.index] = (cpus + place.wanted[0], gpus + place.wanted[1])
        else:
            self._own.remove(place.group)
            self._ray.util.remove_placement_group(place.group)

    def close(self) -> None:
        """Give all of it back to the cluster."""
        for group in [self.reserved, *self._own]:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.util.remove_placement_group(group)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The bundle of a placement group that one actor has."""

    ray: Any  # the module
    group: Any  # ray.util.placement_group.PlacementGroup
    index: int
    wanted: tuple[float, float]  # CPUs, GPUs
    missing: str = "no node has room for"

    def lack(self) -> str:
        """What is missing while no node holds the bundle, also after its node was lost."""
        if _bundle_nodes(self.ray, self.group)[self.index]:
            return ""
        cpus, gpus = self.wanted
        asked = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        return f"{self.missing} {asked} ({room(self.ray)})"


def _bundle_nodes(ray: Any, group: Any) -> dict[int, str]:
    """Bundle -> id of the node that holds it, empty where none does."""
    nodes: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return nodes


def room(ray: Any) -> str:
    """What the nodes have, and how much of it is free."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    return (
        f"its nodes have {', '.join(f'{cpus:g}' for cpus in nodes)} CPUs, free in all: "
        f"{amounts(free)}"
    )


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    gpus = f", {resources['GPU']:g} GPUs" if "GPU" in resources else ""
    return f"{resources.get('CPU', 0):g} CPUs{gpus}"
