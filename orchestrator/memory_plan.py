"""What a configuration will need, before anything is started: the trainer's memory by class, the
engines', which devices they fit on, and what each setting would save.

Numbers only; `plan_command.py` prints them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loopwright.algorithms.memory_model import (
    EngineNeed,
    MemoryModelError,
    MemoryTable,
    Sharding,
    per_rank,
    sharding,
)
from loopwright.configs.load import ConfigError, load
from loopwright.configs.rules import default_at, value_at
from loopwright.configs.schema import Config
from loopwright.orchestrator.assembly import check_trainer, trainer_settings
from loopwright.orchestrator.faults import Refused

if TYPE_CHECKING:
    from loopwright.actors.memory_trace import Parameters, Traced, Work

_BYTES = {"float32": 4, "bfloat16": 2}
_WORTH = 0.01  # a knob that saves less than this share of the peak is not shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One configuration on paper."""

    model: str
    parameters: int
    trained: int  # of them, that get a gradient
    dtype: str
    trainer: MemoryTable  # one rank at its peak
    largest: MemoryTable  # each class of it when it is largest
    reference_bytes: int  # of `weights`: a frozen copy for the KL penalty, of all ranks together
    sharding: Sharding
    engine: EngineNeed
    shared_bytes: int  # shared memory of the host: two published versions
    rows: int
    columns: int
    chunk: int  # tokens whose logits exist together
    concurrency: int  # sequences of an engine
    checkpointing: str
    optimizer: str  # its name and options


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A change of settings, and the trainer's peak with it."""

    settings: tuple[str, ...]  # as `--set` takes them
    trainer: MemoryTable
    costs: str  # what one pays


class Planner:
    """Predictions of one configuration file under different overrides."""

    def __init__(self, path: str, overrides: Sequence[str], model: str) -> None:
        """`model` replaces `model.path`; "" keeps it. Raises `ConfigError`, `Refused`."""
        self._path = path
        self._overrides = tuple(overrides)
        self.config = load(path, overrides).config
        self._name = model or self.config.model.path
        self._shape = _shape(self._name, self.config)

    def predict(self, extra: Sequence[str] = ()) -> Prediction:
        """What the configuration needs with the settings `extra` on top. Raises `ConfigError` where
        they contradict it, `Refused` where nothing can be predicted."""
        config = load(self._path, (*self._overrides, *extra)).config
        check_trainer(config)
        work = _work(config)
        parameters, traced = _traced(self._shape, work)
        width = _BYTES[config.model.dtype]
        how = _sharding(config, parameters, width)
        optimizer = _optimizer_bytes(config, parameters)
        frozen = _reference_bytes(config, parameters, width)
        return Prediction(
            model=self._name,
            parameters=parameters.count,
            trained=parameters.trained_count,
            dtype=config.model.dtype,
            trainer=_on_rank(traced.peak, how, optimizer, frozen),
            largest=_on_rank(traced.largest, how, optimizer, frozen),
            reference_bytes=frozen,
            sharding=how,
            engine=_engine(config, self._shape.config, parameters),
            shared_bytes=2 * _published_bytes(parameters, width),
            rows=work.rows,
            columns=work.columns,
            chunk=min(work.chunk, work.tokens),
            concurrency=config.rollout.concurrency,
            checkpointing=work.checkpointing,
            optimizer=_optimizer_text(config),
        )

    def knobs(self) -> list[Knob]:
        """Every single change that makes the trainer smaller, largest saving first."""
        now = self.predict().trainer.total
        found = []
        for settings, costs in _changes(self.config):
            table = self._try(settings)
            if table is not None and now - table.total > _WORTH * now:
                found.append(Knob(settings=settings, trainer=table, costs=costs))
        return sorted(found, key=lambda knob: knob.trainer.total)

    def make_fit(self, usable_bytes: int, knobs: Sequence[Knob]) -> Knob | None:
        """The fewest changes, and among those the mildest, with which a rank fits; None if no two
        of them do."""
        order = [settings for settings, _ in _changes(self.config)]
        known = [k for settings in order for k in knobs if k.settings == settings]
        for knob in known:
            if knob.trainer.total <= usable_bytes:
                return knob
        for first, second in itertools.combinations(known, 2):
            if {s.partition("=")[0] for s in first.settings} & {
                s.partition("=")[0] for s in second.settings
            }:
                continue
            both = (*first.settings, *second.settings)
            table = self._try(both)
            if table is not None and table.total <= usable_bytes:
                return Knob(settings=both, trainer=table, costs=f"{first.costs}; {second.costs}")
        return None

    def _try(self, settings: tuple[str, ...]) -> MemoryTable | None:
        try:
            return self.predict(settings).trainer
        except (ConfigError, Refused):
            return None  # the change does not go with the rest of the configuration


def _changes(c: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that may save memory, mildest first, and what they cost."""
    clean: tuple[str, ...] = (
        ("trainer.optimizer_options={}",) if c.trainer.optimizer_options else ()
    )
    if c.trainer.optimizer == "adamw":  # whose own keys another optimizer refuses
        clean += tuple(
            f"{key}={json.dumps(default_at(c, key))}"
            for key in ("trainer.betas", "trainer.eps")
            if value_at(c, key) != default_at(c, key)
        )
    if c.trainer.gradient_checkpointing == "off":
        yield ("trainer.gradient_checkpointing=on",), "a third more compute"
    if c.trainer.logprob_chunk > 256:
        yield ("trainer.logprob_chunk=256",), "nothing much"
    half, least = c.trainer.token_budget // 2, c.environment.max_context
    for budget in sorted({max(half, least), least}, reverse=True):
        if budget < c.trainer.token_budget:
            yield (f"trainer.token_budget={budget}",), "smaller matrix products"
    if c.model.device == "cuda":
        yield ("trainer.gradient_checkpointing=offload",), "copies to the host and back"
        if c.model.dtype == "float32":
            yield ("model.dtype=bfloat16",), "rounding"
    if c.model.device == "cuda" and c.trainer.backend == "torch":
        for ranks in (2, 4, 8):
            yield ("trainer.backend=fsdp2", f"trainer.ranks={ranks}"), f"{ranks} devices"
    if c.trainer.optimizer == "adamw":
        yield ("trainer.optimizer_options.state=int8",), "rounding of the moments"
    if c.trainer.optimizer in ("adamw", "galore"):
        yield ("trainer.optimizer=sgd", *clean), "another learning rate"
    if c.trainer.optimizer == "adamw" and not c.model.lora_rank:
        yield ("trainer.optimizer=galore", *clean), "projected updates, another learning rate"
    if not c.model.lora_rank:
        yield ("model.lora_rank=16",), "trains adapters only"


@dataclass(frozen=True, slots=True)
class _Shape:
    """A Hugging Face config that can be a key."""

    name: str
    config: Any

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and self.name == other.name


def _shape(name: str, config: Config) -> _Shape:
    from loopwright.actors.known_models import model_config
    from loopwright.actors.model_files import ModelError
    from loopwright.actors.tiny_model import TinyModelError, tiny_config

    try:
        if name != "tiny":
            return _Shape(name, model_config(name))
        return _Shape(
            f"tiny {config.tiny} {config.environment.max_context}",
            tiny_config(
                vocab_size=config.tiny.vocab_size,
                hidden_size=config.tiny.hidden_size,
                layers=config.tiny.layers,
                heads=config.tiny.heads,
                kv_heads=config.tiny.kv_heads,
                intermediate_size=config.tiny.intermediate_size,
                max_context=config.environment.max_context,
            ),
        )
    except (ModelError, TinyModelError) as error:
        raise Refused(str(error)) from error


def _work(c: Config) -> Work:
    from loopwright.actors.memory_trace import Adapters, Work
    from loopwright.algorithms import optimizers

    rows = max(1, c.trainer.token_budget // c.environment.max_context)
    return Work(
        dtype=c.model.dtype,
        rows=rows,
        columns=c.environment.max_context,
        chunk=c.trainer.logprob_chunk,
        checkpointing=c.trainer.gradient_checkpointing,
        backward=not optimizers.method(c.trainer.optimizer).forward_only,
        adapters=Adapters(
            kind=c.model.adapter,
            rank=c.model.lora_rank,
            alpha=c.model.lora_alpha,
            targets=c.model.lora_targets,
        ),
    )


@functools.lru_cache(maxsize=64)
def _traced(shape: _Shape, work: Work) -> tuple[Parameters, Traced]:
    from loopwright.actors import memory_trace
    from loopwright.actors.lora import LoraError
    from loopwright.actors.model_files import ModelError

    try:
        found = memory_trace.parameters(shape.config, work.adapters)
        return found, memory_trace.trace(shape.config, work)
    except (LoraError, ModelError) as error:
        raise Refused(str(error)) from error


def _sharding(config: Config, parameters: Parameters, width: int) -> Sharding:
    settings = trainer_settings(config, "")
    try:
        return sharding(
            settings.backend,
            settings.ranks,
            block_bytes=parameters.largest_block * width,
            outside_bytes=parameters.outside_blocks * width,
            stage=int(settings.backend_options.get("zero_stage", 2)),  # as the backend has it
        )
    except MemoryModelError as error:
        raise Refused(str(error)) from error


def _optimizer_bytes(config: Config, parameters: Parameters) -> int:
    """Of states, bases and masters on each rank."""
    import torch

    from loopwright.actors.optimizer_choice import optimizer_options
    from loopwright.algorithms.optimizers import predict_state_bytes

    settings = trainer_settings(config, "")
    return predict_state_bytes(
        parameters.trained,
        settings.optimizer,
        dtype=getattr(torch, settings.dtype),
        ranks=settings.ranks,
        **optimizer_options(settings),
    )


def _reference_bytes(config: Config, parameters: Parameters, width: int) -> int:
    """Adapters need no copy: the reference is the model without them."""
    if config.algorithm.kl == "none" or config.model.lora_rank:
        return 0
    return _published_bytes(parameters, width)


def _on_rank(table: MemoryTable, how: Sharding, optimizer: int, frozen: int) -> MemoryTable:
    whole = replace(table, weights=table.weights + frozen)
    return replace(per_rank(whole, how), optimizer=optimizer)


def _optimizer_text(config: Config) -> str:
    options = ", ".join(f"{k} = {v}" for k, v in config.trainer.optimizer_options.items())
    return f"{config.trainer.optimizer}{f' ({options})' if options else ''}"


def _published_bytes(parameters: Parameters, width: int) -> int:
    """Of the full weights that engines get: adapters are merged."""
    base = parameters.frozen or parameters.trained
    return sum(_numel(shape) for shape in base.values()) * width


def _engine(c: Config, shape: Any, parameters: Parameters) -> EngineNeed:
    width = _BYTES[c.model.dtype]
    heads = shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    token = 2 * shape.num_hidden_layers * kv_heads * head_dim * width
    wide = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    step_tokens = max(c.rollout.concurrency, c.environment.max_context)
    return EngineNeed(
        weights=_published_bytes(parameters, width),
        kv_pool=c.rollout.kv_bytes,
        kv_token=token,
        kv_wanted=token * c.rollout.concurrency * c.environment.max_context,
        working=step_tokens * (2 * wide + 4 * shape.hidden_size) * width
        + c.rollout.concurrency * shape.vocab_size * 4,
    )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
