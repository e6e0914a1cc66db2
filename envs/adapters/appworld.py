"""Adapter to the real AppWorld (arXiv:2407.18901): code over the APIs of nine apps, for those who
hold its data.

    [environment]
    name = "appworld"
    options = { python = "/opt/appworld/bin/python", root = "/data/appworld" }

The package wants pydantic 1, so it plays in an interpreter of its own, which may also come from
`LOOPWRIGHT_APPWORLD_PYTHON`. Each world has a process of its own, forked from one that has imported
the package; the ground truth is neither in that process nor under its root, and grades are made in
a second one. That keeps answers from a policy that looks around, not from one that attacks:
AppWorld's guards are no sandbox, so run its workers where a hostile cell can do no harm. A cell
that kills its own world ends the episode, with the grade of what was written until then.

The policy writes Python in ``` blocks. Reward is the share of the task's tests that pass, all of
them with `reward = "all"`. The data's licence forbids publishing what it holds in readable form:
keep ledgers of such runs to yourself.
"""

from collections.abc import Mapping
from typing import Any

from loopwright.envs.actions import Fault, parse_cell
from loopwright.envs.adapters import foreign
from loopwright.envs.protocol import EnvError, Message, Observation, Step, Task, Verdict
from loopwright.envs.remote import ProcessEnv

PROMPT = """You do tasks for a person by writing Python that calls the APIs of their apps. Each \
turn, write one ```python block; variables live on, and what you print comes back. Call an API as \
`apis.<app>.<api>(…)`. Look them up: `apis.api_docs.show_app_descriptions()`, \
`apis.api_docs.show_api_descriptions(app_name=…)`, `apis.api_docs.show_api_doc(app_name=…, \
api_name=…)`. When done, call `apis.supervisor.complete_task()`, with `answer=…` if the task is a \
question. Change nothing that the task does not ask for."""
REWARDS = ("tests", "all")


class AppWorld(ProcessEnv):
    """One session: one world at a time."""

    def __init__(
        self,
        root: str = "",
        train: str = "train",
        test: str = "dev",
        reward: str = "tests",
        prompt: str = PROMPT,
        max_turns: int = 40,
        cell_timeout_s: int = 60,
        python: str = "",
        sessions: int = 4,
        call_timeout_s: float = 300.0,
    ) -> None:
        """`root` holds `data/` (default: `APPWORLD_ROOT`); `train` and `test` are its data sets;
        `sessions` worlds share the process that they are forked from, and wait for each other."""
        if reward not in REWARDS:
            raise foreign.unknown("appworld reward", reward, REWARDS)
        if train == test:
            raise EnvError(f"appworld train and test are both {train!r}: they must be disjoint")
        self._all, self._prompt = reward == "all", prompt
        options = {
            "root": root,
            "train": train,
            "test": test,
            "max_turns": max_turns,
            "cell_timeout_s": cell_timeout_s,
        }
        super().__init__(
            target=foreign.far_side("appworld_world.py"),
            python=foreign.interpreter("appworld", python),
            options=options,
            sessions=sessions,
            start_timeout_s=300.0,
            call_timeout_s=call_timeout_s,
        )

    async def reset(self, task: Task) -> Observation:
        """A new world; who asks for what."""
        opening = await super().reset(task)
        system = Message(role="system", content=self._prompt)
        return Observation(messages=(system, *opening.messages))

    async def step(self, action: str) -> Step:
        """The code of a turn."""
        cell = parse_cell(action)
        if isinstance(cell, Fault):
            return foreign.reply(f"error: {cell.hint}", f"policy_fault/{cell.category}", "user")
        return await super().step(cell[0])

    async def evaluate(self) -> Verdict:
        """The tests of the task."""
        verdict = await super().evaluate()
        parts: Mapping[str, Any] = verdict.parts
        reward = float(verdict.success) if self._all else verdict.reward
        return Verdict(reward=reward, success=verdict.success, parts=parts)
