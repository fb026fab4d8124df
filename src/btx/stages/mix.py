"""Mix (paper, section 2.2): the run's expert models become one MoE model."""

from __future__ import annotations

import time

from btx.baselines.matching import router_flops
from btx.data.expert_text import text_from_run
from btx.mixing.mix import mix
from btx.mixing.settings import mix_settings
from btx.models.loading import read_config
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def mix_experts(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The run's expert models and its seed model become one MoE model."""
    folder, settings, started = run.begin(stage), mix_settings(run.recipe), time.perf_counter()
    init = settings.start
    mix(
        run.model("seed"), {domain: run.model(f"train/{domain}") for domain in run.recipe.train.domains},
        folder / "model", settings, record=folder / "mix.json", log=log,
        texts=text_from_run(run.path, run.recipe, tokens=init.tokens) if init.needs_text else None,
        progress=lambda written, total: interrupts.raise_if_pending("mix stopped; the same command starts it anew"),
    )  # fmt: skip
    flops = router_flops(run.recipe, read_config(run.model("seed")))
    run.finish(stage, tokens=0, flops=flops, wall_s=time.perf_counter() - started)
