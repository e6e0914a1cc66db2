"""The options of all optimizers: one meaning each, the same for every method that has it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Projection = Literal["subspace", "svd", "randomized", "random"]
OnRefresh = Literal["transport", "keep", "reset"]
StateFormat = Literal["fp32", "bf16", "int8", "int4"]
Side = Literal["auto", "left", "right"]
EpsMode = Literal["corrected", "uncorrected"]
WriteBackMode = Literal["auto", "master", "stochastic", "kahan", "plain"]
EmbeddingStates = Literal["same", "fp32", "bf16", "int8", "int4", "frozen"]


class OptimizerError(ValueError):
    """An optimizer that cannot be built, stepped or loaded as asked; the text says what, which
    value, what was expected and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every option of every method. A method has those that its defaults name; the others are not
    read."""

    lr: float = 1e-3  # learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of first and second moment
    eps: float = 1e-8  # added to the root of the second moment; mezo: size of the perturbation
    eps_mode: EpsMode = "corrected"  # added after (torch) or before (GaLore) the bias correction
    weight_decay: float = 0.0  # decoupled; of parameters with at least two dimensions
    momentum: float = 0.0  # sgd, signsgd: decay of the one moment; 0 = no state at all
    rank: int = 128  # of the projected gradient; cut to the smaller side of each matrix
    gap: int = 200  # updates between two bases
    scale: float = 1.0  # of the update of projected matrices
    side: Side = "auto"  # auto: project the smaller side; right: the columns, what shards by rows
    projection: Projection = "subspace"  # how a basis is found
    on_refresh: OnRefresh = "transport"  # what becomes of the moments when the basis changes
    lazy: float = 0.0  # overlap of two bases in (0, 1] that doubles a matrix's gap; 0 = off
    stagger: bool = False  # spread refreshes evenly over the gap, matrix by matrix
    state: StateFormat = "fp32"  # how moments and bases are stored
    write_back: WriteBackMode = "auto"  # how updates reach bf16 weights; auto: fp32 masters
    embeddings: EmbeddingStates = "int8"  # states of embedding and output layers
    theta: float = 5000.0  # squared gradients above theta times their average are cut
    window: int = 20  # updates after a reset before anything is cut
    reset_every: int = 500  # updates between two resets of the moments
    warmup: int = 150  # updates of cosine warm-up after a reset
    density: float = 1.0  # share of entries (spam, sparse_mezo) or channels (s2ft) trained
    layers: int = 2  # layers trained at the same time
    switch_every: int = 20  # updates between two choices of layers
    history: int = 4  # gradients that estimate the Fisher information
    damping: float = 1e-3  # lambda added to the Fisher information
    rho: float = 0.908  # share of the momentum in the matrix that a basis is taken from
    error_feedback: bool = True  # carry what a projection leaves out to the next update
    limiter: float = 1.01  # largest growth of an update's norm from one update to the next
    seed: int = 0  # of random bases, masks, layer choices and rounding


_CHOICES: dict[str, tuple[str, ...]] = {
    "eps_mode": get_args(EpsMode),
    "side": get_args(Side),
    "projection": get_args(Projection),
    "on_refresh": get_args(OnRefresh),
    "state": get_args(StateFormat),
    "write_back": get_args(WriteBackMode),
    "embeddings": get_args(EmbeddingStates),
}
# name: (lowest value, is it allowed itself, highest value)
_RANGES: dict[str, tuple[float, bool, float]] = {
    "lr": (0, True, 1e6),
    "eps": (0, False, 1e6),
    "weight_decay": (0, True, 1e6),
    "momentum": (0, True, 0.9999999),
    "rank": (1, True, 1 << 30),
    "gap": (1, True, 1 << 60),
    "scale": (0, False, 1e9),
    "lazy": (0, True, 1),
    "theta": (0, False, 1e30),
    "window": (0, True, 1 << 60),
    "reset_every": (0, True, 1 << 60),
    "warmup": (0, True, 1 << 60),
    "density": (0, False, 1),
    "layers": (1, True, 1 << 30),
    "switch_every": (1, True, 1 << 60),
    "history": (1, True, 64),
    "damping": (0, False, 1e9),
    "rho": (0, True, 0.9999999),
    "limiter": (1, True, 1e9),
    "seed": (0, True, 1 << 60),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error text: the known names, the one most like `name` first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


def resolve(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """The options of `method`: its `defaults`, overridden by those `given`.

    Raises `OptimizerError` for an option the method does not have and for values out of range.
    """
    for name in given:
        if name not in defaults:
            raise OptimizerError(
                f"optimizer {method!r} has no option {name!r}; {nearest(name, defaults)}"
            )
    values = {**defaults, **given}
    for name, value in values.items():
        values[name] = _checked(method, name, value)
    return Options(**values)


def _checked(method: str, name: str, value: Any) -> Any:
    where = f"optimizer {method!r}: {name}={value!r}"
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise OptimizerError(f"{where}; {nearest(str(value), _CHOICES[name])}")
        return value
    if name == "betas":
        pair = tuple(value) if isinstance(value, (list, tuple)) else ()
        if len(pair) != 2 or not all(
            isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in pair
        ):
            raise OptimizerError(f"{where}, expected two numbers in [0, 1)")
        return (float(pair[0]), float(pair[1]))
    kind = _KINDS[name]
    if kind is bool:
        if not isinstance(value, bool):
            raise OptimizerError(f"{where}, expected true or false")
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and (kind is int or not isinstance(value, float)):
        raise OptimizerError(f"{where}, expected {'a whole number' if kind is int else 'a number'}")
    low, allowed, high = _RANGES[name]
    if not (low <= value <= high) or (value == low and not allowed):
        raise OptimizerError(
            f"{where}, expected {'at least' if allowed else 'more than'} {low:g}"
            + (f" and at most {high:g}" if high < 1e6 else "")
        )
    return value if kind is int else float(value)


_KINDS: dict[str, type] = {f.name: type(f.default) for f in fields(Options)}
