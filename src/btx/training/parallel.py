"""How several processes share a training's steps, and what they cannot share. Plain Python.

A process computes whole micro-batches of each step, those next to each other in the order in which one process would
compute all of them. What is computed within a micro-batch (a load-balancing loss, an expert's capacity, random numbers)
is then the same on any number of processes. Where nothing depends on the micro-batch, a micro-batch may be shared too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from btx.choices.routers import RoutingRule
from btx.recipe.training import Finetune, Training


def samples_of_process(count: int, micro: int, processes: int, number: int) -> range:
    """The samples of a step that one of several processes computes.

    Args:
        count: samples of a step.
        micro: samples of a micro-batch.
        processes: that share the step; `why_not_shared` finds nothing.
        number: of this process among them, from 0.
    """
    batches = math.ceil(count / micro)
    each = batches // processes * micro if batches % processes == 0 else count // processes
    return range(min(count, number * each), min(count, (number + 1) * each))


def why_not_shared(
    settings: Training, length: int, processes: int, *, router: RoutingRule | None, has_dropout: bool
) -> str | None:
    """What keeps several processes from training what one process would; None if nothing does.

    Args:
        length: tokens of a sequence.
        router: of a MoE model; None for a dense one.
        has_dropout: whether the model drops values by chance in training.

    Returns:
        The field's name, what is wrong and what to do.
    """
    if processes == 1:
        return None
    if settings.micro_batch_tokens == "auto":
        return ("micro_batch_tokens: auto is tried out by one process alone; with several a step's micro-batches are "
                "shared, so name a number (`btx plan` tells what fits)")  # fmt: skip
    if settings.optimizer == "adamw_8bit":
        return ("optimizer: adamw_8bit counts its moments in blocks of 256 numbers, which the rows that each process "
                "has do not fill: another number of processes could not go on with them; each process has a share of "
                "the moments already, so use adamw")  # fmt: skip
    count, micro = settings.step_samples(length), settings.micro_batch(length) // length
    batches, step = math.ceil(count / micro), f"a step has {count:,} sequences of {length:,} tokens"
    if (
        router is not None and isinstance(settings, Finetune) and settings.load_balancing_over == "global_batch"
        and batches > 1
    ):  # fmt: skip
        return (
            f"load_balancing_over: global_batch looks at the step's micro-batches one after the other, {batches} of "
            f"them, and several processes do not: that is another function; raise micro_batch_tokens to batch_tokens, "
            f"{settings.batch_tokens:,}, or balance over micro_batch"
        )
    if batches % processes == 0:
        return None
    by_micro_batch = _goes_by_micro_batch(settings, router, has_dropout)
    if count % processes == 0 and by_micro_batch is None:
        return None
    if count % processes:
        return (f"batch_tokens {settings.batch_tokens:,}: {step}, which {processes} processes cannot share equally; "
                f"choose a multiple of {processes * length:,}")  # fmt: skip
    return (f"micro_batch_tokens {settings.micro_batch_tokens:,}: {step} in {batches} micro-batch{'es' * (batches > 1)}"
            f", which {processes} processes cannot share, and {by_micro_batch} goes by micro-batch; at most "
            f"{count // processes * length:,} fits")  # fmt: skip


def _goes_by_micro_batch(settings: Training, router: RoutingRule | None, has_dropout: bool) -> str | None:
    """What of a training depends on which sequences are in a micro-batch together."""
    if has_dropout:
        return "dropout"
    if router is None or not isinstance(settings, Finetune):
        return None
    if router.kind in ("switch", "sample_top1"):
        return f"the router {router.kind}"
    if settings.load_balancing and settings.load_balancing_over == "micro_batch":
        return "load_balancing"
    return None


def has_dropout(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config drops values by chance in training."""
    names = [name for name in config if "dropout" in name or name.endswith("_pdrop")]
    return any(isinstance(config[name], int | float) and config[name] > 0 for name in names)
