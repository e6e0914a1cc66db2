"""A tiny policy from nothing: a tokenizer trained on the environment's own text and a random
Qwen3-shaped model.

For machines without a model hub. The tokenizer has no leading-space variants, so a value is the
same token (or tokens) in an observation and in an argument: `"Ana"`, ` Ana` and `=Ana` all hold
`Ana`. Any text encodes (bytes are the fallback) and decodes to exactly itself.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN, *ROLE_TOKENS)

# Names with their dots (`contacts.find`) stay whole, numbers are cut into pairs of digits (so that
# 09:30 is `09`,
# `:`, `30`), and each run of blanks and punctuation stands by itself: never glued to a name or a
# value.
PIECES = r"[A-Za-z_]+(?:\.[A-Za-z_]+)*|\d{1,2}|[^A-Za-z_\d]+"

# One role token, the text, one end token: more overhead would be a third of a short turn.
CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|system|>' }}"
    "{% for tool in tools %}{{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }})\n{% endfor %}"
    "{{ '<|im_end|>' }}{% endif -%}"
    "{%- for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|im_end|>' }}"
    "{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}"
)

# One in so many learned tokens is a fragment, for words that are not in the vocabulary.
_MERGED_SHARE = 8


# Chosen by measurement (docs/decisions/0008-tiny-policy.md): with the usual 0.02 and 10,000 a model
# of this size takes three times the demonstrations before it copies values from observations at
# all.
_INIT_GAIN = 0.7  # times width^-1/2: activations keep their size through a narrow model
_ROPE_THETA = 1000.0  # wavelengths up to the few hundred tokens of an episode


class TinyModelError(ValueError):
    """A tiny policy that cannot be built as asked."""


def build_tiny_policy(
    texts: Iterable[str],
    out_dir: str | Path,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 384,
    max_context: int = 1024,
    vocab_size: int = 1024,
    seed: int = 0,
) -> Path:
    """Write tokenizer and random-initialised model to `out_dir` in Hugging Face format; returns the
    folder.

    `texts` are samples of what the policy will read and write. The vocabulary may come out smaller
    than `vocab_size` if they hold fewer distinct pieces. Raises `TinyModelError` for sizes that do
    not divide.
    """
    config = tiny_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=intermediate_size,
        max_context=max_context,
    )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    tokenizer.model_max_length = max_context
    tokenizer.save_pretrained(folder)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def tiny_config(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    max_context: int,
) -> Qwen3Config:
    """The shape of the tiny policy. Raises `TinyModelError` for sizes that do not divide."""
    if hidden_size % heads or heads % kv_heads or (hidden_size // heads) % 2:
        raise TinyModelError(
            f"hidden_size={hidden_size}, heads={heads}, kv_heads={kv_heads}: heads must divide "
            "hidden_size into even "
            "parts, and kv_heads must divide heads"
        )
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=max_context,
        initializer_range=_INIT_GAIN / hidden_size**0.5,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
    )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is: special tokens, 256 bytes, fragments, then the most frequent
    whole pieces.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise TinyModelError(
            f"vocab_size={vocab_size}, at least {least} are needed for bytes and special tokens"
        )
    split = _splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    if not counts:
        raise TinyModelError(
            "no text to train a tokenizer on; give samples of observations and actions"
        )
    vocab, merges = _fragments(counts, 256 + (vocab_size - least) // _MERGED_SHARE)
    for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(vocab) + len(SPECIAL_TOKENS) >= vocab_size:
            break
        vocab.setdefault(piece, len(vocab))
    # A piece in the vocabulary is taken whole, without the intermediate fragments that merging it
    # would need.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=["<|im_start|>", *ROLE_TOKENS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _fragments(counts: Counter[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges over the pieces, `size` tokens with the 256 bytes: (vocabulary, merges)."""
    tokenizer = Tokenizer(models.BPE())
    # Pieces are already in the byte alphabet and must not be split or mapped again.
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        (piece for piece, n in sorted(counts.items()) for _ in range(n)), trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]
