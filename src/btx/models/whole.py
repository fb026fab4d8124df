"""Whether a model folder is exactly what its config says: every tensor of the class, in its shape, and none more.

What a reader makes up for a tensor that is missing, or leaves out without a word, is another model. Everything that
opens a folder as a model asks here: mix, extend, drop, adopt, the branches of a run, evaluate and chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from btx.choices.families import FAMILIES
from btx.errors import CheckpointError, first_few
from btx.model_files.headers import COMPUTED, Headers
from btx.models.configs import config_text, quiet_transformers
from btx.system_errors import blame

Shapes = dict[str, tuple[int, ...]]
MOST_SHOWN = 5
"""Tensors named in a line; the line says how many there are."""
FAMILY_CLASSES = {name for family in FAMILIES for name in (family.dense, family.moe)}


class ClassTensors(NamedTuple):
    """What a class holds. Weights tied to others (the LM head to the embeddings) are not among its tensors."""

    published: Shapes
    """Name → shape as `save_pretrained` writes them."""
    in_memory: Shapes
    """The same, named and laid together as transformers 5 holds them; the same names in most dense classes."""
    tied: dict[str, str]
    """Tied weight → the weight it is tied to."""


def class_tensors(config: Mapping[str, Any]) -> ClassTensors:
    """The tensors that a folder with this config has to hold; nothing is allocated. Not to be changed: it is kept for
    the next folder of this config (experts are branches of one seed model)."""
    return _class_tensors(config_text(config))


@lru_cache(maxsize=32)
def _class_tensors(config_json: str) -> ClassTensors:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    quiet_transformers()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_json)))
        tied = dict(model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        published = revert_weight_conversion(model, state)
    except Exception as error:
        blame(error)
        raise CheckpointError(f"transformers cannot build this model: {error}") from error
    return ClassTensors(_shapes(published), _shapes(state), tied)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_whole(folder: Path, config: Mapping[str, Any], *, loading: bool = False) -> None:
    """Refuse a folder that is not exactly its class.

    Args:
        loading: transformers will load it, which also reads the layout that it keeps in memory.

    Raises:
        CheckpointError: a line for each kind of tensor that is missing, left over or of another shape, with its file.
    """
    problems = class_problems(folder, config, loading=loading)
    if problems:
        raise CheckpointError("\n".join(problems))


def class_problems(folder: Path, config: Mapping[str, Any], *, loading: bool = False) -> list[str]:
    """As `check_whole`, a line a problem; empty for a whole folder."""
    headers = Headers(folder)
    try:
        wanted = class_tensors(config)
    except CheckpointError as error:
        return [f"{folder / 'config.json'}: {error}"]
    shapes = {name: entry.shape for name, entry in headers.tensors.items()
              if not name.endswith(COMPUTED) and name not in wanted.tied}  # fmt: skip
    where = {name: str(entry.file) for name, entry in headers.tensors.items()}
    whose = f"the class that {folder / 'config.json'} asks for has"
    if (
        not shapes.keys() <= wanted.published.keys()
        and shapes.keys() & wanted.in_memory.keys() - wanted.published.keys()
    ):
        if not loading:
            return [_other_layout(folder, where, shapes, wanted)]
        return shape_problems(shapes, wanted.in_memory, headers.file, where, whose)
    return shape_problems(shapes, wanted.published, headers.file, where, whose)


def check_planned(planned: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Refuse to write a model whose tensors would not be those of its config's class.

    Args:
        planned: name → shape of every tensor to be written.
    """
    output, where = Path(str(config.get("model_type"))), dict.fromkeys(planned, "the model to be written")
    problems = shape_problems(planned, class_tensors(config).published, output, where, "the config's class has")
    if problems:
        raise CheckpointError(
            "what would be written is not what its config says:\n  " + "\n  ".join(problems) + "\nNothing was written."
        )


def shape_problems(
    there: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], file: Path, where: Mapping[str, str],
    whose: str,
) -> list[str]:  # fmt: skip
    """Missing tensors, extra tensors and other shapes, a line each.

    Args:
        file: the file that says which tensors there are.
        where: name → file a tensor lies in.
        whose: who has what is wanted: `the seed model has`.
    """
    lines = []
    missing, extra = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    if missing:
        lines.append(f"{file}: lacks {listed(missing)}, which {whose}")
    if extra:
        lines.append(f"{where[extra[0]]}: has {listed(extra)}, unlike what {whose}")
    lines += [
        f"{where[name]}: {name} is {there[name]}, {whose} {wanted[name]}"
        for name in sorted(there.keys() & wanted.keys()) if there[name] != wanted[name]
    ]  # fmt: skip
    shown = lines[: MOST_SHOWN + 2]
    return shown + [f"{file}: and {len(lines) - len(shown)} more like it"] * (len(lines) > len(shown))


def listed(names: Sequence[str]) -> str:
    """`3 tensors: a, b, c`, shortened."""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {first_few(names, MOST_SHOWN, ', ...')}"


def _other_layout(folder: Path, where: Mapping[str, str], there: Shapes, wanted: ClassTensors) -> str:
    other = min(there.keys() & wanted.in_memory.keys() - wanted.published.keys())
    expected = min(wanted.published.keys() - wanted.in_memory.keys())
    return (
        f"{where[other]}: has {other}, where the published layout has {expected}: this is how transformers 5 holds the "
        f"model in memory (save_original_format=False). Save it in the published layout, by way of a new model, since "
        f"one that was loaded keeps its layout:\n"
        f"    from transformers import AutoModelForCausalLM as Auto\n"
        f'    model = Auto.from_pretrained("{folder}", dtype="auto")\n'
        f"    new = Auto.from_config(model.config, dtype=model.dtype)\n"
        f"    new.load_state_dict(model.state_dict())\n"
        f'    new.save_pretrained("NEW_FOLDER")\n'
        f"and copy the tokenizer there"
    )
