"""Tensors on disk in safetensors files, written bucket by bucket, read tensor by tensor or by rows.

Only rank 0 writes, yet every rank goes through the buckets, because gathering one is collective.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_buckets(
    buckets: Iterable[Mapping[str, Tensor]], folder: Path, stem: str, *, writes: bool = True
) -> None:
    """Write each bucket to a file of its own, `stem`.safetensors if there is one, else numbered,
    with the index that transformers and vLLM read. Tied tensors (one object) are written once.

    Without `writes` the buckets are gone through, nothing more. Raises `OSError` where the disk
    does not take them; the buckets have all been gone through then.
    """
    parts: list[list[str]] = []
    sizes: list[int] = []
    problem: OSError | None = None
    for bucket in buckets:
        if not writes or problem is not None:
            continue
        once = {id(value): name for name, value in reversed(list(bucket.items()))}
        tensors = {name: bucket[name].detach().contiguous().cpu() for name in once.values()}
        try:
            save_file(tensors, _part(folder, stem, len(parts)), metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            problem = OSError(f"{folder}: {error}")
        parts.append(sorted(tensors))
        sizes.append(sum(t.nbytes for t in tensors.values()))
    if problem is not None:
        raise problem
    if writes and parts:
        _name_parts(folder, stem, parts, sum(sizes))


def _part(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}-part{number}.safetensors"


def _name_parts(folder: Path, stem: str, parts: list[list[str]], size_bytes: int) -> None:
    if len(parts) == 1:
        _part(folder, stem, 0).rename(folder / f"{stem}.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(parts):
        final = f"{stem}-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        _part(folder, stem, number).rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


class TensorFolder:
    """All tensors of the safetensors files of one `stem` in a folder; nothing is read before it is
    asked for.
    """

    def __init__(self, folder: Path, stem: str, *, may_be_empty: bool = False) -> None:
        """Raises `FileNotFoundError` if there are none, unless that `may_be`."""
        files = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")])
        if not files and not may_be_empty:
            raise FileNotFoundError(
                f"{folder}: no {stem}*.safetensors there; it is not a checkpoint of this trainer"
            )
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._places = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._places)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some `rows` of it, on the CPU."""
        if rows is None:
            whole: Tensor = self._places[name].get_tensor(name)
            return whole
        part: Tensor = self._places[name].get_slice(name)[rows]
        return part


def write_json(values: Mapping[str, Any], file: Path) -> None:
    """Write numbers, texts, lists and tables of them."""
    file.write_text(json.dumps(values, indent=1))


def flush_folder(folder: Path) -> None:
    """fsync every file below `folder` and every folder, so that a power cut after this loses
    nothing.
    """
    below = sorted(folder.rglob("*"))
    for path in (*(p for p in below if p.is_file()), *(p for p in below if p.is_dir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
