"""`loopwright replay`: take recorded steps again, and show where a number came from."""

import argparse
import json
from pathlib import Path

from loopwright.orchestrator.faults import RunError

ABOUT = """Take steps of a run again from its ledger, and compare the weights bit for bit; exit
code 1 where they differ.

  loopwright replay runs/quickstart                        every step, from the first weights
  loopwright replay runs/quickstart --step 12              one step, from the checkpoint before it:
                                                           task, versions, reward, advantage, weight
  loopwright replay runs/quickstart --step 12 --rollout 355/2    attempt 2 of ticket 355 by tokens
  loopwright replay runs/quickstart --generation           sample it again too: every token,
                                                           as the recorded schedule had it

Runs in this process, writes nothing to the run's folder, and needs as long as the training did
(one step: as the steps since the checkpoint). Bit-equal where the arithmetic is: the same machine
and versions, one thread, a CPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="this step alone")
    parser.add_argument(
        "--rollout",
        type=_ticket_and_attempt,
        metavar="TICKET/ATTEMPT",
        help="with --step: one of its rollouts, token by token",
    )
    parser.add_argument(
        "--generation",
        action="store_true",
        help="sample the rollouts again as well (torch engine, a run that nothing interrupted)",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, all figures")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if arguments.rollout and not arguments.step:
        raise RunError("--rollout goes with --step N, the step that trained it")
    if arguments.generation and arguments.step:
        raise RunError("--generation replays the whole schedule: it cannot begin at --step")
    if arguments.step:
        return _one_step(arguments)
    return _generation(arguments) if arguments.generation else _all_steps(arguments)


def _one_step(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.anatomy import render
    from loopwright.orchestrator.replay import replay_step

    report = replay_step(arguments.run, arguments.step, arguments.rollout)
    print(json.dumps(report, indent=1) if arguments.json else render(report), flush=True)
    return 0 if report["equal"] else 1


def _all_steps(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.replay import replay

    different = 0
    for step in replay(arguments.run):
        different += not step.equal
        if arguments.json:
            row = {"step": step.step, "recorded": step.recorded, "now": step.now}
            print(json.dumps(row | {"equal": step.equal}), flush=True)
        else:
            verdict = "the same weights" if step.equal else "OTHER WEIGHTS"
            print(
                f"step {step.step}: recorded {step.recorded:08x}, now {step.now:08x}: {verdict}",
                flush=True,
            )
    return 1 if different else 0


def _generation(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.replay_generation import replay_generation

    different = 0
    for found in replay_generation(arguments.run):
        different += not found.equal
        print(json.dumps(found.row()) if arguments.json else found.text(), flush=True)
    return 1 if different else 0


def _ticket_and_attempt(text: str) -> tuple[int, int]:
    ticket, slash, attempt = text.partition("/")
    if not (slash and ticket.isdigit() and attempt.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected TICKET/ATTEMPT, such as 355/2")
    return int(ticket), int(attempt)
