"""The trainer: one long-lived process that holds the weights, takes a batch, and publishes what
came of it.
"""

import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from loopwright.actors.model_files import load_tensors, save_model, save_state
from loopwright.actors.packed_forward import Sequences
from loopwright.actors.shared_memory import SharedWeights, unlink_stale
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer_backend import TrainerSettings, published_tensors
from loopwright.actors.weights import WeightManifest, checksum
from loopwright.algorithms.records import TrainBatch, decode

STATE_FILE = "trainer_state.pt"


class TrainerError(Exception):
    """A call that would train twice, out of order, or on something that is not a batch."""


class Trainer:
    """Plain class, used in process or as an actor. Calls come one at a time."""

    def __init__(self, settings: TrainerSettings, run_name: str) -> None:
        """Load the model: that is policy version 0. `run_name` goes into the shared memory
        segment's name.
        """
        self.settings = settings
        self.run_name = run_name
        self.backend = TorchBackend(settings)
        self._shared: SharedWeights | None = None

    def step(self, step: int, batch: bytes) -> dict[str, float]:
        """Train on the encoded `TrainBatch` of `step` and return the metrics.

        Steps count from 1. Raises `TrainerError` for any other than the next one, so that a
        repeated call never trains twice.
        """
        if step != self.backend.step + 1:
            raise TrainerError(
                f"asked for step {step}, but the next is {self.backend.step + 1}: a step is "
                "trained exactly once and in "
                "order; load the checkpoint that belongs to the ledger, or go on from the "
                "trainer's own step"
            )
        record = decode(batch)
        if not isinstance(record, TrainBatch) or record.step != step:
            found = (
                f"TrainBatch of step {record.step}"
                if isinstance(record, TrainBatch)
                else type(record).__name__
            )
            raise TrainerError(
                f"step {step}: got a {found}, expected the TrainBatch of step {step}"
            )
        return self.backend.train(record)

    def publish(self, version: int) -> WeightManifest:
        """Write the current weights to shared memory as policy version `version`; the manifest
        tells where.

        Every engine must have acknowledged the last manifest first.
        """
        if self._shared is None:
            self._shared = SharedWeights.create(self.run_name, self.backend.published_shapes())
        else:  # every engine has taken this process's first manifest: a killed trainer's can go
            unlink_stale(self.run_name)
        return self._shared.write_buckets(version, self.backend.published_buckets())

    def save(self, path: str) -> dict[str, float]:
        """Write a checkpoint into the folder `path`: Hugging Face weights, config, tokenizer, and
        the trainer state.

        Everything is flushed to disk when it returns; making the folder visible (renaming it) is
        the caller's.
        """
        started = time.perf_counter()
        folder = Path(path)
        save_model(
            self.backend.model,
            published_tensors(self.backend),
            folder,
            source=self.settings.model_path,
        )
        save_state(self.backend.state(), folder / STATE_FILE)
        return {"time/save_s": time.perf_counter() - started}

    def load(self, path: str) -> int:
        """Take weights, optimizer, RNG and step from the checkpoint at `path`; returns the step."""
        folder = Path(path)
        state_file = folder / STATE_FILE
        if not state_file.is_file():
            raise TrainerError(
                f"checkpoint {path!r}: no {STATE_FILE} there; it holds weights to start from, not "
                "a run"
            )
        state = torch.load(state_file, map_location=self.settings.device, weights_only=True)
        self.backend.restore(load_tensors(folder), state)
        return self.backend.step

    def reset(self, model_path: str) -> None:
        """Begin again at version 0 from the weights at `model_path`, with a fresh optimizer."""
        self.settings = replace(self.settings, model_path=model_path)
        self.backend = TorchBackend(self.settings)

    def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Logprob [T-1] float32 of each token [T] after the first under the current weights, at
        temperature 1. `Engine.probe` answers the same for the version it holds.
        """
        mask = np.ones(len(token_ids), dtype=bool)
        mask[:1] = False
        sequence = Sequences.of(np.asarray(token_ids), mask, np.array([len(token_ids)]))
        return self.backend.logprobs(sequence, temperature=1.0)[1:]

    def weights_checksum(self) -> int:
        """One crc32 over the names and bytes of all published tensors."""
        total = 0
        for name, tensor in sorted(published_tensors(self.backend).items()):
            total = zlib.crc32(f"{name}:{checksum(tensor):08x}".encode(), total)
        return total

    def ping(self) -> dict[str, float]:
        """A sign of life: the last step taken and the process."""
        return {"step": float(self.backend.step), "pid": float(os.getpid())}

    def close(self) -> None:
        """Unlink the shared memory; engines that map it keep what they map. Idempotent."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        unlink_stale(self.run_name)
