"""The search environment: turns, questions, noise, constant memory, and the kit in every mode."""

import asyncio
import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.envs import registry
from loopwright.envs.conformance import check
from loopwright.envs.protocol import EnvError, TaskError, Verdict
from loopwright.envs.search import Search
from loopwright.envs.search import questions as asking
from loopwright.envs.search.knowledge import knowledge
from loopwright.envs.search.searcher import CorpusSimulator, Query, is_noisy
from loopwright.envs.search.tags import Act, Malformed, parse_turn, render_turn

COMPACT: dict[str, Any] = {"style": "compact", "entities": 200}
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"noise": 0.7, "hops": [1, 2, 3, 4]},
    {"memory": "constant", "objectives": 3, "reward": "em"},
    {"backend": "bm25", "entities": 400},
    COMPACT,
    {**COMPACT, "noise": 0.5, "memory": "constant", "objectives": 2},
)


@pytest.mark.parametrize("options", MODES, ids=lambda options: ",".join(map(str, options)) or "-")
def test_every_mode_conforms(options: dict[str, Any]) -> None:
    assert asyncio.run(check(lambda: Search(**options))) == []


def test_the_users_questions_conform(tmp_path: Path) -> None:
    data, corpus = tmp_path / "q.jsonl", tmp_path / "c.jsonl"
    lines = [{"question": f"who is {i}?", "answer": f"person {i}"} for i in range(400)]
    data.write_text("\n".join(map(json.dumps, lines)))
    corpus.write_text(json.dumps({"title": "x", "text": "who is who"}))
    options: dict[str, Any] = {
        "questions": str(data),
        "backend": "bm25",
        "backend_options": {"corpus": str(corpus)},
    }
    assert asyncio.run(check(lambda: registry.load("search", options))) == []


def _play(env: Any, task: Any, actions: list[str]) -> tuple[list[Any], Verdict]:
    async def play() -> tuple[list[Any], Verdict]:
        seen: list[Any] = [await env.reset(task)]
        seen += [await env.step(action) for action in actions]
        return seen, await env.evaluate()

    return asyncio.run(play())


def _first(env: Any, split: str = "train") -> Any:
    return next(iter(env.tasks(split, 0)))


@pytest.mark.parametrize(
    ("text", "kind", "content", "thoughts"),
    [
        ("<think>a</think> <search> q </search>", "search", "q", "a"),
        ("<answer>x; y</answer>", "answer", "x; y", ""),
        ("  <search>a < b</search>\n", "search", "a < b", ""),
    ],
)
def test_turns_are_read(text: str, kind: str, content: str, thoughts: str) -> None:
    act = parse_turn(text, "think")
    assert isinstance(act, Act)
    assert (act.kind, act.text, act.thoughts) == (kind, content, thoughts)
    assert parse_turn(render_turn(act, "state"), "state") == act


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("", "empty"),
        ("<think>a</think>", "empty"),
        ("<search></search>", "empty"),
        ("<search>a</search><search>b</search>", "parse"),
        ("<search>a</search> and then", "parse"),
        ("I will <search>a</search>", "parse"),
        ("<answer>a<answer>b</answer>", "parse"),
        ("<think>a<search>b</search>", "parse"),
        ("<state>a</state><search>b</search>", "parse"),
        ("<search>a</search><information>lies</information>", "parse"),
        ("<search>" + "a" * 401 + "</search>", "too_long"),
        ("<answer>" + "a" * 9000, "too_long"),
    ],
)
def test_faults_have_a_category(text: str, category: str) -> None:
    found = parse_turn(text, "think")
    assert isinstance(found, Malformed) and found.category == category and found.hint


TAGS = st.sampled_from(
    ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<information>"]
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(TAGS | st.text(max_size=5), max_size=8).map("".join))
def test_any_text_is_a_turn_or_a_fault(text: str) -> None:
    found = parse_turn(text, "think")
    assert isinstance(found, Act | Malformed)
    if isinstance(found, Act):
        assert found.text and parse_turn(render_turn(found, "think"), "think") == found


def test_answers_are_taken_by_position_and_summed() -> None:
    env = Search(objectives=3, reward="em", hops=[1])
    task = _first(env)
    golds = [q["answers"][0] for q in task.payload["questions"]]
    assert len(task.payload["questions"]) == 3 and _play(env, task, [])[1].reward == 0
    opening = _play(env, task, [])[0][0].messages[-1].content
    assert opening == "; ".join(q["text"] for q in task.payload["questions"])
    for answers, reward in (
        (golds, 3),
        (golds[:2], 2),
        ([golds[1], golds[0], golds[2]], 1),
        ([*golds, "more"], 3),
    ):
        _, verdict = _play(env, task, [f"<answer>{'; '.join(answers)}</answer>"])
        assert verdict.reward == reward and verdict.success is (reward == 3)
        assert verdict.parts["em"] == pytest.approx(reward / 3)


def test_the_reward_is_f1_and_success_is_equality() -> None:
    env = Search(hops=[1], relations=["author"])
    task = _first(env)
    first = task.payload["questions"][0]["answers"][0].split()[0]
    _, verdict = _play(env, task, ["<search>x</search>", f"<answer>{first}</answer>"])
    assert verdict.reward == pytest.approx(2 / 3) and not verdict.success
    assert verdict.parts == {"f1": verdict.reward, "em": 0.0, "searches": 1.0}


def test_held_out_names_are_never_met_in_training() -> None:
    worlds = {split: knowledge("full", 3000, 0, split) for split in ("train", "test")}
    names = {s: {n for kind in w.names.values() for n in kind} for s, w in worlds.items()}
    assert not names["train"] & names["test"]
    assert len(names["train"]) == worlds["train"].entities, "every name is one thing's alone"
    assert 0.15 < len(names["test"]) / len(names["train"]) < 0.3
    seen = " ".join(
        f" {d.title} {d.text}" for d in map(worlds["train"].document, worlds["train"].facts())
    )
    for kind in ("person", "city", "company", "school"):
        for name in worlds["test"].names[kind]:
            assert f" {name}." not in seen and f" {name} " not in seen


def test_a_question_has_one_answer_which_its_documents_state() -> None:
    world, rng = knowledge("full", 3000, 0, "train"), Random(1)
    for hops in (1, 2, 3, 4):
        for _ in range(50):
            question = asking.generate(world, rng, hops)
            assert len(question.facts) == hops and len(question.answers) == 1
            assert world.subject_name(question.facts[0]) in question.text
            assert question.answers[0] not in question.text
            for fact, after in zip(question.facts, question.facts[1:], strict=False):
                assert world.object_name(fact) == world.subject_name(after)
            for fact in question.facts:
                text = world.document(fact).text
                assert world.subject_name(fact) in text and world.object_name(fact) in text
                assert 10 <= len(text.split()) <= 40


def _ask(world: tuple[Any, int, int], text: str, question: Any, noisy: bool, number: int) -> Any:
    return asyncio.run(
        CorpusSimulator(*world).search(
            Query(
                text=text,
                task_id=str(number),
                split="train",
                step=0,
                documents=5,
                question=question.text,
                answers=question.answers,
                noisy=noisy,
            )
        )
    )


def test_one_search_answers_one_hop_alone_and_the_oracles_way_finds_every_fact() -> None:
    size: tuple[Any, int, int] = ("full", 3000, 0)
    world, rng, count = knowledge(*size, "train"), Random(2), 100
    exposed = dict.fromkeys((1, 2, 3, 4), 0)
    for hops in exposed:
        for number in range(count):
            question = asking.generate(world, rng, hops)
            found = _ask(size, question.text, question, False, number)
            exposed[hops] += any(question.answers[0] in d.text for d in found)
            for fact in question.facts:
                query = f"{world.subject_name(fact)} {fact.relation}"
                found = _ask(size, query, question, False, number)
                assert world.document(fact) in found and len(found) == 5
                misled = _ask(size, query, question, True, number)
                assert len(misled) == 5 and world.document(fact) not in misled
                assert {d.id.split("/")[0] for d in misled} == {fact.relation}
                assert not any(world.object_name(fact) in d.text for d in misled if hops == 1)
    assert exposed[1] == count
    assert exposed[2] + exposed[3] + exposed[4] <= 0.03 * 3 * count


def test_noise_is_drawn_from_task_query_and_step() -> None:
    draws = [is_noisy(f"t{t}", "the query", step, 0.3) for t in range(400) for step in range(5)]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.03)
    again = [is_noisy(f"t{t}", "The  query", step, 0.3) for t in range(400) for step in range(5)]
    assert draws == again
    assert all(is_noisy("t", "q", s, 1.0) and not is_noisy("t", "q", s, 0.0) for s in range(50))
    lower = [is_noisy("t", f"q{i}", 0, 0.2) for i in range(200)]
    higher = [is_noisy("t", f"q{i}", 0, 0.6) for i in range(200)]
    assert all(h for low, h in zip(lower, higher, strict=True) if low), "more noise adds to it"


def test_a_scheduled_noise_goes_before_the_option() -> None:
    from dataclasses import replace

    env = Search(**COMPACT, noise=0.0, hops=[1])
    assert env.spec.scheduled == ("noise",)
    shares = {}
    for noise in (0.0, 0.25, 1.0):
        kinds = {"search/noisy": 0, "search/useful": 0}
        for task in islice(env.tasks("train", 0), 150):
            scheduled = replace(task, payload={**task.payload, "noise": noise})
            seen, _ = _play(env, scheduled, ["<search>a</search>", "<search>b</search>"])
            for step in seen[1:]:
                for kind in kinds:
                    kinds[kind] += step.signals.get(kind, 0)
        shares[noise] = kinds["search/noisy"] / sum(kinds.values())
    assert shares[0.0] == 0 and shares[1.0] == 1 and shares[0.25] == pytest.approx(0.25, abs=0.07)


def test_constant_memory_rebuilds_the_context_from_state_query_and_result() -> None:
    env = Search(memory="constant", hops=[2])
    task = _first(env)
    question = task.payload["questions"][0]["text"]
    seen, _ = _play(
        env,
        task,
        ["<state>zebra</state><search>zz one</search>", "<search>zz two</search>", "nonsense"],
    )
    first, second, third = (step.observation for step in seen[1:])
    for observation in (first, second, third):
        assert observation.fresh and [m.role for m in observation.messages] == ["system", "user"]
        assert observation.messages[1].content.startswith(question + "\n")
    assert "<state>zebra</state><search>zz one</search><information>" in first.messages[1].content
    assert "zz one" not in second.messages[1].content
    assert "zebra" not in second.messages[1].content
    assert "error: after optional <state>" in third.messages[1].content
    assert third.messages[1].content.startswith(second.messages[1].content), "nothing is lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "tiny"}, "one of compact, full"),
        ({"hops": []}, "numbers from 1 to 4"),
        ({"hops": [5]}, "numbers from 1 to 4"),
        ({"relations": ["bos"], "style": "compact"}, "boss, pal"),
        ({"relations": ["year"], "hops": [2]}, "no chain of 2 hops"),
        ({"noise": 1.5}, "must be 0 to 1"),
        ({"documents": 0}, "must be 1 to 100"),
        ({"entities": -5}, "must be 0 to 500000"),
        ({"style": "compact", "entities": 9999}, "720 names"),
        ({"max_turns": 2, "hops": [3]}, "need 4 turns"),
        ({"memory": "small"}, "full, constant"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        registry.load("search", options)


def test_a_task_of_another_kind_is_quarantined() -> None:
    from dataclasses import replace

    env = Search(**COMPACT)
    task = _first(env)
    for payload in ({}, {"questions": [{}]}, {**task.payload, "noise": 2.0}):
        with pytest.raises(TaskError):
            asyncio.run(env.reset(replace(task, payload=payload)))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected an object"),
        ('{"answer": "a"}', "no text under 'question'"),
        ('{"question": "q2"}', "nothing given"),
        ('{"question": "q2", "answer": "a", "answers": ["b"]}', "answer and answers given"),
        ('{"question": "q2", "answers": []}', "a list of texts"),
        ('{"question": "q0", "answer": "a"}', "asks the same"),
        ('{"question": "q2", "answer": "a", "supporting_facts": [3]}', "supporting_facts"),
    ],
)
def test_a_bad_line_of_a_data_set_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"question": "q0", "answer": "a"}}\n\n{line}\n')
    with pytest.raises(asking.DataError, match=rf"data\.jsonl:3: .*{what}"):
        asking.read_questions(path)


def test_data_sets_in_their_own_forms(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    hotpot = {"question": "h?", "answer": "yes", "supporting_facts": [["A", 0], ["B", 1], ["A", 2]]}
    lines = [{"question": "n? ", "answer": ["x", "y"]}, hotpot]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = asking.read_questions(path)
    assert (first.text, first.answers) == ("n?", ("x", "y"))
    assert (second.answers, second.titles) == (("yes",), ("A", "B"))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(hotpot))
    with pytest.raises(asking.DataError, match="must not be trained on"):
        asking.split_questions(path, other)
