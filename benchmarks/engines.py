"""Engines side by side: the same tiny model, prompts and long-tailed lengths, one run.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/engines.py [--out engines.json]

Each contender runs in a process of its own, one after the other, after a warm-up. Tokens are the
ones asked for; CPU seconds are those of the process and its children. Every prompt is different
unless `--group` is above 1, which asks for that many rollouts of each prompt, as training does.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwright.actors.engine import Engine, EngineSettings, GenerateRequest

VOCAB = 512
MAX_CONTEXT = 512
CONTENDERS = ("torch", "generate", "generate_batch", "vllm")
TIME_LIMIT_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every contender is asked for."""

    requests: int
    concurrency: int
    group: int
    layers: int
    seed: int

    def draw(self) -> list[tuple[np.ndarray, int]]:
        """Prompts of 100–200 tokens, int32, and lengths: log-normal, most of 10–40, a tail to
        200."""
        rng = np.random.default_rng(self.seed)
        drawn: list[tuple[np.ndarray, int]] = []
        while len(drawn) < self.requests:
            prompt = rng.integers(0, VOCAB, rng.integers(100, 201)).astype(np.int32)
            for length in np.clip(rng.lognormal(3.0, 0.7, self.group), 5, 200):
                drawn.append((prompt, int(length)))
        return drawn[: self.requests]


def save_model(folder: Path, layers: int) -> int:
    """A random Qwen3-shaped causal LM in `folder`; returns its number of parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=384, vocab_size=VOCAB, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def run_engine(
    folder: Path, work: Workload, make: Callable[[EngineSettings], Engine], **options: Any
) -> Any:
    """Measure one of our engines, `work.concurrency` requests in flight."""
    settings = EngineSettings(
        model_path=str(folder),
        max_concurrency=work.concurrency,
        max_context=MAX_CONTEXT,
        options=options,
    )

    async def serve(engine: Engine, asked: Sequence[tuple[np.ndarray, int]], turn: str) -> int:
        slots = asyncio.Semaphore(work.concurrency)

        async def one(number: int, prompt: np.ndarray, length: int) -> int:
            request = GenerateRequest(
                request_id=f"{turn}-{number}", session=f"{turn}-{number}", prompt_ids=prompt,
                max_new_tokens=length, stop_token_ids=(), seed=number,
            )  # fmt: skip
            async with slots:
                return len((await engine.generate(request)).token_ids)

        return sum(await asyncio.gather(*(one(i, p, n) for i, (p, n) in enumerate(asked))))

    async def measure() -> dict[str, float]:
        engine = make(settings)
        await engine.start()
        asked = work.draw()
        await serve(engine, asked[:8], "warm")
        clock = Clock()
        tokens = await serve(engine, asked, "timed")
        figures = clock.figures(tokens)
        await engine.close()
        return figures

    return asyncio.run(measure())


def run_torch(folder: Path, work: Workload) -> dict[str, float]:
    """The embedded torch engine."""
    from loopwright.actors.torch_engine import TorchEngine

    return run_engine(folder, work, TorchEngine)


def run_vllm(folder: Path, work: Workload) -> dict[str, float]:
    """The vLLM engine, as the rollout actor runs it."""
    from loopwright.actors.vllm_engine import VllmEngine

    # vLLM 0.32 rewinds a seeded request's generator after a partial prefill, which a CPU generator
    # cannot do, and its engine core ends: keep prefills whole.
    return run_engine(folder, work, VllmEngine, enable_chunked_prefill=False)


def run_generate(folder: Path, work: Workload) -> dict[str, float]:
    """transformers `generate`: left-padded batches, each as long as its longest sequence."""
    model, asked = _transformers_model(folder), work.draw()

    def serve(batch: Sequence[tuple[np.ndarray, int]]) -> int:
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0,
            max_new_tokens=max(length for _, length in batch),
        )  # fmt: skip
        return sum(length for _, length in batch)

    serve(asked[:8])
    clock = Clock()
    starts = range(0, len(asked), work.concurrency)
    return clock.figures(sum(serve(asked[at : at + work.concurrency]) for at in starts))


def run_generate_batch(folder: Path, work: Workload) -> dict[str, float]:
    """transformers' continuous batching, with a length for each request."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, asked = _transformers_model(folder), work.draw()
    generation = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=200, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=1024,
        max_batch_tokens=1024,
        max_requests_per_batch=work.concurrency,
    )
    manager = model.init_continuous_batching(generation, batching)
    manager.start()

    def serve(batch: Sequence[tuple[np.ndarray, int]], turn: str) -> int:
        for number, (prompt, length) in enumerate(batch):
            manager.add_request(prompt.tolist(), f"{turn}-{number}", max_new_tokens=length)
        tokens, ended, deadline = 0, 0, time.monotonic() + TIME_LIMIT_S
        while ended < len(batch) and time.monotonic() < deadline:
            try:
                result = manager.get_result(timeout=1)
            except queue.Empty:
                continue
            if result is not None and result.is_finished():
                tokens, ended = tokens + len(result.generated_tokens), ended + 1
        return tokens

    serve(asked[:8], "warm")
    clock = Clock()
    figures = clock.figures(serve(asked, "timed"))
    manager.stop(block=True)
    return figures


RUNNERS = dict(
    zip(CONTENDERS, (run_torch, run_generate, run_generate_batch, run_vllm), strict=True)
)


class Clock:
    """Wall and CPU seconds since it was made, children included."""

    def __init__(self) -> None:
        """Start."""
        self._wall, self._cpu = time.perf_counter(), cpu_s()

    def figures(self, tokens: int) -> dict[str, float]:
        """Tokens, seconds, and tokens per second of each kind."""
        wall_s, used_s = time.perf_counter() - self._wall, cpu_s() - self._cpu
        return {
            "tokens": tokens,
            "wall_s": wall_s,
            "cpu_s": used_s,
            "tokens_per_s": tokens / wall_s,
            "tokens_per_cpu_s": tokens / used_s,
        }


def cpu_s() -> float:
    """CPU seconds of this process and its living descendants."""
    ticks, todo = 0, [os.getpid()]
    while todo:
        folder = Path("/proc", str(todo.pop()))
        fields = (folder / "stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
        for children in (folder / "task").glob("*/children"):
            todo += [int(pid) for pid in children.read_text().split()]
    return ticks / os.sysconf("SC_CLK_TCK")


def _transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def measure_all(names: Sequence[str], work: Workload, folder: Path) -> dict[str, dict[str, float]]:
    """Each contender in a fresh process, one after the other."""
    results: dict[str, dict[str, float]] = {}
    for name in names:
        answer = folder / f"{name}.json"
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        command += ["--out", str(answer)]
        for key, value in asdict(work).items():
            command += [f"--{key}", str(value)]
        subprocess.run(command, check=True, timeout=TIME_LIMIT_S, stdout=sys.stderr)
        results[name] = json.loads(answer.read_text())
        print(f"  {name:15s} done", file=sys.stderr)
    return results


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Figures and ratios to the first contender."""
    print(f"{'engine':15s} {'tokens':>8s} {'tokens/s':>10s} {'tokens/CPU-s':>13s} {'ratio':>7s}")
    base = next(iter(results.values()))["tokens_per_cpu_s"]
    for name, row in results.items():
        ratio = base / row["tokens_per_cpu_s"]
        print(
            f"{name:15s} {row['tokens']:8.0f} {row['tokens_per_s']:10.0f} "
            f"{row['tokens_per_cpu_s']:13.0f} {ratio:6.2f}x"
        )
    print(f"ratio: tokens per CPU second of {next(iter(results))} over those of the row")


def main() -> None:
    """Run the comparison, or one contender of it as a worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--group", type=int, default=1, help="rollouts of each prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", choices=CONTENDERS, default=None)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = Workload(
        requests=given.requests, concurrency=given.concurrency, group=given.group,
        layers=given.layers, seed=given.seed,
    )  # fmt: skip
    if given.worker:
        given.out.write_text(json.dumps(RUNNERS[given.worker](given.folder, work)))
        return
    has_vllm = importlib.util.find_spec("vllm") is not None
    names = given.engines or [name for name in CONTENDERS if name != "vllm" or has_vllm]
    with tempfile.TemporaryDirectory() as name:
        parameters = save_model(Path(name), work.layers)
        print(f"{parameters:,} parameters, {work}", file=sys.stderr)
        results = measure_all(names, work, Path(name))
    print_table(results)
    if given.out:
        record = {"parameters": parameters, "workload": asdict(work), "engines": results}
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
