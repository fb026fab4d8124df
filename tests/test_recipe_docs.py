"""The recipe's reference page and JSON schema are those of the schema in the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from btx.recipe.docs import recipe_page, write_pages
from btx.recipe.schema import Recipe

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["recipe.md", "recipe.schema.json"])
def test_the_committed_page_is_up_to_date(tmp_path: Path, name: str) -> None:
    write_pages(tmp_path)
    committed = (DOCS / name).read_text("utf-8")
    assert committed == (tmp_path / name).read_text("utf-8"), "run: python -m btx.recipe.docs docs"


def test_every_field_has_a_row_with_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*) \|$", recipe_page(), re.MULTILINE)
    assert all(kind.strip() and default.strip() and len(meaning) > 10 for _, kind, default, meaning in rows), rows
    names = {name for name, *_ in rows}
    fields: set[str] = set()
    for definition in [Recipe.model_json_schema(), *Recipe.model_json_schema()["$defs"].values()]:
        fields |= set(definition.get("properties", ()))
    assert names == fields


def test_values_and_defaults_are_in_words() -> None:
    page = recipe_page()
    assert "| `top_k` | whole number, above 0 | `2` |" in page
    assert "| `replay` | number, 0 to 1 | `0.1` |" in page
    assert "| `trainable` | `all`, `feed_forward`" in page
    assert "All [Training settings](#training-settings), and:" in page
    assert "All [Slurm job settings](#slurm-job-settings), and:" in page
    assert page.count("| `warmup_steps` |") == 3  # once for all training stages, once for baselines, once for align


def test_the_schema_is_json_schema_with_descriptions() -> None:
    schema = json.loads((DOCS / "recipe.schema.json").read_text("utf-8"))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Mix"]["properties"]["top_k"]["description"]
