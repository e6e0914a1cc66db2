"""Every weight channel: what is published is what engines hold, and damage is named."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.actors.channels.channel import ImageChannel, open_channel
from loopwright.actors.channels.delta import apply_change, bits_of, encode_change
from loopwright.actors.channels.lowrank import (
    Basis,
    apply_lowrank,
    encode_lowrank,
    projector_bases,
)
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.ranks import Ranks
from loopwright.actors.shared_memory import SEGMENT_FOLDER
from loopwright.actors.weights import ChannelLost, WeightError, decode, encode, manifest_checksums
from loopwright.algorithms.optimizers import build
from tests.weight_sources import (
    TIMEOUT_S,
    Engines,
    FlippingHost,
    Weights,
    assert_equal,
    flip_bit,
    host,
)

CHANNELS = [
    ("shared_memory", "shared_memory"),
    ("collective", "collective"),
    ("delta", "shared_memory"),
    ("delta", "collective"),
    ("lowrank_delta", "shared_memory"),
]
NAMED = pytest.mark.parametrize(("name", "carrier"), CHANNELS)
RUN = f"test-channels-{os.getpid()}"


def basis_of(weights: Weights, rank: int = 4) -> dict[str, Basis]:
    """A projector for `matrix`."""
    generator = torch.Generator().manual_seed(9)
    vectors, _ = torch.linalg.qr(torch.randn(48, rank, generator=generator))
    return {"matrix": Basis(vectors, left=True)}


def opened(name: Any, carrier: Any, **options: Any) -> Any:
    """The trainer's end, on this machine, with small buckets."""
    chosen = ChannelSettings(
        channel=name, carrier=carrier, bucket_bytes=1000, timeout_s=TIMEOUT_S, **options
    )
    return open_channel(chosen, RUN, lambda: basis_of(Weights()))


@pytest.fixture
def engines() -> Iterator[Engines]:
    three = Engines(3)
    yield three
    three.close()


@NAMED
def test_every_engine_holds_every_version(name: str, carrier: str, engines: Engines) -> None:
    channel, weights = opened(name, carrier, full_every=3), Weights()
    kinds = []
    try:
        for version in range(6):
            weights.nudge(version)
            manifest = decode(encode(channel.publish(version, weights, engines.members)))
            kinds.append(manifest.kind)
            for received in engines.take(manifest):
                assert_equal(received.weights, weights)
                assert received.checksums == manifest_checksums(manifest)
                assert received.weights["head"].data_ptr() == received.weights["embed"].data_ptr()
    finally:
        channel.close()
    change = {"delta": "delta", "lowrank_delta": "lowrank"}.get(name, "full")
    assert kinds == ["full", change, change] * 2


@NAMED
def test_what_is_served_is_not_overwritten_by_what_is_received(
    name: str, carrier: str, engines: Engines
) -> None:
    channel, weights = opened(name, carrier), Weights()
    try:
        served = engines.take(channel.publish(0, weights, engines.members))
        kept = [{n: t.clone() for n, t in r.weights.items()} for r in served]
        weights.nudge(1)
        engines.attempt(channel.publish(1, weights, engines.members))  # taken, not yet served
        for received, before in zip(served, kept, strict=True):
            assert all(torch.equal(received.weights[n], t) for n, t in before.items())
    finally:
        channel.close()


@pytest.mark.parametrize("name", ["shared_memory", "delta", "lowrank_delta"])
@pytest.mark.parametrize("version", [0, 1])
def test_a_flipped_bit_in_shared_memory_names_the_tensor(
    name: str, version: int, engines: Engines
) -> None:
    channel, weights = opened(name, "shared_memory"), Weights()
    try:
        for number in range(version):
            engines.take(channel.publish(number, weights, engines.members))
            weights.nudge(number, 0.5)
        manifest = channel.publish(version, weights, engines.members)
        at = manifest.offsets[manifest.names.index("matrix")] + 30
        flip_bit(manifest.segment, at)
        for error in engines.attempt(manifest):
            assert isinstance(error, WeightError) and not isinstance(error, ChannelLost)
            assert "matrix" in str(error) and "half" not in str(error)
    finally:
        channel.close()


@pytest.mark.parametrize("name", ["collective", "delta"])
def test_a_bit_flipped_on_the_network_names_the_tensor(name: Any, engines: Engines) -> None:
    network, weights = host(FlippingHost), Weights()
    chosen = ChannelSettings(channel=name, carrier="collective", bucket_bytes=1000)
    channel = ImageChannel(chosen, network)
    try:
        engines.take(channel.publish(0, weights, engines.members))
        weights.nudge(1, 0.5)
        network.flip_at = 100  # in the embedding, the first that travels
        for error in engines.attempt(channel.publish(1, weights, engines.members)):
            assert isinstance(error, WeightError) and not isinstance(error, ChannelLost)
            assert "embed" in str(error) and "matrix" not in str(error)
        network.flip_at = None
        weights.nudge(2)
        manifest = channel.resend(1, engines.members)  # the image was never damaged
        assert [r.version for r in engines.take(manifest)] == [1, 1, 1]
    finally:
        channel.close()


@NAMED
def test_an_engine_that_starts_late_is_given_the_same_version(
    name: str, carrier: str, engines: Engines
) -> None:
    channel, weights, late = opened(name, carrier), Weights(), Engines(1)
    try:
        for version in (0, 1):
            weights.nudge(version)
            engines.take(channel.publish(version, weights, engines.members))
        weights_of_1 = Weights()
        for version in (0, 1):
            weights_of_1.nudge(version)
        weights.nudge(2)  # the trainer is a step ahead already
        (received,) = late.take(channel.resend(1, ("engine 9/0",)))
        assert_equal(received.weights, weights_of_1)
        with pytest.raises(ChannelLost, match="has not published version 7"):
            channel.resend(7, ("engine 9/0",))
        everyone = Engines(0)
        everyone.receivers = [*engines.receivers, *late.receivers]
        manifest = channel.publish(2, weights, everyone.members)
        assert manifest.kind == "full", "the late one has no base for a change"
        for received in everyone.take(manifest):
            assert_equal(received.weights, weights)
    finally:
        late.close()
        channel.close()


def test_a_change_is_refused_by_an_engine_without_its_base(engines: Engines) -> None:
    channel, weights = opened("delta", "shared_memory"), Weights()
    try:
        channel.publish(0, weights, engines.members)
        weights.nudge(1)
        manifest = channel.publish(1, weights, engines.members)
        for error in engines.attempt(manifest):
            assert isinstance(error, ChannelLost) and "holds nothing" in str(error)
    finally:
        channel.close()


def test_a_missing_peer_is_told_by_the_deadline() -> None:
    alone, network = Engines(1), host(timeout_s=1.0)
    chosen = ChannelSettings(
        channel="collective", carrier="collective", timeout_s=1.0, bucket_bytes=1000
    )
    channel = ImageChannel(chosen, network)
    try:
        manifest = channel.publish(0, Weights(), ("engine 0/0", "engine 1/0"))
        (error,) = alone.attempt(manifest)
        assert isinstance(error, ChannelLost) and "within 1 s" in str(error)
        (received,) = alone.take(channel.resend(0, alone.members))
        assert_equal(received.weights, Weights())
    finally:
        alone.close()
        channel.close()


class Noise:
    """A `WeightSource` whose bits no compression makes fewer."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.bits = torch.randint(-(1 << 63), (1 << 63) - 1, (1000,), generator=generator)

    def published_shapes(self) -> dict[str, torch.Tensor]:
        """One tensor."""
        return {"bits": self.bits.to("meta")}

    def published_buckets(self) -> Iterator[dict[str, torch.Tensor]]:
        """One bucket."""
        yield {"bits": self.bits}


def test_a_change_that_is_as_large_as_the_weights_travels_whole(engines: Engines) -> None:
    channel = opened("delta", "shared_memory")
    try:
        engines.take(channel.publish(0, Noise(0), engines.members))
        manifest = channel.publish(1, Noise(1), engines.members)
        assert manifest.kind == "full"
        for received in engines.take(manifest):
            assert_equal(received.weights, Noise(1))
    finally:
        channel.close()


def test_ipc_without_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(WeightError, match="finds none here"):
        open_channel(ChannelSettings(channel="ipc", carrier="ipc"), RUN)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
    length=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_a_change_is_lossless(data: Any, dtype: torch.dtype, length: int, share: float) -> None:
    """Any bits: not-a-number, infinities and negative zero included."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    width = length * dtype.itemsize
    old = torch.randint(0, 256, (width,), dtype=torch.uint8, generator=generator).view(dtype)
    new = torch.randint(0, 256, (width,), dtype=torch.uint8, generator=generator).view(dtype)
    kept = torch.rand(length, generator=generator) >= share
    bits_of(new)[kept.numpy()] = bits_of(old)[kept.numpy()]
    code = encode_change(old, new)
    apply_change(old, code, "tensor")
    assert (bits_of(old) == bits_of(new)).all()


def test_unchanged_bf16_weights_cost_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1 << 18, generator=generator).to(torch.bfloat16)
    new = old.clone()
    new[torch.rand(len(new), generator=generator) < 0.01] *= 1.005  # the last bit, mostly
    assert len(encode_change(old, new)) < 0.02 * old.nbytes


@pytest.mark.parametrize("damage", [lambda c: c[:5], lambda c: c[:-4], lambda c: b"\x05" + c[1:]])
def test_a_damaged_change_names_its_tensor(damage: Callable[[bytes], bytes]) -> None:
    old = torch.zeros(100)
    code = encode_change(old, old + torch.eye(10).view(-1))
    with pytest.raises(WeightError, match=r"layers\.0: .* damaged"):
        apply_change(old, damage(code), "layers.0")


@pytest.mark.parametrize("left", [True, False])
def test_a_galore_update_is_rebuilt_exactly_from_thin_factors(left: bool) -> None:
    """Adam in the subspace, one optimizer step: what does not come of the factors is corrected."""
    generator = torch.Generator().manual_seed(1)
    m, n, r = 96, 160, 4
    old = torch.randn(m, n, generator=generator) * 0.02
    vectors, _ = torch.linalg.qr(torch.randn(m if left else n, r, generator=generator))
    inner = torch.randn((r, n) if left else (m, r), generator=generator).sign() * 1e-4
    new = old - (vectors @ inner if left else inner @ vectors.T)
    basis = Basis(vectors, left)
    code = encode_lowrank(old, new, basis, with_basis=True)
    rebuilt, bases = old.clone(), dict[str, torch.Tensor]()
    apply_lowrank(rebuilt, code, bases, "matrix")
    assert torch.equal(rebuilt, new)
    assert len(code) < 0.2 * len(encode_change(old, new))
    later = new - (vectors @ inner if left else inner @ vectors.T)
    thin = encode_lowrank(new, later, basis, with_basis=False)
    assert len(thin) < len(code)
    apply_lowrank(rebuilt, thin, bases, "matrix")
    assert torch.equal(rebuilt, later)
    with pytest.raises(WeightError, match="matrix: its low-rank change is damaged"):
        apply_lowrank(rebuilt, thin, {}, "matrix")


class Projected:
    """As much of a trainer backend as the low-rank channel reads: one matrix under GaLore."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.ranks = Ranks()
        self.layer = torch.nn.Linear(192, 96, bias=False)
        options = {"rank": 4, "gap": 100, "lr": 1e-3, "weight_decay": 0.0}
        self.optimizer = build(self.layer, "galore", **options)

    def step(self) -> None:
        """One optimizer step on a random gradient."""
        self.layer.weight.grad = torch.randn(96, 192)
        self.optimizer.step()

    def published_shapes(self) -> dict[str, torch.Tensor]:
        """One matrix."""
        return {"weight": self.layer.weight.detach().to("meta")}

    def published_buckets(self) -> Iterator[dict[str, torch.Tensor]]:
        """One bucket."""
        yield {"weight": self.layer.weight.detach()}


def test_galore_between_refreshes_travels_as_thin_factors(engines: Engines) -> None:
    """Of the optimizer itself; the basis travels once, and again after it was renewed."""
    trained = Projected()
    chosen = ChannelSettings(channel="lowrank_delta", bucket_bytes=1000, full_every=100)
    channel: Any = open_channel(chosen, RUN, lambda: projector_bases(trained))
    whole = trained.layer.weight.nbytes
    sizes = []
    try:
        for version in range(5):
            manifest = channel.publish(version, trained, engines.members)
            for received in engines.take(manifest):
                assert_equal(received.weights, trained)
            sizes.append(manifest.size_bytes)
            trained.step()
    finally:
        channel.close()
    assert manifest.kind == "lowrank"
    assert sizes[0] == whole and max(sizes[1:]) < 0.15 * whole
    assert sizes[1] > sizes[2] + trained.layer.weight.shape[0] * 4 * 3, "the basis came once"


def test_segments_of_a_closed_channel_are_gone(engines: Engines) -> None:
    channel = opened("delta", "shared_memory")
    for version in range(4):
        weights = Weights()
        weights.nudge(version)
        engines.take(channel.publish(version, weights, engines.members))
    assert len(list(SEGMENT_FOLDER.glob(f"loopwright-{RUN}-*"))) == 2
    channel.close()
    assert not list(SEGMENT_FOLDER.glob(f"loopwright-{RUN}-*"))
