"""A chain of processes that passes bytes on: the trainer sends each bucket once, every engine hands
it to the next while it receives the following one.

    trainer ──▶ engine 1 ──▶ engine 2 ──▶ …        N engines cost the trainer one write

On a CPU the links are torch.distributed's gloo, on a GPU NCCL broadcasts the buckets. The groups
are made without torch's default process group, which belongs to a sharded trainer or to vLLM. A
group is formed of whoever joins first (the store counts), used for as long as its members live, and
formed anew after one of them died. Every wait has a deadline; a wait that fails ends the group.

`ProcessGroupNCCL` was not run here: the code for `device = "cuda"` has seen no GPU.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from loopwright.actors.weights import ChannelLost

dist: Any = torch.distributed  # its type stubs lack the process groups
_TAGS = 1 << 20  # messages of one group before their tags repeat


class Chain:
    """One member's end of a group: rank 0 sends, the others receive and pass on."""

    def __init__(
        self, store: Any, group: str, rank: int, size: int, *, address: str, timeout_s: float
    ) -> None:
        """Meet the others. Raises `ChannelLost` if they are not there in time."""
        self.rank, self.size = rank, size
        self._timeout = timedelta(seconds=timeout_s)
        self._sent = 0
        with _as_lost(f"weight group {group}: {size - 1} engines to join", timeout_s):
            prefix = dist.PrefixStore(group, store)
            options = dist.ProcessGroupGloo._Options()
            options._timeout = self._timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            self._links = dist.ProcessGroupGloo(prefix, rank, size, options)

    def send(self, flat: Tensor, bucket_bytes: int) -> None:
        """Send `flat` [bytes] uint8 down the chain; returns when the next member has it all."""
        self._pass_on(flat, bucket_bytes, receive=False)

    def receive(self, flat: Tensor, bucket_bytes: int) -> None:
        """Fill `flat` [bytes] uint8 with what the member before sends, and pass it on."""
        self._pass_on(flat, bucket_bytes, receive=True)

    def _pass_on(self, flat: Tensor, bucket_bytes: int, *, receive: bool) -> None:
        seconds = self._timeout.total_seconds()
        pending: list[Any] = []
        with _as_lost(f"weights of {len(flat):,} bytes, member {self.rank} of the chain", seconds):
            for start in range(0, len(flat), bucket_bytes):
                bucket, tag = flat[start : start + bucket_bytes], self._sent % _TAGS
                self._sent += 1
                if receive:
                    self._links.recv([bucket], self.rank - 1, tag).wait(self._timeout)
                if self.rank + 1 < self.size:
                    pending.append(self._links.send([bucket], self.rank + 1, tag))
                while len(pending) > 1:  # one on its way while the next is received
                    pending.pop(0).wait(self._timeout)
            for work in pending:
                work.wait(self._timeout)


class NcclGroup:
    """The same on GPUs: NCCL broadcasts each bucket from rank 0 over its own tree."""

    def __init__(
        self, store: Any, group: str, rank: int, size: int, *, device: str, timeout_s: float
    ) -> None:
        """Meet the others; `device` is this member's GPU."""
        self.rank, self.size = rank, size
        self._device = torch.device(device)
        self._timeout = timedelta(seconds=timeout_s)
        with _as_lost(f"weight group {group}: {size - 1} engines to join", timeout_s):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            prefix = dist.PrefixStore(group, store)
            self._links = dist.ProcessGroupNCCL(prefix, rank, size, options)

    def send(self, flat: Tensor, bucket_bytes: int) -> None:
        """Broadcast `flat` [bytes] uint8, wherever it lies, through two buckets on the device."""
        works: list[tuple[Any, Tensor]] = []
        with _as_lost(f"weights of {len(flat):,} bytes", self._timeout.total_seconds()):
            for start in range(0, len(flat), bucket_bytes):
                bucket = flat[start : start + bucket_bytes].to(self._device, non_blocking=True)
                works.append((self._broadcast(bucket), bucket))
                while len(works) > 1:
                    works.pop(0)[0].wait(self._timeout)
            for work, _ in works:
                work.wait(self._timeout)

    def receive(self, flat: Tensor, bucket_bytes: int) -> None:
        """Fill `flat` [bytes] uint8, wherever it lies."""
        with _as_lost(f"weights of {len(flat):,} bytes", self._timeout.total_seconds()):
            for start in range(0, len(flat), bucket_bytes):
                target = flat[start : start + bucket_bytes]
                bucket = target if target.device == self._device else None
                if bucket is None:
                    bucket = torch.empty(len(target), dtype=torch.uint8, device=self._device)
                self._broadcast(bucket).wait(self._timeout)
                if bucket is not target:
                    target.copy_(bucket)

    def _broadcast(self, bucket: Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._links.broadcast([bucket], options)


Link = Chain | NcclGroup


class Host:
    """The trainer's end: a store where engines meet it, and at most one group that is in use."""

    def __init__(
        self,
        *,
        address: str,
        device: str,
        timeout_s: float,
        bucket_bytes: int,
        receivers_per_engine: int = 1,
    ) -> None:
        """Listen on `address` (this host's, as engines reach it), on a port that is free."""
        self._address, self._device = address, device
        self._timeout_s, self.bucket_bytes = timeout_s, bucket_bytes
        self._receivers_per_engine = receivers_per_engine
        try:
            listening = socket.create_server((address, 0))
        except OSError as error:
            raise ChannelLost(
                f"the collective channel cannot listen on {address}: {error}; set "
                f"rollout.channel_options.host to an address of the trainer's host"
            ) from error
        self._port = listening.getsockname()[1]
        self._store: Any = dist.TCPStore(
            address,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
        self._groups = 0
        self._name = ""  # of the group in use
        self._members: tuple[str, ...] = ()
        self._link: Link | None = None
        self._sending: list[threading.Thread] = []

    def deliver(
        self, flats: Sequence[Tensor], members: tuple[str, ...], *, apart: bool = False
    ) -> list[str]:
        """Begin to send `flats`, one after the other, to engines that read where to meet; returns
        "host:port/group" for each.

        A thread sends; `wait` waits for it, and until then they must not change. The group of the
        former delivery is used again if it has the same members and no delivery failed.
        `apart`: to engines that missed something, in a group of their own.
        """
        if apart or members != self._members or not self._name:
            self._groups += 1
            self._name, self._link = f"g{self._groups}", None
            self._members = members
        thread = threading.Thread(
            target=self._send,
            args=(self._name, self._link, len(members), list(flats)),
            name=f"weights-{self._name}",
            daemon=True,
        )
        self._sending.append(thread)
        thread.start()
        return [f"{self._address}:{self._port}/{self._name}"] * len(flats)

    def wait(self) -> None:
        """Until nothing is being sent. Each send ends by its own deadline."""
        while self._sending:
            self._sending.pop(0).join()

    def close(self) -> None:
        """Leave every group; the store closes with the last reference."""
        self._link, self._store = None, None

    def _send(self, name: str, link: Link | None, engines: int, flats: list[Tensor]) -> None:
        try:
            if link is None:
                # A client of its own: one that ran into its deadline cannot be used again.
                store = _client(self._address, self._port, self._timeout_s)
                link = connect(
                    store, name, 0, engines * self._receivers_per_engine + 1,
                    address=self._address, device=self._device, timeout_s=self._timeout_s,
                )  # fmt: skip
            for flat in flats:
                link.send(flat, self.bucket_bytes)
            if name == self._name:
                self._link = link
        except ChannelLost:
            # The engines see the same and say so; whoever supervises them asks for another send.
            if name == self._name:
                self._name = ""


class Guest:
    """An engine's end: joins the group that a manifest names, and stays while it is in use."""

    def __init__(self, device: str) -> None:
        """Nothing is joined yet; `device` is where this engine computes."""
        self._device = device
        self._where = ""
        self._link: Link | None = None

    def receive(
        self, where: str, flat: Tensor, *, receivers: int, bucket_bytes: int, timeout_s: float
    ) -> None:
        """Fill `flat` [bytes] uint8 with the delivery to `where`. Raises `ChannelLost`."""
        if where != self._where:
            self.close()
            self._link = self._join(where, receivers, timeout_s)
            self._where = where
        assert self._link is not None
        try:
            self._link.receive(flat, bucket_bytes)
        except ChannelLost:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group."""
        self._link, self._where = None, ""

    def _join(self, where: str, receivers: int, timeout_s: float) -> Link:
        place, _, group = where.partition("/")
        host, _, port = place.rpartition(":")
        store = _client(host, int(port), timeout_s)
        with _as_lost(f"weight group {group}: its trainer at {place}", timeout_s):
            rank = int(store.add(f"{group}/joined", 1))
        if rank > receivers:
            raise ChannelLost(
                f"weight group {group} at {place} has its {receivers} engines already; it was "
                f"formed without this one"
            )
        return connect(
            store, group, rank, receivers + 1,
            address=own_address(host), device=self._device, timeout_s=timeout_s,
        )  # fmt: skip


def _client(host: str, port: int, timeout_s: float) -> Any:
    """A connection to the trainer's store. Raises `ChannelLost`."""
    with _as_lost(f"the trainer's store at {host}:{port}", timeout_s):
        return dist.TCPStore(
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )


def connect(
    store: Any, group: str, rank: int, size: int, *, address: str, device: str, timeout_s: float
) -> Link:
    """This member's link to the group: gloo on a CPU, NCCL on a GPU."""
    if device.startswith("cuda"):
        return NcclGroup(store, group, rank, size, device=device, timeout_s=timeout_s)
    return Chain(store, group, rank, size, address=address, timeout_s=timeout_s)


def own_address(towards: str = "") -> str:
    """The address of this machine on the way to another one, by default one in the wide world;
    nothing is sent. The way to a peer is there where no other is, and is the right one of
    several."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards or "192.0.2.1", 9))
        except OSError:  # no route: this machine is alone
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def _as_lost(waiting_for: str, timeout_s: float) -> Iterator[None]:
    """torch.distributed's errors of peers that are gone or late, as `ChannelLost`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistStoreError and DistNetworkError are Runtime
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChannelLost(f"{waiting_for}, within {timeout_s:g} s: {first}") from error
