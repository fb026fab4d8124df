"""Align: what comes after Branch-Train-MiX. SFT on conversations, then DPO on preferences, of the one finetuned model.

Both go through the one training loop, with other samples than token files: SFT learns the answers of conversations, DPO
has a loss on pairs of answers. The load-balancing loss of the paper stays on, layer by layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from btx.choices.trainable import without_peft
from btx.data.chat_text import Encoded, encode, with_template
from btx.data.conversations import Preference, data_files, read_rows
from btx.data.packed_conversations import PackedConversations, PackedPairs, fitted
from btx.data.token_files import DocumentEncoder
from btx.errors import UserError
from btx.models.loading import load_tokenizer
from btx.process import Interrupts, Log
from btx.recipe.align import Alignment, Dpo
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.stages_of_recipe import aligned_from
from btx.stages.training import Given, train_moe
from btx.training.job import TrainingJob
from btx.training.preferences import FILE, preference_objective, with_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def align(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """SFT or DPO of the run's model."""
    recipe, name = run.recipe, stage.name.removeprefix("align/")
    section, start = recipe.alignments[name], run.model(aligned_from(recipe, name))
    if section.trainable == "lora" and find_spec("peft") is None:
        raise UserError(without_peft(f"align.{name}"))
    tokenizer = load_tokenizer(start)
    is_given = with_template(tokenizer)
    samples = packed(run, name, section, tokenizer, log)
    settings = section.training(recipe.finetune, len(samples.rows), samples.sequence_length)
    ready = partial(_with_preferences, section, run.folder(stage.name)) if isinstance(section, Dpo) else _as_it_is
    train_moe(
        run, stage, start, settings, [], interrupts, log, routing=recipe.routing, experts=recipe.expert_names,
        lora=section.lora if section.trainable == "lora" else None,
        given=Given(samples, ready, str(tokenizer.chat_template) if is_given else None, ends_of_turns(samples, tokenizer)),
    )  # fmt: skip


TRIED = 100
"""Conversations of each section whose template is tried before anything is trained."""


def check_templates(run: RunFolder, folder: Path) -> None:
    """Try the chat template in a folder on the first conversations that the run will be aligned with.

    Raises:
        DataError: as `packed`, but for what is too long.
    """
    if not run.graph.aligned:
        return
    tokenizer = load_tokenizer(folder)
    with_template(tokenizer)
    for stage in run.graph.aligned:
        name = stage.name.removeprefix("align/")
        section = run.recipe.alignments[name]
        if run.state(stage) != "done":
            files = data_files(section, run.recipe.data.root, name)
            for _ in itertools.islice(_encoded(section, files, tokenizer), TRIED):
                pass


def packed(
    run: RunFolder, name: str, section: Alignment, tokenizer: PreTrainedTokenizerBase, log: Log
) -> PackedConversations:
    """The training sequences of a section; says what they hold.

    Raises:
        DataError: a line is broken, too long, or nothing the chat template takes.
    """
    recipe = run.recipe
    length, pairs = recipe.data.sequence_length, section.PAIRS
    files = data_files(section, recipe.data.root, name)
    fit = fitted(_encoded(section, files, tokenizer), length, section.too_long, where=f"align.{name}")
    kind = PackedPairs if pairs else PackedConversations
    samples = kind(fit.groups, length, recipe.rng_seed)
    learnt = sum(int(each.is_answer_N.sum()) for group in fit.groups for each in group)
    log(f"{fit.told('pairs' if pairs else 'conversations')}, {learnt:,} tokens of answers, in {len(samples.rows):,} "
        f"sequences of {length:,}, {samples.filled:.0%} full")  # fmt: skip
    return samples


def _encoded(
    section: Alignment, files: list[Path], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Encoded, ...]]:  # fmt: skip
    separator = DocumentEncoder(tokenizer).separator
    for row in read_rows(files, pairs=section.PAIRS):
        answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row,)
        yield tuple(encode(tokenizer, answer, separator) for answer in answers)


def ends_of_turns(samples: PackedConversations, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the template has for the end of an answer: added ones that answers end with."""
    last = {int(each.ids_N[-1]) for group in samples.groups for each in group}
    return last & tokenizer.added_tokens_decoder.keys()


def _as_it_is(job: TrainingJob) -> TrainingJob:
    return job


def _with_preferences(section: Dpo, folder: Path, job: TrainingJob) -> TrainingJob:
    """The job with the reference's word on its pairs, and DPO's loss."""
    pairs, settings = job.mixture, job.settings
    assert isinstance(pairs, PackedPairs)
    rows = settings.micro_batch(pairs.sequence_length) // pairs.sequence_length
    known = with_reference(
        pairs, job.model, folder / FILE, rows_at_once=rows, device=job.device, in_bfloat16=job.in_bfloat16
    )  # fmt: skip
    return replace(job, mixture=known, objective=preference_objective(section.beta))
