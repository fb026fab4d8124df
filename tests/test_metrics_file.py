"""Reading metrics.jsonl while it grows, after a kill, and after somebody's edit."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest

from btx.errors import RunFolderError
from btx.metrics_file import LAST_BYTES, last_metrics, read_metrics
from btx.training.metrics import Metrics

LINES = [{"step": step, "loss": 4.0 - step, "wall_s": 0.5 * step, "load": [[0.75, 0.25]]} for step in (1, 2, 3)]
WHOLE = "".join(json.dumps(line) + "\n" for line in LINES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("stump", ["", '{"step": 4, "lo', '{"step": 4', "null"])
def test_a_line_that_is_being_written_or_was_cut_off_is_left_out(path: Path, stump: str) -> None:
    path.write_text(WHOLE + stump)
    assert read_metrics(path) == LINES
    assert last_metrics(path) == LINES[-1]


def test_without_a_file_there_is_nothing(path: Path) -> None:
    assert read_metrics(path) == []
    assert last_metrics(path) is None
    path.write_text('{"step": 1')
    assert last_metrics(path) is None


@pytest.mark.parametrize("broken", ["{oops", "[1]", '{"loss": 1.0}', '{"step": [1]}'])
def test_any_other_broken_line_is_named_or_skipped(path: Path, broken: str) -> None:
    path.write_text(f"{broken}\n{WHOLE}{broken}\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1: not a JSON object with a step"):
        read_metrics(path)
    assert read_metrics(path, skip_broken=True) == LINES
    assert last_metrics(path) == LINES[-1]


def test_the_last_line_is_found_however_long_lines_are(path: Path) -> None:
    long = [line | {"load": [[0.0625] * 16] * 1000} for line in LINES]
    text = "".join(json.dumps(line) + "\n" for line in long)
    path.write_text(text + text[: LAST_BYTES + 1])
    assert len(text) > 6 * LAST_BYTES
    assert last_metrics(path) == long[-1]


def test_a_resume_on_a_full_disk_loses_no_line(path: Path) -> None:
    path.write_text(WHOLE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # bytes that a file may have
    try:
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written"):
            Metrics(path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == WHOLE


def test_a_resumed_stage_goes_on_after_the_lines_of_the_steps_it_keeps(path: Path) -> None:
    path.write_text(f'{{oops\n{WHOLE}{{"step": 4, "lo')
    metrics = Metrics(path, 2)
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in LINES[:2])
    assert (metrics.wall_s, metrics.last_loss, metrics.loads) == (1.0, 2.0, [[[0.75, 0.25]]] * 2)
    with metrics.open() as file:
        metrics.write(file, {"step": 3, "loss": 1.5}, tokens=10, seconds=0.25)
    assert last_metrics(path) == {"step": 3, "loss": 1.5, "tokens_per_s": 40.0, "wall_s": 1.25}
    anew = Metrics(path, 0)
    assert (path.read_text(), anew.wall_s) == ("", 0.0)
    assert math.isnan(anew.last_loss)
