"""Write the Grafana dashboard: the panels are named here, the JSON is made of them.

python deploy/dashboard.py > deploy/kubernetes/components/monitoring/loopwright.json
"""

import json
from typing import Any

# (title, unit, [(legend, metric as in metrics.jsonl)]); Grafana's names of units
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Held-out success", "percentunit", (("success", "eval/success"),)),
    ("Reward", "short", (("mean", "rollout/reward_mean"),)),
    ("Step", "short", (("step", "step"),)),
    ("Policy lag", "short", (("mean", "rollout/lag_mean"), ("max", "rollout/lag_max"))),
    (
        "Where a step's time goes",
        "s",
        (
            ("waiting for rollouts", "time/take_s"),
            ("training", "time/train_s"),
            ("publishing", "time/publish_s"),
        ),
    ),
    (
        "Sampler against trainer",
        "short",
        (
            ("KL (k3)", "train/mismatch_kl_k3_mean"),
            ("|Δ logprob| mean", "train/mismatch_abs_mean"),
            ("|Δ logprob| max", "train/mismatch_abs_max"),
        ),
    ),
    ("Entropy", "short", (("mean", "train/entropy_mean"),)),
    ("Clipped ratios", "percentunit", (("share", "train/ratio_clipped_frac"),)),
    ("Tokens per second, by engine", "short", (("engine {{engine}}", "engine/*/tokens_per_s"),)),
    ("Engines busy", "percentunit", (("engine {{engine}}", "engine/*/busy_frac"),)),
    (
        "Episodes",
        "short",
        (("playing", "queue/playing_episodes"), ("groups ready", "queue/ready_groups")),
    ),
    (
        "Faults",
        "short",
        (("infra faults", "fault/infra_total"), ("actors lost", "fault/actors_lost_total")),
    ),
    ("Generation stood still for a publish", "s", (("longest", "publish/pause_max_s"),)),
)
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


def series(metric: str) -> str:
    """The Prometheus name of a metric as the console and metrics.jsonl call it."""
    return "ray_loopwright_" + metric.replace("/*/", "_").replace("/", "_")


def dashboard() -> dict[str, Any]:
    """The whole dashboard, one run at a time."""
    panels = [_panel(index, *panel) for index, panel in enumerate(PANELS)]
    run = {
        "name": "run",
        "type": "query",
        "query": "label_values(ray_loopwright_step, run)",
        "refresh": 2,
        "sort": 1,
    }
    return {
        "title": "Loopwright",
        "uid": "loopwright",
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [run]},
        "panels": panels,
    }


def _panel(index: int, title: str, unit: str, lines: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    row, column = divmod(index, _COLUMNS)
    return {
        "id": index + 1,
        "title": title,
        "type": "timeseries",
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "legendFormat": legend, "expr": f'{series(m)}{{run="$run"}}'}
            for i, (legend, m) in enumerate(lines)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))
