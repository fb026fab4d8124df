"""Several runs of one recipe with different rng seeds → mean and standard error of every number. Plain Python.

The standard errors inside one results.json are over documents of one run: they say nothing about what another random
start would have given. Here the runs are the sample. Differences to btx are taken run by run before they are averaged,
because what a run's models share (seed model, data, held-out text) cancels in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btx.errors import RunFolderError
from btx.number_texts import is_number
from btx.outputs import read_output
from btx.reporting.shapes import Results

QUALITY = ("domains", "mixed", "tasks", "mean_bits_per_byte", "learning_bits_per_byte", "keeping_bits_per_byte")
"""Parts of a model's entry of which differences are taken."""
NOT_COMPARED = {"stderr", "tokens", "bytes", "questions", "shots", "limit", "n", "truncated"}
"""Numbers in those parts that say how something was measured, not how well a model does."""


def read_results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """evaluate/results.json of each run folder, in order."""
    results = []
    for run in runs:
        path = run / "evaluate" / "results.json"
        read = read_output(path, Results)
        if read is None:
            raise RunFolderError(f"{path}: no results; finish the run, or `btx evaluate {run}`")
        results.append(read)
    return results


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over runs of every number in their results.

    Args:
        results: parsed results.json of runs that differ in their rng seed only, one at least.

    Returns:
        {"runs": number of results, "models": {NAME: entry}}. An entry has the keys of results.json's, each number in
        it replaced by {"mean", "stderr", "n", "values"}: stderr is the standard error of the mean over the n runs that
        have the number (None for a single one), values are in the order of `results`. What is no number (examples,
        texts) is left out. "difference_to_btx" holds the same for model minus btx, run by run: bits per byte (domains,
        mixed, mean) and the tasks' scores; btx itself has none.
    """
    if not results:
        raise ValueError("aggregate needs the results of one run at least")
    names = list(dict.fromkeys(name for result in results for name in result["models"]))
    models: dict[str, Any] = {}
    for name in names:
        entries = [result["models"][name] for result in results if name in result["models"]]
        models[name] = _numbers(entries)
        pairs = [(result["models"][name], result["models"]["btx"]) for result in results
                 if name in result["models"] and "btx" in result["models"]]  # fmt: skip
        if pairs and name != "btx":
            models[name]["difference_to_btx"] = _numbers([_difference(*pair) for pair in pairs])
    return {"runs": len(results), "models": models}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sample standard deviation / √n; None for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def over_runs(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "stderr", "n", "values"} of one number in n runs."""
    mean, stderr = mean_and_stderr(values)
    return {"mean": mean, "stderr": stderr, "n": len(values), "values": list(values)}


def _numbers(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries' common tree with every number's mean and standard error at its place."""
    tree: dict[str, Any] = {}
    for key in dict.fromkeys(key for entry in entries for key in entry):
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if all(isinstance(value, Mapping) for value in values):
            if below := _numbers(values):
                tree[key] = below
        elif all(is_number(value) for value in values):
            tree[key] = over_runs(values)
    return tree


def _difference(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """entry - reference of every score both have."""
    return {key: value for key in QUALITY if (value := _minus(entry.get(key), reference.get(key))) not in (None, {})}


def _minus(left: Any, right: Any) -> Any:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        differences = {key: _minus(left[key], right[key]) for key in left if key in right and key not in NOT_COMPARED}
        return {key: value for key, value in differences.items() if value not in (None, {})}
    return left - right if is_number(left) and is_number(right) else None
