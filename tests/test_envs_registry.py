"""Environments are found by name, by module, by file; what goes wrong is said."""

import asyncio
import sys
from pathlib import Path

import pytest

from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.registry import ENTRY_POINT_GROUP, RegistryError, list_environments, load

EXAMPLE = Path(__file__).parents[1] / "examples/my_env/loopwright_pantry/__init__.py"


def install_plugin(folder: Path, target: str) -> None:
    """What pip leaves behind for a package with an entry point."""
    info = folder / "acme_worlds-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-worlds\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\nacme = {target}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_built_in_environments_are_listed_and_load() -> None:
    listed = {listing.name: listing for listing in list_environments()}
    assert listed["officeworld"].origin == "built-in"
    assert listed["reasoning_gym"].target.endswith(":ReasoningGym")
    assert isinstance(load("officeworld", {"style": "full"}), OfficeWorld)


def test_by_module_and_by_file(tmp_path: Path) -> None:
    assert isinstance(load("loopwright.envs.officeworld:OfficeWorld"), OfficeWorld)
    first, second = load(f"{EXAMPLE}:Pantry"), load(f"{EXAMPLE}:Pantry")
    assert type(first) is type(second) and first.spec.name == "pantry"
    with pytest.raises(RegistryError, match="no such file"):
        load(f"{tmp_path}/none.py:Thing")


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(RegistryError, match="did you mean officeworld"):
        load("oficeworld")
    with pytest.raises(RegistryError, match=r"there are .*officeworld, openenv, process"):
        load("zzz")
    with pytest.raises(RegistryError, match="did you mean OfficeWorld"):
        load("loopwright.envs.officeworld:OficeWorld")


def test_unknown_options_give_the_nearest() -> None:
    with pytest.raises(RegistryError, match="unknown option 'stile'; did you mean 'style'"):
        load("officeworld", {"stile": "full"})
    with pytest.raises(RegistryError, match="it takes none"):
        load(f"{EXAMPLE}:Pantry", {"size": 3})
    with pytest.raises(ValueError, match="world_size 3"):
        load("officeworld", {"world_size": 3})


def test_a_plugin_is_listed_with_its_package_and_plays(site: Path) -> None:
    (site / "acme_good.py").write_text(EXAMPLE.read_text())
    install_plugin(site, "acme_good:Pantry")
    listed = {listing.name: listing for listing in list_environments()}
    assert listed["acme"].origin == "acme-worlds 2.1"
    env = load("acme")
    assert asyncio.run(env.reset(next(env.tasks("train", 0)))).tools


def test_a_plugin_that_does_not_import_shows_why_and_whose_it_is(site: Path) -> None:
    (site / "acme_broken.py").write_text("answer = 1 / 0\n")
    install_plugin(site, "acme_broken:World")
    with pytest.raises(RegistryError) as caught:
        load("acme")
    text = str(caught.value)
    assert "acme-worlds 2.1" in text and "acme_broken.py" in text and "ZeroDivisionError" in text


def test_what_is_no_environment_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("class Half:\n    spec = None\n    def tasks(self, split, seed): ...\n")
    with pytest.raises(RegistryError, match="it lacks reset, step, evaluate, oracle, close"):
        load(f"{path}:Half")


def test_a_file_that_fails_leaves_no_module_behind(tmp_path: Path) -> None:
    path = tmp_path / "bad_world.py"
    path.write_text("raise RuntimeError('on purpose')\n")
    with pytest.raises(RegistryError, match="on purpose"):
        load(f"{path}:World")
    assert not [name for name in sys.modules if "bad_world" in name]
