"""Reading a configuration: file, `--set` overrides, schema; all problems are reported at once."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from loopwright.configs.rules import Contradictions, Problem, doubts
from loopwright.configs.schema import Config

PRESETS = Path(__file__).resolve().parent
_HEADER = re.compile(r"^\s*\[\s*([A-Za-z0-9_.\- \"']+?)\s*\]\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.\-\"']+(?:\s*\.\s*[A-Za-z0-9_\-\"']+)*)\s*=")


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` holds everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"configuration: {count}", *map(_sentence, problems)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked configuration and where each value came from."""

    config: Config
    origins: Mapping[str, str]  # dotted key -> "default", "file:line" or "--set"
    warnings: tuple[str, ...]  # legal and rarely meant


def _sentence(problem: Problem) -> str:
    where = f" ({problem.where})" if problem.where else ""
    value = "" if problem.value is None else f" = {problem.value!r}"
    nearest = f"; did you mean {problem.nearest}?" if problem.nearest else ""
    key = f"{problem.key}{value}{where}: " if problem.key else ""
    return f"  {key}expected {problem.expected}{nearest}"


def _tables() -> dict[str, type[BaseModel]]:
    return {
        name: info.annotation
        for name, info in Config.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }


def fields() -> dict[str, FieldInfo]:
    """Every dotted key with its field, in the order of the schema."""
    return {
        f"{table}.{name}": info
        for table, model in _tables().items()
        for name, info in model.model_fields.items()
    }


def presets() -> dict[str, Path]:
    """The presets that ship with Loopwright, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}


def find(path: str | Path) -> Path:
    """The file that `path` means: a path, or the name of a preset. Raises `ConfigError`."""
    if Path(path).is_file():
        return Path(path)
    shipped = presets()
    if str(path) in shipped:
        return shipped[str(path)]
    nearest = difflib.get_close_matches(Path(path).stem, shipped, n=1)
    expected = f"a TOML file or a preset ({', '.join(shipped) or 'none ship'}); {path} is neither"
    raise ConfigError([Problem(key="", expected=expected, nearest=nearest[0] if nearest else "")])


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line of `text`, 1-based; by headers and keys, as tomllib gives no positions."""
    lines: dict[str, int] = {}
    prefix, quote = "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        if quote:  # inside a multi-line string: nothing here is a key
            quote = "" if quote in line else quote
            continue
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            prefix = _plain(header[1]) + "."
            lines.setdefault(prefix[:-1], number)
        elif key:
            lines.setdefault(prefix + _plain(key[1]), number)
        opened = [q for q in ('"""', "'''") if line.count(q) % 2]
        quote = opened[0] if opened else ""
    return lines


def _plain(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The parsed file and "file:line" of every key in it."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problem = Problem(key="", expected=f"a readable TOML file, found: {error} ({path})")
        raise ConfigError([problem]) from error
    return data, {key: f"{path}:{line}" for key, line in _line_numbers(text).items()}


def _override(data: dict[str, Any], text: str) -> str:
    """Put one `a.b=value` into `data`; the dotted key. Raises `ConfigError` if it has another
    form."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        expected = f"--set table.key=value, found {text!r}"
        raise ConfigError([Problem(key="", expected=expected)])
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string: --set rollout.engine=vllm
    table = data
    for part in parts[:-1]:
        below = table.get(part)
        table[part] = dict(below) if isinstance(below, Mapping) else {}
        table = table[part]
    table[parts[-1]] = value
    return ".".join(parts)


def _where(key: str, found: Mapping[str, str]) -> str:
    """The place of `key`, or of the nearest table above it."""
    while key and key not in found:
        key = key.rpartition(".")[0]
    return found.get(key, "")


def _nearest(key: str) -> str:
    """The valid key or table that an unknown `key` was probably meant to be."""
    known, (table, _, name) = list(fields()), key.partition(".")
    if not name:
        return next(iter(difflib.get_close_matches(key, _tables(), n=1)), "")
    same_name = [k for k in known if k.partition(".")[2] == name]
    siblings = [k.partition(".")[2] for k in known if k.startswith(f"{table}.")]
    close = [f"{table}.{n}" for n in difflib.get_close_matches(name, siblings, n=1)]
    far = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    by_table = [k for k in same_name if difflib.get_close_matches(table, [k.partition(".")[0]])]
    return next(iter([*by_table, *close, *same_name, *far]), "")


def _field_problem(error: Mapping[str, Any]) -> Problem:
    """One complaint of pydantic in our words."""
    loc = [str(part) for part in error["loc"]]
    key, kind, value = ".".join(loc), error["type"], error["input"]
    if kind == "extra_forbidden":
        what = "table" if len(loc) == 1 else "key"
        return Problem(key=key, value=value, expected=f"no such {what}", nearest=_nearest(key))
    if kind == "missing":
        info = fields().get(key)
        what = f" ({info.description})" if info is not None else ""
        return Problem(key=key, expected=f"a value: it has no default{what}")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        close = difflib.get_close_matches(str(value), allowed, n=1)
        expected = "one of " + ", ".join(map(repr, allowed))
        return Problem(
            key=key, value=value, expected=expected, nearest=repr(close[0]) if close else ""
        )
    if kind == "value_error":
        return Problem(key=key, value=value, expected=str(error["ctx"]["error"]))
    message = str(error["msg"]).removeprefix("Input should be ").removeprefix("Input should ")
    return Problem(key=key, value=value, expected=message)


def _validate(data: dict[str, Any]) -> Config:
    """The checked configuration, or `Contradictions` with every problem there is.

    Keys may be wrong one by one and also together. Where some are wrong one by one, the rest is
    checked together with defaults in their place, so that a second run does not bring a second set
    of errors.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems: list[Problem] = []
        for detail in error.errors():
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, Contradictions):
                raise cause from error
            problems.append(_field_problem(dict(detail)))
        bad = [tuple(map(str, detail["loc"][:2])) for detail in error.errors()]
    rest = {
        table: {k: v for k, v in values.items() if (table, k) not in bad}
        for table, values in data.items()
        if isinstance(values, Mapping) and (table,) not in bad
    }
    for required in ("run", "environment"):
        rest[required] = {"name": "unnamed", **rest.get(required, {})}
    try:
        Config.model_validate(rest)
    except ValidationError as error:
        causes = [d.get("ctx", {}).get("error") for d in error.errors()]
        for cause in causes:
            problems += cause.problems if isinstance(cause, Contradictions) else []
    raise Contradictions(problems)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read `path` (a file or the name of a preset), apply `table.key=value` overrides, check
    everything.

    Raises:
        ConfigError: with every problem at once: key, value, what was expected, nearest name, place.
    """
    file = find(path)
    data, found = _read(file)
    malformed: list[Problem] = []
    for text in overrides:
        try:
            found[_override(data, text)] = "--set"
        except ConfigError as error:
            malformed += error.problems
    try:
        config = _validate(data)
    except Contradictions as error:
        placed = [replace(p, where=_where(p.key, found)) for p in error.problems]
        raise ConfigError([*malformed, *placed]) from error
    if malformed:
        raise ConfigError(malformed)
    origins = {key: _origin(key, data, found) for key in fields()}
    return Loaded(config=config, origins=origins, warnings=tuple(doubts(config)))


def _origin(key: str, data: Mapping[str, Any], found: Mapping[str, str]) -> str:
    table, _, name = key.partition(".")
    if name not in data.get(table, {}):
        return "default"
    places = [found[k] for k in found if k == key or k.startswith(f"{key}.")]
    return "--set" if "--set" in places else (places[0] if places else _where(key, found))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)  # int, float and TOML's dates print as TOML reads them


def render(loaded: Loaded, *, explain: bool = False) -> str:
    """Every effective value and where it came from, as TOML that `load` reads back to the same
    values.

    With `explain`, the meaning of each key stands above it.
    """
    lines: list[str] = []
    for table, model in _tables().items():
        lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        for name, info in model.model_fields.items():
            lines += [f"# {info.description}"] if explain else []
            setting = f"{name} = {_toml(getattr(getattr(loaded.config, table), name))}"
            lines.append(f"{setting:<40}  # {loaded.origins[f'{table}.{name}']}")
    return "\n".join(lines) + "\n"
