"""The half of the vLLM engine that runs inside vLLM's worker: published weights, from their channel
to layers.

vLLM keeps its model in an engine core process. This module is imported there through vLLM's public
`worker_extension_cls`, registers a weight-transfer backend under `BACKEND`, and is driven over the
control plane that vLLM's reinforcement-learning interface offers (`actors/vllm_engine.py` is the
other half):

    receive_published_weights(manifest)  takes and proves a publish; touches no layer
    start_weight_update                  layers go back to checkpoint format
    update_weights(version)              what was received -> layers
    finish_weight_update                 layers are packed again for the processor's kernels

An adapter is not loaded here: it is written to a folder of vLLM's own format, and the other half
has vLLM load it.

The layer-wise reload is not optional on a CPU: linear layers serve from a re-packed copy, which
plain `model.load_weights` leaves as it was. It never re-packs a *tied* head, which is done here.

Imports vllm at module level: nothing but a vLLM worker imports this module.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from loopwright.actors.channels.receiver import Received, Receiver
from loopwright.actors.shared_memory import (
    ADAPTER_PREFIX,
    SEGMENT_FOLDER,
    remove_stale_adapters,
)
from loopwright.actors.weights import (
    ChannelLost,
    WeightError,
    WeightManifest,
    decode,
    manifest_checksums,
    verify,
)

_PEFT_PREFIX = "base_model.model."
BACKEND = "loopwright_channel"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class ChannelInit(WeightTransferInitInfo):
    """Nothing to agree on: every manifest says how to take it."""


@dataclass
class PublishedWeights(WeightTransferUpdateInfo):
    """One publish, received already."""

    version: int


class _Inbox:
    """What this worker received last, between the two calls of an update."""

    def __init__(self) -> None:
        self.receiver: Receiver | None = None
        self.received: Received | None = None
        self.base_of = b""  # the manifest that the loaded base was compared with
        self.folder = ""  # of the adapter

    def take(self, manifest: WeightManifest, device: str) -> Received:
        """Receive and prove one publish."""
        if self.receiver is None:
            self.receiver = Receiver(device)
        self.received = None  # its shared memory may be written again
        self.received = self.receiver.receive(manifest)
        self.receiver.serving(self.received)  # layers hold copies: all but the base may go
        return self.received


_inbox = _Inbox()


class ChannelTransfer(WeightTransferEngine[ChannelInit, PublishedWeights]):
    """vLLM weight-transfer backend that loads what `receive_published_weights` took."""

    init_info_cls = ChannelInit
    update_info_cls = PublishedWeights

    def init_transfer_engine(self, init_info: ChannelInit) -> None:
        """Tie this worker's life to its starter's; for the weights there is nothing to agree on.

        vLLM ends its engine core when it is asked to or when its starter ends in order. A starter
        that is killed (by Ray, by the kernel for memory) would leave the model's memory behind.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed in the vLLM worker")

    def start_weight_update(self) -> None:
        """Return every layer to checkpoint format, its serving tensors kept aside."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one publish. The device is waited for only if it is one apart from the CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: PublishedWeights) -> None:
        """Copy the received tensors into the layers."""
        received = _inbox.received
        if received is None or received.version != update_info.version:
            raise WeightError(f"version {update_info.version} was not received by this worker")
        self.model.load_weights(iter(received.weights.items()))
        _inbox.received = None

    def finish_weight_update(self) -> None:
        """Pack the layers for serving again, the tied ones included."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_layers(self.model)

    def shutdown(self) -> None:
        """Nothing is held between two updates."""


def repack_tied_layers(model: torch.nn.Module) -> int:
    """Re-pack every layer that shares its weight with one before it; returns how many.

    A tied head loads nothing of its own, so the layer-wise reload never processes it again and its
    packed copy stays that of the former version: wrong logits, with no error.
    """
    served: set[int] = set()
    count = 0
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is None:
            continue
        method = getattr(layer, "quant_method", None)  # norms have none
        if id(weight) in served and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)
            count += 1
        served.add(id(weight))
    return count


class PublishedWeightsExtension:
    """Adds one call to vLLM's worker, and by being imported there registers the backend."""

    device: torch.device  # of the worker that this is mixed into
    model_config: Any

    def receive_published_weights(self, manifest: bytes) -> Mapping[str, Any]:
        """`{"checksums": {name: xxh3_64}, "folder": of an adapter, "refusal": "", "lost": ""}`.

        Why not is returned, not raised: vLLM passes on the text of an error but not its type.
        """
        answer: dict[str, Any] = {"checksums": {}, "folder": "", "refusal": "", "lost": ""}
        published = decode(manifest)
        try:
            received = _inbox.take(published, self.device.type)
            if published.kind == "adapter":
                self._compare_base(published, received)
                _inbox.folder = write_adapter(received, _inbox.folder)
                answer["folder"] = _inbox.folder
        except ChannelLost as error:
            return answer | {"lost": str(error)}
        except WeightError as error:
            return answer | {"refusal": str(error)}
        return answer | {"checksums": dict(received.checksums)}

    def forget_adapter_files(self) -> None:
        """Remove what `receive_published_weights` wrote, once vLLM has loaded it."""
        shutil.rmtree(_inbox.folder, ignore_errors=True)
        _inbox.folder = ""

    def _compare_base(self, published: WeightManifest, received: Received) -> None:
        """The base that vLLM loaded is the one the adapter belongs to: its files are compared, for
        packed layers cannot be."""
        if not published.base or published.base == _inbox.base_of:
            return
        expected = manifest_checksums(decode(published.base))
        files = sorted(Path(self.model_config.model).glob("*.safetensors"))
        loaded = {name: t for file in files for name, t in load_file(file).items()}
        verify(loaded, {name: expected.get(name, 0) for name in loaded})
        if not loaded:
            raise WeightError(f"no safetensors in {self.model_config.model} to compare the base to")
        _inbox.base_of = published.base


def write_adapter(received: Received, former: str) -> str:
    """The adapter as peft writes one, in a folder in memory that replaces `former`; read back and
    compared."""
    if former:
        shutil.rmtree(former, ignore_errors=True)
    remove_stale_adapters()
    folder = Path(tempfile.mkdtemp(prefix=f"{ADAPTER_PREFIX}{os.getpid()}.", dir=SEGMENT_FOLDER))
    tensors = {f"{_PEFT_PREFIX}{name}": t.contiguous() for name, t in received.adapter.items()}
    rank = min(next(iter(received.adapter.values())).shape)
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in received.adapter}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": received.scale * rank,
        "target_modules": sorted(layers),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    written = load_file(folder / "adapter_model.safetensors")
    verify({n.removeprefix(_PEFT_PREFIX): t for n, t in written.items()}, received.checksums)
    return str(folder)


# Warns at every update of layers that have nothing to load: tied heads and rotary tables. The
# engine has compared the publish with the model's parameters by then.
logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)

WeightTransferEngineFactory.register_engine(BACKEND, ChannelTransfer)
