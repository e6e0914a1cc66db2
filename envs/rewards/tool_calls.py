"""TL-Training's reward of one tool call (arXiv:2412.15495), with a real parser.

Opt-in shaping: no environment adds it to its reward by itself. Values are compared with their
types: `search(q="dogs")` is not `search(q="cats")`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loopwright.envs.actions import ActionFormat, Call, Fault, parse_action
from loopwright.envs.rewards.text import same_value

UNUSABLE, WRONG_TOOL, WRONG_VALUE, CORRECT = -2.0, -1.5, -0.25, 1.0
# (hallucinated, redundant, missing) -> reward
ARGUMENTS: Mapping[tuple[bool, bool, bool], float] = {
    (True, True, True): -1.8,
    (True, True, False): -1.3,
    (True, False, True): -1.3,
    (False, True, True): -1.0,
    (True, False, False): -0.8,
    (False, True, False): -0.5,
    (False, False, True): -0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallGrade:
    """The reward and why."""

    reward: float
    why: str  # unparseable, unknown_tool, wrong_tool, arguments, value, correct


def grade_tool_call(
    text: str,
    gold: Call,
    tools: Mapping[str, Collection[str]],
    action_format: ActionFormat = "json",
) -> ToolCallGrade:
    """Grade what the policy wrote against the gold call.

    `tools` maps each tool to its parameters. An argument is hallucinated if the tool has no such
    parameter, redundant if it has but the gold call does not use it, missing if only the gold call
    uses it. Raises `ValueError` for a gold call that its own tool does not take.
    """
    if gold.name not in tools or set(gold.arguments) - set(tools[gold.name]):
        raise ValueError(f"gold call {gold}: the tools are {dict(tools)}")
    call = parse_action(text, action_format)
    if isinstance(call, Fault):
        return ToolCallGrade(reward=UNUSABLE, why="unparseable")
    if call.name not in tools:
        return ToolCallGrade(reward=UNUSABLE, why="unknown_tool")
    if call.name != gold.name:
        return ToolCallGrade(reward=WRONG_TOOL, why="wrong_tool")
    given, wanted, known = set(call.arguments), set(gold.arguments), set(tools[gold.name])
    wrong = (bool(given - known), bool((given & known) - wanted), bool(wanted - given))
    if any(wrong):
        return ToolCallGrade(reward=ARGUMENTS[wrong], why="arguments")
    if not all(same_value(call.arguments[name], gold.arguments[name]) for name in wanted):
        return ToolCallGrade(reward=WRONG_VALUE, why="value")
    return ToolCallGrade(reward=CORRECT, why="correct")
