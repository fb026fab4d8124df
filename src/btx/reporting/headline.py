"""What a run came to, in one sentence: btx beside the seed model, the soup, the mix and the best others.

Every difference that is told has the p of a paired bootstrap, the one `btx compare` prints. Pure functions of the
parsed `evaluate/results.json` and `evaluate/documents.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from btx.choices.baselines import BASELINES
from btx.number_texts import LONG, is_number, is_share, metric_of
from btx.reporting.paired_bootstrap import compare_documents
from btx.reporting.results import EXPERT, task_score


@dataclass(frozen=True)
class Comparison:
    """btx beside another model: relative change of the mean bits per byte (negative is better)."""

    name: str
    label: str
    mean: float
    change: float
    p: float | None
    """Of the paired bootstrap over documents; None where an earlier version kept no scores of single documents."""


@dataclass(frozen=True)
class TaskGain:
    """Score of btx on a task beside the seed model's."""

    task: str
    seed: float
    btx: float
    metric: str = "exact match"
    p: float | None = None
    """As of a comparison, over questions."""


@dataclass(frozen=True)
class Headline:
    """What the run came to, in numbers."""

    mean: float
    domains: int
    comparisons: list[Comparison] = field(default_factory=list)
    tasks: list[TaskGain] = field(default_factory=list)


def headline(results: Mapping[str, Any], documents: Mapping[str, Any] | None = None) -> Headline | None:
    """btx against the seed model, the soup, the mix, the best expert model and the best other baseline.

    None before btx is evaluated.

    Args:
        documents: scores of single documents; without them no difference has a p.
    """
    models: dict[str, Any] = results.get("models", {})
    btx = models.get("btx", {})
    if not is_number(btx.get("mean_bits_per_byte")):
        return None
    measured = {name: model for name, model in models.items() if is_number(model.get("mean_bits_per_byte"))}
    experts = [name for name in measured if name.startswith(EXPERT)]
    best_expert = sorted(experts, key=lambda name: measured[name]["mean_bits_per_byte"])[:1]
    rivals = [name for name in measured if name in BASELINES and name != "soup"]
    best_rival = sorted(rivals, key=lambda name: measured[name]["mean_bits_per_byte"])[:1]
    others = [name for name in ("seed", "soup", "mix", *best_expert, *best_rival) if name in measured]
    differences = {name: paired_differences(documents, "btx", name) for name in dict.fromkeys(["seed", *others])}
    tasks = [
        TaskGain(
            task, task_score(models.get("seed", {}), task), task_score(btx, task),
            LONG.get(metric_of(answers), metric_of(answers)), _p(differences["seed"], "tasks", task),
        )
        for task, answers in btx.get("tasks", {}).items()
    ]  # fmt: skip
    ours = btx["mean_bits_per_byte"]
    return Headline(
        ours,
        len(btx.get("domains", {})),
        [Comparison(name, _label(name), mean, (ours - mean) / mean, _p(differences[name], "mean"))
         for name in others for mean in [measured[name]["mean_bits_per_byte"]]],
        [gain for gain in tasks if is_share(gain.seed) and is_share(gain.btx)],
    )  # fmt: skip


def paired_differences(
    documents: Mapping[str, Any] | None, model: str, other: str, branches: Collection[str] = ()
) -> dict[str, Any]:
    """Differences of two models set by set, model minus other (`compare_documents`); empty where documents.json lacks
    one of them."""
    scores = (documents or {}).get("models", {})
    if model not in scores or other not in scores:
        return {}
    return compare_documents(scores[model], scores[other], (documents or {})["bytes"], branches=branches)


def _p(differences: Mapping[str, Any], *keys: str) -> float | None:
    value: Any = differences
    for key in keys:
        value = value.get(key, {})
    p: float | None = value.get("p")
    return p


def _label(name: str) -> str:
    kind = "baseline" if name in BASELINES else "expert model"
    best = f"the best {kind} ({name.removeprefix(EXPERT)})"
    return {"seed": "the seed model", "soup": "the soup", "mix": "the mix before finetuning"}.get(name, best)
