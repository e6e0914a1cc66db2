"""The trainer: one long-lived process that holds the weights, takes a batch, and publishes what
came of it.

With several ranks there are as many of these processes, and every call goes to all of them: each
holds its share, and rank 0 alone writes shared memory and checkpoints. They meet first:

    address = rank 0 .meet(…)        every rank .join(address, …)        then as one process
"""

import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from loopwright.actors import checkpoint
from loopwright.actors.channels.adapter import BackendAdapters
from loopwright.actors.channels.channel import WeightChannel, open_channel
from loopwright.actors.channels.follower import Follower
from loopwright.actors.channels.lowrank import projector_bases
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.dry_run import DryRun, dry_run, process_peak_bytes
from loopwright.actors.model_identity import ModelIdentity, model_identity
from loopwright.actors.out_of_memory import named
from loopwright.actors.packed_forward import Sequences
from loopwright.actors.ranks import Meeting, Ranks, join
from loopwright.actors.shared_memory import unlink_stale
from loopwright.actors.trainer_backend import TrainerBackend, TrainerSettings
from loopwright.actors.weights import ChannelLost, WeightManifest, checksum
from loopwright.algorithms.records import TrainBatch, decode
from loopwright.configs.backends import load_backend


class TrainerError(Exception):
    """A call that would train twice, out of order, or on something that is not a batch."""


class Trainer:
    """Plain class, used in process or as an actor. Calls come one at a time."""

    def __init__(
        self,
        settings: TrainerSettings,
        run_name: str,
        rank: int = 0,
        channel: ChannelSettings | None = None,
    ) -> None:
        """Load the model: that is policy version 0. `run_name` goes into the names of shared
        memory. One `rank` of several loads it after `join`, when it is first needed.
        """
        self.settings = settings
        self.run_name = run_name
        self._rank = rank
        self._ranks: Ranks | None = None
        self._meeting: Meeting | None = None
        self._backend: TrainerBackend | None = None
        self._channel_settings = channel or ChannelSettings()
        self._channel: WeightChannel | None = None  # opened by the first publish
        self._holds = settings.model_path  # what its weights were loaded from
        if settings.ranks == 1:
            self._backend = self._build()

    @property
    def backend(self) -> TrainerBackend:
        """Model and optimizer; loaded at the first use."""
        if self._backend is None:
            self._backend = self._build()
        return self._backend

    def _build(self) -> TrainerBackend:
        if self.settings.ranks > 1 and self._ranks is None:
            raise TrainerError(
                f"trainer rank {self._rank} of {self.settings.ranks} has not joined the others"
            )
        build = load_backend("trainer.backend", self.settings.backend)
        backend: TrainerBackend = build(self.settings, self._ranks)
        return backend

    def meet(self, timeout_s: float) -> str:
        """Rank 0: open the place where all ranks meet; its address."""
        self._meeting = Meeting(timeout_s)
        return self._meeting.address

    def join(self, address: str, timeout_s: float) -> None:
        """Meet the other ranks there. Raises `RanksError` if one is missing after `timeout_s`,
        which from then on bounds every exchange with them."""
        self._backend = None
        self._ranks = join(
            address,
            rank=self._rank,
            size=self.settings.ranks,
            device=self.settings.device,
            timeout_s=timeout_s,
        )

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
        with named("activations", self.settings, f"in step {step}"):
            metrics = self.backend.train(record)
        return metrics | {
            "memory/trainer_peak_bytes": float(process_peak_bytes(self.settings.device))
        }

    def dry_run(self, longest: int) -> DryRun:
        """What the largest micro-batch of contexts of up to `longest` tokens takes, measured;
        weights, optimizer and random numbers stay as they are. Raises `OutOfMemory` with the
        remedy."""
        return dry_run(self.backend, longest=longest)

    def publish(self, version: int, members: tuple[str, ...] = ()) -> WeightManifest | None:
        """Send the current weights on their way to the engines as policy version `version`; the
        manifest tells them how to take it (rank 0; the others have none).

        Every engine must have acknowledged the last manifest first. `members` names the engines
        that will take this one, with their lives: a channel that knows its peers forms anew when
        they change.
        """
        if self._channel is None:
            self._channel = self._open()
        adapters = self._channel_settings.channel == "adapter"
        source = BackendAdapters(self.backend) if adapters else self.backend
        return self._channel.publish(version, source, members)

    def _open(self) -> WeightChannel:
        if self._rank:
            return Follower()
        settings = self._channel_settings
        return open_channel(settings, self.run_name, lambda: projector_bases(self.backend))

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest | None:
        """The weights published last, whole, for engines that missed them. May be called while a
        step is taken, of rank 0. Raises `ChannelLost` if this process did not publish `version`."""
        if self._channel is None:
            raise ChannelLost(f"this trainer has not published version {version}")
        return self._channel.resend(version, members)

    def save(self, path: str) -> dict[str, float]:
        """Write a checkpoint into the folder `path`: Hugging Face weights, config, tokenizer, and
        the trainer state.

        Everything is flushed to disk when it returns; making the folder visible (renaming it) is
        the caller's.
        """
        started = time.perf_counter()
        checkpoint.save(self.backend, Path(path))
        return {"time/save_s": time.perf_counter() - started}

    def load(self, path: str) -> int:
        """Take weights, optimizer, RNG and step from the checkpoint at `path`; returns the step."""
        began = checkpoint.began_from(Path(path))
        rests_on_it = self.settings.lora_rank or self.settings.loss.kl != "none"
        if rests_on_it and began and began != self.settings.model_path:
            self.reset(began)
        checkpoint.load(self.backend, Path(path))
        self._holds = path
        return self.backend.step

    def reset(self, model_path: str) -> None:
        """Begin again at version 0 from the weights at `model_path`, with a fresh optimizer."""
        self.settings = replace(self.settings, model_path=model_path)
        self._holds = model_path
        self._backend = None  # first: not two models at the same time
        self._backend = self._build()

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
        found = {
            name: checksum(tensor)
            for bucket in self.backend.published_buckets()
            for name, tensor in bucket.items()
        }
        total = 0
        for name, of_tensor in sorted(found.items()):
            total = zlib.crc32(f"{name}:{of_tensor:08x}".encode(), total)
        return total

    def identity(self) -> ModelIdentity:
        """What its weights were loaded from: a model, or a checkpoint with its tokenizer."""
        return model_identity(self._holds, self.settings.dtype)

    def ping(self) -> dict[str, float]:
        """A sign of life: the last step taken and the process."""
        step = self._backend.step if self._backend is not None else 0
        return {"step": float(step), "pid": float(os.getpid())}

    def close(self) -> None:
        """Free the channel; engines keep what they hold. Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        unlink_stale(self.run_name)
