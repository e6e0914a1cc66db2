"""Adapter to tasksets of verifiers v1 (0.4): its tasks, tools and rewards, our policy.

    [environment]
    name = "verifiers"
    options = { taskset = "my_tasks", python = "/opt/vf/bin/python", answer_field = "answer" }

The package pins versions that clash with ours, so it plays in an interpreter of its own, which may
also come from `LOOPWRIGHT_VERIFIERS_PYTHON` and must have the taskset installed. A rollout of
verifiers owns its loop; its model requests are answered with our turns, and what comes with the
next request is the observation. Calls of tools are written in `<tool_call>` tags; a turn without
one ends the task, as in the package's own chat harness. Reward is the taskset's, 0 if a budget ends
the episode first.
"""

from collections.abc import Mapping
from typing import Any

from loopwright.envs.adapters import foreign
from loopwright.envs.remote import ProcessEnv


class Verifiers(ProcessEnv):
    """One session: one rollout at a time."""

    def __init__(
        self,
        taskset: str,
        config: Mapping[str, Any] | None = None,
        max_tasks: int = 1000,
        answer_field: str = "",
        max_turns: int = 10,
        python: str = "",
        sessions: int = 64,
        call_timeout_s: float = 120.0,
    ) -> None:
        """`taskset` is the id of an installed one, `config` its configuration, of which the first
        `max_tasks` tasks are used, every fourth held out; `answer_field` names the field of a
        task's data that the oracle says; `sessions` share a process."""
        options = {
            "taskset": taskset,
            "config": dict(config or {}),
            "max_tasks": max_tasks,
            "answer_field": answer_field,
            "max_turns": max_turns,
        }
        super().__init__(
            target=foreign.far_side("verifiers_world.py"),
            python=foreign.interpreter("verifiers", python),
            options=options,
            sessions=sessions,
            call_timeout_s=call_timeout_s,
        )
