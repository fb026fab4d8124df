"""The one training loop: the seed model, the branches, the mixed model and every baseline go through it.

A stage differs in its start weights, its data mixture and the set of weights that train, nothing else.

Shape letters: B batch, S sequence, T = B·S tokens, E experts, L layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from btx.data.mixture import NO_LABEL
from btx.data.samples import Samples
from btx.errors import LossSpike, NotFinite
from btx.moe.balancing import Balancing, RoutingLoss, move_selection_bias
from btx.moe.layer import at_step, moe_blocks
from btx.moe.routing_metrics import DeadExpertWatch, RoutingMeter
from btx.process import Interrupts
from btx.recipe.training import Training
from btx.training.checkpoints import Checkpoints
from btx.training.losses import next_token_loss
from btx.training.metrics import Metrics
from btx.training.schedule import adamw, learning_rate, set_learning_rate
from btx.training.spikes import SpikeWatch, spike_text


@dataclass(frozen=True)
class TrainingJob:
    """What one stage trains."""

    model: nn.Module
    """Start weights, with `requires_grad` set on the weights that train."""
    mixture: Samples
    """Training samples by number."""
    settings: Training
    folder: Path
    """The stage's folder: metrics.jsonl is written into it."""
    checkpoints: Checkpoints
    flops_per_token: float
    """Training FLOPs, forward and backward."""
    rng_seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    balancing: Balancing = field(default_factory=Balancing)
    """Losses on the routers, for MoE models."""
    experts: Sequence[str] = ()
    """Names of the experts, for warnings."""


@dataclass(frozen=True)
class Totals:
    """What a finished training run took."""

    steps: int
    tokens: int
    flops: float
    wall_s: float
    loss: float


def run_training(job: TrainingJob, interrupts: Interrupts, log: Callable[[str], None]) -> Totals:
    """Train until the token budget is used up, resuming from the last checkpoint if there is one.

    Raises:
        NotFinite: the loss or gradient became NaN or infinite; the weights were not updated.
        LossSpike: there was one, and `on_spike` is stop; a checkpoint of the steps before it was written.
        Interrupted: a signal came; a checkpoint was written.
    """
    settings, model = job.settings, job.model.to(job.device).train()
    tokens_per_step = settings.step_tokens(job.mixture.sequence_length)
    samples_per_step = tokens_per_step // job.mixture.sequence_length
    total_steps = settings.steps(job.mixture.sequence_length)
    optimizer = adamw(model, settings)
    done = job.checkpoints.load(model, optimizer)
    if done:
        log(f"resumed after step {done} of {total_steps}")
    if settings.precision == "bfloat16" and not in_bfloat16(settings, job.device):
        log("precision bfloat16: this CPU has no units for it; training in float32")
    metrics = Metrics(job.folder / "metrics.jsonl", done)
    watch = DeadExpertWatch(job.experts, log)
    watch.recent.extend(metrics.loads)
    spikes = SpikeWatch(metrics.recent)
    with metrics.open() as file:
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
            if finished % settings.checkpoint_every == 0 or finished == total_steps or interrupts.pending:
                job.checkpoints.save(finished, model, optimizer)
            interrupts.raise_if_pending(f"stopped after step {finished} of {total_steps}; run it again to continue")
    return Totals(
        total_steps, total_steps * tokens_per_step, total_steps * tokens_per_step * job.flops_per_token,
        metrics.wall_s, metrics.last_loss,
    )  # fmt: skip


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
    micro = max(1, settings.micro_batch_tokens // job.mixture.sequence_length)
    first = step * samples_per_step
    batch = job.mixture.batch(first, samples_per_step)
    scored = int((batch.labels != NO_LABEL).sum())
    loss = torch.zeros((), device=job.device)
    routing_loss, meter = RoutingLoss(job.balancing), RoutingMeter()
    for start in range(0, samples_per_step, micro):
        rows = slice(start, start + micro)
        input_ids, position_ids, labels = (
            torch.from_numpy(values[rows]).to(job.device, non_blocking=True)
            for values in (batch.input_ids, batch.position_ids, batch.labels)
        )
        share = len(input_ids) / samples_per_step
        with torch.autocast(job.device.type, torch.bfloat16, enabled=in_bfloat16(settings, job.device)):
            micro_loss = next_token_loss(model, input_ids, position_ids, labels) / scored
            loss += micro_loss.detach()
        routings = [block.routing for block in moe_blocks(model) if block.routing is not None]
        if routings:
            micro_loss = micro_loss + routing_loss.add(routings, share)  # packed sequences hold no padding to mask
            meter.add(routings)
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


def in_bfloat16(settings: Training, device: torch.device) -> bool:
    """Whether products are computed in bfloat16: where the settings say so, and on a CPU only if it has units for it;
    without, emulation is slower than float32 and less exact."""
    return settings.precision == "bfloat16" and (device.type != "cpu" or has_bfloat16_units())


def has_bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies in bfloat16 (AVX512-BF16, AMX or Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(there is True for name, there in capabilities.items() if name.endswith("bf16"))


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Global gradient norm; gradients are scaled down to `largest` where it is larger, and else left untouched."""
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    value = norm.item()
    if not value + 1e-6 <= largest:  # torch's clip_grad_norm_ would multiply every gradient by 1 here
        nn.utils.clip_grads_with_norm_(trained, largest, norm)
    return value
