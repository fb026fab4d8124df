"""Train (paper, section 3.1): the seed model from scratch, and each branch on its own domain.

A branch reads the recipe, the token files and the seed folder, and writes only its own folder: it can be started by
hand on any machine that sees the run folder, in any order, and fails alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from btx.choices.routers import RoutingRule
from btx.data.samples import Samples, open_mixtures, unused_tokens
from btx.errors import OutOfMemory, UserError
from btx.files import atomic_folder, write_text
from btx.model_files.beside_weights import CHAT_TEMPLATE, add_ends
from btx.model_files.btx_folder import change_router
from btx.model_files.provenance import weights_fingerprint
from btx.models.adapters import add_moe_adapters, merge_adapters
from btx.models.cost import model_cost
from btx.models.device import choose_device, in_bfloat16
from btx.models.loading import checkpoint_activations, load_model, load_tokenizer, save_model
from btx.models.peak_flops import mfu_fact, peak_tokens_per_s
from btx.models.sharded_loading import load_skeleton, share_out
from btx.models.sharding import largest, process_count, process_number, same_everywhere
from btx.models.trainable import set_trainable
from btx.moe.balancing import Balancing
from btx.moe.layer import experts_run_in_training, moe_blocks, set_router, use_selection_bias
from btx.planning.kept_prediction import keep_prediction
from btx.process import Interrupts, Log, processes_here, rank
from btx.recipe.training import Finetune, Lora, Training
from btx.run_folder.data_stages import TOKENIZER
from btx.run_folder.folder import Making, RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.threads import jobs_at_once, shares_processors
from btx.system_errors import is_out_of_memory
from btx.training.job import TrainingJob
from btx.training.loop import Totals, run_training
from btx.training.memory import MemoryNeeds, may_freeze
from btx.training.micro_batch import AutoMicroBatch, noted_micro_batch
from btx.training.parallel import has_dropout, why_not_shared
from btx.training.peak_memory import peak_memory_bytes, reset_peak_memory
from btx.training.schedule import steps_before_decay
from btx.training.state import StateFolder
from btx.training.trackers.follow import FOLDER, followed
from btx.training.trackers.tracker import Tracked
from btx.training.working_weights import give_back_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_moe(
    run: RunFolder, stage: Stage, start: Path, settings: Finetune, mixtures: Sequence[Mapping[str, float]],
    interrupts: Interrupts, log: Log, *, routing: RoutingRule, experts: Sequence[str], lora: Lora | None = None,
    alignment: AlignmentSamples | None = None,
) -> None:  # fmt: skip
    """Train a MoE folder with the losses on its routers: the finetuning, every baseline that has routers, SFT and DPO.

    Args: as for `train_stage`, and
        start: the MoE folder.
        routing: how the model routes, in training and as it is saved; may be another router than the start's.
        lora: train adapters of this size instead of what the settings say.
    """
    model = start_model(start)
    if not moe_blocks(model):
        log(f"warning: {type(model).__name__} has routers of its own kind: no load balancing, no routing metrics")
    set_router(model, routing)
    for block in moe_blocks(model):
        block.dense_router_gradient = settings.dense_router_gradient
    if settings.load_balancing_bias and routing.kind == "top_k":  # recipe and plan say so
        use_selection_bias(model)
    if lora is not None:
        add_moe_adapters(model, lora.rank, lora.alpha, rng_seed=run.recipe.rng_seed)
    else:
        set_trainable(model, settings.trainable)
    train_stage(
        run, stage, model, settings, mixtures, interrupts, log, start=start, like=start,
        balancing=Balancing.of(settings), routing=routing, experts=experts, alignment=alignment,
    )  # fmt: skip


@dataclass(frozen=True)
class AlignmentSamples:
    """Samples that are no mixture of the run's domains, and what is learnt of them."""

    samples: Samples
    ready: Callable[[TrainingJob], TrainingJob] | None
    """Completes the job when its model has its weights, before any of them moves."""
    chat_template: str | None
    """Written beside the model; None: as it was."""
    ends: Collection[int]
    """Tokens that end an answer: engines stop at them too."""


def start_model(folder: Path) -> PreTrainedModel:
    """The model that a training starts from. On several processes its weights are read when they are shared out."""
    return load_skeleton(folder) if process_count() > 1 else load_model(folder)


def train_stage(
    run: RunFolder, stage: Stage, model: PreTrainedModel, settings: Training, mixtures: Sequence[Mapping[str, float]],
    interrupts: Interrupts, log: Log, *, start: Path | None, like: Path | None, balancing: Balancing = Balancing(),
    routing: RoutingRule | None = None, experts: Sequence[str] = (), alignment: AlignmentSamples | None = None,
) -> None:  # fmt: skip
    """Run the training loop for a stage, write its model folder, then done.json.

    Args:
        mixtures: domain → sampling weight; of several mixtures samples are taken in turn.
        start: model folder that `start_model` gave the model of; None for a model from scratch.
        like: model folder whose config and tokenizer the result keeps; None for a model from scratch.
        balancing: losses on the routers of a MoE model.
        routing: the router of a MoE model, written beside its weights; None: as in `like`.
        experts: names of a MoE model's experts, for warnings.
        alignment: samples instead of those of the mixtures; None: those.
    """
    folder, dropout = run.folder(stage.name), has_dropout(model.config.to_dict())
    if problem := why_not_shared(settings, run.recipe.data.sequence_length, process_count(), router=routing,
                                 has_dropout=dropout):  # fmt: skip
        refuse_in_all_processes(problem)
    switching = settings.switching if isinstance(settings, Finetune) else 0.0
    samples = alignment.samples if alignment is not None else open_mixtures(
        run.path / "data", run.recipe, mixtures, known_as=run.graph.known_as, switching=switching
    )  # fmt: skip
    job, needs = _job_of(run, stage, model, settings, samples, balancing, experts, log)
    if process_count() > 1:
        share_out(model, start, job.device, in_bfloat16=job.in_bfloat16)
    tokenizer = load_tokenizer(like or run.folder(TOKENIZER))
    with _making(run, stage, log) as facts:
        unused = _say_what_trains(run, model, mixtures, log)
        if rank() == 0:
            keep_prediction(run, stage.name, log)
        if alignment is not None and alignment.ready is not None:
            job = alignment.ready(job)
        try:
            totals = run_training(job, interrupts, log)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                needs = needs.settled(noted_micro_batch(folder, stage.inputs))
                raise OutOfMemory(needs.advice(error)) from error
            raise
        if like is not None:
            give_back_frozen(model, like)
        merge_adapters(model)
        _write_model(model, folder / "model", like, tokenizer, routing, alignment)
        job.checkpoints.keep_only_last()
        facts |= _facts(model, job, totals) | {"unused_tokens": unused}
        facts |= {"started_from": weights_fingerprint(like)} if like is not None else {}


def _write_model(
    model: PreTrainedModel, target: Path, like: Path | None, tokenizer: PreTrainedTokenizerBase,
    routing: RoutingRule | None, alignment: AlignmentSamples | None,
) -> None:  # fmt: skip
    """The trained model's folder, by the first of several processes. Arguments as `train_stage` has them."""
    leads = process_number() == 0
    with atomic_folder(target) if leads else contextlib.nullcontext(target) as folder:
        save_model(model, folder, like=like, tokenizer=tokenizer)
        if routing is not None and leads:
            change_router(folder, routing)
        if alignment is not None and leads:
            add_ends(folder, alignment.ends)
            if alignment.chat_template is not None:
                write_text(folder / CHAT_TEMPLATE, alignment.chat_template)


def _facts(model: PreTrainedModel, job: TrainingJob, totals: Totals) -> dict[str, Any]:
    """What done.json says of a training."""
    cost = model_cost(model)
    return {
        "tokens": totals.tokens, "flops": totals.flops, "wall_s": round(totals.wall_s, 3), "steps": totals.steps,
        "loss": totals.loss, "total_params": cost.total_params, "active_params": cost.active_params,
        "processes": process_count(), "machines": max(1, process_count() // processes_here()),
        "threads": torch.get_num_threads(), "device": str(job.device),
        "data": job.mixture.fingerprint, "precision": "bfloat16" if job.in_bfloat16 else "float32",
        "micro_batch_tokens": totals.micro_batch_tokens,
        "peak_memory_bytes": largest(peak_memory_bytes(job.device)),
        **({"compile_s": round(totals.compile_s, 3)} if totals.compile_s else {}),
        **mfu_fact(totals.tokens, totals.wall_s, job.peak_tokens_per_s),
    }  # fmt: skip


@contextlib.contextmanager
def _making(run: RunFolder, stage: Stage, log: Log) -> Iterator[Making]:
    """`RunFolder.making`, by the first of several processes that train the stage's model."""
    others = contextlib.nullcontext(Making(run.folder(stage.name)))
    with run.making(stage, log) if process_number() == 0 else others as facts:
        same_everywhere(None)  # the folder is there
        yield facts


def refuse_in_all_processes(problem: str) -> NoReturn:
    """Raise UserError for what every process finds by itself: the first says it, and the others end without a word."""
    raise UserError(problem) if rank() == 0 else SystemExit(UserError.exit_code)


def _job_of(
    run: RunFolder, stage: Stage, model: PreTrainedModel, settings: Training, samples: Samples, balancing: Balancing,
    experts: Sequence[str], log: Log,
) -> tuple[TrainingJob, MemoryNeeds]:  # fmt: skip
    """What the stage trains, on which samples and device, and the memory that takes."""
    folder, recipe = run.folder(stage.name), run.recipe
    length, device = recipe.data.sequence_length, choose_device(recipe.device)
    reset_peak_memory(device)
    cost = model_cost(model, experts_per_token=experts_run_in_training(model))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    needs = MemoryNeeds(settings, cost.shape, length, device.type, may_freeze=may_freeze(stage.name))
    together = jobs_at_once(run.graph) if shares_processors(run.graph, stage) else 1
    automatic = AutoMicroBatch(needs, stage.inputs, together)
    checkpoints = StateFolder(
        folder / "state", {"inputs": stage.inputs, "data": samples.fingerprint}, device=device.type, log=log,
        trunk=(stage.trunk, steps_before_decay(settings.steps(length), settings)) if stage.trunk else None,
        check_inputs=partial(run.check_needs, stage),
    )  # fmt: skip
    job = TrainingJob(
        model=model, mixture=samples, settings=settings, folder=folder, checkpoints=checkpoints,
        flops_per_token=cost.training_flops_per_token(length), rng_seed=recipe.rng_seed, device=device,
        balancing=balancing, experts=experts,
        peak_tokens_per_s=peak_tokens_per_s(
            cost, length, device, bfloat16=in_bfloat16(settings.precision, device), processes=process_count()
        ),
        settled=automatic.settled if settings.micro_batch_tokens == "auto" else None,
    )  # fmt: skip
    if recipe.track and process_number() == 0:
        tracked = Tracked(recipe.name, run.path, stage.name, folder / FOLDER, stage.shown)
        job = replace(job, followed=partial(followed, recipe.track, tracked, folder / "metrics.jsonl", experts, log))
    return job, needs


def _say_what_trains(
    run: RunFolder, model: PreTrainedModel, mixtures: Sequence[Mapping[str, float]], log: Log
) -> dict[str, int]:
    """Parameters and threads, and tokens that are in no sequence, which are returned, text by text."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log(f"{trained:,} of {total:,} parameters train, {torch.get_num_threads()} threads")
    if not mixtures:
        return {}
    unused, length = unused_tokens(run.path / "data", run.recipe, mixtures), run.recipe.data.sequence_length
    log(f"{sum(unused.values()):,} tokens at the ends of {len(unused)} texts fill no sequence of {length}")
    return unused
