"""A real HTTP server on 127.0.0.1 that speaks the OpenAI form and says what it is told to."""

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Says = Sequence[str | int] | Callable[[dict[str, Any]], str | int]


class ChatServer:
    """Answers each request with the next of `says`, or with what `says(body)` gives: a text is a
    completion, a number an HTTP status. `asked` holds the bodies; `/embeddings` counts letters."""

    def __init__(self, says: Says) -> None:
        self.asked: list[dict[str, Any]] = []
        self._says = says
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/embeddings"):
                    return self._send(200, {"data": _vectors(body["input"])})
                said = outer._next(body)
                if isinstance(said, int):
                    return self._send(said, {"error": "told to"})
                message = {"role": "assistant", "content": said}
                self._send(200, {"choices": [{"message": message}]})

            def log_message(self, *parts: Any) -> None:
                """Quiet."""

            def _send(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def _next(self, body: dict[str, Any]) -> str | int:
        with self._lock:
            self.asked.append(body)
            return self._says(body) if callable(self._says) else self._says[len(self.asked) - 1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _vectors(texts: Sequence[str]) -> list[dict[str, Any]]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return [
        {"index": i, "embedding": [text.lower().count(c) + 0.01 for c in letters]}
        for i, text in enumerate(texts)
    ]
