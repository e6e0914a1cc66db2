"""Configuration: presets parse, mistakes are told all at once, what is printed reloads."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loopwright.configs.backends import BACKENDS, BackendError, load_backend
from loopwright.configs.load import ConfigError, Loaded, fields, load, presets, render
from loopwright.configs.schema import Config

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = '[run]\nname = "demo"\n[environment]\nname = "somewhere"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """The shortest configuration there is."""
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, text: str, *overrides: str) -> dict[str, str]:
    """What is wrong with `text`, as dotted key -> the sentence about it."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    sentences = str(caught.value).splitlines()[1:]
    return {p.key: s for p, s in zip(caught.value.problems, sentences, strict=True)}


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_without_a_warning(name: str) -> None:
    assert load(name).warnings == ()


def test_the_quickstart_ships() -> None:
    assert "quickstart" in presets()


def test_at_most_112_keys_each_explained() -> None:
    assert len(fields()) <= 112
    assert not [key for key, info in fields().items() if not info.description]


def test_every_key_is_read_by_something() -> None:
    """A key that nothing reads is a promise that is not kept.

    Read means: as an attribute, by its name as a string, or with its whole table. Keys with one
    legal value have nothing to decide yet.
    """
    sources = [p for floor in ("actors", "orchestrator") for p in (ROOT / floor).glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    unread = []
    for key, info in fields().items():
        table, _, name = key.partition(".")
        whole_table = f".{table}.model_dump()" in text
        one_value = len(get_args(info.annotation)) == 1
        if not (whole_table or one_value or re.search(rf"""[.\["']{name}\b""", text)):
            unread.append(key)
    assert unread == ["rollout.top_p"]  # exists to be refused


def test_origins_tell_default_file_and_override(minimal: Path) -> None:
    loaded = load(minimal, ["run.seed=3", "environment.options.size=4"])
    assert loaded.origins["run.steps"] == "default"
    assert loaded.origins["run.name"] == f"{minimal}:2"
    assert loaded.origins["environment.name"] == f"{minimal}:4"
    assert loaded.origins["run.seed"] == "--set"
    assert loaded.origins["environment.options"] == "--set"
    assert loaded.config.environment.options == {"size": 4}


def test_overrides_take_toml_and_bare_words(minimal: Path) -> None:
    config = load(
        minimal,
        ["rollout.engine=vllm", "trainer.lr=3e-5", 'run.trackers=["jsonl"]', "run.name='a.b'"],
    ).config
    assert config.rollout.engine == "vllm"
    assert config.trainer.lr == 3e-5
    assert config.run.trackers == ("jsonl",)
    assert config.run.name == "a.b"


def test_all_problems_come_at_once_with_place_and_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    text = (
        '[run]\nname = "demo"\nstepss = 3\ngroup_size = 2\n'
        '[environment]\nname = "somewhere"\n'
        '[trainer]\nlr = "fast"\nminibatches = 400\n'
        "[rolout]\nengines = 2\n"
        "[rollout]\ntop_p = 0.9\nmax_lag = -1\n"
    )
    found = problems(path, text, "rollout.engine=vlm", "nonsense")
    assert found[""] == "  expected --set table.key=value, found 'nonsense'"
    assert found["run.stepss"] == (
        f"  run.stepss = 3 ({path}:3): expected no such key; did you mean run.steps?"
    )
    assert found["run.group_size"].endswith("did you mean rollout.group_size?")
    assert found["rolout"].endswith("expected no such table; did you mean rollout?")
    assert f"'fast' ({path}:8): expected a valid number" in found["trainer.lr"]
    assert "0.9" in found["rollout.top_p"]
    assert "logprobs differ" in found["rollout.top_p"]
    assert "greater than or equal to 0" in found["rollout.max_lag"]
    assert found["rollout.engine"].endswith("did you mean 'vllm'?")
    assert "(--set)" in found["rollout.engine"]
    assert "at most the 128 rollouts" in found["trainer.minibatches"]
    assert len(found) == 9


def test_what_has_no_default_is_asked_for(tmp_path: Path) -> None:
    found = problems(tmp_path / "empty.toml", "")
    assert set(found) == {"run", "environment"}
    found = problems(tmp_path / "half.toml", "[run]\n[environment]\n")
    assert "folder name" in found["run.name"]
    assert set(found) == {"run.name", "environment.name"}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rollout.group_size=1"], "rollout.group_size"),
        (["environment.max_new_tokens=1024"], "environment.max_new_tokens"),
        (["trainer.token_budget=512"], "trainer.token_budget"),
        (["tiny.heads=3", "tiny.kv_heads=3"], "tiny.hidden_size"),
        (["tiny.kv_heads=3"], "tiny.kv_heads"),
        (["cluster.ping_every_s=60"], "cluster.hang_timeout_s"),
        (["cluster.step_timeout_s=60"], "cluster.step_timeout_s"),
        (["algorithm.proximal=behavior"], "algorithm.proximal"),
        (["algorithm.dual_clip=0.5"], "algorithm.dual_clip"),
        (["algorithm.mismatch=masked_is", "algorithm.mismatch_low=3.0"], "algorithm.mismatch_low"),
        (['run.trackers=["jsonl", "jsonl"]'], "run.trackers"),
        (["trainer.betas=[0.9, 1.0]"], "trainer.betas"),
        (["algorithm.loss=aipo", "algorithm.level=turn"], "algorithm.level"),
        (["algorithm.loss=aipo", "algorithm.clip=0.2"], "algorithm.clip"),
        (["algorithm.loss=reinforce", "algorithm.dual_clip=5.0"], "algorithm.dual_clip"),
        (["algorithm.aipo_rho=2.0"], "algorithm.aipo_rho"),
        (["algorithm.mismatch=none", "algorithm.mismatch_cap=5.0"], "algorithm.mismatch_cap"),
        (
            ["algorithm.mismatch=sequence_is", "algorithm.mismatch_low=0.1"],
            "algorithm.mismatch_low",
        ),
        (
            ["algorithm.mismatch=geometric_mask", "algorithm.mismatch_low=2.5"],
            "algorithm.mismatch_low",
        ),
        (["rollout.group_size=1"], "rollout.group_size"),
        (["rollout.max_lag=-1"], "rollout.max_lag"),
        (["rollout.top_p=0.9"], "rollout.top_p"),
        (["algorithm.lam=0.9"], "algorithm.lam"),
        (["algorithm.gamma=0.9"], "algorithm.gamma"),
        (["algorithm.value_lr=1e-2"], "algorithm.value_lr"),
        (["algorithm.advantage=gae", "algorithm.drop_below=0.1"], "algorithm.drop_below"),
        (["algorithm.kl=k3", "algorithm.drop_below=0.1"], "algorithm.drop_below"),
        (["algorithm.kl_coef=0.1"], "algorithm.kl_coef"),
        (["algorithm.kl_in=reward"], "algorithm.kl_in"),
        (["algorithm.loss=gspo", "algorithm.level=turn"], "algorithm.level"),
        (["model.lora_alpha=16.0"], "model.lora_alpha"),
        (["rollout.max_lag=0", "rollout.window=2", "algorithm.mismatch=none"], "rollout.window"),
        (["rollout.window=17"], "rollout.window"),
        (["rollout.window=2", "rollout.cut=0.9"], "rollout.window"),
        (["rollout.cut_group=0.5"], "rollout.cut_group"),
        (["rollout.cut=0.9", "rollout.cut_group=1.0"], "rollout.cut_group"),
        (["rollout.cut=0.9", "rollout.group_size=2"], "rollout.cut_group"),
    ],
)
def test_contradictions_and_settings_without_effect_are_refused(
    minimal: Path, overrides: list[str], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(minimal, overrides)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert caught.value.problems[0].where == "--set" or "--set" not in str(overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.mismatch=none"], "stale"),
        (["model.dtype=bfloat16"], "CPU"),
        (["model.path=/models/mine", "tiny.layers=2"], "[tiny]"),
        (["warm_start.steps=5"], "[warm_start]"),
        (["algorithm.kl=k1"], "its gradient is 0 on average"),
        (["rollout.max_lag=0", "algorithm.proximal=loglinear"], "without lag"),
    ],
)
def test_what_is_rarely_meant_is_a_warning(minimal: Path, overrides: list[str], words: str) -> None:
    (warning,) = load(minimal, overrides).warnings
    assert words in warning


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.max_lag=0", "algorithm.mismatch=none", "algorithm.proximal=behavior"],
        ["algorithm.loss=aipo", "algorithm.mismatch=none"],
        ["algorithm.loss=aipo", "algorithm.proximal=behavior"],
        ["algorithm.loss=gspo", "algorithm.clip=0.2"],
        ["algorithm.loss=decoupled", "algorithm.mismatch=none", "algorithm.level=turn"],
        ["algorithm.advantage=gae", "rollout.group_size=1", "algorithm.lam=0.95"],
        ["algorithm.kl=k1", "algorithm.kl_in=reward", "algorithm.kl_coef=0.05"],
        ["algorithm.proximal=loglinear", "algorithm.mismatch=geometric_mask"],
        ["model.lora_rank=8", "model.lora_alpha=16.0"],
        ["rollout.cut=0.9", "rollout.group_size=6"],
        ["rollout.window=16"],
        ["rollout.dynamic_sampling=true", "rollout.adaptive_concurrency=true"],
    ],
)
def test_combinations_that_are_meant_pass(minimal: Path, overrides: list[str]) -> None:
    assert load(minimal, overrides).warnings == ()


@pytest.mark.parametrize("explain", [False, True])
def test_what_is_printed_loads_back_to_the_same(minimal: Path, explain: bool) -> None:
    options = (
        'environment.options={ "odd key" = "a\\"b\\\\c\\n", list = [1, 2.5, true], t = { x = 1 } }'
    )
    loaded = load(minimal, [options, "trainer.lr=3e-05", "rollout.engine=vllm"])
    text = render(loaded, explain=explain)
    assert text.count("# default") > 50
    assert re.search(r'^engine = "vllm" +# --set$', text, re.MULTILINE)
    minimal.write_text(text)
    assert load(minimal).config == loaded.config


@settings(deadline=None)
@given(
    st.recursive(
        st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda leaf: (
            st.lists(leaf, max_size=3)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), leaf, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_any_option_survives_printing(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    config = Config.model_validate(
        {"run": {"name": "x"}, "environment": {"name": "y", "options": {"value": value}}}
    )
    origins = dict.fromkeys(fields(), "default")
    path.write_text(render(Loaded(config=config, origins=origins, warnings=())), encoding="utf-8")
    assert load(path).config == config


def test_a_file_that_is_not_there_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preset.*quickstart"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load("quickstrat")


def test_broken_toml_tells_the_line(tmp_path: Path) -> None:
    found = problems(tmp_path / "bad.toml", "[run]\nname = \n")
    assert "line 2" in found[""]


def test_a_config_is_frozen_and_checked_without_a_file() -> None:
    tables = {"run": {"name": "x"}, "environment": {"name": "y"}}
    config = Config.model_validate(tables)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="group_size"):
        Config.model_validate({**tables, "rollout": {"group_size": 1}})


@pytest.mark.parametrize("key", BACKENDS)
def test_the_schema_offers_exactly_the_backends_there_are(key: str) -> None:
    assert set(get_args(fields()[key].annotation)) == set(BACKENDS[key])


@pytest.mark.parametrize(
    "target", [b.target for table in BACKENDS.values() for b in table.values() if not b.extra]
)
def test_backends_that_need_no_extra_exist(target: str) -> None:
    module, _, name = target.partition(":")
    assert name in vars(import_module(module))


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(BackendError, match=r"'jax'.*\['torch', 'vllm'\]"):
        load_backend("rollout.engine", "jax")


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, loopwright.configs.load as l; l.load('quickstart');"
        "print([m for m in ('torch', 'ray', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"
