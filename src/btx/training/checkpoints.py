"""What the training loop asks of whatever keeps its checkpoints; `btx.training.state` keeps them in a folder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class Checkpoints(Protocol):
    """Checkpoints of one training job. Who keeps them knows where, in which files, and for which data they are good.

    A checkpoint is whole or absent: one whose writing was cut off, or is still under way in another thread, is none.
    """

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest whole checkpoint into `model` and `optimizer`.

        Returns:
            Finished optimiser steps; 0 if there is no checkpoint.

        Raises:
            RunFolderError: the checkpoint was made for other data or settings.
        """

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after `step` finished optimiser steps; the loop goes on to change it when this returns.

        Raises:
            RunFolderError: it could not be written; the checkpoint before is untouched.
        """

    def last(self) -> str:
        """Name of the newest checkpoint, for messages."""

    def keep_only_last(self) -> None:
        """Remove all but the newest, once the stage's model is written."""


class NoCheckpoints:
    """Nothing is kept: for steps that are only timed or tried."""

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """There is none."""
        return 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keeps nothing."""

    def last(self) -> str:
        """None, in words."""
        return "none"

    def keep_only_last(self) -> None:
        """Nothing to remove."""
