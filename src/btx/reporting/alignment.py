"""Before and after alignment: a run's model beside what SFT and DPO made of it."""

from __future__ import annotations

from dataclasses import dataclass

from btx.number_texts import decimal_text, is_number, is_share, percent_text, signed_percent
from btx.reporting import findings
from btx.reporting.charts import Lines
from btx.reporting.headline import paired_differences
from btx.reporting.paired_bootstrap import may_be_chance
from btx.reporting.results import bits_of, task_score
from btx.reporting.routing_figures import shift_figures
from btx.reporting.run_files import Run

ALIGNED = ("sft", "dpo")
"""Names of the models that `align` makes."""


@dataclass(frozen=True)
class Change:
    """One measure before and after."""

    measure: str
    before: str
    after: str
    change: str
    better: bool | None
    """None where they are equal, or where the difference may be chance."""
    may_be_chance: bool


@dataclass(frozen=True)
class Aligned:
    """One aligned model beside the one it was made from."""

    name: str
    before: str
    changes: list[Change]
    routing: str
    """What became of the routing, in a sentence."""
    chart: Lines | None
    """Tokens that go elsewhere, layer by layer."""

    @property
    def answer(self) -> str:
        """What alignment did to the measures, in a sentence."""
        parts = [f"{one.measure} {one.before} → {one.after}{' (may be chance)' if one.may_be_chance else ''}"
                 for one in self.changes if one.measure == MEAN or not one.measure.startswith(BITS)]  # fmt: skip
        return f"From {self.before} to {self.name}: {'; '.join(parts)}." if parts else ""


BITS = "bits per byte"
MEAN = f"mean {BITS}"


def aligned_models(run: Run) -> list[Aligned]:
    """Every aligned model that was evaluated or analysed."""
    models, charts = run.models, shift_figures(run)
    before = run.aligned.get("before", "btx")
    names = dict.fromkeys([*(name for name in ALIGNED if name in models), *run.aligned.get("models", {})])
    return [
        Aligned(name, before, _changes(run, before, name), findings.shift(run, name), charts.get(name))
        for name in names
    ]


def _changes(run: Run, before: str, after: str) -> list[Change]:
    first, second = (run.models.get(name, {}) for name in (before, after))
    paired = paired_differences(run.documents, after, before)
    rows = []
    for domain in (*first.get("domains", {}), None):
        old, new = (model.get("mean_bits_per_byte") if domain is None else bits_of(model, domain)
                    for model in (first, second))  # fmt: skip
        if is_number(old) and is_number(new) and old:
            difference = paired.get("mean", {}) if domain is None else paired.get("domains", {}).get(domain, {})
            rows.append(_change(MEAN if domain is None else f"{BITS}, {domain}", decimal_text(old), decimal_text(new),
                                signed_percent(new / old - 1), old - new, difference.get("p")))  # fmt: skip
    for task in first.get("tasks", {}):
        old, new = task_score(first, task), task_score(second, task)
        if is_share(old) and is_share(new):
            points = f"{100 * (new - old):+.1f} points".replace("-", "−")
            p = paired.get("tasks", {}).get(task, {}).get("p")
            rows.append(_change(task, percent_text(old), percent_text(new), points, new - old, p))
    return rows


def _change(measure: str, before: str, after: str, change: str, gain: float, p: float | None) -> Change:
    chance = may_be_chance(p)
    return Change(measure, before, after, change, None if chance or not gain else gain > 0, chance)
