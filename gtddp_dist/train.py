"""Training: the one loop, and what is done before and after it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from . import checkpoint
from .assembly import Builder, assembled, opened
from .checkpoint import Checkpoint, CheckpointError, Wanted
from .checkpoint_writer import Writer
from .chronicle import Chronicle, refusals_recorded
from .config_schema import Config, OptimizerConfig, RunConfig
from .environment import select_device
from .errors import FAILED, OK, REQUEUE, ToldElsewhere, UserError
from .jobs.history import Ended, read
from .jobs.tail import last_step
from .launch import Ranks, StopRequest, launch
from .parts import Parts, build_model, load_data, validate
from .plots import plot_curves
from .registry import OPTIMIZERS
from .results import results_table, summarise, where_things_are
from .run_directory import MetricsLog, NoLog, Record, RunDirectory, existing_run, new_run, read_metrics
from .team import SOLO, Team
from .training_state import attempt_name, load_model_tensors, model_tensors_of
from .training_step import Precision
from .watchdog import Watchdog

LOCK_EXTRA_S = 30.0
"""How much longer than `parallel.lost_after_s` a requeued job waits for processes of its former start to end."""


def run_training(config: Config, config_name: str) -> int:
    """Trains as `config` says, in a new run directory named after `config_name` where `run.dir` gives no
    other; on as many ranks as `parallel` says.

    Returns an exit code of `gtddp_dist.errors`; raises UserError for bad input, before anything is written.
    """

    def work(stop: StopRequest, ranks: Ranks) -> int:
        with assembled(config, ranks, stop) as builder:
            parts = builder.build(config)  # before the run directory: what cannot be built leaves none behind
            with (
                opened(parts.team, lambda: new_run(config, config_name), new=True) as run,
                Chronicle(run.path, parts.team, stop) as chronicle,
            ):
                builder.prepare_for_loss(_continue(run.path), chronicle.lost)
                run.keep_layout(config, parts.team, builder.layout)
                tell(
                    parts.team,
                    f"{run.path}: {config.optimizer.name}, {config.model.name}, {config.data.name}, ",
                    end="",
                )
                tell(parts.team, f"{parts.total_steps} steps of {config.train.batch_size} samples")
                return finish(config, run, stop, builder, watched(builder, parts, run, stop), chronicle)

    return launch(work, config.parallel.pipe * config.parallel.data)


def resume_training(run_dir: Path, on_grid: Config | None = None) -> int:
    """Continues the run in `run_dir` from its newest valid checkpoint, on the grid that it had or on another; begins it
    where no start has come to its first checkpoint; does nothing where it has ended.

    Args:
        run_dir: of the run.
        on_grid: its configuration with another grid; None: the one that it had.

    Returns an exit code of `gtddp_dist.errors`; raises UserError where there is no run, or no checkpoint to
    use.
    """
    written = RunDirectory(run_dir).read_config()
    config = written if on_grid is None else on_grid

    def work(stop: StopRequest, ranks: Ranks) -> int:
        known = RunDirectory(run_dir).read_layout(config)
        with contextlib.ExitStack() as stack:
            with refusals_recorded(run_dir, ranks.rank, stop):
                builder = stack.enter_context(assembled(config, ranks, stop, known, _continue(run_dir)))
            team = builder.team
            wait_s = config.parallel.lost_after_s + LOCK_EXTRA_S if was_requeued() else 0.0
            with opened(team, lambda: existing_run(run_dir, wait_s)) as run:
                if team.any(team.rank == 0 and is_finished(config, run))[0]:
                    tell(team, f"{run.path} has ended already: nothing to do")
                    return OK
                with Chronicle(run.path, team, stop) as chronicle:
                    builder.prepare_for_loss(_continue(run.path), chronicle.lost)
                    run.keep_layout(config, team, builder.layout)
                    trained = team.any(team.rank == 0 and has_trained(run))[0]
                    code = OK if trained else resume(config, run, stop, builder)
                    return finish(config, run, stop, builder, code, chronicle)

    return launch(work, config.parallel.pipe * config.parallel.data)


def was_requeued() -> bool:
    """Whether Slurm has put this job back before: processes of its former start may be about to end still, on a node
    that Slurm has given up."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _continue(run: Path) -> str:
    return f"continue it with: gtddp train --resume {run}"


def evaluate_run(run_dir: Path) -> int:
    """Prints loss and accuracy on the validation set of the network in a run directory, for people and as
    JSON.

    The network is `model.safetensors`, or that of the newest valid checkpoint while training has not ended.
    Returns an exit code of `gtddp_dist.errors`; raises UserError where there is no run, or no network in it.
    """
    run = RunDirectory(run_dir)
    config = run.read_config()
    precision = Precision(config.train.dtype, select_device(config.train.device))
    if run.model_file.exists():
        source = run.model_file
        tensors, step = run.read_model()
    else:
        newest = newest_checkpoint(run)
        assert newest is not None  # it would have raised
        source, tensors, step = newest.folder, model_tensors_of(newest), newest.step
    data = load_data(config).to(precision.device)
    model = build_model(config, data, precision)
    load_model_tensors(model, tensors, str(source))
    measured = validate(config, model, data, precision)
    print(
        f"{source}, step {step}: validation loss {measured['val/loss']:.4f}, "
        f"accuracy {measured['val/accuracy']:.2%} of {len(data.validation_labels)} samples"
    )
    print(json.dumps({"step": step, **measured}))
    return OK


def resume(config: Config, run: RunDirectory, stop: StopRequest, builder: Builder) -> int:
    """`train` from the newest valid checkpoint of a run; from the start where no start has come to its first."""
    parts = builder.build(config)
    every = config.checkpoint.every or parts.order.steps_per_epoch
    had_one = any(isinstance(event, Ended) and event.code in (OK, REQUEUE) for event in read(run.path))
    may_begin = not had_one and last_step(run.path) < every
    newest = newest_checkpoint(run, parts.team, parts.state.wanted, may_begin=may_begin)
    if newest is None:
        tell(parts.team, f"begins {run.path}: {parts.total_steps} steps of {config.train.batch_size} samples")
        return watched(builder, parts, run, stop)
    parts.state.restore(newest)
    tell(parts.team, f"continues {run.path} at step {newest.step} of {parts.total_steps}")
    return watched(builder, parts, run, stop, newest.step)


def watched(builder: Builder, parts: Parts, run: RunDirectory, stop: StopRequest, from_step: int | None = None) -> int:
    """`train`, ended where a step does not end (`train.stalled_after_s`)."""
    progress, limit_s = parts.state.progress, parts.config.train.stalled_after_s
    with Watchdog(run.path, parts.team.rank, builder.witness, limit_s, lambda: progress.step):
        return train(parts, run, stop, from_step)


def train(parts: Parts, run: RunDirectory, stop: StopRequest, from_step: int | None = None) -> int:
    """Trains to the end and writes the results; `from_step` is the step of the checkpoint that `parts` come
    from. All ranks run it; rank 0 alone writes what is no shard of a checkpoint, and speaks.

    Returns OK, REQUEUE where `stop` asked to end early, or FAILED after too many non-finite steps in a row;
    in either of the latter cases there is a checkpoint of the last step.
    """
    config, progress, team, saved = parts.config, parts.state.progress, parts.team, from_step
    leads = team.rank == 0
    if leads:
        run.record_start(progress.step)
    with (
        MetricsLog(run, tensorboard=config.log.tensorboard, from_step=from_step or 0) if leads else NoLog() as log,
        progress_bar(parts) as bar,
        Writer(run.checkpoints, team.rank, team.world, config.checkpoint.keep) as writer,
    ):

        def wait_for_writing() -> None:
            problem: CheckpointError | None = None
            try:
                writer.wait()
            except CheckpointError as error:
                problem = error
            if team.any(problem is not None)[0]:
                # Rank 0 completes the checkpoint, and so hears of it where another rank has failed.
                raise problem if problem is not None and leads else ToldElsewhere(FAILED)

        def save() -> None:
            nonlocal saved
            if saved != progress.step:
                log.flush()
                wait_for_writing()  # of the checkpoint before
                tensors, values, rank_values = parts.state.collect()
                name = attempt_name(team)
                writer.save(progress.step, tensors, values, rank_values=rank_values, attempt=name)
                saved = progress.step

        save()  # of step 0: a run that dies before its first periodic checkpoint can be resumed all the same
        while progress.step < parts.total_steps:
            if team.any(stop.requested)[0]:
                save()
                wait_for_writing()
                reason = stop.reason if stop.requested else "a signal to another rank"
                say(team, f"stopped by {reason} at step {progress.step}, with a checkpoint")
                return REQUEUE
            batch = parts.order.batch_indices(progress.step)
            images, labels = parts.data.batch(batch, config.train.seed, progress.step)
            rate = parts.optimizer.param_groups[0]["lr"]
            started = time.perf_counter()
            result = parts.step(images, labels)
            advance(parts.scheduler)
            progress.count(result, time.perf_counter() - started)

            measured: Record = {}
            said: dict[str, str] = {}
            if result.source is not None:
                measured["train/skipped"] = progress.skipped
                said["train/refused"] = result.source.text
                if parts.state.scaler is None:  # with float16 a gradient that overflows is an everyday matter
                    say(
                        team,
                        f"gtddp: warning: step {progress.step} was refused, nothing was changed: not finite was "
                        f"{result.source.text}",
                    )
            if is_due(config.log.every, parts):
                steps = progress.step - progress.window_start
                measured |= progress.close_window(config.train.batch_size) | {"lr": rate}
                measured |= parts.resources(steps)
                if not result.refused:
                    measured |= parts.diagnostics(images, labels, result.loss)
            if is_due(config.eval.every or parts.order.steps_per_epoch, parts):
                measured |= parts.validate()
            if measured:
                log.write(progress.step, {"epoch": progress.step / parts.order.steps_per_epoch, **measured}, said)
            show(bar, measured)
            # While steps are refused nothing is learnt, and a good checkpoint should not make room for others.
            wanted = result.source is None or progress.step == parts.total_steps
            if wanted and is_due(config.checkpoint.every or parts.order.steps_per_epoch, parts):
                save()
            if result.source is not None and progress.skipped_in_a_row >= config.train.max_nonfinite:
                if not result.source.stays:
                    save()
                wait_for_writing()
                kept = (
                    f"It is in what a checkpoint holds: remove from {run.checkpoints} those that have it, and continue"
                    if result.source.stays
                    else f"The weights are those before them ({run.checkpoints})"
                )
                say(
                    team,
                    f"gtddp: error: stopped at step {progress.step}: the loss or the gradient of the last "
                    f"{progress.skipped_in_a_row} steps (train.max_nonfinite) was not finite, the last time for "
                    f"{result.source.text}. {kept}. Try a lower optimizer.lr, train.clip_norm, or look at the data",
                )
                if leads:
                    run.write_summary(summarise(parts, read_metrics(run)))
                return FAILED
        wait_for_writing()
    if leads:  # the last step's checkpoint is whole by now: it has the network of all ranks
        last = checkpoint.load(
            checkpoint.folder_of(run.checkpoints, progress.step), lambda key: key.startswith("model/")
        )
        run.write_model(model_tensors_of(last), progress.step)
        run.write_summary(summarise(parts, read_metrics(run)))
    team.any()  # whoever goes on finds the summary
    return OK


def is_due(every: int, parts: Parts) -> bool:
    """Whether something is to be done after this step that is done each `every` steps, and at the end."""
    step = parts.state.progress.step
    return step % every == 0 or step == parts.total_steps


def advance(scheduler: LambdaLR) -> None:
    """Sets the rates of the next step. The schedule follows the number of steps, whether or not one was refused."""
    with warnings.catch_warnings():
        # Torch takes a first step that was refused for an optimizer that somebody forgot to call.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()


def newest_checkpoint(
    run: RunDirectory, team: Team = SOLO, wanted: Wanted | None = None, *, may_begin: bool = False
) -> Checkpoint | None:
    """The newest checkpoint of a run that all ranks can use; says which newer ones cannot, and why.

    With several ranks, or with `wanted`, for a run that continues: those are taken out of its way
    (`checkpoint.set_aside`). None where no checkpoint was ever completed and rank 0 has set `may_begin`. Raises
    CheckpointError where no checkpoint can be used otherwise.
    """
    newest, refused = checkpoint.newest_agreed(run.checkpoints, wanted, team.gather_text)
    for item in refused:
        say(team, f"gtddp: warning: checkpoint not used: {item.reason}")
    begins = team.any(team.rank == 0 and may_begin)[0] and not any(item.complete for item in refused)
    if newest is None and not begins:
        reason = "none can be used" if refused else "there is none"
        if team.rank != 0:
            raise ToldElsewhere
        raise CheckpointError(
            f"{run.path} cannot be continued: of its checkpoints ({run.checkpoints}) {reason}: start a new run"
        )
    if wanted is not None and team.rank == 0:
        checkpoint.set_aside(refused)
    return newest


def is_finished(config: Config, run: RunDirectory) -> bool:
    """Whether nothing is left to do: trained, and the baseline too where it was asked for."""
    compared = not config.run.baseline or "baseline" in (run.read_summary() or {})
    return has_trained(run) and compared and run.curves.exists()


def has_trained(run: RunDirectory) -> bool:
    """Whether all training steps of a run were done."""
    summary = run.read_summary()
    return summary is not None and summary["finished"] is True


def finish(
    config: Config, run: RunDirectory, stop: StopRequest, builder: Builder, code: int, chronicle: Chronicle
) -> int:
    """What follows on training, which ended with the exit code `code`; returns that of the whole run.

    After OK: the baseline where `run.baseline` asks for it, then `curves.png`, and the results in print.
    """
    if code == OK and config.run.baseline:
        code = train_baseline(config, run, stop, builder)
        if code == FAILED:
            code = OK  # that the base optimizer diverges at these settings is a result: the table says so
    if code == OK and builder.team.rank == 0:
        report(config, run)
    if code == REQUEUE:
        say(builder.team, f"continue with: gtddp train --resume {run.path}")
    nonfinite = f"the loss or the gradient of {config.train.max_nonfinite} steps in a row was not finite"
    return chronicle.ends(code, nonfinite if code == FAILED else "")


def report(config: Config, run: RunDirectory) -> None:
    """Draws and prints the results of a run, and of its baseline."""
    curves = {config.optimizer.name: read_metrics(run)}
    summaries = [run.read_summary() or {}]
    if config.run.baseline:
        baseline = RunDirectory(run.baseline)
        summaries.append(baseline.read_summary() or {})
        curves[baseline_config(config, run).optimizer.name] = read_metrics(baseline)
    plot_curves(run.curves, curves, f"{config.model.name} on {config.data.name}")
    run.write_summary(summaries[0] | ({"baseline": summaries[1]} if config.run.baseline else {}))
    print(results_table(summaries))
    print(where_things_are(config, run))


def train_baseline(config: Config, run: RunDirectory, stop: StopRequest, builder: Builder) -> int:
    """Trains the base optimizer at the same settings in `baseline/`, or continues that."""
    base, team = baseline_config(config, run), builder.team
    there = RunDirectory(run.baseline)
    ended, begun = team.any(there.read_summary() is not None, any(there.checkpoints.glob(f"step-*/{checkpoint.INDEX}")))
    if ended:
        return OK  # one way or the other
    tell(team, f"now the base optimizer, {base.optimizer.name}, at the same settings")
    if begun:
        with opened(team, lambda: existing_run(there.path)):
            return resume(base, there, stop, builder)
    if team.rank == 0 and there.path.exists():
        shutil.rmtree(there.path)  # a start that died before its first checkpoint
    parts = builder.build(base)
    with opened(team, lambda: new_run(base, base.optimizer.name)) as created:
        return watched(builder, parts, created, stop)


def baseline_config(config: Config, run: RunDirectory) -> Config:
    """The same configuration with the base of its GT-DDP optimizer, and only the options that this takes."""
    base = OPTIMIZERS[config.optimizer.name].base
    if base is None:
        raise UserError(f"run.baseline: {config.optimizer.name} is a base optimizer itself")
    options = {name: getattr(config.optimizer, name) for name in OPTIMIZERS[base].options}
    return dataclasses.replace(
        config,
        run=RunConfig(dir=str(run.baseline)),
        optimizer=OptimizerConfig(name=base, **options),
    )


def progress_bar(parts: Parts) -> tqdm[NoReturn]:
    """A bar on stderr; without a terminal (a job's log) it is drawn rarely, in CI not at all."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=parts.total_steps,
        initial=parts.state.progress.step,
        desc=parts.config.optimizer.name,
        unit="step",
        disable=parts.team.rank != 0 or not parts.config.log.progress or not (terminal or "CI" not in os.environ),
        mininterval=0.1 if terminal else 30.0,
        dynamic_ncols=True,
    )


def show(bar: tqdm[NoReturn], measured: Record) -> None:
    """Moves the bar on by a step, and shows beside it what was measured last."""
    shown = [f"{name} {measured[name]:.4g}" for name in ("train/loss", "val/accuracy") if name in measured]
    if shown:
        bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update()


def say(team: Team, message: str) -> None:
    """A line on stderr, from rank 0, that leaves the progress bar whole."""
    if team.rank == 0:
        tqdm.write(message, file=sys.stderr)


def tell(team: Team, message: str, end: str = "\n") -> None:
    """A line on stdout, from rank 0."""
    if team.rank == 0:
        print(message, end=end, flush=True)
