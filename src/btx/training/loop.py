"""The one training loop: the seed model, the branches, the mixed model and every baseline go through it.

A stage differs in its start weights, its data mixture and the set of weights that train, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from btx.errors import BtxError, LossSpike, NotFinite, RunFolderError
from btx.models.device import precision_text
from btx.models.packed import dense_mask_because
from btx.models.sharding import largest, process_count
from btx.process import Interrupted, Interrupts
from btx.training.compiled import compiled_layers
from btx.training.job import TrainingJob
from btx.training.metrics import Metrics, StepRecord
from btx.training.optimizer import adamw, set_learning_rate, skips_on_device
from btx.training.schedule import learning_rate, steps_before_decay
from btx.training.spikes import SpikeWatch
from btx.training.step import Facts, launch_step, numbers_of_micro_batch, training_step
from btx.training.working_weights import give_back_float32, hold_frozen_in_bfloat16


@dataclass(frozen=True)
class Totals:
    """What a finished training run took."""

    steps: int
    tokens: int
    flops: float
    wall_s: float
    """Seconds in steps."""
    loss: float
    micro_batch_tokens: int
    """Tokens of a forward and backward pass."""
    compile_s: float
    """Seconds in which layers were compiled before the first step; not in `wall_s`."""


def run_training(
    job: TrainingJob, interrupts: Interrupts, log: Callable[[str], None], *, read_later: bool | None = None
) -> Totals:
    """Train until the token budget is used up, resuming from the last checkpoint if there is one.

    Args:
        read_later: read what a step gave after the next one was launched, so that a GPU never waits for Python. None:
            on GPUs, unless a spike is to change or stop its step, for then it is looked at before the weights move.

    Raises:
        NotFinite: the loss or gradient became NaN or infinite; the weights were not updated. Or every step was left
            out for that.
        LossSpike: there was one, and `on_spike` is stop; a checkpoint of the steps before it was written.
        Interrupted: a signal came; a checkpoint was written.
    """
    job, optimizer, done = _begin(job, log)
    settings, model, length = job.settings, job.model, job.mixture.sequence_length
    tokens_per_step, total_steps = settings.step_tokens(length), settings.steps(length)
    samples_per_step = tokens_per_step // length
    to_keep = (steps_before_decay(total_steps, settings), total_steps)
    if read_later is None:
        read_later = job.device.type == "cuda" and settings.on_spike == "log" and skips_on_device(optimizer)
    metrics = Metrics(job.folder / "metrics.jsonl", done, job.peak_tokens_per_s)
    spikes, stopped = SpikeWatch(metrics.recent), torch.zeros((), device=job.device)

    def take(step: int) -> Facts | Callable[[], Facts]:
        if read_later:
            return launch_step(job, optimizer, step, samples_per_step, spikes, stopped)
        try:
            return training_step(job, optimizer, step, samples_per_step, spikes)
        except LossSpike:
            job.checkpoints.save(step, model, optimizer)
            raise

    with (
        compiled_layers(job, optimizer, range(done, total_steps), log) as compile_s,
        metrics.open() as file,
        job.followed(),
        closing(job.checkpoints),
    ):
        record = StepRecord(job, metrics, file, total_steps, tokens_per_step, log)
        for step in range(done, total_steps):
            rate, finished = learning_rate(step, total_steps, settings), step + 1
            set_learning_rate(optimizer, rate)
            record.launched(finished, rate, take(step))
            job.checkpoints.check()
            ending = largest(interrupts.pending or 0)  # a signal may reach processes in different steps
            if finished % settings.checkpoint_every == 0 or finished in to_keep or ending:
                record.read()
                job.checkpoints.save(finished, model, optimizer)
                record.go_on()
            stopped_after = f"stopped after step {finished} of {total_steps}; run it again to continue"
            stop_if_asked(interrupts, ending, stopped_after)
    if math.isnan(metrics.last_loss):
        raise _without_loss(job, total_steps, has_metrics=done < total_steps or bool(metrics.recent))
    give_back_float32(model)
    tokens = total_steps * tokens_per_step
    return Totals(total_steps, tokens, tokens * job.flops_per_token, metrics.wall_s, metrics.last_loss,
                  settings.micro_batch(length), compile_s)  # fmt: skip


def _without_loss(job: TrainingJob, steps: int, *, has_metrics: bool) -> BtxError:
    """Why no step of a training that has come to its end has a loss."""
    if not has_metrics:
        return RunFolderError(f"{job.folder / 'metrics.jsonl'}: tells of none of the {steps} steps that are done. "
                              f"Restore it from a copy, or remove {job.folder} to train anew")  # fmt: skip
    return NotFinite(
        f"each of the {steps} steps was left out, as on_spike: skip says: no loss or gradient was a number, and "
        f"nothing was trained. Lower learning_rate (now {job.settings.learning_rate}), or look at the model that it "
        f"starts from"
    )


def _begin(job: TrainingJob, log: Callable[[str], None]) -> tuple[TrainingJob, torch.optim.Optimizer, int]:
    """The model on its device in the types it trains in, the optimiser, and the steps that a checkpoint has.

    Returns:
        The job with a number for `micro_batch_tokens: auto`; the optimiser; finished steps.
    """
    settings = job.settings
    if process_count() == 1 and job.in_bfloat16:
        hold_frozen_in_bfloat16(job.model)
    model = job.model.to(job.device).train()
    optimizer = adamw(model, settings)
    done = job.checkpoints.load(model, optimizer)
    if done:
        log(f"resumed after step {done} of {settings.steps(job.mixture.sequence_length)}")
    if job.settled is not None:
        job = job.settled(job, optimizer, log)
    if process_count() > 1:
        job = replace(job, drawn_at_once=numbers_of_micro_batch(job, optimizer))
    log(f"precision: {precision_text(settings, job.device)}")
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.in_bfloat16):
        if (reason := dense_mask_because(model)) is not None and job.device.type == "cuda":
            log(f"attention reads packed rows with a mask over the whole row, not document by document: {reason}")
    return job, optimizer, done


def stop_if_asked(interrupts: Interrupts, ending: int, message: str) -> None:
    """Raise `Interrupted` if a signal came; of several processes in all of them, as they agreed on `ending`."""
    if process_count() == 1:
        interrupts.raise_if_pending(message)
    elif ending:
        raise Interrupted(message, ending)
