"""From a name to an environment: built-in table, installed plugins, `module:Class`,
`file.py:Class`.

A plugin package registers itself under the entry point group `loopwright.environments`:

    [project.entry-points."loopwright.environments"]
    my_env = "my_package.environment:MyEnv"
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol, runtime_checkable

from loopwright.envs.program import Program, ProgramEnv
from loopwright.envs.protocol import Env, EnvError, TaskSource

ENTRY_POINT_GROUP = "loopwright.environments"
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "appworld": "loopwright.envs.adapters.appworld:AppWorld",
        "gymnasium": "loopwright.envs.adapters.gymnasium_text:GymnasiumText",
        "mcp": "loopwright.envs.adapters.mcp_tools:McpTools",
        "mix": "loopwright.envs.mix:Mix",
        "nemo_gym": "loopwright.envs.adapters.nemo_gym:NemoGym",
        "officeworld": "loopwright.envs.officeworld:OfficeWorld",
        "openenv": "loopwright.envs.adapters.openenv:OpenEnv",
        "process": "loopwright.envs.remote:ProcessEnv",
        "reasoning_gym": "loopwright.envs.adapters.reasoning_gym:ReasoningGym",
        "search": "loopwright.envs.search:Search",
        "verifiers": "loopwright.envs.adapters.verifiers:Verifiers",
    }
)


class RegistryError(EnvError):
    """No such environment, one that does not import, or options it does not take."""


@runtime_checkable
class Environment(Env, TaskSource, Protocol):
    """What `load` gives: an environment that also draws its tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One environment that can be loaded by name."""

    name: str
    target: str  # "module:Class"
    origin: str  # "built-in", or the package that registered it and its version


def list_environments() -> tuple[Listing, ...]:
    """All names `load` knows, sorted. Nothing is imported."""
    built_in = [Listing(name=n, target=t, origin="built-in") for n, t in BUILT_IN.items()]
    plugins = [
        Listing(name=point.name, target=point.value, origin=_package_of(point))
        for point in _points(tuple(sys.path))
        if point.name not in BUILT_IN
    ]
    return tuple(sorted((*built_in, *plugins), key=lambda listing: listing.name))


def load(name: str, options: Mapping[str, Any] | None = None) -> Environment:
    """A new instance of the environment `name`, constructed with `options`.

    `name` is one of `list_environments()`, `module:Class`, `path/to/file.py:Class`, or the address
    of a server (`loopwright envs serve`), `http://host:port`. Raises
    `RegistryError`; what the constructor itself raises (bad values, a missing extra) passes
    through.
    """
    if name.startswith(("http://", "https://")):
        return _at_address(name, dict(options or {}))
    target, origin = name, "given by name"
    if ":" not in name:
        listing = _listing(name)
        target, origin = listing.target, listing.origin
    environment = _class_at(target, origin)
    chosen = dict(options or {})
    _check_options(environment, target, chosen)
    instance = environment(**chosen)
    if isinstance(instance, Program):
        return ProgramEnv(instance)
    if not isinstance(instance, Environment):
        wanted = ("spec", "tasks", "reset", "step", "evaluate", "oracle", "close")
        missing = [member for member in wanted if member not in dir(instance)]
        raise RegistryError(f"{target} is no environment: it lacks {', '.join(missing)}")
    return instance


def _at_address(url: str, options: dict[str, Any]) -> Environment:
    from loopwright.envs.remote import HttpEnv

    _check_options(HttpEnv, url, options)
    return HttpEnv(url, **options)


def _listing(name: str) -> Listing:
    listings = {listing.name: listing for listing in list_environments()}
    if name in listings:
        return listings[name]
    near = difflib.get_close_matches(name, listings, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(listings)}"
    raise RegistryError(
        f"environment {name!r}: unknown; {hint} Also accepted: module:Class, "
        "path/to/file.py:Class, http://host:port"
    )


@lru_cache(maxsize=2)
def _points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What the packages on `path` (which is `sys.path`) register. Reading it takes as long as
    playing several episodes, and a worker loads as many environments as it plays at once."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _package_of(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a plugin"


def object_at(target: str, kind: str = "environment", origin: str = "given by name") -> Any:
    """What `module:name` or `path/to/file.py:name` means. Raises `RegistryError`, which calls it a
    `kind`."""
    place, _, name = target.rpartition(":")
    if not place:
        raise RegistryError(
            f"{kind} {target!r}: expected module:name or path/to/file.py:name ({origin})"
        )
    try:
        module = _from_file(Path(place), kind) if place.endswith(".py") else _import(place)
    except RegistryError:
        raise
    except Exception as error:
        raise RegistryError(
            f"{kind} {target} ({origin}) does not import: {error!r}\n{traceback.format_exc()}"
        ) from error
    if name not in vars(module):
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RegistryError(f"{kind} {target} ({origin}): no {name!r} there{hint}")
    return vars(module)[name]


def _class_at(target: str, origin: str) -> type[Any]:
    found = object_at(target, origin=origin)
    if not isinstance(found, type):
        raise RegistryError(f"environment {target} ({origin}): {found!r} is no class")
    return found


def _import(name: str) -> ModuleType:
    """Import a module; one that is nowhere else may lie in the current folder, which console
    scripts do not search. It comes last on the path, so that it shadows nothing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != name.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)
        importlib.invalidate_caches()
        return importlib.import_module(name)


def _from_file(path: Path, kind: str) -> ModuleType:
    """Import a file under a name of its own, so that it shadows nothing and nothing shadows it."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RegistryError(f"{kind} file {path}: there is no such file")
    name = f"loopwright_env_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RegistryError(f"{kind} file {path}: not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_options(environment: type[Any], target: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(environment).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            known = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
            hint = f"did you mean {near[0]!r}?" if near else known
            raise RegistryError(f"environment {target}: unknown option {option!r}; {hint}")
