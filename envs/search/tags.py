"""The policy's turn as tagged text, strict and total: any text is a query, an answer or a fault.

<think> … </think> <search> query </search>        thinking is optional
<think> … </think> <answer> answer </answer>
<state> … </state> <search> query </search>        in constant-memory mode
"""

from dataclasses import dataclass
from typing import Literal

MAX_CHARS = 8000  # a turn; longer ones are refused unread
MAX_QUERY_CHARS = 400
_TAGS = ("think", "state", "search", "answer", "information")


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A query or an answer, and the thoughts before it."""

    kind: Literal["search", "answer"]
    text: str
    thoughts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """Text that is no turn, and what would have been one."""

    category: str
    hint: str


def parse_turn(text: str, thoughts_tag: Literal["think", "state"]) -> Act | Malformed:
    """The act in `text`. Never raises."""
    if len(text) > MAX_CHARS:
        return Malformed(category="too_long", hint=f"a turn has at most {MAX_CHARS} characters")
    body, thoughts = text.strip(), ""
    if body.startswith(f"<{thoughts_tag}>"):
        thoughts, closed, body = body.removeprefix(f"<{thoughts_tag}>").partition(
            f"</{thoughts_tag}>"
        )
        if not closed or _has_tag(thoughts):
            return _form(thoughts_tag, "parse")
        body = body.strip()
    kinds: tuple[Literal["search", "answer"], ...] = ("search", "answer")
    for kind in kinds:
        if body.startswith(f"<{kind}>") and body.endswith(f"</{kind}>"):
            inner = body[len(kind) + 2 : -len(kind) - 3].strip()
            if _has_tag(inner):
                return _form(thoughts_tag, "parse")
            if not inner:
                return Malformed(category="empty", hint=f"there is nothing in <{kind}></{kind}>")
            if kind == "search" and len(inner) > MAX_QUERY_CHARS:
                return Malformed(
                    category="too_long", hint=f"a query has at most {MAX_QUERY_CHARS} characters"
                )
            return Act(kind=kind, text=inner, thoughts=thoughts.strip())
    return _form(thoughts_tag, "parse" if body else "empty")


def render_turn(act: Act, thoughts_tag: Literal["think", "state"]) -> str:
    """The text of an act; `parse_turn` gives it back."""
    thoughts = f"<{thoughts_tag}>{act.thoughts}</{thoughts_tag}>" if act.thoughts else ""
    return f"{thoughts}<{act.kind}>{act.text}</{act.kind}>"


def _form(thoughts_tag: str, category: str) -> Malformed:
    return Malformed(
        category=category,
        hint=f"after optional <{thoughts_tag}></{thoughts_tag}> write either one "
        "<search>query</search> or one <answer>answer</answer>, and nothing else",
    )


def _has_tag(text: str) -> bool:
    return any(f"<{tag}>" in text or f"</{tag}>" in text for tag in _TAGS)
