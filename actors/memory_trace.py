"""What a micro-batch needs, on paper: the trainer's own forward and backward pass over tensors that
have shapes and no memory (torch's fake tensors), counted by the memory meter.

So there is no formula for activations that could disagree with a model: whatever the architecture
saves for its backward pass is seen. What is left out is what only a device knows: kernels' own
scratch space and what the allocator rounds up.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loopwright.actors.memory_meter import MemoryMeter
from loopwright.actors.packed_forward import MicroBatch, action_logprobs
from loopwright.actors.recompute import Checkpointing, keep_less
from loopwright.algorithms.memory_model import CLASSES, MemoryTable

_FEW, _MORE = 2, 4  # layers of the two models that a deep one is extrapolated from
_LAYER = re.compile(r"\.(\d+)\.")

# Without values, Hugging Face cannot see that rows hold one sequence each, and would plan a mask
# that is not made then. An attention of another name gets none.
_ATTENTION = "causal_without_mask"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """LoRA as [model] has it; rank 0: none."""

    kind: str = "lora"
    rank: int = 0
    alpha: float = 32.0
    targets: str = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One rank's micro-batch and how it is computed."""

    dtype: str = "float32"  # of weights, activations and gradients
    rows: int = 1
    columns: int = 1024  # tokens of a row
    chunk: int = 2048  # tokens whose logits exist together
    checkpointing: Checkpointing = "off"
    adapters: Adapters = Adapters()
    backward: bool = True  # False: the optimizer needs a loss and no gradient

    @property
    def tokens(self) -> int:
        """Positions of the micro-batch."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a model consists of. Tied tensors count once."""

    trained: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, tuple[int, ...]]
    buffer_bytes: int
    largest_block: int  # parameters of the largest transformer block
    outside_blocks: int  # parameters of embedding, norm and output layer

    @property
    def count(self) -> int:
        """Parameters, trained and frozen."""
        return self.trained_count + sum(map(_numel, self.frozen.values()))

    @property
    def trained_count(self) -> int:
        """Parameters that get a gradient."""
        return sum(map(_numel, self.trained.values()))


def parameters(config: Any, adapters: Adapters) -> Parameters:
    """The tensors of a Hugging Face model `config`, without making them."""
    model = _build(config, Work(adapters=adapters))
    inside: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        inside[_layer_of(name)] += parameter.numel()
    outside = inside.pop("", 0)
    return Parameters(
        trained={n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad},
        frozen={n: tuple(p.shape) for n, p in model.named_parameters() if not p.requires_grad},
        buffer_bytes=sum(b.nbytes for b in model.buffers()),
        largest_block=max(inside.values(), default=0),
        outside_blocks=outside,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What the second micro-batch of a minibatch needs, when gradients (if there are any) exist
    already; no optimizer in it."""

    peak: MemoryTable  # at the moment when the sum is largest
    largest: MemoryTable  # of each class by itself


def trace(config: Any, work: Work) -> Traced:
    """Run the passes on paper.

    A model of many equal layers is extrapolated from two short ones: every layer keeps the same.
    """
    layers = int(config.num_hidden_layers)
    if layers <= _MORE or not _uniform(config):
        return trace_whole(config, work)
    few, more = (trace_whole(_shortened(config, n), work) for n in (_FEW, _MORE))
    steps = (layers - _FEW) / (_MORE - _FEW)

    def further(a: MemoryTable, b: MemoryTable) -> MemoryTable:
        ends = a.classes(), b.classes()
        return MemoryTable(
            **{k: round(ends[0][k] + steps * (ends[1][k] - ends[0][k])) for k in CLASSES}
        )

    return Traced(peak=further(few.peak, more.peak), largest=further(few.largest, more.largest))


def trace_whole(config: Any, work: Work) -> Traced:
    """As `trace`, layer by layer."""
    with FakeTensorMode():
        model = _pretend(_build(config, work), getattr(torch, work.dtype))
        micro = _micro_batch(work)
        _pass(model, micro, work, MemoryMeter(vocab=_vocab(model)))
        meter = MemoryMeter(vocab=_vocab(model))
        meter.hold("weights", (*model.parameters(), *model.buffers()))
        meter.hold("gradients", [p.grad for p in model.parameters() if p.grad is not None])
        with meter, meter.gradients_of(model.parameters()):
            _pass(model, micro, work, meter)
        return Traced(peak=meter.peak(), largest=meter.largest())


def _pass(model: PreTrainedModel, micro: MicroBatch, work: Work, meter: MemoryMeter) -> None:
    hidden = _gone() if work.checkpointing == "offload" else nullcontext()
    with torch.set_grad_enabled(work.backward), hidden:
        loss = action_logprobs(model, micro, temperature=1.0, chunk=work.chunk).sum()
    if work.backward:
        with meter.phase("backward"):
            loss.backward()


def _build(config: Any, work: Work) -> PreTrainedModel:
    """The policy on the meta device, as the trainer has it."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, work.dtype), attn_implementation=_ATTENTION
        ).eval()
        keep_less(model, "off" if work.checkpointing == "off" else "on")
        if work.adapters.rank:
            from loopwright.actors.lora import add_adapters

            model = add_adapters(
                model,
                kind=work.adapters.kind,
                rank=work.adapters.rank,
                alpha=work.adapters.alpha,
                targets=work.adapters.targets,
            )
    return model


def _pretend(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Put fake tensors, which pretend to be on the CPU, in the place of the model's own. What was
    tied stays tied. All parameters are of `dtype`: on the meta device peft leaves its own at
    float32."""
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = done.setdefault(
                    id(parameter),
                    nn.Parameter(
                        torch.empty(parameter.shape, dtype=dtype),
                        requires_grad=parameter.requires_grad,
                    ),
                )
                module._parameters[name] = cast(nn.Parameter, fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _micro_batch(work: Work) -> MicroBatch:
    """Every token but the first of each row is an action."""
    actions = work.rows * (work.columns - 1)
    places = torch.zeros(actions, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros((work.rows, work.columns), dtype=torch.int64),
        position_ids=torch.zeros((work.rows, work.columns), dtype=torch.int64),
        mask=None,
        predictors=places,
        targets=places,
        tokens=np.zeros(actions, dtype=np.int64),
    )


def _gone() -> AbstractContextManager[None]:
    """What is saved for the backward pass is gone from the device until it is needed."""

    def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def unpack(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(saved[0], dtype=saved[1])

    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    return hooks


def _shortened(config: Any, layers: int) -> Any:
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    kinds = config.to_dict().get("layer_types")
    if kinds:
        short.layer_types = kinds[:layers]
    return short


def _uniform(config: Any) -> bool:
    """Have all layers the same parameters?"""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for name, parameter in _build(config, Work()).named_parameters():
        layer = _layer_of(name)
        if layer:
            found[layer].append((name.partition(f".{layer}.")[2], tuple(parameter.shape)))
    return len({tuple(sorted(shapes)) for shapes in found.values()}) == 1


def _layer_of(name: str) -> str:
    match = _LAYER.search(name)
    return match[1] if match else ""


def _vocab(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
