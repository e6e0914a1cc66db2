"""Packaging: what a wheel holds, every way in which the floors must import, and the tested
versions."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loopwright.configs.backends import BACKENDS
from loopwright.orchestrator.doctor import TESTED

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("actors", "algorithms", "configs", "envs", "orchestrator")
SHIPPED = ("*.py", "*.toml", "*.json")


def project() -> dict[str, Any]:
    """`pyproject.toml`, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """What `command` prints, run in `cwd` with only `path` added to Python's path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS")}
    env |= {"PYTHONPATH": str(path)} if path is not None else {}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, so that building leaves nothing in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, copy / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("loopwright.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("# Loopwright\n")
    return copy


@pytest.fixture(scope="module")
def site(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked in it, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, *build, "-w", str(folder), str(checkout), cwd=folder)
    (wheel,) = folder.glob("loopwright-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's project with folders named like ours."""
    for name in ("envs", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("WHOSE = 'the user'\n")
    return tmp_path


def test_a_wheel_holds_every_floor_whole(checkout: Path, site: Path) -> None:
    wanted = {
        f"loopwright/{file.relative_to(checkout).as_posix()}"
        for floor in FLOORS
        for pattern in SHIPPED
        for file in (checkout / floor).rglob(pattern)
    } | {"loopwright.py"}
    found = {f.relative_to(site).as_posix() for f in site.rglob("*") if f.is_file()}
    assert {f for f in found if ".dist-info/" not in f} == wanted


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_a_users_own_folders_do_not_shadow_ours(
    checkout: Path, site: Path, user: Path, installed: bool
) -> None:
    path = site if installed else checkout
    code = (
        "import envs, configs, loopwright;"
        "import loopwright.envs.protocol as p, loopwright.configs.load as l;"
        "print(envs.WHOSE, '|', configs.WHOSE, '|', p.__file__, '|', loopwright.__version__,"
        " '|', *l.presets())"
    )
    said = run(sys.executable, "-c", code, cwd=user, path=path).strip().split(" | ")
    assert said[:2] == ["the user", "the user"]
    assert said[2].startswith(str(path))
    assert said[3].startswith("0.1.0")
    assert "quickstart" in said[4].split()


def test_the_command_works_from_a_wheel_anywhere(site: Path, user: Path) -> None:
    module, _, function = project()["project"]["scripts"]["loopwright"].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    said = run(sys.executable, "-c", code, "config", "quickstart", cwd=user, path=site)
    assert 'name = "quickstart"' in said


def test_the_command_works_in_a_checkout_where_nothing_is_installed(checkout: Path) -> None:
    """What a Ray job with `--working-dir .` runs."""
    said = run(sys.executable, "-m", "orchestrator", "config", "quickstart", cwd=checkout)
    assert 'name = "quickstart"' in said


def test_tested_versions_lie_in_the_ranges() -> None:
    table = project()["project"]
    extras = [r for group in table["optional-dependencies"].values() for r in group]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    # of those not in the set, one is for GPUs and the others need an account or a server to try
    untested = {"vllm", "wandb", "mlflow-skinny", "loopwright"}
    for text in [*table["dependencies"], *extras]:
        requirement = Requirement(text)
        if requirement.name not in untested:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_extras_named_in_errors_exist() -> None:
    extras = set(project()["project"]["optional-dependencies"])
    named = {b.extra for table in BACKENDS.values() for b in table.values() if b.extra}
    named |= {package.extra for package in TESTED.values() if package.extra}
    assert named | {"wandb", "mlflow"} <= extras


def test_no_package_index_is_written_down() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), name


def test_an_old_python_is_told_so(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), f"PYTHON={old}", f"VENV={tmp_path}/venv", "quickstart"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.8.1" in done.stderr
    assert not (tmp_path / "venv").exists()
