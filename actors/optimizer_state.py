"""The state of an optimizer as named leaves: `parameter name/key` → tensor or plain value.

Tensors go to safetensors files whole, whatever they were cut into; whole numbers go to a JSON file.
Nothing refers to ranks or to positions in a list, so a state fits another number of ranks and,
where the keys are the same, another backend. Hyperparameters are no state: they are the run's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.actors.trainer_backend import BackendError

Leaf = Tensor | int | str | None
_GROUP = "group "  # and its number, in place of a parameter's name
MASTER = "master"  # key of the fp32 weights beside bf16 ones, in every backend


def leaves(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """The state of every parameter by path; `named` are the model's parameters.

    Raises `TypeError` for what is neither a tensor nor a whole number.
    """
    names = _names(optimizer, named)
    found: dict[str, Leaf] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if not isinstance(value, Tensor | int | str) and value is not None:
                raise TypeError(
                    f"optimizer state {names[index]}/{key}: a {type(value).__name__} cannot be "
                    "saved; expected tensors and whole numbers"
                )
            found[f"{names[index]}/{key}"] = value
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                found[f"{_GROUP}{number}/{key}"] = value
    return found


def numbers(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is not a tensor: plain leaves by path, and what each parameter group counts."""
    plain = {k: v for k, v in leaves(optimizer, named).items() if not isinstance(v, Tensor)}
    return {"state": plain, "groups": [_counters(optimizer, g) for g in optimizer.param_groups]}


def tensor_buckets(
    found: Mapping[str, Leaf], whole: Callable[[Tensor], Tensor], size_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """The tensors among the leaves, made `whole` (maybe a collective call), at most `size_bytes` at
    a time."""
    bucket: dict[str, Tensor] = {}
    total = 0
    for name, value in found.items():
        if not isinstance(value, Tensor):
            continue
        if bucket and total + value.nbytes > size_bytes:
            yield bucket
            bucket, total = {}, 0
        bucket[name] = whole(value)
        total += value.nbytes
    if bucket:
        yield bucket


def load(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> None:
    """Give an optimizer its state back: `tensors` by path, each cut as the optimizer holds it, and
    what `numbers` returned. Raises `BackendError` if it is of other parameters.
    """
    names = _names(optimizer, named)
    index_of = {name: index for index, name in enumerate(names)}
    current = optimizer.state_dict()
    groups, counted = current["param_groups"], [dict(counts) for counts in saved["groups"]]
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**saved["state"], **tensors}.items():
        name, _, key = path.rpartition("/")
        if name.startswith(_GROUP):
            counted[int(name.removeprefix(_GROUP))][key] = value
            continue
        if name not in index_of:
            raise BackendError(
                f"the saved optimizer has a state for {name}, which is not trained here: load a "
                "checkpoint of the same model and the same adapter settings"
            )
        state.setdefault(index_of[name], {})[key] = value
    if len(groups) != len(counted):
        raise BackendError(
            f"the saved optimizer has {len(counted)} parameter groups, this one {len(groups)}: "
            "load a checkpoint of the same model and the same optimizer"
        )
    groups = [{**group, **counts} for group, counts in zip(groups, counted, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> list[str]:
    """Parameter names in the order of the optimizer's `state_dict`; of tied ones the first."""
    by_id = {id(parameter): name for name, parameter in reversed(list(named.items()))}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _counters(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, int]:
    return {
        key: value
        for key, value in group.items()
        if key not in optimizer.defaults and type(value) is int
    }
