"""Generalised advantage estimation over the units of rollouts: tokens, turns, or whole ones.

Only what the policy chose is a unit: the states of an episode are those in front of its units, and
an observation between two of them is part of how the environment leads from one to the next. So
nothing is discounted, or estimated, at tokens that nobody chose. Pure NumPy, float64.
"""

import numpy as np


def gae(
    values: np.ndarray,
    rewards: np.ndarray,
    rollout_ids: np.ndarray,
    *,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [U] of U units (Schulman et al. 2016, eq. 16).

    `values` [U] are those of the states in front of the units, `rewards` [U] what each of them
    brought, `rollout_ids` [U] whose it is. The units of one rollout stand in the order in which
    they were chosen, not necessarily next to each other. δ_t = r_t + γ·V_{t+1} − V_t with V = 0
    after the last unit (every episode is graded where it ends, so it is never bootstrapped);
    A_t = Σ (γλ)^i·δ_{t+i}; the return, which the value is trained on, is A_t + V_t.
    """
    values, rewards = (np.asarray(v, dtype=np.float64) for v in (values, rewards))
    advantages = np.zeros_like(values)
    coming: dict[int, tuple[float, float]] = {}  # rollout -> (advantage, value) of its next unit
    for unit in range(len(values) - 1, -1, -1):
        owner = int(rollout_ids[unit])
        next_advantage, next_value = coming.get(owner, (0.0, 0.0))
        delta = rewards[unit] + gamma * next_value - values[unit]
        advantages[unit] = delta + gamma * lam * next_advantage
        coming[owner] = float(advantages[unit]), float(values[unit])
    return advantages, advantages + values


def reward_to_go(rewards: np.ndarray, rollout_ids: np.ndarray) -> np.ndarray:
    """Sum of `rewards` [U] from each unit to the end of its rollout, itself included: [U]."""
    zeros = np.zeros(len(rewards))
    return gae(zeros, rewards, rollout_ids, gamma=1.0, lam=1.0)[0]


def whitened(values: np.ndarray) -> np.ndarray:
    """`values` [U] with mean 0 and standard deviation 1 (Huang et al. 2022, detail 7)."""
    if len(values) < 2:
        return values
    return (values - values.mean()) / (values.std(ddof=1) + 1e-8)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a critic that knows, 0 for one that says the
    mean, negative for one that does harm; 0 where the returns do not vary.
    """
    spread = float(np.var(returns)) if len(returns) else 0.0
    return 1.0 - float(np.var(returns - values)) / spread if spread > 0 else 0.0
