"""The texts of `btx launch` as the engines themselves see them: submitted, validated, run to the end.

What is not installed skips itself: `pip install skypilot kubeflow-trainer-api`, `apt install slurm-wlm munge`.
"""

from __future__ import annotations

import os
import subprocess
import time
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from btx.choices.baselines import BASELINES
from btx.files import file_sha256
from btx.recipe.loading import load_recipe, packaged_recipes
from btx.recipe.schema import Recipe
from btx.running.launch_texts import launch_text
from tests import slurm_cluster
from tests.pico_run import pico_recipe, write_pico_recipe
from tests.processes import btx_here

MANY = ["device=cuda", f"baselines=[{','.join(BASELINES)}]", "launch.retries=2",
        "launch.processes={train: 2, finetune: 8}", "launch.nodes={finetune: 2}", "launch.kind=slurm"]  # fmt: skip


def recipes(folder: Path) -> list[Recipe]:
    return [*map(load_recipe, packaged_recipes()), pico_recipe(folder, "a run", *MANY)]


@pytest.mark.texts
def test_skypilot_takes_the_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot", exc_type=ImportError)
    from sky import Task
    from sky.utils.dag_utils import load_chain_dag_from_yaml

    for recipe in recipes(tmp_path):
        file = tmp_path / "sky.yaml"
        file.write_text(launch_text(recipe, "sky")["sky.yaml"])
        documents = list(yaml.safe_load_all(file.read_text()))
        pipeline = load_chain_dag_from_yaml(str(file))
        assert pipeline is not None
        assert pipeline.name == documents[0]["name"]
        assert [task.name for task in pipeline.tasks] == [document["name"] for document in documents[1:]]
        for document, task in zip(documents[1:], pipeline.tasks, strict=True):
            assert Task.from_yaml_config(deepcopy(document)).num_nodes == task.num_nodes == document["num_nodes"]
            (resources,) = task.resources
            gpus = resources.accelerators or {}
            wanted = document["resources"].get("accelerators", "H100:0").partition(":")[2]
            assert sum(gpus.values()) == int(wanted)


@pytest.mark.texts
def test_kubernetes_types_take_the_jobsets(tmp_path: Path) -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models",
        reason="Kubernetes' and JobSet's types are not installed: pip install kubeflow-trainer-api",
    )
    for recipe in recipes(tmp_path):
        config, jobset = yaml.safe_load_all(launch_text(recipe, "jobset")["jobset.yaml"])
        assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset  # a field it does not know is lost
        assert config["data"].keys() == {"recipe.yaml"}


@pytest.mark.texts
@pytest.mark.timeout(600)
def test_the_shell_script_trains_the_weights_of_btx_run(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    arguments = ["pico.yaml", "data.root=."]
    assert btx_here("launch", *arguments, "run=a $(run)", "--for", "shell", "-o", "it's a text", cwd=tmp_path)[0] == 0
    subprocess.run(["bash", tmp_path / "it's a text" / "run.sh"], cwd="/", check=True)
    assert btx_here("run", *arguments, cwd=tmp_path)[0] == 0
    assert sha256(tmp_path / "a $(run)") == sha256(tmp_path / "runs" / "pico")


@pytest.mark.slurm
@pytest.mark.timeout(600)
@pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=slurm_cluster.why_not() or "")
def test_slurm_takes_the_scripts_and_trains_the_weights_of_btx_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_pico_recipe(tmp_path)
    arguments = ["pico.yaml", "data.root=."]
    assert btx_here("launch", *arguments, "run=a run", "--for", "slurm", "-o", "texts", cwd=tmp_path)[0] == 0
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("s")) as cluster:
        environment = os.environ | cluster.environment
        (tmp_path / "a run" / "logs").mkdir(parents=True)
        for script in (tmp_path / "texts").glob("*.sbatch"):
            subprocess.run(["sbatch", "--test-only", script], env=environment, check=True)
        (tmp_path / "a run" / "logs").rmdir()
        (tmp_path / "a run").rmdir()
        submitted = subprocess.run(["bash", tmp_path / "texts" / "submit.sh"], env=environment, cwd="/", text=True,
                                   capture_output=True, check=True).stdout.splitlines()  # fmt: skip
        assert [line.split()[1] for line in submitted[1:3]] == ["data/tokenizer", "data/birds"]
        patience = time.monotonic() + 500
        while cluster.ask("squeue", "-h"):
            assert time.monotonic() < patience, cluster.ask("squeue")
            time.sleep(0.5)
    assert btx_here("run", *arguments, cwd=tmp_path)[0] == 0
    assert sha256(tmp_path / "a run") == sha256(tmp_path / "runs" / "pico")


def sha256(run: Path) -> str:
    return file_sha256(run / "finetune" / "model" / "model.safetensors")
