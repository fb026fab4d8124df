"""Mix (paper, section 3.2): the run's expert models become one MoE model."""

from __future__ import annotations

from btx.baselines.matching import router_flops
from btx.data.expert_text import text_from_run
from btx.errors import CheckpointError
from btx.evaluation.oracle_gap import oracle_gap
from btx.files import write_json
from btx.mixing.mix import mix
from btx.mixing.settings import mix_settings
from btx.model_files.provenance import weights_fingerprint
from btx.models.configs import read_config
from btx.process import Interrupts, Log
from btx.run_folder.finished_models import expert_models
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def mix_experts(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The run's expert models and its seed model become one MoE model."""
    _check_common_start(run)
    settings = mix_settings(run.recipe)
    init = settings.start
    with run.making(stage, log) as facts:
        texts = None
        if init.needs_text:
            texts = text_from_run(run.path, run.recipe, tokens=init.tokens, known_as=run.graph.known_as)
        mix(
            run.model("seed"), expert_models(run), facts.folder / "model", settings,
            record=facts.folder / "mix.json", texts=texts, device=run.recipe.device,
            weights_per_device=run.recipe.launch.weights_per_device,
            log=lambda line: log(line.replace(str(facts.folder), str(run.folder(stage.name)))),
            progress=lambda written, total: interrupts.raise_if_pending("mix stopped; the same command starts it anew"),
        )  # fmt: skip
        if run.prepared().keys() == run.recipe.data.domains.keys():  # a machine that only mixes may not have them
            experts = {f"expert/{domain}": model for domain, model in expert_models(run).items()}
            models = {"seed": run.model("seed"), **experts, "mix": facts.folder / "model"}
            # The text is no input of the mix: which it was is noted, so that nobody takes it for another's.
            text = {domain: run.graph[f"data/{domain}"].inputs for domain in run.recipe.data.domains}
            gap = oracle_gap(run.path, run.recipe, models, log)
            write_json(facts.folder / "oracle.json", gap | {"text": text})
        facts["flops"] = router_flops(run.recipe, read_config(run.model("seed")))


def _check_common_start(run: RunFolder) -> None:
    """Refuse branches that were trained from another seed model than the one that lies here, elsewhere perhaps.

    Raises:
        CheckpointError: names them.
    """
    seed = weights_fingerprint(run.model("seed"))
    others = [domain for domain in run.recipe.train.domains
              if (run.done(f"train/{domain}") or {}).get("started_from", seed) != seed]  # fmt: skip
    if others:
        raise CheckpointError(
            f"{run.path}: {', '.join(others)} started from another seed model than {run.model('seed')}: their weights "
            f"differ. Copy the seed/ they started from here, or remove their folders in train/ and train them again"
        )
