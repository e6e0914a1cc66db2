"""The loop against arithmetic written down a second time, and against its own ledger."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwright.actors.tensor_files import TensorFolder
from loopwright.algorithms.records import Rollout, decode
from loopwright.orchestrator.cli import DONE
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.ledger import FILE, LedgerState, read
from loopwright.orchestrator.parts import checkpoints
from loopwright.orchestrator.replay import replay
from tests.tiny_run import train

SEED, STEPS, MINIBATCHES, CLIP, DUAL, LR = 3, 3, 2, 0.1, 3.0, 1e-3


def _logprobs(model: torch.nn.Module, rollout: Rollout) -> torch.Tensor:
    """Logprobs [A] of the rollout's action tokens: one sequence, whole logits, no packing."""
    (context,) = rollout.contexts
    ids = torch.from_numpy(context.token_ids.astype(np.int64))
    lp = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)
    chosen = lp.gather(1, ids[1:, None])[:, 0]
    return chosen[torch.from_numpy(context.action_mask[1:].copy())]


def _rollouts(state: LedgerState, step: int) -> tuple[list[Rollout], list[float]]:
    """The step's rollouts as recorded; each one's reward less the mean of its group's others."""
    rollouts: list[Rollout] = []
    advantages: list[float] = []
    for ticket, pairs in groupby(state.trained[step], key=lambda pair: pair[0]):
        group = [decode(state.rollouts[ticket][attempt]) for _, attempt in pairs]
        rewards = [r.reward for r in group]
        others = len(rewards) - 1
        advantages += [r - (sum(rewards) - r) / others for r in rewards]
        rollouts += group
    return rollouts, advantages


def _minibatch_loss(lp: torch.Tensor, proximal: torch.Tensor, advantage: float) -> torch.Tensor:
    """Mean over a rollout's tokens of the clipped objective, negated."""
    ratio = torch.exp(lp - proximal)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 / (1 + CLIP), 1 + CLIP) * advantage)
    if advantage < 0:
        objective = objective.clamp(min=DUAL * advantage)
    return -objective.mean()


def _reference(first: str, state: LedgerState) -> tuple[dict[str, torch.Tensor], int, float]:
    """Weights after all steps, rollouts trained on, and the largest gap to a recorded logprob."""
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    trained, gap = 0, 0.0
    for step in range(1, STEPS + 1):
        rollouts, advantages = _rollouts(state, step)
        with torch.no_grad():
            proximal = [_logprobs(model, r) for r in rollouts]
        for rollout, lp in zip(rollouts, proximal, strict=True):
            (context,) = rollout.contexts
            recorded = context.behavior_logprobs[context.action_mask]
            gap = max(gap, float(np.abs(recorded - lp.numpy()).max()))
        kept = np.array([i for i, a in enumerate(advantages) if abs(a) >= 0.01])
        trained += len(kept)
        order = np.random.default_rng((SEED, step, 0)).permutation(kept)
        for part in np.array_split(order, MINIBATCHES):
            if not part.size:
                continue
            optimizer.zero_grad()
            for i in part:
                loss = _minibatch_loss(_logprobs(model, rollouts[i]), proximal[i], advantages[i])
                (loss / (len(rollouts) / MINIBATCHES)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return dict(model.named_parameters()), trained, gap


def test_the_synchronous_loop_is_plain_ppo(tmp_path: Path, policy: str) -> None:
    """`max_lag = 0`: weights equal a reference that reads only which tokens were sampled.

    Not bit for bit: the reference runs one sequence at a time over all positions, so sums come in
    another order. Training moved weights by up to 6e-3; they are held to 1e-6."""
    code, folder = train(
        tmp_path,
        policy,
        f"run.seed={SEED}",
        f"run.steps={STEPS}",
        f"trainer.lr={LR}",
        f"trainer.minibatches={MINIBATCHES}",
        "rollout.max_lag=0",
        'algorithm.mismatch="none"',
        "rollout.groups_per_step=3",
    )
    assert code == DONE
    expected, trained, gap = _reference(policy, read(folder / "ledger" / FILE))
    assert trained >= 2 * STEPS, "hardly any rollout had an advantage: the test would show little"
    assert gap < 1e-4
    found, before = (TensorFolder(f, "model") for f in (checkpoints(folder)[-1][1], Path(policy)))
    for name in found.names:
        reference = expected[name].detach()
        torch.testing.assert_close(
            found.read(name), reference, rtol=1e-5, atol=1e-6, msg=f"{name} differs"
        )
    assert max(float((found.read(n) - before.read(n)).abs().max()) for n in found.names) > 1e-3


def test_an_asynchronous_run_replays_bit_for_bit(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy, "run.steps=5", "rollout.max_lag=2")
    assert code == DONE
    state = read(folder / "ledger" / FILE)
    lags = [
        step - 1 - decode(state.rollouts[ticket][attempt]).oldest_version
        for step, pairs in state.trained.items()
        for ticket, attempt in pairs
    ]
    assert 0 < max(lags) <= 2, "nothing was sampled ahead: the run was synchronous"
    steps = list(replay(folder))
    assert [s.step for s in steps] == [1, 2, 3, 4, 5]
    assert len({s.recorded for s in steps}) > 1
    assert [s.now for s in steps] == [s.recorded for s in steps]


def test_a_replay_under_other_settings_is_told_apart(tmp_path: Path, policy: str) -> None:
    _, folder = train(tmp_path, policy, "run.steps=2")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("\nlr = 0.001 ", "\nlr = 0.002 "))
    assert not all(step.equal for step in replay(folder))


def test_a_replay_of_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.toml"):
        list(replay(tmp_path))
