"""One training step against TRL's GRPO trainer: same tiny model, same tokens, CPU, one thread.

    python benchmarks/trl_step.py            # needs `pip install trl`

Both train on 32 groups of 8 rollouts (a prompt, then a completion of long-tailed length) in 4
minibatches with one optimizer step each, proximal logprobs recomputed, no reference model. TRL is
handed the finished completions through its `rollout_func`, so it generates nothing: what is timed
is training alone, TRL's own bookkeeping included. TRL runs first, with two sizes of its
micro-batch, and its better time counts. Times are CPU seconds of one thread, which a busy machine
disturbs less than the wall clock. Prints one JSON line.
"""

import argparse
import json
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwright.actors.objective import LossSettings
from loopwright.actors.tiny_model import build_tiny_policy
from loopwright.actors.torch_backend import TorchBackend
from loopwright.actors.trainer_backend import TrainerSettings
from loopwright.algorithms.records import TrainBatch

GROUPS, GROUP_SIZE, MINIBATCHES = 32, 8, 4
LR = 1e-4


def make_rollouts(seed: int, vocab: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Prompts, completions and rewards of all rollouts, group by group."""
    random = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    for _ in range(GROUPS):
        prompt = random.integers(0, vocab, random.integers(40, 81)).tolist()
        prompts += [prompt] * GROUP_SIZE
        lengths = np.clip(random.lognormal(4.3, 0.5, GROUP_SIZE), 16, 240).astype(int)
        completions += [random.integers(0, vocab, n).tolist() for n in lengths]
    return prompts, completions, random.random(len(prompts)).tolist()


def loopwright_step(
    folder: str,
    prompts: list[list[int]],
    completions: list[list[int]],
    rewards: list[float],
    token_budget: int,
) -> float:
    """CPU seconds of the second of two steps: the first warms up."""
    lengths = np.array(
        [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], dtype=np.int32
    )
    mask = np.concatenate(
        [[False] * len(p) + [True] * len(c) for p, c in zip(prompts, completions, strict=True)]
    )
    grouped = np.array(rewards).reshape(GROUPS, GROUP_SIZE)
    advantages = (grouped - grouped.mean(1, keepdims=True)).reshape(-1).astype(np.float32)
    settings = TrainerSettings(
        model_path=folder,
        lr=LR,
        minibatches=MINIBATCHES,
        token_budget=token_budget,
        loss=LossSettings(mismatch="none"),
    )
    backend = TorchBackend(settings)
    metrics: dict[str, float] = {}
    started = 0.0
    for step in (1, 2):
        started = time.process_time()
        metrics = backend.train(
            TrainBatch(
                step=step,
                token_ids=np.concatenate(
                    [p + c for p, c in zip(prompts, completions, strict=True)]
                ).astype(np.int32),
                action_mask=mask,
                behavior_logprobs=np.zeros(len(mask), dtype=np.float32),
                policy_versions=np.where(mask, step - 1, -1).astype(np.int32),
                turn_ids=np.where(mask, 0, -1).astype(np.int16),
                lengths=lengths,
                rollout_ids=np.arange(len(lengths), dtype=np.int32),
                rewards=np.array(rewards, dtype=np.float32),
                advantages=advantages,
                rollout_count=len(lengths),
            )
        )
    ended = time.process_time()
    if metrics["train/optimizer_steps"] != MINIBATCHES:
        raise RuntimeError(
            f"{metrics['train/optimizer_steps']} optimizer steps, expected {MINIBATCHES}"
        )
    return ended - started


def trl_step(
    folder: str,
    prompts: list[list[int]],
    completions: list[list[int]],
    rewards: list[float],
    micro_batch: int,
) -> float:
    """CPU seconds of TRL's second generation batch: `MINIBATCHES` optimizer steps over all
    rollouts.
    """
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    rollouts = len(prompts)
    accumulation = rollouts // MINIBATCHES // micro_batch
    marks: dict[int, float] = {}

    class Clock(TrainerCallback):
        """Notes when each optimizer step begins and ends."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Before the first micro-batch of an optimizer step."""
            marks.setdefault(state.global_step, time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After the optimizer step."""
            marks[-state.global_step] = time.process_time()

    def replay(batch: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "logprobs": [[-6.0] * len(c) for c in completions],
        }

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return rewards

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=rollouts // micro_batch,
            num_generations=GROUP_SIZE,
            max_completion_length=256,
            max_steps=2 * MINIBATCHES,
            learning_rate=LR,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="grpo",
            scale_rewards="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [f"task {i}" for i in range(GROUPS * 2)]}),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            rollout_func=replay,
            callbacks=[Clock()],
        )
        trainer.train()
    return marks[-2 * MINIBATCHES] - marks[MINIBATCHES]


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--token-budget", type=int, default=1024, help="of our micro-batches")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list(string.ascii_lowercase), 6)) for _ in range(400)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(build_tiny_policy([" ".join(words)], Path(scratch) / "model", vocab_size=500))
        rollouts = make_rollouts(options.seed, 490)
        tokens = sum(len(p) + len(c) for p, c in zip(rollouts[0], rollouts[1], strict=True))
        peer = {micro: trl_step(folder, *rollouts, micro) for micro in (8, 64)}
        seconds = loopwright_step(folder, *rollouts, options.token_budget)
    best = min(peer.values())
    print(
        json.dumps(
            {
                "tokens": tokens,
                "rollouts": GROUPS * GROUP_SIZE,
                "loopwright_cpu_s": round(seconds, 2),
                "loopwright_tokens_per_cpu_s": round(tokens / seconds),
                "trl_cpu_s": {str(k): round(v, 2) for k, v in peer.items()},
                "trl_tokens_per_cpu_s": round(tokens / best),
                "ratio": round(best / seconds, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
