"""Shapes of well-known models as numbers, so that `plan` needs neither a network nor weights.

From the config.json that each model's publisher ships with it on the Hugging Face hub; the number
of parameters is the one its model card or weight index gives, and a test compares the two.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from loopwright.actors.model_files import ModelError


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: type
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    parameters: int  # as published

    def config(self) -> Any:
        return self.kind(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
        )


_L, _Q2, _Q3 = LlamaConfig, Qwen2Config, Qwen3Config
# fmt: off
KNOWN: Mapping[str, _Shape] = MappingProxyType({
    "Llama-2-7B": _Shape(_L, 32000, 4096, 11008, 32, 32, 32, 128, False, 6_738_415_616),
    "Llama-2-13B": _Shape(_L, 32000, 5120, 13824, 40, 40, 40, 128, False, 13_015_864_320),
    "Llama-3.1-8B": _Shape(_L, 128256, 4096, 14336, 32, 32, 8, 128, False, 8_030_261_248),
    "Llama-3.1-70B": _Shape(_L, 128256, 8192, 28672, 80, 64, 8, 128, False, 70_553_706_496),
    "Llama-3.2-1B": _Shape(_L, 128256, 2048, 8192, 16, 32, 8, 64, True, 1_235_814_400),
    "Llama-3.2-3B": _Shape(_L, 128256, 3072, 8192, 28, 24, 8, 128, True, 3_212_749_824),
    "Qwen2.5-0.5B": _Shape(_Q2, 151936, 896, 4864, 24, 14, 2, 64, True, 494_032_768),
    "Qwen2.5-1.5B": _Shape(_Q2, 151936, 1536, 8960, 28, 12, 2, 128, True, 1_543_714_304),
    "Qwen2.5-7B": _Shape(_Q2, 152064, 3584, 18944, 28, 28, 4, 128, False, 7_615_616_512),
    "Qwen2.5-32B": _Shape(_Q2, 152064, 5120, 27648, 64, 40, 8, 128, False, 32_763_876_352),
    "Qwen3-0.6B": _Shape(_Q3, 151936, 1024, 3072, 28, 16, 8, 128, True, 596_049_920),
    "Qwen3-1.7B": _Shape(_Q3, 151936, 2048, 6144, 28, 16, 8, 128, True, 1_720_574_976),
    "Qwen3-4B": _Shape(_Q3, 151936, 2560, 9728, 36, 32, 8, 128, True, 4_022_468_096),
    "Qwen3-8B": _Shape(_Q3, 151936, 4096, 12288, 36, 32, 8, 128, False, 8_190_735_360),
    "Qwen3-14B": _Shape(_Q3, 151936, 5120, 17408, 40, 40, 8, 128, False, 14_768_307_200),
    "Qwen3-32B": _Shape(_Q3, 151936, 5120, 25600, 64, 64, 8, 128, False, 32_762_123_264),
})
# fmt: on


def model_config(name: str) -> Any:
    """The Hugging Face config that `name` means: a known model, a folder or config.json, or a hub
    id, whose last part may be a known model's name.

    Raises `ModelError` with the nearest known name, or if it is no causal language model.
    """
    by_name = {known.lower(): shape for known, shape in KNOWN.items()}
    bare = name.rpartition("/")[2].lower().removesuffix("-hf").removesuffix("-instruct")
    path = Path(name).expanduser()
    if bare in by_name and not path.exists():
        return by_name[bare].config()
    if not path.exists() and (path.suffix or name.startswith((".", "/", "~"))):
        raise ModelError(f"model {name!r}: no such file or folder")
    try:
        # A name without its publisher is more likely misspelt than a hub id: nobody is asked.
        config = AutoConfig.from_pretrained(
            str(path) if path.exists() else name, local_files_only="/" not in name
        )
    except (OSError, ValueError, KeyError) as error:
        close = difflib.get_close_matches(bare, by_name, n=1, cutoff=0.4)
        nearest = next((k for k in KNOWN if close and k.lower() == close[0]), "")
        hint = f"did you mean {nearest}? " if nearest else ""
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {name!r} has no config that can be read ({reason}); {hint}expected a folder "
            f"with config.json, a hub id such as organisation/name, or one of {', '.join(KNOWN)}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"model {name!r} is a {config.model_type!r}, which is no causal language model; "
            "expected one that AutoModelForCausalLM knows"
        )
    return config
