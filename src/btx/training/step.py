"""One optimiser step: samples in micro-batches, forward and backward, and the update.

Shape letters: B batch, S sequence, T = B·S tokens, E experts, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from btx.data.mixture import NO_LABEL
from btx.errors import LossSpike, NotFinite
from btx.models.device import in_bfloat16
from btx.moe.balancing import RoutingLoss, move_selection_bias
from btx.moe.layer import at_step, moe_blocks, routing_unchanged
from btx.moe.routing_metrics import RoutingMeter
from btx.training.job import TrainingJob
from btx.training.losses import next_token_loss
from btx.training.optimizer import clip_gradients
from btx.training.spikes import SpikeWatch, spike_text


def training_step(
    job: TrainingJob, optimizer: torch.optim.Optimizer, step: int, samples_per_step: int,
    spikes: SpikeWatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step over `samples_per_step` samples, in micro-batches; returns its metrics.

    Args:
        spikes: what came before; None looks for no spikes.

    Raises:
        NotFinite: the loss or gradient is NaN or infinite; the weights were not updated.
        LossSpike: it is a spike and `on_spike` is stop; the weights were not updated.
    """
    settings, model = job.settings, job.model
    # The random state of a step depends on nothing but its number: resuming needs no saved generator.
    torch.manual_seed((job.rng_seed << 32) + step)
    at_step(model, step)
    micro = settings.micro_batch(job.mixture.sequence_length) // job.mixture.sequence_length
    first = step * samples_per_step
    batch = job.mixture.batch(first, samples_per_step)
    scored = int((batch.labels != NO_LABEL).sum())
    loss = torch.zeros((), device=job.device)
    routing_loss, meter = RoutingLoss(job.balancing), RoutingMeter()
    for start in range(0, samples_per_step, micro):
        rows = slice(start, start + micro)
        input_ids, position_ids, labels = (
            torch.from_numpy(values[rows]) for values in (batch.input_ids, batch.position_ids, batch.labels)
        )
        share = len(input_ids) / samples_per_step
        with torch.autocast(job.device.type, torch.bfloat16, enabled=in_bfloat16(settings.precision, job.device)):
            micro_loss = next_token_loss(model, input_ids, position_ids, labels) / scored
            loss += micro_loss.detach()
        routings = [block.routing for block in moe_blocks(model) if block.routing is not None]
        if routings:
            micro_loss = micro_loss + routing_loss.add(routings, share)  # packed sequences hold no padding to mask
            meter.add(routings)
        with routing_unchanged(model):
            micro_loss.backward()
    facts: dict[str, Any] = {"loss": loss.item(), "grad_norm": clip_gradients(model, settings.clip)}
    if not all(map(math.isfinite, facts.values())):
        raise NotFinite(
            f"step {step + 1}: the loss is {facts['loss']} and the gradient norm {facts['grad_norm']}; the weights "
            f"were not updated. Last good checkpoint: {job.checkpoints.last()}. Lower "
            f"learning_rate (now {settings.learning_rate}) or raise warmup_steps"
        )
    skipped = False
    if spikes is not None and (spike := spikes.see(facts)) is not None:
        if settings.on_spike == "stop":
            raise LossSpike(
                f"step {step + 1}: {spike_text(facts, spike)}; stopped before this step, as on_spike: stop says, and "
                f"saved. on_spike: log goes on from here and through it; skip trains anew and leaves such steps out"
            )
        skipped = settings.on_spike == "skip"
        facts["spike"] = spike | {"skipped": skipped}
    if not skipped:
        optimizer.step()
        if biases := [block.selection_bias for block in moe_blocks(model) if block.selection_bias is not None]:
            move_selection_bias(biases, meter.rows_LE, job.balancing.bias)
    optimizer.zero_grad(set_to_none=True)
    return facts | routing_loss.facts() | meter.facts()
