"""`loopwright ledger`: verify a run's ledger, say what it holds, and write it out as a table."""

import argparse
import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from loopwright.algorithms.records import RecordError, Rollout, decode
from loopwright.orchestrator import ledger
from loopwright.orchestrator.faults import RunError
from loopwright.orchestrator.trackers import TrackerError

ABOUT = """Verify a run's ledger and say what it holds; exit code 1 if anything is wrong with it.

  loopwright ledger runs/quickstart                              verify and summarise
  loopwright ledger runs/quickstart --export r.jsonl             a line for each rollout
  loopwright ledger runs/quickstart --export r.parquet           the same as a table
  loopwright ledger runs/quickstart --export r.jsonl --tokens    with token ids and logprobs

Reads only. A torn tail (the process died while writing) is told, and cut when the run goes on;
damage before the end is told with its place, and what can be read behind it is counted."""
_ROW_GROUP = 1000  # rows of Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes that are no frame, between or behind whole ones."""

    offset: int
    size_bytes: int
    at_the_end: bool  # a torn tail: what a dying process had not written yet
    what: str


@dataclass(slots=True, kw_only=True)
class Contents:
    """What a ledger holds."""

    size_bytes: int
    frames: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    voids: Counter[str] = field(default_factory=Counter)
    groups: set[int] = field(default_factory=set)  # tickets
    steps: set[int] = field(default_factory=set)
    checkpoints: list[int] = field(default_factory=list)
    tokens: int = 0
    cancelled_tokens: list[int] = field(default_factory=list)  # of each episode taken back
    discarded: int = 0  # rollouts of groups that were replaced
    damage: list[Damage] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loopwright ledger`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--export", metavar="FILE", type=Path, help="write all rollouts to a .jsonl or .parquet"
    )
    parser.add_argument(
        "--tokens", action="store_true", help="with --export: token ids, logprobs and versions too"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Verify, summarise, export; 1 if the ledger is damaged or its history does not add up."""
    path = arguments.run / "ledger" / ledger.FILE
    if not path.is_file():
        raise RunError(f"{arguments.run} is not a run's folder: no ledger/{ledger.FILE} there")
    if arguments.tokens and not arguments.export:
        raise RunError("--tokens says what --export writes: add --export FILE")
    write = _writer(arguments.export) if arguments.export else None
    contents = read_contents(path)
    print(_tell(path, contents))
    broken = any(not d.at_the_end for d in contents.damage)
    if not broken:
        broken = not _history_adds_up(arguments.run, path)
    if write is not None:
        rows = write(_rows(path, tokens=arguments.tokens))
        print(f"{rows} rollouts written to {arguments.export}")
    return 1 if broken else 0


def scan(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Damage]:
    """Every whole frame as (offset, record), and what lies between them as `Damage`.

    Behind a damaged place the next offset whose header and payload both carry their checksums is
    looked for, so one bad sector costs the frames it lies in and no others.
    """
    size = path.stat().st_size
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        offset = 0
        while offset < size:
            payload = ledger.frame_at(data, offset)
            if payload is not None:
                yield offset, msgpack.unpackb(payload, strict_map_key=False)
                offset += ledger.HEADER_BYTES + len(payload)
                continue
            follows = next((o for o in range(offset + 1, size) if ledger.frame_at(data, o)), size)
            yield Damage(
                offset=offset,
                size_bytes=follows - offset,
                at_the_end=follows == size,
                what=_what_was(data, offset, follows),
            )
            offset = follows


def _what_was(data: Any, start: int, end: int) -> str:
    """What a damaged frame seems to have held, from the names in it that can still be read."""
    held = bytes(data[start : min(end, start + 200)])
    kinds = {b"rollout": "a rollout", b"group": "the end of a group", b"step": "a step",
             b"checkpoint": "a checkpoint", b"cancelled": "an episode taken back",
             b"discarded": "a group that was replaced"}  # fmt: skip
    found = [text for name, text in kinds.items() if b"kind" in held and name in held]
    return found[0] if found else "nothing that can be told"


def read_contents(path: Path) -> Contents:
    """Count what the ledger at `path` holds, damaged or not."""
    contents = Contents(size_bytes=path.stat().st_size)
    for found in scan(path):
        if isinstance(found, Damage):
            contents.damage.append(found)
        else:
            _count(contents, found[1])
    return contents


def _count(contents: Contents, record: dict[str, Any]) -> None:
    kind = record.get("kind", "unknown")
    contents.frames[kind] += 1
    if kind == "rollout":
        rollout: Rollout = decode(record["data"])
        contents.outcomes[rollout.outcome.value] += 1
        contents.ends[rollout.end_reason.value] += 1
        contents.tokens += rollout.generated_tokens
    elif kind == "group":
        contents.groups.add(record["ticket"])
        if record["void"]:
            contents.voids[record["void"].splitlines()[0][:80]] += 1
    elif kind == "cancelled":
        contents.cancelled_tokens.append(record["tokens"])
    elif kind == "discarded":
        contents.discarded += len(record["attempts"])
    elif kind == "step":
        contents.steps.add(record["step"])
    elif kind == "checkpoint":
        contents.checkpoints.append(record["step"])


def _tell(path: Path, contents: Contents) -> str:
    def named(counts: Counter[str]) -> str:
        return ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "none"

    lines = [
        f"{path}: {contents.size_bytes:,} bytes, {sum(contents.frames.values())} frames "
        f"({named(contents.frames)})",
        f"groups finished: {len(contents.groups)}, of them void: {sum(contents.voids.values())}",
        *(f"  void, {count}x: {why}" for why, count in contents.voids.most_common(5)),
        f"rollouts: {named(contents.outcomes)}; ended by: {named(contents.ends)}; "
        f"{contents.tokens:,} tokens generated",
        *_left_out(contents),
        f"steps trained: {len(contents.steps)}, the last is {max(contents.steps, default=0)}; "
        f"checkpoints of steps {', '.join(map(str, contents.checkpoints[-5:])) or 'none'}",
    ]
    for d in contents.damage:
        kind = "torn tail" if d.at_the_end else "DAMAGED"
        lines.append(f"{kind}: {d.size_bytes} bytes at byte {d.offset}, held {d.what}")
    return "\n".join(lines)


def _left_out(contents: Contents) -> list[str]:
    """What the reliefs for stragglers and groups without variance left out, if anything."""
    lines = []
    if contents.cancelled_tokens:
        count, tokens = len(contents.cancelled_tokens), sum(contents.cancelled_tokens)
        lines.append(f"episodes taken back: {count}, after {tokens / count:.0f} tokens on average")
    if contents.discarded:
        lines.append(f"rollouts replaced, their group's rewards being equal: {contents.discarded}")
    return lines


def _history_adds_up(run: Path, path: Path) -> bool:
    """Compare what was finished with what was trained, and say it."""
    config = run / "config.toml"
    if not config.is_file():
        print("history: not compared, the run has no config.toml")
        return True
    audit = ledger.audit(path)
    wrong = {
        "finished, but not in the step it was for": audit.unused,
        "trained twice": audit.twice,
        "trained, but not on record": audit.unknown,
    }
    if not any(wrong.values()):
        print(f"history: {audit.trained} rollouts trained, each once, all of them on record")
        return True
    for what, pairs in wrong.items():
        if pairs:
            some = ", ".join(f"ticket {t} attempt {a}" for t, a in pairs[:5])
            print(f"history: {len(pairs)} {what}: {some}")
    return False


def _rows(path: Path, *, tokens: bool) -> Iterator[dict[str, Any]]:
    """A flat row for each rollout on record, in the order of the ledger."""
    trained: dict[tuple[int, int], int] = {}
    for found in scan(path):
        if not isinstance(found, Damage) and found[1].get("kind") == "step":
            trained |= dict.fromkeys(map(tuple, found[1]["trained"]), found[1]["step"])
    for found in scan(path):
        if isinstance(found, Damage) or found[1].get("kind") != "rollout":
            continue
        ticket = found[1]["ticket"]
        try:
            rollout: Rollout = decode(found[1]["data"])
        except RecordError as error:
            raise RunError(f"{path}: the rollout at byte {found[0]}: {error}") from error
        yield _row(rollout, ticket, trained.get((ticket, rollout.attempt)), tokens=tokens)


def _row(rollout: Rollout, ticket: int, step: int | None, *, tokens: bool) -> dict[str, Any]:
    versions = [c.policy_versions[c.action_mask] for c in rollout.contexts]
    sampled = np.concatenate(versions) if versions else np.zeros(0, np.int32)
    row: dict[str, Any] = {
        "ticket": ticket,
        "attempt": rollout.attempt,
        "trained_in_step": step,
        "environment": rollout.environment,
        "task": rollout.task_id,
        "scenario": rollout.scenario,
        "outcome": rollout.outcome.value,
        "end_reason": rollout.end_reason.value,
        "reward": float(rollout.reward),
        "success": rollout.success,
        "turns": rollout.turns,
        "contexts": len(rollout.contexts),
        "generated_tokens": rollout.generated_tokens,
        "oldest_version": int(sampled.min()) if sampled.size else None,
        "newest_version": int(sampled.max()) if sampled.size else None,
        "seconds": rollout.seconds.get("total"),
        "reward_parts": json.dumps(rollout.reward_parts),
        "tool_errors": json.dumps(rollout.tool_errors),
        "fault": rollout.fault,
    }
    if tokens:
        for name in ("token_ids", "action_mask", "behavior_logprobs", "policy_versions"):
            row[name] = [getattr(c, name).tolist() for c in rollout.contexts]
    return row


Writer = Callable[[Iterator[dict[str, Any]]], int]


def _writer(file: Path) -> Writer:
    """What writes rows to `file`; refuses before anything is read what it could not write."""
    if not file.resolve().parent.is_dir():
        raise RunError(f"--export {file}: there is no folder {file.parent}")
    if file.suffix == ".jsonl":
        return lambda rows: _write_jsonl(file, rows)
    if file.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise TrackerError(
                f"--export {file} needs pyarrow ({error}); pip install 'loopwright[parquet]'"
            ) from error
        return lambda rows: _write_parquet(file, rows)
    raise RunError(f"--export {file}: expected a name that ends in .jsonl or .parquet")


def _write_jsonl(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            count += 1
    return count


def _write_parquet(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    import pyarrow
    from pyarrow import parquet

    count = 0
    writer = None
    try:
        while batch := list(islice(rows, _ROW_GROUP)):
            table = pyarrow.Table.from_pylist(batch, schema=_schema(batch[0]))
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            count += len(batch)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        parquet.write_table(pyarrow.table({"ticket": pyarrow.array([], pyarrow.int64())}), file)
    return count


def _schema(row: dict[str, Any]) -> Any:
    """Column types, so that a batch in which a column is empty gives the same ones."""
    import pyarrow as pa

    types = {
        **dict.fromkeys(("reward", "seconds"), pa.float64()),
        "success": pa.bool_(),
        "action_mask": pa.list_(pa.list_(pa.bool_())),
        "behavior_logprobs": pa.list_(pa.list_(pa.float32())),
        **dict.fromkeys(("token_ids", "policy_versions"), pa.list_(pa.list_(pa.int32()))),
    }
    texts = {name for name, value in row.items() if isinstance(value, str)}
    return pa.schema([(n, types.get(n, pa.string() if n in texts else pa.int64())) for n in row])
