"""Oracle demonstrations: recorded as text by whoever holds the environment, turned into tokens
where the model is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loopwright.algorithms.records import Context
from loopwright.envs.actions import tool_name_span
from loopwright.envs.protocol import Env, EnvError, Message, Observation, Task

if TYPE_CHECKING:  # recording needs no tokenizer
    from loopwright.actors.chat import ChatFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode as its oracle plays it."""

    task_id: str
    opening: Observation
    turns: tuple[tuple[str, Observation], ...]  # (action, what the environment replied)
    reward: float
    success: bool


async def demonstrate(env: Env, task: Task) -> Demonstration:
    """Let the oracle play `task`. Raises `EnvError` if the environment has none for it."""
    opening = await env.reset(task)
    turns: list[tuple[str, Observation]] = []
    for action in env.oracle():
        step = await env.step(action)
        turns.append((action, step.observation))
        if step.terminated:
            break
    if not turns:
        raise EnvError(
            f"{task.environment} has no oracle for task {task.id}: nothing to clone from"
        )
    verdict = await env.evaluate()
    return Demonstration(
        task_id=task.id,
        opening=opening,
        turns=tuple(turns),
        reward=verdict.reward,
        success=verdict.success,
    )


def texts(demonstrations: Iterable[Demonstration]) -> Iterable[str]:
    """Every text in them: what a tokenizer is trained on."""
    for demonstration in demonstrations:
        yield from (m.content for m in demonstration.opening.messages)
        for action, reply in demonstration.turns:
            yield action
            yield from (m.content for m in reply.messages)


def tokenize(demonstration: Demonstration, chat: "ChatFormat") -> list[Context]:
    """The tokens an engine would have seen and produced, each action closed by the template's own
    end of turn; one context for each that the environment began."""
    opening = demonstration.opening
    contexts: list[Context] = []
    pieces: list[tuple[np.ndarray, int]] = [(chat.open(opening.messages, opening.tools), -1)]
    last = len(demonstration.turns) - 1
    for turn, (action, reply) in enumerate(demonstration.turns):
        action_ids = np.asarray(
            chat.tokenizer.encode(action, add_special_tokens=False), dtype=np.int32
        )
        follows = () if reply.fresh else reply.messages
        tail = chat.extend(follows or [Message(role="user", content="")], None)
        if not tail.size or int(tail[0]) not in chat.stop_token_ids:
            raise ValueError(
                "the chat template does not end a turn with a stop token: "
                "nothing to learn to stop at"
            )
        pieces.append((np.concatenate([action_ids, tail[:1]]), turn))
        if reply.fresh or turn == last:  # what follows the last action was seen by nobody
            contexts.append(_context(pieces))
            pieces = [(chat.open(reply.messages, reply.tools), -1)] if reply.fresh else []
        else:
            pieces.append((tail[1:], -1))
    return contexts


def key_tokens(
    demonstration: Demonstration, contexts: Sequence[Context], chat: "ChatFormat"
) -> list[np.ndarray]:
    """Of each of the demonstration's contexts, the tokens [T] bool that name the tool called."""
    masks = [np.zeros(len(c.token_ids), np.bool_) for c in contexts]
    for context, mask in zip(contexts, masks, strict=True):
        for turn in np.unique(context.turn_ids[context.action_mask]):
            action, _ = demonstration.turns[int(turn)]
            span = tool_name_span(action)
            if span is None:
                continue
            encoded = chat.tokenizer(action, add_special_tokens=False, return_offsets_mapping=True)
            places = np.flatnonzero(context.turn_ids == turn)
            for place, (start, end) in zip(places, encoded["offset_mapping"], strict=False):
                mask[place] = start < span[1] and end > span[0]
    return masks


def _context(pieces: Sequence[tuple[np.ndarray, int]]) -> Context:
    """One context of pieces (tokens, turn that chose them or -1)."""
    tokens = np.concatenate([ids for ids, _ in pieces]).astype(np.int32)
    turns = np.concatenate([np.full(ids.size, turn, np.int16) for ids, turn in pieces])
    mask = turns >= 0
    return Context(
        token_ids=tokens,
        action_mask=mask,
        behavior_logprobs=np.zeros(tokens.size, np.float32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        turn_ids=turns,
    )
