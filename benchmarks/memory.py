"""Memory of the trainer: what `plan` predicts, what the dry run counts, what the process takes.

    python benchmarks/memory.py                     # all sizes and optimizers, about 12 CPU-minutes
    python benchmarks/memory.py --sizes 10M --optimizers adamw,sgd
    python benchmarks/memory.py --heads             # chunked logprobs against whole logits

Each case runs in a process of its own: resident memory is taken before the model is loaded, and its
high-water mark after the dry run and after a real step of two such micro-batches. The count and the
high-water mark do not know of each other; `plan` knows neither. For the dry run freed memory is
returned to the system; for the step it is kept, as the trainer does for speed, and the holes
between what lives are resident too. Results go to a JSON file, case by
case, and cases it holds already are not run again.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = {"10M": 4, "50M": 2, "140M": 1}
COLUMNS, CHUNK = 128, 64
WARM = {"vocab": 300, "hidden": 32, "inner": 48, "layers": 1}
SHAPES: Mapping[str, dict[str, int]] = {
    "10M": {"vocab": 16_000, "hidden": 256, "inner": 768, "layers": 6},
    "50M": {"vocab": 32_000, "hidden": 512, "inner": 1536, "layers": 10},
    "140M": {"vocab": 32_000, "hidden": 768, "inner": 2304, "layers": 15},
}
# optimizer, its options, rank of adapters, gradient checkpointing
CASES: Mapping[str, tuple[str, dict[str, Any], int, str]] = {
    "adamw": ("adamw", {}, 0, "off"),
    "adamw-int8": ("adamw", {"state": "int8"}, 0, "off"),
    "sgd": ("sgd", {}, 0, "off"),
    "galore": ("galore", {"rank": 64}, 0, "off"),
    "adamw-lora": ("adamw", {}, 16, "off"),
    "adamw-checkpointed": ("adamw", {}, 0, "on"),
}


def make_model(shape: Mapping[str, int], folder: Path) -> int:
    """Write a randomly initialised model to `folder`; its number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=shape["hidden"] // 8,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _return_freed() -> None:
    """Let glibc hand freed memory back, as it does unless it is told to keep it: else holes between
    what lives count as resident."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 128 << 10)  # M_TRIM_THRESHOLD
    libc.malloc_trim(0)


def measure(size: str, case: str, folder: str, small: str) -> dict[str, float]:
    """One case, in this process. `small` is a tiny model to load everything with first: what it
    takes, the allocator keeps."""
    import dataclasses

    import numpy as np

    from loopwright.actors.allocator import keep_freed_memory
    from loopwright.actors.dry_run import dry_run
    from loopwright.actors.torch_backend import TorchBackend
    from loopwright.actors.trainer_backend import TrainerSettings
    from loopwright.algorithms.records import TrainBatch

    name, options, rank, checkpointing = CASES[case]
    rows = ROWS[size]
    settings = TrainerSettings(
        model_path=folder,
        optimizer=name,
        optimizer_options=options,
        lora_rank=rank,
        lora_alpha=32.0,
        gradient_checkpointing=checkpointing,  # type: ignore[arg-type]
        token_budget=rows * COLUMNS,
        logprob_chunk=CHUNK,
        minibatches=1,
    )
    warm = TorchBackend(dataclasses.replace(settings, model_path=small))
    dry_run(warm, longest=16)
    del warm
    _return_freed()
    before = _status("VmRSS")
    backend = TorchBackend(settings)
    _return_freed()
    _forget_peak()
    found = dry_run(backend, longest=COLUMNS)
    dry = _status("VmHWM") - before
    keep_freed_memory()  # as the trainer runs
    _forget_peak()
    count = 2 * rows
    mask = np.ones(count * COLUMNS, dtype=bool)
    mask[::COLUMNS] = False
    random = np.random.default_rng(0)
    batch = TrainBatch(
        step=1,
        token_ids=random.integers(0, 1000, count * COLUMNS).astype(np.int32),
        action_mask=mask,
        behavior_logprobs=np.where(mask, -9.0, 0).astype(np.float32),
        turn_ids=np.where(mask, 0, -1).astype(np.int16),
        lengths=np.full(count, COLUMNS, dtype=np.int32),
        rollout_ids=np.arange(count, dtype=np.int32),
        advantages=random.normal(size=count).astype(np.float32),
        rollout_count=count,
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        rewards=np.zeros(count, dtype=np.float32),
    )
    backend.train(batch)
    return {
        "counted_bytes": found.peak.total,
        **{f"{k}_bytes": v for k, v in found.peak.classes().items()},
        "resident_dry_run_bytes": dry,
        "resident_step_bytes": _status("VmHWM") - before,
        "dry_run_s": found.seconds,
    }


def predict(size: str, case: str, folder: str) -> int:
    """What `loopwright plan` says of the case, bytes."""
    from loopwright.orchestrator.memory_plan import Planner

    name, options, rank, checkpointing = CASES[case]
    listed = ", ".join(f"{k} = {json.dumps(v)}" for k, v in options.items())
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(
            f'[run]\nname = "memory"\n[model]\npath = "{folder}"\nlora_rank = {rank}\n'
            f'[environment]\nname = "officeworld"\nmax_context = {COLUMNS}\n'
            f"[trainer]\ntoken_budget = {ROWS[size] * COLUMNS}\nlogprob_chunk = {CHUNK}\n"
            f'gradient_checkpointing = "{checkpointing}"\n'
            f'optimizer = "{name}"\noptimizer_options = {{ {listed} }}\n'
        )
        file.flush()
        return Planner(file.name, (), "").predict().trainer.total


def heads() -> dict[str, float]:
    """Logprobs of 512 tokens over 32,000 words: bytes and seconds of both ways, with gradient."""
    import time

    import torch
    from torch import nn

    from loopwright.actors.chunked_logprobs import chunked_logprobs
    from loopwright.actors.memory_meter import MemoryMeter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Linear(256, 32_000, bias=False)
    hidden, targets = torch.randn(512, 256, requires_grad=True), torch.randint(32_000, (512,))

    def whole() -> torch.Tensor:
        return -nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")

    def chunked() -> torch.Tensor:
        return chunked_logprobs(hidden, head, targets, temperature=1.0, chunk=CHUNK)

    found: dict[str, float] = {}
    for name, way in (("whole", whole), ("chunked", chunked)):
        meter = MemoryMeter(vocab=32_000)
        meter.hold("weights", head.parameters())
        with meter:
            way().sum().backward()
        found[f"{name}_logits_bytes"] = meter.largest().logits
        seconds = []
        for _ in range(3):
            began = time.process_time()
            way().sum().backward()
            seconds.append(time.process_time() - began)
        found[f"{name}_cpu_s"] = min(seconds)
    found["bytes_ratio"] = found["whole_logits_bytes"] / found["chunked_logits_bytes"]
    found["cpu_ratio"] = found["chunked_cpu_s"] / found["whole_cpu_s"]
    return found


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "| model | trainer | planned MB | counted MB | resident MB, returned | resident MB, kept | "
        "planned / counted | counted / resident |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, r in results.items():
        size, case = key.split("/")
        planned, counted = r["planned_bytes"], r["counted_bytes"]
        dry, step = r["resident_dry_run_bytes"], r["resident_step_bytes"]
        lines.append(
            f"| {size} | {case} | {planned / 1e6:.0f} | {counted / 1e6:.0f} | {dry / 1e6:.0f} | "
            f"{step / 1e6:.0f} | {planned / counted:.3f} | {counted / dry:.3f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--optimizers", default=",".join(CASES))
    parser.add_argument("--out", default="benchmarks/memory.json", help="where results go")
    parser.add_argument("--heads", action="store_true", help="chunked logprobs only")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    if arguments.heads:
        print(json.dumps(heads(), indent=1))
        return
    out = Path(arguments.out)
    results: dict[str, dict[str, float]] = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "warm"
        make_model(WARM, small)
        for size in arguments.sizes.split(","):
            folder = Path(scratch) / size
            parameters = 0
            for case in arguments.optimizers.split(","):
                if f"{size}/{case}" in results:
                    continue
                parameters = parameters or make_model(SHAPES[size], folder)
                command = [sys.executable, __file__, "--one", size, case, str(folder), str(small)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=900)
                if done.returncode:
                    raise SystemExit(f"{size} {case}: {done.stderr[-2000:]}")
                result = json.loads(done.stdout.splitlines()[-1])
                result["parameters"] = parameters
                result["planned_bytes"] = predict(size, case, str(folder))
                results[f"{size}/{case}"] = result
                out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{size} {case}: done", file=sys.stderr, flush=True)
    print(_table(results))


if __name__ == "__main__":
    main()
