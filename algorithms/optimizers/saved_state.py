"""Which saved states an optimizer takes: its own method's, for the same parameters in the same
formats."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from loopwright.algorithms.optimizers.options import OptimizerError

_NAMES: dict[int, str] = {}


def method_id(name: str) -> int:
    """The whole number that stands for a method in saved states."""
    return zlib.crc32(name.encode())


def register_names(names: Iterable[str]) -> None:
    """Let error texts name the methods."""
    _NAMES.update({method_id(name): name for name in names})


def refuse_other_groups(
    method: str, own: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> None:
    """Raise `OptimizerError` if groups saved are of another method or other parameters."""
    found = saved[0].get("method") if saved else None
    if found != method_id(method):
        known = repr(_NAMES[found]) if found in _NAMES else "an optimizer not of this package"
        raise OptimizerError(
            f"the saved state is of {known}, this optimizer is {method!r}: its states mean nothing "
            "here. Resume with the optimizer of the checkpoint, or start a new run from the "
            "checkpoint's weights"
        )
    mine, theirs = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if mine != theirs:
        raise OptimizerError(
            f"the saved state has groups of {theirs} parameters, this model {mine}: load a "
            "checkpoint of the same model with the same parameters trained"
        )


def refuse_other_format(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `OptimizerError` if the saved state of a parameter has other tensors than its own."""
    for key in sorted(set(own) | set(saved)):
        here, there = own.get(key), saved.get(key)
        if _format(here) != _format(there):
            raise OptimizerError(
                f"{name}: the saved state has {_format(there)} for {key}, expected "
                f"{_format(here)}: rank, side, state and write_back must be those of the checkpoint"
            )


def _format(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "nothing" if value is None else "a number"
