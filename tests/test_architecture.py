"""The plan of the house as tests: who may import whom, what is heavy, names, sizes, packages, docs.

Each rule is a function from a module to complaints, run over every module of the checkout, and run
once more over a planted violation, so that a rule that never fires is noticed.
"""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": {"configs"},
    "algorithms": {"algorithms"},
    "envs": {"envs"},
    "actors": {"actors", "configs", "algorithms", "envs"},
    "orchestrator": {"orchestrator", "actors", "configs", "algorithms", "envs"},
}
NEVER = {
    "configs": {"torch", "ray"},
    "algorithms": {"ray", "vllm", "deepspeed", "transformers"},
    "envs": {"torch", "ray", "vllm", "transformers"},
    "actors": {"ray"},
    "orchestrator": set[str](),
}
NEVER_AT_MODULE_LEVEL = {"orchestrator": {"torch", "vllm"}}
ONLY_IN_MODULES_NAMED = {"vllm": "vllm", "deepspeed": "deepspeed", "peft": "lora"}
THE_RAY_MODULE = "orchestrator/cluster.py"
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
FILE_LINES, FUNCTION_LINES, LOOP_CODE_LINES = 500, 80, 60


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the file is."""

    name: str
    line: int
    at_module_level: bool
    relative: bool = False

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """A source file of the checkout, by its path relative to the root."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def floor(self) -> str:
        return self.path.partition("/")[0]

    @property
    def stem(self) -> str:
        return Path(self.path).stem

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, at_module_level=True))


def _imports(node: ast.AST, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, at_module_level=False)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                name = f"{child.module or ''}.{alias.name}"
                yield Import(name, child.lineno, at_module_level, child.level > 0)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_module_level=at_module_level and not inside)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def arrows(module: Module) -> Iterator[str]:
    """Floors import only the floors below them, always by their full name."""
    for found in module.imports:
        if found.relative:
            yield f"{found.line}: relative import of {found.name}, write loopwright.…"
        if found.top in MAY_IMPORT:
            yield f"{found.line}: import {found.top}, write loopwright.{found.top}"
        floor = found.name.split(".")[1] if found.top == "loopwright" and "." in found.name else ""
        if floor in MAY_IMPORT and floor not in MAY_IMPORT.get(module.floor, MAY_IMPORT):
            yield f"{found.line}: {module.floor} may not import {floor}"


def heavy_imports(module: Module) -> Iterator[str]:
    """What a floor never imports, what it imports only at use, and what only one module may."""
    for found in module.imports:
        if found.top in NEVER.get(module.floor, set()):
            yield f"{found.line}: {module.floor} never imports {found.top}"
        eager = NEVER_AT_MODULE_LEVEL.get(module.floor, set())
        if found.at_module_level and found.top in eager:
            yield f"{found.line}: {found.top} at module level, import it at use"
        home = ONLY_IN_MODULES_NAMED.get(found.top, "")
        if module.floor in MAY_IMPORT and home not in module.stem:
            yield f"{found.line}: {found.top} is imported only in modules named {home}"
        if found.top == "ray" and module.floor == "orchestrator" and module.path != THE_RAY_MODULE:
            yield f"{found.line}: only {THE_RAY_MODULE} imports ray"


def names(module: Module) -> Iterator[str]:
    """No module shadows one of the standard library, and none has a name without meaning."""
    if module.stem in sys.stdlib_module_names:
        yield f"{module.stem} is a module of the standard library: in a working dir it shadows it"
    if VAGUE_NAMES & set(module.stem.split("_")):
        yield f"{module.stem} does not say what is in it"


def sizes(module: Module) -> Iterator[str]:
    """Files and functions stay readable."""
    lines = len(module.text.splitlines())
    if lines > FILE_LINES:
        yield f"{lines} lines, limit {FILE_LINES}"
    for function in _functions(module.tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{function.lineno}: {function.name} has {length} lines, limit {FUNCTION_LINES}"


def the_loop_fits_a_page(module: Module) -> Iterator[str]:
    """Every function of the loop's module stays within its limit of code lines."""
    if module.path != "orchestrator/loop.py":
        return
    for function in _functions(module.tree):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if not body:
            continue
        lines = module.text.splitlines()[body[0].lineno - 1 : function.end_lineno]
        code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        if len(code) > LOOP_CODE_LINES:
            yield f"{function.name} has {len(code)} code lines, limit {LOOP_CODE_LINES}"


def docstrings(module: Module) -> Iterator[str]:
    """Public modules, classes, functions and methods say what they are.

    A method that a protocol of ours declares is documented there.
    """
    if module.floor not in MAY_IMPORT:
        return
    if not ast.get_docstring(module.tree):
        yield "1: the module has no docstring"
    for node in module.tree.body:
        yield from _undocumented(node, within="")


def _undocumented(node: ast.stmt, *, within: str) -> Iterator[str]:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    if node.name.startswith("_") or (within and node.name in _protocol_methods()):
        return
    decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
    if not ast.get_docstring(node) and ".setter" not in decorators and "overload" not in decorators:
        yield f"{node.lineno}: {within}{node.name} has no docstring"
    for child in node.body if isinstance(node, ast.ClassDef) else ():
        yield from _undocumented(child, within=f"{node.name}.")


def _protocol_methods() -> frozenset[str]:
    if not _PROTOCOL_METHODS:
        _PROTOCOL_METHODS.update(
            function.name
            for module in MODULES
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
            for function in _functions(node)
            if ast.get_docstring(function)
        )
    return frozenset(_PROTOCOL_METHODS)


def no_patching(module: Module) -> Iterator[str]:
    """Tests take fakes as arguments; nothing of ours is patched."""
    if module.floor != "tests":
        return
    for found in module.imports:
        if found.name.startswith(("unittest.mock", "mock.", "pytest_mock")):
            yield f"{found.line}: {found.name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "monkeypatch.setattr":
            yield f"{node.lineno}: monkeypatch.setattr"


def _modules() -> list[Module]:
    folders = [*MAY_IMPORT, "tests", "benchmarks", "examples", "deploy"]
    paths = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*.py"))]
    return [Module(p.relative_to(ROOT).as_posix(), p.read_text()) for p in sorted(paths)]


MODULES = _modules()
_PROTOCOL_METHODS: set[str] = set()
RULES = (
    arrows,
    heavy_imports,
    names,
    sizes,
    the_loop_fits_a_page,
    docstrings,
    no_patching,
)
PLANTED: tuple[tuple[Callable[[Module], Iterator[str]], str, str], ...] = (
    (arrows, "algorithms/planted.py", "from loopwright.configs.schema import Config"),
    (arrows, "algorithms/planted.py", "from loopwright import configs"),
    (arrows, "envs/planted.py", "def f():\n    import loopwright.actors.engine"),
    (arrows, "tests/planted.py", "import envs.protocol"),
    (arrows, "actors/planted.py", "from . import engine"),
    (heavy_imports, "envs/planted.py", "def f():\n    import torch"),
    (heavy_imports, "orchestrator/planted.py", "import torch"),
    (heavy_imports, "orchestrator/planted.py", "def f():\n    from ray.util import state"),
    (heavy_imports, "actors/torch_engine.py", "def f():\n    from vllm import LLM"),
    (names, "actors/types.py", ""),
    (names, "actors/weight_utils.py", ""),
    (sizes, "actors/planted.py", "\n" * (FILE_LINES + 1)),
    (sizes, "actors/planted.py", "def f():" + "\n    pass" * FUNCTION_LINES),
    (the_loop_fits_a_page, "orchestrator/loop.py", "def f():" + "\n    pass" * 61),
    (docstrings, "actors/planted.py", '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...'),
    (no_patching, "tests/planted.py", "from unittest.mock import patch"),
    (no_patching, "tests/planted.py", "def f(m):\n    monkeypatch.setattr(m, 'a', 1)"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[Module], Iterator[str]]) -> None:
    complaints = [f"{module.path}:{text}" for module in MODULES for text in rule(module)]
    assert not complaints, "\n" + (rule.__doc__ or "") + "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_rule_fires(rule: Callable[[Module], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(Module(path, text)))


def test_at_use_and_for_types_only_is_allowed() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    text += "def f():\n    import torch\n"
    assert not list(heavy_imports(Module("orchestrator/planted.py", text)))


def test_every_package_is_listed() -> None:
    """A folder that `pyproject.toml` does not list is missing from wheels."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {Path(m.path).parent.as_posix() for m in MODULES if m.floor in MAY_IMPORT}
    assert sorted(listed) == sorted(f"loopwright.{folder.replace('/', '.')}" for folder in inside)


def test_every_package_has_an_init() -> None:
    inside = {(ROOT / m.path).parent for m in MODULES if m.floor in MAY_IMPORT}
    assert not [str(folder) for folder in inside if not (folder / "__init__.py").is_file()]
