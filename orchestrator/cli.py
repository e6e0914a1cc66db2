"""The command line, `loopwright train` and its kin.

Exit codes: 0 done · 1 the run failed, the reason is the last line on stderr · 2 refused before
anything was started · 3 stopped on request with a checkpoint, `--resume` goes on.
"""

import argparse
import asyncio
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from loopwright.configs.load import ConfigError, Loaded, load, render
from loopwright.envs.protocol import EnvError
from loopwright.orchestrator.faults import Refused, RunError
from loopwright.orchestrator.trackers import TrackerError

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 3

_ABOUT = "Post-train LLM agents with reinforcement learning: asynchronous LOOP on one Ray driver."
_EXIT = "exit codes: 0 done, 1 failed (reason on the last line), 2 refused, 3 stopped and resumable"
_TRAIN = """Train a policy as CONFIG says.

  loopwright train quickstart                        the shipped preset, on a laptop
  loopwright train quickstart --set rollout.engine=vllm --set run.name=quick-vllm
  loopwright train my.toml --resume                  go on where the run stopped or was killed
  loopwright train my.toml --auto-resume             that, or begin: the same command every time

The run's folder (run.dir/run.name) holds config.toml, metrics.jsonl, events.jsonl, ledger/,
checkpoints/, curve.png and summary.json: enough to
resume, to audit, and to draw every picture again."""
_EVAL = """Play held-out tasks with a model and print how many it solves.

  loopwright eval runs/quickstart                  the newest checkpoint of a run, its configuration
  loopwright eval path/to/model --config my.toml   any Hugging Face folder or hub id"""
_WARM = """Clone oracle demonstrations into a policy and stop: what `train` does first, on its own.
Writes a Hugging Face folder to run.dir/run.name/warm_start."""


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a .toml file, or the name of a shipped preset"
    )
    _settable(parser)


def _settable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one key (repeatable); the value is read as TOML, else as text",
    )


def build_parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="loopwright", description=_ABOUT, epilog=_EXIT, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a policy", description=_TRAIN, epilog=_EXIT, formatter_class=raw
    )
    _configured(train)
    train.add_argument(
        "--resume", action="store_true", help="go on with the run in run.dir/run.name"
    )
    train.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on with that run if it is there, else begin it: for schedulers, which start the "
        "same command again",
    )

    evaluate = commands.add_parser(
        "eval", help="success on held-out tasks", description=_EVAL, formatter_class=raw
    )
    evaluate.add_argument(
        "target", metavar="RUN_OR_MODEL", help="a run's folder, a model folder, or a hub id"
    )
    evaluate.add_argument(
        "--config", default="", help="configuration; a run's own is used for a run"
    )
    _settable(evaluate)

    warm = commands.add_parser(
        "warmstart", help="clone oracle demonstrations", description=_WARM, formatter_class=raw
    )
    _configured(warm)

    config = commands.add_parser("config", help="every effective value and where it came from")
    _configured(config)
    config.add_argument("--explain", action="store_true", help="add each key's meaning")

    _add_modules(commands)
    commands.add_parser("doctor", help="what is installed and what works on this machine")
    return parser


def _add_modules(commands: Any) -> None:
    """The commands that have a module of their own."""
    from loopwright.orchestrator import (
        envs_command,
        ledger_command,
        plan_command,
        replay_command,
        scale_command,
        submit,
    )

    for name, module, configured, help_text in (
        ("envs", envs_command, False, "list, describe and play environments"),
        ("plan", plan_command, True, "memory and time of a configuration, before it is started"),
        ("submit", submit, True, "run on a Ray cluster, as a job"),
        ("scale", scale_command, False, "more or fewer engines and workers in a running run"),
        ("ledger", ledger_command, False, "verify, summarise and export a run's ledger"),
        ("replay", replay_command, False, "take recorded steps again; where a number came from"),
    ):
        parser = commands.add_parser(
            name,
            help=help_text,
            description=module.ABOUT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if configured:
            _configured(parser)
        module.add_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (ConfigError, Refused) as error:
        return _complain(error, REFUSED)
    except (RunError, EnvError, TrackerError) as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("stopped before training began; train --resume goes on", STOPPED)
    except Exception as error:  # noqa: BLE001 the last line is the reason, whatever it is
        traceback.print_exc()
        return _complain(f"{type(error).__name__}: {error}", FAILED)


def _complain(what: object, code: int) -> int:
    sys.stdout.flush()
    print(f"loopwright: {what}", file=sys.stderr, flush=True)
    return code


def _load(arguments: argparse.Namespace) -> Loaded:
    loaded = load(arguments.config, arguments.overrides)
    for warning in loaded.warnings:
        print(f"loopwright: note: {warning}", file=sys.stderr)
    return loaded


def _first_reason(group: BaseException) -> BaseException:
    """The first failure of a task group: the others are its consequences."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _train(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.report import tell
    from loopwright.orchestrator.run import run, run_folder

    loaded = _load(arguments)
    begun = arguments.auto_resume and (run_folder(loaded.config) / "config.toml").exists()
    try:
        ended = asyncio.run(run(loaded, resume=arguments.resume or begun))
    except BaseExceptionGroup as group:
        raise _first_reason(group) from None
    print(tell(ended.folder, ended.summary), flush=True)
    return DONE if ended.complete or loaded.config.run.max_seconds else STOPPED


def _evaluate(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.offline import evaluate_target

    print(asyncio.run(evaluate_target(arguments.target, arguments.config, arguments.overrides)))
    return DONE


def _warm_start(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator.offline import warm_start_only

    print(asyncio.run(warm_start_only(_load(arguments))))
    return DONE


def _config(arguments: argparse.Namespace) -> int:
    print(render(_load(arguments), explain=arguments.explain), end="")
    return DONE


def _envs(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import envs_command

    return envs_command.execute(arguments)


def _submit(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import submit

    return submit.execute(arguments)


def _scale(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import scale_command

    return scale_command.execute(arguments)


def _ledger(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import ledger_command

    return ledger_command.execute(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import plan_command

    return plan_command.execute(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from loopwright.orchestrator import replay_command

    return replay_command.execute(arguments)


def _doctor(_: argparse.Namespace) -> int:
    from loopwright.orchestrator import doctor

    return doctor.main()


_COMMANDS = {
    "train": _train,
    "eval": _evaluate,
    "warmstart": _warm_start,
    "config": _config,
    "envs": _envs,
    "ledger": _ledger,
    "replay": _replay,
    "scale": _scale,
    "submit": _submit,
    "plan": _plan,
    "doctor": _doctor,
}
