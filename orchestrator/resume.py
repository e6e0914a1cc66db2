"""What a resumed run may not change: keys that tie the rollouts on record to their steps."""

from loopwright.configs.rules import value_at
from loopwright.configs.schema import Config
from loopwright.orchestrator.faults import Refused

# The ledger names rollouts by ticket. These keys make a ticket's task, its step, or the lag that it
# was admitted under; with others, rollouts would be trained twice, or never, or too late.
_FIXED = (
    "run.seed",
    "model.path",
    "model.adapter",
    "model.lora_rank",
    "model.lora_targets",
    "environment.name",
    "environment.options",
    "environment.seed",
    "environment.mix",
    "environment.sampler",
    "environment.sampler_options",
    "rollout.groups_per_step",
    "rollout.max_lag",
    "rollout.window",
    "rollout.dynamic_sampling",
)


def refuse_changes(before: Config, now: Config) -> None:
    """Raise `Refused`, naming the keys, where `now` cannot go on with a run begun with `before`."""
    changed = [
        f"{key} = {value_at(now, key)!r}, the run has {value_at(before, key)!r}"
        for key in _FIXED
        if value_at(before, key) != value_at(now, key)
    ]
    if changed:
        raise Refused(
            f"--resume: {'; '.join(changed)}. What is on record was made with the run's values: "
            "go on with those, or start another run with --set run.name=..."
        )
