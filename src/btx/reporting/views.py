"""The report's views: one question each, the sentence that answers it for this run, and the figure if there is one."""

from __future__ import annotations

from dataclasses import dataclass

from btx.reporting import figures, findings, routing_figures
from btx.reporting.drawing import Chart
from btx.reporting.results import results_table
from btx.reporting.run_files import Run


@dataclass(frozen=True)
class View:
    """One question of the report."""

    question: str
    answer: str
    """The sentence that answers it; "" where nothing was measured."""
    chart: Chart | None = None


def run_views(run: Run) -> dict[str, View]:
    """Name → view, in the report's order."""
    return {
        "domains": View("How much does each model save on each domain?", findings.gains(results_table(run.results)),
                        figures.domains_figure(run)),
        "learning": View("What did each model learn, and what did it keep?", findings.learning(run),
                         figures.learning_figure(run)),
        "cost": View("What did the models cost, and what did they gain by it?", findings.cost(run),
                     figures.cost_figure(run)),
        "predicted": View("Did it gain what was predicted?", findings.predicted(run)),
        "oracle": View("What was there to gain before the finetuning?", findings.oracle(run)),
        "training": View("Did training go well?", findings.training(run)),
        "routing": View("Does each domain go to its own expert?", findings.routing(run),
                        routing_figures.own_load_figure(run)),
        "specialisation": View("How much does the expert tell of the domain?", findings.specialisation(run),
                               routing_figures.specialisation_figure(run)),
        "similarity": View("Do layers route alike?", findings.similarity(run), routing_figures.similarity_figure(run)),
        "used_for": View("What is each expert used for?", findings.used_for(run)),
        "lag": View("How fast does routing follow a change of domain?", findings.lag(run),
                    routing_figures.lag_figure(run)),
        "kept": View("How many experts are needed?", findings.kept(run), routing_figures.kept_figure(run)),
    }  # fmt: skip
