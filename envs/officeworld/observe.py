"""How the world speaks: the system message, results and errors, in two styles.

`compact` is for tiny policies trained from scratch: a few hundred words, results as bare values.
`full` is for language models: sentences and JSON.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from loopwright.envs.actions import ActionFormat, Call, Fault, render_action
from loopwright.envs.officeworld.api import ApiError, App

Style = Literal["compact", "full"]
MAX_ECHO_CHARS = 24  # of the policy's own text in an error


def system_message(style: Style, action_format: ActionFormat, apps: Mapping[str, App]) -> str:
    """The rules of the game."""
    if style == "compact":
        return "use docs"
    example = render_action(
        Call(name="docs.show", arguments={"api": "payments.send"}), action_format
    )
    finish = render_action(Call(name="done"), action_format)
    answer = render_action(Call(name="done", arguments={"answer": 42}), action_format)
    listing = "\n".join(f"- {app.name}: {app.doc}" for app in apps.values())
    return (
        "You do office work for your user through the APIs of these apps:\n"
        f"{listing}\n"
        "Write exactly one API call per turn and nothing else after your thoughts. Parameter names "
        "differ from office to office, so look an API up before you use it: docs.apps lists the "
        "apps, docs.list the APIs of an app, docs.show the parameters of an API. A call looks like "
        f"this:\n{example}\n"
        "People, events, messages and requests are referred to by their ids, which you find in "
        "the apps. Change nothing that you were not asked to change. If a call fails, read the "
        "error and try again.\n"
        f"When the task is complete, finish with {finish}, or, if it is a question, with {answer}."
    )


def result_text(style: Style, api: str, value: Any) -> str:
    """What a call that worked gives back."""
    if style == "full":
        return json.dumps({"status": "ok"} if value is None else value)
    if api == "docs.show":
        return f"{value['api']}({', '.join(p['name'] for p in value['params'])})"
    return _compact(value)


def _compact(value: Any) -> str:
    if value is None:
        return "ok"
    if isinstance(value, list):
        return " ; ".join(_compact(item) for item in value) or "none"
    if isinstance(value, dict) and "items" in value:
        more = "" if value["next"] is None else f" ; next {value['next']}"
        return _compact(value["items"]) + more
    if isinstance(value, dict):
        return " ".join(_compact(v) for k, v in value.items() if k != "doc")
    return str(value)


def echo(text: str) -> str:
    """A short, printable, encodable piece of the policy's own text."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_ECHO_CHARS])


def error_text(style: Style, error: ApiError) -> str:
    """What a call that failed gives back."""
    if style == "full":
        message = f"{error.detail}" + (f" (argument: {echo(error.name)})" if error.name else "")
        return json.dumps({"error": {"code": error.category, "message": message}})
    name = f" {echo(error.name)}" if error.name else ""
    return f"error {error.category.replace('_', ' ')}{name}"


def fault_text(style: Style, fault: Fault) -> str:
    """What text that is no action gives back."""
    if style == "full":
        return json.dumps({"error": {"code": fault.category, "message": fault.hint}})
    return "error one call"
