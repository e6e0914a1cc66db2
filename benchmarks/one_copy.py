"""How many copies of the base weights a trainer and its engine hold between them, with LoRA.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/one_copy.py [--mb 200]

Trainer and engine are processes of their own, as in a run. After two publishes with generation
between them, their proportional set sizes are read (a page that n processes map counts 1/n in
each). The number of copies is how much both grow together from a small model to a large one, over
how much larger its weights are.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.engine import EngineSettings, GenerateRequest
from loopwright.actors.torch_engine import TorchEngine
from loopwright.actors.trainer import Trainer
from loopwright.actors.trainer_backend import TrainerSettings

DEADLINE_S = 200.0


def pss_mb() -> float:
    """Proportional set size of this process, MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def trainer(pipe: Connection, model: str, channel: str) -> None:
    """The trainer's process: loads, publishes twice, tells its size."""
    torch.set_num_threads(1)
    pipe.send(pss_mb())
    pipe.recv()
    settings = TrainerSettings(model_path=model, lora_rank=8)
    chosen: Any = ChannelSettings(channel=channel)  # type: ignore[arg-type]
    one = Trainer(settings, "one-copy", channel=chosen)
    for version in (0, 1):
        pipe.send(one.publish(version, ("engine/0",)))
        pipe.recv()
    pipe.send(pss_mb())
    pipe.recv()
    one.close()


async def serve(pipe: Connection, model: str, rank: int) -> None:
    """The engine's process: takes what is published, generates, tells its size."""
    engine = TorchEngine(
        EngineSettings(
            model_path=model,
            max_context=32,
            max_concurrency=1,  # next to no KV cache: the weights are what is measured
            lora_rank=rank,
        )
    )
    await engine.start()
    for version in (0, 1):
        await engine.update_weights(pipe.recv(), "recompute")
        await engine.generate(
            GenerateRequest(
                request_id=f"r{version}", session="s", prompt_ids=np.arange(8, dtype=np.int32),
                max_new_tokens=8, stop_token_ids=(), seed=1,
            )
        )  # fmt: skip
        pipe.send(None)
    pipe.recv()
    pipe.send(pss_mb())
    pipe.recv()
    await engine.close()


def engine_process(pipe: Connection, model: str, rank: int) -> None:
    """Entry of the engine's process."""
    torch.set_num_threads(1)
    pipe.send(pss_mb())
    pipe.recv()
    asyncio.run(serve(pipe, model, rank))


def receive(pipe: Connection) -> Any:
    """The next answer, within the deadline."""
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError(f"no answer within {DEADLINE_S} s")
    return pipe.recv()


def measure(model: str, channel: str, weights_mb: float) -> dict[str, float]:
    """Sizes in MiB."""
    context = multiprocessing.get_context("spawn")
    (t, t_far), (e, e_far) = context.Pipe(), context.Pipe()
    processes = [
        context.Process(target=trainer, args=(t_far, model, channel)),
        context.Process(target=engine_process, args=(e_far, model, 8)),
    ]
    for process in processes:
        process.start()
    receive(t), receive(e)
    for pipe in (t, e):
        pipe.send(None)
    for _ in range(2):
        e.send(receive(t))
        receive(e)
        t.send(None)
    e.send(None)
    trainer_mb, engine_mb = receive(t), receive(e)
    for pipe in (t, e):
        pipe.send(None)
    for process in processes:
        process.join(20)
    return {
        "weights_mb": weights_mb,
        "trainer_mb": trainer_mb,
        "engine_mb": engine_mb,
        "both_mb": trainer_mb + engine_mb,
    }


def measure_size(mb: int, channel: str) -> dict[str, float]:
    """Both processes' sizes with a model of about `mb` MiB."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=2048, hidden_size=768, intermediate_size=2304, num_attention_heads=12,
            num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
            num_hidden_layers=max(1, mb // 28), max_position_embeddings=256,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
        weights_mb = sum(p.nbytes for p in model.parameters()) / (1 << 20)
        model.save_pretrained(folder)
        del model
        return measure(folder, channel, weights_mb)


def main() -> None:
    """Compare the adapter channel with merged weights in shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=200, help="of float32 weights, about")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    rows = []
    for channel in ("adapter", "shared_memory"):
        small, large = (measure_size(mb, channel) for mb in (28, given.mb))
        grown = large["both_mb"] - small["both_mb"]
        copies = grown / (large["weights_mb"] - small["weights_mb"])
        rows.append({"channel": channel, "copies": copies, "small": small, "large": large})
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
