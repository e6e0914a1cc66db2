"""Where the numbers of one step came from: task → tokens → versions → reward → advantage → weight
in the loss. Everything as plain values that JSON takes, and as text for a terminal.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from loopwright.actors.policy_step import TokenRecord
from loopwright.algorithms import records
from loopwright.algorithms.advantages import advantages
from loopwright.algorithms.records import Context, Rollout, TrainBatch

Decode = Callable[[Sequence[int]], str]
_PROMPT_SHOWN = 600  # characters


def describe(
    groups: Sequence[records.Group],
    batch: TrainBatch,
    record: TokenRecord,
    *,
    advantage: str,
) -> list[dict[str, Any]]:
    """Every group with its rollouts: what came back, which versions wrote it, and what the loss
    made of it. `loss_weight` is the sum of |d loss / d logprob| over the rollout's tokens when it
    was first trained on; 0 for rollouts that were dropped.
    """
    owner_of_token = np.repeat(batch.rollout_ids, batch.lengths)
    of_groups = advantages(advantage, [np.array([r.reward for r in g.rollouts]) for g in groups])
    found, index = [], 0
    for group, values in zip(groups, of_groups, strict=True):
        rollouts = []
        for rollout, value in zip(group.rollouts, values, strict=True):
            mine = (owner_of_token == index) & batch.action_mask
            rollouts.append(
                _rollout(rollout, float(value), batch.step - 1)
                | {
                    "trained": bool(mine.any()),
                    "loss_weight": float(np.abs(record.gradient[mine]).sum()),
                    "minibatch": int(record.minibatch[mine].max(initial=-1)),
                }
            )
            index += 1
        rewards = [r.reward for r in group.rollouts]
        found.append(
            {
                "ticket": group.ticket,
                "task": group.task_id,
                "reward_mean": float(np.mean(rewards)),
                "rollouts": rollouts,
            }
        )
    return found


def tokens_of(
    groups: Sequence[records.Group],
    batch: TrainBatch,
    record: TokenRecord,
    ticket: int,
    attempt: int,
    decode: Decode,
) -> dict[str, Any]:
    """One rollout token by token. Raises `KeyError` where the step has no such rollout."""
    rollouts = [(g.ticket, r) for g in groups for r in g.rollouts]
    index = next(
        (i for i, (t, r) in enumerate(rollouts) if (t, r.attempt) == (ticket, attempt)), None
    )
    if index is None:
        raise KeyError(f"{ticket}/{attempt}")
    rollout = rollouts[index][1]
    first = rollout.contexts[0]
    prompt = first.token_ids[: int(first.action_mask.argmax())]
    # contexts without an action are not in the batch, and dropped rollouts not at all
    contexts = [c for c in rollout.contexts if c.action_mask.any()]
    places = iter(np.flatnonzero(np.repeat(batch.rollout_ids, batch.lengths) == index).tolist())
    tokens = []
    for context in contexts:
        for at, chosen in enumerate(context.action_mask.tolist()):
            place = next(places, None)
            if chosen:
                token = _token(context, at, batch.step - 1, decode)
                tokens.append(token | _in_the_loss(token["behavior_logprob"], record, place))
    return {
        "ticket": ticket,
        "attempt": attempt,
        "prompt": decode(prompt.tolist()),
        "trained": any(t["loss_weight"] is not None for t in tokens),
        "tokens": tokens,
    }


def _rollout(rollout: Rollout, advantage: float, trained_at: int) -> dict[str, Any]:
    versions: Counter[int] = Counter()
    for context in rollout.contexts:
        versions.update(context.policy_versions[context.action_mask].tolist())
    return {
        "attempt": rollout.attempt,
        "reward": rollout.reward,
        "reward_parts": dict(rollout.reward_parts),
        "success": rollout.success,
        "end_reason": rollout.end_reason.value,
        "turns": rollout.turns,
        "tokens": rollout.generated_tokens,
        "tokens_by_version": {str(v): n for v, n in sorted(versions.items())},
        "lag": trained_at - rollout.oldest_version if versions else 0,
        "advantage": advantage,
    }


def _token(context: Context, at: int, trained_at: int, decode: Decode) -> dict[str, Any]:
    token, version = int(context.token_ids[at]), int(context.policy_versions[at])
    return {
        "turn": int(context.turn_ids[at]),
        "id": token,
        "text": decode([token]),
        "version": version,
        "lag": trained_at - version,
        "behavior_logprob": float(context.behavior_logprobs[at]),
    }


def _in_the_loss(behavior: float, record: TokenRecord, place: int | None) -> dict[str, Any]:
    """What the trainer made of a token; None for each where its rollout was dropped."""
    if place is None:
        return dict.fromkeys(("proximal_logprob", "mismatch_ratio", "advantage", "loss_weight"))
    proximal = float(record.proximal[place])
    return {
        "proximal_logprob": proximal,
        "mismatch_ratio": float(np.exp(proximal - behavior)),
        "advantage": float(record.advantages[place]),
        "loss_weight": float(record.gradient[place]),
    }


def render(report: dict[str, Any], *, width: int = 110) -> str:
    """The report as text."""
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(_page(report))
    return capture.get().rstrip()


def _page(report: dict[str, Any]) -> RenderableType:
    equal = "the same weights" if report["equal"] else "OTHER WEIGHTS"
    parts: list[RenderableType] = [
        Text(
            f"step {report['step']}, from policy version {report['step'] - 1} "
            f"({report['from']}): recorded {report['recorded']:08x}, now {report['now']:08x}: "
            f"{equal}"
        )
    ]
    for group in report["groups"]:
        table = Table(title=f"ticket {group['ticket']} · {group['task']}", title_justify="left")
        for name in (
            "attempt", "reward", "advantage", "turns", "tokens", "by version", "lag", "ended",
            "minibatch", "loss weight",
        ):  # fmt: skip
            table.add_column(name, justify="right")
        for r in group["rollouts"]:
            versions = " ".join(f"{v}:{n}" for v, n in r["tokens_by_version"].items())
            weight = f"{r['loss_weight']:.4f}" if r["trained"] else "dropped"
            table.add_row(
                str(r["attempt"]), f"{r['reward']:.3f}", f"{r['advantage']:+.3f}", str(r["turns"]),
                str(r["tokens"]), versions, str(r["lag"]), r["end_reason"],
                str(r["minibatch"]) if r["trained"] else "", weight,
            )  # fmt: skip
        parts += [Text(""), table]
    if "rollout" in report:
        parts += [Text(""), *_tokens(report["rollout"])]
    names = ("train/loss", "train/grad_norm_mean", "train/ratio_clipped_frac",
             "train/mismatch_capped_frac", "train/mismatch_ess_frac")  # fmt: skip
    shown = ", ".join(f"{n.partition('/')[2]} {report['metrics'][n]:.4g}" for n in names)
    return Group(*parts, Text(""), Text(shown))


def _tokens(rollout: dict[str, Any]) -> list[RenderableType]:
    dropped = "" if rollout["trained"] else " (dropped: its advantage is too small to teach)"
    table = Table(title=f"ticket {rollout['ticket']}, attempt {rollout['attempt']}{dropped}")
    for name in ("turn", "token", "version", "lag", "behavior", "proximal", "ratio", "advantage",
                 "d loss / d logprob"):  # fmt: skip
        table.add_column(name, justify="right")
    for t in rollout["tokens"]:
        of_trainer = [
            "" if t[name] is None else form.format(t[name])
            for name, form in (
                ("proximal_logprob", "{:.4f}"),
                ("mismatch_ratio", "{:.4f}"),
                ("advantage", "{:+.4f}"),
                ("loss_weight", "{:+.6f}"),
            )
        ]
        table.add_row(
            str(t["turn"]),
            repr(t["text"]),
            str(t["version"]),
            str(t["lag"]),
            f"{t['behavior_logprob']:.4f}",
            *of_trainer,
        )
    prompt = rollout["prompt"][-_PROMPT_SHOWN:]
    return [Text(f"seen before the first token: …{prompt}"), table]
