"""From a model and the name of a method to an optimizer, and to the bytes it will hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.algorithms.optimizers.layer_sampling import layer_of, weight_outliers
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.methods import METHODS, Method
from loopwright.algorithms.optimizers.options import OptimizerError, Options, nearest, resolve
from loopwright.algorithms.optimizers.parts import Plan, Slot
from loopwright.algorithms.optimizers.pipeline import Pipeline
from loopwright.algorithms.optimizers.saved_state import register_names
from loopwright.algorithms.optimizers.write_back import WriteBack, way_for
from loopwright.algorithms.optimizers.zeroth_order import ZerothOrder

Named = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
register_names(METHODS)


def method(name: str) -> Method:
    """The row of the table for `name`. Raises `OptimizerError` that lists the known ones."""
    if name not in METHODS:
        raise OptimizerError(f"unknown optimizer {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def build(model_or_named_parameters: Named, name: str, **options: Any) -> torch.optim.Optimizer:
    """An optimizer by its name, for a model or for named parameters.

    Parameters that do not require gradients are left out; shared ones (tied weights) count once,
    under their first name. Options are those of `Options` that the method has. Raises
    `OptimizerError` for an unknown method or option (with the nearest one that exists), for a value
    out of range, and for parameters the method cannot train.
    """
    row = method(name)
    resolved = resolve(name, row.defaults, options)
    named = _unique(model_or_named_parameters)
    if row.forward_only:
        return ZerothOrder(named, resolved, name, sparse=name == "sparse_mezo")
    return _pipeline(named, row, resolved)


def predict_state_bytes(
    shapes_by_name: Mapping[str, Sequence[int]],
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    **options: Any,
) -> int:
    """Bytes of optimizer state for parameters of these shapes and `dtype`: what `build` would hold,
    fp32 masters of bf16 weights included, computed without memory.

    With `ranks` > 1: of each rank when parameters are cut by rows (FSDP2); what is replicated
    counts whole. Names matter: embeddings are told by theirs.
    """
    optimizer = build(
        {
            key: nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"))
            for key, shape in shapes_by_name.items()
        },
        name,
        **options,
    )
    if isinstance(optimizer, ZerothOrder):
        return optimizer.state_bytes()
    assert isinstance(optimizer, Pipeline)
    return sum(
        -(-size // ranks) if cut else size
        for slot in optimizer.slots
        for size, cut in optimizer.state_sizes(slot)
    )


def _unique(source: Named) -> list[tuple[str, Tensor]]:
    pairs: Iterable[Any]
    if isinstance(source, nn.Module):
        pairs = source.named_parameters()
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
    seen: set[int] = set()
    found: list[tuple[str, Tensor]] = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise OptimizerError(
                f"got {type(pair).__name__}, expected a model or pairs of name and parameter: "
                "names decide which optimizer states a parameter gets; pass "
                "model.named_parameters(), not model.parameters()"
            )
        name, parameter = pair
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            found.append((name, parameter))
    if not found:
        raise OptimizerError("no parameter requires a gradient: there is nothing to optimize")
    return found


def _pipeline(named: Sequence[tuple[str, Tensor]], row: Method, options: Options) -> Pipeline:
    if not row.elementwise and all(p.ndim == 1 for _, p in named):
        raise OptimizerError(
            f"optimizer {row.name!r} works on matrices, and all {len(named)} parameters are flat "
            "vectors, as DeepSpeed ZeRO hands them out: use it with the torch or FSDP2 backend, or "
            f"take an element-wise one here: {', '.join(elementwise_methods())}"
        )
    plan = row.plan(options)
    slots = []
    for index, (name, parameter) in enumerate(named):
        layout = Layout.of(name, parameter)
        if layout.group is not None and not row.fsdp2:
            raise OptimizerError(
                f"optimizer {row.name!r} needs whole parameters, and {name} is cut over ranks; "
                f"use the torch backend, or one of {', '.join(sharding_methods())}"
            )
        recipe = plan.recipe_of(name, parameter.shape)
        if recipe is not None:
            way = way_for(name, parameter, options.write_back, options.lr)
            slots.append(
                Slot(
                    name=name,
                    parameter=parameter,
                    layout=layout,
                    recipe=recipe,
                    write_back=WriteBack(way),
                    index=index,
                    layer=layer_of(name) if plan.sampler is not None else None,
                )
            )
    if not slots:
        raise OptimizerError(
            f"optimizer {row.name!r} trains none of these {len(named)} parameters "
            f"({', '.join(name for name, _ in named[:3])}, …); {row.use_when}"
        )
    optimizer = Pipeline(_with_layers(slots, plan), plan, options, row.name)
    if plan.sampler is not None and plan.sampler.kind == "outliers":
        optimizer.set_layer_scores(_weight_scores(optimizer))
    return optimizer


def _with_layers(slots: list[Slot], plan: Plan) -> list[Slot]:
    """Without numbered layers every matrix is one, so that layers can be drawn from any model."""
    if plan.sampler is not None and all(slot.layer is None for slot in slots):
        for slot in slots:
            slot.layer = slot.name if slot.parameter.ndim >= 2 else None
    return slots


def _weight_scores(optimizer: Pipeline) -> dict[str, float]:
    """Outlier shares from the weights alone, until a calibration gives better ones."""
    shares: dict[str, list[float]] = {}
    for slot in optimizer.slots:
        if slot.layer is not None and slot.parameter.ndim >= 2:
            shares.setdefault(slot.layer, []).append(weight_outliers(slot.parameter, slot.layout))
    return {
        layer: sum(shares.get(layer, [0.0])) / len(shares.get(layer, [0.0]))
        for layer in optimizer.layers
    }


def sharding_methods() -> tuple[str, ...]:
    """Methods that work on parameters cut by rows over ranks (FSDP2)."""
    return tuple(name for name, row in METHODS.items() if row.fsdp2)


def elementwise_methods() -> tuple[str, ...]:
    """Methods that work on flat pieces of parameters: what DeepSpeed ZeRO allows."""
    return tuple(name for name, row in METHODS.items() if row.elementwise)
