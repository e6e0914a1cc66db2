"""What a model publishes: every weight under its Hugging Face name, in buckets of bounded size.

A bucket is gathered, handed out and forgotten before the next is gathered, so that no process holds
a whole model that is sharded over several.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Gather = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One tensor that engines get, and the parameters of the model that it is made of."""

    names: tuple[str, ...]  # several where weights are tied
    sources: tuple[str, ...]  # parameter names; more than one where an adapter is merged
    shape: Tensor  # on the meta device
    adapted: nn.Module | None = None  # the peft layer that merges them

    @property
    def size_bytes(self) -> int:
        """Of everything that must be gathered for it."""
        return self.shape.nbytes * (1 if self.adapted is None else 2)


def layout(model: nn.Module, adapters: Mapping[str, nn.Module]) -> list[Published]:
    """Everything `model` publishes, in the order of its parameters.

    `adapters` are its peft layers by name (`lora.adapted_layers`); none where it has none.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inside = {
        f"{owner}.{name}": owner
        for owner, layer in adapters.items()
        for name, _ in layer.named_parameters()
    }
    tied: dict[int, list[str]] = {}
    found: list[Published] = []
    for name, parameter in parameters.items():
        owner = inside.get(name)
        if owner is None:
            tied.setdefault(id(parameter), []).append(name)
        elif name.startswith(f"{owner}.base_layer."):
            leaf = name.removeprefix(f"{owner}.base_layer.")
            tied[id(parameter)] = [f"{owner}.{leaf}"]
    done: set[int] = set()
    for name, parameter in parameters.items():
        key = id(parameter)
        if key in done or key not in tied:
            continue
        done.add(key)
        owner = inside.get(name, "")
        merged = owner != "" and name.endswith(".base_layer.weight")
        sources = tuple(n for n, o in inside.items() if o == owner) if merged else (name,)
        found.append(
            Published(
                names=tuple(tied[key]),
                sources=sources,
                shape=torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"),
                adapted=adapters[owner] if merged else None,
            )
        )
    return found


def shapes(published: Sequence[Published]) -> dict[str, Tensor]:
    """Name → tensor on the meta device; tied names have the same object."""
    return {name: item.shape for item in published for name in item.names}


def buckets(
    published: Sequence[Published], gather: Gather, size_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Gather and merge the `published`, at most `size_bytes` at a time."""
    waiting: list[Published] = []
    total = 0
    for item in published:
        if waiting and total + item.size_bytes > size_bytes:
            yield _bucket(waiting, gather)
            waiting, total = [], 0
        waiting.append(item)
        total += item.size_bytes
    if waiting:
        yield _bucket(waiting, gather)


def _bucket(items: Sequence[Published], gather: Gather) -> dict[str, Tensor]:
    sources = gather([name for item in items for name in item.sources])
    found: dict[str, Tensor] = {}
    for item in items:
        if item.adapted is None:
            value = sources[item.sources[0]]
        else:
            from loopwright.actors.lora import merged_weight

            value = merged_weight(item.adapted, [sources[name] for name in item.sources])
        found |= dict.fromkeys(item.names, value)
    return found
