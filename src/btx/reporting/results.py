"""The report's numbers: formatting, the results table and gains, from `evaluate/results.json`.

Pure functions of the parsed JSON. Bits per byte: lower is better. A task's score (exact match, accuracy, pass@1): a
share of 1, higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btx.choices.baselines import BASELINES
from btx.number_texts import (
    SHORT,
    count_text,
    decimal_text,
    flops_text,
    hours_text,
    is_number,
    is_share,
    metric_of,
    percent_text,
)
from btx.reporting.paired_bootstrap import learning_and_keeping

if TYPE_CHECKING:
    from rich.table import Table

EXPERT = "expert/"
MEANS = ("mean", "learning", "keeping", "mixed")

_DESCRIPTIONS = {
    "seed": "seed model, untouched",
    "mix": "mixed, not finetuned",
    "btx": "mixed and finetuned",
    "sft": "finetuned on chats",
    "dpo": "trained on preferences",
}


@dataclass(frozen=True)
class Cell:
    """One number of a table: its text, its standard error's text, and whether it is its column's best."""

    text: str
    error: str = ""
    best: bool = False
    exact: str = ""


@dataclass(frozen=True)
class Row:
    """One model of the results table; cells stand in the order of the table's columns."""

    name: str
    description: str
    domains: list[Cell]
    means: list[Cell]
    tasks: list[Cell]
    costs: list[Cell]
    gains: list[float | None]

    @property
    def quality(self) -> list[Cell]:
        """All cells but the costs, as `Results.quality_titles`."""
        return [*self.domains, *self.means, *self.tasks]


@dataclass(frozen=True)
class Results:
    """The results table: columns and rows in the order of the file."""

    domains: list[str]
    means: list[str]
    """mean; learning and keeping, where some domains have a branch and others have none; mixed, where documents that
    switch domain were measured."""
    tasks: list[str]
    rows: list[Row]

    def quality_titles(self, tasks: Iterable[str]) -> list[str]:
        """Titles of the rows' `quality`."""
        return [*map(domain_title, self.domains), *self.means, *tasks]

    @property
    def meanings(self) -> str:
        """What the columns of means are, in a sentence that stands behind others; "" where there is the mean alone."""
        parts = {"learning": "learning is the mean over the domains that have a branch, keeping over all others",
                 "mixed": "mixed are documents that switch domain, which the mean leaves out"}  # fmt: skip
        return "".join(f"; {text}" for name, text in parts.items() if name in self.means)


# --- table ----------------------------------------------------------------------------------------------------------


def domain_title(name: str) -> str:
    """Title of a domain's column, also of one that is called like a column of means."""
    return f"{name} (domain)" if name in MEANS else name


def describe(name: str) -> str:
    """What stands behind a model's name, in a few words."""
    if name.startswith(EXPERT):
        return f"expert model of {name.removeprefix(EXPERT)}"
    baseline = {str(known): kind.label for known, kind in BASELINES.items()}
    return (_DESCRIPTIONS | baseline).get(name, "another model")


def results_table(results: Mapping[str, Any]) -> Results:
    """Every model's row, best of each quality column marked."""
    models: dict[str, Any] = results.get("models", {})
    domains, tasks = (list(dict.fromkeys(name for model in models.values() for name in model.get(part, {})))
                      for part in ("domains", "tasks"))  # fmt: skip
    best_domain = {d: _best((bits_of(m, d) for m in models.values()), min) for d in domains}
    best_task = {t: _best((task_score(m, t) for m in models.values()), max) for t in tasks}
    means = [name for name in MEANS if name == "mean" or any(map(is_number, (_mean(m, name) for m in models.values())))]
    best_mean = {name: _best((_mean(m, name) for m in models.values()), min) for name in means}
    seed = models.get("seed", {})
    rows = [
        Row(
            name=name,
            description=describe(name) if "other" not in model else f"not the run's: {model['other']['path']}",
            domains=[_bits_cell(model, d, best_domain[d]) for d in domains],
            means=[_mean_cell(model, name, best_mean[name]) for name in means],
            tasks=[_task_cell(model, t, best_task[t]) for t in tasks],
            costs=_cost_cells(model),
            gains=[_gain(bits_of(model, d), bits_of(seed, d)) for d in domains]
            + [_gain(model.get("mean_bits_per_byte"), seed.get("mean_bits_per_byte"))],
        )
        for name, model in models.items()
    ]
    return Results(domains, means, tasks, rows)


def report_table(results: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal: models × domains, mean bits per byte and task scores; best in bold."""
    from rich.table import Table
    from rich.text import Text

    view = results_table(results)
    metrics = {task: metric_of(model["tasks"][task]) for model in results.get("models", {}).values()
               for task in model.get("tasks", {})}  # fmt: skip
    title = "bits per byte (lower is better)" + ("; EM: exact match" if "exact_match" in metrics.values() else "")
    table = Table(title=title, title_style="bold")
    table.add_column("model", no_wrap=True)
    tasks = (f"{task} {SHORT.get(metrics[task], metrics[task])}" for task in view.tasks)
    for column in view.quality_titles(tasks):
        table.add_column(column, justify="right", no_wrap=True)
    for row in view.rows:
        cells = (Text(cell.text, style="bold" if cell.best else "") for cell in row.quality)
        table.add_row(row.name, *cells, end_section=row.name == "seed")
    return table


def learning_and_keeping_means(model: Mapping[str, Any], branches: Collection[str]) -> dict[str, float]:
    """Mean bits per byte over the domains that have a branch (`learning`) and over the others (`keeping`); empty where
    there are not both, or one is not measured."""
    bits = {domain: bits_of(model, domain) for domain in model.get("domains", {})}
    if not all(map(is_number, bits.values())):
        return {}
    return {part: math.fsum(bits[name] for name in names) / len(names)
            for part, names in learning_and_keeping(bits, branches).items()}  # fmt: skip


def bits_of(model: Mapping[str, Any], domain: str) -> Any:
    """A model's bits per byte in a domain; None if they are not measured."""
    return model.get("domains", {}).get(domain, {}).get("bits_per_byte")


def task_score(model: Mapping[str, Any], task: str) -> Any:
    """A model's score on a task; None if it has none."""
    measured = model.get("tasks", {}).get(task, {})
    return measured.get(metric_of(measured))


def _best(values: Iterable[Any], choose: Any) -> Any:
    return choose((value for value in values if is_number(value)), default=None)


def _gain(value: Any, seed: Any) -> float | None:
    """Relative gain on the seed model: the share of its bits per byte that is saved."""
    return (seed - value) / seed if is_number(value) and is_number(seed) and seed else None


def _cell(value: Any, error: Any, best: Any) -> Cell:
    is_best = is_number(value) and value == best
    return Cell(decimal_text(value), f"± {error:.3f}" if is_number(error) else "", is_best, str(value))


def _mean(model: Mapping[str, Any], name: str) -> Any:
    """Bits per byte of a column of means."""
    return model.get("mixed", {}).get("bits_per_byte") if name == "mixed" else model.get(f"{name}_bits_per_byte")


def _mean_cell(model: Mapping[str, Any], name: str, best: Any) -> Cell:
    return _cell(_mean(model, name), model.get("mixed", {}).get("stderr") if name == "mixed" else None, best)


def _bits_cell(model: Mapping[str, Any], domain: str, best: Any) -> Cell:
    return _cell(bits_of(model, domain), model.get("domains", {}).get(domain, {}).get("stderr"), best)


def _task_cell(model: Mapping[str, Any], task: str, best: Any) -> Cell:
    value, error = task_score(model, task), model.get("tasks", {}).get(task, {}).get("stderr")
    if is_number(value) and not is_share(value):  # a perplexity, say: nothing is known of what is better
        return Cell(decimal_text(value), exact=str(value))
    is_best = is_number(value) and value == best and value > 0
    return Cell(percent_text(value), f"± {100 * error:.1f}" if is_number(error) else "", is_best, str(value))


def _cost_cells(model: Mapping[str, Any]) -> list[Cell]:
    def cell(text: Callable[[Any], str], key: str) -> Cell:
        return Cell(text(model.get(key)), exact=str(model.get(key)))

    hours = model.get("machine_hours", model.get("hours"))
    return [
        cell(count_text, "tokens"), cell(flops_text, "flops"), Cell(hours_text(hours), exact=f"{hours} hours"),
        cell(count_text, "active_params"), cell(count_text, "total_params"),
    ]  # fmt: skip
