"""What the training loop asks of whatever keeps its checkpoints; `btx.training.state` keeps them in a folder."""

from __future__ import annotations

import torch
from torch import nn


class Checkpoints:
    """Checkpoints of one training job; none here, for steps that are only timed or tried. A class that keeps some knows
    where, in which files, and for which data they are good.

    A checkpoint is whole or absent: one whose writing was cut off, or is still under way in another thread, is none.
    """

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest whole checkpoint into `model` and `optimizer`.

        Returns:
            Finished optimiser steps; 0 if there is no checkpoint.

        Raises:
            RunFolderError: the checkpoint was made for other data or settings.
        """
        return 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after `step` finished optimiser steps; the loop goes on to change it when this returns, which
        may be before it is written.

        Raises:
            RunFolderError: it, or the one before, could not be written; the checkpoints that are whole are untouched.
        """

    def check(self) -> None:
        """Without waiting, raise the RunFolderError of a save that has failed since it returned; called every step."""

    def close(self) -> None:
        """Wait until all that was saved is written, however the training ends; raises RunFolderError if it failed."""

    def last(self) -> str:
        """Name of the newest checkpoint that is whole, for messages; waits, and raises as `close`."""
        return "none"

    def keep_only_last(self) -> None:
        """Remove all but one, once the stage's model is written: the newest that others can go on from."""
