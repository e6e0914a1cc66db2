"""Warm start actor: builds the tiny policy and clones demonstrations, in a process of its own, with
progress."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopwright.actors.chat import ChatFormat
from loopwright.actors.cloning import CloningReport, clone
from loopwright.actors.demonstrations import Demonstration, key_tokens, texts, tokenize
from loopwright.actors.tiny_model import build_tiny_policy
from loopwright.algorithms.key_tokens import key_token_weights
from loopwright.algorithms.records import Context


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
        of `cloning.clone`, whose report comes back, and `key_token_weight` (default 0)."""
        chat = ChatFormat.load(model_path)
        settings = dict(options)
        factor = settings.pop("key_token_weight", 0.0)
        contexts: list[Context] = []
        weights: list[np.ndarray] = []
        for demonstration in demonstrations:
            made = tokenize(demonstration, chat)
            contexts += made
            if factor:
                masks = key_tokens(demonstration, made, chat)
                weights += [
                    1 + factor * (key_token_weights(key, c.action_mask) - 1)
                    for key, c in zip(masks, made, strict=True)
                ]
        settings["weights"] = weights or None
        aside = Path(folder).with_name(Path(folder).name + ".partial")
        report = clone(
            model_path, contexts, aside, threads=self._threads, progress=self._note, **settings
        )
        aside.rename(folder)
        return report

    def progress(self) -> tuple[int, float]:
        """(steps done, loss) of the cloning under way."""
        return self._progress

    def _note(self, done: int, loss: float) -> None:
        self._progress = (done, loss)
