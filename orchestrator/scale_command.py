"""`loopwright scale`: more or fewer rollout actors and environment workers in a running run."""

import argparse
import difflib
import json
import time
import uuid
from pathlib import Path

from loopwright.orchestrator.faults import Refused
from loopwright.orchestrator.recorder import write_json
from loopwright.orchestrator.scaling import REQUEST, ROLES, Answer, Sizes

ABOUT = """Change how many rollout actors or environment workers a running run has.

  loopwright scale runs/quickstart rollout=3                    two more engines, or one fewer
  loopwright scale runs/quickstart rollout=2 environments=4
  loopwright scale runs/quickstart                              how many serve, and who waits

Works from any machine that sees the run's folder. Engines that join are given the current weights
and prove them before they serve; the episodes of engines that leave go on on the others, from the
tokens they have. What the cluster has no room for waits, and the run goes on. A resumed run keeps
the size; another number in its configuration ends that."""
_POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loopwright scale`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "sizes", metavar="ROLE=N", nargs="*", help=f"one of {', '.join(ROLES)}, and how many"
    )
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="S", help="for the run to answer; default: 30"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Ask the run, print its answer. Raises `Refused` for what it is not asked, or refuses."""
    folder: Path = arguments.run
    sizes = dict(_size(text) for text in arguments.sizes)
    _refuse_unless_run(folder)
    answer = ask(folder, sizes, arguments.wait)
    if answer.refused:
        raise Refused(answer.text)
    print(answer.text)
    return 0


def ask(folder: Path, sizes: dict[str, int], wait_s: float) -> Answer:
    """The answer of the run in `folder`. Raises `Refused` if there is none within `wait_s`; then
    nothing is asked for any more."""
    identity, request = uuid.uuid4().hex, folder / REQUEST
    try:
        write_json(request, {"id": identity, "sizes": sizes})
    except OSError as error:
        raise Refused(f"cannot write {request}: {error.strerror}") from error
    ends = time.monotonic() + wait_s
    while time.monotonic() < ends:
        answer = Sizes.read(folder).answer
        if answer is not None and answer.id == identity:
            return answer
        time.sleep(_POLL_S)
    taken = not request.exists()
    request.unlink(missing_ok=True)
    if taken:
        raise Refused(f"{folder}: the run took the request and has not answered in {wait_s:g} s")
    raise Refused(
        f"{folder}: the run does not answer within {wait_s:g} s: it is not running, or not "
        f"training yet{_last_event(folder)}. Before a start, set rollout.engines and "
        "environment.workers instead"
    )


def _size(text: str) -> tuple[str, int]:
    role, equals, number = text.partition("=")
    if not equals:
        raise Refused(f"{text!r}: expected ROLE=N, such as rollout=3")
    if role not in ROLES:
        if role.startswith("trainer"):
            raise Refused(
                f"{text!r}: the trainer's ranks are fixed while it trains: stop the run, and go on "
                "with --resume --set trainer.ranks=N"
            )
        nearest = difflib.get_close_matches(role, [*ROLES, "engines", "workers"], n=1, cutoff=0.4)
        meant = {"engines": "rollout", "workers": "environments"}
        hint = f"; did you mean {meant.get(nearest[0], nearest[0])}?" if nearest else ""
        raise Refused(f"{text!r}: expected one of {', '.join(ROLES)}{hint}")
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise Refused(f"{text!r}: expected a whole number of at least 1")
    return role, int(number)


def _refuse_unless_run(folder: Path) -> None:
    if not (folder / "config.toml").is_file():
        beside = [p.parent.name for p in folder.parent.glob("*/config.toml")]
        nearest = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f"; did you mean {folder.parent / nearest[0]}?" if nearest else ""
        raise Refused(f"{folder} is not a run's folder: no config.toml there{hint}")
    summary, events = folder / "summary.json", folder / "events.jsonl"
    complete = summary.is_file() and json.loads(summary.read_text()).get("complete")
    if complete and events.stat().st_mtime <= summary.stat().st_mtime:
        raise Refused(f"{folder}: the run is complete, there is nobody to scale")


def _last_event(folder: Path) -> str:
    path = folder / "events.jsonl"
    if not path.is_file():
        return ""
    ago = max(time.time() - path.stat().st_mtime, 0.0)
    return f" (its last event is {ago:.0f} s old)"
