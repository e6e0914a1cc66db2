"""The manifests in `deploy/` pass strict schemas and our own rules; what is wrong is found."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.dashboard import PANELS, dashboard, series
from deploy.validate import problems
from loopwright.configs.load import load
from loopwright.orchestrator.resources import Needs
from tests.kustomized import render
from tests.tiny_run import train

KUBERNETES = Path(__file__).resolve().parent.parent / "deploy" / "kubernetes"
OVERLAYS = sorted(p.parent.name for p in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(p.parent.name for p in (KUBERNETES / "components").glob("*/kustomization.yaml"))
Manifest = dict[str, Any]


def overlay(name: str) -> list[Manifest]:
    return render(KUBERNETES / "overlays" / name)


def ray_of(manifests: list[Manifest]) -> Manifest:
    (found,) = [m for m in manifests if m["apiVersion"] == "ray.io/v1"]
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_valid(name: str) -> None:
    assert [p for manifest in overlay(name) for p in problems(manifest)] == []


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_is_valid_on_a_gpu_node(name: str, tmp_path: Path) -> None:
    """Components that are in no overlay are checked on one."""
    whole = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, whole)
    folder = whole / "overlays" / "with-component"
    folder.mkdir()
    base = "../quickstart-cpu" if name == "environments" else "../single-gpu-node"
    kustomization = {"resources": [base], "components": [f"../../components/{name}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    assert [p for manifest in render(folder) for p in problems(manifest)] == []


@pytest.mark.skipif(not shutil.which("kubectl"), reason="compares with kubectl's kustomize")
@pytest.mark.parametrize("name", OVERLAYS)
def test_rendered_as_kubectl_does(name: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    def by_name(manifests: list[Manifest]) -> dict[str, Manifest]:
        return {f"{m['kind']}/{m['metadata']['name']}": m for m in manifests}

    theirs = by_name([m for m in yaml.safe_load_all(done.stdout) if m])
    assert by_name(overlay(name)) == theirs


def misspelt(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpecs"] = {}


def misspelt_in_pod(job: Manifest) -> None:
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    template["spec"]["containers"][0]["imagePullPolice"] = "Always"


def of_the_wrong_type(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "one"


def open_to_everyone(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]["authOptions"]


def as_root(job: Manifest) -> None:
    template = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    template["spec"]["securityContext"]["runAsNonRoot"] = False


def privileged(job: Manifest) -> None:
    container = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    container["securityContext"]["allowPrivilegeEscalation"] = True


def without_a_volume(job: Manifest) -> None:
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    template["spec"]["volumes"].pop()


def too_few(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = 9


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (misspelt, "headGroupSpecs"),
        (misspelt_in_pod, "imagePullPolice"),
        (of_the_wrong_type, "workerGroupSpecs.0.replicas"),
        (open_to_everyone, "authOptions"),
        (as_root, "runAsNonRoot"),
        (privileged, "may gain privileges"),
        (without_a_volume, "no volume of the pod"),
        (too_few, "replicas outside 1 ... 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_found(spoil: Callable[[Manifest], None], named: str) -> None:
    job = copy.deepcopy(ray_of(overlay("quickstart-cpu")))
    assert list(problems(job)) == []
    spoil(job)
    assert any(named in problem for problem in problems(job)), list(problems(job))


def test_a_wrong_field_of_kubernetes_own_kinds_is_found() -> None:
    (budget, *_) = [m for m in overlay("quickstart-cpu") if m["kind"] == "PodDisruptionBudget"]
    budget["spec"]["maxUnavailabel"] = 1
    assert any("maxUnavailabel" in problem for problem in problems(budget))


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_reaches_the_head_from_elsewhere(name: str) -> None:
    """One policy closes all pods, and no other opens more than the operator's way to the head."""
    policies = [m for m in overlay(name) if m["kind"] == "NetworkPolicy"]
    closed = [p for p in policies if p["spec"]["podSelector"] == {} and "ingress" not in p["spec"]]
    assert closed
    opened = [rule for p in policies for rule in p["spec"].get("ingress", ())]
    foreign = [r for r in opened for source in r["from"] if "namespaceSelector" in source]
    assert [[port["port"] for port in rule["ports"]] for rule in foreign] == [[8265]]
    assert all(rule.get("from") for rule in opened)


def test_configurations_of_overlays_load() -> None:
    files = sorted(KUBERNETES.glob("overlays/*/train.toml"))
    assert files
    for file in files:
        loaded = load(file, [])
        assert loaded.config.run.dir == "/runs"
        assert loaded.config.model.device == "cuda"


@pytest.mark.parametrize("name", OVERLAYS)
def test_room_for_what_the_overlay_runs(name: str) -> None:
    """GPUs asked for by the configuration are there, on the groups that may hold them."""
    manifests = overlay(name)
    texts = [m["data"]["train.toml"] for m in manifests if m["kind"] == "ConfigMap"]
    cluster = ray_of(manifests)["spec"].get("rayClusterSpec", ray_of(manifests)["spec"])
    gpus = sum(
        int(c["resources"]["limits"].get("nvidia.com/gpu", 0)) * group["replicas"]
        for group in cluster["workerGroupSpecs"]
        for c in group["template"]["spec"]["containers"]
    )
    if not texts:
        assert gpus == 0
        return
    file = KUBERNETES / "overlays" / name / "train.toml"
    assert texts == [file.read_text()]
    assert gpus == 1 + load(file, []).config.rollout.engines


def test_the_dashboard_is_the_one_that_is_written_down() -> None:
    written = KUBERNETES / "components" / "monitoring" / "loopwright.json"
    assert json.loads(written.read_text()) == dashboard(), "run deploy/dashboard.py again"
    assert series("engine/*/busy_frac") == "ray_loopwright_engine_busy_frac"


def test_every_panel_shows_what_a_run_reports(tmp_path: Path, policy: str) -> None:
    code, folder = train(tmp_path, policy, "cluster.ping_every_s=0.01")
    assert code == 0
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    reported = {re.sub(r"^engine/\d+/", "engine/*/", name) for line in lines for name in line}
    shown = {metric for _, _, lines in PANELS for _, metric in lines}
    assert shown - reported == set()


def test_environment_workers_go_to_the_nodes_set_aside_for_them() -> None:
    needs = Needs(one_node_cpus=2, engines=((1.0, 1.0),), elsewhere_cpus=(0.5, 0.5))
    assert needs.bundles_on({"CPU": 8.0}) == needs.bundles
    aside = needs.bundles_on({"CPU": 8.0, "loopwright_environment": 1000.0})
    assert ["loopwright_environment" in bundle for bundle in aside] == [False, False, True, True]
    groups = ray_of(overlay("single-gpu-node"))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    named = {group["groupName"]: group.get("resources", {}) for group in groups}
    offering = [name for name, offered in named.items() if "loopwright_environment" in offered]
    assert offering == ["environments"]
