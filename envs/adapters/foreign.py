"""What every adapter does the same way: import its package or name the command that installs it,
find the interpreter that has it, suggest what was meant, read tool calls, and divide tasks by their
content."""

import difflib
import importlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Protocol

from loopwright.envs.actions import Call, Fault, parse_action
from loopwright.envs.protocol import EnvError, Message, Observation, Step

SPLITS = ("train", "test")
MAX_REDRAWS = 1000  # openings drawn in a row that all belong to the other split


def imported(module: str, environment: str, extra: str) -> Any:
    """A module of an optional package. Raises `ImportError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the environment {environment} needs a package that is not installed ({error}); "
            f"remedy: pip install 'loopwright[{extra}]'"
        ) from error


def interpreter(environment: str, chosen: str) -> str:
    """The Python that has a foreign package: the one chosen, or of `LOOPWRIGHT_<NAME>_PYTHON`, or
    ours."""
    variable = f"LOOPWRIGHT_{environment.upper()}_PYTHON"
    return chosen or os.environ.get(variable) or sys.executable


def far_side(file: str) -> str:
    """A world of the folder `far`, as `ProcessEnv` takes it."""
    return f"{Path(__file__).with_name('far') / file}:World"


def tool_call(text: str) -> Call | Fault:
    """The call in a turn, if it can travel as JSON: half a surrogate pair cannot."""
    call = parse_action(text, "json")
    if isinstance(call, Fault):
        return call
    try:
        json.dumps([call.name, dict(call.arguments)], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return Fault(category="parse", hint="arguments must be JSON")
    return call


def reply(text: str, signal: str = "", role: str = "tool") -> Step:
    """A step that says something, and counts it."""
    message = Message(role=role, content=text)
    return Step(observation=Observation(messages=(message,)), signals={signal: 1} if signal else {})


def no_call(fault: Fault) -> Step:
    """The step of a turn that holds no call."""
    hint = 'write one call: {"name": "…", "arguments": {…}}'
    return reply(f"error: {hint}", f"policy_fault/{fault.category}")


def finishing(name: str) -> dict[str, Any]:
    """The tool that ends an episode, in OpenAI's form."""
    answer = {"type": "string", "description": "the answer, if the task is a question"}
    parameters = {"type": "object", "properties": {"answer": answer}}
    function = {"name": name, "description": "End the task, when it is complete."}
    return {"type": "function", "function": {**function, "parameters": parameters}}


def unknown(what: str, name: str, known: Iterable[str]) -> EnvError:
    """The error for a name that is none of `known`, with the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(names[:12])}"
    return EnvError(
        f"{what} {name!r}: unknown; {hint}{' …' if len(names) > 12 > len(near) else ''}"
    )


def check_split(environment: str, split: str) -> None:
    """Raise `EnvError` for a split that does not exist."""
    if split not in SPLITS:
        raise EnvError(f"{environment} split {split!r}: must be 'train' or 'test'")


def content_hash(text: str) -> int:
    """A hash of what a task asks, the same in every process."""
    return zlib.crc32(text.encode(errors="surrogatepass"))


def split_of(text: str) -> str:
    """The split that a content belongs to: a quarter is held out. Tasks that read alike are never
    in both."""
    return "test" if content_hash(text) % 4 == 0 else "train"


class Draw(Protocol):
    """One draw of a task: where it comes from, and what it asks."""

    def __call__(self, rng: Random) -> tuple[Mapping[str, Any], str]:
        """What tells the task apart for its environment, and its content as text."""
        ...


def drawn_for(
    split: str, seed: int, where: str, draw: Draw, *, remedy: str = ""
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """An endless stream of draws whose content belongs to the split. Raises `EnvError` where a
    thousand draws in a row do not."""
    check_split(where, split)
    rng = Random(f"tasks/{split}/{seed}")
    redraws = 0
    while redraws < MAX_REDRAWS:
        origin, content = draw(rng)
        if split_of(content) == split:
            redraws = 0
            yield origin, content
        else:
            redraws += 1
    raise EnvError(
        f"{where}: no {split} task in {MAX_REDRAWS} draws: it has too few different ones{remedy}"
    )
