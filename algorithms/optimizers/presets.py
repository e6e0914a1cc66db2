"""Every method as a choice of parts: its paper, its defaults, and when to use it.

To add one, copy `galore` below: a function from options to a `Plan`, and its line in `METHODS`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loopwright.algorithms.optimizers.bases import Basis, LowRank
from loopwright.algorithms.optimizers.emits import Back, Emit
from loopwright.algorithms.optimizers.inner import Adam, Inner, Lion, Sgd, SignSgd
from loopwright.algorithms.optimizers.options import Options, StateFormat
from loopwright.algorithms.optimizers.pipeline import Plan, Recipe
from loopwright.algorithms.optimizers.state_codecs import CODECS, Codec

EMBEDDINGS = re.compile(r"(^|\.)(embed\w*|lm_head|wte|wpe|tok_embeddings|output)(\.|$)")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table of optimizers."""

    name: str
    paper: str
    use_when: str
    defaults: Mapping[str, Any]  # exactly the options it has
    plan: Callable[[Options], Plan]
    elementwise: bool = False  # does it work on flat pieces of parameters, as ZeRO hands them out?
    full_gradients: bool = True  # False: gradients can be projected and freed layer by layer
    fsdp2: bool = True  # does it work on row-sharded parameters?
    forward_only: bool = False  # step(closure) with a loss and no gradient


_COMMON = {"lr": 1e-3, "weight_decay": 0.0, "write_back": "auto", "seed": 0}
_ADAM = {**_COMMON, "betas": (0.9, 0.999), "eps": 1e-8, "eps_mode": "corrected", "state": "fp32"}
_GALORE = {
    **_ADAM,
    "eps": 1e-6,
    "eps_mode": "uncorrected",
    "rank": 128,
    "gap": 200,
    "scale": 0.25,
    "side": "auto",
    "projection": "subspace",
    "on_refresh": "transport",
    "lazy": 0.0,
    "stagger": False,
    "embeddings": "int8",
}


def is_embedding(name: str) -> bool:
    """Is it an embedding or output layer, by its name?"""
    return EMBEDDINGS.search(name) is not None


def _codec(options: Options, shape: torch.Size, state: StateFormat | None = None) -> Codec:
    """The codec of a parameter: vectors stay fp32, they are few and matter."""
    return CODECS[state or options.state] if len(shape) >= 2 else CODECS["fp32"]


def _everywhere(options: Options, inner: Inner) -> Plan:
    def recipe_of(name: str, shape: torch.Size) -> Recipe:
        return Recipe(inner=inner, codec=_codec(options, shape))

    return Plan(recipe_of=recipe_of)


def _on_matrices(
    options: Options,
    *,
    basis: Callable[[str, torch.Size], Basis],
    emit: Emit,
    inner: Inner | None = None,
    rest: Inner | None = None,
) -> Plan:
    """A basis for the matrices of attention and feed-forward layers; the inner optimizer as it is
    for vectors, embeddings and the output layer."""
    adam = Adam(options.betas, options.eps, options.eps_mode)

    def recipe_of(name: str, shape: torch.Size) -> Recipe | None:
        if len(shape) < 2 or is_embedding(name):
            if len(shape) >= 2 and options.embeddings == "frozen":
                return None
            state = options.state if options.embeddings == "same" else options.embeddings
            assert state != "frozen" or len(shape) < 2
            codec = CODECS["fp32"] if state == "frozen" else _codec(options, shape, state)
            return Recipe(inner=rest or adam, codec=codec, decay_last=True)
        return Recipe(
            inner=inner or adam,
            basis=basis(name, shape),
            emit=emit,
            codec=CODECS[options.state],
            basis_codec=CODECS[options.state],
            on_refresh=options.on_refresh,
            decay_last=True,
        )

    return Plan(recipe_of=recipe_of)


def adamw(options: Options) -> Plan:
    """AdamW (Loshchilov & Hutter 2019); with `state="int8"` 8-bit Adam (Dettmers et al. 2022), with
    "int4" 4-bit (Li et al. 2023, without its rank-1 scales)."""
    return _everywhere(options, Adam(options.betas, options.eps, options.eps_mode))


def sgd(options: Options) -> Plan:
    """SGD with decoupled decay (Robbins & Monro 1951; for RLVR "Do We Need Adam?", 2026)."""
    return _everywhere(options, Sgd(options.momentum))


def signsgd(options: Options) -> Plan:
    """SignSGD, with momentum Signum (Bernstein et al. 2018)."""
    return _everywhere(options, SignSgd(options.momentum))


def lion(options: Options) -> Plan:
    """Lion (Chen et al. 2023, Algorithm 2)."""
    return _everywhere(options, Lion(options.betas))


def galore(options: Options) -> Plan:
    """GaLore (Zhao et al. 2024, Algorithm 2), bases by warm subspace iteration, moments transported
    when they change. `projection="svd", on_refresh="keep"` is the published code; `state="int8"` is
    8-bit GaLore with an 8-bit projector."""
    return _on_matrices(options, basis=lambda *_: _low_rank(options), emit=Back(options.scale))


def _low_rank(options: Options) -> LowRank:
    return LowRank(
        rank=options.rank,
        gap=options.gap,
        side=options.side,
        projection=options.projection,
        seed=options.seed,
        lazy=options.lazy,
    )


_TABLE = (
    Method(
        name="adamw",
        paper="Loshchilov & Hutter 2019 (int8: Dettmers et al. 2022, int4: Li et al. 2023)",
        use_when="memory is no concern, or state='int8' when it is: the safe choice",
        defaults={**_ADAM, "weight_decay": 0.01},
        plan=adamw,
        elementwise=True,
    ),
    Method(
        name="sgd",
        paper="Robbins & Monro 1951; Do We Need Adam?, 2026",
        use_when="no optimizer state must fit: in RL often as good as AdamW at 100 to 1000 "
        "times its learning rate",
        defaults={**_COMMON, "lr": 0.1, "momentum": 0.0, "state": "fp32"},
        plan=sgd,
        elementwise=True,
    ),
    Method(
        name="signsgd",
        paper="Bernstein et al. 2018",
        use_when="no state, and a step size that does not depend on the gradient's scale",
        defaults={**_COMMON, "lr": 1e-4, "momentum": 0.0, "state": "fp32"},
        plan=signsgd,
        elementwise=True,
    ),
    Method(
        name="lion",
        paper="Chen et al. 2023",
        use_when="half of AdamW's state, at a third to a tenth of its learning rate",
        defaults={**_COMMON, "lr": 1e-4, "betas": (0.9, 0.99), "state": "fp32"},
        plan=lion,
        elementwise=True,
    ),
    Method(
        name="galore",
        paper="Zhao et al. 2024",
        use_when="all parameters must be trained in about the memory of LoRA",
        defaults=_GALORE,
        plan=galore,
        full_gradients=False,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
