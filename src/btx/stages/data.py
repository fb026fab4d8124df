"""Data: the seed model's tokenizer, then every domain's documents as token files, one stage each.

A domain's stage reads its own files and what the other domains hold out, and writes `data/<domain>/` only.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np

from btx.data.identity import held_out_identity
from btx.data.prepare import (
    Elsewhere,
    digests_of_files,
    held_out_digests,
    prepare_domain,
    training_digests,
    training_texts,
)
from btx.data.tokenizer import TokenizerFile, as_loaded_beside, save_tokenizer, tokenizer_sha256, train_tokenizer
from btx.errors import CheckpointError, RunFolderError
from btx.files import read_json, write_bytes
from btx.outputs import DONE, TokenizerDone
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
    recipe, domain = run.recipe, stage.name.removeprefix("data/")
    ids = read_json(run.folder(TOKENIZER) / DONE, TokenizerDone)
    tokenizer = TokenizerFile.open(run.folder(TOKENIZER), bos=ids["bos"], eos=ids["eos"])
    elsewhere = _elsewhere(run, domain, stage)
    with run.making(stage, log) as facts:
        facts |= prepare_domain(recipe, domain, tokenizer, facts.folder, elsewhere=elsewhere, log=log)
        made = {domain: facts.folder}  # the seed model's stage looks at what the baselines need
        check_budgets(recipe, made, baselines=False)


def _elsewhere(run: RunFolder, domain: str, stage: Stage) -> Elsewhere:
    """What the other domains hold out, and what those are trained on that were finished before this one was known.

    From the token files of domains that are prepared, else from their documents: never from files that are stale.
    """
    recipe = run.recipe
    others = {other: run.graph[f"data/{other}"] for other in recipe.data.domains if other != domain}
    there = {other for other, needed in others.items() if run.state(needed) == "done"}
    names, first = list(others), list(recipe.data.domains).index(domain)
    folders = {}
    for other in [*names[first:], *names[:first]]:  # each stage starts elsewhere: what one has read, others need not
        files = run.folder(f"data/{other}")
        folders[other] = digests_of_files(files, "val") if other in there else _held_out(run, other, others[other])
    held_out = {other: folders[other] for other in others}
    trained_on = {}
    for other, needed in others.items():
        if needed.inputs not in stage.settings["trained_on_before"]:
            continue
        apart = {name: digests for name, digests in held_out.items()
                 if name != other and held_out_identity(others[name].settings["sources"])
                 in needed.settings["apart_from"]}  # fmt: skip
        trained_on[other] = (digests_of_files(run.folder(needed.name), "train") if other in there
                             else training_digests(recipe, other, apart))  # fmt: skip
    return Elsewhere(held_out, trained_on)


def _held_out(run: RunFolder, domain: str, stage: Stage) -> np.ndarray:
    """Digests of what a domain that is not prepared holds out. They are kept under what decides them, so that a run
    with many domains reads each of them once for this, and not once for every other."""
    kept = run.path / "data" / ".held_out" / f"{held_out_identity(stage.settings['sources'])}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.asarray(np.load(kept, allow_pickle=False))
    digests = held_out_digests(run.recipe, domain)
    with contextlib.suppress(OSError, RunFolderError), io.BytesIO() as file:  # it only saves time
        np.save(file, digests)
        write_bytes(kept, file.getvalue())
    return digests
