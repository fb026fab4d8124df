"""Jobs that fail: who is tried again, who goes on all the same, what the run says. The jobs only pretend."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from btx.errors import BtxError, StageFailed, UserError
from btx.process import Interrupts
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import note_failure, stage_status
from btx.running import pipeline
from btx.running.failures import Failures
from btx.running.launchers import START, Handle, Standing
from btx.running.progress import Display
from tests.pico_run import pico_recipe
from tests.test_jobs_at_once import PretendingLauncher

FAILED, KILLED, LOST = Standing("ended", 1), Standing("ended", -9), Standing("ended", 1, why="NODE_FAIL")
MISTAKEN = Standing("ended", 2)


class Said(Display):
    """A display that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class FailingLauncher(PretendingLauncher):
    """As it; a job listed fails so often, in these ways."""

    def __init__(self, run: RunFolder, fail: Mapping[str, Sequence[Standing]]) -> None:
        super().__init__(run)
        self.fail = {name: list(ways) for name, ways in fail.items()}
        self.events: list[tuple[str, str]] = []

    def submit(self, path: Path, names: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        self.events.append(("begin", names[0]))
        return super().submit(path, names, log, after=after)

    def standing(self, name: str) -> Standing:
        if self.fail.get(name):
            self.working.discard(name)
            standing = self.fail[name].pop(0)
        else:
            standing = super().standing(name)
        if standing.state == "ended":
            self.events.append(("end", name))
        return standing

    @property
    def begun(self) -> list[str]:
        return [name for event, name in self.events if event == "begin"]


def run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Mapping[str, Sequence[Standing]], *overrides: str
) -> tuple[RunFolder, FailingLauncher, list[str], BtxError | None]:
    """The real pipeline over three branches; what it said and how it ended."""
    recipe = pico_recipe(
        tmp_path, "run", "train.domains=[birds,tools,general]", "baselines=[soup,dense_dm]", *overrides
    )
    run = RunFolder(tmp_path / "run", recipe)
    launcher = FailingLauncher(run, fail)
    monkeypatch.setitem(START, "local", lambda launch, device: launcher)
    monkeypatch.setattr(pipeline, "POLL_S", 0.0)
    run.path.mkdir()
    error = None
    with Said() as said:
        try:
            pipeline._Pipeline(run, said, Interrupts()).run(run.graph.jobs())
        except BtxError as raised:
            error = raised
    return run, launcher, said.lines, error


def test_a_failed_expert_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = {"train/birds": [FAILED]}
    run, launcher, said, error = run_with(tmp_path, monkeypatch, fail, "launch.jobs=1")
    assert type(error) is StageFailed
    assert "train/birds failed (exit code 1); its log is " in str(error)
    assert f"`btx run {run.path}` continues from its last checkpoint\n" in str(error)
    assert str(error).endswith(f"\n`btx run {run.path} --without birds` goes on without this expert")
    done = {stage.name for stage in run.graph if run.state(stage) == "done" and not stage.name.startswith("data/")}
    assert done == {"seed", "train/tools", "train/general", "baselines/dense_dm_domains", "baselines/dense_dm"}
    assert said[-1].startswith("failed: train/birds; not begun: mix, baselines/soup, finetune, evaluate")
    assert launcher.begun.count("train/birds") == 1
    assert stage_status(run, run.graph["train/birds"]).state == "failed"


def test_a_run_names_every_failure_and_nothing_waits_for_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = {"train/birds": [KILLED], "baselines/dense_dm_domains": [LOST], "train/general": [MISTAKEN]}
    run, _, said, error = run_with(tmp_path, monkeypatch, fail, "launch.jobs=2")
    assert error is not None
    assert error.exit_code == 1  # not only mistakes of the user
    assert "train/birds failed (signal 9)" in str(error)
    assert "killed from outside" in str(error)
    assert "baselines/dense_dm_domains failed (NODE_FAIL)" in str(error)
    assert run.state(run.graph["train/tools"]) == "done"
    assert "train/general: failed: it left no message" in said


@pytest.mark.parametrize(("silent", "reason"), [(False, "killed from outside; "), (True, "stopped from outside, ")])
def test_what_ended_a_job_stands_in_a_line_of_its_own_behind_what_the_job_said(
    tmp_path: Path, silent: bool, reason: str
) -> None:
    run, said = RunFolder(tmp_path / "run", pico_recipe(tmp_path)), list[str]()
    run.path.mkdir()
    failures = Failures(run, said.append)
    failures.note([run.graph["seed"]], KILLED, ["a warning of some library"], silent=silent)
    assert said[0].startswith(f"seed: failed: {reason}")
    with pytest.raises(StageFailed, match=f"\na warning of some library\n{reason}"):
        failures.raise_first()


def test_a_failure_says_on_which_machine_it_was_and_a_job_that_is_back_in_the_queue_where_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Standing("ended", 1, "n1", "NODE_FAIL")
    queued = Standing("queued", why="BeginTime")
    fail = {"train/birds": [lost], "train/tools": [Standing("running", None, "n2"), queued]}
    run, _, said, error = run_with(tmp_path, monkeypatch, fail)
    assert "train/birds failed (NODE_FAIL on n1)" in str(error)
    status = stage_status(run, run.graph["train/birds"])
    assert (status.state, status.node, status.why) == ("failed", "n1", "NODE_FAIL on n1")
    assert "train/tools: back in the queue (BeginTime); it ran on n2" in said


def test_what_a_job_has_noted_of_its_failure_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noting(FailingLauncher):
        def standing(self, name: str) -> Standing:
            note_failure(run, name, "no progress for 5 s") if name == "train/birds" else None
            return super().standing(name)

    monkeypatch.setattr(f"{__name__}.FailingLauncher", Noting)
    run = RunFolder(tmp_path / "run", pico_recipe(tmp_path))
    _, _, said, error = run_with(tmp_path, monkeypatch, {"train/birds": [Standing("ended", 143)]})
    assert stage_status(run, run.graph["train/birds"]).why == "no progress for 5 s"
    assert "train/birds: failed: no progress for 5 s" in said
    assert "no progress for 5 s" in str(error)


def test_a_job_says_nothing_of_its_stages_that_were_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _, _ = run_with(tmp_path, monkeypatch, {})
    shutil.rmtree(run.folder("finetune"))
    with Said() as said:
        pipeline._Pipeline(run, said, Interrupts()).run(run.graph.jobs())
    assert "mix: already done, skipped" in said.lines
    assert [line for line in said.lines if line.startswith(("mix: ", "finetune: "))][1:] == [
        "finetune: started",
        "finetune: done",
    ]


@pytest.mark.parametrize("ways", [[FAILED], [KILLED, LOST]])
def test_a_job_that_failed_is_tried_again_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: list[Standing]
) -> None:
    run, launcher, said, error = run_with(tmp_path, monkeypatch, {"train/birds": ways}, "launch.retries=2")
    assert error is None
    assert all(run.state(stage) == "done" for stage in run.graph)
    assert launcher.begun.count("train/birds") == 1 + len(ways)
    again = [line for line in said if line.startswith("train/birds: failed")]
    assert [line.rpartition("; ")[2] for line in again] == ["tried again, 1 of 2", "tried again, 2 of 2"][: len(ways)]


def test_it_is_given_up_after_so_many_times_and_what_the_user_has_to_mend_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = {"train/birds": [FAILED] * 9, "train/tools": [MISTAKEN] * 9}
    run, launcher, _, error = run_with(tmp_path, monkeypatch, fail, "launch.retries=2")
    assert "train/birds failed 3 times (exit code 1)" in str(error)
    without = " ".join(f"--without {domain}" for domain in run.recipe.train.domains if f"train/{domain}" in fail)
    assert str(error).endswith(f"\n`btx run {run.path} {without}` goes on without these experts")
    assert {name: launcher.begun.count(name) for name in fail} == {"train/birds": 3, "train/tools": 1}


def test_where_no_expert_is_left_nobody_is_told_to_go_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = {f"train/{domain}": [MISTAKEN] for domain in ("birds", "tools", "general")}
    *_, error = run_with(tmp_path, monkeypatch, fail)
    assert "it left no message" in str(error)
    assert "--without" not in str(error)


@pytest.mark.parametrize("retries", [0, 1])
def test_bad_data_end_the_run_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    run, launcher, _, error = run_with(
        tmp_path, monkeypatch, {"data/birds": [MISTAKEN]}, f"launch.retries={retries}"
    )  # fmt: skip
    assert type(error) is UserError
    assert all(name.startswith("data/") for name in launcher.begun)
    assert run.state(run.graph["seed"]) == "absent"


def test_a_place_that_is_free_is_taken_at_once_after_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = {"train/birds": [FAILED]}
    _, launcher, _, _ = run_with(tmp_path, monkeypatch, fail, "launch.jobs=2")
    branches = [event for event in launcher.events if event[1].startswith(("train/", "baselines/dense"))]
    assert branches[:6] == [
        ("begin", "train/birds"), ("begin", "train/tools"), ("end", "train/birds"), ("begin", "train/general"),
        ("end", "train/tools"), ("begin", "baselines/dense_dm_domains"),
    ]  # fmt: skip
