"""A taskset on the real verifiers v1: reverse a word; and one with a tool."""

import verifiers.v1 as vf


class ReverseData(vf.TaskData):
    """A word."""

    answer: str


class ReverseTask(vf.Task[ReverseData]):
    """Right or wrong, and a share for the length."""

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        """The last reply is the answer."""
        return float(trace.last_reply.strip() == self.data.answer)


class ReverseConfig(vf.TasksetConfig):
    """How many."""

    num_tasks: int = 12


class ReverseTaskset(vf.Taskset[ReverseTask, ReverseConfig]):
    """Words."""

    def load(self) -> list[ReverseTask]:
        """From their numbers."""
        words = [f"w{i * 7919 % 1000}x" for i in range(self.config.num_tasks)]
        return [
            ReverseTask(
                ReverseData(prompt=f"Reverse {w}", system_prompt="Answer alone.", answer=w[::-1]),
                self.config.task,
            )
            for w in words
        ]


__all__ = ["ReverseTaskset"]
