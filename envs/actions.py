"""From the policy's text to an action, and back. Strict and total: any text gives a `Call` or a
`Fault`.

`call`:  `payments.send(to=17, amount=25)`                                  keyword literals only,
never executed `json`:  `{"name": "payments.send", "arguments": {"to": 17, "amount": 25}}`
optionally in <tool_call></tool_call>

Text up to a `</think>` is not part of the action.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ActionFormat = Literal["call", "json"]
MAX_CHARS = (
    2000  # longer actions are refused before parsing: no tool needs them, and parsers recurse
)
MAX_CELL_CHARS = 20_000  # of a turn that holds code


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One API call; arguments are literals."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Text that is no action, and what would have been one."""

    category: str
    hint: str


_HINT: Mapping[str, str] = {
    "call": 'write one call, for example docs.show(api="payments.send")',
    "json": 'write one call: {"name": "docs.show", "arguments": {"api": "payments.send"}}',
}


def parse_action(text: str, action_format: ActionFormat) -> Call | Fault:
    """The action in `text`. Never raises."""
    body = text.rpartition("</think>")[2].strip()
    if len(body) > MAX_CHARS:
        return Fault(category="too_long", hint=f"an action has at most {MAX_CHARS} characters")
    if body.startswith("<tool_call>") and body.endswith("</tool_call>"):
        body = body.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
    if not body:
        return Fault(category="empty", hint=_HINT[action_format])
    call = _from_call(body) if action_format == "call" else _from_json(body)
    return call if call is not None else Fault(category="parse", hint=_HINT[action_format])


def tool_name_span(text: str) -> tuple[int, int] | None:
    """Where the tool's name stands in an action of either format, as [start, end) in `text`; None
    for text that is no action."""
    formats: tuple[ActionFormat, ...] = ("call", "json")
    for action_format in formats:
        found = parse_action(text, action_format)
        if isinstance(found, Call):
            start = text.find(found.name, max(text.rfind("</think>"), 0))
            return (start, start + len(found.name)) if start >= 0 else None
    return None


_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def parse_cell(text: str) -> tuple[str, int] | Fault:
    """The Python of a turn and of how many fenced cells it is made: all ``` blocks in their order,
    or the whole text if there is none. Never raises."""
    body = text.rpartition("</think>")[2]
    if len(body) > MAX_CELL_CHARS:
        return Fault(category="too_long", hint=f"a turn has at most {MAX_CELL_CHARS} characters")
    cells = [cell for cell in _FENCE.findall(body) if cell.strip()]
    code = "\n".join(cells) if cells else "" if "```" in body else body.strip()
    if not code:
        return Fault(category="empty", hint="write a ```python block")
    return code.encode(errors="replace").decode(), max(1, len(cells))


def render_action(call: Call, action_format: ActionFormat) -> str:
    """The text of an action; `parse_action` gives it back."""
    if action_format == "json":
        return json.dumps({"name": call.name, "arguments": dict(call.arguments)})
    return f"{call.name}({', '.join(f'{k}={_literal(v)}' for k, v in call.arguments.items())})"


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _from_json(body: str) -> Call | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not {"name"} <= set(data) <= {"name", "arguments"}:
        return None
    name, arguments = data["name"], data.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Call(name=name, arguments=arguments)


def _from_call(body: str) -> Call | None:
    try:
        with warnings.catch_warnings():  # an odd escape in the policy's text is not ours to report
            warnings.simplefilter("ignore")
            node = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(node, ast.Call) or node.args:
        return None
    name = _dotted(node.func)
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            return None
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return None if name is None else Call(name=name, arguments=arguments)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None
