"""`micro_batch_tokens: auto`: the largest micro-batch with which a step fits into memory, found before training begins.

On a GPU it is tried: a step without an update, the largest micro-batch first and half of it after each one that runs
out of memory. On a CPU, where that may end any process of the machine, it is counted (`btx.models.memory`).

What was found is written down before the first step and taken again by whoever goes on: the order in which gradients
are added up, and what a load-balancing loss sees, depend on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.files import read_json, write_sealed
from btx.models.free_memory import free_memory
from btx.moe.layer import moe_blocks
from btx.number_texts import bytes_text
from btx.process import Log
from btx.system_errors import is_out_of_memory
from btx.training.job import TrainingJob
from btx.training.memory import MemoryNeeds, halves
from btx.training.peak_memory import reset_peak_memory
from btx.training.step import accumulate_gradients

FILE = "micro_batch.json"
SPARE_SHARE = 0.03
"""Of a GPU's memory: left free in the trial, for what the allocator will not get out of its blocks later."""
CPU_SHARE = 0.8
"""Of the free memory of a machine: other programs want some too."""


class NotedMicroBatch(TypedDict):
    """micro_batch.json of a stage."""

    inputs: str
    """Hash of what decides the stage."""
    micro_batch_tokens: int


@dataclass(frozen=True)
class AutoMicroBatch:
    """Finds the number for `micro_batch_tokens: auto` of a stage."""

    needs: MemoryNeeds
    """The training's memory."""
    inputs: str
    """Hash of what decides the stage: what was found for another one is not taken."""
    jobs_at_once: int = 1
    """Trainings that share the machine's memory."""

    def settled(self, job: TrainingJob, optimizer: torch.optim.Optimizer, log: Log) -> TrainingJob:
        """The job, whose model is on the device, with a number; weights, moments and random state stay as they are.

        Raises:
            torch.OutOfMemoryError: not even one sequence fits.
        """
        tokens = noted_micro_batch(job.folder, self.inputs)
        if tokens is not None:
            log(f"micro_batch_tokens: auto is {tokens:,}, as when this training began")
        else:
            length = job.mixture.sequence_length
            sizes = halves(job.settings.step_tokens(length), length)
            if job.device.type == "cuda":
                reserved = reserved_bytes(job.device, self.needs)
                tokens = first_that_fits(sizes, lambda size: try_step(job, optimizer, size, reserved))
                reset_peak_memory(job.device)
            else:
                tokens = self.counted(sizes, free_memory() // self.jobs_at_once, log)
            taken = self.needs.with_changes({"micro_batch_tokens": tokens}).memory
            log(f"micro_batch_tokens: auto is {tokens:,} of {sizes[0]:,}; a step takes about {bytes_text(taken.peak)}")
            write_sealed(job.folder / FILE, {"inputs": self.inputs, "micro_batch_tokens": tokens})
        return replace(job, settings=job.settings.model_copy(update={"micro_batch_tokens": tokens}))

    def counted(self, sizes: Sequence[int], free: int, log: Log) -> int:
        """The first of `sizes` whose step takes no more than its share of the free memory by the count; else the last.

        Args:
            free: bytes of memory for this training, its weights not counted: they are there.
        """
        for size in sizes:
            memory = self.needs.with_changes({"micro_batch_tokens": size}).memory
            if memory.peak - memory.weights <= CPU_SHARE * free:
                return size
        log(f"warning: by the count one sequence takes {bytes_text(memory.peak)}, and {bytes_text(free)} are free here")
        return sizes[-1]


def noted_micro_batch(folder: Path, inputs: str) -> int | None:
    """What a stage has taken for `auto` when it began; None if it has not."""
    noted: NotedMicroBatch | None = read_json(folder / FILE, NotedMicroBatch)
    return noted["micro_batch_tokens"] if noted is not None and noted["inputs"] == inputs else None


def first_that_fits(sizes: Sequence[int], attempt: Callable[[int], None]) -> int:
    """The first of `sizes` with which `attempt` does not run out of memory.

    Raises:
        RuntimeError, MemoryError: what the last attempt raised, or any attempt for another reason.
    """
    for size in sizes:
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if size == sizes[-1] or not is_out_of_memory(error):
                raise
        else:
            return size
        gc.collect()  # here, where the error and the tensors in its frames are gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise ValueError("no sizes")


def try_step(job: TrainingJob, optimizer: torch.optim.Optimizer, tokens: int, reserved: int = 0) -> None:
    """A step's forward and backward passes in two micro-batches of so many tokens, without the update.

    Args:
        reserved: bytes that are held meanwhile, for what is not there yet.
    """
    length = job.mixture.sequence_length
    rows, all_rows = tokens // length, job.settings.step_samples(length)
    trial = replace(job, settings=job.settings.model_copy(update={"micro_batch_tokens": tokens}))
    held = torch.empty(reserved, dtype=torch.uint8, device=job.device)
    try:
        with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
            accumulate_gradients(trial, 0, range(min(2 * rows, all_rows)))
    finally:
        del held
        optimizer.zero_grad(set_to_none=True)
        for block in moe_blocks(job.model):
            block.routing = None


def reserved_bytes(device: torch.device, needs: MemoryNeeds) -> int:
    """What a training will hold on a GPU beside what is there now and a step's own tensors: its moments."""
    memory, there = needs.memory, torch.cuda.memory_allocated(device)
    spare = int(SPARE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return max(0, memory.weights + memory.optimizer - there) + spare
