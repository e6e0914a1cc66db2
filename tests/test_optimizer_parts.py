"""The parts of optimizers: state formats, projections, layer choices, streams, forward-only
search."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loopwright.algorithms import optimizers
from loopwright.algorithms.optimizers import (
    METHODS,
    GradientStream,
    OptimizerError,
    Pipeline,
    build,
)
from loopwright.algorithms.optimizers.bases import LowRank, next_seed
from loopwright.algorithms.optimizers.conditioners import Fisher
from loopwright.algorithms.optimizers.emits import WeightNorm
from loopwright.algorithms.optimizers.inner import Sgd
from loopwright.algorithms.optimizers.layer_sampling import LayerSampler, outlier_share
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.options import resolve
from loopwright.algorithms.optimizers.parts import Plan, Recipe, Slot
from loopwright.algorithms.optimizers.restarts import rebalanced
from loopwright.algorithms.optimizers.state_codecs import (
    CODECS,
    Noise,
    dynamic_map,
    nearest_code,
    round_stochastically,
)
from loopwright.algorithms.optimizers.write_back import WriteBack
from tests.optimizer_problem import Descent, loss_of, problem

ALL = slice(None)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- state formats


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_the_dynamic_tree(signed: bool) -> None:
    """Every value decoded by hand: leading zeros are decimal exponents, the bit after the first one
    begins a linear fraction (Dettmers 2016, section 2.3)."""
    by_hand = {0.0, 1.0}
    for zeros in range(7):
        fractions = 2 ** (6 - zeros) * (1 if signed else 2)
        step = 0.9 / fractions
        for k in range(fractions):
            value = (0.1 + (k + 0.5) * step) * 10.0**-zeros
            by_hand |= {value, -value} if signed else {value}
    table = dynamic_map(signed)
    assert len(table) == 256
    np.testing.assert_allclose(table.numpy(), sorted(by_hand), rtol=2e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_nearest(bits: int) -> None:
    table = dynamic_map(True, bits)
    values = torch.cat(
        [_random(20_000).clamp(-1, 1), table, torch.tensor([0.0, -0.0, 1e-9, -1e-30, 1.0, -1.0])]
    )
    best = (values.unsqueeze(1) - table).abs().argmin(1)
    found = nearest_code(values, table).long()
    distance = (values - table[found]).abs() - (values - table[best]).abs()
    assert float(distance.max()) <= 1e-9


@pytest.mark.parametrize(("state", "error"), [("fp32", 0), ("bf16", 8e-3), ("int8", 0.02)])
@pytest.mark.parametrize("shape", [(5, 300), (3, 4, 7), (2, 1)])
def test_states_come_back_as_they_went(state: Any, error: float, shape: tuple[int, ...]) -> None:
    codec, held = CODECS[state], {}  # type: ignore[var-annotated]
    layout = Layout.of("w", torch.zeros(shape))
    codec.allocate(held, "exp_avg", shape, layout, sharded=True)
    assert not codec.read(held, "exp_avg", ALL).any()
    value = _random(*shape)
    codec.write(held, "exp_avg", value, ALL, Noise((0,), math.prod(shape[:-1]), 0))
    torch.testing.assert_close(codec.read(held, "exp_avg", ALL), value, rtol=error, atol=error)
    assert torch.equal(
        codec.read(held, "exp_avg", slice(1, 2)), codec.read(held, "exp_avg", ALL)[1:2]
    )


def test_stochastic_rounding_is_right_on_average_and_independent_of_the_cut() -> None:
    value = torch.full((400, 500), 1 + 2.0**-10)  # an eighth of the way from 1 to the next bf16
    noise = Noise((1, 2), 400, 0)
    rounded = round_stochastically(value, noise.bits(value.shape, 0, value.device)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float(rounded.mean()) == pytest.approx(1 + 2.0**-10, abs=5e-5)
    part = Noise((1, 2), 400, 100).bits(torch.Size((50, 500)), 0, value.device)
    assert torch.equal(part, noise.bits(value.shape, 0, value.device)[100:150])
    whole = torch.tensor([0.0, float("inf"), -3.0])
    bits = Noise((0,), 3, 0).bits(whole.shape, 0, whole.device)
    assert torch.equal(round_stochastically(whole, bits).float(), whole)


# --- bases and conditioners


def test_full_rank_with_sgd_inside_is_sgd() -> None:
    """A basis of the full rank loses nothing."""
    recipe = Recipe(inner=Sgd(), basis=LowRank(rank=99, gap=2))
    options = resolve("galore", METHODS["galore"].defaults, {"lr": 0.1})
    for shape in ((12, 8), (8, 12)):
        ours, theirs = nn.Parameter(_random(*shape)), nn.Parameter(_random(*shape))
        slot = Slot(
            name="w",
            parameter=ours,
            layout=Layout.of("w", ours),
            recipe=recipe,
            write_back=WriteBack("plain"),
            index=0,
        )
        low = Pipeline([slot], Plan(recipe_of=lambda name, shape: recipe), options, "galore")
        plain = torch.optim.SGD([theirs], lr=0.1)
        for update in range(6):
            ours.grad, theirs.grad = (_random(*shape, seed=update) for _ in range(2))
            low.step()
            plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lazy_and_staggered_refreshes() -> None:
    steady = Descent("galore", rank=4, gap=3, lr=1e-6, lazy=0.5)
    steady.run(12)
    state = steady.optimizer.state[steady.weights]
    assert state["gap"] > 3 and state["refreshes"] < 4
    weights = {f"layers.{i}.w": nn.Parameter(_random(8, 6, seed=i)) for i in range(5)}
    spread = build(weights, "galore", rank=2, gap=10, stagger=True)
    for update in range(11):
        for p in weights.values():
            p.grad = _random(8, 6, seed=update)
        spread.step()
    due = {int(spread.state[p]["next_refresh"]) for p in weights.values()}
    assert len(due) == 5


def test_natural_gradient_is_the_regularised_inverse() -> None:
    conditioner = Fisher(history=3, damping=0.1)
    layout, held = Layout.of("w", torch.zeros(5, 4)), {}  # type: ignore[var-annotated]
    codec = CODECS["fp32"]
    conditioner.allocate(held, (5, 4), layout, codec, sharded=True)
    past: list[Tensor] = []
    for k in range(5):
        gradient = _random(5, 4, seed=k)
        past = [*past, gradient.flatten()][-3:]
        found = conditioner.apply(
            held, gradient.clone(), layout, codec, ALL, Noise((0,), 5, 0), sharded=True
        )
        stacked = torch.stack(past, dim=1).double()
        inverse = torch.linalg.inv(0.1 * torch.eye(20, dtype=torch.double) + stacked @ stacked.mT)
        expected = (inverse @ gradient.flatten().double()).float().view(5, 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_seeds_of_random_bases_follow_a_chain() -> None:
    source = torch.Generator().manual_seed(1)
    drawn = [int(torch.randint(0, 2**63 - 1, (1,), generator=source)) for _ in range(15)]
    assert next_seed(1) == drawn[-1]
    descent = Descent("apollo", rank=4, gap=2, lr=0.01)
    assert descent.optimizer.state[descent.weights]["basis_seed"] == 1
    descent.run(3)
    assert descent.optimizer.state[descent.weights]["basis_seed"] == next_seed(1)
    assert "basis" not in descent.optimizer.state[descent.weights]


def test_apollo_and_fira_by_hand() -> None:
    """One update written out from the papers, with the limiter in the second."""
    g1, g2 = _random(6, 4, seed=1), 3 * _random(6, 4, seed=2)
    for name in ("apollo", "fira"):
        weights = nn.Parameter(torch.zeros(6, 4))
        optimizer = build({"w": weights}, name, rank=2, gap=99, lr=0.1, betas=(0.9, 0.99), eps=1e-6)
        basis = (
            torch.randn((2, 4), generator=torch.Generator().manual_seed(1)).mT / 2**0.5
            if name == "apollo"
            else torch.linalg.svd(g1)[2][:2].mT
        )
        moment, square, expected, last = (
            torch.zeros(6, 2),
            torch.zeros(6, 2),
            torch.zeros(6, 4),
            0.0,
        )
        for k, gradient in ((1, g1), (2, g2)):
            weights.grad = gradient.clone()
            optimizer.step()
            low = gradient @ basis
            moment = 0.9 * moment + 0.1 * low
            square = 0.99 * square + 0.01 * low**2
            size = 0.1 * math.sqrt(1 - 0.99**k) / (1 - 0.9**k)
            direction = moment / (square.sqrt() + 1e-6)
            ratio = direction.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
            scaled = gradient * ratio if name == "apollo" else (gradient - low @ basis.mT) * ratio
            norm = float(scaled.norm())
            if k == 2:
                excess = max(norm / (last + 1e-8), 1.01) / 1.01
                scaled, norm = scaled / excess, norm / excess
            last = norm
            expected -= size * (scaled if name == "apollo" else scaled + direction @ basis.mT)
        torch.testing.assert_close(weights.detach(), expected, rtol=1e-4, atol=1e-5)


def test_spikes_are_cut_and_masked_entries_stay() -> None:
    weights = nn.Parameter(_random(16, 32))
    start = weights.detach().clone()
    optimizer = build(
        {"w": weights}, "spam", density=0.25, lr=0.01, weight_decay=0.5, reset_every=0
    )
    weights.grad = _random(16, 32, seed=1)
    optimizer.step()
    moved = (weights.detach() != start).sum(1)
    assert torch.equal(moved, torch.full((16,), 8))
    first = torch.linalg.vector_norm(weights.detach() - start)
    assert float(first) > 0
    calm = nn.Parameter(torch.zeros(4, 4))
    spam = build({"w": calm}, "spam", theta=5000.0, window=3, lr=0.01, reset_every=0)
    for update in range(4):
        calm.grad = torch.full((4, 4), 1e6 if update == 3 else 1.0)
        spam.step()
    limit = math.sqrt(5000 * (1 - 0.999**3))
    moment = 0.9 * (1 - 0.9**3) + 0.1 * limit
    torch.testing.assert_close(spam.state[calm]["exp_avg"], torch.full((4, 4), moment))


def test_moments_are_reset_and_the_warm_up_begins() -> None:
    weights = nn.Parameter(torch.zeros(3, 3))
    optimizer = build({"w": weights}, "spam", lr=1.0, reset_every=4, warmup=2, betas=(0.0, 0.0))
    steps = []
    for _ in range(7):
        before = weights.detach().clone()
        weights.grad = torch.ones(3, 3)
        optimizer.step()
        steps.append(float((before - weights.detach()).mean()))
    warm = [1 - 0.99 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(2)]
    assert steps == pytest.approx([1, 1, 1, *warm, 1, 1], rel=1e-4)


# --- layers and channels


def _layers(count: int = 4) -> dict[str, nn.Parameter]:
    names = [f"model.layers.{i}.{part}_proj.weight" for i in range(count) for part in ("up", "q")]
    found = {name: nn.Parameter(_random(8, 6, seed=k)) for k, name in enumerate(names)}
    return found | {"model.embed_tokens.weight": nn.Parameter(_random(10, 6))}


@pytest.mark.parametrize("name", ["lisa", "owlore", "badam"])
def test_only_chosen_layers_move_and_only_they_have_states(name: str) -> None:
    weights = _layers()
    extra: dict[str, Any] = {"rank": 2} if name == "owlore" else {}
    optimizer = build(weights, name, layers=2, switch_every=3, lr=0.1, **extra)
    seen = set()
    for _ in range(4):
        before = {key: p.detach().clone() for key, p in weights.items()}
        for update in range(3):
            for p in weights.values():
                p.grad = _random(*p.shape, seed=update)
            held = {key for key, p in weights.items() if p in optimizer.state}
            optimizer.step()
        moved = {key for key, p in weights.items() if not torch.equal(p, before[key])}
        layers = {key.split(".")[2] for key in moved if "layers" in key}
        assert len(layers) == 2 and moved == held
        assert ("model.embed_tokens.weight" in moved) == (name != "badam")
        seen |= layers
    assert len(seen) > 2


def test_layer_choices() -> None:
    layers = [f"layers.{i}" for i in range(6)]
    cycle = LayerSampler(kind="cycle", count=1, every=10, seed=0)
    order = [cycle.chosen(layers, torch.ones(6), t) for t in range(0, 70, 10)]
    assert [next(iter(o)) for o in order] == [f"layers.{i}" for i in (5, 4, 3, 2, 1, 0, 5)]
    skewed = LayerSampler(kind="outliers", count=2, every=1, seed=0)
    scores = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 1.0])
    counts = dict.fromkeys(layers, 0)
    for t in range(400):
        for layer in skewed.chosen(layers, scores, t):
            counts[layer] += 1
    assert counts["layers.2"] > 390 > counts["layers.5"] > 350 > 40 > counts["layers.0"]
    assert skewed.chosen(layers, scores, 7) == skewed.chosen(layers, scores, 7)


def test_outlier_scores_are_of_the_calibration_batch() -> None:
    norms = torch.ones(100)
    assert outlier_share(torch.ones(1, 100), norms) == 0.0
    norms[3] = 1e6
    assert outlier_share(torch.ones(1, 100), norms) == pytest.approx(0.01)
    model = nn.Sequential()
    model.layers = nn.ModuleList([nn.Linear(100, 4, bias=False) for _ in range(3)])
    for p in model.parameters():
        nn.init.ones_(p)
    inputs = torch.ones(5, 100)
    inputs[:, 7] = 1e4

    def run() -> None:
        for k, layer in enumerate(model.layers):  # type: ignore[arg-type]
            layer(inputs if k == 1 else torch.ones(5, 100))

    scores = optimizers.outlier_scores(model, run)
    assert scores["layers.1"] == pytest.approx(0.01) and scores["layers.0"] == scores["layers.2"]
    optimizer = build(model, "owlore", rank=2, layers=1, switch_every=1)
    optimizer.set_layer_scores(scores)  # type: ignore[attr-defined]
    with pytest.raises(OptimizerError, match="no score"):
        optimizer.set_layer_scores({})  # type: ignore[attr-defined]
    with pytest.raises(OptimizerError, match="does not draw layers"):
        build(model, "adamw").set_layer_scores(scores)  # type: ignore[attr-defined]


def test_coupled_channels_are_the_same_on_both_sides() -> None:
    shapes = {"gate_proj": (20, 8), "up_proj": (20, 8), "down_proj": (8, 20), "q_proj": (8, 8)}
    weights = {
        f"layers.{i}.mlp.{name}.weight": nn.Parameter(_random(*shape, seed=i))
        for i in range(2)
        for name, shape in shapes.items()
    }
    before = {key: p.detach().clone() for key, p in weights.items()}
    optimizer = build(weights, "s2ft", density=0.2, lr=0.1)
    for p in weights.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    chosen = []
    for i in range(2):
        moved = {
            name: (
                weights[f"layers.{i}.mlp.{name}.weight"] != before[f"layers.{i}.mlp.{name}.weight"]
            )
            for name in shapes
        }
        rows = moved["gate_proj"].all(1)
        assert rows.sum() == 4 and torch.equal(rows, moved["up_proj"].all(1))
        assert torch.equal(rows, moved["down_proj"].all(0)) and moved["down_proj"].sum() == 32
        assert not moved["q_proj"].any()
        chosen.append(rows)
    assert not torch.equal(*chosen)
    assert optimizer.state_bytes() < sum(p.numel() for p in weights.values()) * 8 * 0.3  # type: ignore[attr-defined]


def test_factors_are_rebalanced_without_changing_their_product() -> None:
    a, b = 100 * _random(3, 20, seed=1), 0.01 * _random(15, 3, seed=2)
    new_a, new_b = rebalanced(a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_a @ new_a.mT, new_b.mT @ new_b, rtol=1e-4, atol=1e-5)
    weights = {
        "l.lora_A.weight": nn.Parameter(a.clone()),
        "l.lora_B.weight": nn.Parameter(b.clone()),
    }
    optimizer = build(weights, "low_rank_restarts", reset_every=2, lr=0.0)
    for _ in range(2):
        for p in weights.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, expected in zip(weights.values(), rebalanced(a, b), strict=True):
        torch.testing.assert_close(p.detach(), expected)
        assert optimizer.state[p]["step"] == 0 and not optimizer.state[p]["exp_avg"].any()
    with pytest.raises(OptimizerError, match="not its partner"):
        build({"l.lora_A.weight": nn.Parameter(a)}, "low_rank_restarts")


def test_weight_norm_has_the_gradients_of_direction_and_gain() -> None:
    weights, gradient = _random(6, 5), _random(6, 5, seed=1)
    gain = weights.norm(dim=1, keepdim=True).requires_grad_()
    direction = (weights / gain).detach().requires_grad_()
    (gain * direction / direction.norm(dim=1, keepdim=True) * gradient).sum().backward()
    assert direction.grad is not None and gain.grad is not None
    emit = WeightNorm(scale=1.0, betas=(0.9, 0.99), eps=1e-12)
    torch.testing.assert_close(emit.enter(weights, gradient), direction.grad)
    trained = nn.Parameter(weights.clone())
    optimizer = build({"w": trained}, "gradnormlorp", rank=2, lr=0.1, scale=1.0, eps=1e-12)
    trained.grad = gradient.clone()
    optimizer.step()
    # Adam's first step of the gain is the rate, in the direction of its gradient
    expected = gain.detach() - 0.1 * gain.grad.sign()
    torch.testing.assert_close(trained.detach().norm(dim=1, keepdim=True), expected.abs())
    change = trained.detach() / trained.detach().norm(dim=1, keepdim=True) - direction.detach()
    assert float((change * direction.grad).sum()) < 0


# --- streams


@pytest.mark.parametrize(
    "name", ["galore", "natural_galore", "owlore", "fira", "adamw", "gradnormlorp"]
)
def test_projecting_in_the_hook_is_exact(name: str) -> None:
    """Accumulated over micro-batches and clipped, streamed gradients give the same weights; whole
    ones are freed unless they are needed."""
    start, inputs, targets = problem(24, 16)
    extra = {
        k: v for k, v in {"rank": 4, "gap": 3}.items() if k in optimizers.METHODS[name].defaults
    }
    found = []
    for streamed in (False, True):
        weights = nn.Parameter(start.clone())
        optimizer = build({"layers.0.w": weights}, name, lr=0.05, **extra)
        stream = GradientStream(optimizer) if streamed else None
        for update in range(7):
            optimizer.zero_grad()
            for part in range(3):
                (loss_of(weights, inputs[part::3], targets[part::3]) / 3).backward()
                keeps = name in ("fira", "adamw", "gradnormlorp") or update % 3 == 0
                assert (weights.grad is not None) == (keeps or not streamed)
            if stream is not None:
                assert sum(t.numel() for t in stream.pending()) == 24 * (16 if keeps else 4)
            optimizer.clip_gradients(0.5)  # type: ignore[attr-defined]
            optimizer.step()
        if stream is not None:
            stream.close()
        found.append(weights.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_streams_free_what_is_not_trained_and_refuse_strangers() -> None:
    weights = _layers()
    optimizer = build(weights, "lisa", layers=1, switch_every=2)
    with GradientStream(optimizer):
        sum(p.square().sum() for p in weights.values()).backward()  # type: ignore[union-attr]
        held = {key.split(".")[2] for key, p in weights.items() if p.grad is not None}
        assert len(held - {"weight"}) == 1
    with pytest.raises(OptimizerError, match=r"make it by build"):
        GradientStream(torch.optim.SGD(list(weights.values()), lr=1.0))


# --- forward-only


def test_mezo_by_hand() -> None:
    """Two losses and a seed make the update; the weights come back between them."""
    start = _random(6, 4)
    weights = nn.Parameter(start.clone())
    optimizer = build({"w": weights}, "mezo", lr=0.1, eps=1e-3, weight_decay=0.01, seed=5)
    seen = []

    def loss() -> float:
        seen.append(weights.detach().clone())
        return float(weights.detach().square().sum())

    optimizer.step(loss)  # type: ignore[arg-type]
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(optimizer.step_seed(0)))  # type: ignore[attr-defined]
    torch.testing.assert_close(seen[0], start + 1e-3 * z)
    torch.testing.assert_close(seen[1], start - 1e-3 * z)
    slope = (float(seen[0].square().sum()) - float(seen[1].square().sum())) / 2e-3
    torch.testing.assert_close(
        weights.detach(), start - 0.1 * (slope * z + 0.01 * start), rtol=1e-3, atol=1e-4
    )
    assert optimizer.state_bytes() == 0  # type: ignore[attr-defined]
    twin = nn.Parameter(weights.detach().clone())
    other = build({"w": twin}, "mezo", lr=0.1, eps=1e-3, weight_decay=0.01, seed=5)
    other.load_state_dict(optimizer.state_dict())
    optimizer.step(loss)  # type: ignore[arg-type]
    other.step(lambda: float(twin.detach().square().sum()))  # type: ignore[arg-type, return-value]
    assert torch.equal(weights, twin)


def test_sparse_mezo_moves_small_weights_alone_and_refuses_what_it_cannot_use() -> None:
    start = _random(10, 10)
    weights = nn.Parameter(start.clone())
    optimizer = build({"w": weights}, "sparse_mezo", lr=1e-3, density=0.25)
    optimizer.step(lambda: float(weights.detach().sum()))  # type: ignore[arg-type, return-value]
    moved = (weights.detach() - start).abs() > 1e-5
    assert 20 <= int(moved.sum()) <= 25
    assert float(start.abs()[moved].max()) < float(start.abs()[~moved].min()) + 1e-6
    before = weights.detach().clone()
    with pytest.raises(OptimizerError, match="losses nan"):
        optimizer.step(lambda: math.nan)  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(weights.detach(), before)
    with pytest.raises(OptimizerError, match=r"step\(closure\)"):
        optimizer.step()


def test_muon_and_adafactor_are_torchs() -> None:
    pairs: list[tuple[str, Any]] = [
        ("muon", torch.optim.Muon),
        ("adafactor", torch.optim.Adafactor),
    ]
    for name, other in pairs:
        for m, n in ((12, 8), (8, 12)):
            ours = Descent(name, m=m, n=n, lr=0.02, weight_decay=0.1)
            start, inputs, targets = problem(m, n)
            theirs = nn.Parameter(start)
            peer = other([theirs], lr=0.02, weight_decay=0.1)
            for _ in range(10):
                peer.zero_grad()
                loss_of(theirs, inputs, targets).backward()
                peer.step()
            ours.run(10)
            torch.testing.assert_close(ours.weights, theirs, rtol=1e-4, atol=1e-5)
