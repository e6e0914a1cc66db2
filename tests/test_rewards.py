"""Rewards against the numbers of their papers, and what each must not be fooled by."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loopwright.envs import rewards
from loopwright.envs.actions import Call
from loopwright.envs.endpoint import Endpoint, EndpointError
from tests.chat_server import ChatServer


@pytest.mark.parametrize(
    ("answer", "golds", "f1", "em"),
    [
        ("The Beijing City", ["Beijing"], 2 / 3, 0),
        ("new york", ["New York City", "NYC"], 0.8, 0),
        ("42", ["forty two"], 0, 0),
        ("", ["Beijing"], 0, 0),
        ("the", ["Beijing"], 0, 0),
        ("The  beijing!", ["a Beijing"], 1, 1),
        ("it is Beijing or Shanghai", ["Beijing"], 1 / 3, 0),
        ("b b b", ["b"], 0.5, 0),
        ("\ud800", ["b"], 0, 0),
    ],
)
def test_f1_and_exact_match(answer: str, golds: list[str], f1: float, em: float) -> None:
    assert rewards.token_f1(answer, golds) == pytest.approx(f1, abs=5e-9)
    assert rewards.exact_match(answer, golds) == em


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        ("1,234.5", 1234.5, 1),
        (" -3e2 ", -300, 1),
        ("0.9999", 1, 1),
        ("0.99", 1, 0),
        ("12 34", 12, 0),
        ("1234 km", 1234, 0),
        ("nan", 1, 0),
        ("inf", 1, 0),
        ("1,23", 123, 0),
        ("１２", 12, 0),
        ("", 0, 0),
    ],
)
def test_numeric(answer: str, gold: float, reward: float) -> None:
    assert rewards.numeric(answer, gold, relative=1e-3) == reward


def test_gold_sides_that_are_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        rewards.numeric("1", float("nan"))
    with pytest.raises(ValueError, match="pattern"):
        rewards.matches("a", "(")
    with pytest.raises(ValueError, match="no tests"):
        rewards.passed_share({})
    with pytest.raises(ValueError, match="gold call"):
        rewards.grade_tool_call("", Call(name="find"), {"search": ("q",)})


def test_patterns_match_the_whole_answer() -> None:
    assert rewards.matches(" ab12 ", r"[a-z]+\d+") == 1
    assert rewards.matches("ab12x", r"[a-z]+\d+") == 0


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        ("1", 1, False),
        ([1, {"a": None}], (1, {"a": None}), True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (None, False, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_values_keep_their_types(a: Any, b: Any, equal: bool) -> None:
    assert rewards.same_value(a, b) is equal and rewards.same_value(b, a) is equal


def test_json_is_compared_as_values() -> None:
    assert rewards.json_equal('{"b": [1, 2], "a": "x"}', {"a": "x", "b": [1, 2]}) == 1
    assert rewards.json_equal('{"a": 1', {"a": 1}) == 0
    assert rewards.json_equal("[" * 100_000, []) == 0
    assert rewards.json_equal("true", 1) == 0


TOOLS = {"search": ("q", "n", "lang"), "open": ("id",)}
GOLD = Call(name="search", arguments={"q": "cats", "n": 3})


@pytest.mark.parametrize(
    ("arguments", "reward"),
    [
        ({"q": "cats", "n": 3}, 1.0),
        ({"q": "dogs", "n": 3}, -0.25),
        ({"q": "cats", "n": "3"}, -0.25),
        ({"q": "cats", "n": True}, -0.25),
        ({"q": "cats"}, -0.5),
        ({"q": "cats", "n": 3, "lang": "en"}, -0.5),
        ({"q": "cats", "n": 3, "colour": "red"}, -0.8),
        ({"q": "cats", "lang": "en"}, -1.0),
        ({"q": "cats", "colour": "red"}, -1.3),
        ({"q": "cats", "n": 3, "lang": "en", "colour": "red"}, -1.3),
        ({"q": "cats", "lang": "en", "colour": "red"}, -1.8),
    ],
)
def test_tl_trainings_table(arguments: dict[str, Any], reward: float) -> None:
    text = json.dumps({"name": "search", "arguments": arguments})
    assert rewards.grade_tool_call(text, GOLD, TOOLS).reward == reward
    call = f"search({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    assert rewards.grade_tool_call(call, GOLD, TOOLS, "call").reward == reward


@pytest.mark.parametrize(
    ("text", "reward", "why"),
    [
        ("no call at all", -2, "unparseable"),
        ('{"name": "seek", "arguments": {}}', -2, "unknown_tool"),
        ('{"name": "open", "arguments": {"id": 1}}', -1.5, "wrong_tool"),
    ],
)
def test_what_is_no_call_of_the_tool(text: str, reward: float, why: str) -> None:
    grade = rewards.grade_tool_call(text, GOLD, TOOLS)
    assert (grade.reward, grade.why) == (reward, why)


def test_weighted_sums_report_every_part() -> None:
    found = rewards.weighted({"f1": 0.5, "format": 1.0, "tool": -2.0}, {"f1": 1.0, "format": 0.1})
    assert found.reward == pytest.approx(0.6) and set(found.parts) == {"f1", "format", "tool"}
    with pytest.raises(ValueError, match="fromat"):
        rewards.weighted({"format": 1.0}, {"fromat": 1.0})
    with pytest.raises(ValueError, match="not finite"):
        rewards.weighted({"format": float("nan")}, {})


def test_task_tests() -> None:
    assert rewards.passed_share({"a": True, "b": False}) == 0.5
    assert rewards.passed_all({"a": True, "b": False}) == 0 and rewards.passed_all({"a": True}) == 1


@contextmanager
def _judge(*says: str | int) -> Iterator[tuple[rewards.LLMJudge, ChatServer]]:
    with ChatServer(says) as server:
        endpoint = Endpoint(url=server.url, model="judge", timeout_s=5, tries=1)
        yield rewards.LLMJudge(endpoint=endpoint), server


def test_a_judge_gives_a_score_or_an_infrastructure_error() -> None:
    def grade(judge: rewards.LLMJudge, answer: str) -> float:
        return asyncio.run(judge.grade("capital of France?", answer, ["Paris"]))

    with _judge('{"score": 0.5}', 'I say {"score": 1} because', "yes", '{"score": 7}') as made:
        judge, server = made
        assert grade(judge, "Paris?") == 0.5 and grade(judge, "Paris") == 1
        for _ in range(2):
            with pytest.raises(EndpointError, match="no score"):
                grade(judge, "Paris")
        assert grade(judge, "  ") == 0 and len(server.asked) == 4, "no answer needs no judge"
        told = json.loads(server.asked[0]["messages"][1]["content"])
        assert told == {
            "question": "capital of France?",
            "references": ["Paris"],
            "answer": "Paris?",
        }
    assert threading.active_count() < 80
