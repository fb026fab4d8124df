"""`btx launch`: a run as text to submit by hand, for Slurm, Kubernetes, SkyPilot and the shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from btx.choices.baselines import BASELINES
from btx.errors import UserError
from btx.recipe.loading import load_recipe, packaged_recipes, parse_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.running.launch_texts import TEXTS, launch_text
from tests.pico_run import pico_recipe, write_pico_recipe
from tests.processes import btx_here

FAKE_BTX = """#!/usr/bin/env bash
# In place of `python -P -m btx`: writes down what it is told and when; ends with the exit codes laid out for a stage.
set -eu
shift
cd {folder}
if [ "$3" = begin ]; then cat "$4" >begun.yaml; exit; fi
file=codes-${{5//\\//-}} code=0
echo "start ${{*:5}}" >>calls
trap 'echo "told $5" >>calls; exit 143' TERM
if [ "$5" = train/tools ] && [ -e hold-train-birds ]; then
    until grep -qx "start train/birds" calls; do sleep 0.05; done
    rm hold-train-birds
fi
while [ -e "hold-${{5//\\//-}}" ]; do sleep 0.05; done
if [ -s "$file" ]; then code=$(head -n 1 "$file"); sed -i 1d "$file"; fi
echo "what $5 says"
if [ "$code" -eq 0 ]; then echo "end $5" >>calls; fi
exit "$code"
"""
FAKE_SBATCH = """#!/usr/bin/env bash
set -eu
printf '%s\\n' "$*" >>{folder}/calls
[ "$(wc -l <{folder}/calls)" -ne "${{FAIL_AT:-0}}" ] || exit 1
echo "$((100 + $(wc -l <{folder}/calls)));cluster"
"""
ALL_BASELINES = f"baselines=[{','.join(BASELINES)}]"


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.format(folder=shlex.quote(str(file.parent))))
    file.chmod(0o755)
    return file


def needs_of(recipe: Recipe) -> dict[str, set[str]]:
    """Stage → all stages that have to be finished before it, by the graph."""
    behind: dict[str, set[str]] = {}
    for stage in RunFolder(Path(recipe.run_folder), recipe).graph:
        behind[stage.name] = {name for need in stage.needs for name in (need.name, *behind[need.name])}
    return behind


def in_order(recipe: Recipe, jobs: dict[str, tuple[list[str], list[str]]]) -> bool:
    """Whether jobs, name → (stages, names of jobs that end before), do every stage once, with all it needs before."""
    ended: dict[str, set[str]] = {}
    done: list[str] = []
    needs = needs_of(recipe)
    for name, (stages, after) in jobs.items():
        there = {stage for other in after for stage in ended[other]}
        for stage in stages:
            assert needs[stage] <= there, (stage, needs[stage] - there)
            there.add(stage)
        ended[name] = there
        done += stages
    return sorted(done) == sorted(needs)


def stages_in(script: str) -> list[list[str]]:
    """Stages of every `btx work` in a script."""
    return [line.split()[1:] for line in re.findall(r"btx work (\S+ [^;\n]+)", script)]


@pytest.fixture(params=["demo", "paper-table2", "everything"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    if request.param == "everything":
        return pico_recipe(tmp_path, "run", ALL_BASELINES, "launch.retries=2")
    return load_recipe(request.param)


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "shell"])
def test_every_packaged_recipe_can_be_launched_by_hand(kind: str, name: str) -> None:
    recipe = load_recipe(name)
    for file, text in launch_text(recipe, kind).items():
        assert text.startswith("#")
        assert text.endswith("\n")
        if file.endswith(".yaml"):
            assert all(yaml.safe_load_all(text))
        if recipe.device == "cuda" and file.startswith(("train", "finetune")):
            assert "#SBATCH --gres=gpu:" in text


def test_the_text_holds_the_recipe_and_the_folder_it_is_run_in(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["mix.top_k=1", f"run={tmp_path}/a run"])
    held = {
        "shell": re.search(r"<<'RECIPE'\n(.*)RECIPE\n", launch_text(recipe, "shell")["run.sh"], re.DOTALL)[1],
        "slurm": re.search(r"<<'RECIPE'\n(.*)RECIPE\n", launch_text(recipe, "slurm")["submit.sh"], re.DOTALL)[1],
        "jobset": next(yaml.safe_load_all(launch_text(recipe, "jobset")["jobset.yaml"]))["data"]["recipe.yaml"],
        "sky": re.search(r"<<'RECIPE'\n(.*)RECIPE\n",
                         list(yaml.safe_load_all(launch_text(recipe, "sky")["sky.yaml"]))[1]["run"], re.DOTALL)[1],
    }  # fmt: skip
    for kind, text in held.items():
        assert parse_recipe(text, kind).model_copy(update={"launch": recipe.launch}) == recipe, kind
    assert parse_recipe(held["slurm"], "slurm").launch.kind == "slurm"


# ---- Kubernetes


def jobset_of(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    _, jobset = yaml.safe_load_all(launch_text(recipe, "jobset")["jobset.yaml"])
    return jobset, jobset["spec"]["replicatedJobs"]


def container_of(part: dict[str, Any]) -> dict[str, Any]:
    return part["template"]["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def test_a_jobset_does_every_stage_after_all_it_needs(recipe: Recipe) -> None:
    jobset, parts = jobset_of(recipe)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jobs = {}
    for part in parts:
        works = stages_in(container_of(part)["command"][-1])
        assert part["template"]["spec"]["completions"] == len(works)
        after = [need["name"] for need in part.get("dependsOn", [])]
        assert {need["status"] for need in part.get("dependsOn", [])} <= {"Complete"}
        assert len(after) <= 5
        for number, stages in enumerate(works):  # indexes of one Job do not wait for each other
            before = [job for job in jobs if job.split()[0] in after]
            jobs[f"{part['name']} {number}"] = (stages, before)
    assert in_order(recipe, jobs)
    assert "dependsOn" not in parts[0]


def test_a_jobset_has_names_that_kubernetes_takes(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    recipe = load_recipe(str(tmp_path / "pico.yaml"), [
        "name=2_Long.name-" + "x" * 40, "train.domains=[birds,Bir_ds,bir.ds]",
        "data.domains={birds: a, Bir_ds: a, bir.ds: a, general: a}", ALL_BASELINES,
    ])  # fmt: skip
    jobset, parts = jobset_of(recipe)
    names = [part["name"] for part in parts]
    assert len(set(names)) == len(names)
    for name in [jobset["metadata"]["name"], *names]:
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(f"{jobset['metadata']['name']}-{name}-0-99-abcde") <= 63


def test_a_pod_that_is_evicted_goes_on_and_a_users_mistake_is_not_tried_again(recipe: Recipe) -> None:
    for part in jobset_of(recipe)[1]:
        job = part["template"]["spec"]
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # else there may be no podFailurePolicy
        assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
        assert job["backoffLimitPerIndex"] == recipe.launch.retries
        rules = [
            (rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in job["podFailurePolicy"]["rules"]
        ]
        assert rules == [("Ignore", None), ("Ignore", [75, 143]), ("FailIndex", [2])]


def test_a_jobset_asks_for_gpus_and_for_machines_that_find_each_other(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "device=cuda", "launch.processes={train: 2, finetune: 8}",
                         "launch.nodes={finetune: 2}", "launch.jobs=1",
                         "launch.retries=3", "baselines=[]")  # fmt: skip
    parts = {part["name"]: part for part in jobset_of(recipe)[1]}
    gpus = {name: container_of(part).get("resources", {}).get("limits", {}) for name, part in parts.items()}
    assert gpus["data"] == {}
    assert gpus["seed"] == gpus["evaluate"] == {"nvidia.com/gpu": 1}
    assert gpus["train"] == {"nvidia.com/gpu": 2}
    assert parts["train"]["template"]["spec"]["parallelism"] == 1  # launch.jobs
    (spread,) = [part for part in parts.values() if "finetune" in container_of(part)["command"][-1]]
    assert container_of(spread)["resources"]["limits"] == {"nvidia.com/gpu": 4}
    job = spread["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 2, 6)
    environment = {entry["name"]: entry for entry in container_of(spread)["env"]}
    assert list(environment) == ["BTX_JOB", "BTX_HEAD", "BTX_NODE"]  # $(BTX_JOB) is read from what stands before
    assert environment["BTX_HEAD"]["value"] == f"pico-{spread['name']}-$(BTX_JOB)-0.pico"


def test_kubernetes_expands_nothing_in_a_path(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "$(HOME) $$ it's")
    part = jobset_of(recipe)[1][1]
    script = container_of(part)["command"][-1]
    as_kubernetes_reads_it = re.sub(r"\$(\$|\(\w+\))", lambda seen: "$" if seen[1] == "$" else "EXPANDED", script)
    told = subprocess.run(
        ["bash", "-c", as_kubernetes_reads_it.replace("exec btx work", "printf %s")],
        env={"JOB_COMPLETION_INDEX": "0", "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told.startswith(recipe.run_folder)


# ---- SkyPilot


def tasks_of(recipe: Recipe) -> list[dict[str, Any]]:
    header, *tasks = yaml.safe_load_all(launch_text(recipe, "sky")["sky.yaml"])
    assert list(header) == ["name"]
    return tasks


def nodes_do(task: dict[str, Any], folder: Path) -> list[str]:
    """What the nodes of a task run, as bash reads the script."""
    ips = "\n".join(f"10.0.0.{number}" for number in range(1, task["num_nodes"] + 1))
    script = task["run"].replace("exec btx", "fake").replace("btx begin", "fake begin")
    script = 'fake() { cat >/dev/null; echo "${BTX_HEAD:-} ${BTX_NODE:-} $*"; }\ncd() { :; }\n' + script
    return [
        subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True, input="",
                       env={"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": ips, "PATH": os.environ["PATH"]},
                       ).stdout.splitlines()[-1]
        for rank in range(task["num_nodes"])
    ]  # fmt: skip


def test_a_sky_pipeline_does_every_stage_after_all_it_needs(recipe: Recipe) -> None:
    jobs: dict[str, tuple[list[str], list[str]]] = {}
    for task in tasks_of(recipe):
        works, before = stages_in(task["run"]), list(jobs)
        assert task["num_nodes"] == len(works)
        jobs |= {f"{task['name']} {number}": (stages, before) for number, stages in enumerate(works)}
    assert in_order(recipe, jobs)


def test_the_nodes_of_a_sky_task_share_its_jobs_and_find_each_other(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "a run", "launch.kind=slurm", "launch.processes={train: 4}",
                         "launch.nodes={train: 2}", "baselines=[]")  # fmt: skip
    tasks = {task["name"]: task for task in tasks_of(recipe)}
    run = recipe.run_folder
    assert nodes_do(tasks["seed"], tmp_path) == [f"  work {run} seed"]
    assert nodes_do(tasks["train"], tmp_path) == [
        f"10.0.0.1 0 work {run} train/birds", f"10.0.0.1 1 work {run} train/birds",
        f"10.0.0.3 0 work {run} train/tools", f"10.0.0.3 1 work {run} train/tools",
    ]  # fmt: skip
    one_at_a_time = {task["name"]: task for task in tasks_of(pico_recipe(tmp_path, "run", "launch.jobs=1"))}
    assert nodes_do(one_at_a_time["train"], tmp_path) == [f"  work {tmp_path}/run train/birds train/tools"]


# ---- the shell


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """shell(overrides) → the script of the pico recipe, in a folder where a program in btx's place writes."""

    def make(*overrides: str) -> Path:
        folder = tmp_path / 'it\'s $HOME; a "place"'
        monkeypatch.setattr(sys, "executable", str(program(folder / "fake btx", FAKE_BTX)))
        monkeypatch.chdir(folder)
        script = folder / "run.sh"
        text = launch_text(pico_recipe(folder, "a run", *overrides), "shell")["run.sh"]
        script.write_text(text.replace("again_s=60", "again_s=0").replace("sleep 0.3", "sleep 0.05"))
        return script

    return make


def run_script(script: Path, **codes: list[int]) -> tuple[int, list[tuple[str, str]], str]:
    """Exit code of the script, what its jobs did in order (start, end or told, stages), and what it said.

    Args:
        codes: job, with _ for /, → exit codes of its first starts.
    """
    calls = script.with_name("calls")
    calls.unlink(missing_ok=True)
    for job, ends in codes.items():
        script.with_name(f"codes-{job.replace('_', '-')}").write_text("".join(f"{code}\n" for code in ends))
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd="/", timeout=60)
    told = [tuple(line.split(" ", 1)) for line in calls.read_text().splitlines()]
    return done.returncode, told, done.stdout + done.stderr  # type: ignore[return-value]


def test_the_shell_script_does_every_stage_after_all_it_needs_and_no_more_jobs_at_once_than_asked_for(
    shell: Callable[..., Path],
) -> None:
    script = shell(ALL_BASELINES, "launch.jobs=3")
    script.with_name("hold-train-birds").touch()  # until train/tools runs beside it
    code, told, said = run_script(script)
    assert code == 0, said
    recipe = parse_recipe(script.with_name("begun.yaml").read_text(), "begun")
    needs, started, ended, most = needs_of(recipe), dict[str, list[str]](), set[str](), 0
    for what, name in told:
        if what == "start":
            stages = name.split()
            assert set.union(*(needs[stage] for stage in stages)) <= ended | set(stages)
            started[stages[0]] = stages
            most = max(most, len(started))
        else:
            ended |= set(started.pop(name))
    assert ended == needs.keys()
    assert 2 <= most <= 3
    assert (Path(recipe.run_folder) / "logs" / "train-birds.log").read_text() == "what train/birds says\n"


def test_a_failed_job_is_tried_again_and_leaves_those_alone_that_do_not_need_it(shell: Callable[..., Path]) -> None:
    script = shell("launch.retries=1")
    code, told, said = run_script(script, data_birds=[3], train_birds=[75, 75, 1, 75, 4], train_tools=[0])
    assert code == 4
    assert told.count(("start", "data/birds")) == 2
    assert told.count(("start", "train/birds")) == 5  # 75 is no failure
    assert ("end", "train/tools") in told
    assert "train/birds: failed (exit code 4):\nwhat train/birds says" in said
    assert "mix: not begun, what it needs failed" in said
    assert not [name for what, name in told if name.startswith("mix")]
    assert run_script(script)[0] == 0  # again, and it goes on to the end


def test_what_the_user_has_to_mend_is_not_tried_again(shell: Callable[..., Path]) -> None:
    code, told, _ = run_script(shell("launch.retries=5"), seed=[2])
    assert code == 2
    assert told.count(("start", "seed")) == 1


def test_a_job_that_was_told_to_end_ends_the_script_and_is_not_tried_again(shell: Callable[..., Path]) -> None:
    code, told, said = run_script(shell("launch.retries=5"), train_birds=[143])
    assert code == 143
    assert told.count(("start", "train/birds")) == 1
    assert "stopped; run this script again and it continues" in said


def test_a_script_that_is_told_to_end_has_its_jobs_save(shell: Callable[..., Path]) -> None:
    script = shell()
    hold = script.with_name("hold-train-tools")
    hold.touch()
    running = subprocess.Popen(["bash", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    calls, patience = script.with_name("calls"), time.monotonic() + 60
    while not (calls.exists() and "start train/tools" in calls.read_text()):
        assert time.monotonic() < patience
        time.sleep(0.05)
    time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "told train/tools" in calls.read_text()
    assert "start mix" not in calls.read_text()
    assert said == "stopped; run this script again and it continues\n"


def test_a_shell_script_is_of_one_machine(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "launch.processes=4", "launch.nodes={finetune: 2}")
    with pytest.raises(UserError, match=r"--for shell: launch.nodes gives (mix|finetune) 2 machines"):
        launch_text(recipe, "shell")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt install shellcheck")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run")
    for kind in ("shell", "slurm"):
        for name, text in launch_text(recipe, kind).items():
            (tmp_path / name).write_text(text)
    subprocess.run(["shellcheck", *tmp_path.glob("*.sh"), *tmp_path.glob("*.sbatch")], check=True)


# ---- Slurm


def test_slurm_jobs_wait_for_those_they_need(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "it's here"
    monkeypatch.setattr(sys, "executable", str(program(here / "fake btx", FAKE_BTX)))
    monkeypatch.chdir(tmp_path)
    texts = launch_text(recipe, "slurm")
    for name, text in texts.items():
        (here / name).write_text(text)
    program(here / "sbatch", FAKE_SBATCH)
    environment = {"PATH": f"{here}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", here / "submit.sh"], env=environment, capture_output=True, text=True, check=True)
    jobs: dict[str, tuple[list[str], list[str]]] = {}
    for number, line in enumerate((here / "calls").read_text().splitlines(), 101):
        told = re.fullmatch(r"--parsable (?:--dependency=afterok:([\d:]+) --kill-on-invalid-dep=yes )?(.*)", line)
        assert told is not None, line
        script = texts[Path(told[2]).name]
        (work,) = re.findall("btx work (.*) \\|\\| exit_code", script)
        jobs[str(number)] = (shlex.split(work)[1:], told[1].split(":") if told[1] else [])
    assert in_order(recipe, jobs)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(jobs)
    logs = Path(recipe.run_folder).absolute() / "logs"
    assert logs.is_dir()
    assert f"--output={logs}" in texts["seed.sbatch"].replace('"', "")


def test_where_slurm_refuses_a_job_those_before_it_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "fake btx", FAKE_BTX)))
    for name, text in launch_text(pico_recipe(tmp_path), "slurm").items():
        (tmp_path / name).write_text(text)
    program(tmp_path / "sbatch", FAKE_SBATCH)
    program(tmp_path / "scancel", '#!/usr/bin/env bash\necho "$*" >{folder}/cancelled\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAIL_AT": "4"}
    assert subprocess.run(["bash", tmp_path / "submit.sh"], env=environment, capture_output=True).returncode == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 4
    assert sorted((tmp_path / "cancelled").read_text().split()) == ["101", "102", "103"]


def test_stages_that_ask_slurm_for_something_else_are_jobs_of_their_own(tmp_path: Path) -> None:
    asked = "launch.slurm={gres: 'gpu:1', stages: {mix: {gres: ''}}}"
    texts = launch_text(pico_recipe(tmp_path, "run", asked, "baselines=[]"), "slurm")
    assert "--gres" not in texts["mix.sbatch"] + texts["data-birds.sbatch"]
    assert "#SBATCH --gres=gpu:1" in texts["finetune.sbatch"]


# ---- the command


def test_launch_prints_or_writes_and_replaces_nothing_that_says_something_else(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    printed = btx_here("launch", "pico.yaml", "--for", "shell", cwd=tmp_path)
    written = btx_here("launch", "pico.yaml", "--for", "shell", "-o", "texts", cwd=tmp_path)
    assert (written[0], written[1].split()) == (0, [str(Path("texts/run.sh"))])
    script = tmp_path / "texts" / "run.sh"
    assert printed == (0, script.read_text(), "")
    assert btx_here("launch", "pico.yaml", "--for", "shell", "-o", "texts", cwd=tmp_path)[0] == 0
    code, _, said = btx_here("launch", "pico.yaml", "mix.top_k=1", "--for", "shell", "-o", "texts", cwd=tmp_path)
    assert code == 2
    assert "run.sh is there and says something else" in said
    assert printed[1] == script.read_text()
    assert btx_here("launch", "pico.yaml", "--for", "shell", "-o", "pico.yaml", cwd=tmp_path)[0] == 2
    _, several, _ = btx_here("launch", "pico.yaml", "--for", "slurm", cwd=tmp_path)
    assert [line for line in several.splitlines() if line.startswith("# ====")][:2] == [
        "# ==== submit.sh ====", "# ==== data-tokenizer.sbatch ====",
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()  # it starts nothing


def test_a_text_begins_with_the_run_folder_or_with_what_is_wrong(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    assert btx_here("begin", "pico.yaml", "data.root=.", cwd=tmp_path) == (0, f"{Path('runs/pico')}\n", "")
    run = RunFolder.open(tmp_path / "runs" / "pico")
    assert {stage.name for stage in run.graph if run.state(stage) != "absent"} == set()
    code, _, said = btx_here("begin", "pico.yaml", "data.root=nowhere", "run=other", cwd=tmp_path)
    assert (code, (tmp_path / "other").exists()) == (2, False)
    assert "birds.jsonl" in said
