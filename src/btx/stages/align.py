"""Align: what comes after Branch-Train-MiX. SFT on conversations, then DPO on preferences, of the one finetuned model.

Both go through the one training loop, with other samples than token files: SFT learns the answers of conversations, DPO
has a loss on pairs of answers. The load-balancing loss of the paper stays on, layer by layer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from btx.choices.trainable import ONE_PROCESS, without_peft
from btx.data.chat_text import with_template
from btx.data.packed_conversations import PackedPairs
from btx.errors import UserError
from btx.models.loading import load_tokenizer
from btx.process import Interrupts, Log, world_size
from btx.recipe.align import Dpo
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.stages_of_recipe import aligned_from
from btx.stages.conversations import ends_of_turns, packed
from btx.stages.training import AlignmentSamples, refuse_in_all_processes, train_moe
from btx.training.job import TrainingJob
from btx.training.preferences import FILE, preference_objective, with_reference


def align(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """SFT or DPO of the run's model."""
    recipe, name = run.recipe, stage.name.removeprefix("align/")
    section, start = recipe.alignments[name], run.model(aligned_from(recipe, name))
    if section.trainable == "lora" and world_size() > 1:  # under a torchrun of the user's: a recipe cannot say so
        refuse_in_all_processes(
            f"align.{name}.trainable: {ONE_PROCESS}, and here are {world_size()}; start it without torchrun"
        )
    if section.trainable == "lora" and find_spec("peft") is None:
        raise UserError(without_peft(f"align.{name}"))
    tokenizer = load_tokenizer(start)
    gets_plain_template = with_template(tokenizer)
    samples = packed(run, name, section, tokenizer, log)
    settings = section.training(recipe.finetune, len(samples.rows), samples.sequence_length)
    ready = partial(_with_preferences, section, run.folder(stage.name)) if isinstance(section, Dpo) else None
    template = str(tokenizer.chat_template) if gets_plain_template else None
    train_moe(
        run, stage, start, settings, [], interrupts, log, routing=recipe.routing, experts=recipe.expert_names,
        lora=section.lora if section.trainable == "lora" else None,
        alignment=AlignmentSamples(samples, ready, template, ends_of_turns(samples, tokenizer)),
    )  # fmt: skip


def _with_preferences(section: Dpo, folder: Path, job: TrainingJob) -> TrainingJob:
    """The job with the reference's word on its pairs, and DPO's loss."""
    pairs, settings = job.mixture, job.settings
    assert isinstance(pairs, PackedPairs)
    rows = settings.micro_batch(pairs.sequence_length) // pairs.sequence_length
    known = with_reference(
        pairs, job.model, folder / FILE, rows_at_once=rows, device=job.device, in_bfloat16=job.in_bfloat16
    )  # fmt: skip
    return replace(job, mixture=known, objective=preference_objective(section.beta))
