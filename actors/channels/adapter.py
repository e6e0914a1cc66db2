"""LoRA without its base: the base weights travel once, then A and B of every adapted layer.

    W = base + scale · B·A        lora_A [r, in], lora_B [out, r]  (LoRA, Hu et al. 2021)
    row of W · m / |row of W|     lora_magnitude_vector [out]      (DoRA, Liu et al. 2024)

On one host the base lies in shared memory, and where the trainer can, its own frozen parameters
become views of it: trainer and engines then hold one copy of the base weights between them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loopwright.actors.channels.channel import Segments, WeightSource, torch_dtype
from loopwright.actors.channels.collective import Host
from loopwright.actors.channels.image import Image
from loopwright.actors.channels.in_place import adopt
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.shared_memory import SharedWeights, unlink_stale
from loopwright.actors.weights import ChannelLost, WeightError, WeightManifest, encode

_PEFT_NAME = ".default"  # peft's own name for an adapter that has none
_FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")


class AdaptedSource(Protocol):
    """A trained model with LoRA adapters: base and adapter, apart."""

    scale: float

    @property
    def owner(self) -> object:
        """Whose base it is: another object means another base."""
        ...

    def base(self) -> WeightSource:
        """The frozen weights, under their Hugging Face names."""
        ...

    def published_shapes(self) -> dict[str, Tensor]:
        """Of the adapter: `layer.lora_A.weight`, `layer.lora_B.weight`."""
        ...

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        """The adapter's values."""
        ...

    def adopt_base(self, views: Mapping[str, Tensor]) -> bool:
        """Let the frozen parameters be these tensors from now on; False if that cannot be."""
        ...


class BackendAdapters:
    """`AdaptedSource` of a trainer backend whose model carries peft's LoRA layers."""

    def __init__(self, backend: Any) -> None:
        """Raises `WeightError` for adapters of another kind than LoRA and DoRA, or with several
        scales."""
        from loopwright.actors.lora import adapted_layers

        self._backend = backend
        layers = adapted_layers(backend.model)
        self.scale = _one_scale(layers)
        self._names: dict[str, str] = {}  # published -> parameter, of the adapter
        self._base: dict[str, str] = {}  # and of the base
        for name, _ in backend.model.named_parameters(remove_duplicate=False):
            if not any(name.startswith(f"{layer}.") for layer in layers):
                self._base[name] = name
            elif ".base_layer." in name:
                self._base[name.replace(".base_layer.", ".")] = name
            elif name.split(".")[-3] in _FACTORS:
                self._names[name.replace(_PEFT_NAME, "")] = name
            else:
                raise WeightError(
                    f'rollout.channel = "adapter" carries LoRA and DoRA; {name} is of neither. Set '
                    f'rollout.channel = "shared_memory", which publishes merged weights'
                )

    @property
    def owner(self) -> object:
        """The backend."""
        return self._backend

    def base(self) -> WeightSource:
        """The frozen weights."""
        return _Renamed(self._backend, self._base)

    def published_shapes(self) -> dict[str, Tensor]:
        """The adapter's names, on the meta device."""
        return _Renamed(self._backend, self._names).published_shapes()

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        """The adapter at once: it is small."""
        yield _Renamed(self._backend, self._names).tensors()

    def adopt_base(self, views: Mapping[str, Tensor]) -> bool:
        """Where the whole model is in this process, its frozen parameters become the views."""
        return adopt(self._backend, self._base, views)


class _Renamed:
    """Some parameters of a backend under other names."""

    def __init__(self, backend: Any, names: Mapping[str, str]) -> None:
        self._backend, self._names = backend, names

    def published_shapes(self) -> dict[str, Tensor]:
        parameters = dict(self._backend.model.named_parameters(remove_duplicate=False))
        meta: dict[int, Tensor] = {}
        for own in self._names.values():
            p = parameters[own]  # whole shapes, also of a parameter that is spread over ranks
            meta.setdefault(id(p), torch.empty(p.shape, dtype=p.dtype, device="meta"))
        return {name: meta[id(parameters[own])] for name, own in self._names.items()}

    def published_buckets(self) -> Iterator[dict[str, Tensor]]:
        for name, own in self._names.items():
            yield {name: self._backend.gather([own])[own]}

    def tensors(self) -> dict[str, Tensor]:
        whole = self._backend.gather(list(self._names.values()))
        return {name: whole[own] for name, own in self._names.items()}


def _one_scale(layers: Mapping[str, nn.Module]) -> float:
    found = {float(layer.scaling["default"]) for layer in _as_any(layers)}
    if len(found) != 1:
        raise WeightError(
            f'rollout.channel = "adapter": the adapted layers have scales {sorted(found)}, one is '
            f'expected; set rollout.channel = "shared_memory", which publishes merged weights'
        )
    return found.pop()


def _as_any(layers: Mapping[str, nn.Module]) -> list[Any]:
    return list(layers.values())


class AdapterChannel:
    """Base weights once, then adapters. Engines add the one to the other."""

    def __init__(self, settings: ChannelSettings, carrier: Segments | Host, run_name: str) -> None:
        """On one host the base lies in a segment of its own, with one slot."""
        self._settings, self._carrier = settings, carrier
        self._dtype = torch_dtype(settings.dtype)
        self._run_name = f"{run_name}-base"
        self._shared: SharedWeights | None = None
        self._base: Image | None = None  # for engines elsewhere
        self._base_manifest: WeightManifest | None = None
        self._adapter: Image | None = None
        self._owner: object = None
        self._scale = 0.0
        self._members: tuple[str, ...] = ()

    def publish(
        self, version: int, source: AdaptedSource, members: tuple[str, ...]
    ) -> WeightManifest:
        """As `WeightChannel.publish`."""
        self._carrier.wait()
        shapes = source.published_shapes()
        fresh = self._adapter is None or source.owner is not self._owner
        if fresh:
            self._adapter, self._owner = Image(shapes, self._dtype), source.owner
            self._take_base(source)
        assert self._adapter is not None
        self._adapter.fill(source.published_buckets())
        self._adapter.version, self._scale = version, source.scale
        with_base = fresh or members != self._members
        self._members = members
        return self._send(members, with_base=with_base, apart=False)

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """Base and adapter, to engines that have neither."""
        if self._adapter is None or self._adapter.version != version:
            raise ChannelLost(f"this trainer has not published version {version}")
        self._members = ()
        return self._send(members, with_base=True, apart=True)

    def close(self) -> None:
        """End what is being sent by its deadline; unlink."""
        self._carrier.wait()
        self._carrier.close()
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        self._base = self._adapter = self._base_manifest = None
        unlink_stale(self._run_name)

    def _take_base(self, source: AdaptedSource) -> None:
        base = source.base()
        if self._settings.carrier != "shared_memory":
            self._base = Image(base.published_shapes(), self._dtype)
            self._base.fill(base.published_buckets())
            self._base.version = 0
            return
        if self._shared is not None:
            self._shared.close()
        self._shared = SharedWeights.create(
            self._run_name, base.published_shapes(), in_place=True, dtype=self._dtype
        )
        self._base_manifest = self._shared.write_buckets(0, base.published_buckets())
        source.adopt_base(self._shared.views())

    def _send(self, members: tuple[str, ...], *, with_base: bool, apart: bool) -> WeightManifest:
        adapter, s = self._adapter, self._settings
        assert adapter is not None
        base = self._base_manifest
        flats = [adapter.flat]
        if self._base is not None:
            base = None
            if with_base:
                flats = [self._base.flat, adapter.flat]
        *_, where = self._carrier.deliver(flats, members, apart=apart)
        common: dict[str, Any] = {
            "segment": where,
            "carrier": s.carrier,
            "receivers": max(1, len(members)) * s.receivers_per_engine,
            "bucket_bytes": s.bucket_bytes,
            "timeout_s": s.timeout_s,
        }
        if self._base is not None and with_base:
            base = _whole(self._base, "full", **common)
        nested = encode(base) if base is not None else b""
        return _whole(adapter, "adapter", scale=self._scale, base=nested, **common)


def _whole(image: Image, kind: Any, **rest: Any) -> WeightManifest:
    offsets = tuple(image.layout.offsets[name] for name in image.layout.owner)
    return WeightManifest(
        version=image.version,
        kind=kind,
        offsets=offsets,
        size_bytes=len(image.flat),
        **image.description(),
        **rest,
    )
