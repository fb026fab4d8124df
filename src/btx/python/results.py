"""What the functions of `btx.python.commands` return: typed, as HTML in a notebook, and as pandas tables.

Only `to_pandas` imports pandas, which btx itself does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.errors import UserError
from btx.number_texts import metric_of, percent_text
from btx.reporting.notebook import Table, results_of, table_html
from btx.reporting.results import Cell, domain_title
from btx.sweeps.table import score_of, sweep_cells

if TYPE_CHECKING:
    import pandas

MEANS = ("mean", "learning", "keeping")
COSTS = ("tokens", "flops", "hours", "active_params", "total_params")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: the quality and cost of every model."""

    models: Mapping[str, Mapping[str, Any]]
    """Model → its entry of results.json."""

    def to_pandas(self) -> pandas.DataFrame:
        """A row a model. Columns: `bits_per_byte.DOMAIN` and its `stderr.DOMAIN`, `bits_per_byte.mean`, `.learning`
        (of the domains with a branch) and `.keeping` (of the others), `.mixed` if it was measured,
        `task.NAME` (share of right answers), tokens, flops, hours, active_params, total_params."""
        rows = {
            name: dict(_columns(model, lambda task: task.get(metric_of(task)))) for name, model in self.models.items()
        }
        return _pandas().DataFrame.from_dict(rows, orient="index").rename_axis("model")

    def _repr_html_(self) -> str:
        return table_html(results_of({"models": self.models}))


def _columns(entry: Mapping[str, Any], score: Callable[[Mapping[str, Any]], Any]) -> Iterator[tuple[str, Any]]:
    """Column → what a model's entry, of one run or over several, has there; `score` finds that of a task."""
    for domain, measured in entry.get("domains", {}).items():
        yield f"bits_per_byte.{domain_title(domain)}", measured.get("bits_per_byte")
        yield f"stderr.{domain_title(domain)}", measured.get("stderr")
    yield from ((f"bits_per_byte.{mean}", entry[f"{mean}_bits_per_byte"]) for mean in MEANS
                if f"{mean}_bits_per_byte" in entry)  # fmt: skip
    if "mixed" in entry:
        yield "bits_per_byte.mixed", entry["mixed"].get("bits_per_byte")
    yield from ((f"task.{task}", score(measured)) for task, measured in entry.get("tasks", {}).items())
    yield from ((key, entry[key]) for key in COSTS if key in entry)


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: differences of a model to others, and how sure they are."""

    model: str
    differences: Mapping[str, Mapping[str, Any]]
    """Other model → "mean", "learning", "keeping", "domains", "mixed", "tasks", each a difference with its interval,
    model minus other."""
    resamples: int

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each other model and set. Columns: other, set (mean, learning, keeping, mixed, a domain,
        `task.NAME`), difference, low and high (95 % interval), p. Bits per byte: negative is better; tasks:
        positive is better."""
        rows = [{"other": other, "set": name, **value} for other, row in self.differences.items()
                for name, value in sets_of(row).items()]  # fmt: skip
        return _pandas().DataFrame(rows)

    def _repr_html_(self) -> str:
        titles = list(dict.fromkeys(name for row in self.differences.values() for name in sets_of(row)))
        rows = [(other, [_difference_cell(sets_of(row).get(title)) for title in titles])
                for other, row in self.differences.items()]  # fmt: skip
        caption = "Difference [95 % interval] p; bits per byte: negative is better; tasks: positive is better"
        return table_html(Table(titles, rows, caption), title=f"{self.model} minus the other")


def sets_of(row: Mapping[str, Any], task_name: str = "task.{}") -> dict[str, Any]:
    """What another model is compared on → the difference, in order."""
    cells = {name: row[name] for name in MEANS if name in row}
    cells |= {domain_title(name): value for name, value in row["domains"].items()} | (
        {"mixed": row["mixed"]} if "mixed" in row else {}
    )
    return cells | {task_name.format(task): value for task, value in row["tasks"].items()}


def _difference_cell(value: Mapping[str, Any] | None) -> Cell:
    if value is None:
        return Cell("")
    text = f"{value['difference']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
    return Cell(text, f"p {value['p']:.3f}", best=value["low"] > 0 or value["high"] < 0)


@dataclass(frozen=True)
class Analysis:
    """What `analyze` returns: which experts the tokens of each domain use."""

    experts: list[str]
    layers: int
    routing: Mapping[str, Any]
    """All of routing.json."""

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each domain, layer and expert. Columns: domain, layer, expert, load (share of routed tokens)."""
        rows = [{"domain": domain, "layer": number, "expert": expert, "load": load}
                for domain, routing in self.routing["domains"].items()
                for number, layer in enumerate(routing["load"])
                for expert, load in zip(self.experts, layer, strict=True)]  # fmt: skip
        return _pandas().DataFrame(rows)

    def _repr_html_(self) -> str:
        rows = [(f"{domain}, layer {number}", [Cell(percent_text(load), best=load == max(layer)) for load in layer])
                for domain, routing in self.routing["domains"].items()
                for number, layer in enumerate(routing["load"])]  # fmt: skip
        return table_html(Table(self.experts, rows, "Share of the routed tokens that each expert gets"))


@dataclass(frozen=True)
class SweepResults:
    """What `sweep` returns."""

    folder: Path
    written: Mapping[str, Any]
    """All of sweep.json."""

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each variant, model and rng seed; columns as in `Evaluation.to_pandas`, without `stderr.DOMAIN`."""
        rows = []
        for variant, entry in self.written["variants"].items():
            means = entry["aggregated"]
            for model, numbers in (means["models"] if means else {}).items():
                for place, seed in enumerate(means["rng_seeds"]):
                    values = {name: stat["values"][place] for name, stat in _columns(numbers, score_of)
                              if stat and stat["n"] == len(means["rng_seeds"]) and not name.startswith("stderr.")
                              }  # fmt: skip
                    rows.append({"variant": variant, "model": model, "rng_seed": seed, **values})
        return _pandas().DataFrame(rows)

    def _repr_html_(self) -> str:
        titles, rows = sweep_cells(self.written)
        cells = [(row[0][0], [Cell(text, best=best) for text, best in row[1:]]) for row in rows]
        return table_html(Table(titles[1:], cells, "Mean ± standard error over rng seeds"), title=str(self.folder))


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise UserError("to_pandas needs pandas, which is not installed: pip install pandas") from error
    return pandas
