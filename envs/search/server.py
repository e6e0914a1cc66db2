"""A BM25 index as a service: Search-R1's `POST /retrieve`, one index for all environment workers.

    python -m loopwright.envs.search.server --corpus corpus.jsonl --port 8000

Then `backend = "retrieve"` with `backend_options = { url = "http://127.0.0.1:8000" }`.
"""

import argparse
import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loopwright.envs.search.retrieval import BM25Index, Index, read_corpus

MAX_BODY_BYTES = 1 << 20
MAX_DOCUMENTS = 100


class _Handler(BaseHTTPRequestHandler):
    server: "RetrievalServer"

    def do_GET(self) -> None:
        self._answer(200, {"service": "retrieve"})

    def do_POST(self) -> None:
        if self.path != "/retrieve":
            return self._answer(404, {"error": f"{self.path}: there is /retrieve alone"})
        try:
            size = int(self.headers.get("Content-Length", "0"))
            if size > MAX_BODY_BYTES:
                return self._answer(413, {"error": f"more than {MAX_BODY_BYTES} bytes"})
            body = json.loads(self.rfile.read(size))
            queries, count = body["queries"], int(body.get("topk", 3))
            if not isinstance(queries, list) or not all(isinstance(q, str) for q in queries):
                raise TypeError("queries must be a list of texts")
            if not 1 <= count <= MAX_DOCUMENTS:
                raise ValueError(f"topk must be 1 to {MAX_DOCUMENTS}")
        except (ValueError, TypeError, KeyError) as error:
            return self._answer(400, {"error": f"{type(error).__name__}: {error}"})
        found = [self.server.index.find(query, count) for query in queries]
        entries = [
            [
                {"document": {"id": d.id, "contents": f'"{d.title}"\n{d.text}'}, "score": 1 / rank}
                for rank, d in enumerate(documents, 1)
            ]
            for documents in found
        ]
        self._answer(200, {"result": entries})

    def log_message(self, *parts: Any) -> None:
        """Quiet: a query a line would be noise."""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class RetrievalServer(ThreadingHTTPServer):
    """Serves `index` at `host`:`port`; port 0 takes a free one (`server_port` tells)."""

    daemon_threads = True

    def __init__(self, index: Index, host: str = "127.0.0.1", port: int = 0) -> None:
        self.index = index
        super().__init__((host, port), _Handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve BM25 over a JSONL corpus: POST /retrieve")
    parser.add_argument("--corpus", required=True, type=Path, help="JSONL, one document a line")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args(arguments)
    index = BM25Index(read_corpus(chosen.corpus))
    server = RetrievalServer(index, chosen.host, chosen.port)
    print(f"serving {chosen.corpus} at http://{chosen.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
