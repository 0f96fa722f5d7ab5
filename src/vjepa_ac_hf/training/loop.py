"""The loop of every training here: steps, rows of metrics, checkpoints, and ends that can be continued from.

A program (`examples/train.py`, `examples/train_head.py`) makes a `Run`, gives it to `begin` with the checkpoint that it
goes on from, and to `train`. What must not differ between both starts: `preflight.run_identity`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from ..loading.loader import ClipLoader
from ..records import versions, write_json
from . import checkpoints
from .averages import WeightAverage
from .distributed import full_tensor
from .health import Health
from .interruptions import EXIT_INTERRUPTED, BatchWatch, StopSignals
from .optimization import continue_schedule
from .preflight import check_same_run
from .run_log import MetricsLog, jsonable, write_run_record, write_status
from .trackers import start_trackers

Batch = dict[str, Any]


def tensors_of(batch: Batch) -> Batch:
    """A loader's batch as a world model takes it: without the clips' names."""
    return {name: value for name, value in batch.items() if name != "clips"}


@dataclass
class Run:
    """A run between two of its steps."""

    arguments: argparse.Namespace  # the program's
    accelerator: Accelerator
    model: nn.Module  # not wrapped
    trained: nn.Module  # the part of it that is optimised and that checkpoints hold
    wrapped: nn.Module  # the model as a step calls it: under DDP, FSDP2, compilation
    optimizer: AcceleratedOptimizer  # of `trained`, as the scheduler is
    scheduler: LambdaLR
    stop: StopSignals
    identity: dict[str, Any]  # what must not differ when the run is continued (`run_identity`)
    loader: ClipLoader  # batches of this process
    health: Health
    average: WeightAverage | None = None  # of the weights of `trained`
    losses: tuple[str, ...] = ("loss",)  # outputs of the model that a row has; `loss` is optimised
    inputs: Callable[[Batch], Batch] = tensors_of  # arguments of the model's `forward` from a batch
    # Figures by name, `validation_loss` among them, or None; all processes call it, with the average in place of the
    # weights.
    validate: Callable[[], dict[str, Any]] | None = None
    picture: Callable[[int], None] | None = None  # called after a validation's row has been written
    validation_set: str | None = None  # names the clips of `validate`: losses on others are not compared
    publish: Callable[[int, Path], None] | None = None  # gets every checkpoint but the last, in the main process
    log: MetricsLog | None = None  # in the main process
    step: int = 0  # finished optimizer steps
    saved: int | None = None  # step of the newest checkpoint
    best: dict[str, Any] | None = None  # step and validation loss of the best checkpoint
    metrics: dict[str, Any] = field(default_factory=dict)  # logged last, by this start

    @property
    def checkpoints(self) -> Path:
        return self.arguments.output_dir / "checkpoints"


# ------------------------------------------------------------------------------------------------------------ start


def find_start(
    arguments: argparse.Namespace,
    identity: dict[str, Any],
    accelerator: Accelerator,
    config_class: type[PreTrainedConfig],
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume` means, with its state; None: the run begins. To be asked before anything is
    written, sharded or computed for long; all processes must ask, and all refuse.

    Raises:
        ValueError: the checkpoint is of another run, or of a later step than the last one of this.
    """
    folder = arguments.output_dir / "checkpoints"
    found = checkpoints.find_checkpoint(folder, arguments.resume) if accelerator.is_main_process else None
    (path,) = broadcast_object_list([found])
    state = None if path is None else checkpoints.read_state(path)
    if state is not None:
        check_same_run(state["arguments"], identity, path, config_class)
        if state["step"] > arguments.max_steps:
            raise ValueError(
                f"{path}: step {state['step']} is done, --max_steps is {arguments.max_steps}: give at least as many, "
                "another --output_dir, or an earlier checkpoint with --resume"
            )
    if accelerator.is_main_process:
        checkpoints.set_aside_newer(folder, path, arguments.resume)
    return None if state is None else (path, state)


def begin(run: Run, start: tuple[Path, dict[str, Any]] | None) -> None:
    """Put back what the checkpoint holds, and open the records of the run."""
    arguments, accelerator = run.arguments, run.accelerator
    config = {**jsonable(vars(arguments)), **run.identity, "versions": versions()}
    start_trackers(accelerator, arguments.output_dir, config, 0 if start is None else start[1]["step"])
    if start is not None:
        path, state = start
        run.loader.load_state_dict(state["loader"])
        checkpoints.load_checkpoint(path, run.trained, run.optimizer.optimizer, accelerator, run.average)
        continue_schedule(run.scheduler, state["schedule"])
        run.step, run.best = state["step"], state.get("best")
        run.saved = run.step if path.parent.resolve() == run.checkpoints.resolve() else None
        accelerator.print(f"continuing from {path}")
        _compare_validation(run, state)
    write_run_record(arguments, accelerator)
    if accelerator.is_main_process:
        run.log = MetricsLog(arguments.output_dir / "metrics.jsonl", run.step)
        write_status(arguments.output_dir, "running", run.step)


def _compare_validation(run: Run, state: dict[str, Any]) -> None:
    """Forget the best checkpoint where it is the best on other clips than those of this start."""
    if run.validation_set is None:
        run.validation_set = state.get("validation")
        return
    same = state.get("validation") == run.validation_set
    if "validation" not in state:  # written before checkpoints named the set; its clips were chosen by their number
        same = state["arguments"].get("eval_clips") == run.arguments.eval_clips
    if run.best is not None and not same:
        run.accelerator.print(
            f"validation is on other clips than before: the best checkpoint so far (step {run.best['step']}, loss "
            f"{run.best['validation_loss']:.4f}) is not compared with those to come"
        )
        run.best = None
        if run.accelerator.is_main_process:
            (run.checkpoints / "best.json").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- loop


def train_step(run: Run, batches: Iterator[Batch]) -> tuple[dict[str, float], float, bool]:
    """One optimizer step. The host waits for the device once, when all of it has been queued.

    Returns:
        `run.losses`, means over all processes; the gradient norm; whether any process is to stop.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, in all processes; no parameter has been changed.
    """
    accelerator, accumulation = run.accelerator, run.arguments.gradient_accumulation_steps
    sums, clips = torch.zeros(len(run.losses) + 1, device=accelerator.device), []
    for _ in range(accumulation):
        batch = next(batches)
        clips += batch["clips"]
        with accelerator.accumulate(run.wrapped):
            with accelerator.autocast():
                output = run.wrapped(**run.inputs(batch))
            accelerator.backward(output.loss)
        run.health.observe(output)
        sums[:-1] += torch.stack([output[name] for name in run.losses]).detach()
    sums[-1].fill_(run.stop.requested * accumulation)  # travels with the losses: all processes stop after the same step
    norm = full_tensor(accelerator.clip_grad_norm_(run.model.parameters(), run.arguments.max_grad_norm))
    means = accelerator.reduce(sums / accumulation, reduction="mean")
    *losses, stopping, gradient_norm = torch.cat([means, norm.detach().reshape(1)]).tolist()
    if not all(map(math.isfinite, (*losses, gradient_norm))):
        run.optimizer.zero_grad()
        raise FloatingPointError(
            f"loss {losses[0]} with gradient norm {gradient_norm} in step {run.step + 1}: training stopped before the "
            f"parameters were changed. Clips of this process in the step: {', '.join(clips)}"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.step += 1
    if run.average is not None:
        run.average.update(run.step)
    return dict(zip(run.losses, losses, strict=True)), gradient_norm, stopping > 0


def log_step(run: Run, metrics: dict[str, Any], evaluate: bool) -> bool:
    """Write the metrics of a step, with those of a validation if it is due. Returns whether it was the best so far.

    The model has the weights that are to be judged: the average, where there is one.
    """
    improved = False
    if evaluate and run.validate is not None:
        metrics |= run.validate()
        if run.average is not None:
            metrics["validation_weights"] = "average"
        loss = metrics.get("validation_loss")
        improved = loss is not None and math.isfinite(loss) and (run.best is None or loss < run.best["validation_loss"])
        if improved:
            run.best = {"step": run.step, "validation_loss": loss}
    # Without nulls: not all trackers take them.
    values = {name: value for name, value in metrics.items() if name != "step" and value is not None}
    run.accelerator.log(values, step=run.step)
    if run.log is not None:
        run.log.write(metrics)
    if evaluate and run.picture is not None:
        run.picture(run.step)
    run.metrics = metrics
    return improved


def position(run: Run) -> dict[str, Any]:
    """Where the data and this process's random generators stand."""
    return {"loader": run.loader.state_dict(), "random": checkpoints.get_random_state(run.accelerator.device)}


def save(run: Run, at: dict[str, Any]) -> None:
    """A checkpoint of `run.step`, with the data and random generators as they are `at` that step (`position`)."""
    if run.log is not None:
        run.log.flush()
    state = {"arguments": run.identity, "schedule": run.scheduler.state_dict(), "loader": at["loader"]}
    state |= {"best": run.best, "validation": run.validation_set, "versions": versions()}
    saved = checkpoints.save_checkpoint(
        *(run.checkpoints, run.step, run.trained, run.optimizer.optimizer, at["random"]),
        *(state, run.accelerator, run.average),
    )
    run.saved = run.step
    if run.accelerator.is_main_process:
        if run.publish is not None and run.step < run.arguments.max_steps:
            run.publish(run.step, saved)
        if run.best is not None:
            write_json(run.checkpoints / "best.json", {**run.best, "checkpoint": f"step-{run.best['step']:08d}"})
        best = None if run.best is None else run.best["step"]
        checkpoints.prune_checkpoints(run.checkpoints, run.arguments.keep_checkpoints, best)


def train(run: Run) -> None:
    """Optimise until `max_steps`, writing metrics and checkpoints.

    Raises:
        SystemExit: status `EXIT_INTERRUPTED`, after a signal and with a checkpoint.
    """
    arguments, accelerator = run.arguments, run.accelerator
    watch = BatchWatch(iter(run.loader), arguments.loader_warning, arguments.loader_timeout)
    batches = run.health.timed(watch)
    started, first, logged, stopping = time.perf_counter(), run.step, run.step, False
    progress = tqdm(total=arguments.max_steps, initial=run.step, unit="step", disable=not accelerator.is_main_process)
    run.model.train()
    while run.step < arguments.max_steps and not stopping:
        learning_rate, before = run.scheduler.get_last_lr()[0], position(run)
        run.health.begin(run.step + 1)
        try:
            losses, gradient_norm, stopping = train_step(run, batches)
        except FloatingPointError:
            if run.step != run.saved:
                save(run, before)
            raise
        progress.update()
        last, improved = run.step == arguments.max_steps, False
        evaluate = run.validate is not None and (last or run.step % arguments.eval_every == 0)
        if last or evaluate or run.step % arguments.log_every == 0:
            seconds = time.perf_counter() - started
            metrics = {"step": run.step, **losses, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
            metrics |= run.health.row(run.step - logged, seconds)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", clips_s=f"{metrics['clips_per_second']:.1f}")
            if logged == first and not last:
                accelerator.print(time_left(arguments.max_steps - run.step, run.step - logged, seconds))
            with run.average.applied() if evaluate and run.average is not None else nullcontext():
                improved = log_step(run, metrics, evaluate)
            started, logged = time.perf_counter(), run.step
        if evaluate:  # it takes a while
            stopping = any(gather_object([run.stop.requested]))
        if last or improved or stopping or run.step % arguments.checkpoint_every == 0:
            saving = time.perf_counter()
            save(run, position(run))
            started += time.perf_counter() - saving  # a row's speed is that of steps
    progress.close()
    watch.close()
    if run.step < arguments.max_steps:
        if accelerator.is_main_process:
            write_status(arguments.output_dir, "interrupted", run.step)
        accelerator.print(f"stopped after step {run.step} with a checkpoint: start the same command again")
        raise SystemExit(EXIT_INTERRUPTED)


def time_left(steps: int, measured: int, seconds: float) -> str:
    """How long `steps` are likely to take, by `measured` ones that took `seconds`."""
    left = round(steps * seconds / measured)
    text = f"{left // 3600} h {left % 3600 // 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
    return (
        f"{steps:,} steps to go, about {text} at {measured / seconds:.2f} steps/s (the first {measured}); validations "
        "and checkpoints come on top"
    )
