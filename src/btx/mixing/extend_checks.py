"""Whether a dense model can become one more expert of a finished MoE model: refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from btx.choices.families import FAMILIES, Config, Family
from btx.errors import CheckpointError
from btx.mixing.checks import Opened, what_to_do
from btx.mixing.moe_folder import NUMBERS_OF_EXPERTS, RECORD, TOP_KS, MoeFolder
from btx.model_files.adapter_folder import is_adapter
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.provenance import model_provenance
from btx.model_files.vocabularies import vocabulary_difference
from btx.models.config_meaning import differences

# How the MoE model routes, which one more expert leaves as it is.
OF_ROUTING = {*NUMBERS_OF_EXPERTS, *TOP_KS, "norm_topk_prob"}
DENSE_LAYERS = (
    "mlp_only_layers", "decoder_sparse_step", "mlp_layer_types", "first_k_dense_replace", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval",
)  # fmt: skip
"""Config keys that make layers of a MoE class dense."""


def open_expert(model: MoeFolder, name: str, path: Path, warn: Callable[[str], None]) -> Opened:
    """Open a dense model that fits a MoE model, or an adapter of its seed model.

    Args:
        warn: called with what is odd but allowed.
    """
    problems: list[str] = []
    family_here = partial(_family, model)
    if is_adapter(path):
        seed = Opened.open("seed model", _seed_model(model, path), problems, family_here)
        opened = Opened.adapted(f"expert {name}", path, seed, problems, warn)
    else:
        opened = Opened.open(f"expert {name}", path, problems, family_here)
    if opened is not None:
        problems += _config_problems(model, opened)
    if opened is not None and opened.whole:
        problems += _dense_layers(model) or _tensor_problems(model, opened.family, opened.tensors)
        difference = vocabulary_difference(path, model.path)
        if difference is not None and not difference.startswith("no tokenizer"):
            problems.append(difference)
    if problems:
        raise CheckpointError(
            f"expert {name} does not fit {model.path}:\n  " + "\n  ".join(problems)
            + "\nIt has to be branched from the same seed model and keep its shape and tokenizer. Nothing was written."
        )  # fmt: skip
    assert opened is not None  # or there were problems
    return opened


def _seed_model(model: MoeFolder, adapter: Path) -> Path:
    """The folder of the seed model that the MoE model was mixed from: what an adapter is merged into."""
    record, file = model.record, model.path / RECORD
    advice = f"merge {adapter} into its base model with peft (merge_and_unload) and give the merged model"
    seed = record.get("seed_model")
    if seed is None:
        raise CheckpointError(f"{file}: does not say from which seed model this was mixed; {advice}")
    if not (Path(seed) / "config.json").is_file():
        raise CheckpointError(f"{file}: the seed model was {seed}, where none is now; put it there, or {advice}")
    mixed = record["inputs"].get("seed_model", {}).get("weights")
    if mixed is not None and mixed != model_provenance(Path(seed))["weights"]:
        raise CheckpointError(f"{seed}: holds other weights than those that {model.path} was mixed from; {advice}")
    return Path(seed)


def _family(model: MoeFolder, config: Config, where: str) -> Family:
    moe = model.config["model_type"]
    fitting = [family for family in FAMILIES if family.moe == moe and family.dense == config.get("model_type")]
    for family in fitting:
        if (reason := family.refuse(config)) is None:
            return family
        raise CheckpointError(f"{where}: {family.dense} cannot become an expert of {moe}: {reason}")
    dense = ", ".join(sorted({family.dense for family in FAMILIES if family.moe == moe}))
    raise CheckpointError(
        f"{where}: a {config.get('model_type')} model cannot become an expert of a {moe} model; these can: {dense}"
    )


def _config_problems(model: MoeFolder, expert: Opened) -> list[str]:
    """Where the MoE config that this dense model would give means something else than the one that is there."""
    try:
        differing = differences(expert.moe_config(len(model.names), model.top_k), model.completed)
    except CheckpointError as error:
        return [f"{expert.who}: {error}"]
    return [
        f"{expert.who}: {expert.folder / 'config.json'}: as an expert its {key} would be {value!r}, the MoE model has "
        f"{other!r}{what_to_do(key, model.path)}"
        for key, (value, other) in differing.items() if key not in OF_ROUTING and key not in DENSE_LAYERS
    ]  # fmt: skip


def _dense_layers(model: MoeFolder) -> list[str]:
    """Why layers without a router stand in the way, none if every layer has one."""
    dense = [str(layer) for layer in range(model.num_layers) if model.family.router.format(layer=layer) not in
             model.tensors]  # fmt: skip
    if not dense:
        return []
    keys = {key: model.completed[key] for key in DENSE_LAYERS if key in model.completed}
    said = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return [f"{model.path / 'config.json'}: {said}: layer {', '.join(dense)} of the MoE model is dense, so the new "
            f"expert's would be lost there; only models with experts in every layer can be extended"]  # fmt: skip


def _tensor_problems(model: MoeFolder, family: Family, tensors: TensorFolder) -> list[str]:
    """Shared tensors and FF tensors of another shape than the MoE model's. Both models are their classes' already."""
    problems = []
    for name in tensors.names:
        if family.feed_forward_match(name) is None and name not in model.tensors:
            problems.append(f"{tensors.where(name)}: {name}: the MoE model has no such tensor")
        elif name in model.tensors and tensors[name].shape != model.tensors[name].shape:
            problems.append(f"{tensors.where(name)}: {name} is {tensors[name].shape}, "
                            f"the MoE model's is {model.tensors[name].shape}")  # fmt: skip
    problems += [f"{tensors.file}: lacks {name}, which the MoE model has" for name in model.shared_names
                 if name not in tensors]  # fmt: skip
    for layer in range(model.num_layers):
        for pattern, roles in family.experts.items():
            names = [family.feed_forward[role].format(layer=layer) for role in roles]
            if missing := [name for name in names if name not in tensors]:
                problems.append(f"{tensors.folder}: lacks {', '.join(missing)}")
                continue
            there = model.tensors[pattern.format(layer=layer, expert=0)].shape[-2:]
            shape = (sum(tensors[name].shape[0] for name in names), tensors[names[0]].shape[1])
            if shape != there:
                problems.append(f"{tensors.where(names[0])}: {' and '.join(names)} make an expert of {shape}, "
                                f"the MoE model's are {tuple(there)}")  # fmt: skip
    return problems[:10]
