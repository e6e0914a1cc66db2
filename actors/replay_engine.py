"""An engine that does again what a journal says another one did.

Episodes ask it as they would ask any engine; who joins the batch before which step, and when new
weights come, is the journal's to say. So the same requests get the same tokens and logprobs.
"""

import asyncio
from collections.abc import Callable, Mapping

import torch

from loopwright.actors.decode_batch import DecodeBatch, Ended
from loopwright.actors.engine import Completion, EngineError, EngineSettings, GenerateRequest
from loopwright.actors.journal import Entry
from loopwright.actors.torch_model import load_model


class ReplayError(Exception):
    """What is replayed asks for other things than what was recorded."""


class ReplayEngine:
    """One decode batch, driven by entries of a journal."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        begin: "Callable[[str, ReplayEngine], None]",
        patience_s: float = 60.0,
    ) -> None:
        """`begin` is asked for a request that was served and that nobody makes yet, again and
        again: it starts the episode, unless that is on its way."""
        self._settings = settings
        self._begin = begin
        self._patience_s = patience_s
        self._model = load_model(
            settings.model_path,
            dtype=settings.dtype,
            device=settings.device,
            max_context=settings.max_context,
        )
        self._batch = DecodeBatch(
            self._model,
            max_concurrency=settings.max_concurrency,
            max_context=settings.max_context,
            kv_bytes=settings.kv_bytes,
        )
        self._asked: dict[str, tuple[GenerateRequest, asyncio.Future[Completion]]] = {}
        self._running: dict[str, asyncio.Future[Completion]] = {}

    async def generate(self, request: GenerateRequest) -> Completion:
        """Answered when the journal says so."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._asked[request.request_id] = (request, future)
        return await future

    async def apply(
        self, entry: Entry, weights: Callable[[int], Mapping[str, torch.Tensor]]
    ) -> None:
        """Do one thing again; `weights` gives those of a version. Raises `ReplayError` where no
        episode asks for what was served then."""
        if entry.kind == "add":
            await self._add(str(entry.of))
        elif entry.kind == "cancel":
            self._deliver(self._batch.cancel(str(entry.of)))
        elif entry.kind == "install":
            version = int(entry.of)
            self._batch.install(
                self._model.prepare(weights(version)), version, recompute=entry.recompute
            )
        elif entry.kind == "release":
            self._batch.release_kv()
        elif entry.kind == "step":
            torch.set_num_threads(self._settings.threads)
            with torch.inference_mode():
                for _ in range(int(entry.of)):
                    for ended in self._batch.step():
                        self._deliver(ended)
        else:
            raise ReplayError(f"the journal says {entry.kind}, which this build cannot replay")

    def holds(self, session: str) -> bool:
        """Whether a request of the session waits or is being served: it makes no other one before
        that has come to its end."""
        return any(name.rpartition("/")[0] == session for name in (*self._asked, *self._running))

    async def _add(self, name: str) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                while name not in self._asked:
                    self._begin(name, self)
                    await asyncio.sleep(0)
        except TimeoutError:
            raise ReplayError(
                f"request {name} was served here, but its episode does not ask for it (others "
                f"wait: {', '.join(sorted(self._asked)[:3]) or 'none'})"
            ) from None
        request, future = self._asked.pop(name)
        limit = min(request.max_new_tokens, self._settings.max_context - len(request.prompt_ids))
        self._batch.add(request, limit)
        self._running[name] = future

    def _deliver(self, ended: Ended | None) -> None:
        if ended is None:
            raise ReplayError("a request was cancelled that does not run")
        future = self._running.pop(ended.request.request_id)
        if isinstance(ended.result, EngineError):
            future.set_exception(ended.result)
        elif not future.done():
            future.set_result(ended.result)
