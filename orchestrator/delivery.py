"""The last part of a publish: every engine takes the weights and proves what it holds.

An engine that missed a delivery is sent it again, alone; one that fails is lost, and whoever brings
it back asks here for the current weights before it serves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from loopwright.actors.engine import EngineError, OnUpdate, UpdateReport
from loopwright.actors.episode import EngineLost
from loopwright.actors.weights import ChannelLost, WeightManifest
from loopwright.orchestrator.faults import ActorLost, DeadlinePassed, RunError
from loopwright.orchestrator.members import Member, Recover
from loopwright.orchestrator.processes import first_exception
from loopwright.orchestrator.sampling_record import SamplingRecord

Event = Callable[..., None]  # event(kind, **fields)
Resend = Callable[[int, tuple[str, ...]], Awaitable[WeightManifest]]  # of (version, members)


class WeightsNotProven(RunError):
    """An engine does not hold what was published."""


class Delivery:
    """Weights on their way to engines, one publish at a time."""

    def __init__(
        self,
        *,
        publish_s: float,
        on_update: OnUpdate,
        recover: Recover,
        taken: Callable[[Member], None],
        event: Event,
        resend: Resend | None,
        sampling: SamplingRecord | None,
    ) -> None:
        """`recover` brings back an engine that is lost meanwhile; `taken` is told of each that
        holds the weights. `resend` and `sampling`: as in `Pool`."""
        self._publish_s = publish_s
        self._on_update = on_update
        self._recover = recover
        self._taken = taken
        self._event = event
        self._resend = resend
        self._sampling = sampling
        self._asleep = False
        self._manifest: WeightManifest | None = None
        self._publishing = asyncio.Lock()

    @property
    def version(self) -> int:
        """What was published last; -1 before the first."""
        return self._manifest.version if self._manifest is not None else -1

    async def publish(
        self, manifest: WeightManifest, members: Callable[[], Sequence[Member]]
    ) -> list[UpdateReport]:
        """Every engine of `members` takes the weights and proves it. Raises `WeightsNotProven` with
        the names of the tensors that differ."""
        async with self._publishing:
            self._manifest, self._asleep = manifest, False
            reports = await first_exception(*(self._publish_to(m) for m in members()))
        return [r for r in reports if r is not None]

    async def refill(self, member: Member) -> None:
        """Give an engine that has just started the current weights; not in the middle of a publish,
        whose version it would miss. Raises `ChannelLost` where that cannot be now."""
        async with self._publishing:
            manifest = self._published
            if self._asleep:
                raise ChannelLost("the trainer is changing the weights that engines share")
            if not manifest.lasting:
                manifest = await self._sent_again(member)
            await self._update(member, manifest)

    async def sleep(self, members: Callable[[], Sequence[Member]]) -> None:
        """These stand still and give back their KV, until the next publish."""
        self._asleep = True
        async with self._publishing:
            await first_exception(*(self._sleep(m) for m in members()))

    @property
    def _published(self) -> WeightManifest:
        assert self._manifest is not None, "publish or start comes first"
        return self._manifest

    async def _publish_to(self, member: Member) -> UpdateReport | None:
        """The engine's report; None if it died: whoever saw that first brings it back, and then it
        is given the weights."""
        life = member.life
        try:
            try:
                return await self._update(member, self._published)
            except ChannelLost as error:  # nothing is wrong with the engine or the weights
                self._event("publish_again", actor=member.actor.name, why=str(error))
                return await self._update(member, await self._sent_again(member))
        except (ActorLost, DeadlinePassed, EngineLost, ChannelLost) as error:
            if life == member.life:
                self._recover(member, str(error), kill=isinstance(error, DeadlinePassed))
            return None

    async def _sent_again(self, member: Member) -> WeightManifest:
        version = self._published.version
        if self._resend is None:
            raise ChannelLost(f"version {version} cannot be sent again")
        return await self._resend(version, (member.key,))

    async def _sleep(self, member: Member) -> None:
        life = member.life
        try:
            await member.actor.call(
                "sleep", timeout_s=self._publish_s, waiting_for="engine to stand still"
            )
        except (ActorLost, DeadlinePassed, EngineLost) as error:
            if life == member.life:
                self._recover(member, str(error), kill=isinstance(error, DeadlinePassed))

    async def _update(self, member: Member, manifest: WeightManifest) -> UpdateReport:
        try:
            report: UpdateReport = await member.actor.call(
                "update",
                manifest,
                self._on_update,
                timeout_s=self._publish_s,
                waiting_for=f"weights of version {manifest.version}",
            )
        except EngineError as error:
            raise WeightsNotProven(f"{member.actor.name}: {error}") from error
        expected = dict(zip(manifest.names, manifest.checksums, strict=True))
        wrong = [
            name for name, checksum in expected.items() if report.checksums.get(name) != checksum
        ]
        if wrong or report.version != manifest.version:
            raise WeightsNotProven(
                f"{member.actor.name} holds version {report.version}, published "
                f"{manifest.version}; tensors that differ: {', '.join(wrong[:5]) or 'none'}"
            )
        if self._sampling is not None:
            self._sampling.engine(member.actor.name, report.journal)
        self._taken(member)
        return report
