"""Ranks of a trainer as plain processes, without Ray: started once, they run any number of cases.

with RankWorld(2) as world:
    answers = world.run(case, argument, …)    # case(ranks, argument, …) on every rank
"""

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

from loopwright.actors.ranks import Meeting, join

_DEADLINE_S = 120.0


class RankWorld:
    """`size` processes that have met; `run` calls a function of a module on all of them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> "RankWorld":
        context = multiprocessing.get_context("spawn")
        self._meeting = Meeting(_DEADLINE_S)
        pipes = [context.Pipe() for _ in range(self.size)]
        self._pipes = [near for near, _ in pipes]
        self._processes = [
            context.Process(
                target=_serve, args=(far, rank, self.size, self._meeting.address), daemon=True
            )
            for rank, (_, far) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """What `case(ranks, *args)` returns on each rank. Raises `RuntimeError` with the traceback
        of the first rank that raised, or that did not answer."""
        for pipe in self._pipes:
            pipe.send((case, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_DEADLINE_S):
                raise RuntimeError(f"rank {rank} did not answer within {_DEADLINE_S:g} s")
            answers.append(pipe.recv())
        for rank, (_, problem) in enumerate(answers):
            if problem:
                raise RuntimeError(f"rank {rank} of {self.size}: {problem}")
        return [answer for answer, _ in answers]


def _serve(pipe: Any, rank: int, size: int, address: str) -> None:
    import torch

    torch.set_num_threads(1)
    ranks = join(address, rank=rank, size=size, device="cpu", timeout_s=_DEADLINE_S)
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((case(ranks, *args), ""))
        except Exception:  # noqa: BLE001 - whatever it is, the test is to see it
            pipe.send((None, traceback.format_exc()))
