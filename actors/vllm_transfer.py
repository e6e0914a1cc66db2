"""The half of the vLLM engine that runs inside vLLM's worker: published weights, from shared memory
to layers.

vLLM keeps its model in an engine core process. This module is imported there through vLLM's public
`worker_extension_cls`, registers a weight-transfer backend under `BACKEND`, and is driven over the
control plane that vLLM's reinforcement-learning interface offers (`actors/vllm_engine.py` is the
other half):

    verify_published_weights(manifest)   checksums what lies in shared memory; touches no layer
    start_weight_update                  layers go back to checkpoint format
    update_weights(manifest)             shared memory -> layers
    finish_weight_update                 layers are packed again for the processor's kernels

The layer-wise reload is not optional on a CPU: linear layers serve from a re-packed copy, which
plain `model.load_weights` leaves as it was. It never re-packs a *tied* head, which is done here.

Imports vllm at module level: nothing but a vLLM worker imports this module.
"""

import ctypes
import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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

from loopwright.actors.shared_memory import attach
from loopwright.actors.weights import WeightError, decode, manifest_checksums, verify

BACKEND = "loopwright_shared_memory"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on: every manifest names its segment."""


@dataclass
class PublishedWeights(WeightTransferUpdateInfo):
    """One publish."""

    manifest: bytes  # `weights.encode`


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInit, PublishedWeights]):
    """vLLM weight-transfer backend that reads a `WeightManifest` of the same host."""

    init_info_cls = SharedMemoryInit
    update_info_cls = PublishedWeights

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
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
        """Copy the published tensors into the layers. `WeightError` if the segment is gone."""
        tensors = attach(decode(update_info.manifest))
        self.model.load_weights(iter(tensors.items()))

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

    def verify_published_weights(self, manifest: bytes) -> Mapping[str, Any]:
        """`{"checksums": {name: xxh3_64}, "refusal": ""}` of what this worker reads, or why not.

        A refusal is returned, not raised: vLLM passes on the text of an error but not its type.
        """
        published = decode(manifest)
        try:
            found = verify(attach(published), manifest_checksums(published))
        except WeightError as error:
            return {"checksums": {}, "refusal": str(error)}
        return {"checksums": found, "refusal": ""}


# Warns at every update of layers that have nothing to load: tied heads and rotary tables. The
# engine has compared the publish with the model's parameters by then.
logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)

WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
