"""Messages to tokens, once: what the policy has seen or written is never decoded and encoded again.

`ChatFormat.open` renders the first messages with the tokenizer's own chat template.
`ChatFormat.extend` renders only what comes after the policy's turn, as the difference of two
renderings of a fixed stand-in conversation, so the prefix of turn n+1 equals turn n's tokens
whatever the template does with earlier turns.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopwright.envs.conformance.declared import schema_problem
from loopwright.envs.protocol import Message

_KNOWN_TEXTS = 512  # whose tokens are kept, at most some 20 MB
_STAND_IN = "stand in"
_STAND_IN_CHAT = [
    {"role": "user", "content": _STAND_IN},
    {"role": "assistant", "content": _STAND_IN},
]


class ChatFormatError(Exception):
    """The tokenizer has no chat template, or one that cannot be continued turn by turn."""


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


class ChatFormat:
    """The chat template of one tokenizer, used append-only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ChatFormatError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "set one in its tokenizer_config.json or chat_template.jinja"
            )
        self.tokenizer = tokenizer
        rendered = self._render(_STAND_IN_CHAT, tools=None, prompt=False)
        turn_end = rendered.rindex(_STAND_IN) + len(_STAND_IN)
        self._stand_in = rendered[:turn_end]  # up to the end of the policy's words
        # The episodes of a group open alike, and read many of the same replies.
        self._encode = lru_cache(maxsize=_KNOWN_TEXTS)(self._encode_anew)
        self._tail = lru_cache(maxsize=_KNOWN_TEXTS)(self._tail_anew)
        self.stop_token_ids = self._find_stop_tokens(rendered[turn_end:])

    @classmethod
    def load(cls, model_path: str) -> "ChatFormat":
        """The format of the model at `model_path` (folder or hub id)."""
        return cls(AutoTokenizer.from_pretrained(model_path))

    def open(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> np.ndarray:
        """Tokens of the first prompt, generation prompt included. [T] int32

        Raises `ChatFormatError` for tools that the template cannot write down.
        """
        try:
            text = self._render(
                _plain(messages), tools=[dict(t) for t in tools] or None, prompt=True
            )
        except TypeError as error:  # what the template's `tojson` makes of an odd value
            problems = [problem for tool in tools if (problem := schema_problem(tool))]
            raise ChatFormatError("; ".join(problems[:3]) or str(error)) from error
        return self._encode(text)

    def extend(self, messages: Sequence[Message], last_token_id: int | None) -> np.ndarray:
        """Tokens from the end of the policy's turn to the next generation prompt. [T] int32

        `last_token_id` is the turn's last token: where it is a stop token, the template's own is
        not repeated.
        """
        tokens = self._tail(tuple(messages))
        ended = last_token_id in self.stop_token_ids
        if ended and tokens.size and int(tokens[0]) in self.stop_token_ids:
            return tokens[1:]
        return tokens

    def decode(self, token_ids: np.ndarray) -> str:
        """The text of a completion, its stop token removed."""
        ids = [int(t) for t in token_ids if int(t) not in self.stop_token_ids]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _find_stop_tokens(self, tail: str) -> tuple[int, ...]:
        """The end-of-sequence token, and whatever token the template puts right after a turn."""
        stops = {self.tokenizer.eos_token_id} - {None}
        first = self._encode(tail)[:1]
        if first.size and int(first[0]) in self.tokenizer.all_special_ids:
            stops.add(int(first[0]))
        if not stops:
            raise ChatFormatError(
                f"{self.tokenizer.name_or_path!r} has no end-of-turn token to stop at"
            )
        return tuple(sorted(stops))

    def _render(
        self, messages: list[dict[str, str]], *, tools: list[dict[str, Any]] | None, prompt: bool
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
        )

    def _tail_anew(self, messages: tuple[Message, ...]) -> np.ndarray:
        """What the template writes after the policy's words, the end of its turn included."""
        after = self._render(_STAND_IN_CHAT + _plain(messages), tools=None, prompt=True)
        if not after.startswith(self._stand_in):
            raise ChatFormatError(
                "the chat template rewrites earlier turns when a message is added; "
                "a context must be append-only: use a template that keeps them"
            )
        return self._encode(after[len(self._stand_in) :])

    def _encode_anew(self, text: str) -> np.ndarray:
        tokens = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        tokens.setflags(write=False)  # it is handed out more than once
        return tokens
