"""report.md: a report in short for a model card or a repository. Results, cost, what each view says, figures as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from btx.markdown_text import literal
from btx.number_texts import MISSING, signed_percent
from btx.reporting.alignment import aligned_models
from btx.reporting.headline import Headline, headline
from btx.reporting.paired_bootstrap import chance_text
from btx.reporting.results import Cell, results_table
from btx.reporting.run_files import Run, stale_lines
from btx.reporting.views import View


def short_report(run: Run, views: Mapping[str, View]) -> str:
    """Markdown (GitHub's, with tables). Images are files beside it: `NAME.png` of every view with a chart."""
    parts = [f"# {literal(run.name)}"]
    if run.recipe.get("description"):
        parts.append(literal(run.recipe["description"]))
    parts += [f"**{literal(line)}**" for line in stale_lines(run)]
    line = headline(run.results, run.documents)
    if line is not None:
        parts.append(_headline(line))
    if run.results.get("models"):
        parts += ["## How good is every model?", *_tables(run)]
    for name, view in views.items():
        if view.answer or view.chart:
            image = f"![{literal(view.question)}]({name}.png)" if view.chart else ""
            parts += [f"## {view.question}", literal(view.answer), image]
    if models := aligned_models(run):
        parts.append("## What did alignment change?")
        parts += [literal(text) for model in models for text in (model.answer, model.routing)]
    parts.append("Written by `btx report`; `index.html` beside this file shows more.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(line: Headline) -> str:
    text = (
        f"**btx needs {line.mean:.3f} bits per byte** on average over {line.domains} held-out domains (lower is better)"
    )
    others = [f"{signed_percent(other.change)} against {literal(other.label)}{chance_text(other.p)}"
              for other in line.comparisons]  # fmt: skip
    tasks = [f" {literal(task.metric).capitalize()} on {literal(task.task)}: {100 * task.seed:.1f} % → "
             f"{100 * task.btx:.1f} %{chance_text(task.p)}." for task in line.tasks]  # fmt: skip
    return text + (": " + ", ".join(others) if others else "") + "." + "".join(tasks)


def _tables(run: Run) -> list[str]:
    """Quality, and cost, of every model."""
    table = results_table(run.results)
    quality = [[literal(row.name), *map(_text, row.quality)] for row in table.rows]
    costs = [[literal(row.name), *map(_text, row.costs)] for row in table.rows]
    names = map(literal, table.quality_titles(table.tasks))
    return [
        "Bits per byte of held-out text ± one standard error (lower is better)"
        + ("; scores of tasks in percent (higher is better)" if table.tasks else "")
        + f"; the best in bold{table.meanings}.",
        _table(["model", *names], quality),
        "Training after the seed model (the seed model's own row: its own), and parameters.",
        _table(["model", "tokens", "FLOPs", "time", "active parameters", "total parameters"], costs),
    ]


def _text(cell: Cell) -> str:
    text = literal(cell.text or MISSING)
    return (f"**{text}**" if cell.best else text) + (f" {literal(cell.error)}" if cell.error else "")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
