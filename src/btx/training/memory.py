"""What a training holds in memory with its settings, and which other settings make it less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from btx.choices.trainable import MOE_TRAINABLE
from btx.models.device import in_bfloat16
from btx.models.memory import TrainingMemory, logit_rows, training_memory
from btx.models.step_counts import MemoryScheme, MicroBatch, ModelShape
from btx.number_texts import bytes_text
from btx.recipe.training import Train, Training
from btx.system_errors import first_line

CPU = torch.device("cpu")
CHANGES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"precision": "bfloat16"},
    {"optimizer": "adamw_8bit"},
    {"weights": "bfloat16", "optimizer": "adamw_8bit", "precision": "bfloat16"},
)
"""Settings that save memory beside a smaller micro-batch and fewer weights that train; the first change results least.
A section that has no such field is not told of it."""
MOST_PROCESSES = 1024
FREEZING = {False: ("feed_forward", "lora"), True: ("all_but_experts", "routers")}
"""For dense and MoE models: what else may train, most first."""


@dataclass(frozen=True)
class Variant:
    """A training with some settings changed."""

    changed: dict[str, Any]
    """Setting → its new value; empty for the training as it is."""
    micro_batch_tokens: int
    """What a micro-batch holds."""
    memory: TrainingMemory

    def __str__(self) -> str:
        shown = {name: str(value).lower() if isinstance(value, bool) else value for name, value in self.changed.items()}
        return ", ".join(f"{name}: {value}" for name, value in shown.items())


@dataclass(frozen=True)
class MemoryNeeds:
    """The memory of one training, as it is and with other settings."""

    settings: Training
    shape: ModelShape
    sequence_length: int
    device: str
    """`cuda` or `cpu`."""
    may_freeze: bool = False
    """Whether the recipe says what trains in this stage."""
    processes: int = 1
    """That train the model together; memory is that of each."""

    def with_changes(self, changed: dict[str, Any]) -> Variant:
        """The training with some settings changed."""
        settings, length = self.settings.model_copy(update=changed), self.sequence_length
        shape = self._trained_as(changed["trainable"]) if "trainable" in changed else self.shape
        scheme, on_gpu, share = memory_scheme(settings, self.device), self.device == "cuda", self._share(settings)
        tokens = min(settings.micro_batch(length), share)
        batch = MicroBatch(
            tokens, length, checkpointed=settings.gradient_checkpointing, alone=tokens >= share, on_gpu=on_gpu,
            dense_mask=on_gpu and scheme.arithmetic != 2,
            logit_rows=logit_rows(shape.vocabulary, on_gpu=on_gpu), processes=self.processes,
            compiled=settings.compiles(length, shape.layers, on_gpu=on_gpu),
        )  # fmt: skip
        return Variant(changed, tokens, training_memory(shape, scheme, batch))

    def settled(self, micro_batch_tokens: int | None) -> MemoryNeeds:
        """With what was found for `micro_batch_tokens: auto`; None: nothing was."""
        if micro_batch_tokens is None or self.settings.micro_batch_tokens != "auto":
            return self
        return replace(self, settings=self.settings.model_copy(update={"micro_batch_tokens": micro_batch_tokens}))

    def _share(self, settings: Training) -> int:
        """Tokens of a step that each process has: whole sequences."""
        return math.ceil(settings.step_samples(self.sequence_length) / self.processes) * self.sequence_length

    @property
    def memory(self) -> TrainingMemory:
        """At the peak of a step."""
        return self.with_changes({}).memory

    @property
    def checkpoint_bytes(self) -> int:
        """A resumable checkpoint of all processes: the weights that train, in the type in which they do, and their
        moments."""
        scheme = memory_scheme(self.settings, self.device)
        return round((scheme.weight + scheme.moments) * sum(self.shape.trained.values()))

    def savings(self) -> list[tuple[Variant, int]]:
        """Each change that saves memory by itself (of micro-batches the half) and the bytes it saves, most first."""
        now = self.memory.peak
        smaller = [{"micro_batch_tokens": tokens} for tokens in self._smaller_micro_batches()[:1]]
        saved = [(variant, now - variant.memory.peak)
                 for variant in map(self.with_changes, [*smaller, *self._other_changes()])]  # fmt: skip
        return sorted((pair for pair in saved if pair[1] > 0), key=lambda pair: -pair[1])

    def advice(self, error: BaseException) -> str:
        """For a training that ran out of memory: what takes it, and what makes it less, the largest saving first."""
        memory, less = self.memory, self.savings()
        parts = ", ".join(f"{part} {bytes_text(count)}" for part, count in asdict(memory).items() if count)
        savings = [f"{variant} saves about {bytes_text(saved)}" for variant, saved in less]
        if not any("micro_batch_tokens" in variant.changed for variant, _ in less):
            savings.append("micro_batch_tokens is one sequence already: a smaller data.sequence_length saves more")
        return (
            f"out of memory: {first_line(error)}. This training takes about {bytes_text(memory.peak)} ({parts}). "
            f"{'; '.join(savings)}; with a smaller launch.jobs fewer trainings share the memory"
        )

    def that_fits(self, most: int) -> Variant | None:
        """The fewest settings to change so that the peak is `most` bytes at most: none where it fits as it is; None
        where nothing helps. Of equally few those that change results least, with the largest micro-batch that fits."""
        others, fitting = list(self._other_changes()), list[tuple[int, int, Variant]]()
        for chosen in range(1 << len(others)):  # a bit says whether a change is made
            made = {name: value for bit, change in enumerate(others) if chosen >> bit & 1
                    for name, value in change.items()}  # fmt: skip
            if (largest := self._largest_micro_batch(made, most)) is not None:
                fitting.append((len(largest.changed), chosen, largest))
        return min(fitting, key=lambda ranked: ranked[:2])[2] if fitting else None

    def _largest_micro_batch(self, made: dict[str, Any], most: int) -> Variant | None:
        """With some changes made, the micro-batch of the recipe or the largest smaller one that fits."""
        automatic = self.settings.micro_batch_tokens == "auto"
        sizes = halves(self._share(self.settings), self.sequence_length) if automatic else [
            self.with_changes({}).micro_batch_tokens, *self._smaller_micro_batches()
        ]  # fmt: skip
        variants = (self.with_changes(made | {"micro_batch_tokens": tokens}) for tokens in sizes)
        fitting = next((variant for variant in variants if variant.memory.peak <= most), None)
        if fitting is not None and (automatic or fitting.micro_batch_tokens == sizes[0]):
            return replace(fitting, changed=made)
        return fitting

    def processes_that_fit(self, most: int) -> int | None:
        """The fewest processes with which the peak of each is `most` bytes at most, all else as it is; they share a
        step's sequences equally. None: no number helps."""
        sequences = self.settings.step_samples(self.sequence_length)
        numbers = (count for count in range(1, min(sequences, MOST_PROCESSES) + 1) if sequences % count == 0)
        return next((count for count in numbers
                     if replace(self, processes=count).memory.peak <= most), None)  # fmt: skip

    def _smaller_micro_batches(self) -> list[int]:
        """Powers of two of sequences below the micro-batch, largest first."""
        tokens = self.with_changes({}).micro_batch_tokens
        return [half for half in halves(tokens, self.sequence_length) if half < tokens]

    def _other_changes(self) -> Iterator[dict[str, Any]]:
        fields = type(self.settings).model_fields
        for change in CHANGES:
            if self.processes > 1 and change.get("optimizer") == "adamw_8bit":
                continue  # its blocks of numbers are not cut among processes
            if change.keys() <= fields.keys() and any(getattr(self.settings, name) != change[name] for name in change):
                yield change
        trained = sum(self.shape.trained.values())
        for name in FREEZING[bool(self.shape.experts)] if self.may_freeze else ():
            if name == "lora" and not isinstance(self.settings, Train):
                continue
            if sum(self._trained_as(name).trained.values()) < trained:
                yield {"trainable": name}

    def _trained_as(self, trainable: str) -> ModelShape:
        return trained_as(self.shape, trainable, self.settings.lora.rank if isinstance(self.settings, Train) else 0)


def may_freeze(stage: str) -> bool:
    """Whether the recipe says what trains in a stage: in branches, the finetuning and what comes after it."""
    return stage.partition("/")[0] in ("train", "finetune", "align")


def halves(tokens: int, sequence_length: int) -> list[int]:
    """Micro-batches to try, largest first: the largest power of two of sequences within `tokens`, and its halves down
    to one sequence."""
    rows = max(1, tokens // sequence_length)
    return [sequence_length << power for power in reversed(range(rows.bit_length()))]


def memory_scheme(settings: Training, device: str) -> MemoryScheme:
    """Bytes of a number, by what it is for, when this is trained on a `cuda` or `cpu` device."""
    moments = 2.0 if settings.optimizer == "adamw_8bit" else 8.0
    # A GPU that is planned for has units for bfloat16, whatever this machine has.
    if settings.precision == "float32" if device == "cuda" else not in_bfloat16(settings.precision, CPU):
        return MemoryScheme(moments=moments)
    masters = settings.weights == "float32"
    return MemoryScheme(weight=4.0 if masters else 2.0, working=2.0 if masters else 0.0, frozen=2.0, moments=moments,
                        arithmetic=2)  # fmt: skip


def trained_as(shape: ModelShape, trainable: str, lora_rank: int = 0) -> ModelShape:
    """The shape of the same model with something else that trains: a name of `btx.choices.trainable`.

    Args:
        lora_rank: of the adapters on the feed-forward projections, where that is lora.
    """
    if trainable == "lora":
        feed_forward, D, F = shape.total["feed_forward"], shape.width, shape.feed_forward
        adapters = lora_rank * (D + F) * round(feed_forward / (D * F))
        total = {**shape.total, "feed_forward": feed_forward + adapters}
        return replace(shape, total=total, trained={"feed_forward": adapters})
    if trainable == "feed_forward":
        chosen = {"feed_forward"}
    else:
        parts = MOE_TRAINABLE[trainable]
        chosen = {part for part in shape.total if (part if part in ("experts", "routers") else "shared") in parts}
    return replace(shape, trained={part: count for part, count in shape.total.items() if part in chosen})
