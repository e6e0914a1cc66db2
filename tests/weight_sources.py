"""Weights that change as a trainer's do, and the two ends of a channel in one process."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from loopwright.actors.channels.channel import WeightSource
from loopwright.actors.channels.collective import Host
from loopwright.actors.channels.receiver import Received, Receiver
from loopwright.actors.ranks import Ranks
from loopwright.actors.shared_memory import SEGMENT_FOLDER
from loopwright.actors.weights import WeightManifest

TIMEOUT_S = 20.0


class Weights:
    """A `WeightSource` of a few tensors of several dtypes; `head` is tied to `embed`."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        embed = torch.randn(33, 16, generator=generator)
        self.tensors: dict[str, Tensor] = {
            "embed": embed,
            "half": torch.randn(65, 33, generator=generator).to(torch.bfloat16),
            "scalar": torch.randn((), generator=generator),
            "steps": torch.arange(7),
            "matrix": torch.randn(48, 24, generator=generator),
            "head": embed,
        }

    def nudge(self, seed: int, share: float = 0.02) -> None:
        """Change a share of the elements a little."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.tensors.items():
            if name != "head" and tensor.is_floating_point():
                chosen = torch.rand(tensor.shape, generator=generator) < share
                change = torch.randn(tensor.shape, generator=generator) * 0.01
                tensor.add_((change * chosen).to(tensor.dtype))
        self.tensors["steps"] += 1

    def published_shapes(self) -> dict[str, Tensor]:
        """On the meta device; the tied pair is one object."""
        meta: dict[int, Tensor] = {}
        return {n: meta.setdefault(id(t), t.to("meta")) for n, t in self.tensors.items()}

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        """One tensor at a time; the tied pair together."""
        yield {"embed": self.tensors["embed"], "head": self.tensors["head"]}
        for name in ("half", "scalar", "steps", "matrix"):
            yield {name: self.tensors[name]}


class Engines:
    """Receivers that take every publish side by side, as engines in other processes would."""

    def __init__(self, count: int) -> None:
        self.receivers = [Receiver() for _ in range(count)]

    @property
    def members(self) -> tuple[str, ...]:
        """Their names, as a supervisor would tell them to the trainer."""
        return tuple(f"engine {i}/0" for i in range(len(self.receivers)))

    def take(self, manifest: WeightManifest) -> list[Received]:
        """All of them take it and serve from it."""
        return [
            self._served(r, f) for r, f in zip(self.receivers, self.attempt(manifest), strict=True)
        ]

    def attempt(self, manifest: WeightManifest) -> list[Any]:
        """What each of them received, or the error that it raised."""

        def receive(receiver: Receiver) -> Any:
            try:
                return receiver.receive(manifest)
            except Exception as error:  # noqa: BLE001 - handed to the test
                return error

        with ThreadPoolExecutor(len(self.receivers)) as pool:
            return list(pool.map(receive, self.receivers))

    @staticmethod
    def _served(receiver: Receiver, found: Any) -> Received:
        if isinstance(found, Exception):
            raise found
        receiver.serving(found)
        return found

    def close(self) -> None:
        """Leave."""
        for receiver in self.receivers:
            receiver.close()


class FlippingHost(Host):
    """A network that flips one bit of what is delivered, once told where."""

    flip_at: int | None = None

    def deliver(
        self, flats: Sequence[Tensor], members: tuple[str, ...], *, apart: bool = False
    ) -> list[str]:
        """Deliver, damaged."""
        if self.flip_at is not None:
            flats = [*flats[:-1], flats[-1].clone()]
            flats[-1][self.flip_at] ^= 4
        return super().deliver(flats, members, apart=apart)


def host(kind: type[Host] = Host, timeout_s: float = TIMEOUT_S) -> Any:
    """A trainer's end on this machine, with buckets so small that several travel."""
    return kind(address="127.0.0.1", device="cpu", timeout_s=timeout_s, bucket_bytes=1000)


def assert_equal(found: Mapping[str, Tensor], source: WeightSource) -> None:
    """Every tensor, bit for bit."""
    expected = {n: t for bucket in source.published_buckets() for n, t in bucket.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def flip_bit(segment: str, at: int) -> None:
    """Damage one byte of shared memory."""
    with (SEGMENT_FOLDER / segment).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def nudged(model: Any) -> Any:
    """A copy of the model with a few weights of every tensor changed."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.05
            parameter.add_(chosen * 0.01)
    return changed


class ModelSource:
    """A `WeightSource` of a transformers model."""

    def __init__(self, model: Any) -> None:
        self._tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)

    def published_shapes(self) -> dict[str, torch.Tensor]:
        """On the meta device; tied ones are the same object."""
        meta: dict[int, torch.Tensor] = {}
        return {
            n: meta.setdefault(id(t), torch.empty(t.shape, dtype=t.dtype, device="meta"))
            for n, t in self._tensors.items()
        }

    def published_buckets(self) -> Iterator[dict[str, torch.Tensor]]:
        """All at once."""
        yield dict(self._tensors)


class Adapted:
    """As much of a trainer backend as the adapter channel reads: a model with random LoRA, or
    DoRA."""

    def __init__(self, model: Any, seed: int, kind: str = "lora") -> None:
        from loopwright.actors.lora import add_adapters

        self.ranks = Ranks()
        self.model = add_adapters(
            copy.deepcopy(model), kind=kind, rank=4, alpha=8.0, targets="all-linear"
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
                elif "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def gather(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Parameters by name."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: parameters[name].detach() for name in names}
