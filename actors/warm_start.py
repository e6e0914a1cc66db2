"""Warm start actor: builds the tiny policy and clones demonstrations, in a process of its own, with
progress."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopwright.actors.chat import ChatFormat
from loopwright.actors.cloning import CloningReport, clone
from loopwright.actors.demonstrations import Demonstration, texts, tokenize
from loopwright.actors.tiny_model import build_tiny_policy


class WarmStarter:
    """Long calls; `progress` answers meanwhile (it needs a second thread)."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._progress = (0, 0.0)

    def build_tiny(
        self, demonstrations: Sequence[Demonstration], folder: str, shape: dict[str, Any]
    ) -> str:
        """A tiny policy whose tokenizer is trained on the demonstrations' text; its folder."""
        return str(build_tiny_policy(texts(demonstrations), folder, **shape))

    def clone(
        self,
        demonstrations: Sequence[Demonstration],
        model_path: str,
        folder: str,
        options: dict[str, Any],
    ) -> CloningReport:
        """Clone into `folder`, written aside and renamed; `options` are steps, batch, lr and seed
        of `cloning.clone`, whose report comes back."""
        chat = ChatFormat.load(model_path)
        contexts = [context for d in demonstrations for context in tokenize(d, chat)]
        aside = Path(folder).with_name(Path(folder).name + ".partial")
        report = clone(
            model_path, contexts, aside, threads=self._threads, progress=self._note, **options
        )
        aside.rename(folder)
        return report

    def progress(self) -> tuple[int, float]:
        """(steps done, loss) of the cloning under way."""
        return self._progress

    def _note(self, done: int, loss: float) -> None:
        self._progress = (done, loss)
