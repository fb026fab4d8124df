"""Whether a dense model can become one more expert of a finished MoE model: refused before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from btx.choices.families import FAMILIES, Config, Family
from btx.errors import CheckpointError
from btx.mixing.checks import HARMLESS_KEYS
from btx.mixing.inputs import open_tensors
from btx.mixing.moe_folder import MoeFolder, count_key
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.lazy_tensors import FileTensor
from btx.model_files.vocabularies import vocabulary_difference
from btx.models.loading import read_config


@dataclass(frozen=True)
class DenseExpert:
    """The new expert, opened."""

    family: Family
    tensors: TensorFolder

    def feed_forward(self, role: str, layer: int) -> FileTensor:
        """An FF tensor of a layer."""
        return self.tensors[self.family.feed_forward[role].format(layer=layer)]


def open_expert(model: MoeFolder, name: str, path: Path) -> DenseExpert:
    """Open a dense model that fits a MoE model.

    Raises:
        CheckpointError: it does not; all problems in one message.
    """
    config = read_config(path)
    family = _family(model, config, path)
    tensors = open_tensors(path, family, config)
    problems = _config_problems(model, family, config, path) + _tensor_problems(model, family, tensors)
    difference = vocabulary_difference(path, model.path)
    if difference is not None and not difference.startswith("no tokenizer"):
        problems.append(difference)
    if problems:
        raise CheckpointError(
            f"expert {name} does not fit {model.path}:\n  " + "\n  ".join(problems)
            + "\nIt has to be branched from the same seed model and keep its shape and tokenizer."
        )  # fmt: skip
    return DenseExpert(family, tensors)


def _family(model: MoeFolder, config: Config, path: Path) -> Family:
    moe = model.config["model_type"]
    fitting = [family for family in FAMILIES if family.moe == moe and family.dense == config.get("model_type")]
    for family in fitting:
        if (reason := family.refuse(config)) is None:
            return family
        raise CheckpointError(f"{path}: {family.dense} cannot become an expert of {moe}: {reason}")
    dense = ", ".join(sorted({family.dense for family in FAMILIES if family.moe == moe}))
    raise CheckpointError(
        f"{path}: a {config.get('model_type')} model cannot become an expert of a {moe} model; these can: {dense}"
    )


def _config_problems(model: MoeFolder, family: Family, config: Config, path: Path) -> list[str]:
    """Where the MoE config that this dense model would give differs from the one that is there."""
    there = read_config(model.path) | model.config  # as written; the class's defaults where it is silent
    wanted = family.moe_config(config, len(model.names), model.top_k)
    ignored = HARMLESS_KEYS | {count_key(model.config, model.path), "rope_theta", "rope_scaling", "router_jitter_noise"}
    return [
        f"{path / 'config.json'}: as an expert its {key} would be {value!r}, the MoE model has {there[key]!r}"
        for key, value in wanted.items()
        if key in there and key not in ignored and not key.startswith(("output_router", "router_aux"))
        and there[key] != value
    ]  # fmt: skip


def _tensor_problems(model: MoeFolder, family: Family, tensors: TensorFolder) -> list[str]:
    """Shared tensors and FF tensors that are missing or of another shape."""
    found = []
    for name in tensors.names:
        if family.feed_forward_match(name) is None and name not in model.tensors:
            found.append(f"{tensors.where(name)}: {name}: the MoE model has no such tensor")
        elif name in model.tensors and tensors[name].shape != model.tensors[name].shape:
            found.append(f"{tensors.where(name)}: {name} is {tensors[name].shape}, "
                         f"the MoE model's is {model.tensors[name].shape}")  # fmt: skip
    for layer in range(model.num_layers):
        for pattern, roles in family.experts.items():
            names = [family.feed_forward[role].format(layer=layer) for role in roles]
            if missing := [name for name in names if name not in tensors]:
                found.append(f"{tensors.folder}: lacks {', '.join(missing)}")
                continue
            there = model.tensors[pattern.format(layer=layer, expert=0)].shape[-2:]
            shape = (sum(tensors[name].shape[0] for name in names), tensors[names[0]].shape[1])
            if shape != there:
                found.append(f"{tensors.where(names[0])}: {' and '.join(names)} make an expert of {shape}, "
                             f"the MoE model's are {tuple(there)}")  # fmt: skip
    return found[:10]
