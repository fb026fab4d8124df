"""What one stage trains: all that the training loop is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btx.data.samples import Samples
from btx.models.device import in_bfloat16
from btx.moe.balancing import Balancing
from btx.process import Log
from btx.recipe.training import Training
from btx.training.checkpoints import Checkpoints


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
    followed: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while metrics.jsonl grows: trackers follow it (`btx.training.trackers.follow`)."""
    peak_tokens_per_s: float | None = None
    """Tokens a second at the peak of all devices, of which `mfu` is a share; None: not known."""
    drawn_at_once: tuple[int, int] = (0, 0)
    """Random numbers that a micro-batch draws, where several processes share a step (`btx.training.random_state`)."""
    objective: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]] | None = None
    """Summed loss of some rows of a batch, and sums for metrics.jsonl; both become means over what the batch scores.
    None: the next-token loss."""
    settled: Callable[[TrainingJob, torch.optim.Optimizer, Log], TrainingJob] | None = None
    """Puts a number in the place of `micro_batch_tokens: auto` once model and optimiser are on the device
    (`btx.training.micro_batch`); None: there is one."""

    @cached_property
    def in_bfloat16(self) -> bool:
        """Whether products are computed in bfloat16; asked once, for every micro-batch wants to know."""
        return in_bfloat16(self.settings.precision, self.device)
