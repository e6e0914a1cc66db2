"""The tutorial's commands, as they are written, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopwright.orchestrator.cli import main

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "your-own-environment.md"
_DEADLINE_S = 400.0


def test_every_command_of_the_tutorial_works(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, module in (("loopwright", "-m loopwright.orchestrator"), ("python", "")):
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 3
    script = "set -ex\n" + "".join(blocks)
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "my_world_env:MyWorld: conforms" in done.stdout
    assert "1 passed" in done.stdout
    assert "held-out success: untouched" in done.stdout
    assert "each once, all of them on record" in done.stdout


def test_names_that_cannot_be_packages_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("My-World", "2fast", "class"):
        assert main(["envs", "new", name, "--in", str(tmp_path)]) == 2
        assert "expected lower-case letters" in capsys.readouterr().err
    assert main(["envs", "new", "twice", "--in", str(tmp_path)]) == 0
    assert main(["envs", "new", "twice", "--in", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
