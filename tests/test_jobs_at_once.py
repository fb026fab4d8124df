"""How many jobs a run has under way at once: the pipeline, the threads and the plan go by the same number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from btx.files import write_json
from btx.planning.plan import plan
from btx.process import Interrupts
from btx.run_folder import threads
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Graph, Stage
from btx.run_folder.stage_notes import done_json, started_json
from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.threads import jobs_at_once, jobs_side_by_side, training_threads
from btx.running import pipeline
from btx.running.launchers import START, Handle, Standing
from btx.running.progress import Display
from btx.sweeps import variants
from btx.sweeps.variants import plan_sweep
from tests.pico_run import pico_recipe, write_pico_recipe

BASELINES = "baselines=[soup,dense_dm,btm_top1,btx_soft]"
AT_ONCE = {"launch.jobs=null": 2, "launch.jobs=1": 1, "launch.jobs=3": 3, "launch.jobs=99": 4}
"""Two branches with dense_dm beside them; later the finetuning with dense_dm, btm_top1 and btx_soft beside it."""


@pytest.fixture
def graph(tmp_path: Path, request: pytest.FixtureRequest) -> Graph:
    return build_graph(pico_recipe(tmp_path, "run", BASELINES, request.param))


class PretendedJob:
    """A job that leaves its stages done, one after the other, each after some looks at it."""

    def __init__(self, run: RunFolder, stages: Sequence[Stage]) -> None:
        self.run, self.left, self.looks = run, list(stages), 0

    def exit_code(self) -> int | None:
        stage = self.left[0]
        self.looks += 1
        # Long enough for all that may be side by side to meet.
        if self.looks == (20 if stage.name == "finetune" or stage.name.startswith("baselines/") else 2):
            write_json(self.run.folder(stage.name) / "started.json", started_json(stage))
            write_json(self.run.folder(stage.name) / "done.json", done_json(stage, {}))
            self.left, self.looks = self.left[1:], 0
        return None if self.left else 0


class PretendingLauncher:
    """Starts jobs that only pretend, and remembers which were under way, start by start."""

    takes_waiting = False
    goes_on = False

    def __init__(self, run: RunFolder) -> None:
        self.run, self.jobs, self.working, self.seen = run, dict[str, PretendedJob](), set[str](), list[set[str]]()

    def submit(self, path: Path, names: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        log.parent.mkdir(exist_ok=True)
        log.touch()
        name = names[0]
        self.jobs[name] = PretendedJob(self.run, [self.run.graph[name] for name in names])
        self.working.add(name)
        if not name.startswith("data/"):
            self.seen.append(set(self.working))
        return {"name": name}

    def poll(self, handles: Sequence[Handle]) -> list[Standing]:
        return [self.standing(handle["name"]) for handle in handles]

    def standing(self, name: str) -> Standing:
        exit_code = self.jobs[name].exit_code()
        if exit_code is not None:
            self.working.discard(name)
        return Standing("running" if exit_code is None else "ended", exit_code)

    def cancel(self, handle: Handle) -> None:
        """It saves nothing."""


def under_way(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Run the real pipeline with jobs that only pretend; returns which jobs were under way, start by start."""
    graph, launcher = run.graph, PretendingLauncher(run)
    monkeypatch.setitem(START, "local", lambda launch, device: launcher)
    monkeypatch.setattr(pipeline, "POLL_S", 0.0)
    run.path.mkdir()
    with Display() as display:
        pipeline._Pipeline(run, display, Interrupts()).run(graph.jobs())
    assert all(run.state(stage) == "done" for stage in graph)
    return launcher.seen


@pytest.mark.parametrize(("graph", "at_once"), AT_ONCE.items(), indirect=["graph"])
def test_the_pipeline_the_threads_the_plan_and_the_sweep_agree(
    graph: Graph, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs_at_once(graph) == at_once
    for module in (threads, variants):
        monkeypatch.setattr(module, "processors", lambda: 24)
    assert training_threads(graph) == 24 // at_once
    given = f"launch.jobs={graph.recipe.launch.jobs or 'null'}"
    sweep = plan_sweep(str(write_pico_recipe(tmp_path)), [f"data.root={tmp_path}", BASELINES, given], jobs=2)
    assert sweep.runs[0].recipe.launch.threads == 12 // at_once
    memory = {row["stage"]: row["memory_bytes"] for row in plan(graph.recipe)["stages"]}
    together = [sorted((max(memory[stage.name] for stage in job) for job in jobs), reverse=True)[:at_once]
                for jobs in jobs_side_by_side(graph)]  # fmt: skip
    assert plan(graph.recipe)["totals"]["memory_bytes"] == max(map(sum, together))
    seen = under_way(RunFolder(tmp_path / "run", graph.recipe), monkeypatch)
    assert max(map(len, seen)) == at_once


@pytest.mark.parametrize("graph", ["launch.jobs=99"], indirect=True)
def test_jobs_side_by_side_are_those_that_wait_for_none_of_each_other(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, later = ({job[0].name for job in jobs} for jobs in jobs_side_by_side(graph))
    assert first == {"train/birds", "train/tools", "baselines/dense_dm_domains"}
    assert later == {"mix", "baselines/dense_dm_domains", "baselines/btm_top1", "baselines/btx_soft"}
    seen = under_way(RunFolder(tmp_path / "run", graph.recipe), monkeypatch)
    assert first in seen  # nothing of this is only on paper
    assert all(working <= first or working <= later or len(working) == 1 for working in seen)


@pytest.mark.parametrize("given", [
    "launch.processes={finetune: 4}", "launch.processes={finetune: 4, baselines: 3}", "launch.processes=2",
    "launch.processes={train: 9}",
])  # fmt: skip
@pytest.mark.parametrize("gpus", [1, 4])
def test_jobs_at_once_are_those_that_the_gpus_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, gpus: int
) -> None:
    monkeypatch.setattr(pipeline, "gpus_of", lambda device: tuple(map(str, range(gpus))))
    recipe = pico_recipe(tmp_path, "run", BASELINES, "device=auto", given, "launch.jobs=null")
    seen = under_way(RunFolder(tmp_path / "run", recipe), monkeypatch)
    for working in seen:
        jobs = [job for job in build_graph(recipe).jobs() if job[0].name in working]
        taken = [recipe.launch.gpus_of(stage.name for stage in job) for job in jobs]
        assert sum(taken) <= gpus or sum(map(bool, taken)) == 1, working
    if gpus == 4 and "finetune" in given:
        assert {"train/birds", "train/tools"} <= set.union(*(working for working in seen if "train/tools" in working))


@pytest.mark.parametrize(("overrides", "together"), [
    (["baselines=[]", "launch.jobs=2"], ["train/birds", "train/tools"]),
    (["baselines=[]", "launch.jobs=1"], ["finetune"]),
    (["baselines=[dense_dm]", "launch.jobs=3"], ["train/birds", "train/tools", "baselines/dense_dm_domains"]),
    (["baselines=[dense_dm]", "launch.jobs=2"], ["finetune", "baselines/dense_dm_domains"]),
    (["baselines=[dense_dm,btx_soft]", "launch.jobs=2"], ["finetune", "baselines/btx_soft"]),
    (["baselines=[btx_soft,btx_switch]", "launch.jobs=9"], ["finetune", "baselines/btx_soft", "baselines/btx_switch"]),
    (["baselines=[btx_soft,btx_switch]"], ["finetune", "baselines/btx_soft"]),  # with two experts a token and all
])  # fmt: skip
def test_the_memory_planned_is_that_of_the_jobs_that_train_at_once(
    tmp_path: Path, overrides: list[str], together: list[str]
) -> None:
    planned = plan(pico_recipe(tmp_path, "run", *overrides))
    memory = {row["stage"]: row["memory_bytes"] for row in planned["stages"]}
    assert planned["totals"]["memory_bytes"] == sum(memory[stage] for stage in together)
