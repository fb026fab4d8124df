"""Tab offers names of recipes, stages, domains and models, without torch and without an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from btx.cli import main
from btx.run_folder.folder import RunFolder
from tests.pico_run import pico_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with results of two models."""
    run = RunFolder.create(pico_recipe(tmp_path_factory.mktemp("tab"), "run", "baselines=[dense_cm, soup]"))
    (run.path / "evaluate").mkdir()
    (run.path / "evaluate" / "results.json").write_text(json.dumps({"models": {"seed": {}, "btx": {}}}))
    return run.path


def offered(words: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is told after these words; a word that begins stands last, else a blank does."""
    patch.setenv("_BTX_COMPLETE", "complete_bash")
    patch.setenv("COMP_WORDS", words)
    patch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    patch.setattr("sys.argv", ["btx"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.main()
    told = capsys.readouterr()
    assert told.err == ""
    return told.out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("btx cp de", {"demo"}),
        ("btx plan smol", {"smollm2-135m"}),
        ("btx run RUN --until f", {"finetune"}),
        ("btx run demo --until fi", {"finetune"}),
        ("btx train RUN ", {"seed", "birds", "tools"}),
        ("btx train RUN b", {"birds"}),
        ("btx adopt RUN t", {"tools"}),
        ("btx baselines RUN ", {"dense_cm", "soup"}),
        ("btx compare RUN ", {"seed", "btx"}),
        ("btx compare RUN btx s", {"seed"}),
        ("btx ls ro", {"routers"}),
        ("btx mix --merge sl", {"slerp"}),
        ("btx mix --router-init ri", {"ridge"}),
        ("btx export RUN --to o", {"ollama"}),
        ("btx train /nowhere b", set()),
        ("btx exp", {"export"}),
    ],
)
def test_what_is_offered(
    run: Path, words: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(offered(words.replace("RUN", str(run)), monkeypatch, capsys)) == expected


def test_recipes_here_are_offered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo-of-mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert offered("btx run demo", monkeypatch, capsys) == ["demo", "demo-of-mine.yaml"]
    (tmp_path / "below" / "run").mkdir(parents=True)
    (tmp_path / "below" / "run" / "recipe.yaml").touch()
    assert offered("btx run ./de", monkeypatch, capsys) == ["./demo-of-mine.yaml"]
    assert offered("btx run below/", monkeypatch, capsys) == ["below/run"]
    assert offered(f"btx run {tmp_path}/d", monkeypatch, capsys) == [f"{tmp_path}/demo-of-mine.yaml"]


def test_results_that_cannot_be_read_offer_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(pico_recipe(tmp_path, "run"))
    (run.path / "evaluate").mkdir()
    (run.path / "evaluate" / "results.json").write_text('{"models": ')
    assert offered(f"btx compare {run.path} ", monkeypatch, capsys) == []


def test_tab_loads_no_torch_and_a_script_for_the_shell_is_printed(run: Path) -> None:
    program = (
        "import sys, os; from btx.cli import main\n"
        "sys.argv = ['btx']\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "print('loaded', [name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)\n"
    )
    words = {"_BTX_COMPLETE": "complete_bash", "COMP_WORDS": f"btx compare {run} ", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | words,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stderr.strip() == "loaded []"
    shown = subprocess.run(["bash", "-c", f"{sys.executable} -m btx --show-completion; true"], capture_output=True,
                           text=True, timeout=60)  # fmt: skip
    assert "complete -o default -F _btx_completion btx" in shown.stdout
