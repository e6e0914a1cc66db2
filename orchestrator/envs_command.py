"""`loopwright envs`: list, describe, check, serve and begin an environment, and play it by hand or
let its oracle play."""

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from loopwright.envs import conformance, registry
from loopwright.envs.protocol import Env, EnvError, Message, Task, TaskSource, Verdict
from loopwright.orchestrator import envs_new
from loopwright.orchestrator.faults import Refused, RunError

ABOUT = """Environments: what there is, and what an episode looks like.

  loopwright envs list
  loopwright envs describe officeworld
  loopwright envs play officeworld --task 3      you are the policy: type actions, see the replies
  loopwright envs play officeworld --oracle      watch the oracle solve it
  loopwright envs play officeworld --option style=full --option action_format=code
  loopwright envs new my_world                   a working package of your own to start from
  loopwright envs check my_package.world:World   run the conformance kit on your own
  loopwright envs serve officeworld              play it elsewhere: environment.name = "http://..."

NAME is a registered name, `module:Class`, `path/to/file.py:Class`, or the address of a server."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loopwright envs`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every environment known here")
    new = actions.add_parser("new", help="write a working plugin package, with a test")
    new.add_argument("name", metavar="NAME", help="lower-case letters, digits and _")
    new.add_argument("--in", dest="parent", type=Path, default=Path(), metavar="DIR", help="where")
    for name, help_text in (
        ("describe", "what it is, its budgets, and one task as the policy sees it"),
        ("play", "play one task in this terminal"),
        ("check", "run the conformance kit; exit code 1 if it finds something"),
        ("serve", "answer other machines' workers over HTTP"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("name", metavar="NAME", help="environment")
        action.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="an option of the environment (repeatable), e.g. style=full",
        )
        if name == "serve":
            _served(action)
            continue
        if name == "check":
            _checked(action)
            continue
        action.add_argument(
            "--split", default="test", choices=("train", "test"), help="default: test"
        )
        action.add_argument(
            "--task", type=int, default=0, metavar="N", help="which task of the split, from 0"
        )
        action.add_argument("--seed", type=int, default=0, help="seed of the stream of tasks")
        if name == "play":
            action.add_argument("--oracle", action="store_true", help="let the oracle play")


def execute(arguments: argparse.Namespace) -> int:
    """Run the action; its exit code."""
    if arguments.action == "list":
        for listing in registry.list_environments():
            print(f"{listing.name:20} {listing.target}  ({listing.origin})")
        return 0
    if arguments.action == "new":
        folder = envs_new.create(arguments.name, arguments.parent)
        print(f"{folder} is a package that works as it is; its README.md says how to go on")
        return 0
    options = _options(arguments.option)
    if arguments.action == "serve":
        return _serve(arguments, options)
    if arguments.action == "check":
        return _check(arguments, options)
    env = _load(arguments.name, options)
    task = _task(env, arguments)
    if arguments.action == "describe":
        asyncio.run(_describe(env, task))
    else:
        asyncio.run(_play(env, task, oracle=arguments.oracle))
    return 0


def _served(action: argparse.ArgumentParser) -> None:
    action.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    action.add_argument("--port", type=int, default=8790, help="0: any free one; default: 8790")
    action.add_argument(
        "--sessions", type=int, default=256, metavar="N", help="open at the same time, at most"
    )


def _load(name: str, options: dict[str, Any]) -> registry.Environment:
    """Raises `Refused` for what cannot be loaded as asked."""
    try:
        return registry.load(name, options)
    except (EnvError, ImportError) as error:
        raise Refused(str(error)) from error
    except Exception as error:  # the constructor is plugin code
        raise Refused(
            f"{name}: its constructor raised {type(error).__name__}: {error} (--option {options})"
        ) from error


def _checked(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--quick", action="store_true", help="fewer episodes: finds gross leaks only"
    )
    action.add_argument("--tasks", type=int, default=3, metavar="N", help="of each split")
    action.add_argument("--seed", type=int, default=0, help="seed of the stream of tasks")


def _serve(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    from aiohttp import web

    from loopwright.envs.remote.http_env import TOKEN_VARIABLE
    from loopwright.envs.remote.server import EnvServer

    token = os.environ.get(TOKEN_VARIABLE, "")
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise Refused(
            f"--host {arguments.host}: others could reach it, so it must ask for a token: set "
            f"{TOKEN_VARIABLE} here, and to the same value where workers run"
        )
    asyncio.run(_load(arguments.name, options).close())
    server = EnvServer(
        lambda: registry.load(arguments.name, options),
        token=token,
        max_sessions=arguments.sessions,
    )
    with socket.create_server((arguments.host, arguments.port)) as listening:
        host, port = listening.getsockname()[:2]
        print(f"{arguments.name} is served at http://{host}:{port}; Ctrl-C ends it", flush=True)
        web.run_app(server.app(), sock=listening, print=None, access_log=None)
    return 0


def _options(texts: Iterable[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RunError(f"--option {text!r}: expected KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _task(env: Env, arguments: argparse.Namespace) -> Task:
    if not isinstance(env, TaskSource):
        raise RunError(f"{arguments.name} has no tasks(split, seed)")
    found = list(
        islice(env.tasks(arguments.split, arguments.seed), arguments.task, arguments.task + 1)
    )
    if not found:
        raise RunError(
            f"{arguments.name}: the {arguments.split} split has fewer than {arguments.task + 1} "
            "tasks"
        )
    return found[0]


async def _describe(env: Env, task: Task) -> None:
    spec = env.spec
    print(f"{spec.name} {spec.version}\n{spec.description}")
    print(
        f"budget: {spec.max_turns} turns · deterministic: {spec.deterministic} · "
        f"license: {spec.license}"
    )
    print(f"\ntask {task.id} (scenario {task.scenario}, difficulty {task.difficulty}):")
    observation = await env.reset(task)
    _show(observation.messages)
    for tool in observation.tools:
        print(f"  tool {tool.get('function', tool).get('name')}")
    await env.close()


async def _play(env: Env, task: Task, *, oracle: bool) -> None:
    observation = await env.reset(task)
    print(f"task {task.id} (scenario {task.scenario}, difficulty {task.difficulty})")
    _show(observation.messages)
    actions = env.oracle() if oracle else _typed()
    turns = 0
    for action in actions:
        if oracle:
            print(f"[assistant] {action}")
        step = await env.step(action)
        turns += 1
        _show(step.observation.messages)
        for signal in step.signals:
            print(f"  ({signal})")
        if step.terminated or turns >= env.spec.max_turns:
            break
    _grade(await env.evaluate(), turns)
    await env.close()


def _typed() -> Iterator[str]:
    """What a person types: a line a turn, or several lines between ``` and ```; an empty line or
    end of input gives up."""
    print(
        "Type an action a line; ``` begins an action of several lines, and ends it. "
        "An empty line ends the episode."
    )
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield _block(line) if line.startswith("```") else line


def _block(first: str) -> str:
    """The lines from a fence to the next one, both included."""
    lines = [first]
    while line := sys.stdin.readline():
        lines.append(line.rstrip("\n"))
        if lines[-1].strip() == "```":
            break
        print("… ", end="", flush=True)
    return "\n".join(lines)


def _show(messages: Iterable[Message]) -> None:
    for message in messages:
        print(f"[{message.role}] {message.content}")


def _grade(verdict: Verdict, turns: int) -> None:
    outcome = "solved" if verdict.success else "not solved"
    print(f"\nreward {verdict.reward:.3f} after {turns} turns: {outcome}")
    for name, value in verdict.parts.items():
        print(f"  {value:6.3f}  {name}")


def _check(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    asyncio.run(_load(arguments.name, options).close())  # what does not load is no finding
    report = asyncio.run(
        conformance.examine(
            lambda: registry.load(arguments.name, options),
            tasks_per_split=arguments.tasks,
            seed=arguments.seed,
            full=not arguments.quick,
        )
    )
    for rule, findings in groupby(report.findings, key=lambda finding: finding.rule):
        for finding in findings:
            print(finding)
        print(f"  which asks: {conformance.explain(rule)}")
    count = len(report.findings)
    outcome = "conforms" if not count else f"{count} finding{'s' if count > 1 else ''}"
    print(f"{arguments.name}: {outcome}" + (f" · {report.figures}" if report.figures else ""))
    return 1 if count else 0
