"""What one training step has done so far, and the metrics that come of it."""

from dataclasses import dataclass, field, replace

import numpy as np

from loopwright.actors.ranks import Ranks
from loopwright.actors.tally import Tally
from loopwright.algorithms.records import TrainBatch


@dataclass(slots=True, kw_only=True)
class StepProgress:
    """What a step has done so far."""

    tally: Tally = field(default_factory=Tally)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("proximal", "forward", "backward"), 0.0)
    )
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    stopped_early: bool = False
    critic: dict[str, float] = field(default_factory=dict)  # metrics of the value head

    def summed(self, ranks: Ranks) -> "StepProgress":
        """Over all ranks; norms, log-ratios and counts of minibatches are of all ranks already, and
        seconds stay this rank's."""
        return replace(self, tally=self.tally.summed(ranks))

    def metrics(
        self, batch: TrainBatch, *, epochs: int, rate: float, seconds: float
    ) -> dict[str, float]:
        """The step's metrics by name, `group/name`."""
        tally = self.tally
        minibatches = max(len(tally.log_ratio_by_minibatch), 1)
        trained = len(batch.token_ids) * epochs
        return {
            "train/loss": tally.loss / minibatches,
            "train/grad_norm_mean": float(np.mean(self.grad_norms)) if self.grad_norms else 0.0,
            "train/grad_norm_max": max(self.grad_norms, default=0.0),
            **tally.means(),
            **self.critic,
            "train/lr": rate,
            "train/optimizer_steps": float(len(self.grad_norms)),
            "train/skipped_minibatches": float(self.skipped),
            "train/stopped_early": float(self.stopped_early),
            "train/tokens": float(len(batch.token_ids)),
            "train/action_tokens": float(batch.action_mask.sum()),
            "train/sequences": float(len(batch.lengths)),
            "train/tokens_per_s": trained / seconds if seconds > 0 else 0.0,
            "time/train_step_s": seconds,
            **{f"time/train_{name}_s": value for name, value in self.seconds.items()},
        }
