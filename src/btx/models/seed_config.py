"""The seed model's config before there is a seed model: from its folder, its hub name, or the recipe's `config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx.choices.families import family_of
from btx.errors import CheckpointError, RecipeError
from btx.model_files.hub import check_hub_name
from btx.models.configs import config_defaults, read_config
from btx.models.whole import check_whole
from btx.recipe.problems import did_you_mean
from btx.recipe.schema import Recipe
from btx.system_errors import blame

# Keys of older configs that transformers still takes, though its config classes no longer have them.
_OLDER_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}


def seed_config(recipe: Recipe) -> dict[str, Any]:
    """Config of the seed model, completed with its class's defaults.

    Raises:
        RecipeError: `seed_model.config` or `plan_config` has a key that its class does not know.
        CheckpointError: no such model, one that transformers cannot build or no family mixes, tensors that are not
            those of its class.
    """
    seed = recipe.seed_model
    if seed.config is not None:
        return _config_from_scratch(seed.config, seed.tokenizer.vocab_size)
    if seed.plan_config is not None:
        return _config_from_scratch(seed.plan_config, seed.tokenizer.vocab_size, "seed_model.plan_config")
    assert seed.path is not None  # the schema guarantees it
    folder = Path(seed.path)
    if not folder.is_dir():
        check_hub_name(seed.path, revision=seed.revision)
        return read_config(seed.path, revision=seed.revision)
    config = read_config(folder)
    family_of(config, str(folder / "config.json"))
    check_whole(folder, config)
    return config


def _config_from_scratch(config: dict[str, Any], vocab_size: int, where: str = "seed_model.config") -> dict[str, Any]:
    """The config that `where` holds, as transformers completes it; a misspelt key, which it would keep, is refused."""
    from transformers import AutoConfig

    try:
        known = config_defaults(config["model_type"]).keys() | _OLDER_KEYS
        built = AutoConfig.for_model(**({"vocab_size": vocab_size} | config))
    except Exception as error:  # each config class has checks, and errors, of its own
        blame(error)
        raise CheckpointError(f"{where}: transformers cannot build this model: {error}") from error
    for key in config.keys() - known:
        hint = did_you_mean(key, known) or f"; {config['model_type']} has: {', '.join(sorted(known))}"
        raise RecipeError(f"{where}.{key}: unknown key {key!r}{hint}")
    return built.to_dict()
