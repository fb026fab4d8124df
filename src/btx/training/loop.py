"""The one training loop: the seed model, the branches, the mixed model and every baseline go through it.

A stage differs in its start weights, its data mixture and the set of weights that train, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from btx.errors import LossSpike
from btx.models.device import in_bfloat16, precision_text
from btx.models.packed import dense_mask_because
from btx.moe.routing_metrics import DeadExpertWatch
from btx.process import Interrupts
from btx.training.job import TrainingJob
from btx.training.metrics import Metrics
from btx.training.optimizer import adamw, set_learning_rate
from btx.training.schedule import learning_rate
from btx.training.spikes import SpikeWatch, spike_text
from btx.training.step import training_step
from btx.training.working_weights import give_back_float32, hold_frozen_in_bfloat16


@dataclass(frozen=True)
class Totals:
    """What a finished training run took."""

    steps: int
    tokens: int
    flops: float
    wall_s: float
    loss: float
    micro_batch_tokens: int
    """Tokens of a forward and backward pass."""


def run_training(job: TrainingJob, interrupts: Interrupts, log: Callable[[str], None]) -> Totals:
    """Train until the token budget is used up, resuming from the last checkpoint if there is one.

    Raises:
        NotFinite: the loss or gradient became NaN or infinite; the weights were not updated.
        LossSpike: there was one, and `on_spike` is stop; a checkpoint of the steps before it was written.
        Interrupted: a signal came; a checkpoint was written.
    """
    settings = job.settings
    bfloat16 = in_bfloat16(settings.precision, job.device)
    if bfloat16:
        hold_frozen_in_bfloat16(job.model)
    model = job.model.to(job.device).train()
    tokens_per_step = settings.step_tokens(job.mixture.sequence_length)
    samples_per_step = tokens_per_step // job.mixture.sequence_length
    total_steps = settings.steps(job.mixture.sequence_length)
    optimizer = adamw(model, settings)
    done = job.checkpoints.load(model, optimizer)
    if done:
        log(f"resumed after step {done} of {total_steps}")
    if job.settled is not None:
        job = job.settled(job, optimizer, log)
    log(f"precision: {precision_text(settings.precision, job.device)}")
    with torch.autocast(job.device.type, torch.bfloat16, enabled=bfloat16):
        if (reason := dense_mask_because(model)) is not None and job.device.type == "cuda":
            log(f"attention reads packed rows with a mask over the whole row, not document by document: {reason}")
    metrics = Metrics(job.folder / "metrics.jsonl", done)
    watch = DeadExpertWatch(job.experts, log)
    watch.recent.extend(metrics.loads)
    spikes = SpikeWatch(metrics.recent)
    with metrics.open() as file, closing(job.checkpoints):
        for step in range(done, total_steps):
            started = time.perf_counter()
            rate = learning_rate(step, total_steps, settings)
            set_learning_rate(optimizer, rate)
            try:
                facts = training_step(job, optimizer, step, samples_per_step, spikes)
            except LossSpike:
                job.checkpoints.save(step, model, optimizer)
                raise
            if (spike := facts.get("spike")) is not None:
                left_out = "; this step is left out, as on_spike: skip says" * spike["skipped"]
                log(f"warning: step {step + 1}: {spike_text(facts, spike)}{left_out}")
            if "load" in facts:
                facts["dead"] = watch.see(facts["load"])
            tokens = (step + 1) * tokens_per_step
            metrics.write(file, {
                "step": step + 1, "steps": total_steps, "tokens": tokens, **facts, "learning_rate": rate,
                "flops": tokens * job.flops_per_token,
            }, tokens_per_step, time.perf_counter() - started)  # fmt: skip
            finished = step + 1
            job.checkpoints.check()
            if finished % settings.checkpoint_every == 0 or finished == total_steps or interrupts.pending:
                job.checkpoints.save(finished, model, optimizer)
            interrupts.raise_if_pending(f"stopped after step {finished} of {total_steps}; run it again to continue")
    give_back_float32(model)
    return Totals(
        total_steps, total_steps * tokens_per_step, total_steps * tokens_per_step * job.flops_per_token,
        metrics.wall_s, metrics.last_loss, job.settings.micro_batch(job.mixture.sequence_length),
    )  # fmt: skip
