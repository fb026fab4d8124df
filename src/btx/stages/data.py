"""Data: the seed model's tokenizer, then every domain's documents as token files, one stage each.

A domain's stage reads its own files and what the other domains hold out, and writes `data/<domain>/` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from btx.data.prepare import Elsewhere, held_out_digests, prepare_domain, training_digests, training_texts
from btx.data.tokenizer import TokenizerFile, as_loaded_beside, save_tokenizer, tokenizer_sha256, train_tokenizer
from btx.errors import CheckpointError
from btx.planning.budgets import check_budgets
from btx.process import Interrupts, Log
from btx.recipe.schema import Recipe
from btx.run_folder.data_stages import TOKENIZER
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_data(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The tokenizer, or one domain's token files."""
    if stage.name == TOKENIZER:
        _write_tokenizer(run, stage, log)
    else:
        _write_domain(run, stage, log)


def _write_tokenizer(run: RunFolder, stage: Stage, log: Log) -> None:
    """The seed model's tokenizer, so that the data folder says all there is to say of its tokens; or a new one."""
    from btx.models.loading import load_tokenizer  # transformers, which the domains' stages do without

    recipe, seed = run.recipe, run.recipe.seed_model
    if seed.path is not None:
        tokenizer = load_tokenizer(seed.path, revision=seed.revision)
    else:
        log(f"tokenizer: training {seed.tokenizer.vocab_size:,} entries")
        tokenizer = new_tokenizer(recipe)
    with run.making(stage, log) as facts:
        save_tokenizer(tokenizer, facts.folder)
        facts |= {"entries": len(tokenizer), "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        written = TokenizerFile.open(facts.folder, bos=facts["bos"], eos=facts["eos"])
        for again in (written, load_tokenizer(facts.folder)):
            if tokenizer_sha256(again) != tokenizer_sha256(tokenizer):
                raise CheckpointError(f"{seed.path}: this tokenizer is another one once it is saved and loaded again; "
                                      f"btx needs one that transformers' save_pretrained keeps")  # fmt: skip


def new_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a seed model from scratch, trained on the text that the model will be trained on."""
    assert recipe.seed_model.config is not None
    tokenizer = train_tokenizer(training_texts(recipe), recipe.seed_model.tokenizer.vocab_size)
    return as_loaded_beside(tokenizer, recipe.seed_model.config["model_type"])


def _write_domain(run: RunFolder, stage: Stage, log: Log) -> None:
    run.check_needs(stage)
    recipe, domain, data = run.recipe, stage.name.removeprefix("data/"), run.folder("data")
    ids = run.done(TOKENIZER) or {}
    tokenizer = TokenizerFile.open(run.folder(TOKENIZER), bos=ids["bos"], eos=ids["eos"])
    others = [other for other in recipe.data.domains if other != domain]
    before = [other for other in others if run.graph[f"data/{other}"].inputs in stage.settings["trained_on_before"]]
    elsewhere = Elsewhere(
        {other: held_out_digests(recipe, other, data) for other in others},
        {other: training_digests(recipe, other, data) for other in before},
    )
    with run.making(stage, log) as facts:
        facts |= prepare_domain(recipe, domain, tokenizer, data, elsewhere=elsewhere, log=log)
        check_budgets(recipe, data, [domain], baselines=False)  # the seed model's stage does
