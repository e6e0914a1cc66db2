"""Search: what a query costs, what one search gives away, how noisy the curriculum really is, and
how long contexts become.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/search.py [--out search.json]

Peers in the same run: BM25 against a plain scan of all documents for the query's words, the corpus
simulator against writing its documents out and nothing else, constant memory against the full
transcript of the same oracle. Seconds are CPU seconds of this process.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from loopwright.actors.chat import ChatFormat
from loopwright.actors.demonstrations import demonstrate, texts, tokenize
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.algorithms.curricula import scheduled
from loopwright.envs.search import Search
from loopwright.envs.search.knowledge import Document, Fact, knowledge
from loopwright.envs.search.questions import Question, generate
from loopwright.envs.search.relations import Style
from loopwright.envs.search.retrieval import BM25Index, documents_of
from loopwright.envs.search.searcher import CorpusSimulator, Query, is_noisy

QUERIES, SCANNED = 2000, 20
HOPS = (1, 2, 3, 4)
OBJECTIVES = (2, 4, 8)
EPISODES = 40
World = tuple[Style, int, int]


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _queries(world: World, count: int) -> list[tuple[str, Question, Fact]]:
    found, rng = knowledge(*world, "train"), Random(0)
    questions = [generate(found, rng, rng.choice(HOPS)) for _ in range(count)]
    facts = [q.facts[-1] for q in questions]
    names = [found.subject_name(f) for f in facts]
    wordings = [f"{f.relation} {name}" for f, name in zip(facts, names, strict=True)]
    return list(zip(wordings, questions, facts, strict=True))


def _query(text: str, question: Question, number: int) -> Query:
    return Query(
        text=text,
        task_id=str(number),
        split="train",
        step=0,
        documents=5,
        question=question.text,
        answers=question.answers,
        noisy=False,
    )


def latency(world: World) -> dict[str, float]:
    """Making the world, its documents and the index; then one query of each searcher."""
    made_s, found = cpu_s(lambda: knowledge(*world, "train"))
    asked_s, queries = cpu_s(lambda: _queries(world, QUERIES))
    written_s, documents = cpu_s(lambda: documents_of(world, "train"))
    index_s, index = cpu_s(lambda: BM25Index(documents))
    bm25_s, _ = cpu_s(lambda: [index.find(text, 5) for text, _, _ in queries])
    scan_s, _ = cpu_s(lambda: [_scan(documents, text) for text, _, _ in queries[:SCANNED]])

    async def simulate() -> None:
        simulator = CorpusSimulator(*world)
        await simulator.search(_query("warm up", queries[0][1], 0))  # the table of names is made
        for number, (text, question, _) in enumerate(queries):
            await simulator.search(_query(text, question, number))

    asyncio.run(simulate())
    simulated_s, _ = cpu_s(lambda: asyncio.run(simulate()))
    facts = [fact for _, _, fact in queries for _ in range(5)]
    written_5_s, _ = cpu_s(lambda: [found.document(fact) for fact in facts])
    return {
        "documents": len(documents),
        "world_s": made_s,
        "questions_s": asked_s,
        "write_documents_s": written_s,
        "bm25_build_s": index_s,
        "bm25_query_ms": 1e3 * bm25_s / QUERIES,
        "scan_query_ms": 1e3 * scan_s / SCANNED,
        "simulator_query_us": 1e6 * simulated_s / QUERIES,
        "write_five_documents_us": 1e6 * written_5_s / QUERIES,
    }


def _scan(documents: Sequence[Document], text: str) -> list[Document]:
    """The documents that hold most of the query's words, found by reading them all."""
    words = set(text.lower().split())
    scored = [(len(words & set(f"{d.title} {d.text}".lower().split())), d) for d in documents]
    return [d for _, d in sorted(scored, key=lambda pair: -pair[0])[:5]]


def exposure(world: World, count: int = 300) -> dict[str, float]:
    """Share of questions whose answer one search with the whole question shows."""
    found, index = knowledge(*world, "train"), BM25Index(documents_of(world, "train"))
    simulator = CorpusSimulator(*world)
    shares: dict[str, float] = {}
    for hops in HOPS:
        rng = Random(hops)
        questions = [generate(found, rng, hops) for _ in range(count)]

        async def simulated(asked: Sequence[Question] = questions) -> int:
            results = [await simulator.search(_query(q.text, q, n)) for n, q in enumerate(asked)]
            pairs = zip(asked, results, strict=True)
            return sum(any(q.answers[0] in d.text for d in shown) for q, shown in pairs)

        shares[f"simulator_{hops}hop"] = asyncio.run(simulated()) / count
        shown = [any(q.answers[0] in d.text for d in index.find(q.text, 5)) for q in questions]
        shares[f"bm25_{hops}hop"] = sum(shown) / count
    return shares


def noise(queries: int = 20_000) -> list[dict[str, float]]:
    """The schedule (0 to 0.5 over 200 steps) and the share of queries that really were noisy."""
    rows = []
    for step in (0, 50, 100, 150, 200, 250):
        wanted = scheduled(step, start=0.0, end=0.5, steps=200)
        noisy = sum(is_noisy(f"task {n}", f"query {step}", n % 5, wanted) for n in range(queries))
        rows.append({"step": step, "formula": wanted, "measured": noisy / queries})
    return rows


def contexts(style: Style, hops: int) -> list[dict[str, float]]:
    """Peak context tokens over all episodes of the oracle, by objectives, in both memories."""

    def played(memory: str, objectives: int) -> list[Any]:
        env = Search(
            style=style,
            hops=[hops],
            entities=400,
            memory=memory,  # type: ignore[arg-type]
            objectives=objectives,
        )
        tasks = islice(env.tasks("train", 0), EPISODES)
        return [asyncio.run(demonstrate(env, task)) for task in tasks]

    found = {(m, n): played(m, n) for m in ("full", "constant") for n in OBJECTIVES}
    sample = [text for demonstrations in found.values() for text in texts(demonstrations[:10])]
    chat = ChatFormat(train_tokenizer(sample, vocab_size=4000))
    rows = []
    for (memory, objectives), demonstrations in found.items():
        each = [max(len(c.token_ids) for c in tokenize(d, chat)) for d in demonstrations]
        rows.append(
            {
                "memory": memory,  # type: ignore[dict-item]
                "objectives": objectives,
                "episodes": len(each),
                "peak_tokens_max": max(each),
                "peak_tokens_mean": sum(each) / len(each),
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entities", type=int, default=63_000, help="of both splits")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    world: World = ("full", chosen.entities, 0)
    report = {
        "latency": latency(world),
        "exposure": exposure(world),
        "noise": noise(),
        "contexts_full_style": contexts("full", 2),
        "contexts_compact_style": contexts("compact", 1),
    }
    print(json.dumps(report, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
