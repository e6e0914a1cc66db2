"""Workers, samplers and trainer mean the same by a token and by its logprob: checked before the
first episode, not assumed."""

import numpy as np

from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.pool import Pool
from loopwright.orchestrator.training import Training

LIMITS = {"float32": 1e-3, "bfloat16": 0.5}  # nats; bf16 rounds a logit of 10 by up to 0.03
_PROBE = np.arange(1, 33, dtype=np.int32)  # any tokens will do, and every vocabulary has these


class ParityError(RunError):
    """An engine's logprobs are not the trainer's: what it samples would be trained on wrongly."""


async def check_identity(training: Training, pool: Pool) -> None:
    """Raises `ParityError` naming who was started from another tokenizer or dtype than the trainer,
    and in what they differ."""
    ours = await training.identity()
    for name, theirs in (await pool.identities()).items():
        if found := theirs.differences(ours):
            raise ParityError(
                f"{name}: not the trainer's {', '.join(found)}: it was started from "
                f"{theirs.path}, the trainer from {ours.path}; tokens of the one mean other things "
                "to the other. Give both the same files, or begin a new run"
            )


async def check_parity(training: Training, pool: Pool, dtype: str) -> float:
    """Largest difference of a logprob between the trainer and any engine, on a fixed prompt.

    Raises `ParityError`, naming the engine, where it is above the limit of `dtype`.
    """
    ours = await training.probe(_PROBE)
    largest = 0.0
    for name, theirs in (await pool.probe(_PROBE)).items():
        difference = float(np.abs(theirs - ours).max())
        largest = max(largest, difference)
        if not difference <= LIMITS[dtype]:
            raise ParityError(
                f"{name}: logprobs differ from the trainer's by up to {difference:.3g}, at most "
                f"{LIMITS[dtype]:g} is expected in {dtype}: engine and trainer do not hold the "
                "same model; check model.path and model.dtype, or try another rollout.engine"
            )
    return largest
