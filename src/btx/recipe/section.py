"""Base and field types of the recipe's sections. Plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from btx.choices.baselines import BASELINES
from btx.choices.generators import GENERATORS
from btx.choices.launchers import LAUNCHERS
from btx.choices.merges import MERGE_METHODS
from btx.choices.router_inits import ROUTER_INITS
from btx.choices.routers import ROUTERS
from btx.choices.trackers import TRACKERS
from btx.choices.trainable import DENSE_TRAINABLE, MOE_TRAINABLE

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


def _can_be_a_path(text: str) -> str:
    """Refuse what every look at the disk would fail on: each in its own way, and late."""
    if not text:
        raise ValueError("a path that is empty names nothing; leave it out")
    if "\0" in text:
        raise ValueError("a path holds no zero character")
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("longer than a path can be: 255 bytes a name, 4000 in all")
    return text


PathText = Annotated[str, AfterValidator(_can_be_a_path)]

# The names a recipe may use: each list stands in btx.choices alone, and type checkers cannot read a list.
if TYPE_CHECKING:
    BaselineName = str
    GeneratorName = str
    QuestionsName = str
    LauncherName = str
    TrackerName = str
    RouterName = str
    MergeName = str
    RouterInitName = str
    DenseTrainable = str
    MoeTrainable = str
else:
    BaselineName = Literal[tuple(BASELINES)]
    GeneratorName = Literal[tuple(GENERATORS)]
    QuestionsName = Literal[tuple(name for name, generator in GENERATORS.items() if generator.questions)]
    LauncherName = Literal[tuple(LAUNCHERS)]
    TrackerName = Literal[tuple(TRACKERS)]
    RouterName = Literal[tuple(ROUTERS)]
    MergeName = Literal[tuple(MERGE_METHODS)]
    RouterInitName = Literal[tuple(ROUTER_INITS)]
    DenseTrainable = Literal[tuple(DENSE_TRAINABLE)]
    MoeTrainable = Literal[tuple(MOE_TRAINABLE)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
