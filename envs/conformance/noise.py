"""What a policy might write that knows nothing, and what one might write that means harm."""

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from loopwright.envs.protocol import Observation

_FIXED = (
    "",
    " \n\t",
    "x" * 100_000,
    "\x00\ud800\U0001f600 ﷽",
    "\u202e\u200b\ufeff" * 20,
    "{" * 500,
    "f(" * 500,
    "[" * 100_000,
    "9" * 5000,
    '{"name": 1}',
    '{"name": "a", "arguments": 3}',
    '{"name": "finish", "arguments": {"answer": ' + "[" * 300 + "]" * 300 + "}}",
    '{"name": "' + "a" * 3000 + '"}',
    "<tool_call>",
    "<answer></answer>",
    "<think>",
    "```python\nimport os; os._exit(1)\n```",
    "```python\nopen('/proc/self/environ').read()\n```",
    "```python\nraise SystemExit\n```",
    "__import__('os').system('true')",
    "().__class__.__base__.__subclasses__()",
    "'; DROP TABLE tasks; --",
    "%s%s%n {0.__class__} ${HOME} {{7*7}}",
)
_ALPHABET = "abc(){}[]<>=\"', .\\\n0123456789é你"
_TAGS = ("answer", "search", "think", "tool_call", "state", "move", "action")


def hostile(seed: str, count: int) -> list[str]:
    """The classics, then `count` random ones: odd characters, broken calls, nested JSON, tags."""
    rng = Random(seed)
    return [*_FIXED, *(_hostile(rng) for _ in range(count))]


def _hostile(rng: Random) -> str:
    text = "".join(rng.choices(_ALPHABET, k=rng.randrange(1, 80)))
    kind = rng.randrange(5)
    if kind == 0:
        tag = rng.choice(_TAGS)
        return f"<{tag}>{text}</{tag}>"
    if kind == 1:
        return json.dumps({"name": rng.choice([text, "finish", "a"]), "arguments": _nested(rng)})
    if kind == 2:
        whole = json.dumps({"name": text, "arguments": {"q": text}})
        return whole[: rng.randrange(len(whole))]
    if kind == 3:
        return f"```python\n{text}\n```"
    return text


def _nested(rng: Random) -> Any:
    value: Any = rng.choice(["x", 10**400, -1, 1e308, None, True, "\ud800"])
    for _ in range(rng.randint(1, 60)):
        value = [value] if rng.random() < 0.5 else {"k": value}
    return value


class RandomPolicy:
    """Acts at random: nonsense, calls of the tools that there are, and what was right for other
    tasks."""

    def __init__(self, seed: str, opening: Observation, elsewhere: Sequence[str]) -> None:
        self._rng = Random(seed)
        self._tools = [
            f for t in opening.tools if isinstance(f := t.get("function"), Mapping) and "name" in f
        ]
        self._elsewhere = elsewhere

    def act(self) -> str:
        """The next action."""
        kind = self._rng.random()
        if self._tools and kind < 0.6:
            tool = self._rng.choice(self._tools)
            arguments = self._arguments(tool.get("parameters"))
            return json.dumps({"name": tool["name"], "arguments": arguments})
        if self._elsewhere and kind < 0.75:
            return self._rng.choice(self._elsewhere)
        return _hostile(self._rng)

    def _arguments(self, schema: Any) -> dict[str, Any]:
        properties = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
        return {name: self._value(given) for name, given in properties.items()}

    def _value(self, schema: Any) -> Any:
        rng, found = self._rng, schema if isinstance(schema, Mapping) else {}
        if found.get("enum"):
            return rng.choice(found["enum"])
        kinds: Mapping[Any, Any] = {
            "integer": rng.choice([0, 1, 2, 5, 17, -1, 10**9]),
            "number": rng.choice([0.0, 0.5, -3.0]),
            "boolean": rng.random() < 0.5,
            "array": [],
            "object": {},
        }
        return kinds.get(str(found.get("type")), rng.choice(["", "a", "2030-01-01", "zz"]))
