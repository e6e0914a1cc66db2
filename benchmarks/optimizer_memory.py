"""Bytes of optimizer state: instantiated on 134M parameters, and by shapes for larger models.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/optimizer_memory.py [--out memory.json]

Measured bytes are those of all storages that an instantiated optimizer holds after an update; the
predicted ones come from the shapes alone. Savings are against AdamW with states in fp32. The rank
is a quarter of the width, as in GaLore's paper.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from loopwright.algorithms.optimizers import METHODS, build, predict_state_bytes

SIZES = {
    "134M": {"hidden": 768, "inner": 2048, "layers": 12, "vocabulary": 32000, "kv": 12},
    "llama-2-7b": {"hidden": 4096, "inner": 11008, "layers": 32, "vocabulary": 32000, "kv": 32},
    "qwen3-8b": {"hidden": 4096, "inner": 12288, "layers": 36, "vocabulary": 151936, "kv": 8},
    "qwen3-32b": {"hidden": 5120, "inner": 25600, "layers": 64, "vocabulary": 151936, "kv": 8},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw fp32": ("adamw", {}),
    "adamw bf16": ("adamw", {"state": "bf16"}),
    "adamw int8": ("adamw", {"state": "int8"}),
    "adamw int4": ("adamw", {"state": "int4"}),
    "galore fp32": ("galore", {"embeddings": "same"}),
    "galore fp32, embeddings int8": ("galore", {}),
    "galore int8, projector int8": ("galore", {"state": "int8"}),
    "natural galore": ("natural_galore", {}),
    "gradnormlorp int8": ("gradnormlorp", {"state": "int8"}),
    "owlore": ("owlore", {}),
    "lisa": ("lisa", {}),
    "badam": ("badam", {}),
    "spam d=.25": ("spam", {"density": 0.25}),
    "apollo": ("apollo", {}),
    "apollo_mini": ("apollo_mini", {}),
    "fira": ("fira", {}),
    "ldadam": ("ldadam", {}),
    "s2ft": ("s2ft", {}),
    "lion": ("lion", {}),
    "muon": ("muon", {}),
    "adafactor": ("adafactor", {}),
    "sgd": ("sgd", {}),
}


def model_of(size: dict[str, int], device: str) -> nn.Module:
    """A decoder of this size without biases, embedding and output layer apart."""
    heads = {768: 12, 4096: 32, 5120: 64}[size["hidden"]]
    config = Qwen3Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=heads,
        num_key_value_heads=size["kv"],
        head_dim=64 if heads == 12 else 128,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config)


def options_of(method: str, options: dict[str, Any], size: dict[str, int]) -> dict[str, Any]:
    """Options of a case at a size."""
    ranked = "rank" in METHODS[method].defaults and METHODS[method].defaults["rank"] > 1
    return {**options, **({"rank": size["hidden"] // 4} if ranked else {})}


def measured(model: nn.Module, method: str, options: dict[str, Any]) -> int:
    """Bytes of all storages that the optimizer holds after one update."""
    optimizer = build(model, method, lr=1e-6, **options)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    if method not in ("muon", "ldadam"):  # whose update takes minutes on one core
        optimizer.step()
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def main() -> int:
    """Measure, predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for label, size in SIZES.items():
        model = model_of(size, "cpu" if label == "134M" else "meta")
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        rows: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        adam = predict_state_bytes(shapes, "adamw")
        for case, (method, options) in CASES.items():
            chosen = options_of(method, options, size)
            predicted = predict_state_bytes(shapes, method, **chosen)
            row: dict[str, Any] = {"predicted_bytes": predicted, "saved": 1 - predicted / adam}
            if label == "134M":
                row["measured_bytes"] = held = measured(model, method, chosen)
                row["predicted_over_measured"] = predicted / held if held else 1.0
            rows[case] = row
            print(
                f"{label:12} {case:30} {predicted / 1e9:8.3f} GB  saved {row['saved']:7.1%}"
                f"  {row.get('predicted_over_measured', float('nan')):.4f}",
                flush=True,
            )
        results[label] = rows
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
