"""Training: the one loop, and what is done before and after it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .config_schema import Config, OptimizerConfig, RunConfig
from .environment import select_device
from .errors import FAILED, OK, REQUEUE, UserError
from .launch import StopRequest, launcher
from .parts import Parts, build, build_model, load_data, validate
from .plots import plot_curves
from .registry import OPTIMIZERS
from .results import results_table, summarise, where_things_are
from .run_directory import MetricsLog, Record, RunDirectory, existing_run, new_run, read_metrics
from .training_state import load_model_tensors, model_tensors_of
from .training_step import Precision


def run_training(config: Config, config_name: str) -> int:
    """Trains as `config` says, in a new run directory named after `config_name` where `run.dir` gives no
    other.

    Returns an exit code of `gtddp_dist.errors`; raises UserError for bad input, before anything is written.
    """

    def work(stop: StopRequest) -> int:
        parts = build(config)  # before the run directory: what cannot be built leaves none behind
        with new_run(config, config_name) as run:
            print(f"{run.path}: {config.optimizer.name}, {config.model.name}, {config.data.name}, ", end="")
            print(f"{parts.total_steps} steps of {config.train.batch_size} samples", flush=True)
            return finish(config, run, stop, train(parts, run, stop))

    return launcher("single").launch(work)


def resume_training(run_dir: Path) -> int:
    """Continues the run in `run_dir` from its newest valid checkpoint; does nothing where it has ended.

    Returns an exit code of `gtddp_dist.errors`; raises UserError where there is no run, or no checkpoint to
    use.
    """

    def work(stop: StopRequest) -> int:
        with existing_run(run_dir) as run:
            config = run.read_config()
            if is_finished(config, run):
                print(f"{run.path} has ended already: nothing to do")
                return OK
            code = OK if has_trained(run) else resume(config, run, stop)
            return finish(config, run, stop, code)

    return launcher("single").launch(work)


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


def resume(config: Config, run: RunDirectory, stop: StopRequest) -> int:
    """`train` from the newest valid checkpoint of a run."""
    newest = newest_checkpoint(run, claim=True)
    parts = build(config)
    parts.state.restore(newest)
    print(f"continues {run.path} at step {newest.step} of {parts.total_steps}")
    return train(parts, run, stop, newest.step)


def train(parts: Parts, run: RunDirectory, stop: StopRequest, from_step: int | None = None) -> int:
    """Trains to the end and writes the results; `from_step` is the step of the checkpoint that `parts` come
    from.

    Returns OK, REQUEUE where `stop` asked to end early, or FAILED after too many non-finite steps in a row;
    in either of the latter cases there is a checkpoint of the last step.
    """
    config, progress, saved = parts.config, parts.state.progress, from_step
    run.record_start(progress.step)
    with (
        MetricsLog(run, tensorboard=config.log.tensorboard, from_step=from_step) as log,
        progress_bar(parts) as bar,
    ):

        def save() -> None:
            nonlocal saved
            if saved != progress.step:
                log.flush()
                tensors, values = parts.state.collect()
                checkpoint.save(run.checkpoints, progress.step, tensors, values, config.checkpoint.keep)
                saved = progress.step

        save()  # of step 0: a run that dies before its first periodic checkpoint can be resumed all the same
        while progress.step < parts.total_steps:
            if stop.requested:
                save()
                say(f"stopped by {stop.reason} at step {progress.step}, with a checkpoint")
                return REQUEUE
            batch = parts.order.batch_indices(progress.step).to(parts.precision.device)
            images, labels = parts.data.train_images[batch], parts.data.train_labels[batch]
            rate = parts.optimizer.param_groups[0]["lr"]
            started = time.perf_counter()
            result = parts.step(images, labels)
            advance(parts.scheduler)
            progress.count(result, time.perf_counter() - started)

            measured: Record = {}
            if result.refused:
                measured["train/skipped"] = progress.skipped
            if is_due(config.log.every, parts):
                measured |= progress.close_window(config.train.batch_size) | {"lr": rate}
                if not result.refused:
                    measured |= diagnostics(parts, images, labels, result.loss)
            if is_due(config.eval.every or parts.order.steps_per_epoch, parts):
                measured |= parts.validate()
            if measured:
                log.write(progress.step, {"epoch": progress.step / parts.order.steps_per_epoch, **measured})
            show(bar, measured)
            if is_due(config.checkpoint.every or parts.order.steps_per_epoch, parts):
                save()
            if progress.skipped_in_a_row >= config.train.max_nonfinite:
                save()
                say(
                    f"gtddp: error: stopped at step {progress.step}: the loss or the gradient of the last "
                    f"{progress.skipped_in_a_row} steps (train.max_nonfinite) was not finite. The weights are those "
                    f"before them ({run.checkpoints}). Try a lower optimizer.lr, train.clip_norm, or look at the data"
                )
                run.write_summary(summarise(parts, read_metrics(run)))
                return FAILED
    run.write_model(parts.model, progress.step)
    run.write_summary(summarise(parts, read_metrics(run)))
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


def diagnostics(parts: Parts, images: Tensor, labels: Tensor, loss: float) -> Record:
    """What the optimizer tells about its step, as `gtddp/<name>`; with a predicted decrease also the actual
    one.

    The actual decrease is that of the loss on the step's own batch, which costs another forward pass.
    """
    tell = getattr(parts.optimizer, "diagnostics", None)
    if tell is None:
        return {}
    told = {f"gtddp/{name}": float(value) for name, value in tell().items()}
    if "gtddp/predicted_decrease" in told:
        told["gtddp/actual_decrease"] = loss - parts.step.loss_now(images, labels)
    return told


def newest_checkpoint(run: RunDirectory, *, claim: bool = False) -> Checkpoint:
    """The newest checkpoint of a run that can be used; says which newer ones cannot, and why.

    With `claim`, these are taken out of the way of the run that continues (`checkpoint.set_aside`). Raises
    CheckpointError where no checkpoint can be used.
    """
    newest, refused = checkpoint.newest_valid(run.checkpoints)
    for item in refused:
        say(f"gtddp: warning: checkpoint not used: {item.reason}")
    if newest is None:
        reason = "none can be used" if refused else "there is none"
        raise CheckpointError(
            f"{run.path} cannot be continued: of its checkpoints ({run.checkpoints}) {reason}: start a new run"
        )
    if claim:
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


def finish(config: Config, run: RunDirectory, stop: StopRequest, code: int) -> int:
    """What follows on training, which ended with the exit code `code`; returns that of the whole run.

    After OK: the baseline where `run.baseline` asks for it, then `curves.png`, and the results in print.
    """
    if code == OK and config.run.baseline:
        code = train_baseline(config, run, stop)
        if code == FAILED:
            code = OK  # that the base optimizer diverges at these settings is a result: the table says so
    if code == OK:
        report(config, run)
    if code == REQUEUE:
        say(f"continue with: gtddp train --resume {run.path}")
    return code


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


def train_baseline(config: Config, run: RunDirectory, stop: StopRequest) -> int:
    """Trains the base optimizer at the same settings in `baseline/`, or continues that."""
    base = baseline_config(config, run)
    there = RunDirectory(run.baseline)
    if there.read_summary() is not None:
        return OK  # it has ended, one way or the other
    print(f"now the base optimizer, {base.optimizer.name}, at the same settings", flush=True)
    if any(there.checkpoints.glob(f"*/{checkpoint.INDEX}")):
        with existing_run(there.path):
            return resume(base, there, stop)
    if there.path.exists():
        shutil.rmtree(there.path)  # a start that died before its first checkpoint
    parts = build(base)
    with new_run(base, base.optimizer.name) as created:
        return train(parts, created, stop)


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
        disable=not parts.config.log.progress or not (terminal or "CI" not in os.environ),
        mininterval=0.1 if terminal else 30.0,
        dynamic_ncols=True,
    )


def show(bar: tqdm[NoReturn], measured: Record) -> None:
    """Moves the bar on by a step, and shows beside it what was measured last."""
    shown = [f"{name} {measured[name]:.4g}" for name in ("train/loss", "val/accuracy") if name in measured]
    if shown:
        bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update()


def say(message: str) -> None:
    """A line on stderr that leaves the progress bar whole."""
    tqdm.write(message, file=sys.stderr)
