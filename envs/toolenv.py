"""The shortest way to write an environment: a class whose public methods are the tools.

    class Pantry(ToolEnv):
        name, version, description = "pantry", "1", "Find things on shelves."

        def tasks(self, split, seed): ...      # a stream of Task
        def start(self, task): ...             # set the world up; returns the instruction
        def reward(self): ...                  # 0 … 1, or named parts whose mean is the reward
        def solve(self): ...                   # optional: the oracle's calls

        def look(self, shelf: int) -> str:           # a tool
            '''What lies on a shelf.

            shelf: number of the shelf, from 1
            '''

Signatures and docstrings become OpenAI-style schemas; arguments are validated strictly, as JSON.
Raise `ToolError` for what the agent did wrong; any other exception is a fault of the environment.
The policy writes `{"name": "look", "arguments": {"shelf": 1}}`, optionally in `<tool_call>` tags,
and ends with `finish`.
"""

import difflib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from loopwright.envs.actions import Call, Fault, parse_action, render_action
from loopwright.envs.protocol import EnvError, EnvSpec, Message, Observation, Step, Task, Verdict

FINISH = "finish"
SUCCESS_REWARD = 0.999
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_PREFIX = "argument_"  # of model fields: a parameter may be called `json` or `copy`


class ToolError(Exception):
    """The agent's mistake: comes back as an observation and counts as `tool_error/<category>`."""

    def __init__(self, category: str, detail: str) -> None:
        super().__init__(detail)
        self.category = category


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One method as a tool."""

    name: str
    arguments: type[BaseModel]
    schema: Mapping[str, Any]  # OpenAI style


class ToolEnv(ABC):
    """Base of environments made of tools; implements `Env` and `TaskSource` for the subclass."""

    name = ""
    version = "0"
    description = ""
    max_turns = 10
    spec: EnvSpec
    _tools: Mapping[str, Tool] = MappingProxyType({})
    _finished: bool = False
    _answer: str = ""

    def __init_subclass__(cls) -> None:
        """Build the tool table once. Raises `EnvError` for a method that cannot be a tool."""
        if not cls.name or not cls.description:
            raise EnvError(f"{cls.__name__}: set `name` and `description` in the class body")
        methods = {
            name: value
            for name, value in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") and (name == FINISH or name not in dir(ToolEnv))
        }
        cls._tools = MappingProxyType({n: _tool(cls.__name__, n, m) for n, m in methods.items()})
        cls.spec = EnvSpec(
            name=cls.name,
            version=cls.version,
            description=cls.description,
            max_turns=cls.max_turns,
        )

    @abstractmethod
    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The stream of tasks; the splits "train" and "test" must be disjoint."""

    @abstractmethod
    def start(self, task: Task) -> str:
        """Set the world of this task up, whatever the last episode left; returns the
        instruction."""

    @abstractmethod
    def reward(self) -> float | Mapping[str, float]:
        """The grade of the world as it is now, or its parts. Must not change anything."""

    def solve(self) -> Iterator[Call]:
        """The oracle's calls, without the final `finish`, unless it needs an answer."""
        return iter(())

    def finish(self, answer: str = "") -> str:
        """End the task, when it is complete.

        answer: the answer, if the task is a question
        """
        self._finished, self._answer = True, answer
        return "finished"

    @property
    def answer(self) -> str:
        """What the policy gave to `finish`; empty before."""
        return self._answer

    async def reset(self, task: Task) -> Observation:
        """Start the task; the instruction and the schemas of all tools."""
        self._finished, self._answer = False, ""
        user = Message(role="user", content=self.start(task))
        return Observation(messages=(user,), tools=tuple(t.schema for t in self._tools.values()))

    async def step(self, action: str) -> Step:
        """Validate and run one tool call."""
        if self._finished:
            return Step(observation=Observation(messages=()), terminated=True)
        call = parse_action(action, "json")
        if isinstance(call, Fault):
            hint = 'write one call: {"name": "…", "arguments": {…}}'
            return _reply(f"error: {hint}", f"policy_fault/{call.category}")
        try:
            text = await self._invoke(call)
        except ToolError as error:
            return _reply(f"error ({error.category}): {error}", f"tool_error/{error.category}")
        if call.name == FINISH:
            return Step(observation=Observation(messages=()), terminated=True)
        return _reply(text)

    async def evaluate(self) -> Verdict:
        """`reward()`; parts are averaged. Success: at least 0.999."""
        graded = self.reward()
        parts = dict(graded) if isinstance(graded, Mapping) else {"reward": float(graded)}
        reward = sum(parts.values()) / len(parts)
        return Verdict(reward=reward, success=reward >= SUCCESS_REWARD, parts=parts)

    def oracle(self) -> Iterator[str]:
        """`solve()` as text, and `finish`; nothing if there is no oracle."""
        name = ""
        for call in self.solve():
            name = call.name
            yield render_action(call, "json")
        if name not in ("", FINISH):
            yield render_action(Call(name=FINISH), "json")

    async def close(self) -> None:
        """End the episode; override it to free what it holds."""
        self._finished = True

    async def _invoke(self, call: Call) -> str:
        tool = self._tools.get(call.name)
        if tool is None:
            near = difflib.get_close_matches(call.name[:60], self._tools, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._tools)}"
            raise ToolError("unknown_tool", f"there is no such tool; {hint}")
        try:
            checked = tool.arguments.model_validate_json(json.dumps(dict(call.arguments)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])).encode(errors="replace").decode()[:60]
            raise ToolError("bad_argument", f"{place}: {first['msg']}") from None
        values = {n.removeprefix(_PREFIX): v for n, v in dict(checked).items()}
        result = getattr(self, tool.name)(**values)
        if inspect.isawaitable(result):
            result = await result
        return result if isinstance(result, str) else json.dumps(result)


def _reply(text: str, signal: str | None = None) -> Step:
    message = Message(role="tool", content=text)
    return Step(observation=Observation(messages=(message,)), signals={signal: 1} if signal else {})


def _tool(owner: str, name: str, method: Any) -> Tool:
    """The tool of a method. Raises `EnvError` where a type or the docstring is missing."""
    summary, notes = _documentation(method)
    if not summary:
        raise EnvError(f"{owner}.{name}: a tool needs a docstring; or start its name with _")
    hints = get_type_hints(method)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.name not in hints or not named:
            raise EnvError(
                f"{owner}.{name}: parameter {parameter.name!r} must be named and have a type"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        field = Field(default, alias=parameter.name, description=notes.get(parameter.name))
        fields[_PREFIX + parameter.name] = (hints[parameter.name], field)
    arguments = create_model(name, __config__=_STRICT, **fields)
    schema = arguments.model_json_schema(by_alias=True)
    function = {"name": name, "description": summary, "parameters": _untitled(schema)}
    return Tool(name=name, arguments=arguments, schema={"type": "function", "function": function})


def _untitled(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without pydantic's generated titles, and never without `properties`."""
    properties = {
        name: {k: v for k, v in value.items() if k != "title"}
        for name, value in schema.get("properties", {}).items()
    }
    return {**{k: v for k, v in schema.items() if k != "title"}, "properties": properties}


def _documentation(method: Any) -> tuple[str, dict[str, str]]:
    """The docstring's text, and its lines `parameter: meaning`."""
    summary: list[str] = []
    notes: dict[str, str] = {}
    parameters = inspect.signature(method).parameters
    for line in (inspect.getdoc(method) or "").splitlines():
        name, colon, meaning = line.strip().partition(":")
        if colon and name in parameters:
            notes[name] = meaning.strip()
        elif line.strip():
            summary.append(line.strip())
    return " ".join(summary), notes
