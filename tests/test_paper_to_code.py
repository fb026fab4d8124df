"""docs/paper-to-code.md names files, functions and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "paper-to-code.md").read_text("utf-8")


def names_in(path: Path) -> set[str]:
    """Functions and classes at the top of a file."""
    body = ast.parse(path.read_text("utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_file_function_and_test_named_exists() -> None:
    named = re.findall(r"`((?:src|tests|benchmarks)/[\w./]+\.py)(?:::?(\w+))?`", PAGE)
    assert len(named) > 40
    missing = [path for path, _ in named if not (ROOT / path).is_file()]
    missing += [
        f"{path}: {name}" for path, name in named
        if name and (ROOT / path).is_file() and name not in names_in(ROOT / path)
    ]  # fmt: skip
    assert not missing, "\n".join(missing)


def test_every_row_names_code_and_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) >= 3, row
        assert "`src/btx/" in cells[1], row
        assert "`tests/" in cells[2], row


def test_every_statement_under_tests_paper_is_named() -> None:
    stated = {
        name for path in (ROOT / "tests" / "paper").glob("test_*.py") for name in names_in(path)
        if name.startswith("test_")
    }  # fmt: skip
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "paper").glob("test_*.py")}
    assert stated
    assert all(file in PAGE for file in files), files


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
    assert len(pages) > 6
    dead = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not dead, dead
