"""An allocation that failed, told by what it was for and which setting makes that smaller."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loopwright.actors.trainer_backend import BackendError, TrainerSettings

_ASKED = re.compile(r"(?i)tried to allocate ([\d.]+ ?[a-z]*)")


class OutOfMemory(BackendError):
    """Something does not fit; the text names the class and the setting."""


def is_out_of_memory(error: BaseException) -> bool:
    """Is it an allocator's refusal, of the host's or of a device's?"""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def explain(
    kind: str, error: BaseException, settings: TrainerSettings, longest: int, doing: str
) -> OutOfMemory:
    """The error to raise for one that `is_out_of_memory`. `doing` says when it happened."""
    asked = _ASKED.search(str(error))
    wanted = f" ({asked[1].strip()} were asked for at once)" if asked else ""
    return OutOfMemory(
        f"out of memory {doing}: {kind} do not fit{wanted}. {remedy(kind, settings, longest)}; "
        "`loopwright plan` shows what each setting saves"
    )


@contextmanager
def named(kind: str, settings: TrainerSettings, doing: str) -> Iterator[None]:
    """Within it, running out of memory is an `OutOfMemory` about class `kind`."""
    try:
        yield
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain(kind, error, settings, 0, doing) from error


def remedy(kind: str, settings: TrainerSettings, longest: int) -> str:
    """Which setting makes class `kind` smaller. `longest` is the number of tokens of the longest
    context, 0 if it is not known."""
    if kind == "logits":
        return f"Lower trainer.logprob_chunk (now {settings.logprob_chunk})"
    if kind == "optimizer":
        return (
            f"Choose a trainer.optimizer with less state than {settings.optimizer!r} "
            '("sgd" has none, "galore" projects it, state = "int8" in trainer.optimizer_options '
            "rounds it), or train adapters: model.lora_rank"
        )
    if kind != "activations":
        return "Train adapters (model.lora_rank), or spread the model: trainer.backend"
    ways = []
    if settings.gradient_checkpointing == "off":
        ways.append('set trainer.gradient_checkpointing = "on"')
    elif settings.gradient_checkpointing == "on" and settings.device != "cpu":
        ways.append('set trainer.gradient_checkpointing = "offload"')
    if settings.token_budget >= 2 * longest:
        ways.append(f"lower trainer.token_budget (now {settings.token_budget})")
    else:
        ways.append(f"lower environment.max_context (now {longest}) and trainer.token_budget")
    text = " or ".join(ways)
    return text[0].upper() + text[1:]
