"""The table of methods: paper, defaults, when to use each, and where it works."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loopwright.algorithms.optimizers import presets
from loopwright.algorithms.optimizers.options import Options
from loopwright.algorithms.optimizers.parts import Plan


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


_COMMON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "write_back": "auto", "seed": 0}
_ADAM = {**_COMMON, "betas": (0.9, 0.999), "eps": 1e-8, "eps_mode": "corrected", "state": "fp32"}
_BASIS = {"rank": 128, "gap": 200, "scale": 1.0, "side": "auto", "projection": "subspace"}
_LOW_RANK = {
    **_ADAM,
    **_BASIS,
    "eps": 1e-6,
    "eps_mode": "uncorrected",
    "on_refresh": "transport",
    "lazy": 0.0,
    "stagger": False,
    "embeddings": "int8",
}
_RANDOM = {**_LOW_RANK, "projection": "random", "on_refresh": "keep", "limiter": 1.01}
_LAYERWISE = {**_ADAM, "layers": 2, "switch_every": 20}
_SPSA = {"lr": 1e-6, "eps": 1e-3, "weight_decay": 0.0, "seed": 0}

_TABLE = (
    Method(
        name="adamw",
        paper="Loshchilov & Hutter 2019; int8: Dettmers et al. 2022; int4: Li et al. 2023",
        use_when="the safe choice; state='int8' where memory is short",
        defaults={**_ADAM, "weight_decay": 0.01},
        plan=presets.adamw,
        elementwise=True,
    ),
    Method(
        name="sgd",
        paper="Robbins & Monro 1951; Do We Need Adam?, 2026",
        use_when="no optimizer state may be held: the rival of all others in RL, at 10 to 1000 "
        "times AdamW's learning rate",
        defaults={**_COMMON, "lr": 0.1, "momentum": 0.0, "state": "fp32"},
        plan=presets.sgd,
        elementwise=True,
    ),
    Method(
        name="signsgd",
        paper="Bernstein et al. 2018",
        use_when="no state, and steps that do not depend on the size of gradients",
        defaults={**_COMMON, "lr": 1e-4, "momentum": 0.0, "state": "fp32"},
        plan=presets.signsgd,
        elementwise=True,
    ),
    Method(
        name="muon",
        paper="Jordan 2024",
        use_when="training from scratch; it degrades RL on models pre-trained with Adam",
        defaults={**_ADAM, "weight_decay": 0.1, "momentum": 0.95, "embeddings": "same"},
        plan=presets.muon,
    ),
    Method(
        name="lion",
        paper="Chen et al. 2023",
        use_when="half of AdamW's state, at a third to a tenth of its learning rate",
        defaults={**_COMMON, "lr": 1e-4, "betas": (0.9, 0.99), "state": "fp32"},
        plan=presets.lion,
        elementwise=True,
    ),
    Method(
        name="adafactor",
        paper="Shazeer & Stern 2018",
        use_when="almost no state, and steps relative to the size of the weights",
        defaults={**_COMMON, "lr": 1e-2},
        plan=presets.adafactor,
    ),
    Method(
        name="galore",
        paper="Zhao et al. 2024",
        use_when="all parameters are to be trained in about the memory of LoRA; state='int8' "
        "halves it again",
        defaults={**_LOW_RANK, "scale": 0.25},
        plan=presets.galore,
        full_gradients=False,
    ),
    Method(
        name="natural_galore",
        paper="Das 2024",
        use_when="GaLore learns slowly and four more projected gradients fit",
        defaults={**_LOW_RANK, "scale": 0.25, "history": 4, "damping": 1e-3},
        plan=presets.natural_galore,
        full_gradients=False,
    ),
    Method(
        name="gradnormlorp",
        paper="Huang et al. 2025",
        use_when="states must be smaller than GaLore's: r×r numbers a matrix",
        defaults={k: v for k, v in _LOW_RANK.items() if k not in ("side", "lazy", "stagger")}
        | {"on_refresh": "keep"},
        plan=presets.gradnormlorp,
    ),
    Method(
        name="owlore",
        paper="Li et al. 2024",
        use_when="GaLore's memory is still too much: states of a few layers at a time",
        defaults={**_LOW_RANK, "rank": 256, "gap": 100, "layers": 5, "switch_every": 50},
        plan=presets.owlore,
    ),
    Method(
        name="lisa",
        paper="Pan et al. 2024",
        use_when="full-rank updates of a few layers at a time are enough",
        defaults={**_LAYERWISE, "embeddings": "int8"},
        plan=presets.lisa,
    ),
    Method(
        name="badam",
        paper="Luo et al. 2024",
        use_when="every layer must get its turn, one at a time",
        defaults={**_LAYERWISE, "layers": 1, "switch_every": 50},
        plan=presets.badam,
    ),
    Method(
        name="spam",
        paper="Huang et al. 2025",
        use_when="gradients have spikes, as after jumps of the policy; density=0.25 saves 62 %",
        defaults={
            **_ADAM,
            "eps": 1e-6,
            "eps_mode": "uncorrected",
            "theta": 5000.0,
            "window": 20,
            "reset_every": 500,
            "warmup": 150,
            "density": 1.0,
        },
        plan=presets.spam,
    ),
    Method(
        name="low_rank_restarts",
        paper="weight refactorization and momentum reset of LoRA factors",
        use_when="long LoRA runs whose factors drift apart in size",
        defaults={**_ADAM, "reset_every": 200},
        plan=presets.low_rank_restarts,
    ),
    Method(
        name="apollo",
        paper="Zhu et al. 2025",
        use_when="AdamW-like steps in the memory of GaLore, and no basis to compute",
        defaults={**_RANDOM, "rank": 256},
        plan=presets.apollo,
    ),
    Method(
        name="apollo_mini",
        paper="Zhu et al. 2025",
        use_when="almost the memory of SGD with the scale of AdamW",
        defaults={**_RANDOM, "rank": 1, "scale": 128.0},
        plan=presets.apollo_mini,
    ),
    Method(
        name="fira",
        paper="Chen et al. 2024",
        use_when="GaLore's subspace is too narrow: full-rank updates in its memory",
        defaults={**_LOW_RANK, "limiter": 1.01},
        plan=presets.fira,
    ),
    Method(
        name="frugal",
        paper="Zmushko et al. 2025",
        use_when="as Fira, with signs for what has no state",
        defaults={**_LOW_RANK, "on_refresh": "reset"},
        plan=presets.frugal,
    ),
    Method(
        name="ldadam",
        paper="Robert et al. 2025",
        use_when="gradients rotate fast and a full-size error buffer fits (error_feedback=False "
        "drops it)",
        defaults={
            **_ADAM,
            "betas": (0.908, 0.99),
            "rank": 128,
            "side": "auto",
            "on_refresh": "transport",
            "embeddings": "int8",
            "rho": 0.908,
            "error_feedback": True,
        },
        plan=presets.ldadam,
    ),
    Method(
        name="s2ft",
        paper="Yang et al. 2024",
        use_when="a small share of coupled channels is enough, and should stay separable",
        defaults={**_ADAM, "density": 0.05},
        plan=presets.s2ft,
        fsdp2=False,
    ),
    Method(
        name="mezo",
        paper="Malladi et al. 2023",
        use_when="only forward passes fit into memory",
        defaults=_SPSA,
        plan=presets.forward_only,
        forward_only=True,
    ),
    Method(
        name="sparse_mezo",
        paper="Liu et al. 2024",
        use_when="as MeZO, with less noise: only small weights move",
        defaults={**_SPSA, "density": 0.25},
        plan=presets.forward_only,
        forward_only=True,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def table() -> str:
    """The methods as a Markdown table: what help texts and the documentation print."""
    lines = ["| method | use it when | ZeRO | FSDP2 | paper |", "|---|---|---|---|---|"]
    for row in _TABLE:
        flat, cut = ("yes" if works else "–" for works in (row.elementwise, row.fsdp2))
        lines.append(f"| `{row.name}` | {row.use_when} | {flat} | {cut} | {row.paper} |")
    return "\n".join(lines)
