"""The models of a run that are evaluated, and what each cost from the seed model on."""

from __future__ import annotations

from btx.evaluate import ModelEntry
from btx.rundir import RunFolder


def models_of_run(run: RunFolder) -> dict[str, ModelEntry]:
    """seed, expert/<domain>, soup, mix and btx. Tokens, FLOPs and hours add up all training a model needed.

    The seed model's own training is counted in `seed` only: what is compared is what came after it.
    """
    branches = [f"train/{domain}" for domain in run.recipe.train.domains]
    experts = {f"expert/{stage.removeprefix('train/')}": (stage, [stage]) for stage in branches}
    rows = {
        "seed": ("seed", ["seed"]),
        **experts,
        "soup": ("baselines/soup", branches),
        "mix": ("mix", branches),
        "btx": ("finetune", [*branches, "finetune"]),
    }
    return {name: _entry(run, stage, paid_for) for name, (stage, paid_for) in rows.items()}


def _entry(run: RunFolder, stage: str, paid_for: list[str]) -> ModelEntry:
    done = [run.done(name) or {} for name in paid_for]
    return ModelEntry(
        path=run.model(stage),
        tokens=sum(int(facts.get("tokens", 0)) for facts in done),
        flops=sum(float(facts.get("flops", 0.0)) for facts in done),
        hours=sum(float(facts.get("wall_s", 0.0)) for facts in done) / 3600,
        inputs=run.graph[stage].inputs,
    )
