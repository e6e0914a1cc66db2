"""Optimizers: trajectories against published numbers, properties of all, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from loopwright.algorithms import optimizers
from loopwright.algorithms.optimizers import METHODS, OptimizerError, build, predict_state_bytes
from tests.optimizer_problem import Descent, loss_of, problem

LOW_RANK = ("galore",)
PARITY: dict[str, Any] = {"projection": "svd", "on_refresh": "keep"}


@pytest.mark.parametrize("options", [{}, PARITY], ids=["default", "published"])
def test_galore_numbers(options: dict[str, Any]) -> None:
    tall = Descent("galore", rank=4, gap=200, scale=0.25, lr=0.1, **options)
    assert tall.losses(1, 10, 50) == pytest.approx([3.13155, 2.51004, 1.05537], rel=1e-4)
    wide = Descent("galore", m=32, n=64, rank=4, lr=0.1, **options)
    assert wide.losses(1, 10, 50) == pytest.approx([1.74273, 1.42672, 0.60970], rel=1e-4)


def test_moments_after_a_refresh() -> None:
    """Transported or zeroed moments do not depend on the signs of singular vectors; kept ones do,
    and are worse."""
    options: dict[str, Any] = {"rank": 4, "lr": 0.1, "gap": 10}
    losses = {
        (how, projection): Descent("galore", on_refresh=how, projection=projection, **options).run(
            50
        )
        for how in ("transport", "reset", "keep")
        for projection in ("svd", "randomized")
    }
    for projection in ("svd", "randomized"):
        assert losses["transport", projection] == pytest.approx(0.99898, rel=1e-4)
        assert losses["reset", projection] == pytest.approx(0.87753, rel=1e-4)
        assert 1.4 < losses["keep", projection] < 1.85
    assert Descent("galore", projection="subspace", **options).run(50) < 1.02


def test_adamw_sgd_signsgd_are_torchs() -> None:
    pairs: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
        ("adamw", {"lr": 0.02, "weight_decay": 0.1}, torch.optim.AdamW, {}),
        ("sgd", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD, {}),
        ("sgd", {"lr": 0.1}, torch.optim.SGD, {}),
    ]
    for name, options, other, extra in pairs:
        ours = Descent(name, **options)
        start, inputs, targets = problem(64, 32)
        theirs = nn.Parameter(start)
        peer = other([theirs], **options, **extra)
        for _ in range(20):
            peer.zero_grad()
            loss_of(theirs, inputs, targets).backward()
            peer.step()
        ours.run(20)
        torch.testing.assert_close(ours.weights, theirs, rtol=1e-5, atol=1e-6)
    signs = Descent("signsgd", lr=0.01)
    signs.gradient()
    before, gradient = signs.weights.detach().clone(), signs.weights.grad
    assert gradient is not None
    signs.optimizer.step()
    torch.testing.assert_close(signs.weights, before - 0.01 * gradient.sign())


def test_decay_comes_before_the_update_in_torchs_and_after_it_in_galores() -> None:
    gradient = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for name, last in (("adamw", False), ("galore", True)):
        options: dict[str, Any] = {} if name == "adamw" else {"rank": 6, "scale": 1.0}
        moved = []
        for decay in (0.0, 0.5):
            weights = nn.Parameter(torch.ones(8, 6))
            optimizer = build({"w": weights}, name, lr=0.1, weight_decay=decay, **options)
            weights.grad = gradient.clone()
            optimizer.step()
            moved.append(weights.detach())
        expected = moved[0] * 0.95 if last else moved[0] - 0.05
        torch.testing.assert_close(moved[1], expected)


def _mixed(seed: int = 0) -> dict[str, nn.Parameter]:
    """Parameters of every kind: matrices both ways, expert weights, vectors, an embedding, LoRA
    factors."""
    source = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (40, 12),
        "layers.0.mlp.up_proj.weight": (24, 12),
        "layers.0.mlp.down_proj.weight": (12, 24),
        "layers.0.norm.weight": (12,),
        "layers.1.experts": (3, 10, 12),
        "layers.1.o_proj.weight": (12, 12),
        "layers.1.q_proj.lora_A.default.weight": (3, 12),
        "layers.1.q_proj.lora_B.default.weight": (16, 3),
        "scale": (),
    }
    return {
        name: nn.Parameter(torch.randn(shape, generator=source) * 0.1)
        for name, shape in shapes.items()
    }


def _give_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=source)


SMALL: dict[str, dict[str, Any]] = {
    name: {
        option: value
        for option, value in {"rank": 4, "gap": 3, "switch_every": 3, "reset_every": 4}.items()
        if option in METHODS[name].defaults
    }
    for name in METHODS
}
BACKWARD = [name for name in METHODS if not METHODS[name].forward_only]


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", BACKWARD)
def test_measured_bytes_are_predicted_and_resume_is_exact(name: str, state: str) -> None:
    if "state" not in METHODS[name].defaults:
        pytest.skip(f"{name} has no choice of state")
    options = {**SMALL[name], "state": state, "seed": 3}
    parameters, twin = _mixed(), _mixed()
    optimizer = build(parameters, name, **options)
    shapes = {key: tuple(p.shape) for key, p in parameters.items()}
    assert predict_state_bytes(shapes, name, **options) == optimizer.state_bytes()
    for update in range(8):
        _give_gradients(parameters, update)
        optimizer.step()
        if update == 4:  # the next refresh, draw and reset are still to come
            saved = optimizer.state_dict()
            _only_tensors_and_integers(saved)
            resumed = build(twin, name, **options)
            resumed.load_state_dict(saved)
            for key, p in parameters.items():
                twin[key].data.copy_(p.data)
        if update >= 4 + 1:
            _give_gradients(twin, update)
            resumed.step()
    for key, p in parameters.items():
        assert torch.equal(p, twin[key]), f"{key} differs after resuming"


def _model() -> nn.Module:
    source = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(12, 10) for _ in range(3)])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source))
    return model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["galore", "owlore", "spam", "adamw"])
def test_distributed_checkpoint_of_torch_takes_the_state(name: str, tmp_path: Path) -> None:
    options = {**SMALL[name], "state": "int8"}
    models = [_model() for _ in range(2)]
    optimizer, fresh = (build(model, name, **options) for model in models)

    def update(model: nn.Module, each: Any, number: int) -> None:
        _give_gradients(dict(model.named_parameters()), number)
        each.step()

    for number in range(5):
        update(models[0], optimizer, number)
    found = get_optimizer_state_dict(models[0], optimizer)
    checkpoint.save({"optimizer": found}, checkpoint_id=tmp_path, no_dist=True)
    models[1].load_state_dict(models[0].state_dict())
    fresh.seek(optimizer.updates)
    wanted = get_optimizer_state_dict(models[1], fresh)
    checkpoint.load({"optimizer": wanted}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(models[1], fresh, wanted)
    for number in range(5, 9):
        update(models[0], optimizer, number)
        update(models[1], fresh, number)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def _only_tensors_and_integers(saved: dict[str, Any]) -> None:
    for values in saved["state"].values():
        for key, value in values.items():
            assert isinstance(value, Tensor) or type(value) is int, f"{key} is {type(value)}"


@pytest.mark.parametrize("name", BACKWARD)
def test_zero_missing_and_unfit_gradients(name: str) -> None:
    parameters = _mixed()
    optimizer = build(
        parameters, name, **{k: v for k, v in SMALL[name].items() if k in ("rank", "gap")}
    )
    for update in range(2):
        _give_gradients(parameters, update)
        optimizer.step()
    before = {key: p.detach().clone() for key, p in parameters.items()}
    kept = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for s in optimizer.state.values()
    ]
    for zero in (True, False):
        for p in parameters.values():
            p.grad = torch.zeros_like(p) if zero else None
        optimizer.step()
    for key, p in parameters.items():
        assert torch.equal(p, before[key]), f"{key} moved without a gradient"
    _give_gradients(parameters, 7)
    poisoned = next(s for s in optimizer.slots if optimizer.is_trained(s))
    assert poisoned.parameter.grad is not None
    poisoned.parameter.grad.view(-1)[0] = float("nan")
    with pytest.raises(OptimizerError, match=rf"\({poisoned.name}\); nothing was changed"):
        optimizer.step()
    for key, p in parameters.items():
        assert torch.equal(p, before[key]), f"{key} moved by a gradient that is not finite"
    for old, new in zip(kept, optimizer.state.values(), strict=True):
        for key, value in old.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(new[key])), key


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projection", ["subspace", "svd", "randomized"])
@pytest.mark.parametrize("name", LOW_RANK)
def test_bases_are_orthonormal_and_renewed_on_time(name: str, projection: str, side: str) -> None:
    descent = Descent(name, rank=4, gap=3, projection=projection, side=side, lr=0.01)
    start = descent.weights.detach().clone()
    for update in range(1, 11):
        descent.run(1)
        state = descent.optimizer.state[descent.weights]
        basis = state["basis"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=1e-5)
        assert state["refreshes"] == -(-update // 3)
        if update % 3 == 0:
            change = descent.weights.detach() - start
            assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 4
            start = descent.weights.detach().clone()


def test_errors_name_the_nearest() -> None:
    weights = {"w": nn.Parameter(torch.zeros(4, 4))}
    with pytest.raises(OptimizerError, match="'galor'; did you mean 'galore'"):
        build(weights, "galor")
    with pytest.raises(OptimizerError, match="no option 'rnk'; did you mean 'rank'"):
        build(weights, "galore", rnk=4)
    with pytest.raises(OptimizerError, match="'sgd' has no option 'betas'"):
        build(weights, "sgd", betas=(0.9, 0.99))
    for option, value in (
        ("rank", 0),
        ("rank", 1.5),
        ("gap", -1),
        ("betas", (0.9, 1.0)),
        ("side", "rigth"),
        ("lr", float("nan")),
        ("state", "fp8"),
        ("stagger", 1),
    ):
        with pytest.raises(OptimizerError, match=option):
            build(weights, "galore", **{option: value})
    with pytest.raises(OptimizerError, match=r"flat vectors, as DeepSpeed ZeRO.*adamw"):
        build({"flat": nn.Parameter(torch.zeros(64))}, "galore")
    with pytest.raises(OptimizerError, match="named_parameters"):
        build([nn.Parameter(torch.zeros(4))], "adamw")  # type: ignore[list-item]
    with pytest.raises(OptimizerError, match="no parameter requires a gradient"):
        build({"w": nn.Parameter(torch.zeros(4), requires_grad=False)}, "adamw")


def test_another_optimizers_state_is_refused() -> None:
    weights = {"w": nn.Parameter(torch.zeros(8, 6))}
    saved = build(weights, "adamw").state_dict()
    with pytest.raises(OptimizerError, match="of 'adamw', this optimizer is 'galore'"):
        build(weights, "galore").load_state_dict(saved)
    with pytest.raises(OptimizerError, match="not of this package"):
        build(weights, "adamw").load_state_dict(torch.optim.AdamW(weights.values()).state_dict())
    with pytest.raises(OptimizerError, match="rank, side, state"):
        build(weights, "galore", rank=2).load_state_dict(
            build(weights, "galore", rank=3).state_dict()
        )


def test_plain_bf16_at_a_learning_rate_of_rl_is_refused() -> None:
    def weights() -> nn.Parameter:
        source = torch.Generator().manual_seed(1)
        return nn.Parameter((torch.randn(64, 32, generator=source) * 0.02).bfloat16())

    with pytest.raises(OptimizerError, match=r"loses every update.*write_back='master'"):
        build({"w": weights()}, "adamw", lr=1e-6, write_back="plain")
    moved = {}
    for way, lr in (("auto", 1e-6), ("stochastic", 1e-6), ("kahan", 1e-6), ("plain", 1e-3)):
        w = weights()
        before, source = w.detach().clone(), torch.Generator().manual_seed(2)
        optimizer = build({"w": w}, "adamw", lr=lr, weight_decay=0.0, write_back=way)
        for _ in range(100):
            w.grad = torch.randn(w.shape, generator=source).bfloat16()
            w.grad += 1  # an average that moves weights on
            optimizer.step()
        moved[way] = float((w != before).float().mean())
        if way == "auto":
            assert bool((optimizer.state[w]["master"] != before).all())
    assert moved["auto"] > 0.8
    assert moved["kahan"] > 0.8
    assert moved["stochastic"] > 0.3


def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(20, 8), "lm_head": nn.Linear(8, 20)})
    model["lm_head"].weight = model["embed_tokens"].weight  # type: ignore[union-attr]
    optimizer = build(model, "galore", rank=2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    twice = [("a", model["lm_head"].weight), ("b", model["lm_head"].weight)]
    assert len(build(twice, "adamw").slots) == 1  # type: ignore[arg-type]


def test_clipping_shortens_by_the_projected_norm() -> None:
    descent = Descent("galore", rank=4, lr=0.1)
    descent.gradient()
    gradient = descent.weights.grad
    assert gradient is not None
    norm = descent.optimizer.clip_gradients(0.01)
    top = torch.linalg.svdvals(gradient)[:4].square().sum().sqrt()
    assert norm == pytest.approx(float(top), rel=1e-3)
    descent.optimizer.step()
    moment = descent.optimizer.state[descent.weights]["exp_avg"]
    assert float(moment.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_every_method_says_what_it_is() -> None:
    for name, row in METHODS.items():
        assert row.name == name and row.paper and row.use_when and row.plan.__doc__
        optimizers.method(name)


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "optimizers.md"
    assert optimizers.table() in page.read_text()
