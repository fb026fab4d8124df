"""What can be refused about a completion before a model is read. Plain Python."""

from __future__ import annotations

import math

from btx.errors import UserError


def check_sampling(temperature: float, top_p: float = 1.0, max_new_tokens: int = 1) -> None:
    """Refuse what no answer can be drawn with.

    Raises:
        UserError: names it, and what it may be.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}; it has to be 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it has to be above 0 and at most 1")
    if max_new_tokens < 0:
        raise UserError(f"{max_new_tokens} new tokens were asked for; it has to be 0 or more")


def check_prompt(prompt: str) -> None:
    """Refuse half characters, which is what a byte that is not UTF-8 is read as.

    Raises:
        UserError: names the first.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is no valid text: its character {error.start + 1} is {prompt[error.start]!a}, half a "
            f"character or a byte that is not UTF-8; give the prompt in UTF-8"
        ) from error
