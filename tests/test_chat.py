"""Chat templates used append-only: what is opened and extended equals the template's own whole."""

from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from loopwright.actors.chat import ChatFormat, ChatFormatError
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.envs.protocol import Message

# Ends a turn with a newline after its end token, which the policy does not write.
_NEWLINE_AFTER_TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what earlier turns of the assistant said, as templates do with reasoning.
_REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = [Message(role="system", content="office"), Message(role="user", content="find Ana")]
TURNS = [
    ("find Ana", [Message(role="tool", content="= 17")]),
    ("17 ok", [Message(role="tool", content="done ."), Message(role="user", content="Ana ?")]),
]


def _tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["office find Ana = 17 . ok done\n"] * 3, vocab_size=300)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _whole(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The template's own rendering of the whole conversation, up to the next turn's beginning."""
    text = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("template", [None, _NEWLINE_AFTER_TURN], ids=["tiny", "newline"])
def test_pieces_add_up_to_the_templates_own_whole(template: str | None) -> None:
    tokenizer = _tokenizer(template)
    chat = ChatFormat(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in chat.stop_token_ids
    tokens, messages = chat.open(OPENING).tolist(), list(OPENING)
    assert tokens == _whole(tokenizer, messages)
    for action, replies in TURNS:
        written = tokenizer.encode(action, add_special_tokens=False)
        tokens += [*written, stop, *chat.extend(replies, stop).tolist()]
        messages += [Message(role="assistant", content=action), *replies]
        assert tokens == _whole(tokenizer, messages)


@pytest.mark.parametrize("template", [None, _NEWLINE_AFTER_TURN], ids=["tiny", "newline"])
def test_a_turn_without_an_end_is_given_the_templates_own(template: str | None) -> None:
    chat = ChatFormat(_tokenizer(template))
    stop = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    replies = TURNS[0][1]
    cut, ended = chat.extend(replies, None), chat.extend(replies, stop)
    assert cut.tolist() == [stop, *ended.tolist()]
    assert cut.dtype == np.int32


def test_what_decode_gives_has_no_stop_token() -> None:
    chat = ChatFormat(_tokenizer())
    stop = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*chat.tokenizer.encode("find Ana", add_special_tokens=False), stop]
    assert chat.decode(np.array(ids)) == "find Ana"


def test_tools_are_part_of_the_opening_alone() -> None:
    chat = ChatFormat(_tokenizer())
    parameters = {"type": "object", "properties": {"name": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
    with_tools = chat.open(OPENING, tools)
    text = chat.tokenizer.decode(with_tools.tolist())
    assert "find(name)" in text and text.count("find Ana") == 1
    assert with_tools.tolist()[-len(chat.open(OPENING)) :] == chat.open(OPENING).tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    chat = ChatFormat(_tokenizer(_REWRITES))
    with pytest.raises(ChatFormatError, match="rewrites earlier turns"):
        chat.extend(TURNS[0][1], None)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ChatFormatError, match="has no chat template; set one"):
        ChatFormat(tokenizer)


def test_texts_that_come_again_give_the_same_tokens_which_nobody_can_change() -> None:
    chat = ChatFormat(_tokenizer())
    stop = chat.stop_token_ids[0]
    for _ in range(2):  # the second time from memory
        first = chat.extend(TURNS[0][1], stop)
        other = chat.extend(TURNS[1][1], stop)
        assert first.tolist() != other.tolist()
        assert chat.extend(list(TURNS[0][1]), None).tolist()[1:] == first.tolist()
        for tokens in (first, chat.open(OPENING)):
            with pytest.raises(ValueError, match="read-only"):
                tokens[0] = 7
