"""What a run asks of a cluster, and what a cluster has."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT_NODES = "loopwright_environment"  # custom resource of Ray nodes for environment workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What all actors of a run ask for, known before the first is spawned."""

    one_node_cpus: float  # of those that share memory
    one_node_gpus: float = 0.0
    # engines that weights reach over the network: (CPUs, GPUs) of each; any node will do
    engines: tuple[tuple[float, float], ...] = ()
    elsewhere_cpus: tuple[float, ...] = ()  # one entry an actor; any node will do

    @property
    def cpus(self) -> float:
        """All together."""
        return self.one_node_cpus + sum(c for c, _ in self.engines) + sum(self.elsewhere_cpus)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What Ray is asked to reserve: those that share memory, then each of the others in the
        order in which they are spawned."""
        wanted = [(self.one_node_cpus, self.one_node_gpus), *self.engines]
        wanted += [(cpus, 0.0) for cpus in self.elsewhere_cpus]
        return [
            {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
            for cpus, gpus in wanted
        ]

    def bundles_on(self, offered: Mapping[str, float]) -> list[dict[str, float]]:
        """`bundles` for a cluster with these resources: where nodes are set aside for
        environments (they offer `loopwright_environment`), environment workers go there alone."""
        bundles = self.bundles
        if ENVIRONMENT_NODES in offered:
            for bundle in bundles[len(bundles) - len(self.elsewhere_cpus) :]:
                bundle[ENVIRONMENT_NODES] = 0.001
        return bundles

    def __str__(self) -> str:
        gpus = f" and {self.one_node_gpus:g} GPUs" if self.one_node_gpus else ""
        who = "trainer" if self.engines else "trainer and engines share memory"
        text = f"{self.one_node_cpus:g} CPUs{gpus} on one node ({who})"
        if self.engines:
            each = ", ".join(
                f"{c:g} CPUs" + (f" and {g:g} GPUs" if g else "") for c, g in self.engines
            )
            text += f", on any node {each} for engines"
        if self.elsewhere_cpus:
            each = ", ".join(f"{cpus:g}" for cpus in self.elsewhere_cpus)
            text += f", and on any node {each} CPUs for environment workers"
        return text


@dataclass(frozen=True, slots=True)
class Resources:
    """What a cluster has, busy or not."""

    cpus: float
    gpus: float
    nodes: tuple[tuple[float, float], ...]  # (CPUs, GPUs) of each

    @classmethod
    def of_this_machine(cls, cpus: int = 0) -> "Resources":
        """Its cores, or `cpus` of them, and its NVIDIA devices."""
        own = float(cpus or os.cpu_count() or 1)
        gpus = float(len(list(Path("/dev").glob("nvidia[0-9]*"))))
        return cls(own, gpus, ((own, gpus),))

    @classmethod
    def of_nodes(cls, nodes: list[dict[str, Any]]) -> "Resources":
        """What Ray's living nodes have, as `ray.nodes()` lists them."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        each = tuple((float(r.get("CPU", 0)), float(r.get("GPU", 0))) for r in alive)
        return cls(sum(c for c, _ in each), sum(g for _, g in each), each)
