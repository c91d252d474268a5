"""The command `gtddp`: arguments, messages and exit codes (`gtddp_dist.errors`); the work is done elsewhere.

`--help` and errors in the configuration answer at once: torch is imported only for work that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, cli_jobs, config_docs, errors
from .config import GRID_KEYS, Config, load_config, named_config, shipped_configs
from .launch import discover, local, stop_signals_held, told_once
from .registry import EXPERIMENTS

_EXIT_CODES = (
    f"exit codes: {errors.OK} done; {errors.FAILED} failed; {errors.BAD_INPUT} bad input, nothing changed; "
    f"{errors.REQUEUE} stopped on request with a checkpoint, continue with --resume"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, `argv` or the process's own arguments; the exit code."""
    arguments, words = _parse(argv)
    try:
        match arguments.command:
            case "eval":
                from .train import evaluate_run

                return evaluate_run(arguments.run)
            case "doctor":
                return _doctor(arguments)
            case "plan":
                name, config = named_config(words, arguments.command)
                from .pipeline.plan import run_plan

                return run_plan(config, name, arguments.out)
            case "bench":
                return _bench(arguments, words)
            case "reproduce":
                from .experiments.reproduce import Request, run_reproduce

                if not words:
                    raise errors.UserError(f"reproduce: which experiment? all, or one of {', '.join(EXPERIMENTS)}")
                name, *rest = words
                jobs = len(os.sched_getaffinity(0)) if arguments.jobs is None else arguments.jobs
                return run_reproduce(Request(name, tuple(rest), arguments.quick, arguments.out, jobs))
            case "submit" | "requeue" | "sweep" | "status" | "tensorboard":
                return cli_jobs.run(arguments, words)
        if arguments.resume is not None:
            return _resume(arguments.resume, arguments, words)
        return _train(arguments, words)
    except errors.UserError as error:
        if arguments.command in ("train", "bench"):
            error = told_once(error)
        if not isinstance(error, errors.ToldElsewhere):
            print(f"gtddp: error: {error}", file=sys.stderr)
        return error.exit_code


def _train(arguments: argparse.Namespace, words: list[str]) -> int:
    name, config = named_config(words, "train")
    if arguments.check:
        print(f"ok: {_summary(config)}")
        return errors.OK
    code = _started_ranks(config, arguments)
    if code is not None:
        return code
    with stop_signals_held():  # until there is a handler for them: importing torch takes seconds
        from .train import run_training

        return run_training(config, name)


def _started_ranks(config: Config, arguments: argparse.Namespace) -> int | None:
    """Starts the ranks of a run on this host, and waits for them: their exit code.

    None where there is but one, or where somebody else has started this process as one of them. This process needs no
    torch then.
    """
    wanted = config.parallel.pipe * config.parallel.data
    if wanted == 1 or discover() is not None:
        return None
    return local.start([sys.executable, "-m", "gtddp_dist", *arguments.argv], wanted)


def _doctor(arguments: argparse.Namespace) -> int:
    ranks = discover()
    if ranks is None and arguments.ranks > 1:
        return local.start([sys.executable, "-m", "gtddp_dist", *arguments.argv], arguments.ranks)
    if ranks is not None and ranks.started_by == "gtddp":
        local.enter()
    from .doctor import run_doctor

    return run_doctor(arguments.dir, ranks, as_json=arguments.json)


def _bench(arguments: argparse.Namespace, words: list[str]) -> int:
    for flag, given in (("--grid", arguments.grid is not None), ("--list", arguments.list)):
        if given and arguments.what != "scaling":
            raise errors.UserError(f"{flag}: only bench scaling takes it")
    if arguments.ranks is not None and arguments.what in _BENCH_ALONE:
        raise errors.UserError(f"--ranks: bench {arguments.what} measures one process")
    if arguments.ranks is not None and arguments.what == "pipeline":
        raise errors.UserError("--ranks: bench pipeline has parallel.pipe times parallel.data ranks")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise errors.UserError(f"--ranks={arguments.ranks}: expected a number of ranks >= 1")
    if arguments.join is not None:
        if arguments.what != "scaling" or words:
            raise errors.UserError("--join joins the figures of bench scaling, and takes no config")
        from .bench.scaling_report import join

        return join(arguments.join, as_json=arguments.json)
    named = bool(words) and "=" not in words[0]
    alone = arguments.what in _BENCH_ALONE
    default = "bench-growth" if arguments.what == "growth" else "bench-step" if alone else "bench"
    name, *overrides = words if named else [default, *words]
    config = load_config(name, overrides)
    if alone:
        from .bench.alone import run_bench

        return run_bench(config, arguments.what, as_json=arguments.json, out=arguments.out)
    if arguments.what == "scaling":
        from .bench.scaling import Request, run_scaling

        request = Request(name, tuple(overrides), arguments.ranks, arguments.grid, arguments.out)
        return run_scaling(request, config, list_only=arguments.list, as_json=arguments.json)
    if arguments.what == "stages":
        from .bench.stages import run_stages

        return run_stages(config, processes=arguments.ranks or 1, as_json=arguments.json, out=arguments.out)
    code = _started_ranks(config, arguments)
    if code is not None:
        return code
    from .bench.pipeline import run_pipeline

    return run_pipeline(config, as_json=arguments.json, out=arguments.out)


def _resume(run: Path, arguments: argparse.Namespace, words: list[str]) -> int:
    """Continue a run; only the grid may be another."""
    other = [word for word in words if not word.startswith(GRID_KEYS)] + (["--check"] if arguments.check else [])
    if other:
        raise errors.UserError(
            f"--resume continues a run as it was configured, but for parallel.*: leave out {other[0]!r}"
        )
    file = run / "config.yaml"
    grid = load_config(str(file), words) if words else None
    if file.is_file():
        code = _started_ranks(grid or load_config(str(file)), arguments)
        if code is not None:
            return code
    with stop_signals_held():
        from .train import resume_training

        return resume_training(run, grid)


def _summary(config: Config) -> str:
    train = config.train
    length = f"{train.epochs} epochs" if train.steps is None else f"{train.steps} steps"
    return f"{config.optimizer.name} trains {config.model.name} on {config.data.name} for {length}"


_BENCH_ALONE = ("step", "gram", "memory", "growth", "all")
"""What `gtddp bench` measures in one process."""
_TAKE_WORDS = ("train", "plan", "bench", "reproduce", "submit", "sweep", "status", "tensorboard")


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the words that are no flags: the config and its overrides, in order."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)  # for the ranks that are started with the same
    # argparse fills a positional of many words from one run of them; words after a flag end up in `rest`.
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and arguments.command not in _TAKE_WORDS):
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    return arguments, [*getattr(arguments, "words", []), *rest]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gtddp",
        description="Train residual networks with GT-DDP, a game-theoretic second-order optimizer.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gtddp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a network, or continue a run",
        usage="gtddp train CONFIG [key=value ...] [--check]\n       gtddp train --resume RUN [parallel.key=value ...]",
        description="Train a network as a config says, in a new run directory; or continue a run.",
        epilog=(
            f"shipped configs: {', '.join(shipped_configs())}\n{_EXIT_CODES}\n\n"
            "keys of a config, with their defaults; in a file the part before the dot is a group:\n"
            f"{config_docs.render()}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG [key=value ...]",
        help="name of a shipped config or path of a YAML file, then options that count over it, read as YAML",
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this directory")
    train.add_argument("--check", action="store_true", help="check the configuration, and write nothing")
    evaluate = commands.add_parser(
        "eval",
        help="measure a trained network",
        description="Measure the network of a run directory on its validation set.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run directory")
    plan = commands.add_parser(
        "plan",
        help="simulate a step on a grid of ranks",
        usage="gtddp plan CONFIG [key=value ...] [--out FILE]",
        description="Simulate a step on a grid of ranks: time, idle time, bytes and memory, and the timeline.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    plan.add_argument("words", nargs="*", metavar="CONFIG [key=value ...]", help="as for train")
    plan.add_argument("--out", type=Path, metavar="FILE", help="the picture; default: <config>-plan.png")
    doctor = commands.add_parser(
        "doctor",
        help="check whether ranks can train together here",
        description="Check devices, versions, links and the shared folder, on all ranks that were started.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    doctor.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where runs are to be written")
    doctor.add_argument("--ranks", type=int, default=1, metavar="N", help="start so many ranks on this host")
    doctor.add_argument("--json", action="store_true", help="print JSON in place of tables")
    bench = commands.add_parser(
        "bench",
        help="measure",
        usage=(
            "gtddp bench step|gram|memory|growth|all [CONFIG] [key=value ...] [--json] [--out DIR]\n"
            "       gtddp bench pipeline [CONFIG] [key=value ...] [--json] [--out DIR]\n"
            "       gtddp bench stages [CONFIG] [key=value ...] [--ranks N] [--json] [--out DIR]\n"
            "       gtddp bench scaling [CONFIG] [key=value ...] [--ranks N] [--grid pipe=P,data=D | --list] [--json] "
            "[--out DIR]\n"
            "       gtddp bench scaling --join DIR [--json]"
        ),
        description=(
            "Measure on this machine, with random images (bench.image, bench.classes). step: all optimizers "
            "(bench.optimizers) side by side in one process, as ratios to torch's SGD. gram: every way to a layer's "
            "Gram matrix. memory: peaks of a step (bench.batch_sizes). growth: time, memory and operations against "
            "batch size, depth and width (bench.batch_sizes, depths, widths). all: these four. pipeline: a step on "
            "ranks, beside DeepSpeed's own pipeline engine. stages: every stage, for plan.costs. scaling: "
            "a step on all grids that some number of ranks can make."
        ),
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    bench.add_argument("what", choices=(*_BENCH_ALONE, "pipeline", "stages", "scaling"), help="what to measure")
    bench.add_argument(
        "words",
        nargs="*",
        metavar="[CONFIG] [key=value ...]",
        help="default: shipped: bench-step, bench-growth or bench",
    )
    bench.add_argument("--json", action="store_true", help="print JSON in place of a table")
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that also gets the figures, with the environment"
    )
    bench.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="scaling: the most ranks, default one a core or GPU; stages: processes that measure at once, default 1",
    )
    bench.add_argument("--grid", metavar="pipe=P,data=D", help="scaling: this grid alone, on ranks that are there")
    bench.add_argument("--list", action="store_true", help="scaling: print the grids, one a line, and measure nothing")
    bench.add_argument("--join", type=Path, metavar="DIR", help="scaling: join the figures that --grid left in DIR")
    reproduce = commands.add_parser(
        "reproduce",
        help="measure the papers' tables and figures",
        usage="gtddp reproduce NAME|all [--quick] [--out DIR] [--jobs N] [data.name=NAME seeds=N key=value ...]",
        description="Measure tables and figures of the papers: a page with pictures and CSV files for each.",
        epilog="\n".join(f"{name:<12}{entry.title}" for name, entry in EXPERIMENTS.items())
        + "\n\nexit codes: 0 done; 2 bad input, nothing changed; 75 stopped: the same command goes on where it was",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    reproduce.add_argument(
        "words",
        nargs="*",
        metavar="NAME|all [key=value ...]",
        help="an experiment, then data.name, seeds, keys of a config",
    )
    reproduce.add_argument("--quick", action="store_true", help="a short form, which shows only that everything runs")
    reproduce.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of the pages; what is there is not redone",
    )
    reproduce.add_argument("--jobs", type=int, metavar="N", help="processes that work; default: one a core")
    cli_jobs.add_commands(commands, _EXIT_CODES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
