"""What the page shows, as the JSON that it carries: numbers of tables and charts, to be read by programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from btx.reporting.charts import DETAIL_POINTS, Curve, bucket_means
from btx.reporting.drawing import Chart
from btx.reporting.routing_view import most_frequent
from btx.reporting.run_files import Run


def page_data(run: Run, charts: Mapping[str, Chart]) -> dict[str, Any]:
    """The run's results, routing, changes by alignment and diagnostics as they stand in its files, and the values of
    every chart. Curves of training are averaged to `DETAIL_POINTS` points."""
    return {
        "name": run.name,
        "results": run.results,
        "routing": _routing(run),
        "aligned": run.aligned,
        "mix": run.mix.get("diagnostics", {}),
        "stages": {stage.name: stage.done for stage in run.stages},
        "charts": {chart.name: chart for chart in charts.values()},
    }


def script_text(data: Mapping[str, Any]) -> str:
    """JSON that a script element may hold: nothing in it ends the element or opens a comment. A half of a surrogate
    pair stays an escape, what is no finite number becomes null, a chart is an object of its values."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError):  # what is not finite; a chart
        text = json.dumps(_plain(data), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _routing(run: Run) -> dict[str, Any]:
    """routing.json, of many pairs of experts those that the page shows: of 128 experts there are 8128."""
    domains = {
        name: domain | ({"pairs": most_frequent(domain["pairs"])} if "pairs" in domain else {})
        for name, domain in run.routing.get("domains", {}).items()
    }
    pairs = {
        name: {pair: shares for pair, shares in of_domain.items() if pair in domains.get(name, {}).get("pairs", {})}
        for name, of_domain in run.statistics.get("pairs", {}).items()
    }
    statistics = run.statistics | ({"pairs": pairs} if pairs else {})
    return run.routing | ({"domains": domains} if domains else {}) | ({"statistics": statistics} if statistics else {})


def _plain(value: Any) -> Any:
    """A value as JSON has it: charts as objects, what is no finite number as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Curve) and not value.low and len(value.x) > DETAIL_POINTS:
        x, y = bucket_means(value.x, value.y, DETAIL_POINTS)
        value = dataclasses.replace(value, x=x, y=y)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(one) for one in value]
