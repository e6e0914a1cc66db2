"""The composed objective against a slow one written from the formulas: every loss with every
mismatch weight at every level, in value and gradient.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loopwright.actors.objective import (
    LossSettings,
    MinibatchUnits,
    ObjectiveError,
    TokenLogprobs,
    minibatch_units,
    weighted_loss,
)
from loopwright.actors.tally import Tally
from loopwright.algorithms import losses
from loopwright.algorithms.aggregation import unit_weights

# 3 rollouts; the first has two contexts (sequences 0 and 1) with turns 0, 1 | 2.
MASK = np.array([0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1], dtype=bool)
TURNS = np.array([-1, 0, 0, -1, 1, -1, 2, 2, -1, 0, 0, 0, -1, 0, -1, 1], dtype=np.int16)
LENGTHS = np.array([5, 3, 4, 4])
SEQUENCE = np.repeat(np.arange(4), LENGTHS)
OWNERS = np.array([0, 0, 1, 2])
ADVANTAGES = np.array([0.8, 0.8, -0.5, -0.3], dtype=np.float32)
PLACES = np.flatnonzero(MASK)
MISMATCHES = (
    "none", "truncated_is", "masked_is", "sequence_is", "sequence_mask", "geometric_is",
    "geometric_mask",
)  # fmt: skip
COMBINATIONS = [
    *itertools.product(("ppo", "decoupled"), MISMATCHES, ("token", "turn", "trajectory")),
    *itertools.product(("reinforce", "cispo", "gspo"), MISMATCHES, ("token",)),
    ("aipo", "none", "token"),
]


def _logprobs() -> tuple[Tensor, Tensor, Tensor]:
    """Current, proximal and behavior logprobs [M] of the chosen tokens, well apart."""
    random = torch.Generator().manual_seed(5)
    mu = -2 * torch.rand(len(PLACES), generator=random, dtype=torch.float64) - 0.1
    prox = mu + 0.4 * torch.randn(len(PLACES), generator=random, dtype=torch.float64)
    lp = prox + 0.2 * torch.randn(len(PLACES), generator=random, dtype=torch.float64)
    return lp, prox, mu


def _units(settings: LossSettings, chosen: np.ndarray | None = None) -> MinibatchUnits:
    return minibatch_units(
        settings,
        action_mask=MASK,
        turn_ids=TURNS,
        sequence_of_place=SEQUENCE,
        rollout_ids=OWNERS,
        advantages=np.repeat(ADVANTAGES, LENGTHS),
        chosen=np.arange(4) if chosen is None else chosen,
        minibatch_size=4,
    )


def _loss(settings: LossSettings, lp: Tensor, prox: Tensor, mu: Tensor) -> Tensor:
    logprobs = TokenLogprobs(current=lp, proximal=prox, behavior=mu)
    return weighted_loss(settings, _units(settings), PLACES, logprobs, Tally())[0]


def _unit_name(loss: str, level: str, place: int) -> tuple[int, ...]:
    rollout = int(OWNERS[SEQUENCE[place]])
    if loss == "gspo" or level == "trajectory":
        return (rollout,)
    turn = (rollout, int(TURNS[place]))
    return turn if level == "turn" else (*turn, place)


def _weight(mismatch: str, unit: float, rollout: list[float]) -> float:
    """The mismatch weight by its definition, from log-ratios of the unit and of all tokens of its
    rollout."""
    if mismatch == "none":
        return 1.0
    log_ratio = unit
    if mismatch.startswith("sequence"):
        log_ratio = sum(rollout)
    elif mismatch.startswith("geometric"):
        log_ratio = sum(rollout) / len(rollout)
    weight = math.exp(log_ratio)
    if mismatch.endswith("_is") and mismatch != "masked_is":
        return min(weight, 2.0)
    return weight if 0.5 <= weight <= 2.0 else 0.0


def _slow(loss: str, mismatch: str, level: str, lp: list, prox: list, mu: list) -> float:  # type: ignore[type-arg]
    """The same with numbers, loops and dictionaries."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, place in enumerate(PLACES):
        members.setdefault(_unit_name(loss, level, int(place)), []).append(i)
    of_rollout = {r: sum(1 for name in members if name[0] == r) for r in range(3)}
    total = 0.0
    for name, own in members.items():
        scale = len(own) if loss == "gspo" else 1
        c, p, b = (sum(v[i] for i in own) / scale for v in (lp, prox, mu))
        advantage = float(ADVANTAGES[[0, 2, 3][name[0]]])
        ratio, low, high = math.exp(c - p), 1 / 1.1, 1.1
        clipped = min(ratio * advantage, (high if advantage >= 0 else low) * advantage)
        if loss in ("ppo", "decoupled") and advantage < 0:
            clipped = max(clipped, 3.0 * advantage)
        objective = {
            "ppo": clipped,
            "decoupled": clipped * (math.exp(p - b) if mismatch == "none" else 1.0),
            "gspo": clipped,
            "cispo": min(max(ratio, low), high) * advantage * c,
            "aipo": min(math.exp(c - b), 4.0) * advantage,
            "reinforce": advantage * c,
        }[loss]
        rollout = [prox[i] - mu[i] for i, q in enumerate(PLACES) if OWNERS[SEQUENCE[q]] == name[0]]
        weight = 1.0 if loss == "aipo" else _weight(mismatch, p - b, rollout)
        total -= objective * weight / (of_rollout[name[0]] * 4)
    return total


@pytest.mark.parametrize(("loss", "mismatch", "level"), COMBINATIONS)
def test_every_composition_is_its_formula(loss: str, mismatch: str, level: str) -> None:
    settings = LossSettings(loss=loss, mismatch=mismatch, level=level)  # type: ignore[arg-type]
    lp, prox, mu = _logprobs()
    lists = (lp.tolist(), prox.tolist(), mu.tolist())
    lp.requires_grad_()
    value = _loss(settings, lp, prox, mu)
    assert float(value.detach()) == pytest.approx(_slow(loss, mismatch, level, *lists), abs=1e-7)
    value.backward()
    assert lp.grad is not None
    if loss in ("cispo", "aipo"):  # their weight is a constant: not the derivative of the value
        return
    for i in range(len(PLACES)):
        up, down = ([*lists[0][:i], lists[0][i] + d, *lists[0][i + 1 :]] for d in (1e-6, -1e-6))
        slope = _slow(loss, mismatch, level, up, *lists[1:])
        slope -= _slow(loss, mismatch, level, down, *lists[1:])
        assert float(lp.grad[i]) == pytest.approx(slope / 2e-6, abs=1e-6)


@pytest.mark.parametrize("mismatch", MISMATCHES[1:])
def test_masked_or_capped_weights_are_counted(mismatch: str) -> None:
    settings = LossSettings(mismatch=mismatch, loss="reinforce")  # type: ignore[arg-type]
    lp, prox, mu = _logprobs()
    prox = mu + 0.9  # every ratio, product and mean is above the cap
    tally = Tally()
    logprobs = TokenLogprobs(current=lp.requires_grad_(), proximal=prox, behavior=mu)
    loss, _ = weighted_loss(settings, _units(settings), PLACES, logprobs, tally)
    loss.backward()
    assert tally.capped_units == len(PLACES) and lp.grad is not None
    masks = mismatch in ("masked_is", "sequence_mask", "geometric_mask")
    assert bool((lp.grad == 0).all()) is masks


def test_parts_of_a_minibatch_add_up_to_the_whole() -> None:
    lp, prox, mu = _logprobs()
    for loss, mismatch, level in COMBINATIONS:
        settings = LossSettings(loss=loss, mismatch=mismatch, level=level)  # type: ignore[arg-type]
        units, whole = _units(settings), float(_loss(settings, lp, prox, mu))
        total = 0.0
        for part in ((0, 1), (2,), (3,)):  # whole rollouts stay together
            at = np.isin(SEQUENCE[PLACES], part)
            logprobs = TokenLogprobs(current=lp[at], proximal=prox[at], behavior=mu[at])
            total += float(weighted_loss(settings, units, PLACES[at], logprobs, Tally())[0])
        assert total == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("name", "at"), [("k1", 0.2), ("k2", 0.02), ("k3", math.exp(-0.2) - 0.8)])
def test_a_kl_penalty_in_the_loss_has_the_weights_of_the_loss(name: str, at: float) -> None:
    settings = LossSettings(kl=name, kl_coef=0.5, level="turn")  # type: ignore[arg-type]
    lp, prox, mu = _logprobs()
    plain = _loss(LossSettings(level="turn"), lp, prox, mu)
    tally = Tally()
    logprobs = TokenLogprobs(current=lp, proximal=prox, behavior=mu, reference=lp - 0.2)
    found, _ = weighted_loss(settings, _units(settings), PLACES, logprobs, tally)
    assert float(found - plain) == pytest.approx(0.5 * at * 3 / 4)  # 3 of 4 rollouts, weight 1 each
    assert tally.means()["train/kl_reference_mean"] == pytest.approx(at)
    in_reward = LossSettings(kl=name, kl_coef=0.5, kl_in="reward", level="turn")  # type: ignore[arg-type]
    same, _ = weighted_loss(in_reward, _units(in_reward), PLACES, logprobs, Tally())
    assert float(same) == float(plain)


def test_the_loglinear_proximal_lies_where_its_version_does() -> None:
    """Behavior at version b, current at v + 1, proximal at v: (v − b)/(v + 1 − b) of the way."""
    mu, lp = torch.tensor([-1.0, -1.0, -1.0, -3.0]).double(), torch.tensor([-2.0] * 4).double()
    lag = torch.tensor([0.0, 1.0, 3.0, 1.0]).double()
    found = losses.loglinear_proximal(lp.requires_grad_(), mu, lag)
    assert found.tolist() == pytest.approx([-1.0, -1.5, -1.75, -2.5]) and not found.requires_grad


def test_the_effective_sample_share() -> None:
    assert losses.effective_sample_share(4.0, 4.0, 4) == 1.0
    weights = np.array([1.0, 0.0, 0.0, 3.0])
    share = losses.effective_sample_share(weights.sum(), (weights**2).sum(), 4)
    assert share == pytest.approx(16 / 40)
    tally = Tally()
    tally.add_mismatch(torch.tensor([0.0, math.log(3.0)]), torch.zeros(2))
    assert tally.means()["train/mismatch_ess_frac"] == pytest.approx(16 / 20)


def test_value_clipping_takes_the_worse_of_two_errors() -> None:
    value = torch.tensor([0.9, 0.9, 0.1], requires_grad=True)
    before, target = torch.tensor([0.5, 0.8, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    found = losses.value_loss(value, before, target, clip=0.2)
    torch.testing.assert_close(found, 0.5 * torch.tensor([0.3, 0.1, 0.9]) ** 2)
    found.sum().backward()
    assert value.grad is not None and value.grad.tolist()[0] == 0  # it has gone its 0.2


def test_dr_grpo_is_group_mean_with_a_constant_length() -> None:
    """The sum over tokens of a rollout of 4 of them counts four times that of a rollout of 1."""
    owners = np.array([0, 0, 0, 0, 1])
    weights = unit_weights("fixed_length", owners, minibatch_size=2, fixed_length_tokens=8)
    assert weights.tolist() == [1 / 16] * 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "grpo"},
        {"mismatch": "sequence"},
        {"kl": "k4"},
        {"kl_in": "advantage"},
        {"loss": "aipo", "level": "turn"},
        {"dual_clip": 0.5},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ObjectiveError, match=next(iter(wrong))):
        LossSettings(**wrong)  # type: ignore[arg-type]
