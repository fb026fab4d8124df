"""Train (paper, section 2.1): the seed model from scratch, and each branch on its own domain.

A branch reads the recipe, the token files and the seed folder, and writes only its own folder: it can be started by
hand on any machine that sees the run folder, in any order, and fails alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from btx.data.mixture import Interleaved, Mixture, domain_mixture, resolve, seed_mixture
from btx.data.switching import Samples, Switching
from btx.data.token_files import TokenFile
from btx.errors import CheckpointError, UserError
from btx.model_files.folders import atomic_folder
from btx.model_files.models import (
    checkpoint_activations,
    load_model,
    load_tokenizer,
    new_model,
    read_config,
    save_model,
)
from btx.moe.balancing import Balancing
from btx.moe.btx_folder import change_router
from btx.moe.layer import experts_run_in_training, moe_blocks, set_router, use_selection_bias
from btx.moe.router_kinds import RoutingSettings
from btx.planning.cost import model_cost
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune, Training
from btx.running.graph import Stage
from btx.running.interrupts import Interrupts
from btx.running.rundir import RunFolder
from btx.training.branch import branch
from btx.training.loop import Totals, TrainingJob, run_training
from btx.training.peak_memory import peak_memory_bytes, reset_peak_memory
from btx.training.state import keep_only_last
from btx.training.trainable import set_trainable, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Log = Callable[[str], None]


def train_seed(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The seed model: trained from scratch, or an existing one linked into the run folder."""
    seed = run.recipe.seed_model
    folder = run.begin(stage)
    if seed.path is not None:
        link_seed_model(seed.path, seed.revision, folder / "model")
        check_planned(seed.plan_config, read_config(folder / "model"))
        run.finish(stage, tokens=0, flops=0.0, wall_s=0.0)
        return
    assert seed.config is not None  # the schema guarantees both
    assert seed.train is not None
    tokenizer = load_tokenizer(run.path / "data" / "tokenizer")
    model = new_model(
        seed.config, rng_seed=run.recipe.rng_seed, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    train_stage(run, stage, model, seed.train, [seed_mixture(run.recipe)], interrupts, log, like=None)


def link_seed_model(path: str, revision: str | None, target: Path) -> None:
    """Make `target` a link to a model folder, or to the downloaded files of a hub name."""
    source = Path(path)
    if not source.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        try:
            source = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise UserError(f"seed_model.path: {path!r} is no folder, and as a hub name it failed: {error}") from error
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)


def check_planned(planned: Mapping[str, Any] | None, found: Mapping[str, Any]) -> None:
    """Refuse a seed model that is not what `seed_model.plan_config` says: the plan was made for another model.

    Raises:
        CheckpointError: names the keys that differ.
    """
    differing = [f"{key}: {value} planned, {found[key]} found" for key, value in (planned or {}).items()
                 if key in found and found[key] != value]  # fmt: skip
    if differing:
        raise CheckpointError(f"seed_model.plan_config is not the model at seed_model.path: {'; '.join(differing)}")


def train_branch(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """One expert model: the seed model's copy, trained further on its domain with some general text."""
    run.begin(stage)
    domain = stage.name.removeprefix("train/")
    mixture = domain_mixture(run.recipe, domain)
    settings = run.recipe.branch_training(domain)
    train_stage(run, stage, branch(run), settings, [mixture], interrupts, log, like=run.model("seed"))


def train_moe(
    run: RunFolder,
    stage: Stage,
    start: Path,
    settings: Finetune,
    mixtures: Sequence[Mapping[str, float]],
    interrupts: Interrupts,
    log: Log,
    *,
    routing: RoutingSettings,
    experts: Sequence[str],
) -> Totals:
    """Train a MoE folder with the losses on its routers: the finetuning, and every baseline that has routers.

    Args:
        start: the MoE folder.
        mixtures: as for `train_stage`.
        routing: how the model routes, in training and as it is saved; may be another router than the start's.
        experts: names of its experts, for warnings.
    """
    model = load_model(start)
    if not moe_blocks(model):
        log(f"warning: {type(model).__name__} has routers of its own kind: no load balancing, no routing metrics")
    set_router(model, routing)
    for block in moe_blocks(model):
        block.dense_router_gradient = settings.dense_router_gradient
    if settings.load_balancing_bias and routing.kind == "top_k":  # recipe and plan say so
        use_selection_bias(model)
    set_trainable(model, settings.trainable)
    return train_stage(
        run, stage, model, settings, mixtures, interrupts, log,
        like=start, balancing=Balancing.of(settings), routing=routing, experts=experts,
    )  # fmt: skip


def train_stage(
    run: RunFolder,
    stage: Stage,
    model: PreTrainedModel,
    settings: Training,
    mixtures: Sequence[Mapping[str, float]],
    interrupts: Interrupts,
    log: Log,
    *,
    like: Path | None,
    balancing: Balancing | None = None,
    routing: RoutingSettings | None = None,
    experts: Sequence[str] = (),
) -> Totals:
    """Run the training loop for a stage, write its model folder, then done.json.

    Args:
        mixtures: domain → sampling weight; of several mixtures samples are taken in turn.
        like: model folder whose config and tokenizer the result keeps; None for a model from scratch.
        balancing: losses on the routers of a MoE model; None: none.
        routing: the router of a MoE model, written beside its weights; None: as in `like`.
        experts: names of a MoE model's experts, for warnings.
    """
    folder, recipe = run.folder(stage.name), run.recipe
    sequence_length = recipe.data.sequence_length
    device = choose_device(recipe.device)
    reset_peak_memory(device)
    cost = model_cost(model)
    in_training = model_cost(model, experts_per_token=experts_run_in_training(model))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    job = TrainingJob(
        model=model,
        mixture=open_mixtures(
            run.path / "data", recipe, mixtures,
            switching=settings.switching if isinstance(settings, Finetune) else 0.0,
        ),
        settings=settings,
        folder=folder,
        inputs=stage.inputs,
        flops_per_token=in_training.training_flops_per_token(sequence_length),
        rng_seed=recipe.rng_seed,
        device=device,
        balancing=balancing or Balancing(),
        experts=experts,
    )
    log(f"{trainable_parameters(model):,} of {cost.total_params:,} parameters train, {torch.get_num_threads()} threads")
    totals = run_training(job, interrupts, log)
    tokenizer = load_tokenizer(like or run.path / "data" / "tokenizer")
    with atomic_folder(folder / "model") as target:
        save_model(model, target, like=like, tokenizer=tokenizer)
        if routing is not None:
            change_router(target, routing)
    keep_only_last(folder / "state")
    run.finish(
        stage, tokens=totals.tokens, flops=totals.flops, wall_s=round(totals.wall_s, 3), steps=totals.steps,
        loss=totals.loss, total_params=cost.total_params, active_params=cost.active_params,
        threads=torch.get_num_threads(), data=job.mixture.fingerprint, peak_memory_bytes=peak_memory_bytes(device),
    )  # fmt: skip
    return totals


def open_mixtures(
    data: Path, recipe: Recipe, mixtures: Sequence[Mapping[str, float]], *, switching: float = 0.0
) -> Samples:
    """Training samples of one mixture of domains, or of several in turn.

    Args:
        data: the run's data folder.
        mixtures: domain → sampling weight.
        switching: share of the sequences that switch domain in the middle; for a single mixture.
    """
    opened = [
        Mixture(
            [(name, TokenFile.open(data / path / "train"), weight) for name, path, weight in resolve(recipe, weights)],
            recipe.data.sequence_length, recipe.rng_seed,
        )
        for weights in mixtures
    ]  # fmt: skip
    if len(opened) > 1:
        return Interleaved(opened)
    return Switching(opened[0], switching) if switching else opened[0]


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
