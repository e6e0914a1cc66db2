"""Rewards as pure functions of text and values, and a judge that asks a language model."""

from loopwright.envs.rewards.judge import LLMJudge
from loopwright.envs.rewards.text import (
    exact_match,
    json_equal,
    matches,
    normalise,
    numeric,
    passed_all,
    passed_share,
    same_value,
    token_f1,
    weighted,
)
from loopwright.envs.rewards.tool_calls import ToolCallGrade, grade_tool_call

__all__ = [
    "LLMJudge",
    "ToolCallGrade",
    "exact_match",
    "grade_tool_call",
    "json_equal",
    "matches",
    "normalise",
    "numeric",
    "passed_all",
    "passed_share",
    "same_value",
    "token_f1",
    "weighted",
]
