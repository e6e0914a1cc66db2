"""Adapter to MCP tool servers: the tools are the server's, the tasks and the reward are yours.

    [environment]
    name = "mcp"
    options = { server = ["python", "pantry_server.py"], job = "pantry_job.py:Pantry" }

`server` is a command (stdio) or an address (`"http://127.0.0.1:8000/mcp"`, streamable HTTP). `job`
is a subclass of `McpJob`. With a command every episode has a process of its own, which ends with
ours, however that ends; with an address all episodes share the server: let `start` make a world
there and put its handle into `episode.fixed`. `connection` says otherwise: one for each "episode"
(of a command), for each "instance" of this class, which `start` must bring back to its beginning,
or one for all of this "process" (of an address).

The policy writes `{"name": "take", "arguments": {"item": "salt"}}`, optionally in `<tool_call>`
tags, and ends with `finish`. What a tool reports as an error, unknown tools and wrong arguments
come back as observations; a server that fails, dies or is silent is an infrastructure fault.
"""

import asyncio
import difflib
import inspect
import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loopwright.envs.actions import Call, Fault, render_action
from loopwright.envs.adapters import foreign
from loopwright.envs.adapters.mcp_session import Answer, Server, Session
from loopwright.envs.protocol import (
    EnvError,
    EnvSpec,
    Message,
    Observation,
    Step,
    Task,
    Verdict,
)
from loopwright.envs.registry import object_at
from loopwright.envs.remote.plain import task_from

NAME = "mcp"
CONNECTIONS = ("episode", "instance", "process")
SUCCESS_REWARD = 0.999
_NO_NAME = re.compile(r"[^a-zA-Z0-9_-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A call of the policy and what came of it."""

    call: Call
    answer: Answer


@dataclass(slots=True, kw_only=True)
class McpEpisode:
    """What a job sees of the live episode."""

    task: Task
    session: Session
    calls: list[Made] = field(default_factory=list)  # of the policy, `finish` not among them
    answer: str | None = None  # what it gave to `finish`; None before
    # arguments added to every call of the policy and left out of what it sees of the tools
    fixed: dict[str, Any] = field(default_factory=dict)

    async def call(self, name: str, **arguments: Any) -> str:
        """Call a tool unseen by the policy. Raises `EnvError` if the tool reports an error."""
        answer = await self.session.call(name, arguments)
        if answer.failed:
            raise EnvError(f"mcp {name}({arguments}) failed: {answer.text}")
        return answer.text


class McpJob(ABC):
    """Tasks on a server and their grade; subclass it. `name` and `version` go into the record."""

    name = "job"
    version = "0"
    description = "Tasks on an MCP server."
    max_turns = 10
    deterministic = True

    @abstractmethod
    def tasks(self, split: str, seed: int) -> Iterator[Mapping[str, Any]]:
        """Tasks as `{"id", "seed", "scenario"}`, with `difficulty` and `payload` if they have any;
        "train" and "test" must be disjoint."""

    @abstractmethod
    async def start(self, episode: McpEpisode) -> str:
        """Prepare the server; the instruction."""

    @abstractmethod
    async def reward(self, episode: McpEpisode) -> float | Mapping[str, float]:
        """The grade now, 0 … 1, or its parts, whose mean it is. Must change nothing."""

    def solve(self, episode: McpEpisode) -> Iterator[Call]:
        """The oracle's calls, drawn one at a time; a last one of `finish` may carry an answer."""
        return iter(())


class McpTools:
    """An MCP server as an environment; implements `Env` and `TaskSource`."""

    _tried: ClassVar[set[Server]] = set()  # those that an instance of this process has reached
    _shared: ClassVar[dict[Server, Session]] = {}  # with connection = "process"
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        server: str | Sequence[str],
        job: str,
        job_options: Mapping[str, Any] | None = None,
        tools: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        folder: str = "",
        token_env: str = "",
        connection: str = "",
        finish: str = "finish",
        call_timeout_s: float = 60.0,
    ) -> None:
        """`tools` are those the policy sees (default: all). The first instance connects at once."""
        made = object_at(job, "mcp job")
        if not isinstance(made, type) or not issubclass(made, McpJob):
            raise EnvError(f"mcp job {job}: {made!r} is no subclass of McpJob")
        self._job: McpJob = made(**dict(job_options or {}))
        self._server = Server(
            url=server if isinstance(server, str) else "",
            command=() if isinstance(server, str) else tuple(map(str, server)),
            variables=tuple((variables or {}).items()),
            folder=folder,
            token_env=token_env,
        )
        self._connection = connection or ("process" if self._server.url else "episode")
        if self._connection not in CONNECTIONS:
            raise EnvError(f"mcp connection {connection!r}: must be {' or '.join(CONNECTIONS)}")
        self._wanted, self._finish = tuple(tools), finish
        self._timeout_s = call_timeout_s
        self._session: Session | None = None
        self._used = False  # an episode has been played in the session
        self._episode: McpEpisode | None = None
        self._tools: Mapping[str, Any] = {}
        self.spec = EnvSpec(
            name=NAME,
            version=f"{self._job.name}.{self._job.version}",
            description=f"{self._job.description} Server: {self._server}",
            max_turns=self._job.max_turns,
            deterministic=self._job.deterministic,
            license="unknown",
        )
        if self._server not in McpTools._tried:
            self._connect()
            McpTools._tried.add(self._server)

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The job's stream."""
        foreign.check_split("mcp", split)
        for data in self._job.tasks(split, seed):
            yield task_from(data, NAME, split, "mcp job: tasks")

    async def reset(self, task: Task) -> Observation:
        """Connect, let the job prepare the server; the instruction and the tools."""
        fresh = self._used and self._connection == "episode"
        if self._session is None or self._session.broken or fresh:
            await asyncio.to_thread(self._connect)
        assert self._session is not None
        self._used = True
        self._episode = McpEpisode(task=task, session=self._session)
        instruction = await self._job.start(self._episode)
        hidden = set(self._episode.fixed)
        shown = [_schema(name, tool, hidden) for name, tool in self._tools.items()]
        user = Message(role="user", content=instruction)
        return Observation(messages=(user,), tools=(*shown, foreign.finishing(self._finish)))

    async def step(self, action: str) -> Step:
        """One tool call. Raises `RemoteError` for a fault of the server."""
        episode = self._live()
        if episode.answer is not None:
            return Step(observation=Observation(messages=()), terminated=True)
        call = foreign.tool_call(action)
        if isinstance(call, Fault):
            return foreign.no_call(call)
        if call.name == self._finish:
            episode.answer = str(call.arguments.get("answer", ""))
            return Step(observation=Observation(messages=()), terminated=True)
        tool = self._tools.get(call.name)
        if tool is None:
            near = difflib.get_close_matches(call.name[:60], [*self._tools, self._finish], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._tools)}"
            return foreign.reply(f"error: there is no such tool; {hint}", "tool_error/unknown_tool")
        answer = await episode.session.call(tool.name, {**call.arguments, **episode.fixed})
        episode.calls.append(Made(call=call, answer=answer))
        return foreign.reply(answer.text, "tool_error/failed" if answer.failed else "")

    async def evaluate(self) -> Verdict:
        """The job's grade."""
        graded = await self._job.reward(self._live())
        parts = dict(graded) if isinstance(graded, Mapping) else {"reward": float(graded)}
        reward = sum(parts.values()) / len(parts)
        return Verdict(reward=reward, success=reward >= SUCCESS_REWARD, parts=parts)

    def oracle(self) -> Iterator[str]:
        """The job's oracle, and `finish`; nothing if it has none."""
        name = ""
        for call in self._job.solve(self._live()):
            name = call.name
            yield render_action(call, "json")
        if name not in ("", self._finish):
            yield render_action(Call(name=self._finish), "json")

    async def close(self) -> None:
        """End the connection, if it is this instance's own. Idempotent."""
        self._episode = None
        if self._session is not None and self._connection != "process":
            await asyncio.to_thread(self._session.close)
        self._session = None

    def _live(self) -> McpEpisode:
        if self._episode is None:
            raise RuntimeError("mcp: no live task; call reset(task) first")
        return self._episode

    def _connect(self) -> None:
        """A connection for the next episode. Raises `RemoteError`."""
        self._used = False
        if self._connection == "process":
            with McpTools._guard:
                self._session = McpTools._shared.get(self._server)
                if self._session is None or self._session.broken:
                    self._session = Session(self._server, self._timeout_s)
                McpTools._shared[self._server] = self._session
        else:
            if self._session is not None:
                self._session.close()
            self._session = None  # also where the next line raises
            self._session = Session(self._server, self._timeout_s)
            weakref.finalize(self, self._session.end)  # also where nobody closes
        self._offer(self._session)

    def _offer(self, session: Session) -> None:
        """Which tools the policy sees. Raises `EnvError` where they do not fit."""
        offered = {_NO_NAME.sub("_", tool.name)[:64]: tool for tool in session.tools}
        names = [_NO_NAME.sub("_", name)[:64] for name in self._wanted] or list(offered)
        for name in names:
            if name not in offered:
                raise foreign.unknown(f"mcp {self._server}: tool", name, offered)
        if self._finish in names or not names:
            raise EnvError(
                f"mcp {self._server}: it has no tools"
                if not names
                else f"mcp {self._server}: it has a tool {self._finish!r}; set options.finish"
            )
        self._tools = {name: offered[name] for name in names}


def _schema(name: str, tool: Any, hidden: set[str]) -> dict[str, Any]:
    """A tool in OpenAI's form, without hidden arguments."""
    given = dict(tool.input_schema)
    given["properties"] = {k: v for k, v in given.get("properties", {}).items() if k not in hidden}
    if "required" in given:
        given["required"] = [key for key in given["required"] if key not in hidden]
    description = inspect.cleandoc(tool.description or tool.title or name)
    function = {"name": name, "description": description, "parameters": given}
    return {"type": "function", "function": function}
