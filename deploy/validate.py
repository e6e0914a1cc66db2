"""Check manifests without a cluster: strict schemas, and the rules that ours keep.

    kubectl kustomize deploy/kubernetes/overlays/quickstart-cpu | python deploy/validate.py -
    python deploy/validate.py rendered.yaml --crds kuberay/helm-chart/kuberay-operator/crds

Kubernetes' own kinds are checked against the schemas of the package `kubernetes-validate`, in which
an unknown field is an error, as for `kubectl apply --dry-run=server --validate=strict`; RayJob and
RayCluster against `kuberay.schema.yaml` beside this file, or with `--crds` against KubeRay's own
custom resource definitions. With a cluster, let its API server judge as well.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.34"
KUBERAY = "1.7.0"
_HERE = Path(__file__).resolve().parent
_WITHOUT_SCHEMA = {"monitoring.coreos.com/v1"}  # the Prometheus operator's


def problems(manifest: Mapping[str, Any], crds: Path | None = None) -> Iterator[str]:
    """What is wrong with one manifest, a line each; nothing if it is fine."""
    kind, version = manifest.get("kind", "no kind"), manifest.get("apiVersion", "no apiVersion")
    if version == "ray.io/v1":
        schema = _crd_schema(crds, kind) if crds else _own_schema(kind)
        for error in _errors(schema, manifest):
            yield f"{kind} {_name(manifest)}: {error}"
        for found in _pod_templates(manifest):
            yield from (f"{kind} {_name(manifest)}: {p}" for p in _pod_problems(*found))
        yield from (f"{kind} {_name(manifest)}: {p}" for p in _ray_rules(manifest))
    elif version not in _WITHOUT_SCHEMA:
        yield from (f"{kind} {_name(manifest)}: {p}" for p in _kubernetes_problems(manifest))


def _kubernetes_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        kubernetes_validate.validate(dict(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path)) or 'the manifest'}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


@cache
def _own_schema(kind: str) -> dict[str, Any]:
    schemas = yaml.safe_load((_HERE / "kuberay.schema.yaml").read_text())
    if kind not in schemas:
        known = ", ".join(name for name in schemas if name != "$defs")
        raise SystemExit(f"kind {kind}: KubeRay {KUBERAY} as described here has {known}")
    return {"$defs": schemas["$defs"], **schemas[kind]}


@cache
def _crd_schema(folder: Path, kind: str) -> dict[str, Any]:
    for file in sorted(folder.glob("*.yaml")):
        for crd in yaml.safe_load_all(file.read_text()):
            if crd and crd.get("spec", {}).get("names", {}).get("kind") == kind:
                served = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
                return _strict(served[0]["schema"]["openAPIV3Schema"])
    raise SystemExit(f"{folder}: no custom resource definition of {kind} there")


def _strict(node: Any) -> Any:
    """An OpenAPI schema of a CRD as a JSON schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    # The API server's own formats (int32, ...) are types already.
    kept = {k: v for k, v in node.items() if k not in ("description", "format")}
    strict = {k: _strict(v) for k, v in kept.items() if k != "properties"}
    if "properties" in kept:
        strict["properties"] = {k: _strict(v) for k, v in kept["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
        if "apiVersion" in strict["properties"]:  # the root: metadata is Kubernetes' own
            strict["properties"]["metadata"] = {"type": "object"}
    return strict


def _errors(schema: dict[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(manifest), key=lambda e: list(map(str, e.path))):
        yield f"{'.'.join(map(str, error.path)) or 'the manifest'}: {error.message[:200]}"


def _pod_templates(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each pod template of a RayJob or RayCluster is, and the template."""
    spec = manifest.get("spec", {})
    if "submitterPodTemplate" in spec:
        yield "submitterPodTemplate", spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    yield "headGroupSpec", cluster.get("headGroupSpec", {}).get("template", {})
    for group in cluster.get("workerGroupSpecs", ()):
        yield f"worker group {group.get('groupName')}", group.get("template", {})


def _pod_problems(where: str, template: Mapping[str, Any]) -> Iterator[str]:
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "template": dict(template)}
    yield from (f"{where}: {problem}" for problem in _kubernetes_problems(whole))
    spec = template.get("spec", {})
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot") or pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{where}: not restricted: needs runAsNonRoot and seccompProfile RuntimeDefault"
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec.get("containers", ()):
        name, security = container["name"], container.get("securityContext", {})
        dropped = security.get("capabilities", {}).get("drop", [])
        if security.get("allowPrivilegeEscalation") is not False or "ALL" not in dropped:
            yield f"{where}: {name} may gain privileges: drop ALL, no allowPrivilegeEscalation"
        if not container.get("resources", {}).get("requests"):
            yield f"{where}: {name} requests no resources: Ray takes its CPUs from them"
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{where}: {name} mounts {mount['name']!r}, which is no volume of the pod"


def _ray_rules(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What KubeRay's operator refuses and no schema says, and what would leave a head open."""
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterSpec", spec)
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the head could run code"
    scales = cluster.get("enableInTreeAutoscaling", False)
    for group in cluster.get("workerGroupSpecs", ()):
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if not low <= group.get("replicas", low) <= high:
            yield f"worker group {group.get('groupName')}: replicas outside {low} ... {high}"
        if group.get("resources") and "resources" in group.get("rayStartParams", {}):
            yield f"worker group {group.get('groupName')}: resources in two places"
    if scales and cluster.get("autoscalerOptions", {}).get("version") == "v2":
        for where, template in _pod_templates({"spec": cluster}):
            if template.get("spec", {}).get("restartPolicy", "Never") != "Never":
                yield f"{where}: restartPolicy must be Never with autoscaler v2"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"


def _name(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("metadata", {}).get("name", "without a name"))


def main() -> int:
    """0 if every manifest is fine, 1 with the problems otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="rendered manifests, or - for standard input")
    parser.add_argument("--crds", type=Path, help="folder of KubeRay's custom resource definitions")
    arguments = parser.parse_args()
    text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text()
    manifests = [m for m in yaml.safe_load_all(text) if m]
    found = [line for m in manifests for line in problems(m, arguments.crds)]
    print("\n".join(found) or f"{len(manifests)} manifests are fine", flush=True)
    return 1 if found or not manifests else 0


if __name__ == "__main__":
    raise SystemExit(main())
