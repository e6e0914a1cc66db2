"""What a user may get wrong about environments, from the command line: refused at once, in one
message that says what, where, and what would be right."""

import json
from pathlib import Path
from typing import Any

import pytest

from loopwright.actors.chat import ChatFormat, ChatFormatError
from loopwright.actors.tiny_model import train_tokenizer
from loopwright.envs.protocol import Message
from loopwright.orchestrator.cli import main

PLUGIN = Path(__file__).parent / "broken_plugin"
NOBODY = "http://127.0.0.1:9"  # nobody listens at the discard port


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; its exit code is that of a refusal."""
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("action", ["check", "describe", "play", "serve"])
def test_an_unknown_environment_names_the_nearest(
    action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean officeworld?" in refused(["envs", action, "oficeworld"], capsys)


def test_training_on_an_unknown_environment_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["environment.name=oficeworld", f"run.dir={tmp_path}", "cluster.address=none"]
    command = ["train", "quickstart", *(word for s in settings for word in ("--set", s))]
    assert "did you mean officeworld?" in refused(command, capsys)
    assert not list(tmp_path.iterdir())


def test_training_on_a_plugin_that_does_not_import_shows_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"{PLUGIN / 'broken_worlds' / 'unimportable.py'}:World"
    settings = [f"environment.name={target}", f"run.dir={tmp_path}", "environment.options={}"]
    command = ["train", "quickstart", *(word for s in settings for word in ("--set", s))]
    said = refused(command, capsys)
    assert "unimportable.py" in said and "a_package_that_nobody_has" in said


def test_a_bad_line_of_a_task_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?"}\n')
    command = ["envs", "check", "search", "--option", f"questions={path}"]
    assert "questions.jsonl:2: nothing given" in refused(command, capsys)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        (NOBODY, {}, "is `loopwright envs serve` running?"),
        ("search", {"backend": "llm", "backend_options": {"url": NOBODY, "model": "m"}}, "start"),
        ("search", {"backend": "retrieve", "backend_options": {"url": NOBODY}}, "nothing answers"),
    ],
)
def test_an_endpoint_that_is_down_is_named(
    name: str, options: dict[str, Any], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for k, v in options.items() for word in ("--option", f"{k}={json.dumps(v)}")]
    said = refused(["envs", "check", name, *given], capsys)
    assert NOBODY in said and what in said


def test_a_schema_that_is_no_json_is_named_where_it_is_shown_to_the_policy() -> None:
    chat = ChatFormat(train_tokenizer(["say it"] * 3, vocab_size=300))
    parameters = {"type": "object", "properties": {"n": {"default": {1, 2}}}}
    tool = {"type": "function", "function": {"name": "say", "parameters": parameters}}
    chat.tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}{{ m }}{% endfor %}"
    with pytest.raises(ChatFormatError, match=r"the schema of tool 'say' is not JSON: .*set"):
        chat.open([Message(role="user", content="hello")], [tool])
