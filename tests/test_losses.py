"""Policy losses against the spec's numbers, their gradients, and how they are put together."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loopwright.algorithms import aggregation, losses

PROX = torch.tensor([-1.0, -0.5, -2.0, -0.25], dtype=torch.float64)
LP = torch.tensor([-1.0, -0.3, -2.2, -0.2], dtype=torch.float64)
TURNS = torch.tensor([0, 0, 1, 1])


def _clip_loss(lp: Tensor, prox: Tensor, advantage: float, form: losses.ClipForm) -> Tensor:
    low, high = losses.clip_bounds(0.1, form)
    return losses.ppo(lp, prox, torch.full_like(lp, advantage), low=low, high=high)


@pytest.mark.parametrize(
    ("advantage", "form", "expected"),
    [
        (0.8, "code", -0.79400037),
        (0.8, "paper", -0.79400037),
        (-0.5, "paper", 0.52158423),
        (-0.5, "code", 0.52272060),
    ],
)
def test_ppo_by_token(advantage: float, form: losses.ClipForm, expected: float) -> None:
    assert float(_clip_loss(LP, PROX, advantage, form).mean()) == pytest.approx(expected, abs=5e-9)


def test_ppo_by_turn_and_by_trajectory() -> None:
    lp, prox = (losses.sum_by_unit(v, TURNS, 2) for v in (LP, PROX))
    assert float(_clip_loss(lp, prox, 0.8, "code").mean()) == pytest.approx(-0.78428319, abs=5e-9)
    lp, prox = (v.sum()[None] for v in (LP, PROX))
    assert float(_clip_loss(lp, prox, 0.8, "code")) == pytest.approx(-0.84101688, abs=5e-9)


def test_bounds_of_both_clip_forms() -> None:
    assert losses.clip_bounds(0.1, "paper") == pytest.approx((0.9, 1.1))
    assert losses.clip_bounds(3.0, "code") == pytest.approx((0.25, 4.0))
    with pytest.raises(ValueError, match="clip form"):
        losses.clip_bounds(0.1, "other")  # type: ignore[arg-type]


def test_dual_clip_bounds_what_the_min_form_leaves_unbounded() -> None:
    lp, prox = torch.tensor([math.log(50.0)], dtype=torch.float64), torch.zeros(1).double()
    advantage = torch.tensor([-0.5], dtype=torch.float64)
    assert float(losses.ppo(lp, prox, advantage, low=0.9, high=1.1)) == pytest.approx(25.0)
    bounded = losses.ppo(lp, prox, advantage, low=0.9, high=1.1, dual_clip=3.0)
    assert float(bounded) == pytest.approx(1.5)
    assert losses.ppo_clipped(lp, prox, advantage, low=0.9, high=1.1, dual_clip=3.0).all()
    assert not losses.ppo_clipped(lp, prox, advantage, low=0.9, high=1.1).any()


def test_clipped_units_are_those_without_a_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    lp = torch.randn(200, generator=random, dtype=torch.float64).requires_grad_()
    prox, advantage = torch.zeros(200).double(), torch.randn(200, generator=random).double()
    losses.ppo(lp, prox, advantage, low=0.9, high=1.1, dual_clip=3.0).sum().backward()
    clipped = losses.ppo_clipped(lp.detach(), prox, advantage, low=0.9, high=1.1, dual_clip=3.0)
    assert lp.grad is not None
    assert torch.equal(lp.grad == 0, clipped) and 0 < int(clipped.sum()) < 200


@pytest.mark.parametrize(("grad", "expected"), [("stopgrad", -4.0), ("through", 0.0)])
def test_aipo_past_its_cap(grad: str, expected: float) -> None:
    lp = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    mu, advantage = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    loss = losses.aipo(lp, mu, advantage, cap=4.0, grad=grad)  # type: ignore[arg-type]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-4.0)
    assert lp.grad is not None and float(lp.grad) == pytest.approx(expected)


def test_mismatch_weights_cap_or_mask_and_carry_no_gradient() -> None:
    prox = torch.tensor([0.0, 1.0, -2.0], requires_grad=True)
    mu = torch.zeros(3)
    capped = losses.truncated_is(prox, mu, cap=2.0)
    masked = losses.masked_is(prox, mu, low=0.5, high=2.0)
    torch.testing.assert_close(capped, torch.tensor([1.0, 2.0, math.exp(-2)]))
    torch.testing.assert_close(masked, torch.tensor([1.0, 0.0, 0.0]))
    assert not capped.requires_grad and not masked.requires_grad


def test_decoupled_is_the_mismatch_weight_times_ppo() -> None:
    mu = PROX - torch.tensor([0.0, 0.3, -0.4, 2.0]).double()
    advantage = torch.tensor([0.8, -0.5, 0.8, -0.5]).double()
    found = losses.decoupled(LP, PROX, mu, advantage, low=0.9, high=1.1, cap=2.0)
    weight = torch.exp(PROX - mu).clamp(max=2.0)
    expected = weight * losses.ppo(LP, PROX, advantage, low=0.9, high=1.1)
    torch.testing.assert_close(found, expected)
    uncapped = losses.decoupled(LP, PROX, mu, advantage, low=0.9, high=1.1)
    assert float(uncapped[3] / found[3]) == pytest.approx(math.exp(2.0) / 2.0)


def test_cispo_weights_reinforce_by_the_clipped_ratio() -> None:
    lp = LP.clone().requires_grad_()
    advantage = torch.full_like(LP, 0.8)
    losses.cispo(lp, PROX, advantage, low=0.9, high=1.1).sum().backward()
    expected = -0.8 * torch.exp(LP - PROX).clamp(0.9, 1.1)
    assert lp.grad is not None
    torch.testing.assert_close(lp.grad, expected)
    plain = losses.reinforce(LP, advantage)
    torch.testing.assert_close(plain, -0.8 * LP)


def _means(lp: Tensor) -> tuple[Tensor, Tensor]:
    return losses.mean_by_unit(lp, TURNS, 2), losses.mean_by_unit(PROX, TURNS, 2)


def test_gspo_clips_the_geometric_mean_of_a_sequence() -> None:
    advantage = torch.tensor([1.0, -1.0]).double()
    found = losses.gspo(*_means(LP), advantage, low=0.95, high=1.05)
    # Means of log-ratios: (0 + .2)/2 and (−.2 + .05)/2.
    assert found.tolist() == pytest.approx([-1.05, max(0.95, math.exp(-0.075))])


def _ppo_sum(lp: Tensor) -> Tensor:
    return _clip_loss(lp, PROX, 0.8, "code").sum()


def _gspo_sum(lp: Tensor) -> Tensor:
    return losses.gspo(*_means(lp), torch.ones(2).double(), low=0.5, high=2.0).sum()


def _turn_sum(lp: Tensor) -> Tensor:
    summed, prox = (losses.sum_by_unit(v, TURNS, 2) for v in (lp, PROX))
    return losses.ppo(summed, prox, torch.ones(2).double() * -0.5, low=0.5, high=2.0).sum()


def _aipo_sum(lp: Tensor) -> Tensor:
    return losses.aipo(lp, PROX, torch.ones(4).double(), cap=4.0, grad="through").sum()


@pytest.mark.parametrize("function", [_ppo_sum, _gspo_sum, _turn_sum, _aipo_sum])
def test_gradients_match_finite_differences(function) -> None:  # type: ignore[no-untyped-def]
    point = (LP + torch.tensor([0.01, 0.0, 0.0, 0.0])).requires_grad_()
    assert torch.autograd.gradcheck(function, (point,))


def test_kl_estimators() -> None:
    lp, reference = torch.tensor([-1.0, -0.5]), torch.tensor([-1.2, -0.1])
    torch.testing.assert_close(losses.k1(lp, reference), torch.tensor([0.2, -0.4]))
    torch.testing.assert_close(losses.k2(lp, reference), torch.tensor([0.02, 0.08]))
    expected = [math.exp(d) - d - 1 for d in (-0.2, 0.4)]
    assert losses.k3(lp, reference).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("rollout_mean_over_constant", 2.25),
        ("sequence_mean", 3.0),
        ("token_mean", 2.42857143),
        ("fixed_length", 1.41666667),
    ],
)
def test_aggregation_modes(mode: aggregation.Aggregation, expected: float) -> None:
    tokens = np.array([1, 3, 2, 2, 2, 2, 5], dtype=np.float64)
    owners = np.array([0, 0, 1, 1, 1, 1, 2])
    weights = aggregation.unit_weights(mode, owners, minibatch_size=4, fixed_length_tokens=4)
    assert float((weights * tokens).sum()) == pytest.approx(expected, abs=5e-9)


def test_a_rollout_counts_once_however_its_tokens_are_ordered() -> None:
    owners = np.array([7, 3, 7, 7])
    weights = aggregation.rollout_mean_over_constant(owners, 2)
    np.testing.assert_allclose(weights, [1 / 6, 1 / 2, 1 / 6, 1 / 6])


def test_ranks_with_different_token_counts_give_the_global_mean() -> None:
    ranks = [np.array([1.0, 2.0, 3.0]), np.array([10.0])]
    total = sum(len(rank) for rank in ranks)
    parts = [
        float((aggregation.token_mean(np.zeros(len(r), int), total_units=total) * r).sum())
        for r in ranks
    ]
    assert sum(parts) == pytest.approx(4.0)
