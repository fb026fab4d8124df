"""btx from a plain source tree: `PYTHONPATH=src python -m btx`, with no metadata of an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import btx
from tests.pico_run import write_pico_recipe

SOURCE = Path(btx.__file__).parents[1]
RECORDS = """
import json, sys
from importlib import metadata
from btx.model_files.provenance import versions
from btx.recipe.loading import load_recipe
from btx.run_folder.folder import RunFolder

run = RunFolder.create(load_recipe("pico.yaml", ["data.root=."]))
installed = sorted({found.name for found in metadata.distributions()})
print(json.dumps([installed, json.loads((run.path / "manifest.json").read_text("utf-8"))["versions"], versions()]))
"""
"""What a run and a mix write down about what made them."""


@pytest.fixture(scope="module")
def packages_without_btx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all packages of this interpreter but btx."""
    folder = tmp_path_factory.mktemp("packages")
    for installed in map(Path, sys.path):
        if installed.name in ("site-packages", "dist-packages") and installed.is_dir():
            for entry in installed.iterdir():
                if "branchtrainmix" not in entry.name and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
    return folder


def from_source(packages: Path, cwd: Path, *arguments: str) -> str:
    """What an interpreter prints that knows `packages` and btx's source tree; -S: no site-packages, no .pth files."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SOURCE, packages)))}
    done = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_runs_uninstalled_and_knows_its_version(packages_without_btx: Path, tmp_path: Path) -> None:
    assert from_source(packages_without_btx, tmp_path, "-m", "btx", "--version") == f"btx {btx.__version__}\n"


def test_a_run_and_a_mix_note_their_versions_uninstalled(packages_without_btx: Path, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    installed, of_run, of_mix = json.loads(from_source(packages_without_btx, tmp_path, "-c", RECORDS))
    assert "torch" in installed
    assert "branchtrainmix" not in installed
    assert of_run["branchtrainmix"] == of_mix["branchtrainmix"] == btx.__version__
    assert of_run.keys() == {"branchtrainmix", "torch", "transformers", "tokenizers", "safetensors", "numpy"}
