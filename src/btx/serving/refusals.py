"""What can be refused about a completion before a model is read. Plain Python."""

from __future__ import annotations

from pathlib import Path

from btx.errors import UserError
from btx.model_files.model_folder import check_model_or_btm


def check_completion(model_path: Path, temperature: float) -> None:
    """Refuse what cannot be completed with.

    Raises:
        CheckpointError: the folder is no model.
        UserError: a negative temperature.
    """
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it has to be 0 (always the likeliest token) or more")
    check_model_or_btm(model_path)
