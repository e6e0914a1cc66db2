"""Every method as a choice of parts: its paper, its defaults, and when to use it.

To add one, copy `galore` below: a function from options to a `Plan`, and its row in `METHODS`.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from loopwright.algorithms.optimizers.bases import Basis, LowRank
from loopwright.algorithms.optimizers.conditioners import Conditioner, Fisher, SpikeClip
from loopwright.algorithms.optimizers.emits import (
    Back,
    Emit,
    NormScale,
    ScaledResidual,
    SignResidual,
    WeightNorm,
)
from loopwright.algorithms.optimizers.inner import Adam, Inner, Lion, Sgd, SignSgd
from loopwright.algorithms.optimizers.layer_sampling import LayerSampler, layer_of
from loopwright.algorithms.optimizers.matrix_inner import Adafactor, Muon, Relative
from loopwright.algorithms.optimizers.options import Options, StateFormat
from loopwright.algorithms.optimizers.paired_bases import Tracked, TwoSided
from loopwright.algorithms.optimizers.parts import Plan, Recipe
from loopwright.algorithms.optimizers.sparse_bases import Channels, Mask
from loopwright.algorithms.optimizers.state_codecs import CODECS, Codec, generator

RecipeOf = Callable[[str, torch.Size], Recipe | None]
EMBEDDINGS = re.compile(
    r"(^|\.)(embed\w*|lm_head|wte|wpe|tok_embeddings)(\.|$)|^(model\.)?output\.weight$"
)


def is_embedding(name: str) -> bool:
    """Is it an embedding or output layer, by its name?"""
    return EMBEDDINGS.search(name) is not None


def _codec(options: Options, shape: torch.Size, state: StateFormat | None = None) -> Codec:
    """The codec of a parameter: vectors stay fp32, they are few and matter."""
    return CODECS[state or options.state] if len(shape) >= 2 else CODECS["fp32"]


def _adam(options: Options) -> Adam:
    return Adam(options.betas, options.eps, options.eps_mode)


def _everywhere(
    options: Options, inner: Inner, emit: Emit | None = None, *, decay_last: bool = False
) -> RecipeOf:
    """The same inner optimizer for all parameters."""

    def recipe_of(name: str, shape: torch.Size) -> Recipe:
        return Recipe(
            inner=inner,
            emit=emit or Back(),
            codec=_codec(options, shape),
            decay_last=decay_last,
        )

    return recipe_of


def _on_matrices(
    options: Options,
    basis: Basis | None,
    emit: Emit | None = None,
    *,
    inner: Inner | None = None,
    conditioner: Conditioner | None = None,
    decay_last: bool = True,
    late: bool = False,
) -> RecipeOf:
    """A basis for the matrices of attention and feed-forward layers; Adam for vectors and, in the
    format `embeddings`, for embeddings and the output layer."""
    of_matrices = Recipe(
        inner=inner or _adam(options),
        emit=emit or Back(options.scale),
        conditioner=conditioner,
        codec=CODECS[options.state],
        basis_codec=CODECS[options.state],
        on_refresh=options.on_refresh,
        decay_last=decay_last,
        late=late,
    )
    if basis is not None:
        of_matrices = replace(of_matrices, basis=basis)

    def recipe_of(name: str, shape: torch.Size) -> Recipe | None:
        if len(shape) >= 2 and not is_embedding(name):
            return of_matrices
        state = options.embeddings
        if state == "frozen" and len(shape) >= 2:
            return None
        kept = options.state if state == "same" or state == "frozen" else state
        codec = _codec(options, shape, kept)
        return Recipe(inner=_adam(options), codec=codec, decay_last=decay_last)

    return recipe_of


def _low_rank(options: Options) -> LowRank:
    return LowRank(
        rank=options.rank,
        gap=options.gap,
        side=options.side,
        projection=options.projection,
        seed=options.seed,
        lazy=options.lazy,
        stagger=options.stagger,
    )


def adamw(options: Options) -> Plan:
    """AdamW (Loshchilov & Hutter 2019); with `state="int8"` 8-bit Adam (Dettmers et al. 2022), with
    "int4" 4-bit (Li et al. 2023, without its rank-1 scales)."""
    return Plan(recipe_of=_everywhere(options, _adam(options)))


def sgd(options: Options) -> Plan:
    """SGD with decoupled decay (Robbins & Monro 1951; for RLVR "Do We Need Adam?", 2026)."""
    return Plan(recipe_of=_everywhere(options, Sgd(options.momentum)))


def signsgd(options: Options) -> Plan:
    """SignSGD, with momentum Signum (Bernstein et al. 2018)."""
    return Plan(recipe_of=_everywhere(options, SignSgd(options.momentum)))


def lion(options: Options) -> Plan:
    """Lion (Chen et al. 2023, Algorithm 2)."""
    return Plan(recipe_of=_everywhere(options, Lion(options.betas)))


def muon(options: Options) -> Plan:
    """Muon (Jordan 2024) as in `torch.optim.Muon`; Adam for vectors and embeddings."""
    inner = Muon(options.momentum)

    def recipe_of(name: str, shape: torch.Size) -> Recipe | None:
        if len(shape) < 2 or is_embedding(name):
            return _on_matrices(options, None, decay_last=False)(name, shape)
        return Recipe(inner=inner, codec=_codec(options, shape))

    return Plan(recipe_of=recipe_of)


def adafactor(options: Options) -> Plan:
    """Adafactor (Shazeer & Stern 2018) as in `torch.optim.Adafactor`."""
    return Plan(recipe_of=_everywhere(options, Adafactor(), Relative()))


def galore(options: Options) -> Plan:
    """GaLore (Zhao et al. 2024, Algorithm 2), bases by warm subspace iteration, moments transported
    when they change. `projection="svd", on_refresh="keep"` is the published code; `state="int8"` is
    8-bit GaLore with an 8-bit projector."""
    return Plan(recipe_of=_on_matrices(options, _low_rank(options)))


def natural_galore(options: Options) -> Plan:
    """Natural GaLore (Das 2024): GaLore on the natural gradient that the last `history` projected
    gradients estimate."""
    fisher = Fisher(options.history, options.damping)
    return Plan(recipe_of=_on_matrices(options, _low_rank(options), conditioner=fisher))


def gradnormlorp(options: Options) -> Plan:
    """GradNormLoRP (Huang et al. 2025): weight-normalised matrices, the gradient of their direction
    projected on both sides, their gain learned by Adam. The paper, not its released code, which
    never writes the weights back."""
    emit = WeightNorm(options.scale, options.betas, options.eps)
    basis = TwoSided(options.rank, options.gap, options.projection, options.seed)
    return Plan(recipe_of=_on_matrices(options, basis, emit, late=True))


def _sampler(options: Options, kind: str) -> LayerSampler:
    assert kind in ("uniform", "outliers", "cycle")
    return LayerSampler(
        kind=kind,  # type: ignore[arg-type]
        count=options.layers,
        every=options.switch_every,
        seed=options.seed,
    )


def lisa(options: Options) -> Plan:
    """LISA (Pan et al. 2024): `layers` layers drawn uniformly every `switch_every` updates; states
    of the others are evicted; what is outside of layers is always trained."""
    recipes = _on_matrices(options, None, decay_last=False)
    return Plan(recipe_of=recipes, sampler=_sampler(options, "uniform"))


def owlore(options: Options) -> Plan:
    """OwLore (Li et al. 2024): GaLore in layers drawn by their share of outliers, states of the
    others evicted. `optimizer.set_layer_scores(outlier_scores(model, run))` calibrates the draw;
    until then the weights alone decide."""
    recipes = _on_matrices(options, _low_rank(options))
    return Plan(recipe_of=recipes, sampler=_sampler(options, "outliers"))


def badam(options: Options) -> Plan:
    """BAdam (Luo et al. 2024, Algorithm 1): one block after the other, from the last layer to the
    first; nothing outside of layers is trained."""
    adam = _adam(options)

    def recipe_of(name: str, shape: torch.Size) -> Recipe | None:
        if layer_of(name) is None and is_embedding(name):
            return None
        return Recipe(inner=adam, codec=_codec(options, shape))

    return Plan(recipe_of=recipe_of, sampler=_sampler(options, "cycle"))


def spam(options: Options) -> Plan:
    """SPAM (Huang et al. 2025): Adam whose moments are zeroed every `reset_every` updates, with a
    cosine warm-up after it, and whose spikes are cut; with `density` < 1 only a random share of
    each matrix's entries is trained between two resets."""
    clip, adam = SpikeClip(options.theta, options.window), _adam(options)

    def recipe_of(name: str, shape: torch.Size) -> Recipe:
        recipe = Recipe(inner=adam, conditioner=clip, codec=_codec(options, shape), decay_last=True)
        if options.density == 1 or len(shape) < 2:
            return recipe
        return replace(recipe, basis=Mask(options.density, options.seed))

    return Plan(recipe_of=recipe_of, reset_every=options.reset_every, warmup=options.warmup)


def low_rank_restarts(options: Options) -> Plan:
    """Adam on LoRA factors, which are rebalanced every `reset_every` updates to B = U·√S,
    A = √S·Vᵀ, moments and step count zeroed: weight refactorization with momentum reset."""
    recipes = _everywhere(options, _adam(options))
    return Plan(recipe_of=recipes, reset_every=options.reset_every, restarts=True)


def apollo(options: Options) -> Plan:
    """APOLLO (Zhu et al. 2025): the raw gradient, each channel scaled as Adam scales its random
    projection."""
    emit = NormScale(options.scale, "channel", options.limiter)
    return Plan(recipe_of=_on_matrices(options, _low_rank(options), emit))


def apollo_mini(options: Options) -> Plan:
    """APOLLO-Mini (Zhu et al. 2025): one scale for a whole matrix, from a projection of rank 1."""
    emit = NormScale(options.scale, "tensor", options.limiter)
    return Plan(recipe_of=_on_matrices(options, _low_rank(options), emit))


def fira(options: Options) -> Plan:
    """Fira (Chen et al. 2024): GaLore, and what the projection leaves out scaled alike."""
    emit = ScaledResidual(options.scale, options.limiter)
    return Plan(recipe_of=_on_matrices(options, _low_rank(options), emit))


def frugal(options: Options) -> Plan:
    """FRUGAL (Zmushko et al. 2025): Adam in a subspace, SignSGD in the rest, at `scale` times the
    learning rate."""
    return Plan(recipe_of=_on_matrices(options, _low_rank(options), SignResidual(options.scale)))


def ldadam(options: Options) -> Plan:
    """LDAdam (Robert et al. 2025, Algorithm 1): a basis that follows the momentum at every update,
    moments transported, projection errors fed back."""
    basis = Tracked(
        rank=options.rank,
        gap=1,
        side=options.side,
        projection="subspace",
        seed=options.seed,
        square_left=True,
        rho=options.rho,
        beta=options.betas[0],
        moments=CODECS[options.state],
        error_feedback=options.error_feedback,
    )
    return Plan(recipe_of=_on_matrices(options, basis, Back(1.0), decay_last=False, late=True))


_ROWS = re.compile(r"\.(up_proj|gate_proj|w1|w3|fc1|c_fc|v_proj)\.weight$")
_COLUMNS = re.compile(r"\.(down_proj|w2|fc2|c_proj|o_proj)\.weight$")
_ATTENTION = re.compile(r"\.(v_proj|o_proj)\.weight$")


def s2ft(options: Options) -> Plan:
    """S2FT (Yang et al. 2024): a share `density` of the channels between coupled layers: the same
    rows of up and gate and columns of down projections, and rows of value and columns of output
    projections. Everything else is frozen."""
    adam = _adam(options)

    def recipe_of(name: str, shape: torch.Size) -> Recipe | None:
        rows, columns = _ROWS.search(name), _COLUMNS.search(name)
        if len(shape) != 2 or not (rows or columns):
            return None
        width = shape[0] if rows else shape[1]
        part = 1 if _ATTENTION.search(name) else 0
        layer = int.from_bytes((layer_of(name) or "").encode()[-8:], "big")
        noise = generator(options.seed, layer, part)
        # With grouped-query attention v_proj and o_proj differ in width and are drawn apart.
        draw = torch.rand(width, generator=noise)
        chosen = draw.topk(max(int(options.density * width), 1)).indices.sort().values
        basis = Channels("rows" if rows else "columns", tuple(chosen.tolist()))
        return Recipe(inner=adam, basis=basis, codec=CODECS[options.state])

    return Plan(recipe_of=recipe_of)


def forward_only(options: Options) -> Plan:
    """MeZO and Sparse MeZO have no parts: see `ZerothOrder`."""
    return Plan(recipe_of=lambda name, shape: None)
