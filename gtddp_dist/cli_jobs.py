"""The commands about jobs (`gtddp submit`, `sweep`, `status`, ...): arguments only, the work is done elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import GRID_KEYS, load_config, named_config
from .errors import UserError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # argparse has no public name for it

WATCH_S = 5.0


def add_commands(commands: Commands, exit_codes: str) -> None:
    """Adds the commands to the parser."""
    submit = commands.add_parser(
        "submit",
        help="train as a job of Slurm",
        usage=(
            "gtddp submit CONFIG [key=value ...] [--wait] [--dry-run]\n"
            "       gtddp submit --resume RUN [launch.key=value ...] [--wait]"
        ),
        description="Make a run directory and hand it to launch.executor; or hand over an existing run again.",
        epilog=exit_codes,
        allow_abbrev=False,
    )
    submit.add_argument("words", nargs="*", metavar="CONFIG [key=value ...]", help="as for train")
    submit.add_argument("--resume", type=Path, metavar="RUN", help="submit this run again, to be continued")
    submit.add_argument("--wait", action="store_true", help="return when the run has ended, with its exit code")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch file, and change nothing")
    requeue = commands.add_parser(
        "requeue",
        help="put a job back into Slurm's queue where its run needs it",
        description="The last line of a job's script: decides whether the job is put back (docs/jobs.md).",
        epilog="exit code: 0 where the job was put back, else that of the job",
        allow_abbrev=False,
    )
    requeue.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories that the job trained")
    requeue.add_argument("--exit-code", type=int, required=True, metavar="N", help="of srun")
    sweep = commands.add_parser(
        "sweep",
        help="train many settings, and compare them",
        usage=(
            "gtddp sweep SWEEP [key=value ...] [--dir DIR] [--wait] [--check]\n"
            "       gtddp sweep --resume DIR [launch.key=value ...] [--wait]\n"
            "       gtddp sweep --report DIR"
        ),
        description=(
            "Train all trials of a sweep as launch.* says: a grid of settings, or random draws of them. With --resume "
            "submit those trials of a sweep again that have not ended well."
        ),
        epilog=exit_codes,
        allow_abbrev=False,
    )
    sweep.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP [key=value ...]",
        help="name of a shipped sweep or path of a YAML file, then keys of a config that count over it",
    )
    sweep.add_argument("--dir", type=Path, metavar="DIR", help="directory of the sweep; default: runs/<sweep>-<time>")
    sweep.add_argument("--resume", type=Path, metavar="DIR", help="go on with the sweep in this directory")
    sweep.add_argument("--report", type=Path, metavar="DIR", help="write tables and pictures as the sweep stands now")
    sweep.add_argument("--wait", action="store_true", help="follow all trials to their ends, and report")
    sweep.add_argument("--check", action="store_true", help="list the trials, and write nothing")
    status = commands.add_parser(
        "status",
        help="show what runs are doing",
        usage="gtddp status [RUN or SWEEP ...] [--watch [S]] [--json]",
        description="A table of runs, with one question to the scheduler for all of them.",
        epilog=exit_codes,
        allow_abbrev=False,
    )
    status.add_argument("words", nargs="*", metavar="RUN or SWEEP", help="default: all in runs/")
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=WATCH_S,
        metavar="S",
        help=f"draw the table every S seconds (default {WATCH_S:g}) until all have ended",
    )
    status.add_argument("--json", action="store_true", help="print JSON in place of a table")
    board = commands.add_parser(
        "tensorboard",
        help="show the curves of runs in a browser",
        usage="gtddp tensorboard RUN or SWEEP ... [--port N] [--host HOST]",
        description="Start TensorBoard on the folders of these runs and sweeps, until Ctrl-C.",
        epilog=exit_codes,
        allow_abbrev=False,
    )
    board.add_argument("words", nargs="*", metavar="RUN or SWEEP", help="run directories and sweeps")
    board.add_argument("--port", type=int, metavar="N", help="default: 6006, or the next free one; 0: any free one")
    board.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, which only this machine reaches"
    )


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Runs one of these commands; its exit code. Raises UserError."""
    match arguments.command:
        case "submit":
            return _submit(arguments, words)
        case "requeue":
            from .jobs.requeue import requeue

            return requeue(arguments.runs, arguments.exit_code)
        case "sweep":
            return _sweep(arguments, words)
        case "status":
            from .jobs.status import run_status

            if arguments.watch is not None and not arguments.watch > 0:
                raise UserError(f"--watch {arguments.watch:g}: expected a number of seconds > 0")
            return run_status([Path(word) for word in words], watch_s=arguments.watch, as_json=arguments.json)
    from .tensorboard import run_tensorboard

    return run_tensorboard([Path(word) for word in words], host=arguments.host, port=arguments.port)


def _submit(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    from .jobs.submit import run_resubmit, run_submit

    if arguments.resume is None:
        name, config = named_config(words, "submit")
        return run_submit(config, name, wait=arguments.wait, dry_run=arguments.dry_run)
    other = [word for word in words if not word.startswith(("launch.", *GRID_KEYS))]
    if other or arguments.dry_run:
        raise UserError(
            "submit --resume continues a run as it was configured, but for launch.* and parallel.*: leave out "
            f"{(other or ['--dry-run'])[0]!r}"
        )
    return run_resubmit(
        arguments.resume, load_config(str(arguments.resume / "config.yaml"), words), wait=arguments.wait
    )


def _sweep(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    from .trials.run import report_sweep, resume_sweep, run_sweep

    given = [f"--{name}" for name in ("report", "resume", "dir", "wait", "check") if getattr(arguments, name)]
    if arguments.report is not None:
        if words or len(given) > 1:
            raise UserError(f"--report takes a directory and nothing else: leave out {[*words, *given[1:]][0]!r}")
        return report_sweep(arguments.report)
    if arguments.resume is not None:
        for flag in given:
            if flag in ("--dir", "--check"):
                raise UserError(f"--resume goes on with the sweep in its directory: leave out {flag}")
        return resume_sweep(arguments.resume, words, wait=arguments.wait)
    if not words or "=" in words[0]:
        from .trials.spec import shipped_sweeps

        raise UserError(f"sweep needs a sweep before any key=value. Shipped sweeps: {', '.join(shipped_sweeps())}")
    return run_sweep(words[0], words[1:], arguments.dir, wait=arguments.wait, check_only=arguments.check)
