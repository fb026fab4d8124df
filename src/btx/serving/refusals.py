"""What can be refused about a completion before a model is read. Plain Python."""

from __future__ import annotations

from pathlib import Path

from btx.errors import UserError
from btx.model_files.model_folder import check_model_or_btm


def check_completion(model_path: Path, temperature: float, prompt: str | None = None) -> None:
    """Refuse what cannot be completed with.

    Raises:
        CheckpointError: the folder is no model.
        UserError: a negative temperature, or a prompt that is no text.
    """
    if prompt is not None:
        check_prompt(prompt)
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it has to be 0 (always the likeliest token) or more")
    check_model_or_btm(model_path)


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is no Unicode text: a command line's bytes that are not UTF-8 come as half characters.

    Raises:
        UserError: names the place.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode at character {error.start + 1} ({prompt[error.start]!a}); "
                        f"type or save it as UTF-8") from error  # fmt: skip
