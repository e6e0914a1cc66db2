"""The critic: a value head on the policy's last hidden states, and the advantages that come of it.

The head reads the states in front of the units (tokens, turns or whole rollouts), detached: it
learns at a rate of its own and never disturbs the policy, costs one forward pass a step, and is the
same on every rank, whichever way the policy is sharded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.actors.ranks import Ranks
from loopwright.algorithms.gae import explained_variance
from loopwright.algorithms.losses import value_loss

VALUE_CLIP = 0.2  # how far a value may move in one step (PPO's code)


class Critic:
    """Two layers over hidden states of width H, and their optimizer."""

    def __init__(self, width: int, *, lr: float, seed: int, device: str) -> None:
        """A head that says 0 everywhere, until it has learned; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head.to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr, weight_decay=0.0)

    def values(self, states: Tensor) -> Tensor:
        """Values [U] float32 of hidden states [U, H]; differentiable in the head alone."""
        found: Tensor = self.head(states.detach().float())[:, 0]
        return found

    def fit(self, share: "Share", minibatches: Sequence[np.ndarray], ranks: Ranks) -> float:
        """One optimizer step for each of `minibatches`, which are indices [u] into all units; the
        mean loss. Every rank has a share of the units, and all take the same steps.
        """
        local = np.full(share.total, -1, dtype=np.int64)
        local[share.units] = np.arange(len(share.units))
        losses = []
        for chosen in minibatches:
            own = local[chosen]
            picked = torch.from_numpy(own[own >= 0]).to(share.states.device)
            loss = value_loss(
                self.values(share.states[picked]),
                share.before[picked],
                share.targets[picked],
                clip=VALUE_CLIP,
            ).sum() / max(len(chosen), 1)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._sum_gradients(ranks)
            self.optimizer.step()
            losses.append(float(ranks.sum(np.array([float(loss.detach())]))[0]))
        return float(np.mean(losses)) if losses else 0.0

    def parameters(self) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return dict(self.head.named_parameters())

    def _sum_gradients(self, ranks: Ranks) -> None:
        if ranks.size == 1:
            return
        for parameter in self.head.parameters():
            assert parameter.grad is not None  # the sum of no losses has a gradient of zeros
            summed = ranks.sum(parameter.grad.cpu().numpy())
            parameter.grad.copy_(torch.from_numpy(summed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The units whose states one rank has computed."""

    total: int  # units of all ranks
    units: np.ndarray  # [u] indices of this rank's
    states: Tensor  # [u, H]
    before: Tensor  # [u] values before the update
    targets: Tensor  # [u] returns


class CriticSettings(Protocol):
    """What `build_critic` reads of `TrainerSettings`."""

    @property
    def critic(self) -> bool:
        """Whether there is one."""
        ...

    @property
    def value_lr(self) -> float:
        """Its learning rate."""
        ...

    @property
    def seed(self) -> int:
        """Of its first weights."""
        ...

    @property
    def device(self) -> str:
        """Where it is."""
        ...


def build_critic(settings: CriticSettings, width: int) -> Critic | None:
    """The critic that `settings` ask for, over hidden states of this width."""
    if not settings.critic:
        return None
    return Critic(width, lr=settings.value_lr, seed=settings.seed, device=settings.device)


def value_metrics(values: np.ndarray, returns: np.ndarray, loss: float) -> dict[str, float]:
    """What there is to say of a critic, before it was trained on this batch, by name."""
    return {
        "value/explained_variance": explained_variance(values, returns),
        "value/loss": loss,
        "value/mean": float(values.mean()) if len(values) else 0.0,
        "value/return_mean": float(returns.mean()) if len(returns) else 0.0,
    }
