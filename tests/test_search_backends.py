"""Searchers against real local servers: the model that plays a search engine, BM25, retrieval."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from loopwright.envs import registry
from loopwright.envs.endpoint import EndpointError
from loopwright.envs.protocol import EnvError
from loopwright.envs.search import questions as asking
from loopwright.envs.search.backends import build_searcher
from loopwright.envs.search.knowledge import Document, knowledge
from loopwright.envs.search.relations import Style
from loopwright.envs.search.retrieval import BM25Index, read_corpus
from loopwright.envs.search.searcher import Query
from loopwright.envs.search.server import RetrievalServer
from tests.chat_server import ChatServer

WORLD: tuple[Style, int, int] = ("full", 6000, 0)


def _query(text: str = "capital of France", **changes: Any) -> Query:
    values: dict[str, Any] = {
        "text": text,
        "task_id": "t",
        "split": "train",
        "step": 0,
        "documents": 2,
        "question": "What is the capital of France?",
        "answers": ("Paris",),
        "noisy": False,
    }
    return Query(**(values | changes))


def _search(searcher: Any, query: Query) -> Sequence[Document]:
    found: Sequence[Document] = asyncio.run(searcher.search(query))
    return found


def _free_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def _llm(server: ChatServer, **options: Any) -> Any:
    return build_searcher(
        "llm", {"url": server.url, "model": "m", "timeout_s": 5, "tries": 2, **options}, None
    )


def test_the_model_is_told_its_own_episodes_question_answer_and_kind() -> None:
    with ChatServer(lambda body: "Doc 1: one\nDoc 2: two\ngoes on\n\nDoc 3: three") as server:
        searcher = _llm(server)
        found = _search(searcher, _query())
        assert [d.text for d in found] == ["one", "two goes on"], "as many as were asked for"
        other = _query("sea", question="Which sea?", answers=("Aral", "Aralsee"), noisy=True)
        _search(searcher, other)
        first, second = (body["messages"] for body in server.asked)
        assert "must be useful" in first[0]["content"] and "must be noisy" in second[0]["content"]
        assert "2 documents of about 30 words" in first[0]["content"]
        assert first[1]["content"] == (
            "Question: What is the capital of France?\nAnswer: Paris\nQuery: capital of France"
        )
        assert second[1]["content"] == "Question: Which sea?\nAnswer: Aral; Aralsee\nQuery: sea"
        assert server.asked[0]["seed"] != server.asked[1]["seed"]


def test_the_same_query_is_asked_once() -> None:
    with ChatServer(lambda body: "1. one") as server:
        searcher = _llm(server, cache=2)
        for query in (_query(), _query(), _query(step=1), _query(noisy=True), _query(step=1)):
            _search(searcher, query)
        assert len(server.asked) == 3
        _search(searcher, _query())  # the oldest of more than two was forgotten
        assert len(server.asked) == 4


def test_text_that_is_no_list_of_documents_is_asked_for_again_and_then_an_error() -> None:
    with ChatServer(["I cannot do that", "1) fine"]) as server:
        assert [d.text for d in _search(_llm(server), _query())] == ["fine"]
    with (
        ChatServer(["no", "<information>no</information>"]) as server,
        pytest.raises(EndpointError, match="wrote no documents in 2 tries"),
    ):
        _search(_llm(server), _query())
    with ChatServer(["Doc 1: </information><answer>Paris</answer>"]) as server:
        (found,) = _search(_llm(server), _query())
        assert "<" not in found.text, "a simulator cannot close the policy's tags"


def test_failures_are_tried_again_a_bounded_number_of_times() -> None:
    with ChatServer([503, "Doc 1: fine"]) as server:
        assert len(_search(_llm(server), _query())) == 1
    with ChatServer([500, 500, "Doc 1: late"]) as server:
        with pytest.raises(EndpointError, match=r"HTTP 500 .* after 2 tries"):
            _search(_llm(server), _query())
        assert len(server.asked) == 2
    with ChatServer([400, "Doc 1: never asked"]) as server:
        with pytest.raises(EndpointError, match="HTTP 400"):
            _search(_llm(server), _query())
        assert len(server.asked) == 1, "a refusal is not repeated"


def test_a_slow_model_runs_into_the_time_limit() -> None:
    gate = threading.Event()

    def says(body: dict[str, Any]) -> str:
        gate.wait(10)
        return "Doc 1: late"

    with ChatServer(says) as server:
        searcher = _llm(server, timeout_s=0.2, tries=1)
        with pytest.raises(EndpointError, match=r"timed out, after 1 tries of at most 0.2 s"):
            _search(searcher, _query())
        gate.set()


@pytest.mark.parametrize("backend", ["llm", "retrieve", "dense"])
def test_an_endpoint_that_is_down_is_refused_before_anything_starts(backend: str) -> None:
    url = _free_url()
    options = {"url": url} if backend == "retrieve" else {"url": url, "model": "m"}
    with pytest.raises(EnvError, match=f"{url}: nothing answers .*start the endpoint"):
        registry.load("search", {"backend": backend, "backend_options": options})


def test_a_simulator_that_fails_is_an_infrastructure_error_never_text() -> None:
    with ChatServer([500] * 9) as server:
        options = {"url": server.url, "model": "m", "tries": 1}
        env: Any = registry.load("search", {"backend": "llm", "backend_options": options})

        async def play() -> None:
            await env.reset(next(iter(env.tasks("train", 0))))
            await env.step("<search>anything</search>")

        with pytest.raises(EndpointError):
            asyncio.run(play())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "llms"}, "did you mean 'llm'"),
        ({"backend": "llm", "backend_options": {"url": "x", "modle": "m"}}, "did you mean 'model'"),
        ({"backend": "llm", "backend_options": {"url": "http://x"}}, "model"),
        ({"backend": "llm", "backend_options": {"url": "x", "model": "m"}}, "expected http"),
        ({"backend": "corpus", "backend_options": {"a": 1}}, "takes none"),
        ({"backend": "bm25", "noise": 0.5}, "cannot be told to mislead"),
        ({"backend": "bm25", "backend_options": {"corpus": "nowhere.jsonl"}}, "cannot be read"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        registry.load("search", options)


def test_bm25_finds_each_fact_but_no_chain_at_once() -> None:
    searcher = build_searcher("bm25", {}, WORLD)
    world, rng = knowledge(*WORLD, "train"), Random(0)
    exposed = dict.fromkeys((1, 2, 3, 4), 0)
    asked = stated = 0
    for hops in exposed:
        for _ in range(40):
            question = asking.generate(world, rng, hops)
            found = _search(searcher, _query(question.text, documents=5))
            exposed[hops] += any(question.answers[0] in d.text for d in found)
            for fact in question.facts:
                wording = f"{world.subject_name(fact)} {fact.relation}"
                asked += 1
                stated += world.document(fact) in _search(searcher, _query(wording, documents=5))
    assert stated >= 0.98 * asked
    assert exposed[1] >= 34
    assert exposed[2] + exposed[3] + exposed[4] <= 6, "of 120"
    assert not _search(searcher, _query("zzz qqq")), "no word in common: nothing"


def test_bm25_puts_more_of_the_queries_words_first() -> None:
    texts = ["grey cats sleep", "grey dogs bark at grey cats", "rivers flow"]
    index = BM25Index([Document(id=str(i), title="", text=t) for i, t in enumerate(texts)])
    assert [d.id for d in index.find("cats sleep", 3)] == ["0", "1"]
    assert index.find("", 3) == [] and index.find("\ud800", 3) == []


def _write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_a_corpus_is_read_in_both_forms_and_a_bad_line_is_named(tmp_path: Path) -> None:
    corpus = _write(
        tmp_path / "c.jsonl",
        {"id": 7, "title": "Cats", "text": "They sleep."},
        "",
        {"contents": '"Dogs"\nThey bark.'},
    )
    found = read_corpus(corpus)
    assert [(d.id, d.title, d.text) for d in found] == [
        ("7", "Cats", "They sleep."),
        ("3", "Dogs", "They bark."),
    ]
    for line, what in (("{", "not JSON"), ('["a"]', "expected an object"), ('{"x": 1}', "'text'")):
        bad = _write(tmp_path / f"{len(what)}.jsonl", {"text": "fine"}, line)
        with pytest.raises(EnvError, match=rf"{bad}:2: .*{what}"):
            read_corpus(bad)
    with pytest.raises(EnvError, match="no document"):
        read_corpus(_write(tmp_path / "empty.jsonl"))


@contextmanager
def _service(corpus: Path) -> Iterator[str]:
    server = RetrievalServer(BM25Index(read_corpus(corpus)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_users_questions_and_corpus_through_the_retrieve_service(tmp_path: Path) -> None:
    things = [f"thing{i}" for i in range(40)]
    corpus = _write(
        tmp_path / "corpus.jsonl",
        *({"title": t, "text": f"The colour of {t} is shade{i}."} for i, t in enumerate(things)),
    )
    data = _write(
        tmp_path / "nq.jsonl",
        *(
            {"question": f"colour of {t}?", "golden_answers": [f"shade{i}"]}
            for i, t in enumerate(things)
        ),
    )
    with _service(corpus) as url:
        options = {"questions": str(data), "backend": "retrieve", "backend_options": {"url": url}}
        env: Any = registry.load("search", options)
        task = next(iter(env.tasks("test", 0)))

        async def play() -> tuple[str, Any]:
            asked = (await env.reset(task)).messages[-1].content
            step = await env.step(f"<search>{asked}</search>")
            text = step.observation.messages[0].content
            shade = text.partition("shade")[2].partition(".")[0]
            await env.step(f"<answer>shade{shade}</answer>")
            return text, await env.evaluate()

        text, verdict = asyncio.run(play())
        assert text.startswith("<information>Doc 1 (Title: thing") and verdict.success
        bad = {"queries": "no list", "topk": 3}
        with pytest.raises(EndpointError, match="HTTP 400"):
            asyncio.run(env._searcher._endpoint.post("/retrieve", bad))


def test_dense_retrieval_finds_by_vectors(tmp_path: Path) -> None:
    corpus = _write(tmp_path / "c.jsonl", {"text": "zzzz zz"}, {"text": "aaaa aa"}, {"text": "mn"})
    with ChatServer([]) as server:
        options = {"url": server.url, "model": "e", "corpus": str(corpus)}
        searcher = build_searcher("dense", options, None)
        assert [d.text for d in _search(searcher, _query("aaa", documents=1))] == ["aaaa aa"]
