"""What the recipe asks of Slurm, and the batch script made of it; that Slurm reads it so is in test_slurm.py."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from btx.errors import RecipeError, UserError
from btx.recipe.launch import Launch
from btx.run_folder.stages_of_recipe import build_graph
from btx.running.launchers.slurm_script import sbatch_script
from tests.pico_run import pico_recipe

SLURM: dict[str, Any] = {
    "account": "lab", "gres": "gpu:4", "time": "12:00:00", "setup": ["module load cuda"], "options": ["--mem=0"],
    "grace_s": 300,
    "stages": {"finetune": {"gres": "gpu:8", "partition": "large"}, "report": {"gres": "", "options": []}},
}  # fmt: skip


def options(*stages: str, **launch: Any) -> list[str]:
    """What the script of a job asks of Slurm."""
    script = sbatch_script(Path("/r"), stages, Path("/r/logs/x.log"), Launch(kind="slurm", slurm=SLURM, **launch))
    return [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_job_asks_for_what_its_kind_of_stage_asks_for() -> None:
    assert {"--account=lab", "--gres=gpu:4", "--time=12:00:00", "--mem=0"} <= set(options("train/math"))
    asked = options("finetune")
    assert {"--gres=gpu:8", "--partition=large", "--account=lab", "--mem=0"} <= set(asked)
    for stage in ("data/math", "report"):
        assert not [option for option in options(stage) if option.startswith("--gres")]
    assert "--mem=0" not in options("report")


def test_machines_and_processors_are_those_of_the_stages() -> None:
    launch = {"nodes": {"finetune": 4}, "processes": {"finetune": 32}, "threads": 16}
    assert {"--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=16"} <= set(options("finetune", **launch))
    assert "--nodes=1" in options("train/math", **launch)
    assert not [option for option in options("train/math") if option.startswith("--cpus-per-task")]


def test_only_what_saves_as_it_goes_is_told_to_before_its_time_is_over() -> None:
    assert "--signal=TERM@300" in options("mix", "finetune")
    assert not [option for option in options("evaluate", "analyze", "report") if option.startswith("--signal")]
    for stage in ("finetune", "evaluate"):  # but a preempted one begins again, and every one adds to its log
        assert {"--requeue", "--open-mode=append"} <= set(options(stage))


def test_a_job_finds_the_same_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/it's here")
    script = sbatch_script(Path("/r o"), ["train/a"], Path("/x"), Launch(kind="slurm", slurm=SLURM))
    words = shlex.split(script, comments=True)
    assert words[words.index(sys.executable) :][:7] == [sys.executable, "-P", "-m", "btx", "work", "/r o", "train/a"]
    assert "PYTHONPATH=/it's here" in words
    assert script.index("module load cuda\n") < script.index("\nsrun ")


def test_a_path_that_no_batch_script_can_hold_is_refused() -> None:
    for name in ("a\nb", "a\\b"):
        with pytest.raises(UserError, match="line break or a backslash"):
            sbatch_script(Path("/") / name, ["seed"], Path("/") / name / "x.log", Launch(kind="slurm"))


@pytest.mark.parametrize(("setting", "told"), [
    ("options=[--array=1-3]", "--array is what btx gives sbatch itself"),
    ("options=[--output=x]", "--output is what btx gives sbatch itself"),
    ("options=['-p x']", "`--NAME` or `--NAME=VALUE`"),
    ('options=["--comment=a\\nb"]', "`--NAME` or `--NAME=VALUE`"),
    ("time=90", "put it in quotes"),
    ("time=1h", "minutes, hours:minutes:seconds or days-hours"),
    ("partition='a; rm -rf /'", "letters, digits"),
    ('setup=["a\\nb"]', "a line of bash has no line break"),
    ("stages.fintune.gres=gpu", "fintune"),
])  # fmt: skip
def test_what_would_be_another_job_is_refused(tmp_path: Path, setting: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        pico_recipe(tmp_path, "run", "launch.kind=slurm", f"launch.slurm.{setting}")


@pytest.mark.parametrize(("setting", "expected"), [
    ("launch.threads=1", ["mix baselines/soup finetune", "evaluate analyze report"]),
    ("launch.processes.finetune=2", ["mix baselines/soup", "finetune", "evaluate analyze report"]),
    ("launch.slurm.stages.evaluate.gres='gpu:1'", ["mix baselines/soup finetune", "evaluate", "analyze report"]),
])  # fmt: skip
def test_stages_share_a_job_only_if_they_need_the_same(tmp_path: Path, setting: str, expected: list[str]) -> None:
    graph = build_graph(pico_recipe(tmp_path, "run", "launch.kind=slurm", setting))
    jobs = [" ".join(stage.name for stage in job) for job in graph.jobs()]
    assert jobs[-len(expected) :] == expected


def test_without_slurm_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btx.running.pipeline import run

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        run(pico_recipe(tmp_path, "run", "launch.kind=slurm"))
    assert not (tmp_path / "run").exists()
