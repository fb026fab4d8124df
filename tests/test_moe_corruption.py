"""Corrupted folders in extend and drop: harmless, or refused with a message that names the file; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from btx.errors import UserError
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from tests.test_mix_corruption import CHANGES

MakeLlama = Callable[..., Path]
FILES = ("config.json", "model.safetensors", "mix.json")


@pytest.fixture
def folders(make_llama: MakeLlama, tmp_path: Path) -> dict[str, Path]:
    """A MoE model of three experts, and a dense one that fits it."""
    mix(make_llama("seed"), {"a": make_llama("a", 1), "b": make_llama("b", 2)}, tmp_path / "moe")
    return {"moe": tmp_path / "moe", "law": make_llama("law", 3)}


def check(folders: dict[str, Path], file: Path) -> None:
    """extend and drop end with a model that transformers loads whole, or with a refusal that names the folder."""
    output = folders["moe"].parent / "out"
    for action in (
        lambda: extend(folders["moe"], "law", folders["law"], output),
        lambda: drop(folders["moe"], "a", output),
    ):
        shutil.rmtree(output, ignore_errors=True)
        refused = None
        try:
            action()
        except UserError as error:
            refused = str(error)
        if refused is not None:
            assert not output.exists()
            assert str(file.parent) in refused
            continue
        _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whose=st.sampled_from(["moe", "law"]), name=st.sampled_from(FILES), change=st.sampled_from(CHANGES),
    at=st.floats(0, 1) | st.floats(0, 0.02), value=st.integers(0, 255),
)  # fmt: skip
def test_a_corrupted_file_is_harmless_or_refused_by_name(
    folders: dict[str, Path], whose: str, name: str, change: Callable[..., bytes], at: float, value: int
) -> None:
    file = folders[whose] / name
    if not file.exists():
        return
    content = file.read_bytes()
    file.write_bytes(change(content, at, value))
    try:
        check(folders, file)
    finally:
        file.write_bytes(content)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whose=st.sampled_from(["moe", "law"]), name=st.sampled_from(["config.json", "mix.json"]), data=st.data())
def test_a_changed_json_value_is_harmless_or_refused_by_name(
    folders: dict[str, Path], whose: str, name: str, data: st.DataObject
) -> None:
    file = folders[whose] / name
    if not file.exists():
        return
    content = file.read_bytes()
    value = json.loads(content)
    key = data.draw(st.sampled_from(sorted(value)))
    new: Any = data.draw(st.sampled_from([None, 0, -1, 7, 1e9, "x", [], {}, True]))
    file.write_text(json.dumps(value | {key: new}))
    try:
        check(folders, file)
    finally:
        file.write_bytes(content)
