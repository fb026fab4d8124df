"""One optimiser step: samples in micro-batches, forward and backward, and the update.

Shape letters: B batch, S sequence, T = B·S tokens, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from btx.data.mixture import Batch
from btx.errors import LossSpike, NotFinite
from btx.models.sharding import added_up, as_forward, process_count, process_number
from btx.moe.balancing import RoutingLoss, move_selection_bias
from btx.moe.layer import MoE, at_step, moe_blocks, routing_unchanged
from btx.moe.routing_metrics import RoutingMeter
from btx.training.job import TrainingJob
from btx.training.losses import next_token_loss
from btx.training.optimizer import clip_gradients, step_unless
from btx.training.parallel import samples_of_process
from btx.training.random_state import leave_out, numbers_drawn, seed_step
from btx.training.spikes import MOST_IN_A_ROW, SpikeWatch, spike_text

Facts = dict[str, Any]
"""A step's part of its line in metrics.jsonl."""


class Readings:
    """Copies of some tensors on the host, small and of any shape. On a GPU nothing waits until they are asked for: the
    copy goes to pinned memory behind what the device is doing, and an event tells when it has arrived.

    Args:
        values: name → tensor, all on one device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in values.items()}
        flat = torch.cat([value.detach().flatten() for value in values.values()])  # in the widest of their types
        self._event: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            self._flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))
        else:
            self._flat = flat

    def wait(self) -> dict[str, Tensor]:
        """The values, as soon as the device has come to them."""
        if self._event is not None:
            self._event.synchronize()
        parts = self._flat.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


@dataclass
class Accumulated:
    """What the micro-batches of a step on this process have left besides gradients; on the device."""

    loss: Tensor
    """Their part of the mean next-token loss, nats."""
    routing_loss: RoutingLoss
    meter: RoutingMeter
    blocks: Sequence[MoE]
    """The model's MoE layers."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Their part of what else the objective tells, by name."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Of all processes, after `add_up`: the loss, and what the routers did."""

    def add_up(self) -> None:
        """Put the parts of all processes together."""
        sums = {"loss": self.loss} | self.means | self.routing_loss.values() | self.meter.values()
        if process_count() == 1:
            self.values = sums
            return
        if "load_balancing" in sums:
            sums["load_balancing"] = sums["load_balancing"] / process_count()
        flat = added_up(torch.cat([value.flatten() for value in sums.values()]))
        parts = flat.split([value.numel() for value in sums.values()])
        self.values = {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}

    def readings(self, grad_norm: Tensor) -> Readings:
        """All values on their way to the host."""
        return Readings({"grad_norm": grad_norm} | self.values)

    def move_selection_biases(self, step: float | Tensor) -> None:
        """After the update, where balancing needs no loss."""
        if biases := [block.selection_bias for block in self.blocks if block.selection_bias is not None]:
            move_selection_bias(biases, self.values["routing"][:, :-2].float(), step)

    def other_facts(self, values: dict[str, Tensor]) -> Facts:
        """What else the objective tells, and what the routers did."""
        objective = {name: values[name].item() for name in self.means}
        balance = {name: values[name].item() for name in ("load_balancing",) if name in values}
        return objective | balance | self.meter.facts(values)


def training_step(
    job: TrainingJob, optimizer: torch.optim.Optimizer, step: int, samples_per_step: int,
    spikes: SpikeWatch | None = None,
) -> Facts:  # fmt: skip
    """One optimiser step over `samples_per_step` samples, in micro-batches; returns its metrics.

    Args:
        spikes: what came before; None looks for no spikes.

    Raises:
        NotFinite: the loss or gradient is NaN or infinite, and is not left out; the weights were not updated.
        LossSpike: it is a spike and `on_spike` is stop; the weights were not updated.
    """
    done = step_gradients(job, step, samples_per_step)
    norm = clip_gradients(job.model, job.settings.clip)
    values = done.readings(norm).wait()
    facts = judged(job, step, values, spikes)
    if not facts.get("spike", {}).get("skipped"):
        optimizer.step()
        done.move_selection_biases(job.balancing.bias)
    optimizer.zero_grad(set_to_none=True)
    return facts | done.other_facts(values) if "loss" in facts else facts


def launch_step(
    job: TrainingJob, optimizer: torch.optim.Optimizer, step: int, samples_per_step: int, spikes: SpikeWatch,
    stopped: Tensor,
) -> Callable[[], Facts]:  # fmt: skip
    """`training_step` without waiting for the device, where spikes change nothing; its metrics are read by what this
    returns, which also looks for spikes and raises NotFinite.

    Args:
        stopped: float32 scalar on the device, 0 at first. It becomes 1 when a loss or gradient is NaN or infinite, and
            while it is 1 no step moves weights, moments or selection biases: so those launched before the bad one was
            read leave everything as it was before it.
    """
    done = step_gradients(job, step, samples_per_step)
    norm = clip_gradients(job.model, job.settings.clip, wait=False)
    stopped.logical_or_(~(done.values["loss"].isfinite() & norm.isfinite()))
    step_unless(optimizer, stopped)
    done.move_selection_biases(job.balancing.bias * (1 - stopped))
    optimizer.zero_grad(set_to_none=True)
    readings = done.readings(norm)

    def read() -> Facts:
        values = readings.wait()
        return judged(job, step, values, spikes) | done.other_facts(values)

    return read


def samples_at_once(job: TrainingJob) -> int:
    """Samples of a micro-batch; the last of a step may have fewer."""
    return job.settings.micro_batch(job.mixture.sequence_length) // job.mixture.sequence_length


def step_gradients(job: TrainingJob, step: int, count: int) -> Accumulated:
    """Forward and backward of a step's `count` samples, on this process those of its own micro-batches; gradients and
    values are of all."""
    first = step * count
    if process_count() == 1:
        done = accumulate_gradients(job, step, range(first, first + count))
    else:
        micro = samples_at_once(job)
        samples_here = samples_of_process(count, micro, process_count(), process_number())
        samples = range(first + samples_here.start, first + samples_here.stop)
        done = accumulate_gradients(job, step, samples, of=count, before=samples_here.start // micro)
    done.meter.tokens = count * job.mixture.sequence_length
    done.add_up()
    return done


def numbers_of_micro_batch(job: TrainingJob, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Random numbers that a micro-batch draws, found by computing one whose gradients are thrown away."""
    accumulate_gradients(job, 0, range(samples_at_once(job)))
    optimizer.zero_grad(set_to_none=True)
    return numbers_drawn(job.device)


def accumulate_gradients(
    job: TrainingJob, step: int, samples: range, *, of: int | None = None, before: int = 0
) -> Accumulated:
    """Forward and backward of samples of a step, in micro-batches.

    Args:
        of: samples of the whole step, if these are not all.
        before: micro-batches of the step before these, on other processes: their random numbers are left out.
    """
    model, micro, count = job.model, samples_at_once(job), of or len(samples)
    seed_step(job.rng_seed, step, job.device)
    if before:
        leave_out(before, job.drawn_at_once)
    blocks = moe_blocks(model)
    at_step(blocks, step)
    batch = job.mixture.batch(samples.start, len(samples))
    scored: int | Tensor = batch.scored
    if process_count() > 1:
        scored = added_up(torch.tensor(scored, device=job.device))
    done = Accumulated(torch.zeros((), device=job.device), RoutingLoss(job.balancing), RoutingMeter(), blocks)
    for start in range(0, len(samples), micro):
        rows = batch.rows(slice(start, start + micro))
        share = len(rows.input_ids) * process_count() / count  # of what this process computes
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.in_bfloat16):
            total, sums = as_forward(model, partial(job.objective or next_token_objective, model, rows))
            micro_loss = total / scored
            done.loss += micro_loss.detach()
        for name, value in sums.items():
            done.means[name] = done.means.get(name, 0.0) + value / scored
        routings = [block.routing for block in blocks if block.routing is not None]
        if routings:
            # Packed sequences hold no padding to mask.
            balance = done.routing_loss.add(routings, share)
            micro_loss = micro_loss + (balance if process_count() == 1 else balance / process_count())
            done.meter.add(routings)
        with routing_unchanged(blocks):
            micro_loss.backward()
    return done


def next_token_objective(model: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`TrainingJob.objective` of all training but preferences: the next-token loss, and nothing else to tell."""
    input_ids, position_ids, labels = map(torch.from_numpy, (rows.input_ids, rows.position_ids, rows.labels))
    return next_token_loss(model, input_ids, position_ids, labels), {}


def judged(job: TrainingJob, step: int, values: dict[str, Tensor], spikes: SpikeWatch | None) -> Facts:
    """A step's loss and gradient norm, and the spike if it is one; of a step that is left out as it has no numbers the
    spike alone.

    Raises:
        NotFinite: one of them is NaN or infinite, and `on_spike` is not skip, or too many steps before it were so.
        LossSpike: it is a spike and `on_spike` is stop.
    """
    settings = job.settings
    facts: Facts = {name: values[name].item() for name in ("loss", "grad_norm")}
    spike = spikes.see(facts) if spikes is not None else None
    if not all(map(math.isfinite, facts.values())):
        if spikes is not None and settings.on_spike == "skip" and spikes.in_a_row <= MOST_IN_A_ROW:
            return {"spike": {**(spike or {}), "skipped": True}}
        raise NotFinite(
            f"step {step + 1}: the loss is {facts['loss']} and the gradient norm {facts['grad_norm']}; the weights "
            f"were not updated. Last good checkpoint: {job.checkpoints.last()}. Lower "
            f"learning_rate (now {settings.learning_rate}) or raise warmup_steps"
        )
    if spike is not None:
        if settings.on_spike == "stop":
            raise LossSpike(
                f"step {step + 1}: {spike_text(facts, spike)}; stopped before this step, as on_spike: stop says, and "
                f"saved. on_spike: log goes on from here and through it; skip trains anew and leaves such steps out"
            )
        facts["spike"] = spike | {"skipped": settings.on_spike == "skip"}
    return facts
