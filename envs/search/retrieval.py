"""Real retrieval: BM25 or dense vectors over a corpus, in this process or behind `POST /retrieve`.

A corpus is JSONL, one document a line: `text` (and `title`, `id`), or Search-R1's `contents`, whose
first line is the title. Without a corpus, the generated world's own documents are searched, of the
task's split alone.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loopwright.envs.endpoint import Endpoint, EndpointError
from loopwright.envs.protocol import EnvError
from loopwright.envs.search.backends import World
from loopwright.envs.search.knowledge import Document, knowledge
from loopwright.envs.search.questions import DataError, jsonl
from loopwright.envs.search.searcher import Query

_EMBED_BATCH = 64  # texts of one request


class Index(Protocol):
    """What finds documents for a text."""

    def find(self, text: str, count: int) -> list[Document]:
        """At most `count` documents, the best first."""
        ...


class BM25Index:
    """`bm25s` over documents, held in memory."""

    def __init__(self, documents: Sequence[Document]) -> None:
        try:
            self._package: Any = importlib.import_module("bm25s")
        except ImportError as error:
            raise EnvError(
                "search backend = 'bm25' needs a package that is not installed; "
                "remedy: pip install 'loopwright[search]'"
            ) from error
        self._documents = documents
        self._retriever = self._package.BM25()
        self._retriever.index(
            self._tokens([f"{d.title} {d.text}" for d in documents]), show_progress=False
        )

    def find(self, text: str, count: int) -> list[Document]:
        """The documents with the highest scores; those that share no word are left out."""
        tokens = self._tokens([text.encode(errors="replace").decode()])
        if not tokens[0]:
            return []
        known = [t for t in tokens[0] if t in self._retriever.vocab_dict]
        if not known:
            return []
        scores = self._retriever.get_scores(known)
        count = min(count, len(self._documents))
        best = np.argpartition(-scores, count - 1)[:count]
        best = best[np.lexsort((best, -scores[best]))]
        return [self._documents[i] for i in best if scores[i] > 0]

    def _tokens(self, texts: list[str]) -> Any:
        return self._package.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


class DenseIndex:
    """Inner product of vectors that an OpenAI-compatible `/embeddings` endpoint makes."""

    def __init__(self, documents: Sequence[Document], endpoint: Endpoint) -> None:
        self._documents, self._endpoint = documents, endpoint
        texts = [f"{d.title} {d.text}" for d in documents]
        parts = [
            self._embed(texts[i : i + _EMBED_BATCH]) for i in range(0, len(texts), _EMBED_BATCH)
        ]
        self._vectors = np.concatenate(parts)

    def find(self, text: str, count: int) -> list[Document]:
        """The documents whose vectors are nearest in direction."""
        scores = self._vectors @ self._embed([text.encode(errors="replace").decode()])[0]
        best = np.argsort(-scores, kind="stable")[:count]
        return [self._documents[i] for i in best]

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d] float32."""
        answer = self._endpoint.post_now(
            "/embeddings", {"model": self._endpoint.model, "input": list(texts)}
        )
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"{self._endpoint.url}: no embeddings came back") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise EndpointError(
                f"{self._endpoint.url}: {len(vectors)} embeddings for {len(texts)} texts"
            )
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@lru_cache(maxsize=4)
def read_corpus(path: Path) -> tuple[Document, ...]:
    """The documents of a JSONL corpus. Raises `DataError` with the line's number."""
    documents = tuple(_document(place, record) for place, record in jsonl(path))
    if not documents:
        raise DataError(f"{path}: holds no document")
    return documents


def _document(place: str, record: Mapping[str, Any]) -> Document:
    contents, text, title = record.get("contents"), record.get("text"), record.get("title", "")
    if text is None and isinstance(contents, str):
        first, line, rest = contents.partition("\n")
        title, text = (first.strip().strip('"'), rest.strip()) if line else (title, contents)
    if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
        raise DataError(f"{place}: expected text under 'text' (or 'contents') and 'title'")
    return Document(id=str(record.get("id", place.rpartition(":")[2])), title=title, text=text)


def documents_of(world: World, split: str) -> list[Document]:
    """Every document of a generated world's split."""
    found = knowledge(*world, split)
    return [found.document(fact) for fact in found.facts()]


@lru_cache(maxsize=4)
def bm25_index(corpus: Path | None, world: World | None, split: str) -> BM25Index:
    """The index of a corpus, or of a world's split; made once a process, as it never changes."""
    if corpus is not None:
        return BM25Index(read_corpus(corpus))
    assert world is not None, "checked by whoever asks"
    return BM25Index(documents_of(world, split))


@lru_cache(maxsize=4)
def _dense_index(
    corpus: Path | None, world: World | None, split: str, endpoint: Endpoint
) -> DenseIndex:
    if corpus is not None:
        return DenseIndex(read_corpus(corpus), endpoint)
    assert world is not None, "checked by whoever asks"
    return DenseIndex(documents_of(world, split), endpoint)


def _corpus(backend: str, corpus: str, world: World | None) -> Path | None:
    if not corpus and world is None:
        raise EnvError(
            f"search backend = {backend!r}: set backend_options.corpus to a JSONL file; the "
            "questions come from a file too, so there is no generated world to search"
        )
    if corpus:
        read_corpus(Path(corpus))
    return Path(corpus) if corpus else None


class BM25:
    """BM25 over `corpus`, or over the generated world."""

    simulated = False

    def __init__(self, world: World | None, corpus: str = "") -> None:
        self._world = world
        self._corpus = _corpus("bm25", corpus, world)
        bm25_index(self._corpus, world, "test")

    async def search(self, query: Query) -> Sequence[Document]:
        """The best documents."""
        split = query.split if self._corpus is None else "test"
        return bm25_index(self._corpus, self._world, split).find(query.text, query.documents)

    def close(self) -> None:
        """Indexes are shared by all episodes of the process."""


class Dense:
    """Dense retrieval over `corpus`, or over the generated world; `url` has `/embeddings`."""

    simulated = False

    def __init__(
        self,
        world: World | None,
        url: str,
        model: str,
        corpus: str = "",
        timeout_s: float = 30.0,
        tries: int = 3,
        api_key_env: str = "",
    ) -> None:
        self._world = world
        self._corpus = _corpus("dense", corpus, world)
        self._endpoint = Endpoint(
            url=url, model=model, timeout_s=timeout_s, tries=tries, api_key_env=api_key_env
        )
        self._endpoint.check()

    async def search(self, query: Query) -> Sequence[Document]:
        """The nearest documents."""
        split = query.split if self._corpus is None else "test"
        index = await self._endpoint.aside(
            _dense_index, self._corpus, self._world, split, self._endpoint
        )
        found: list[Document] = await self._endpoint.aside(index.find, query.text, query.documents)
        return found

    def close(self) -> None:
        """Indexes are shared by all episodes of the process."""


class Retriever:
    """Client of Search-R1's `POST /retrieve` (arXiv:2503.09516), as `server.py` serves it too.

    Request `{"queries": […], "topk": k, "return_scores": true}`, answer `{"result": [[{"document":
    {"contents": "title\\ntext"}, "score": s}, …]]}`.
    """

    simulated = False

    def __init__(
        self, world: World | None, url: str, timeout_s: float = 10.0, tries: int = 3
    ) -> None:
        self._endpoint = Endpoint(url=url, timeout_s=timeout_s, tries=tries)
        self._endpoint.check("/")

    async def search(self, query: Query) -> Sequence[Document]:
        """What the service finds. Raises `EndpointError`."""
        text = query.text.encode(errors="replace").decode()
        body = {"queries": [text], "topk": query.documents, "return_scores": True}
        answer = await self._endpoint.post("/retrieve", body)
        try:
            return list(_retrieved(answer["result"][0]))[: query.documents]
        except (DataError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self._endpoint.url}/retrieve: not Search-R1's form: {str(answer)[:120]!r}"
            ) from error

    def close(self) -> None:
        """Nothing to free: the connection is not kept."""


def _retrieved(found: Sequence[Mapping[str, Any]]) -> Iterator[Document]:
    for number, entry in enumerate(found):
        yield _document(f"result:{number}", entry.get("document", entry))
