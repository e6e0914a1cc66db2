"""`loopwright train` over every channel and placement that a machine without a GPU can have."""

import json
from pathlib import Path
from typing import Any

import pytest

from loopwright.configs.load import ConfigError, load
from loopwright.configs.schema import Config
from loopwright.orchestrator.cli import DONE
from loopwright.orchestrator.placement import Plan, needs, plan
from loopwright.orchestrator.replay import replay
from loopwright.orchestrator.resources import Resources
from tests.tiny_run import train, write_config

COLLECTIVE = 'rollout.channel_options={carrier="collective"}'
BY_TURNS = ("cluster.placement=colocated", "rollout.max_lag=0")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of a kind."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("rollout.channel=collective",), "collective (as configured)"),
        (("rollout.channel=delta",), "delta over shared_memory"),
        (("rollout.channel=delta", COLLECTIVE), "delta over collective"),
        (("model.lora_rank=4",), "adapter over shared_memory (model.lora_rank = 4"),
        (("model.lora_rank=4", "rollout.channel=adapter", COLLECTIVE), "adapter over collective"),
        (("model.lora_rank=4", "model.adapter=dora"), "adapter over shared_memory"),
        (("model.lora_rank=4", "model.adapter=loha"), "torch serves no model.adapter = 'loha'"),
        (BY_TURNS, "share one copy of the weights"),
        ((*BY_TURNS, "model.lora_rank=4"), "adapter over shared_memory"),
        (("rollout.on_update=recompute",), "on one host"),
        (("rollout.engines=2", "rollout.channel=collective"), "collective"),
    ],
)
def test_a_run_over_each_channel(
    tmp_path: Path, policy: str, overrides: tuple[str, ...], told: str
) -> None:
    code, folder = train(tmp_path, policy, "run.steps=2", "evaluation.tasks=1", *overrides)
    assert code == DONE
    (placed,) = events(folder, "placement")
    assert told in placed["why"]
    (parity,) = events(folder, "parity")
    assert 0 <= parity["logprob_difference_max"] < 1e-4
    assert not events(folder, "publish_again") and not events(folder, "actor_lost")
    if "model.lora_rank=4" in overrides:
        assert all(step.equal for step in replay(folder))


def planned(tmp_path: Path, has: Resources, *overrides: str) -> tuple[Config, Plan]:
    """What is planned for a cluster."""
    config = load(write_config(tmp_path, "tiny"), [*overrides, "trainer.threads=4"]).config
    return config, plan(config, has)


def test_one_node_or_several_decides_what_carries_weights(tmp_path: Path) -> None:
    one, several = Resources(8, 0, ((8, 0),)), Resources(8, 0, ((4, 0), (4, 0)))
    config, chosen = planned(tmp_path, one, "rollout.threads=2")
    assert (chosen.channel, chosen.colocated) == ("shared_memory", False)
    assert needs(config, one).bundles == [{"CPU": 6}, {"CPU": 0.5}]
    config, chosen = planned(tmp_path, several, "rollout.threads=2")
    assert (chosen.channel, chosen.carrier) == ("collective", "collective")
    assert needs(config, several).bundles == [{"CPU": 4}, {"CPU": 2}, {"CPU": 0.5}]
    config, chosen = planned(tmp_path, several, "rollout.threads=2", "model.lora_rank=4")
    assert (chosen.channel, chosen.carrier) == ("adapter", "collective")


def test_too_few_devices_for_both_means_by_turns(tmp_path: Path) -> None:
    small, gpu = Resources(4, 0, ((4, 0),)), Resources(64, 1, ((64, 1),))
    config, chosen = planned(tmp_path, small, "rollout.max_lag=0")
    assert chosen.colocated and "4 CPUs, 5 needed" in chosen.why_placed
    assert needs(config, small).bundles == [{"CPU": 4}, {"CPU": 0.5}]
    _, chosen = planned(tmp_path, small, "rollout.max_lag=1")
    assert not chosen.colocated and "overlaps" in chosen.why_placed
    config, chosen = planned(tmp_path, gpu, "rollout.max_lag=0", "model.device=cuda")
    assert chosen.colocated and chosen.channel == "ipc"
    assert needs(config, gpu).bundles[0] == {"CPU": 4, "GPU": 1}
    _, chosen = planned(tmp_path, small, "model.lora_rank=4", "rollout.engine=vllm")
    assert chosen.channel == "shared_memory" and "half the speed" in chosen.why


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (("cluster.placement=colocated",), "cluster.placement", "rollout.max_lag = 0"),
        ((*BY_TURNS, "rollout.channel=collective"), "rollout.channel", "share a device"),
        (("rollout.channel=ipc",), "rollout.channel", "model.device = 'cpu'"),
        (
            ("rollout.channel=ipc", "model.device=cuda", "cluster.placement=disaggregated"),
            "rollout.channel",
            "devices of their own",
        ),
        (("rollout.channel=adapter",), "rollout.channel", "there are none"),
        (
            (
                "rollout.channel=adapter",
                "model.lora_rank=4",
                "rollout.engine=vllm",
                "warm_start.demonstrations=9",
            ),
            "rollout.channel",
            "the cloned ones",
        ),
        (
            (
                "rollout.channel=adapter",
                "model.lora_rank=4",
                "model.adapter=dora",
                "rollout.engine=vllm",
            ),
            "rollout.channel",
            "vLLM serves no DoRA",
        ),
        (("rollout.channel=delta", "model.lora_rank=4"), "rollout.channel", "change everywhere"),
        (
            ("rollout.channel=delta", "rollout.channel_options={full_evry=3}"),
            "rollout.channel_options.full_evry",
            "full_every",
        ),
        (
            ("rollout.channel=delta", "rollout.channel_options={full_every=0}"),
            "rollout.channel_options.full_every",
            "at least 1",
        ),
        (
            ("rollout.channel=collective", "rollout.channel_options={full_every=2}"),
            "rollout.channel_options.full_every",
            "no effect with rollout.channel = 'collective'",
        ),
        (
            ("rollout.channel_options={bucket_bytes=65536}",),
            "rollout.channel_options.bucket_bytes",
            "name rollout.channel",
        ),
        (
            ("rollout.channel=delta", 'rollout.channel_options={carrier="pigeon"}'),
            "rollout.channel_options.carrier",
            "shared_memory or collective",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], key: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write_config(tmp_path, "tiny"), list(overrides))
    assert key in str(caught.value) and expected in str(caught.value)
