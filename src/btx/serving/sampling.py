"""How an answer is drawn, which experts it may use, and what else can be refused before a model is read. Plain
Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from btx.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; raises UserError where none can be."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that the tokens drawn from have together."""
    rng_seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer, and are no part of it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it has to be 0 (always the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be above 0 and at most 1")
        if self.max_new_tokens < 0:
            raise UserError(f"{self.max_new_tokens} new tokens were asked for; it has to be 0 or more")


@dataclass(frozen=True)
class ExpertChoice:
    """Experts that may be used, by name: these alone, or all but some; without any all may be used."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def allowed(self, names: Sequence[str]) -> list[bool] | None:
        """Whether each of a model's experts may be used; None: all may.

        Raises:
            UserError: a name the model does not have, or no expert is left.
        """
        if not self.only and not self.without:
            return None
        if not names:
            raise UserError("a dense model has no experts to choose from: leave out only and without")
        for name in (*self.only, *self.without):
            if name not in names:
                raise UserError(f"there is no expert {name!r}; the model's are: {', '.join(names)}")
        allowed = [(not self.only or name in self.only) and name not in self.without for name in names]
        if not any(allowed):
            raise UserError(f"no expert is left to use; the model's are: {', '.join(names)}")
        return allowed


def check_prompt(prompt: str) -> None:
    """Refuse half characters, which is what a byte that is not UTF-8 is read as."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is no valid text: its character {error.start + 1} is {prompt[error.start]!a}, half a "
            f"character or a byte that is not UTF-8; give the prompt in UTF-8"
        ) from error
