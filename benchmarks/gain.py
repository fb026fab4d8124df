"""The gain of a mixture over dense training at equal FLOPs against the seed model's tokens a parameter, beside the law.

    python benchmarks/gain.py runs/r6 runs/r12 runs/r24          # sweeps' folders, or one variant's: runs/p2/VARIANT
    python benchmarks/gain.py                                    # draws what is kept again

Keeps a row for every variant in benchmarks/gain.json (a sweep of the same name, parameters and tokens a parameter takes
the place of the row before), draws all rows into docs/gain.svg, and prints them as a table in Markdown.

Measured: bits per byte of `dense_cm` minus those of `btx`, and of `upcycling_cm`, rng seed by rng seed: positive is
better than dense. *mean* over all domains, *learning* over those with a branch, *keeping* over the others. Errors are
one standard error: over rng seeds, or of a single one over documents (paired bootstrap). Predicted: what
`btx.planning.gain` says of the run; its line keeps the run's proportion of the phase after the seed model to the seed
model's tokens. A prediction is confirmed where btx's gain has its sign by more than two standard errors, refuted
where it has the other sign by as much, and open in between (in rows without errors: within 0.005 of 0).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown_table import markdown_table

from btx.evaluation.aggregate import mean_and_stderr
from btx.files import read_json, write_json, write_text
from btx.models.cost import config_cost
from btx.number_texts import count_text
from btx.planning.costs import dense_config, run_costs
from btx.planning.gain import bytes_per_token_of, law_gain, tokens_read
from btx.planning.models import cost_in_use
from btx.planning.speed import measured_speed
from btx.reporting.drawing import (
    COLOURS,
    Chart,
    Colour,
    column_height,
    column_width,
    empty,
    label_column,
    stacked_svg,
    ticks,
)
from btx.reporting.paired_bootstrap import compare_documents, learning_and_keeping, read_documents
from btx.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
MODELS = {"btx": "btx", "upcycling_cm": "upcycling"}
DENSE = "dense_cm"
PARTS = ("mean", "learning", "keeping")
LAW_AT = [2.0 ** (step / 2) for step in range(15)]
"""Tokens a parameter at which the law's line is drawn: 1 to 128."""
TICKS = (1, 3, 6, 12, 24, 48, 96)
SURE = 2.0
"""Standard errors beyond which a sign is no chance."""
NEAR_ZERO = 0.005
"""Bits per byte up to which a sign may be chance where no error is known."""
NORMAL_95 = 1.96

Row = dict[str, Any]
"""{"name", "parameters", "tokens_per_parameter", "rng_seeds", "errors": "rng seeds" | "documents", "predicted",
"law": [[tokens a parameter, gain]], "gains": {"btx" | "upcycling": {PART: [gain, standard error or null]}}}; of
earlier runs, typed in, without "law"."""


# --- rows of sweeps -------------------------------------------------------------------------------------------------


def sweep_rows(path: Path) -> list[Row]:
    """A row for every finished variant of a sweep's folder, or for the one variant whose folder it is.

    Raises:
        SystemExit: no sweep, or nothing in it to compare.
    """
    folder, only = (path, None) if (path / "sweep.json").is_file() else (path.parent, path.name)
    written = read_json(folder / "sweep.json")
    if written is None:
        raise SystemExit(f"{path}: neither a sweep's folder nor a variant's below one: there is no sweep.json")
    rows = []
    for label, variant in written["variants"].items():
        found = variant["aggregated"]
        if found and only in (None, label):
            several = len(written["variants"]) > 1
            rows.append(_row(f"{written['name']}, {label}" if several else written["name"], folder / label, found))
    if not rows:
        raise SystemExit(f"{path}: no finished variant; variants: {', '.join(written['variants'])}")
    return rows


def _row(name: str, folder: Path, found: Mapping[str, Any]) -> Row:
    """One variant's row: `found` is what sweep.json has aggregated of it."""
    models = found["models"]
    if missing := [model for model in ("seed", DENSE, *MODELS) if model not in models]:
        raise SystemExit(f"{folder}: no results of {', '.join(missing)}")
    run = RunFolder.open(folder / f"rng-{found['rng_seeds'][0]}")
    law, seed_tokens, parameters = _law(run, models["btx"]["flops"]["mean"])
    ratio = seed_tokens / parameters
    of_documents = _over_documents(run) if found["runs"] == 1 else {}
    gains: dict[str, dict[str, list[float | None]]] = {}
    for model, label in MODELS.items():
        gains[label] = {}
        for part, domains in parts_of(models).items():
            values = [dense - ours for dense, ours in zip(_values(models[DENSE], domains),
                                                          _values(models[model], domains), strict=True)]  # fmt: skip
            mean, error = mean_and_stderr(values)
            gains[label][part] = [mean, of_documents.get(label, {}).get(part) if error is None else error]
    return {
        "name": name, "parameters": parameters, "tokens_per_parameter": ratio, "rng_seeds": found["runs"],
        "errors": "documents" if found["runs"] == 1 else "rng seeds", "predicted": law(ratio),
        "law": [[at, law(at)] for at in LAW_AT], "gains": gains,
    }  # fmt: skip


def parts_of(models: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part → its domains; learning and keeping where expert models of some domains, and not of all, were measured."""
    domains = list(models[DENSE]["domains"])
    branches = [name.removeprefix("expert/") for name in models if name.startswith("expert/")]
    return {"mean": domains, **learning_and_keeping(domains, branches)}


def _values(model: Mapping[str, Any], domains: Sequence[str]) -> list[float]:
    """Mean bits per byte over some domains, rng seed by rng seed."""
    each = [model["domains"][domain]["bits_per_byte"]["values"] for domain in domains]
    return [math.fsum(bits) / len(domains) for bits in zip(*each, strict=True)]


def _law(run: RunFolder, flops: float) -> tuple[Callable[[float], float], float, int]:
    """The law as a function of tokens a parameter, with a phase after the seed model that grows with them, in bits per
    byte; the seed model's tokens and parameters."""
    recipe, config = run.recipe, dense_config(run)
    dense, mixture = config_cost(config), cost_in_use(recipe, config, "btx")
    seed_tokens, _ = tokens_read(run, dense.total_params, run_costs(run, config, measured_speed(run)))
    bytes_per_token = bytes_per_token_of(run)
    if not seed_tokens or bytes_per_token is None:
        raise SystemExit(f"{run.path}: neither its seed model's tokens nor its prepared data are there any more")

    def law(ratio: float) -> float:
        tokens = ratio * dense.total_params
        nats = law_gain(dense, mixture, len(recipe.expert_names), tokens, flops * tokens / seed_tokens,
                        recipe.data.sequence_length)  # fmt: skip
        return nats / math.log(2) / bytes_per_token

    return law, seed_tokens, dense.total_params


def _over_documents(run: RunFolder) -> dict[str, dict[str, float]]:
    """Label → part → standard error of its gain over documents; empty where an earlier version kept no scores."""
    documents = read_documents(run.path / "evaluate" / "documents.json")
    if documents is None:
        return {}
    models, errors = documents["models"], dict[str, dict[str, float]]()
    for model, label in MODELS.items():
        found = compare_documents(models[model], models[DENSE], documents["bytes"], branches=run.recipe.train.domains)
        errors[label] = {part: (found[part]["high"] - found[part]["low"]) / 2 / NORMAL_95
                         for part in PARTS if part in found}  # fmt: skip
    return errors


def merged(kept: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New rows in the place of those kept before of the same name and place, ordered by tokens a parameter."""
    rows = {(row["name"], row["parameters"], round(row["tokens_per_parameter"], 1)): row for row in (*kept, *new)}
    return sorted(rows.values(), key=lambda row: (row["tokens_per_parameter"], row["parameters"], row["name"]))


# --- what is said of them -------------------------------------------------------------------------------------------


def verdict(row: Row) -> str:
    """confirmed, refuted, or open where the measured sign may be chance."""
    gain, error = row["gains"]["btx"]["mean"]
    if abs(gain) <= (NEAR_ZERO if error is None else SURE * error):
        return "open"
    return "confirmed" if gain * row["predicted"] > 0 else "refuted"


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown."""
    titles = ["sweep", "parameters", "tokens a parameter", "rng seeds", "predicted"]
    titles += [f"{label}, {part}" for part in PARTS for label in MODELS.values()] + ["sign of btx's gain"]
    lines = []
    for row in rows:
        cells = [row["name"], count_text(row["parameters"]), f"{row['tokens_per_parameter']:.1f}",
                 str(row["rng_seeds"]), _signed([row["predicted"], None])]  # fmt: skip
        cells += [_signed(row["gains"][label].get(part)) for part in PARTS for label in MODELS.values()]
        lines.append([*cells, verdict(row)])
    return markdown_table(titles, lines)


def _signed(value: Sequence[float | None] | None) -> str:
    if value is None or value[0] is None:
        return ""
    error = "" if value[1] is None else f" ± {value[1]:.3f}"
    return f"{value[0]:+.3f}{error}".replace("-", "−")


@dataclass(frozen=True)
class GainChart(Chart):
    """One part of the gains: a colour a size, full circles btx, empty ones upcycling, a cross where the predicted sign
    is refuted; the law, which is of the mean, as a line."""

    name: str
    rows: Sequence[Row]
    part: str

    def draw(self, colour: Colour) -> Figure:
        """The figure, in these colours."""
        sizes = sorted({row["parameters"] for row in self.rows})
        names = [f"{count_text(size)} {what}" for size in sizes for what in ("law", *MODELS.values())]
        figure, axes = empty(max(3.6, column_height(len(names))), column_width(names), colour=colour)
        places = [row["tokens_per_parameter"] for row in self.rows]
        low, high = 0.7 * min(places), 1.5 * max(places)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.axhline(0.0, color=colour("quiet"), linewidth=0.8)
        ends = []
        for number, size in enumerate(sizes):
            name, shade = count_text(size), f"c{number % COLOURS}"
            rows = [row for row in self.rows if row["parameters"] == size and self.part in row["gains"]["btx"]]
            law = [point for row in rows[:1] for point in row.get("law", []) if low <= point[0] <= high]
            if law and self.part == "mean":
                axes.plot(*zip(*law, strict=True), color=colour(shade), linewidth=1.2, linestyle=(0, (4, 2)))
                ends.append((f"{name} law", shade, *law[-1]))
            for label in MODELS.values():
                for row in rows:
                    self._point(axes, row, label, colour(shade))
                ends += [(f"{name} {label}", shade, row["tokens_per_parameter"], row["gains"][label][self.part][0])
                         for row in rows[-1:]]  # fmt: skip
        axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ticks(axes, "y", 6, lambda value: f"{1000 * value:+g}".replace("-", "−") if value else "0")
        axes.set_xlabel("tokens a parameter that the seed model has read")
        axes.set_ylabel(f"0.001 bits per byte saved, {self.part}")
        label_column(axes, ends, colour)
        return figure

    def _point(self, axes: Axes, row: Row, label: str, shade: str) -> None:
        gain, error = row["gains"][label][self.part]
        refuted = label == "btx" and self.part == "mean" and verdict(row) == "refuted"
        axes.errorbar([row["tokens_per_parameter"]], [gain], yerr=[error or 0.0], fmt="X" if refuted else "o",
                      markersize=7.0 if refuted else 4.5, color=shade, elinewidth=1.0, capsize=2.0,
                      markerfacecolor=shade if label == "btx" else "none")  # fmt: skip


def figure(rows: Sequence[Row]) -> str:
    """All parts that some row has, as the text of an .svg file."""
    titles = {
        "mean": "Gain over dense: btx full, upcycling empty, law dashed",
        "learning": "The same on the branches' domains: learning",
        "keeping": "The same on all other text: keeping",
    }
    return stacked_svg([(title, GainChart(f"gain-{part}", rows, part).svg()) for part, title in titles.items()
                        if any(part in row["gains"]["btx"] for row in rows)])  # fmt: skip


def main() -> None:
    """Read, keep, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="*", help="sweeps' folders, or variants' below them")
    parser.add_argument("--rows", type=Path, default=HERE / "gain.json", help="where rows are kept")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "gain.svg", help="SVG to write")
    arguments = parser.parse_args()
    rows = merged(read_json(arguments.rows) or [], [row for path in arguments.sweeps for row in sweep_rows(path)])
    if not rows:
        parser.error(f"no sweep is named, and {arguments.rows} keeps none")
    write_json(arguments.rows, rows)
    write_text(arguments.figure, figure(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
