"""Mix (paper, section 2.2): the run's expert models become one MoE model."""

from __future__ import annotations

import time

from btx.baselines.matching import router_flops
from btx.choices.router_inits import RouterInit
from btx.data.expert_text import text_from_run
from btx.mixing.mix import mix
from btx.models.loading import read_config
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def mix_experts(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The run's expert models and its seed model become one MoE model."""
    folder, settings, started = run.begin(stage), run.recipe.mix, time.perf_counter()
    routers = RouterInit(
        settings.router_init, std=settings.router_std, scale=settings.router_scale, ridge=settings.router_ridge,
        tokens=settings.router_tokens,
    )  # fmt: skip
    mix(
        run.model("seed"), {domain: run.model(f"train/{domain}") for domain in run.recipe.train.domains},
        folder / "model", record=folder / "mix.json", generalist=settings.generalist,
        routing=run.recipe.routing, merge=run.recipe.merge_settings, router_init=routers,
        texts=text_from_run(run.path, run.recipe, tokens=routers.tokens) if routers.needs_text else None,
        split=settings.split, split_rescale=settings.split_rescale, blend=settings.blend,
        rng_seed=run.recipe.rng_seed, dtype=settings.dtype, tokenizer_from=settings.tokenizer_from,
        max_shard_size=settings.max_shard_size, log=log,
        progress=lambda written, total: interrupts.raise_if_pending("mix stopped; the same command starts it anew"),
    )  # fmt: skip
    flops = router_flops(run.recipe, read_config(run.model("seed")))
    run.finish(stage, tokens=0, flops=flops, wall_s=time.perf_counter() - started)
