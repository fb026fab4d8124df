"""Recipes from YAML files, the command line's dotted overrides, and back to YAML.

`load_recipe("demo", ["mix.top_k=1"])` reads a packaged recipe, a file or a run folder. Everything that is wrong is said
in one `RecipeError`, a line each: `my.yaml:6:25: train.learning_rte: unknown key 'learning_rte'; did you mean ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from btx.errors import RecipeError, UserError
from btx.files import home_filled, write_text
from btx.recipe.derived import SETTINGS, fill_in_training
from btx.recipe.extends import fill_in
from btx.recipe.overrides import apply_override, apply_overrides
from btx.recipe.problems import did_you_mean, schema_problems
from btx.recipe.schema import PAPER, Recipe, Sweep
from btx.recipe.yaml_positions import (
    LARGEST_WHOLE,
    RESOLVERS,
    Document,
    Problem,
    YamlSyntaxError,
    compose,
    read_yaml,
)
from btx.system_errors import blame

MAX_BYTES = 1_000_000
MAX_PROBLEMS_SHOWN = 50
RUN_RECIPE = "recipe.yaml"
"""The recipe in a run folder, which a manifest.json lies beside."""
MAX_EXTENDED = 8
"""Recipes that may extend each other in a row."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, variant: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a packaged one by name, a YAML file, or a run folder.

    Of a run folder, and of the recipe.yaml that lies in one, `run` is that folder, whatever the file says: a folder
    that was copied or moved is its own run. A packaged name goes first: a folder of the same name is `./demo`. A
    sweep's `variant` has overrides of its own, on top of the others. Raises `RecipeError` with every problem found.
    """
    text, file, run = _read(name_or_path)
    return parse_recipe(text, file, overrides, run=run, variant=variant)


def _read(name_or_path: str) -> tuple[str, str, str | None]:
    """Text of a recipe, its file's name in messages, and the run folder if that is where it lies."""
    packaged = _packaged_files()
    if name_or_path in packaged:
        return packaged[name_or_path], f"{name_or_path}.yaml", None
    path = Path(name_or_path)
    run = None
    try:
        if path.is_dir():
            run, path = str(path), path / RUN_RECIPE
        elif path.name == RUN_RECIPE and (path.parent / "manifest.json").is_file():
            run = str(path.parent)
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if run is not None:
            raise RecipeError(f"{path}: not there, so {run} is no run folder; give a recipe file or its name") from None
        nearby = [*packaged, *(str(file) for file in path.parent.glob("*.y*ml"))]
        raise RecipeError(
            f"no recipe, file or run folder {name_or_path!r}{did_you_mean(name_or_path, nearby) or ';'} "
            f"packaged recipes: {', '.join(packaged)}"
        ) from None
    except (OSError, ValueError) as error:
        blame(error)
        raise RecipeError(f"{name_or_path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _decode(content, str(path)), str(path), run


def parse_recipe(
    text: str, file: str, overrides: Sequence[str] = (), *, run: str | None = None, variant: Sequence[str] = ()
) -> Recipe:
    """Read a recipe from YAML text; `file` is its name in messages, and its stem the default of `name`.

    Overrides are `dotted.key=value` with the value in YAML. `run` takes the place of the text's run folder, not of an
    override's. `variant` as for `load_recipe`. Raises `RecipeError` with every problem found.
    """
    document = _merged(text, file, overrides, run)
    apply_overrides(document, variant)
    if run is not None:
        _refuse_idle_paper(document)
    else:
        fill_in_training(document.value, _in_run_folder(document.value))
    recipe, problems = _validate(document)
    if recipe is None or problems:
        problems.sort(key=lambda problem: (problem.place.line == 0, problem.place.line, problem.place.column))
        more = len(problems) - MAX_PROBLEMS_SHOWN
        lines = [str(problem) for problem in problems[:MAX_PROBLEMS_SHOWN]]
        raise RecipeError("\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])]))
    return recipe


def read_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[str, Sweep] | None:
    """Name and `sweep` section of what may be a recipe only with one of the sweep's variants; arguments as for
    `load_recipe`. None if the section itself is wrong.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML.
    """
    text, file, run = _read(name_or_path)
    document = _merged(text, file, overrides, run)
    try:
        return str(document.value["name"]), Sweep.model_validate(document.value.get("sweep") or {}, strict=True)
    except ValidationError:
        return None


def packaged_recipes() -> dict[str, str]:
    """Names of the recipes that come with btx → their `description`."""
    return {name: read_yaml(text, name).value.get("description", "") for name, text in _packaged_files().items()}


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a packaged recipe, comments included, to a new `.yaml` file or into a folder, for the user to edit.

    Returns the file; its stem becomes the copy's `name:`, so that it gets its own run folder. Raises `UserError` if
    there is no such recipe, the target exists, or its stem is no valid run name.
    """
    packaged = _packaged_files()
    if name not in packaged:
        raise UserError(
            f"no packaged recipe {name!r}{did_you_mean(name, packaged) or ';'} there are: {', '.join(packaged)}"
        )
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target}: a recipe's file ends in .yaml; or give a folder that exists")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already and is not overwritten: choose another name or remove it")
    text = _renamed(packaged[name], target.stem)
    parse_recipe(text, str(target))
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: there is no folder {target.parent}")
    write_text(target, text)
    return target


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field in the schema's order; `parse_recipe` of it gives an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def inline_yaml(value: Any) -> str:
    """A value on one line, as an override takes it; reading it gives an equal value."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**9)[1:-2]


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipe files, for editors: short forms included, `name` optional, and with `extends` all else."""
    schema = Recipe.model_json_schema()
    schema.pop("required")
    needed = ["data", "seed_model", "train", "finetune"]
    schema["anyOf"] = [{"required": ["extends"]}, {"required": needed}]
    definitions = schema["$defs"]
    source = definitions["Source"]
    held_out = definitions["Domain"]["properties"]["held_out"]
    one_source = {**source, "properties": {**source["properties"], "held_out": held_out}}
    for section in ("SeedTraining", "Train", "Finetune"):
        for key in SETTINGS:  # they follow from other settings
            definitions[section]["properties"][key].pop("default")
    item = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    sources = {"type": "array", "items": item, "minItems": 1}
    definitions["Domain"] = {
        "description": definitions["Domain"]["description"],
        "anyOf": [{"type": "string"}, sources, one_source, definitions["Domain"]],
    }
    definitions["Mixed"] = {
        "description": definitions["Mixed"]["description"],
        "anyOf": [{"type": "integer", "minimum": 0}, definitions["Mixed"]],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or our reader would take for something else than text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Double quotes, with escapes, where there are line breaks: in PyYAML's other styles not all of them survive."""
    breaks = not {"\n", "\x85", "\u2028", "\u2029"}.isdisjoint(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _packaged_files() -> dict[str, str]:
    files = (file for file in resources.files("btx.recipes").iterdir() if file.name.endswith(".yaml"))
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in sorted(files, key=lambda f: f.name)}


def _decode(content: bytes, file: str) -> str:
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{file}: larger than {MAX_BYTES} bytes, so it is no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        byte = content[error.start]
        raise RecipeError(f"{file}:{line}:{column}: byte 0x{byte:02x} is no UTF-8 text: save as UTF-8") from None


def _in_run_folder(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The recipe as the run folder of a recipe has it; None if there is none, or none that can be read."""
    folder = recipe.get("run") or f"runs/{recipe['name']}"
    try:
        written = read_yaml((home_filled(str(folder)) / RUN_RECIPE).read_text("utf-8"), "").value
    except (OSError, ValueError, YamlSyntaxError):
        return None
    return written if isinstance(written, dict) else None


def _refuse_idle_paper(document: Document) -> None:
    """A run folder's recipe says everything, so an override of `paper` would change its word and nothing else."""
    place = document.values.get(("paper",))
    if place is not None and place.source.startswith("override"):
        say = " ".join(
            f"{section}.{key}={value}" for section, settings in PAPER.items() for key, value in settings.items()
        )
        document.problems.append(Problem(place, "paper", f"a run folder's recipe leaves nothing out that `paper` could "
                                                         f"fill in; the paper's way is {say}"))  # fmt: skip


def _document(text: str, file: str) -> Document:
    """The YAML mapping that a recipe's text is."""
    try:
        document = read_yaml(text, file)
    except YamlSyntaxError as error:
        raise RecipeError(str(error.problem)) from None
    if not isinstance(document.value, dict):
        problem = "the recipe is empty" if document.value is None else "expected a mapping (name: value) at the top"
        raise RecipeError(f"{document.values[()]}: {problem}; start from one that works: btx cp demo my.yaml")
    return document


def _merged(text: str, file: str, overrides: Sequence[str], run: str | None) -> Document:
    """A recipe's text with what it extends and its overrides, as nobody has checked it yet."""
    document = _document(text, file)
    document.value.setdefault("name", Path(file).stem)
    if run is not None:
        document.value["run"] = run
    bases = [override for override in overrides if override.partition("=")[0].strip() == "extends"]
    for override in bases:
        apply_override(document, override)
    _fill_from_extended(document)
    apply_overrides(document, [override for override in overrides if override not in bases])
    return document


def _fill_from_extended(document: Document) -> None:
    """Follow `extends` from recipe to recipe: each gives what those before it leave out."""
    chain: list[str] = []
    while isinstance(extended := document.value.pop("extends", None), str):
        place = document.values[("extends",)]
        chain.append(extended)
        if len(chain) > MAX_EXTENDED:
            raise RecipeError(f"{place}: extends: more than {MAX_EXTENDED} recipes in a row: {' → '.join(chain)}")
        try:
            text, file, _ = _read(extended)
        except RecipeError as error:
            raise RecipeError(f"{place}: extends: {error}") from None
        fill_in(document, _document(text, file))
    if extended is not None:
        document.value["extends"] = extended  # no text: the schema says so


def _validate(document: Document) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, if the schema takes it, and all problems, each place's first cause only."""
    try:
        return _validated(document), document.problems
    except ValidationError as error:
        places = {problem.place for problem in document.problems}
        later = [problem for problem in schema_problems(error.errors(), document) if problem.place not in places]
        return None, document.problems + later


def _validated(document: Document) -> Recipe:
    """Strict validation: no text for numbers, no numbers for text or booleans; but `tokens: 2e6` is a whole number."""
    try:
        return Recipe.model_validate(document.value, strict=True)
    except ValidationError as error:
        whole = [
            (document.locate(detail["loc"]), int(number))
            for detail in error.errors()
            if detail["type"] == "int_type" and isinstance(number := detail["input"], float)
            and number.is_integer() and abs(number) <= LARGEST_WHOLE
        ]  # fmt: skip
        if not whole:
            raise
    for path, number in whole:
        section = document.value
        for part in path[:-1]:
            section = section[part]
        section[path[-1]] = number
    return Recipe.model_validate(document.value, strict=True)


def _renamed(text: str, name: str) -> str:
    """The recipe's text with another value of `name:`; everything else stays as it is."""
    plain_or_quoted = inline_yaml(name)
    root = compose(text, name)
    for key, value in root.value if root else ():
        if key.value == "name":
            return text[: value.start_mark.index] + plain_or_quoted + text[value.end_mark.index :]
    return text
