"""`loopwright train` with two trainer ranks on Ray: one is killed, and the run ends well."""

import os
import signal
from pathlib import Path

from safetensors import safe_open

from tests.driven_run import DrivenRun, build_policy, write_config


def test_a_run_of_two_ranks_survives_the_loss_of_one(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, build_policy(tmp_path / "model"), address="local", steps=4, max_lag=0
    )
    ranks = ("trainer.ranks=2", 'trainer.backend="fsdp2"', "cluster.cpus=4")
    with DrivenRun(config, *ranks) as run:
        run.wait("the first step", lambda: run.steps() >= 1, timeout_s=180)
        os.kill(run.events("ranks_met")[-1]["pids"][1], signal.SIGKILL)
        assert run.finish(timeout_s=240) == 0, run.errors()[-2000:]
        met = run.events("ranks_met")
        assert len(met) >= 2 and not set(met[0]["pids"]) & set(met[-1]["pids"])
        assert run.count("actor_back", "trainer") >= 1
        assert run.steps() == 4
        checkpoint = run.folder / "checkpoints" / "step-4"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
    assert not list(Path("/dev/shm").glob(f"loopwright-{run.folder.name}-*"))
