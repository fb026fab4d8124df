"""examples/*.ipynb: they are clean, use what there is, and run; a kernel survives what a user does to it."""

from __future__ import annotations

import ast
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import btx
from tests.pico_run import write_pico_recipe

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
Cell = dict[str, Any]


def cells_of(notebook: Path, kind: str) -> list[str]:
    found = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_two() -> None:
    assert [file.stem for file in EXAMPLES] == ["mix_your_own", "whole_method"]


@pytest.mark.parametrize("notebook", EXAMPLES, ids=lambda file: file.stem)
def test_a_notebook_is_clean(notebook: Path) -> None:
    found = json.loads(notebook.read_text("utf-8"))
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    assert found["cells"][0]["source"][0].startswith("# ")
    assert max(len(line.rstrip("\n")) for cell in found["cells"] for line in cell["source"]) <= 125


@pytest.mark.parametrize("notebook", EXAMPLES, ids=lambda file: file.stem)
def test_a_notebook_uses_only_what_btx_has(notebook: Path) -> None:
    tree = ast.parse("\n".join(cells_of(notebook, "code")))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "btx"
    }
    assert used
    assert used <= set(btx.__all__)


# With a kernel


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str] | Path], Any]:
    """A client that runs cells in a kernel of this Python, in an empty folder."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    specification = tmp_path / "jupyter" / "kernels" / "python3"
    specification.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (specification / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def make(cells: list[str] | Path) -> Any:
        if isinstance(cells, Path):
            notebook = nbformat.read(cells, 4)
            nbformat.validate(notebook)
        else:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
        resources = {"metadata": {"path": str(tmp_path)}}
        return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)

    return make


def shown(client: Any, kind: str) -> list[str]:
    """Everything of a kind that cells have shown: text/html, text/plain, stream."""
    outputs = [output for cell in client.nb.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.get("text", "") if kind == "stream" else output["data"].get(kind, "") for output in outputs
            if (output.output_type == "stream") == (kind == "stream")]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("notebook", EXAMPLES, ids=lambda file: file.stem)
def test_a_notebook_runs(notebook: Path, kernel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENS", "12_000")
    client = kernel(notebook)
    client.execute()  # an error in a cell is raised here
    text = "".join(shown(client, "stream"))
    assert "\x1b" not in text, "steers a terminal"
    assert "Warning" not in text
    assert "says:" in text
    html = "".join(shown(client, "text/html"))
    if notebook.stem == "whole_method":
        assert html.count("<svg") >= 1
        assert "not evaluated yet" in html
        assert (tmp_path / "runs/whole-method/report/index.html").is_file()
        assert "expert/knowledge" in html
    else:
        (table,) = [plain for plain in shown(client, "text/plain") if "random  ridge" in plain]
        rows = {line.split()[0]: float(line.split()[2]) for line in table.splitlines()[1:]}
        assert rows["math"] > 0.5
        assert rows["code"] > 0.5


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_kernel_lives_on_after_an_interrupt_and_after_an_error_and_the_run_goes_on(
    kernel: Any, tmp_path: Path
) -> None:
    write_pico_recipe(tmp_path)
    load = (
        "import btx; recipe = btx.load_recipe('pico.yaml', ['data.root=.', 'run=run', 'seed_model.train.tokens=100e3'])"
    )
    client = kernel([load, "btx.run(recipe, until='seed')", "btx.evaluate('nothing')", "print('alive')",
                     "recipe = btx.load_recipe('run', ['seed_model.train.tokens=100e3'])",
                     "btx.run(recipe, until='seed').done('seed')['steps']"])  # fmt: skip
    client.allow_errors = True
    interrupted = threading.Thread(target=_interrupt, args=(client, tmp_path / "run/seed/metrics.jsonl"))
    interrupted.start()
    client.execute()
    interrupted.join()
    names = [[output.ename for output in cell.outputs if output.output_type == "error"] for cell in client.nb.cells]
    assert names == [[], ["Interrupted"], ["RunFolderError"], [], [], []]
    assert "391" in client.nb.cells[5].outputs[-1]["data"]["text/plain"]
    assert "resumed after step" in "".join(shown(client, "stream"))


def _interrupt(client: Any, metrics: Path) -> None:
    """Interrupt the kernel once training goes on."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 2):
        time.sleep(0.05)
    import asyncio

    asyncio.run(client.km.interrupt_kernel())
