"""One step of the loop on one rank: the optimizer steps of one training batch, for every backend.

A step is `epochs` passes over the batch, each cut at random into `minibatches`, each of those dealt
to the ranks by cost, each share cut into micro-batches by token budget. The gradient of a minibatch
does not depend on how it is cut (weights per unit are fixed before, ranks add up), and everything
random is seeded by (seed, step, epoch), so a step can be repeated bit for bit.

Every rank has the whole batch and computes the same plan, so nothing is exchanged to agree on it.
Ranks may have different numbers of micro-batches; those with fewer add empty ones, because sharded
weights are gathered by all ranks together.
"""

import math
import time

import numpy as np
import torch

from loopwright.actors.objective import (
    MinibatchUnits,
    TokenLogprobs,
    minibatch_units,
    weighted_loss,
)
from loopwright.actors.packed_forward import MicroBatch, Sequences, empty_micro_batch, micro_batches
from loopwright.actors.step_progress import StepProgress
from loopwright.actors.tally import Tally
from loopwright.actors.token_advantages import critic_advantages, group_advantages, kl_penalty
from loopwright.actors.trainer_backend import BackendError, TrainerBackend, learning_rate
from loopwright.algorithms.losses import loglinear_proximal
from loopwright.algorithms.packing import balance_ranks, sequence_cost
from loopwright.algorithms.records import TrainBatch

NON_FINITE_LIMIT = 20  # minibatches skipped before training fails (LOOP's code)
LOG_RATIO_LIMIT = (
    20.0  # |mean over rollouts of the summed log-ratio| that ends a step's passes (LOOP's code)
)


class TokenRecord:
    """What a step did to each token of its batch, kept where somebody asks: [N] each, 0 where there
    is no action token."""

    def __init__(self, tokens: int) -> None:
        self.proximal = np.zeros(tokens, dtype=np.float32)  # logprobs
        self.advantages = np.zeros(tokens, dtype=np.float32)
        # d loss / d logprob when its minibatch was first trained on: the loss weight
        self.gradient = np.zeros(tokens, dtype=np.float32)
        self.minibatch = np.full(tokens, -1, dtype=np.int32)  # of the first pass


def take_step(
    backend: TrainerBackend, batch: TrainBatch, record: TokenRecord | None = None
) -> dict[str, float]:
    """All epochs and minibatches over `batch`. Returns the metrics, the same on every rank; fills
    `record`, where there is one, with this rank's tokens.

    Raises `BackendError` once more than 20 minibatches of the run had a loss or gradient that is
    not finite.
    """
    started = time.perf_counter()
    step = _Step(backend, batch, record)
    step.run()
    backend.step = batch.step
    return step.progress.summed(backend.ranks).metrics(
        batch,
        epochs=backend.settings.epochs,
        rate=step.rate,
        seconds=time.perf_counter() - started,
    )


def sequence_logprobs(
    backend: TrainerBackend,
    sequences: Sequences,
    chosen: np.ndarray | None = None,
    *,
    temperature: float | None = None,
) -> np.ndarray:
    """As `TrainerBackend.logprobs`, which every backend does in this way."""
    which = np.arange(len(sequences.lengths)) if chosen is None else chosen
    share = _share(backend, sequences, which)
    return backend.ranks.sum(_logprobs(backend, sequences, share, temperature))


def _share(
    backend: TrainerBackend,
    sequences: Sequences,
    chosen: np.ndarray,
    together: np.ndarray | None = None,
) -> np.ndarray:
    """Which of the `chosen` sequences this rank computes; every rank knows the share of each.

    Those of one number in `together` [S] stay on one rank. A sequence of s tokens costs, for each
    layer of width h and feed-forward width i, about h·s² for attention and (4h² + 3hi)·s for the
    matrices.
    """
    ranks = backend.ranks
    if ranks.size == 1 or not len(chosen):
        return chosen
    config = backend.model.config.to_dict()
    width = float(config["hidden_size"])
    inner = float(config.get("intermediate_size") or 4 * width)
    costs = sequence_cost(
        sequences.lengths[chosen], quadratic=width, linear=4 * width**2 + 3 * width * inner
    )
    keys = chosen if together is None else together[chosen]
    _, atoms = np.unique(keys, return_inverse=True)
    mine = balance_ranks(np.bincount(atoms, weights=costs), ranks.size)[ranks.rank]
    return chosen[np.isin(atoms, mine)]


def _logprobs(
    backend: TrainerBackend, sequences: Sequences, share: np.ndarray, temperature: float | None
) -> np.ndarray:
    """Logprobs of this rank's share: [N] float32, 0 elsewhere."""
    settings = backend.settings
    found = np.zeros(len(sequences.token_ids), dtype=np.float32)
    with torch.no_grad():
        for micro in _as_many_as_others(
            backend,
            micro_batches(
                sequences,
                share,
                token_budget=settings.token_budget,
                pack=settings.pack,
                device=settings.device,
            ),
        ):
            values = backend.forward(
                micro, temperature=settings.temperature if temperature is None else temperature
            )
            found[micro.tokens] = values.cpu().numpy()
    return found


def _as_many_as_others(backend: TrainerBackend, own: list[MicroBatch]) -> list[MicroBatch]:
    """This rank's micro-batches, and empty ones until it has as many as any rank."""
    most = int(backend.ranks.max(np.array([len(own)]))[0])
    return own + [empty_micro_batch(backend.settings.device)] * (most - len(own))


class _Step:
    """What one step needs on one rank."""

    def __init__(
        self, backend: TrainerBackend, batch: TrainBatch, record: TokenRecord | None
    ) -> None:
        self.backend = backend
        self.record = record
        self.batch = batch
        self.settings = backend.settings
        self.rate = learning_rate(backend.settings, batch.step)
        self.sequences = Sequences.of(batch.token_ids, batch.action_mask, batch.lengths)
        self.progress = StepProgress()
        self.proximal = batch.behavior_logprobs  # [N]
        self.reference: np.ndarray | None = None  # [N], where there is a KL penalty
        self.advantages = np.zeros(0, dtype=np.float32)  # [N], once they are found
        # [N] versions between each token and the policy that this step starts from
        self.lags = np.maximum(batch.step - 1 - batch.policy_versions, 0).astype(np.float32)

    def run(self) -> None:
        """Pass after pass, minibatch after minibatch."""
        passes = [self._minibatches(epoch) for epoch in range(self.settings.epochs)]
        if self.settings.loss.kl != "none":
            with self.backend.reference():
                self.reference = self.backend.logprobs(self.sequences)
        self._find_advantages([chosen for minibatches in passes for chosen in minibatches])
        if self.settings.proximal == "recomputed":
            self._find_proximal(passes[0][1:])
        for minibatches in passes:
            for chosen in minibatches:
                self._optimizer_step(chosen)
                # From the same weights every later minibatch would see the same ratios: the step
                # ends here.
                if self.progress.stopped_early:
                    return

    def _minibatches(self, epoch: int) -> list[np.ndarray]:
        """Sequence indices of each minibatch; the instances of a rollout stay together."""
        batch = self.batch
        rollouts = np.unique(batch.rollout_ids)
        random = np.random.default_rng((self.settings.seed, batch.step, epoch))
        parts = np.array_split(random.permutation(rollouts), self.settings.minibatches)
        return [np.flatnonzero(np.isin(batch.rollout_ids, part)) for part in parts if part.size]

    def _find_advantages(self, minibatches: list[np.ndarray]) -> None:
        """Of every token, before anything is updated."""
        backend, settings, batch = self.backend, self.settings, self.batch
        penalty = None
        if self.reference is not None and settings.loss.kl_in == "reward":
            penalty = kl_penalty(settings.loss, backend.logprobs(self.sequences), self.reference)
        if backend.critic is None:
            self.advantages = group_advantages(batch, settings.loss, penalty)
            return
        started = time.perf_counter()
        self.advantages, self.progress.critic = critic_advantages(
            batch,
            settings.loss,
            penalty,
            critic=backend.critic,
            gamma=settings.gamma,
            lam=settings.lam,
            states=self._states,
            minibatches=minibatches,
            ranks=backend.ranks,
        )
        self.progress.seconds["critic"] = time.perf_counter() - started

    def _states(self) -> list[tuple[MicroBatch, torch.Tensor]]:
        """This rank's share of the batch, with the hidden states in front of its tokens."""
        settings = self.settings
        share = _share(self.backend, self.sequences, np.arange(len(self.batch.lengths)))
        own = micro_batches(
            self.sequences,
            share,
            token_budget=settings.token_budget,
            pack=settings.pack,
            device=settings.device,
        )
        with torch.no_grad():
            return [
                (micro, self.backend.states(micro))
                for micro in _as_many_as_others(self.backend, own)
            ]

    def _find_proximal(self, later: list[np.ndarray]) -> None:
        """Proximal logprobs of the `later` minibatches; the first finds its own: nothing is updated
        before it."""
        started = time.perf_counter()
        batch = self.batch
        self.proximal = np.zeros(len(batch.token_ids), dtype=np.float32)
        if later:
            share = _share(self.backend, self.sequences, np.concatenate(later))
            values = _logprobs(self.backend, self.sequences, share, None)
            places = batch.action_mask & np.isin(
                np.repeat(np.arange(len(batch.lengths)), batch.lengths), share
            )
            self.progress.tally.add_mismatch(
                torch.from_numpy(values[places]), torch.from_numpy(batch.behavior_logprobs[places])
            )
            self.proximal = self.backend.ranks.sum(values)
        self.progress.seconds["proximal"] = time.perf_counter() - started

    def _optimizer_step(self, chosen: np.ndarray) -> None:
        batch, backend, progress = self.batch, self.backend, self.progress
        units = minibatch_units(
            self.settings.loss,
            action_mask=batch.action_mask,
            turn_ids=batch.turn_ids,
            sequence_of_place=np.repeat(np.arange(len(batch.lengths)), batch.lengths),
            rollout_ids=batch.rollout_ids,
            advantages=self.advantages,
            chosen=chosen,
            minibatch_size=batch.rollout_count / self.settings.minibatches,
        )
        log_ratio = self._accumulate_gradient(chosen, units) / max(units.rollouts, 1)
        progress.tally.log_ratio_by_minibatch.append(log_ratio)
        norm = math.nan
        if abs(log_ratio) > LOG_RATIO_LIMIT:
            progress.stopped_early = math.isfinite(log_ratio)
        elif math.isfinite(log_ratio) and backend.forward_only:
            norm = backend.descend(self.rate, lambda: self._loss(chosen, units))
        elif math.isfinite(log_ratio):
            norm = backend.update(self.rate, self.settings.grad_clip or math.inf)
        if math.isfinite(norm):
            progress.grad_norms.append(norm)
        elif not progress.stopped_early:
            self._skip(norm)
        backend.drop_gradient()

    def _accumulate_gradient(self, chosen: np.ndarray, units: MinibatchUnits) -> float:
        """Backward over all micro-batches; returns the sum of the log-ratios over all ranks.

        Where the optimizer asks for losses alone, there is no backward pass.
        """
        progress, forward_only = self.progress, self.backend.forward_only
        first = not progress.tally.log_ratio_by_minibatch  # before any update: current is proximal
        finds = first and self.settings.proximal == "recomputed"
        found = np.zeros(len(self.proximal), dtype=np.float32)
        total = 0.0
        for micro in self._micro_batches(chosen):
            started = time.perf_counter()
            with torch.set_grad_enabled(not forward_only):
                lp = self.backend.forward(micro, temperature=self.settings.temperature)
            logprobs = self._logprobs_of(micro, lp, finds)
            if first:
                progress.tally.add_mismatch(lp.detach(), logprobs.behavior)
            if finds:
                found[micro.tokens] = lp.detach().cpu().numpy()
            loss, log_ratio = weighted_loss(
                self.settings.loss, units, micro.tokens, logprobs, progress.tally
            )
            total += log_ratio
            middle = time.perf_counter()
            recorded = self._recorded(micro, lp, logprobs.proximal)
            if not forward_only:
                self.backend.backward(loss)
            if recorded is not None and lp.grad is not None:
                recorded.gradient[micro.tokens] = lp.grad.cpu().numpy()
            progress.seconds["forward"] += middle - started
            progress.seconds["backward"] += time.perf_counter() - middle
        if finds and (forward_only or self.settings.epochs > 1):
            self.proximal = self.proximal + self.backend.ranks.sum(found)
        return float(self.backend.ranks.sum(np.array([total]))[0])

    def _loss(self, chosen: np.ndarray, units: MinibatchUnits) -> float:
        """The loss of a minibatch over all ranks under the present weights."""
        total, unseen = 0.0, Tally()
        with torch.no_grad():
            for micro in self._micro_batches(chosen):
                lp = self.backend.forward(micro, temperature=self.settings.temperature)
                logprobs = self._logprobs_of(micro, lp, finds=False)
                loss, _ = weighted_loss(self.settings.loss, units, micro.tokens, logprobs, unseen)
                total += float(loss)
        return float(self.backend.ranks.sum(np.array([total]))[0])

    def _recorded(
        self, micro: MicroBatch, lp: torch.Tensor, proximal: torch.Tensor
    ) -> TokenRecord | None:
        """The record, if this micro-batch is to go into it: in the first pass."""
        record = self.record
        if record is None or (record.minibatch[micro.tokens] >= 0).any() or not len(micro.tokens):
            return None
        lp.retain_grad()
        record.proximal[micro.tokens] = proximal.cpu().numpy()
        record.advantages[micro.tokens] = self.advantages[micro.tokens]
        record.minibatch[micro.tokens] = len(self.progress.tally.log_ratio_by_minibatch)
        return record

    def _logprobs_of(self, micro: MicroBatch, lp: torch.Tensor, finds: bool) -> TokenLogprobs:
        """What the loss compares the current logprobs of a micro-batch to; `finds`: nothing was
        updated yet, so they are the proximal ones."""

        def at_tokens(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[micro.tokens]).to(lp.device)

        behavior = at_tokens(self.batch.behavior_logprobs)
        if finds:
            proximal = lp.detach()
        elif self.settings.proximal == "loglinear":
            proximal = loglinear_proximal(lp, behavior, at_tokens(self.lags))
        else:
            proximal = at_tokens(self.proximal)
        reference = None if self.reference is None else at_tokens(self.reference)
        return TokenLogprobs(current=lp, proximal=proximal, behavior=behavior, reference=reference)

    def _micro_batches(self, chosen: np.ndarray) -> list[MicroBatch]:
        settings, rollout_ids = self.settings, self.batch.rollout_ids
        whole_rollouts = settings.loss.needs_whole_rollouts
        together = rollout_ids if whole_rollouts else None
        share = _share(self.backend, self.sequences, chosen, together)
        parts = [share]
        if whole_rollouts and len(share):
            several = np.bincount(rollout_ids[share])[rollout_ids[share]] > 1
            whole = share[several]
            parts = [
                share[~several],
                *(whole[rollout_ids[whole] == r] for r in np.unique(rollout_ids[whole])),
            ]
        budgets = [settings.token_budget] + [1 << 62] * (len(parts) - 1)
        own = [
            micro
            for part, budget in zip(parts, budgets, strict=True)
            for micro in micro_batches(
                self.sequences,
                part,
                token_budget=budget,
                pack=settings.pack,
                device=settings.device,
            )
        ]
        return _as_many_as_others(self.backend, own)

    def _skip(self, norm: float) -> None:
        self.progress.skipped += 1
        self.backend.non_finite += 1
        if self.backend.non_finite > NON_FINITE_LIMIT:
            raise BackendError(
                f"step {self.batch.step}: {self.backend.non_finite} minibatches were not finite "
                f"(limit {NON_FINITE_LIMIT}), the last with gradient norm {norm}; lower "
                "trainer.lr, or look for a reward or logprob that is not finite"
            )
