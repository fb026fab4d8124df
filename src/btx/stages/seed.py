"""The seed model (paper, section 2): trained from scratch, or an existing one linked into the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.choices.families import family_of, refuse_longer_sequences
from btx.errors import CheckpointError
from btx.hub_names import REPOSITORY, HubName
from btx.model_files.beside_weights import check_links
from btx.model_files.hub import check_hub_name, fetch
from btx.models.config_meaning import differences
from btx.models.configs import completed, read_config
from btx.models.from_scratch import new_model
from btx.models.loading import load_tokenizer
from btx.models.whole import check_whole
from btx.planning.budgets import check_budgets
from btx.planning.disk import check_disk
from btx.planning.kept_prediction import keep_prediction
from btx.process import Interrupts, Log
from btx.recipe.mixtures import seed_mixture
from btx.run_folder.data_stages import TOKENIZER
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.conversations import check_templates
from btx.stages.training import train_stage


def train_seed(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The seed model: trained from scratch, or an existing one linked into the run folder."""
    seed = run.recipe.seed_model
    check_budgets(run.recipe, run.prepared())  # before anything is trained
    if seed.path is not None:
        with run.making(stage, log) as facts:
            known = run.recorded("seed")
            was_here = known is not None and "files" in known["settings"]
            source = link_seed_model(seed.path, seed.revision, facts.folder / "model", was_here=was_here)
            config = read_config(facts.folder / "model")
            check_planned(seed.plan_config, config)
            family_of(config, f"seed_model.path: {seed.path}")
            check_whole(facts.folder / "model", config)
            refuse_longer_sequences(config, run.recipe.data.sequence_length, str(source / "config.json"))
            check_disk(run, config)
            check_templates(run, facts.folder / "model")
            keep_prediction(run, stage.name, log)
        return
    assert seed.config is not None  # the schema guarantees both
    assert seed.train is not None
    check_templates(run, run.folder(TOKENIZER))
    tokenizer = load_tokenizer(run.folder(TOKENIZER))
    model = new_model(
        seed.config, rng_seed=run.recipe.rng_seed, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    check_disk(run, model.config.to_dict())
    train_stage(run, stage, model, seed.train, [seed_mixture(run.recipe)], interrupts, log, start=None, like=None)


def link_seed_model(path: str, revision: str | None, target: Path, *, was_here: bool) -> Path:
    """Make `target` a link to a model folder, or to the downloaded files of a hub name; returns that folder.

    Args:
        was_here: the run has had a folder of that name as its seed model, so it is no hub name.
    """
    source = Path(path)
    if not source.exists() and (was_here or not REPOSITORY.fullmatch(path)):
        raise CheckpointError(f"seed_model.path: {path}: there is no such folder; if the model is elsewhere now, say "
                              f"where: btx run RECIPE seed_model.path=FOLDER")  # fmt: skip
    if not source.exists():
        check_hub_name(path, revision=revision)
        source = fetch(HubName(path, revision), f"seed_model.path: {path}")
    check_links(source)
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)
    return source


def check_planned(planned: Mapping[str, Any] | None, found: Mapping[str, Any]) -> None:
    """Refuse a seed model that is not what `seed_model.plan_config` says: the plan was made for another model.

    Raises:
        CheckpointError: names the keys that differ.
    """
    if not planned:
        return
    said = planned.keys() | ({"rope_parameters"} if {"rope_theta", "rope_scaling"} & planned.keys() else set())
    other = differences(completed(lambda: planned, "seed_model.plan_config", "its class"), found)
    differing = [f"{key}: {wanted} planned, {there} found" for key, (wanted, there) in other.items() if key in said]
    if differing:
        raise CheckpointError(f"seed_model.plan_config is not the model at seed_model.path: {'; '.join(differing)}")
