"""A taskset on the real verifiers v1, whose answers a tool knows."""

import verifiers.v1 as vf

from looked_up_tasks.servers.tool import BookToolset


class LookData(vf.TaskData):
    """A name and its number."""

    answer: str


class LookConfig(vf.TaskConfig):
    """The tool's."""

    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class LookTask(vf.Task[LookData, vf.State, LookConfig]):
    """Right or wrong."""

    @classmethod
    def toolsets(cls, config: LookConfig) -> list[vf.Toolset]:
        """One server."""
        return [BookToolset(config.tools)]

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        """The last reply is the number."""
        return float(trace.last_reply.strip() == self.data.answer)


class LookTasksetConfig(vf.TasksetConfig):
    """Nothing more."""

    task: LookConfig = LookConfig()


class LookTaskset(vf.Taskset[LookTask, LookTasksetConfig]):
    """Names."""

    def load(self) -> list[LookTask]:
        """Eight of them."""
        names = [f"name{i}" for i in range(8)]
        return [
            LookTask(
                LookData(prompt=f"The number of {n}?", answer=str(sum(map(ord, n)))),
                self.config.task,
            )
            for n in names
        ]


__all__ = ["LookTaskset"]
