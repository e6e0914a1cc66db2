"""A lean forward pass for the torch engine: Llama, Mistral, Qwen2 and Qwen3 causal language models.

Written for many short sequences on few cores, where Python and padding cost more than arithmetic:
every token of a step, decoded or prefilled, goes through the linear layers in one flat batch; only
attention knows sequences. Weights are used where they lie (separate q, k, v, gate, up), so that a
published version is taken over by pointing at it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from loopwright.actors.engine import EngineError
from loopwright.actors.kv_slots import KVShape, KVSlots
from loopwright.actors.model_files import LOADING

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FIXED_ROPE = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # frequencies that do not depend on the length
_FACTORS = {"lora_A": 0, "lora_B": 1}  # where the rank is in the factor's shape
_MAGNITUDE = "lora_magnitude_vector"
_NAMED = 5  # tensors an error names before it counts the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of prompt tokens to prefill: `length` tokens of `slot`, the first at position
    `start`."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One engine step: N tokens, first one decoded token for each of slots 0 … A-1, then the
    segments."""

    token_ids: np.ndarray  # [N] int64
    positions: np.ndarray  # [N] int64
    slots: np.ndarray  # [N] int64
    decoded: int  # A
    segments: Sequence[Segment]


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA's factors of the adapted layers: W = base + scale * B A (Hu et al. 2021); with DoRA's
    magnitudes m (Liu et al. 2024, eq. 5) every row of that W is m / |row| of itself."""

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # A [r, in], B [out, r]
    scale: float
    gains: Mapping[str, torch.Tensor]  # m / |row| [out] of a layer; empty without DoRA


@dataclass(frozen=True, slots=True)
class _Linear:
    """x W^T + bias, and what an adapter adds; the base is never changed, so others may map it."""

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None
    factors: tuple[torch.Tensor, torch.Tensor] | None
    scale: float
    gain: torch.Tensor | None = None  # [out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.linear(x, self.weight, self.bias if self.gain is None else None)
        if self.factors is not None:
            down, up = self.factors
            out = out.add_(functional.linear(functional.linear(x, down), up), alpha=self.scale)
        if self.gain is not None:
            out = out.mul_(self.gain)
            out = out if self.bias is None else out.add_(self.bias)
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer; None where the architecture has none."""

    input_norm: torch.Tensor  # [hidden]
    q: _Linear  # [heads * head_dim, hidden]
    k: _Linear
    v: _Linear
    o: _Linear
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate: _Linear  # [intermediate, hidden]
    up: _Linear
    down: _Linear


class LeanModel:
    """The forward pass over a replaceable set of weights."""

    def __init__(self, model: Any, *, max_context: int, device: str) -> None:
        """Take the weights and rotary tables of a loaded transformers causal LM. Raises
        `EngineError`."""
        config = model.config
        _check_supported(type(model).__name__, config, max_context)
        self.vocab = int(config.vocab_size)
        self._heads = int(config.num_attention_heads)
        self._layers_count = int(config.num_hidden_layers)
        self._eps = float(config.rms_norm_eps)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self.kv_shape = KVShape(
            layers=self._layers_count,
            kv_heads=int(config.num_key_value_heads),
            head_dim=int(head_dim),
            dtype=model.dtype,
            device=device,
        )
        self._group = self._heads // self.kv_shape.kv_heads
        self._scale = self.kv_shape.head_dim**-0.5
        self._tied = bool(config.tie_word_embeddings)
        rotary = model.model.rotary_emb
        angles = (
            torch.arange(max_context).float()[:, None] * rotary.inv_freq.float().cpu()
        )  # [C, D/2]
        self._cos = (angles.cos() * rotary.attention_scaling).to(model.dtype).to(device)
        self._sin = (angles.sin() * rotary.attention_scaling).to(model.dtype).to(device)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if self._tied:
            state.pop("lm_head.weight", None)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.install(self.prepare(state))

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors out of `tensors`, as they are where dtype and device fit, else
        converted.

        Raises `EngineError` naming tensors that are missing, unknown or of another shape. Changes
        nothing, so it may run beside a forward pass.
        """
        given = dict(tensors)
        if self._tied:
            given.pop("lm_head.weight", None)
        missing = [name for name in self._shapes if name not in given]
        unknown = [name for name in given if name not in self._shapes]
        reshaped = [
            f"{name} {list(given[name].shape)} instead of {list(shape)}"
            for name, shape in self._shapes.items()
            if name in given and tuple(given[name].shape) != shape
        ]
        for label, names in (("missing", missing), ("unknown", unknown), ("misshapen", reshaped)):
            if names:
                raise EngineError(
                    f"weights for this model: {len(names)} tensors {label}: "
                    f"{', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}. Publish "
                    f"the full state dict of the model the engine was started with"
                )
        return {
            name: tensor.to(device=self.kv_shape.device, dtype=self.kv_shape.dtype)
            for name, tensor in given.items()
        }

    def prepare_adapter(
        self,
        tensors: Mapping[str, torch.Tensor],
        scale: float,
        weights: Mapping[str, torch.Tensor],
    ) -> Adapter | None:
        """The factors out of `layer.lora_A.weight` and `layer.lora_B.weight`, and DoRA's gains out
        of `layer.lora_magnitude_vector.weight` and the base `weights`; None for no tensors.

        Raises `EngineError` naming what is no adapter of a linear layer of this model.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {}
        wrong = []
        for name, tensor in tensors.items():
            layer, _, part = name.removesuffix(".weight").rpartition(".")
            base = self._shapes.get(f"{layer}.weight", ())
            fits = layer.startswith("model.layers.") and len(base) == 2
            if not fits or not _fits(part, tuple(tensor.shape), base):
                wrong.append(name)
                continue
            moved = tensor.to(device=self.kv_shape.device, dtype=self.kv_shape.dtype)
            parts.setdefault(layer, {})[part] = moved
        wrong += [layer for layer, found in parts.items() if not found.keys() >= set(_FACTORS)]
        if wrong:
            raise EngineError(
                f"adapter for this model: {len(wrong)} names do not fit: "
                f"{', '.join(wrong[:_NAMED])}{' …' if len(wrong) > _NAMED else ''}. The torch "
                f'engine adds LoRA to linear layers; set rollout.channel = "shared_memory" for '
                f"merged weights"
            )
        if not parts:
            return None
        factors = {layer: (found["lora_A"], found["lora_B"]) for layer, found in parts.items()}
        gains = {}
        for layer, found in parts.items():
            if _MAGNITUDE in found:
                down, up = factors[layer]
                merged = torch.addmm(weights[f"{layer}.weight"], up, down, alpha=scale)
                gains[layer] = found[_MAGNITUDE] / torch.linalg.vector_norm(merged, dim=1)
        return Adapter(factors, scale, gains)

    def install(self, weights: Mapping[str, torch.Tensor], adapter: Adapter | None = None) -> None:
        """Serve from `weights` and `adapter`, as `prepare` and `prepare_adapter` returned them.
        Nothing is copied."""
        self._embed = weights["model.embed_tokens.weight"]
        self._head = self._embed if self._tied else weights["lm_head.weight"]
        self._norm = weights["model.norm.weight"]
        self._layers = [
            _layer(weights, adapter, f"model.layers.{i}.") for i in range(self._layers_count)
        ]

    def forward(self, step: StepInput, kv: KVSlots, *, every: bool = False) -> torch.Tensor:
        """Logits `[A, vocab]` float32 of the decoded tokens, or `[N, vocab]` of `every` token.

        Keys and values of all N go into `kv`.
        """
        device, decoded = self.kv_shape.device, step.decoded
        positions = torch.from_numpy(step.positions).to(device)
        x = functional.embedding(
            torch.from_numpy(step.token_ids).to(device), self._embed
        )  # [N, hidden]
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]  # [N, 1, D/2]
        rows = kv.rows_of(step.slots, step.positions)
        longest = int(step.positions[:decoded].max()) + 1
        mask = self._decode_mask(positions[:decoded], longest)
        for index, layer in enumerate(self._layers):
            normed = functional.rms_norm(x, self._norm.shape, layer.input_norm, self._eps)
            last = index == self._layers_count - 1 and not every
            if last:  # nothing after its keys and values is needed of the prefilled tokens
                keys_of, normed_q, x = normed, normed[:decoded], x[:decoded]
            else:
                keys_of = normed_q = normed
            q, k = self._queries(layer, normed_q, cos, sin), self._keys(layer, keys_of, cos, sin)
            v = layer.v(keys_of)
            kv.key_rows[index].index_copy_(0, rows, k.reshape(-1, self.kv_shape.head_dim))
            kv.value_rows[index].index_copy_(0, rows, v.view(-1, self.kv_shape.head_dim))
            mixed = self._decode(q[:decoded], kv, index, longest, mask)
            if not last and step.segments:
                parts = self._prefill(q[decoded:], kv, index, step.segments)
                mixed = torch.cat((mixed, *parts))
            x = x + layer.o(mixed)
            x = x + self._mlp(layer, x)
        x = functional.rms_norm(x, self._norm.shape, self._norm, self._eps)
        return functional.linear(x, self._head).float()

    def _queries(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotated queries `[n, heads, head_dim]` of the first n tokens."""
        q = layer.q(x).view(len(x), self._heads, -1)
        if layer.q_norm is not None:
            q = functional.rms_norm(q, layer.q_norm.shape, layer.q_norm, self._eps)
        return _rotate(q, cos[: len(x)], sin[: len(x)])

    def _keys(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotated keys `[N, kv_heads, head_dim]`."""
        k = layer.k(x).view(len(x), self.kv_shape.kv_heads, -1)
        if layer.k_norm is not None:
            k = functional.rms_norm(k, layer.k_norm.shape, layer.k_norm, self._eps)
        return _rotate(k, cos, sin)

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        x = functional.rms_norm(x, self._norm.shape, layer.mlp_norm, self._eps)
        gate = functional.silu(layer.gate(x), inplace=True)
        return layer.down(gate.mul_(layer.up(x)))

    def _decode_mask(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Additive mask `[A, 1, 1, longest]`: each row sees its slot up to its own position."""
        beyond = torch.arange(longest, device=positions.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.kv_shape.dtype, device=positions.device)
        return mask.masked_fill_(beyond, float("-inf"))[:, None, None]

    def _decode(
        self, q: torch.Tensor, kv: KVSlots, index: int, longest: int, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one query per slot over slots 0 … A-1: `[A, heads * head_dim]`.

        The queries that share a key-value head stand where a sequence of queries would: nothing is
        repeated.
        """
        rows, shape = len(q), self.kv_shape
        keys = kv.keys[index, : rows * shape.kv_heads, :longest]
        values = kv.values[index, : rows * shape.kv_heads, :longest]
        grouped = (rows, shape.kv_heads, longest, shape.head_dim)
        mixed = functional.scaled_dot_product_attention(
            q.view(rows, shape.kv_heads, self._group, shape.head_dim),
            keys.view(grouped),
            values.view(grouped),
            attn_mask=mask,
            scale=self._scale,
        )
        return mixed.reshape(rows, -1)

    def _prefill(
        self, q: torch.Tensor, kv: KVSlots, index: int, segments: Sequence[Segment]
    ) -> list[torch.Tensor]:
        """Causal attention of each segment over its own slot: `[length, heads * head_dim]` each."""
        mixed, offset, heads = [], 0, self.kv_shape.kv_heads
        for segment in segments:
            end = segment.start + segment.length
            own = slice(segment.slot * heads, (segment.slot + 1) * heads)
            mask = None
            if segment.start:
                ones = torch.ones(segment.length, end, dtype=torch.bool, device=q.device)
                mask = ones.tril_(segment.start)
            part = functional.scaled_dot_product_attention(
                q[offset : offset + segment.length].transpose(0, 1)[None],
                kv.keys[index, own, :end].repeat_interleave(self._group, 0)[None],
                kv.values[index, own, :end].repeat_interleave(self._group, 0)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
            )
            mixed.append(part[0].transpose(0, 1).reshape(segment.length, -1))
            offset += segment.length
        return mixed


def load_model(model_path: str, *, dtype: str, device: str, max_context: int) -> LeanModel:
    """Read a Hugging Face causal LM. Raises `EngineError` with the remedy if this engine cannot
    serve it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise EngineError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise EngineError(f"model_path {model_path!r} holds no readable model: {error}") from error
    for name in config.architectures or []:
        _check_supported(name, config, max_context)
    try:
        with LOADING:
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise EngineError(f"model_path {model_path!r} cannot be loaded: {error}") from error
    return LeanModel(model, max_context=max_context, device=device)


def _check_supported(name: str, config: Any, max_context: int) -> None:
    remedy = 'set engine = "vllm" for this model'
    if name not in SUPPORTED:
        raise EngineError(
            f"the torch engine has no forward pass for {name}, only for {', '.join(SUPPORTED)}; "
            f"{remedy}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise EngineError(
            f"{name}: rope_type {rope!r} is not one of {', '.join(_FIXED_ROPE)}; {remedy}"
        )
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types if layer_types else window is not None
    if slides and window is not None and window < max_context:
        raise EngineError(
            f"{name}: attention window of {window} tokens is shorter than max_context "
            f"{max_context}; lower max_context to {window} or {remedy}"
        )
    if max_context > config.max_position_embeddings:
        raise EngineError(
            f"max_context {max_context} exceeds the model's max_position_embeddings "
            f"{config.max_position_embeddings}; lower it"
        )
    if config.hidden_act != "silu":
        raise EngineError(f"{name}: hidden_act {config.hidden_act!r}, expected 'silu'; {remedy}")


def _fits(part: str, shape: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether a part of an adapter belongs to a layer whose weight has the shape `base`."""
    if part == _MAGNITUDE:
        return shape == base[:1]
    rank_at = _FACTORS.get(part)
    return rank_at is not None and len(shape) == 2 and shape[1 - rank_at] == base[1 - rank_at]


def _layer(weights: Mapping[str, torch.Tensor], adapter: Adapter | None, prefix: str) -> _Layer:
    def named(name: str) -> Any:  # None for tensors the architecture does not have
        return weights.get(f"{prefix}{name}.weight")

    def linear(name: str) -> _Linear:
        layer = f"{prefix}{name}"
        weight, bias = weights[f"{layer}.weight"], weights.get(f"{layer}.bias")
        if adapter is None:
            return _Linear(weight, bias, None, 0.0)
        factors, gain = adapter.factors.get(layer), adapter.gains.get(layer)
        return _Linear(weight, bias, factors, adapter.scale, gain)

    return _Layer(
        input_norm=named("input_layernorm"),
        q=linear("self_attn.q_proj"),
        k=linear("self_attn.k_proj"),
        v=linear("self_attn.v_proj"),
        o=linear("self_attn.o_proj"),
        q_norm=named("self_attn.q_norm"),
        k_norm=named("self_attn.k_norm"),
        mlp_norm=named("post_attention_layernorm"),
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, Su et al. 2021 (arXiv 2104.09864) eq. 34, halves instead of pairs.

    x `[n, heads, head_dim]`, cos and sin `[n, 1, head_dim / 2]`.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
