"""Each rule of the kit catches the plugin that breaks it, and passes the one that does not."""

import asyncio
import os
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopwright.envs.conformance import RULES, check, examine, explain
from loopwright.envs.officeworld import OfficeWorld
from loopwright.envs.registry import RegistryError, load
from loopwright.orchestrator.cli import main
from tests.broken_plugin.broken_worlds import DEFECTS

PLUGIN = Path(__file__).parent / "broken_plugin"
NAMES = (*RULES, "tasks", "deadline")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin package, as if it were installed: what its entry points say leads to it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"broken_worlds-{project['version']}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    points = ""
    for group, entries in project["entry-points"].items():
        points += f"[{group}]\n" + "".join(f"{n} = {t}\n" for n, t in entries.items())
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    _end_what_it_started()


def _end_what_it_started() -> None:
    """Threads, processes and descriptors of the defects that leave some behind."""
    import broken_worlds  # type: ignore[import-not-found]

    for left in broken_worlds.STARTED:
        if isinstance(left, threading.Event):
            left.set()
        elif isinstance(left, tuple):
            for descriptor in left:
                os.close(descriptor)
        elif not isinstance(left, asyncio.Task | asyncio.Event):
            left.kill()
            left.wait()
    broken_worlds.STARTED.clear()


def broken(defect: str) -> Any:
    """The plugin's environment, loaded as a user's is: by the name of its entry point."""
    if defect == "snapshot_forgets":
        return load("broken_worlds:Forgetful", {"defect": defect})
    return load("broken", {"defect": defect})


@pytest.mark.parametrize("name", ["Echo", "Forgetful"])
def test_a_correct_plugin_has_no_findings_and_is_measured(installed: None, name: str) -> None:
    report = asyncio.run(examine(lambda: load(f"broken_worlds:{name}"), full=True))
    assert report.findings == () and report.figures is not None
    assert report.figures.steps_per_s > 100 and 0 < report.figures.reset_ms < 100


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_caught_by_its_rule(installed: None, defect: str) -> None:
    rule, what = DEFECTS[defect]
    deadline_s = 0.5 if defect == "hangs" else 30.0
    report = asyncio.run(examine(lambda: broken(defect), deadline_s=deadline_s))
    found = [str(f) for f in report.findings if f.rule == rule]
    assert found and all(text.startswith(f"rule {rule}: ") for text in found)
    assert any(what in text for text in found), found


def test_no_rule_lacks_a_breaker() -> None:
    assert {rule for rule, _ in DEFECTS.values()} == set(NAMES)


@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_says_what_it_asks_for(rule: str) -> None:
    assert explain(rule).endswith(".") and len(explain(rule).split()) > 4


def test_findings_name_the_task(installed: None) -> None:
    found = asyncio.run(check(lambda: broken("raises_on_text")))
    assert next(f for f in found if f.rule == "survives_text").task_id == "echo-0"


def test_the_command_names_the_rule_and_what_it_asks_for(
    installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["envs", "check", "broken", "--quick", "--option", "defect=nan"]) == 1
    said = capsys.readouterr().out
    assert "rule reward_range: echo-0: reward is nan" in said
    assert explain("reward_range") in said and "steps/s" not in said
    assert main(["envs", "check", "broken", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "broken: conforms" in said and "steps/s" in said


def test_a_plugin_that_does_not_import_shows_why_and_whose_it_is(
    installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RegistryError, match=r"broken-worlds 1\.0"):
        load("unimportable")
    assert main(["envs", "check", "unimportable"]) == 2
    said = capsys.readouterr().err
    assert "broken-worlds 1.0" in said and "unimportable.py" in said
    assert "No module named 'a_package_that_nobody_has'" in said


@pytest.mark.parametrize(
    ("style", "action_format"), [("compact", "call"), ("full", "json"), ("full", "code")]
)
def test_officeworld_conforms(style: Any, action_format: Any) -> None:
    def factory() -> OfficeWorld:
        return OfficeWorld(style=style, action_format=action_format)

    assert asyncio.run(check(factory)) == []
