"""The baselines: the same training path as the BTX run, from other start weights or with other settings.

A baseline's stage knows from the graph what it starts from (its last need), and from `btx.baselines.matching` on what
and for how long it trains. Nothing else of it is its own.
"""

from __future__ import annotations

from btx.baselines.btm import write_btm_folder
from btx.baselines.matching import matched_phases
from btx.baselines.settings import matched_by, routing_of
from btx.choices.baselines import BASELINES, BTM, DOMAINS, UPCYCLED
from btx.data.expert_text import text_from_run
from btx.mixing.mix import mix, soup
from btx.mixing.settings import upcycling_settings
from btx.models.configs import read_config
from btx.models.device import measuring_place
from btx.models.trainable import set_trainable
from btx.process import Interrupts, Log
from btx.run_folder.finished_models import expert_models
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.training import start_model, train_moe, train_stage


def make_baseline(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Do a stage below baselines/."""
    name = stage.name.removeprefix("baselines/")
    if name in BTM:
        write_btm(run, stage, log)
    elif name == "soup":
        _soup(run, stage, log)
    elif name == UPCYCLED:
        _upcycle(run, stage, interrupts, log)
    else:
        _train(run, stage, name.removesuffix(DOMAINS), interrupts, log)


def copies_of_the_seed(run: RunFolder) -> list[str]:
    """Names of an upcycled model's experts, in order: as many as the run's mix has, none with a domain."""
    split = run.recipe.mix.split
    names = [f"copy{number}" for number in range(len(run.recipe.member_names))]
    return names if split == 1 else [f"{name}/{part}" for name in names for part in range(split)]


def _soup(run: RunFolder, stage: Stage, log: Log) -> None:
    with run.making(stage, log) as facts:
        soup(run.model("seed"), expert_models(run), facts.folder / "model", generalist=run.recipe.mix.generalist)


def _upcycle(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Sparse upcycling's start (arXiv 2212.05055): every expert is the seed model's FF sublayer, routers are random."""
    recipe, seed = run.recipe, run.model("seed")
    with run.making(stage, log) as facts:
        mix(
            seed, {f"copy{number}": seed for number in range(len(recipe.member_names))}, facts.folder / "model",
            upcycling_settings(recipe), record=facts.folder / "mix.json",
            progress=lambda written, total: interrupts.raise_if_pending("stopped; the same command starts it anew"),
        )  # fmt: skip
    log(f"{stage.name}: {len(copies_of_the_seed(run))} experts, all of them the seed model's FF sublayers")


def _train(run: RunFolder, stage: Stage, name: str, interrupts: Interrupts, log: Log) -> None:
    """One phase of a trained baseline."""
    recipe, kind, start = run.recipe, BASELINES[name], run.model(stage.needs[-1].name)
    phases = matched_phases(recipe, name, read_config(run.model("seed")))
    phase = next(phase for phase in phases if phase.stage == stage.name)
    log(f"{stage.name}: {phase.settings.tokens:,} tokens, matched by {matched_by(recipe, name)}")
    if not kind.has_routers:
        model = start_model(start)
        set_trainable(model, "all")
        train_stage(run, stage, model, phase.settings, phase.mixtures, interrupts, log, start=start,
                    like=run.model("seed"))  # fmt: skip
        return
    train_moe(
        run, stage, start, phase.settings, phase.mixtures, interrupts, log, routing=routing_of(recipe, name),
        experts=recipe.expert_names if kind.start == "mix" else copies_of_the_seed(run),
    )  # fmt: skip


TEXT_TOKENS = 500_000
"""Tokens of each member's training text that are looked at, at most."""


def write_btm(run: RunFolder, stage: Stage, log: Log) -> None:
    """The stage `baselines/btm_top<K>`, from its beginning to done.json: a folder that names the run's experts.

    Members are the experts of the mix, the untouched seed model among them if `mix.generalist`. Nothing is trained.

    Raises:
        UserError: K is above the number of members.
    """
    recipe, top_k = run.recipe, BTM[stage.name.removeprefix("baselines/")]
    models = expert_models(run)
    if recipe.mix.generalist:
        models["generalist"] = run.model("seed")
    texts = text_from_run(run.path, recipe, tokens=min(TEXT_TOKENS, recipe.train.tokens), known_as=run.graph.known_as)
    with run.making(stage, log) as facts:
        temperature = write_btm_folder(
            facts.folder / "model", models, texts, top_k=top_k, place=measuring_place(recipe, log)
        )
    log(f"{stage.name}: {len(models)} models side by side, the {top_k} most like the context answer (T = "
        f"{temperature:.3g})")  # fmt: skip
