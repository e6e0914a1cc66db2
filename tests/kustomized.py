"""A small `kubectl kustomize` for machines without kubectl: the fields that `deploy/` uses.

Anything else in a kustomization is an error here; where kubectl exists, a test compares the two.
"""

import json
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

_KNOWN = {
    "apiVersion", "kind", "namespace", "labels", "resources", "components", "patches",
    "configMapGenerator",
}  # fmt: skip
_WITHOUT_NAMESPACE = {"Namespace"}
Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The manifests that the kustomization in `folder` amounts to."""
    return _apply(folder, [])


def _apply(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(spec) - _KNOWN
    assert not unknown, f"{folder}: {unknown} is not rendered here"
    manifests = list(manifests)
    for name in spec.get("resources", ()):
        path = folder / name
        if path.is_dir():
            manifests += render(path)
        else:
            documents = [m for m in yaml.safe_load_all(path.read_text()) if m]
            # Through JSON: what a YAML anchor repeats is not to be one object.
            manifests += json.loads(json.dumps(documents))
    for generator in spec.get("configMapGenerator", ()):
        _config_map(folder, generator, manifests)
    for name in spec.get("components", ()):
        manifests = _apply(folder / name, manifests)
    for patch in spec.get("patches", ()):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        _patch(manifests, patch["target"], yaml.safe_load(text))
    for manifest in manifests:
        metadata = manifest.setdefault("metadata", {})
        if "namespace" in spec and manifest["kind"] not in _WITHOUT_NAMESPACE:
            metadata["namespace"] = spec["namespace"]
        for label in spec.get("labels", ()):
            assert label["includeSelectors"] is False
            metadata.setdefault("labels", {}).update(label["pairs"])
    return manifests


def _config_map(folder: Path, generator: Manifest, manifests: list[Manifest]) -> None:
    assert generator.get("options", {}).pop("disableNameSuffixHash", False) is True, generator
    data = {Path(f).name: (folder / f).read_text() for f in generator["files"]}
    name = generator["name"]
    found = [m for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"] == name]
    if generator.get("behavior") == "replace":
        found[0]["data"] = data
        return
    metadata: Manifest = {"name": name}
    if generator.get("options", {}).get("labels"):
        metadata["labels"] = generator["options"]["labels"]
    manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _patch(manifests: list[Manifest], target: Manifest, patch: list[Any]) -> None:
    assert set(target) == {"kind"}, f"{target}: only the kind is looked at here"
    chosen = [i for i, m in enumerate(manifests) if m["kind"] == target["kind"]]
    assert chosen, f"no {target['kind']} to patch"
    for index in chosen:
        manifests[index] = jsonpatch.apply_patch(manifests[index], patch)
