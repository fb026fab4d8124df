"""The recipe's reference page and its JSON schema for editors, made from the schema itself. Plain Python.

python -m btx.recipe.docs docs        writes docs/recipe.md and docs/recipe.schema.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from btx.errors import UserError
from btx.files import write_text
from btx.recipe.derived import SETTINGS
from btx.recipe.loading import recipe_schema
from btx.recipe.schema import Recipe
from btx.recipe.section import Section
from btx.recipe.training import Training

HEADER = """\
# The recipe: every field

A recipe is a YAML file. It names the data, the seed model and what each stage does with them; what it leaves out has
the default given here, which is the paper's where the paper states a number; where btx's default is another choice than
the paper's, `paper: true` takes the paper's. `btx plan RECIPE --recipe` prints the recipe with all defaults filled in.
`btx init` writes one for a model and texts of your own, with comments.

- Any field can be set on the command line too: `btx run my.yaml train.tokens=2e6 mix.top_k=1 'train.domains=[math]'`.
- Numbers may be written `1_000_000`, `1e6` or `1000000`. Tokens, bytes and steps are plain counts: no `1M`, no `4 GB`.
- An unknown key is refused with its file, line and column, and the nearest key that exists.
- Editors complete and check a recipe that begins with `# yaml-language-server: $schema=recipe.schema.json`: the path or
  address of a copy of [recipe.schema.json](recipe.schema.json).

**What follows from size and tokens.** The paper's batch of 4M tokens, its learning rate of 1e-4 and its 100 warm-up
steps are for a 7B model and billions of tokens. Without `paper: true`, a training section (`seed_model.train`, `train`,
`finetune`) that leaves one of these out gets, for D = `tokens` and N parameters outside the embeddings:

- `batch_tokens`: 0.58 D^0.571, in whole sequences, at most 4M;
- `learning_rate`: 1.79 N^-0.713 D^0.307, at most 6e-3, from random weights; two thirds of it for branches that train
  their feed-forward sublayers alone, or adapters on them; a third for all else that goes on from a trained model;
- `warmup_steps`: a twentieth of the steps, at most 100;
- `checkpoint_every`: a tenth of the steps, from 10 to 1000.

The first two are the law of Li et al. (arXiv 2503.04715); [decisions.md](decisions.md) has the reasons. N is read from
`seed_model.config`, `plan_config` or the model's folder, or guessed from a hub name (`Llama-3.2-1B`); where nothing
says it, the learning rate is that of a 7B model. `btx plan` and `btx run` tell what was filled in. The run folder keeps
it (`derived`): a later version's rules change no run whose tokens, model and sequence length are the same, and runs
from before there were such rules keep the paper's values.

*Made by `python -m btx.recipe.docs docs` from `src/btx/recipe/schema.py` and the files of its sections; edit those.*
"""

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "any value"}
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


def recipe_page() -> str:
    """docs/recipe.md: a table a section, in the order of the recipe, shared fields once."""
    parts = [HEADER]
    for title, section, fields in _sections():
        parts.append(f"## {title}\n\n{_sentence(section.__doc__)}\n")
        shared = [base for base in section.__mro__[1:] if _is_shared(base)]
        if shared:
            base = _title(shared[0])
            parts.append(f"All [{base}](#{base.lower().replace(' ', '-')}), and:\n")
        rows = [f"| `{name}` | {_kind(field)} | {_default(field, derived=section is Training and name in SETTINGS)} | "
                f"{_meaning(field)} |" for name, field in fields.items()]  # fmt: skip
        parts.append("\n".join(["| field | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def write_pages(folder: Path) -> list[Path]:
    """Write the page and the JSON schema; returns their paths."""
    schema = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    pages = {folder / "recipe.md": recipe_page(), folder / "recipe.schema.json": schema}
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)


def _sections() -> Iterator[tuple[str, type[BaseModel], dict[str, FieldInfo]]]:
    """(title, class, fields to show) of every section, each class once, shared bases before their first user."""
    waiting: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    seen: set[type] = set()
    while waiting:
        path, section = waiting.pop(0)
        if section in seen:
            continue
        seen.add(section)
        inherited: set[str] = set()
        for base in section.__mro__[1:]:
            if _is_shared(base):
                inherited |= base.model_fields.keys()
                if base not in seen:
                    seen.add(base)
                    yield _title(base), base, base.model_fields
        fields = {name: field for name, field in section.model_fields.items() if name not in inherited}
        yield f"`{path}`" if path else "The recipe", section, fields
        inner = [(f"{path}.{name}".lstrip("."), inside) for name, field in fields.items() for inside in _inner(field)]
        waiting = inner + waiting  # a section's parts come right after it


def _is_shared(base: type) -> TypeGuard[type[Section]]:
    """Whether fields of several sections come from `base`."""
    return issubclass(base, Section) and base is not Section and bool(base.model_fields)


def _title(base: type) -> str:
    """`SlurmJob` as words: Slurm job settings."""
    return re.sub("(?<=[a-z])[A-Z]", lambda capital: f" {capital[0].lower()}", base.__name__) + " settings"


def _inner(field: FieldInfo) -> list[type[BaseModel]]:
    """Sections a field holds, alone, in a list or in a mapping."""

    def found(kind: Any) -> Iterator[type[BaseModel]]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind
        for part in get_args(kind):
            yield from found(part)

    return list(found(field.annotation))


def _kind(field: FieldInfo) -> str:
    return _kind_of(field.annotation, field.metadata).replace("|", "\\|")


def _kind_of(kind: Any, metadata: list[Any]) -> str:
    """What may be written, in words."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        known = [item for entry in more for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
        return _kind_of(inner, known)
    if get_origin(kind) in (Union, UnionType):
        options = [_kind_of(option, metadata) for option in get_args(kind) if option is not type(None)]
        return " or ".join(options)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_kind_of(get_args(kind)[0], [])}"
    if get_origin(kind) is dict:
        key, value = (_kind_of(part, []) for part in get_args(kind))
        return f"mapping: {key} → {value}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    if any(getattr(item, "pattern", None) for item in metadata):
        return "name"
    return _NAMES.get(kind, str(kind)) + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    limits = {name: getattr(item, name) for name, _ in _BOUNDS for item in metadata if hasattr(item, name)}
    if {"ge", "le"} <= limits.keys():
        return f", {_number(limits['ge'])} to {_number(limits['le'])}"
    return "".join(f", {words} {_number(limits[name])}" for name, words in _BOUNDS if name in limits)


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else str(value)


def _default(field: FieldInfo, *, derived: bool = False) -> str:
    if derived:
        return f"follows; paper: {_default(field)}"
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value == "":
        return "none"
    if isinstance(value, str):
        return f"`{json.dumps(value)}`" if not value.isprintable() else f"`{value}`"
    return f"`{json.dumps(value, default=str)}`"


def _meaning(field: FieldInfo) -> str:
    inner = _inner(field)
    text = field.description or (inner[0].__doc__ if inner else "")
    return _sentence(text).replace("|", "\\|")


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    """Write both pages into the folder named on the command line."""
    if len(sys.argv) != 2:
        raise UserError("usage: python -m btx.recipe.docs FOLDER")
    for path in write_pages(Path(sys.argv[1])):
        print(path)


if __name__ == "__main__":
    main()
