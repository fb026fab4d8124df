"""docs/faults.md names tests that exist, and all tests of faults."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_paper_to_code import ROOT, names_in

PAGE = (ROOT / "docs" / "faults.md").read_text("utf-8")


def test_every_fault_has_a_test_that_exists() -> None:
    rows = [
        line for line in PAGE.splitlines() if re.match(r"\| (?!fault|\||complete|known|one at work|progress)", line)
    ]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert name in names_in(ROOT / path), f"{path}::{name}"


def test_every_test_of_a_fault_is_named() -> None:
    files = sorted((ROOT / "tests" / "faults").glob("test_*.py"))
    there = {name for path in files if path != Path(__file__) for name in names_in(path) if name.startswith("test_")}
    assert not {name for name in there if name not in PAGE}
