"""What a process reads as the model's tokenizer and dtype: compared before anything is played.

All processes read one `model.path`, but not always the same files: nodes have folders of their own,
a folder may change before a run is resumed, a checkpoint brings its tokenizer along.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Where a process has its model from, and what must be the same everywhere."""

    path: str
    dtype: str  # of the weights it holds or plays with; empty: it holds none
    tokenizer: Mapping[str, str]  # part of the tokenizer -> xxh3_64 of it, in hexadecimal

    def differences(self, other: "ModelIdentity") -> list[str]:
        """What differs, in words: parts of the tokenizer, and the dtype where both hold weights."""
        parts = sorted(self.tokenizer.keys() | other.tokenizer.keys())
        found = [p for p in parts if self.tokenizer.get(p) != other.tokenizer.get(p)]
        if self.dtype and other.dtype and self.dtype != other.dtype:
            found.append(f"dtype ({self.dtype} and {other.dtype})")
        return found


def model_identity(path: str, dtype: str = "") -> ModelIdentity:
    """Of the model at `path`, a folder or hub id, whose weights are held in `dtype`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    parts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special tokens": sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()),
        "chat template": tokenizer.chat_template,
        # how text is cut, beside the vocabulary: normalisation, merges, byte fallback
        "rules": [
            tokenizer.encode(text, add_special_tokens=False)
            for text in ("Ünïcode 1234 \t\n  mixed_Case(value=12.5)!", "<|im_start|>user\nhello ")
        ],
    }
    return ModelIdentity(
        path=path,
        dtype=dtype,
        tokenizer={
            name: f"{xxhash.xxh3_64_intdigest(json.dumps(value).encode()):016x}"
            for name, value in parts.items()
        },
    )
