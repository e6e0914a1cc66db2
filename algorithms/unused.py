"""What was sampled for a step and not trained on: counted, so that nobody mistakes what the reliefs
for stragglers leave out for something that never was.

Cancelling censors long episodes; the lengths say by how much.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """One episode that was taken back while it was played. It is never scored."""

    ticket: int
    attempt: int
    turns: int  # whole ones
    tokens: int  # chosen by the policy until then
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """Of one step's tickets: what its batch does not hold, and what was kept from being lost."""

    cancelled: tuple[Cancelled, ...] = ()
    discarded_groups: int = 0  # whole, but all rewards equal: replaced by another task's
    discarded_rollouts: int = 0
    discarded_tokens: int = 0  # chosen by the policy in those
    draws_spent: int = 0  # groups whose replacements had no variance either: kept as they are
    resumed_rollouts: int = 0  # trained ones that outlived an engine
    saved_tokens: int = 0  # theirs, sampled before it died: not sampled again

    @property
    def cancelled_tokens(self) -> int:
        """Tokens chosen by the policy in cancelled episodes."""
        return sum(c.tokens for c in self.cancelled)

    @property
    def cancelled_tokens_mean(self) -> float:
        """How long a cancelled episode was, on average; beside the trained ones' mean it shows the
        censoring."""
        return self.cancelled_tokens / len(self.cancelled) if self.cancelled else 0.0

    @property
    def cancelled_turns_mean(self) -> float:
        """Whole turns of a cancelled episode, on average."""
        turns = sum(c.turns for c in self.cancelled)
        return turns / len(self.cancelled) if self.cancelled else 0.0
