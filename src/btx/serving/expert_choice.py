"""Which experts a completion may use: one alone, or all but some. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from btx.errors import UserError


@dataclass(frozen=True)
class ExpertChoice:
    """Experts by name; without any all may be used."""

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
