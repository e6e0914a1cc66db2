"""Optimizers on parameters cut by rows over two ranks: the same numbers as on one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from loopwright.actors.ranks import Ranks
from loopwright.algorithms.optimizers import METHODS, build, sharding_methods
from tests.rank_world import RankWorld

SHAPES = {"layers.0.up.weight": (37, 24), "layers.1.down.weight": (24, 40), "layers.1.q": (24, 24)}
UPDATES = 20


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankWorld]:
    with RankWorld(2) as world:
        yield world


def _options(name: str, state: str) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "lr": 1e-4 if METHODS[name].forward_only else 0.005,
        "weight_decay": 0.1,
        "rank": 5,
        "gap": 6,
        "switch_every": 6,
        "layers": 1,
        "reset_every": 8,
        "warmup": 3,
        "window": 3,
        "density": 0.5,
        "state": state,
        "seed": 3,
    }
    return {key: value for key, value in wanted.items() if key in METHODS[name].defaults}


def _parameters(mesh: Any, name: str, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Matrices of all shapes, a stack, a vector, and factors where the method wants them."""
    shapes: dict[str, tuple[int, ...]] = {
        **SHAPES,
        "embed_tokens.weight": (23, 24),
        "layers.1.experts": (4, 12, 10),
        "layers.0.norm.weight": (25,),
    }
    if name == "low_rank_restarts":
        shapes |= {"layers.0.q.lora_A.x": (4, 24), "layers.0.q.lora_B.x": (30, 4)}
    source = torch.Generator().manual_seed(1)
    found = {}
    for key, shape in shapes.items():
        value = (torch.randn(shape, generator=source) * 0.2).to(dtype)
        found[key] = nn.Parameter(
            value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])
        )
    return found


def _train(mesh: Any, name: str, state: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Descend on gradients that depend on the present weights; the weights, whole."""
    parameters = _parameters(mesh, name, dtype)
    optimizer = build(parameters, name, **_options(name, state))

    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def loss() -> float:
        return sum(float(whole(p.detach()).double().cos().sum()) for p in parameters.values())

    for update in range(UPDATES):
        if METHODS[name].forward_only:
            optimizer.step(loss)  # type: ignore[arg-type]
            continue
        for place, p in enumerate(parameters.values()):
            value = whole(p.detach()).float()
            source = torch.Generator().manual_seed(100 * update + place)
            noise = torch.randn(value.shape, generator=source)
            gradient = (0.5 * noise + value).to(dtype)
            p.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, [Shard(0)])
        if update % 2:
            optimizer.clip_gradients(5.0)  # type: ignore[attr-defined]
        optimizer.step()
    return {key: whole(p.detach()) for key, p in parameters.items()}


def train_both_ways(ranks: Ranks, name: str, state: str, dtype: str) -> dict[str, float]:
    """Largest difference between two ranks and one, by parameter; run on each rank."""
    mesh = init_device_mesh("cpu", (2,))
    kind = getattr(torch, dtype)
    cut, one = (_train(m, name, state, kind) for m in (mesh, None))
    return {key: float((one[key].float() - cut[key].float()).abs().max()) for key in one}


@pytest.mark.parametrize("name", sharding_methods())
def test_two_ranks_equal_one(two_ranks: RankWorld, name: str) -> None:
    # torch orthogonalises Muon's momentum in bfloat16: a last bit of the clipped gradient shows
    limit = 1e-4 if name == "muon" else 1e-5
    for differences in two_ranks.run(train_both_ways, name, "fp32", "float32"):
        assert max(differences.values()) < limit, differences


@pytest.mark.parametrize(
    ("name", "state", "dtype"),
    [
        ("adamw", "int8", "float32"),
        ("galore", "int8", "float32"),
        ("galore", "bf16", "float32"),
        ("adamw", "fp32", "bfloat16"),
    ],
)
def test_rounding_does_not_depend_on_the_cut(
    two_ranks: RankWorld, name: str, state: str, dtype: str
) -> None:
    for differences in two_ranks.run(train_both_ways, name, state, dtype):
        assert max(differences.values()) < 1e-3, differences


def resume_cut(ranks: Ranks, name: str) -> float:
    """Largest difference between a run and one resumed from states that were saved whole, past a
    choice of layers and a refresh; run on each rank."""
    mesh = init_device_mesh("cpu", (2,))
    options = _options(name, "fp32")
    first, second = (_parameters(mesh, name, torch.float32) for _ in range(2))

    def update(optimizer: Any, parameters: dict[str, nn.Parameter], number: int) -> None:
        for place, p in enumerate(parameters.values()):
            source = torch.Generator().manual_seed(100 * number + place)
            p.grad = distribute_tensor(torch.randn(p.shape, generator=source), mesh, [Shard(0)])
        optimizer.step()

    optimizer = build(first, name, **options)
    for number in range(7):
        update(optimizer, first, number)
    saved = optimizer.state_dict()
    saved["state"] = {
        number: {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in state.items()
        }
        for number, state in saved["state"].items()
    }
    for key, p in first.items():
        second[key].detach().copy_(p.detach())
    resumed = build(second, name, **options)
    resumed.state.clear()  # of layers that are not trained when it is read
    resumed.load_state_dict(saved)
    for number in range(7, 14):
        update(optimizer, first, number)
        update(resumed, second, number)
    return max(
        float((p.detach() - second[key].detach()).full_tensor().abs().max())  # type: ignore[attr-defined]
        for key, p in first.items()
    )


@pytest.mark.parametrize("name", ["owlore", "lisa", "galore", "adamw"])
def test_states_saved_whole_are_cut_again(two_ranks: RankWorld, name: str) -> None:
    assert two_ranks.run(resume_cut, name) == [0.0, 0.0]
