"""The one module that imports Ray: placing actors, calling them with a deadline, killing and
counting them.

`RayCluster` and `InProcess` (in_process.py) are the two clusters (protocol: processes.py), so the
same loop runs on Ray and, with `cluster.address = "none"`, inside one process.
"""

import asyncio
import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loopwright
from loopwright.actors.engine import Completion, GenerateRequest
from loopwright.actors.env_worker import EngineClient
from loopwright.actors.envelopes import Answer, Envelope, Mailbox
from loopwright.actors.episode import EngineLost
from loopwright.orchestrator.faults import ActorGone, ActorLost, DeadlinePassed, RunError
from loopwright.orchestrator.inspection import Home, home
from loopwright.orchestrator.places import Place, Places, amounts, room
from loopwright.orchestrator.processes import Actor, Cluster, Placement, load_target
from loopwright.orchestrator.resources import Needs, Resources
from loopwright.orchestrator.trackers import Tracker

ROOT = str(
    Path(loopwright.__path__[0]).parent
    if Path(loopwright.__path__[0]).name == "loopwright"
    else Path(loopwright.__path__[0])
)


_PATIENCE_S = 3.0  # a job that has just ended may still hold its CPUs
Ended = Callable[["RayActor"], None]


class RayGenerate:
    """Asks a rollout actor for turns; lives in the environment worker, many turns to a call."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle  # ray.actor.ActorHandle
        self._name = name
        self._mailbox = Mailbox(self._exchange)

    def __reduce__(self) -> tuple[Any, ...]:
        return RayGenerate, (self._handle, self._name)

    async def __call__(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `EngineLost` when the actor's process is gone or not yet
        serving."""
        return await self._mailbox.generate(request)

    async def cancel(self, request_id: str) -> bool:
        """End a request early. Raises `EngineLost` when the actor's process is gone."""
        cancelled: bool = await self._ask("cancel", request_id)
        return cancelled

    async def _exchange(self, envelope: Envelope) -> list[Answer]:
        answers: list[Answer] = await self._ask("exchange", envelope)
        return answers

    async def _ask(self, method: str, argument: Any) -> Any:
        import ray

        try:
            return await getattr(self._handle, method).remote(argument)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:
            raise EngineLost(f"{self._name}: {type(error).__name__}") from None


class RayActor:
    """A Ray actor and the rules for talking to it: a deadline on each call, a method never run
    twice."""

    def __init__(
        self,
        name: str,
        handle: Any,
        place: Place | None = None,
        booked: tuple[float, float] = (0.0, 0.0),
        ended: Ended | None = None,
    ) -> None:
        """`place` is None on a Ray of the run's own, where (CPUs, GPUs) are `booked`. `ended` is
        told of its end."""
        self.name = name
        self.handle = handle
        self.place = place
        self.booked = booked
        self._ended = ended

    async def call(self, method: str, *args: Any, timeout_s: float, waiting_for: str) -> Any:
        """As `Actor.call`."""
        import ray

        try:
            return await asyncio.wait_for(getattr(self.handle, method).remote(*args), timeout_s)
        except TimeoutError:
            raise DeadlinePassed(
                f"{self.name}: {waiting_for}: no answer within {timeout_s:g} s"
            ) from None
        except ray.exceptions.ActorDiedError as error:
            raise ActorGone(
                f"{self.name}: died for good during {waiting_for}: {_last_line(error)}"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLost(f"{self.name}: {type(error).__name__} during {waiting_for}") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ray.exceptions.RayError):
                raise ActorLost(f"{self.name}: {_last_line(cause)} during {waiting_for}") from None
            raise cause from None

    async def restart(self) -> None:
        """Kill; Ray runs the constructor again in a new process."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self.handle, no_restart=False)

    def end(self) -> None:
        """Kill, and tell Ray not to restart it."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self.handle, no_restart=True)
        if self._ended is not None:
            self._ended(self)

    async def lacks(self) -> str:
        """Asked of Ray's head, within `_PATIENCE_S`; a head that is silent is no lack of room."""
        if self.place is None:
            return ""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self.place.lack), _PATIENCE_S)
        except TimeoutError:
            return ""

    async def home(self, *, timeout_s: float) -> Home:
        """As `Actor.home`."""
        where: Home = await self.call(
            "__ray_call__", _home, timeout_s=timeout_s, waiting_for="its whereabouts"
        )
        return where

    def generate_client(self) -> EngineClient:
        """Carried to the environment workers by Ray."""
        return RayGenerate(self.handle, self.name)


def _home(_actor: Any) -> Home:
    return home()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class RayGauges:
    """Every metric of a run as a gauge of Ray's own Prometheus endpoint, which each node has.

    `rollout/lag_max` becomes `ray_loopwright_rollout_lag_max{run="…"}`, and `engine/0/running` the
    series `engine="0"` of `ray_loopwright_engine_running`. Events are counted by kind.
    """

    def __init__(self, run_name: str) -> None:
        self._run = run_name
        self._gauges: dict[str, Any] = {}
        self._events: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set every gauge; `ray_loopwright_step` is the step."""
        for name, value in {"step": float(step), **metrics}.items():
            parts = name.split("/")
            engine = parts.pop(1) if parts[0] == "engine" and len(parts) == 3 else ""
            self._gauge("_".join(parts), name).set(value, {"run": self._run, "engine": engine})

    def event(self, kind: str, **fields: Any) -> None:
        """Count it."""
        from ray.util.metrics import Counter

        if self._events is None:
            self._events = Counter(
                "loopwright_events", "What happened once: restarts, faults", ("run", "kind")
            )
        self._events.inc(1, {"run": self._run, "kind": kind})

    def close(self) -> None:
        """The series end with the process."""

    def _gauge(self, name: str, description: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            clean = re.sub(r"[^a-zA-Z0-9_]", "_", name)
            self._gauges[name] = Gauge(f"loopwright_{clean}", description, ("run", "engine"))
        return self._gauges[name]


class RayCluster:
    """A Ray cluster that was found, or one started for this run only."""

    def __init__(
        self,
        address: str,
        needs_of: Callable[[Resources], Needs],
        *,
        cpus: int,
        object_store_bytes: int,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        import ray

        # A driver that warns about its own worker logs hides the one line that matters.
        os.environ.setdefault("RAY_DEDUP_LOGS", "1")
        self._owned = False
        self._actors: list[RayActor] = []
        self._places: Places | None = None  # on a found cluster
        logging.getLogger("ray").setLevel(logging.WARNING)
        if address in ("auto", "local"):
            found = address == "auto" and _running_address()
            if found:
                ray.init(address=found, log_to_driver=False, logging_level=logging.WARNING)
            else:
                self._owned = True
                needs = needs_of(Resources.of_this_machine(cpus))
                ray.init(
                    address="local",
                    num_cpus=max(cpus or os.cpu_count() or 1, math.ceil(needs.cpus)),
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        self.alone = self._owned
        self.head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
        self.resources = Resources.of_nodes(ray.nodes())
        if self._owned:
            self.resources = Resources.of_this_machine(cpus)
        if not self._owned:
            self._reserve(needs_of(self.resources), timeout_s, say)
        has = ray.cluster_resources()
        self._unbooked = (has.get("CPU", 0.0), has.get("GPU", 0.0))
        where = "started here" if self._owned else "found"
        self.description = f"Ray {ray.__version__}, {where}, {amounts(ray.cluster_resources())}"

    def _reserve(self, needs: Needs, timeout_s: float, say: Callable[[str], None]) -> None:
        """Room for all actors or none: half a run would wait for ever, holding what others need."""
        import ray

        bundles = needs.bundles_on(ray.cluster_resources())
        reserved = ray.util.placement_group(bundles, strategy="PACK")
        self._places = Places(ray, reserved, bundles)
        if reserved.wait(timeout_seconds=min(_PATIENCE_S, timeout_s)):
            return
        say(f"waiting up to {timeout_s:g} s for {needs}; {room(ray)}")
        if not reserved.wait(timeout_seconds=max(timeout_s - _PATIENCE_S, 0)):
            found = room(ray)
            self.shutdown()
            raise RunError(
                f"the Ray cluster made no room within {timeout_s:g} s for {needs}; {found}: stop "
                "other jobs, ask for less (trainer.threads, rollout.engines, rollout.threads, "
                "environment.workers), or raise cluster.start_timeout_s"
            )

    def spawn(self, name: str, target: str, args: tuple[Any, ...], placement: Placement) -> Actor:
        """As `Cluster.spawn`. Ray restarts a lost process by itself; the supervisor counts how
        often."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        variables = {
            "OMP_NUM_THREADS": str(placement.threads),
            "MKL_NUM_THREADS": str(placement.threads),
            "TOKENIZERS_PARALLELISM": "false",
            **placement.environment,
        }
        # elsewhere the job's working directory or the cluster's image provides the package
        if self._owned:
            variables["PYTHONPATH"] = os.pathsep.join(
                [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        place = self._places.take(placement) if self._places is not None else None
        booked = place.wanted if place is not None else self._book(placement)
        options: dict[str, Any] = {
            "num_cpus": booked[0],
            "num_gpus": booked[1],
            "max_restarts": -1,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": variables},
        }
        if place is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                place.group, placement_group_bundle_index=place.index
            )
        cls = load_target(target)
        if not _is_asynchronous(cls):
            options["max_concurrency"] = 3  # a ping is answered during a long step and a resend
        handle = ray.remote(cls).options(**options).remote(*args)
        actor = RayActor(name, handle, place, booked, self._ended)
        self._actors.append(actor)
        return actor

    def _book(self, placement: Placement) -> tuple[float, float]:
        """The (CPUs, GPUs) to book on a Ray of the run's own. What joins beyond its CPUs shares
        them: such a Ray always has room, but for GPUs."""
        cpus, gpus = self._unbooked
        if gpus < placement.gpus:
            raise RunError(f"this machine has {gpus:g} GPUs left, {placement.gpus:g} needed")
        booked = (placement.cpus if placement.cpus <= cpus else 0.0, placement.gpus)
        self._unbooked = (cpus - booked[0], gpus - booked[1])
        return booked

    def _ended(self, actor: RayActor) -> None:
        if actor not in self._actors:
            return
        self._actors.remove(actor)
        if self._places is not None and actor.place is not None:
            self._places.give_back(actor.place)
        else:
            cpus, gpus = self._unbooked
            self._unbooked = (cpus + actor.booked[0], gpus + actor.booked[1])

    def tracker(self, run_name: str) -> Tracker:
        """Ray's own Prometheus endpoint."""
        return RayGauges(run_name)

    def shutdown(self) -> None:
        """Kill what was spawned here; stop Ray where this process started it."""
        import ray

        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor.handle, no_restart=True)
        self._actors.clear()
        if self._places is not None:
            self._places.close()
        ray.shutdown()


def _is_asynchronous(cls: Callable[..., Any]) -> bool:
    return any(asyncio.iscoroutinefunction(value) for value in vars(cls).values())


def _running_address() -> str | None:
    """The address of a cluster this process belongs to: a submitted job's, or the one RAY_ADDRESS
    names."""
    return os.environ.get("RAY_ADDRESS")


def connect(
    address: str,
    needs_of: Callable[[Resources], Needs],
    *,
    cpus: int,
    object_store_bytes: int,
    timeout_s: float,
    say: Callable[[str], None],
) -> Cluster:
    """The cluster that `cluster.address` names: `none`, `local`, `auto`, or an address.

    `needs_of` says what the run asks of a cluster that has so much. On a found one room for it is
    reserved; `say` is told if that takes time. Raises
    `RunError` if there is no such cluster, or no room within `timeout_s`.
    """
    if address == "none":
        from loopwright.orchestrator.in_process import InProcess

        return InProcess()
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return RayCluster(
            address,
            needs_of,
            cpus=cpus,
            object_store_bytes=object_store_bytes,
            timeout_s=timeout_s,
            say=say,
        )
    except (ConnectionError, OSError, RuntimeError) as error:
        raise RunError(f"no Ray at cluster.address = {address!r}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # what Ray raises for a node that did not come up in its own time
        text = f"Ray did not start: {error} Is the machine overloaded? Start the same run again"
        raise RunError(text) from error
