"""What low-rank optimizers cost: finding a basis, and a step with one.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/optimizer_steps.py [--out steps.json]

Refresh: the r leading right singular directions of a size×size gradient by one warm step of
subspace iteration, by a randomized SVD, and by the full SVD that GaLore's published code makes; and
the overlap of each with the full one's subspace. The gradient is r directions with a decaying
spectrum over noise, and has drifted since the basis that the warm step begins from.

Step: one optimizer update of a 134M-parameter decoder's shapes (Llama-130M: width 768, 12 layers,
32,000 tokens), refreshes spread over the gap, against AdamW: torch's default (foreach), torch's
fused one, and ours. Then the same within a whole training step (forward, backward, update) of such
a model on `--tokens` tokens, which is what a run pays. CPU seconds, the least of several repeats,
all in one process.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from loopwright.algorithms.optimizers import build
from loopwright.algorithms.optimizers.layout import Layout
from loopwright.algorithms.optimizers.subspace import exact, overlap, randomized, warm


def least(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of `repeats` calls."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def gradients(size: int, rank: int, drift: float) -> tuple[Tensor, Tensor]:
    """A gradient [size, size] and what became of it `drift` later: twice the rank's directions with
    singular values that fall tenfold over the rank and are cut after it, and noise."""
    source = torch.Generator().manual_seed(0)

    def basis() -> Tensor:
        return torch.linalg.qr(torch.randn(size, rank, generator=source))[0]

    values = 10.0 ** -(torch.arange(rank) / rank)
    left, right = basis(), basis()
    first = (left * values) @ right.mT
    turned = torch.linalg.qr(right + drift * torch.randn(size, rank, generator=source) / size**0.5)
    second = (left * values) @ turned[0].mT
    noise = 0.05 / (2 * size**0.5)  # largest singular value 0.05: half of the smallest above
    made = [g + noise * torch.randn(size, size, generator=source) for g in (first, second)]
    return made[0], made[1]


def refresh(size: int, rank: int, repeats: int) -> dict[str, float]:
    """Seconds and overlaps of the three ways."""
    before, now = gradients(size, rank, 0.5)
    layout = Layout.of("w", now)

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    old = randomized(before, rank, "right", layout, noise())
    started = time.process_time()
    true = exact(now, rank, "right", layout)
    svd_s = time.process_time() - started
    warm_s = least(lambda: warm(now, old, "right", layout), repeats)
    randomized_s = least(lambda: randomized(now, rank, "right", layout, noise()), repeats)
    return {
        "size": size,
        "rank": rank,
        "svd_s": svd_s,
        "randomized_s": randomized_s,
        "warm_s": warm_s,
        "svd_over_warm": svd_s / warm_s,
        "svd_over_randomized": svd_s / randomized_s,
        "overlap_of_the_old_basis": overlap(old, true),
        "overlap_warm": overlap(warm(now, old, "right", layout), true),
        "overlap_randomized": overlap(randomized(now, rank, "right", layout, noise()), true),
    }


def decoder(tokens: int) -> tuple[nn.Module, Callable[[], None]]:
    """A random decoder of 134M parameters, and its forward and backward pass."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )
    ids = torch.randint(0, 32000, (tokens // 128, 128))

    def passes() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return model, passes


def steps(rank: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of one update, refreshes amortised over the gap of 200, alone and in a whole step."""
    model, passes = decoder(tokens)
    passes()
    passes_s = least(passes, max(repeats // 3, 1))
    named = list(model.named_parameters())
    parameters = [p for _, p in named]
    peers: dict[str, torch.optim.Optimizer] = {
        "adamw_foreach": torch.optim.AdamW(parameters, lr=1e-6, foreach=True),
        "adamw_fused": torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        "adamw": build(named, "adamw", lr=1e-6),
        "adamw_int8": build(named, "adamw", lr=1e-6, state="int8"),
        "sgd": build(named, "sgd", lr=1e-6),
        "galore": build(named, "galore", lr=1e-6, rank=rank, embeddings="fp32"),
        "galore_int8": build(named, "galore", lr=1e-6, rank=rank, state="int8"),
        "apollo_mini": build(named, "apollo_mini", lr=1e-6, embeddings="fp32"),
    }
    found: dict[str, float] = {
        "parameters": float(sum(p.numel() for p in parameters)),
        "rank": rank,
        "tokens": tokens,
        "forward_backward_s": passes_s,
    }
    for name, optimizer in peers.items():
        optimizer.step()  # states, and a first basis by randomized SVD
        plain = least(optimizer.step, repeats)
        if name.startswith("galore"):
            for p in parameters:
                if "next_refresh" in optimizer.state.get(p, {}):
                    optimizer.state[p]["next_refresh"] = 0
            plain += (least(optimizer.step, 1) - plain) / 200
        found[f"{name}_s"] = plain
        for state in optimizer.state.values():
            state.clear()
    for peer in ("adamw_foreach", "adamw_fused"):
        found[f"galore_over_{peer}"] = found["galore_s"] / found[f"{peer}_s"]
        found[f"whole_step_galore_over_{peer}"] = (passes_s + found["galore_s"]) / (
            passes_s + found[f"{peer}_s"]
        )
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["refresh", "steps"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"torch": torch.__version__}
    if arguments.only != "steps":
        results["refresh"] = refresh(arguments.size, arguments.rank, arguments.repeats)
    if arguments.only != "refresh":
        results["steps"] = steps(arguments.rank, arguments.tokens, arguments.repeats)
    for part in ("refresh", "steps"):
        for name, value in results.get(part, {}).items():
            print(f"{part:8} {name:36} {value:.4g}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
