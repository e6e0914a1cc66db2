"""The oracle's calls as Python cells: one cell per phase (documentation, passwords, logins and
reading, acting), access tokens kept in variables."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from loopwright.envs.officeworld.edition import OracleCall
from loopwright.envs.officeworld.full.oracle import TokenOf

_CELL_OF = {"docs": 0, "password": 1, "login": 2, "read": 2, "write": 3}


def render_cells(calls: Sequence[OracleCall]) -> Iterator[str]:
    """Fenced cells that make the calls in their order."""
    for _, found in groupby(calls, key=lambda step: _CELL_OF[step.phase]):
        lines = "\n".join(_line(step) for step in found)
        yield f"```python\n{lines}\n```"


def _line(step: OracleCall) -> str:
    arguments = ", ".join(f"{k}={_literal(v)}" for k, v in step.call.arguments.items())
    made = f"apis.{step.call.name}({arguments})"
    if step.token_of:
        return f'{step.token_of}_token = {made}["access_token"]'
    return made if step.phase == "write" else f"print({made})"


def _literal(value: Any) -> str:
    if isinstance(value, TokenOf):
        return f"{value.app}_token"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
