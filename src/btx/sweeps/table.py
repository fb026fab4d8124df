"""A sweep's results as one table, for the terminal and for sweep.md: variants × models, mean ± standard error.

The standard error is over rng seeds, of the mean. Differences are taken rng seed by rng seed before they are averaged:
what two models of one rng seed share (seed model, data, held-out text) cancels in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from btx.evaluation.aggregate import NOT_COMPARED, over_runs
from btx.markdown_text import literal
from btx.number_texts import MISSING, count_text, flops_text, hours_text
from btx.reporting.results import domain_title

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all variants"
"""What stands for the variant where a model is the same in all of them."""
NOT_OF_THE_MODEL = {"eval_tokens_per_s", "hours", "machine_hours", "peak_memory_bytes", "matched", "mfu"}
"""Numbers that may differ between two runs of the very same model, or are about another model too."""

Stat = dict[str, Any]
"""{"mean", "stderr", "n", "values"}, as `btx.evaluation.aggregate` writes it."""


@dataclass(frozen=True)
class SweepRow:
    """One model of one variant; numbers that are not there are None."""

    variant: str
    model: str
    rng_seeds: list[int]
    """Of the runs behind its numbers, in the order of their values."""
    domains: dict[str, Stat]
    mixed: Stat | None
    mean: Stat | None
    learning: Stat | None
    """Mean bits per byte over the domains with a branch."""
    keeping: Stat | None
    """Mean over the others."""
    to_btx: Stat | None
    """Mean bits per byte minus btx's of the same variant."""
    to_first: Stat | None
    """Mean bits per byte minus the same model's in the first variant."""
    tasks: dict[str, Stat]
    flops: Stat | None
    hours: Stat | None
    machine_hours: Stat | None
    active_params: Stat | None


def sweep_rows(written: Mapping[str, Any]) -> list[SweepRow]:
    """Rows of what sweep.json holds; a model that is the same in every variant has one row, before the others.

    The seed model's own FLOPs and hours stay with the seed model, as in results.json.
    """
    finished = {label: variant["aggregated"] for label, variant in written["variants"].items() if variant["aggregated"]}
    names = list(dict.fromkeys(name for results in finished.values() for name in results["models"]))
    wanted = [name for name in written["models"] or names if name in names]
    same = {name for name in wanted if len(finished) > 1 and _is_same(name, list(finished.values()))}
    first = next(iter(finished.values()), None)
    rows = [_row(ALL, name, first) for name in wanted if name in same and first]
    if "btx" not in same:  # each variant has a btx of its own: there is no one difference to it
        rows = [replace(row, to_btx=None) for row in rows]
    for label, results in finished.items():
        for name in wanted:
            if name in results["models"] and name not in same:
                rows.append(_row(label, name, results, first if results is not first else None))
    return rows


def sweep_cells(written: Mapping[str, Any]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Column titles, and each row's cells: text, and whether it is the best of its column."""
    rows = sweep_rows(written)
    variants = len({row.variant for row in rows}) > 1
    domains = list(dict.fromkeys(domain for row in rows for domain in row.domains))
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    low: dict[str, list[Stat | None]] = {
        domain_title(domain): [row.domains.get(domain) for row in rows] for domain in domains
    }
    low |= {"mixed": [row.mixed for row in rows], "mean": [row.mean for row in rows],
            "learning": [row.learning for row in rows], "keeping": [row.keeping for row in rows]}  # fmt: skip
    columns: dict[str, list[tuple[str, bool]]] = {}
    if variants:
        columns["variant"] = [(row.variant, False) for row in rows]
    columns["model"] = [(row.model, False) for row in rows]
    columns |= {name: _marked(stats, _text, min) for name, stats in low.items()}
    if branches_vary(written):  # means over other domains: the lowest is not the best
        columns |= {name: [(text, False) for text, _ in columns[name]] for name in ("learning", "keeping")}
    columns["− btx"] = [(_text(row.to_btx, sign="+"), False) for row in rows]
    columns["− first variant"] = [(_text(row.to_first, sign="+"), False) for row in rows]
    columns |= {f"{task} %": _marked([row.tasks.get(task) for row in rows], _percent, max) for task in tasks}
    columns["FLOPs"] = [(flops_text(_mean(row.flops)), False) for row in rows]
    columns["hours"] = [(hours_text(_mean(row.hours)), False) for row in rows]
    columns["machine-hours"] = [(hours_text(_mean(row.machine_hours)), False) for row in rows]
    columns["active"] = [(count_text(_mean(row.active_params)), False) for row in rows]
    shown = {title: cells for title, cells in columns.items() if any(text != MISSING for text, _ in cells)}
    return list(shown), [list(cells) for cells in zip(*shown.values(), strict=True)]


def sweep_table(written: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    titles, rows = sweep_cells(written)
    table = Table(title=f"{_title(written)}: bits per byte (lower is better), ± standard error over rng seeds",
                  title_style="bold")  # fmt: skip
    for title in titles:
        left = title in ("variant", "model")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    before = None
    for cells in rows:
        if "variant" in titles and before not in (None, cells[0][0]):
            table.add_section()
        before = cells[0][0]
        table.add_row(*(Text(text, style="bold" if best else "") for text, best in cells))
    return table


def sweep_markdown(written: Mapping[str, Any]) -> str:
    """sweep.md: what was run, the table, what is missing."""
    titles, rows = sweep_cells(written)
    parts = [f"# {literal(_title(written))}", ""]
    if rows:
        parts += [
            "Bits per byte of held-out text, lower is better; mean ± standard error of the mean over rng seeds. "
            "Differences are of the mean bits per byte, taken rng seed by rng seed. FLOPs and hours are those of "
            "training after the seed model; the seed model's row counts its own. The lowest mean of a column is bold; "
            "whether it is more than chance, the errors say.", "",
            f"| {' | '.join(titles)} |", "|" + "---|" * len(titles),
        ]  # fmt: skip
        shown = [[f"**{literal(text)}**" if best else literal(text) for text, best in cells] for cells in rows]
        parts += [f"| {' | '.join(cells)} |" for cells in shown]
    parts += ["", *map(literal, notes(written)), "", "## Settings of the variants", ""]
    for label, variant in written["variants"].items():
        settings = ", ".join(f"{literal(key)} = {literal(value)}" for key, value in variant["settings"].items())
        parts.append(f"- {literal(label)}: {settings or 'the recipe as it stands'}")
    return "\n".join(parts) + "\n"


def notes(written: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the numbers: runs not done or failed, models that are not there."""
    runs = [(label, run) for label, variant in written["variants"].items() for run in variant["runs"]]
    lines = []
    if open_runs := [f"{label}, rng seed {run['rng_seed']} ({run['state']})" for label, run in runs
                     if run["state"] != "done"]:  # fmt: skip
        lines.append(f"Not in these numbers, {len(open_runs)} of {len(runs)} runs: {'; '.join(open_runs)}.")
    there = {name for variant in written["variants"].values() if variant["aggregated"]
             for name in variant["aggregated"]["models"]}  # fmt: skip
    if there and (absent := [name for name in written["models"] or () if name not in there]):
        lines.append(f"No run has these models: {', '.join(absent)}.")
    if branches_vary(written):
        lines.append("Learning and keeping are means over other domains in each variant, as train.domains varies.")
    if len(written["rng_seeds"]) == 1:
        lines.append("One rng seed: there are no standard errors, and differences may be chance.")
    return lines


def branches_vary(written: Mapping[str, Any]) -> bool:
    """Whether variants name branches of their own."""
    named = [variant["settings"].get("train.domains") for variant in written["variants"].values()]
    return any(branches != named[0] for branches in named)


def _row(variant: str, name: str, found: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> SweepRow:
    """A model of a variant's aggregated results; `first`: those of the variant it is compared with."""
    entry, seeds = found["models"][name], found["rng_seeds"]
    other, others_seeds = (first["models"].get(name, {}), first["rng_seeds"]) if first else ({}, [])
    return SweepRow(
        variant, name, seeds,
        domains={domain: found["bits_per_byte"] for domain, found in entry.get("domains", {}).items()},
        mixed=entry.get("mixed", {}).get("bits_per_byte"),
        mean=entry.get("mean_bits_per_byte"),
        learning=entry.get("learning_bits_per_byte"), keeping=entry.get("keeping_bits_per_byte"),
        to_btx=entry.get("difference_to_btx", {}).get("mean_bits_per_byte"),
        to_first=paired(
            entry.get("mean_bits_per_byte"), seeds, other.get("mean_bits_per_byte"), others_seeds, lambda a, b: a - b
        ),
        tasks={task: score for task, found in entry.get("tasks", {}).items() if (score := score_of(found)) is not None},
        flops=entry.get("flops"), hours=entry.get("hours"),
        machine_hours=entry.get("machine_hours"), active_params=entry.get("active_params"),
    )  # fmt: skip


def _is_same(name: str, finished: list[Mapping[str, Any]]) -> bool:
    """Whether a model has the same numbers in every variant: it was made once and shared."""
    entries = [results["models"].get(name) for results in finished]
    kept = [entry and {key: value for key, value in entry.items()
                       if key not in NOT_OF_THE_MODEL and not key.startswith("difference_to")}
            for entry in entries]  # fmt: skip
    return bool(kept[0]) and all(entry == kept[0] for entry in kept)


def paired(
    stat: Stat | None, seeds: Sequence[int], other: Stat | None, others_seeds: Sequence[int],
    compare: Callable[[float, float], float],
) -> Stat | None:  # fmt: skip
    """compare(value, other value) of every rng seed that both have; None if there is none, or a value's is unknown.

    Args:
        stat: its values are those of `seeds`, in this order; `other` and `others_seeds` likewise.
    """
    if stat is None or other is None or stat["n"] != len(seeds) or other["n"] != len(others_seeds):
        return None
    theirs = dict(zip(others_seeds, other["values"], strict=True))
    pairs = [(value, theirs[seed]) for seed, value in zip(seeds, stat["values"], strict=True) if seed in theirs]
    return over_runs([compare(*pair) for pair in pairs]) if pairs else None


def score_of(task: Mapping[str, Any]) -> Stat | None:
    """A task's first metric."""
    return next((value for key, value in task.items() if key not in NOT_COMPARED and "mean" in value), None)


def _mean(stat: Stat | None) -> float | None:
    return None if stat is None else stat["mean"]


def _text(stat: Stat | None, *, digits: int = 3, factor: int = 1, sign: str = "") -> str:
    if stat is None:
        return MISSING
    mean = f"{factor * stat['mean']:{sign}.{digits}f}".replace("-", "−")
    return mean if stat["stderr"] is None else f"{mean} ± {factor * stat['stderr']:.{digits}f}"


def _percent(stat: Stat | None) -> str:
    return _text(stat, digits=1, factor=100)


def _marked(stats: list[Stat | None], text: Any, choose: Any) -> list[tuple[str, bool]]:
    """Texts of a column, the best mean marked unless all are equal."""
    means = [stat["mean"] for stat in stats if stat is not None]
    best = choose(means) if len(set(means)) > 1 else None
    return [(text(stat), stat is not None and stat["mean"] == best) for stat in stats]


def _title(written: Mapping[str, Any]) -> str:
    seeds, variants = len(written["rng_seeds"]), len(written["variants"])
    return (f"{written['name']}: {variants} variant{'s' * (variants != 1)}, "
            f"{seeds} rng seed{'s' * (seeds != 1)}")  # fmt: skip
