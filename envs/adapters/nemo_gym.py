"""Adapter to NeMo-Gym's resources servers: stateful tool worlds with verifiers, such as
`workplace_assistant` (27 tools over mail, calendar, customers, projects and analytics).

    [environment]
    name = "nemo_gym"
    options = { python = "/opt/nemo/bin/python", data = "train.jsonl", test_data = "test.jsonl" }

The package wants Python 3.12 and brings its own versions of nearly everything, so it plays in an
interpreter of its own: `python3.12 -m venv /opt/nemo && /opt/nemo/bin/pip install nemo-gym`. The
interpreter may also come from `LOOPWRIGHT_NEMO_GYM_PYTHON`. Tasks are files in NeMo-Gym's format;
without one, the few examples of the package. Reward is the server's own verifier's.
"""

import json
from collections.abc import Iterator

from loopwright.envs.actions import Call, Fault, render_action
from loopwright.envs.adapters import foreign
from loopwright.envs.protocol import Observation, Step, Task
from loopwright.envs.remote import ProcessEnv

FINISH = "finish"


class NemoGym(ProcessEnv):
    """One session of a resources server."""

    def __init__(
        self,
        server: str = "workplace_assistant",
        data: str = "",
        test_data: str = "",
        max_turns: int = 10,
        python: str = "",
        sessions: int = 64,
        call_timeout_s: float = 60.0,
    ) -> None:
        """`server` is a folder of the package's `resources_servers`; without `test_data`, every
        fourth task of `data` is held out; `sessions` share a process."""
        options = {"server": server, "data": data, "test_data": test_data, "max_turns": max_turns}
        super().__init__(
            target=foreign.far_side("nemo_gym_world.py"),
            python=foreign.interpreter("nemo_gym", python),
            options=options,
            sessions=sessions,
            call_timeout_s=call_timeout_s,
        )

    async def reset(self, task: Task) -> Observation:
        """The task's messages and tools, and `finish`."""
        opening = await super().reset(task)
        return Observation(
            messages=opening.messages, tools=(*opening.tools, foreign.finishing(FINISH))
        )

    async def step(self, action: str) -> Step:
        """One tool call, or `finish` with an answer."""
        call = foreign.tool_call(action)
        if isinstance(call, Fault):
            return foreign.no_call(call)
        if call.name == FINISH:
            answer = str(call.arguments.get("answer", ""))
            return await super().step(json.dumps({"answer": answer}))
        return await super().step(
            json.dumps({"name": call.name, "arguments": dict(call.arguments)})
        )

    def oracle(self) -> Iterator[str]:
        """The calls that the data gives as the truth."""
        for text in super().oracle():
            call = json.loads(text)
            yield render_action(Call(name=call["name"], arguments=call["arguments"]), "json")
