"""Trackers are copies of metrics.jsonl: complete after a kill, and never in training's way."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from btx.choices.trackers import TRACKERS
from btx.errors import RecipeError, UserError
from btx.outputs import damage
from btx.process import Interrupted, Interrupts
from btx.recipe.loading import load_recipe
from btx.run_folder.folder import RunFolder
from btx.running.preflight import check_packages
from btx.stages.work import run_stages
from btx.training.trackers import follow
from btx.training.trackers.follow import check_trackers, followed, numbers
from btx.training.trackers.tracker import Ending, Point, Tracked
from tests.pico_run import pico_recipe

ROOT = Path(__file__).parents[1]


def line(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "steps": 9, "loss": step / 8 if loss is None else loss, "wall_s": 2.0 * step}


def losses(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 8) for step in steps]


def write(file: Path, lines: Sequence[dict[str, Any]], mode: str = "w") -> None:
    with open(file, mode, encoding="utf-8") as stream:
        stream.writelines(json.dumps(values) + "\n" for values in lines)


@pytest.fixture
def stage(tmp_path: Path) -> Tracked:
    """A stage with five steps behind it."""
    write(tmp_path / "metrics.jsonl", [line(step) for step in range(1, 6)])
    return Tracked("pico", tmp_path / "run", "train/birds", tmp_path / "trackers", {"train": {"tokens": 512}})


def follow_it(names: Sequence[str], stage: Tracked, told: list[str] | None = None) -> Any:
    log = (lambda text: pytest.fail(text)) if told is None else told.append
    return followed(names, stage, stage.folder.parent / "metrics.jsonl", (), log)


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self, last_step: int = 0) -> None:
        self.last_step, self.points, self.ending = last_step, list[Point](), list[Ending]()

    def add(self, points: Sequence[Point]) -> None:
        self.points += points

    def close(self, ending: Ending) -> None:
        self.ending.append(ending)


def known(monkeypatch: pytest.MonkeyPatch, tracker: Any) -> Any:
    """The tracker is started under the name `kept`."""
    module = ModuleType("kept")
    module.Run = lambda tracked: tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "btx.training.trackers.kept", module)
    return tracker


# Following


def test_a_tracker_gets_the_steps_it_lacks_and_those_that_come(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = known(monkeypatch, Kept(last_step=3))
    with follow_it(["kept"], stage):
        write(stage.folder.parent / "metrics.jsonl", [line(6), line(7)], "a")
    assert [(point.step, point.values["loss"]) for point in tracker.points] == losses(range(4, 8))
    assert [round(point.time - tracker.points[0].time, 3) for point in tracker.points] == [0, 2, 4, 6]
    assert tracker.ending == ["finished"]


def test_a_line_that_is_being_written_waits_for_its_end(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, file = known(monkeypatch, Kept()), stage.folder.parent / "metrics.jsonl"
    monkeypatch.setattr(follow, "LOOKS_S", 0.001)
    with open(file, "a", encoding="utf-8") as stream, follow_it(["kept"], stage):
        stream.write('{"step": 6, "lo')
        stream.flush()
        deadline = threading.Event()
        while len(tracker.points) < 5:
            assert not deadline.wait(0.002)
        deadline.wait(0.02)
        stream.write('ss": 0.5}\n')
        stream.flush()
    assert [point.step for point in tracker.points] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("error", "ending"), [
    (None, "finished"), (Interrupted("stopped", 15), "interrupted"), (ValueError("no"), "failed"),
])  # fmt: skip
def test_a_tracker_is_told_how_the_stage_ended(
    stage: Tracked, monkeypatch: pytest.MonkeyPatch, error: Exception | None, ending: Ending
) -> None:
    tracker = known(monkeypatch, Kept())
    with contextlib.suppress(Interrupted, ValueError), follow_it(["kept"], stage):
        if error is not None:
            raise error
    assert tracker.ending == [ending]
    assert len(tracker.points) == 5


class Broken(Kept):
    """The server is gone after the first steps."""

    def add(self, points: Sequence[Point]) -> None:
        super().add(points)
        raise ConnectionError("the server is gone\nwith details")


def test_a_tracker_that_fails_is_told_of_once_and_left_alone(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, told = known(monkeypatch, Broken()), list[str]()
    monkeypatch.setattr(follow, "LOOKS_S", 0.001)
    with follow_it(["kept"], stage, told):
        while not told:
            threading.Event().wait(0.002)
        write(stage.folder.parent / "metrics.jsonl", [line(6)], "a")
    assert len(told) == 1
    assert told[0].startswith("warning: track: kept failed (ConnectionError: the server is gone); training goes on")
    assert len(tracker.points) == 5
    assert not tracker.ending


def test_a_tracker_that_hangs_is_not_waited_for(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, told = threading.Event(), list[str]()

    class Hanging(Kept):
        def add(self, points: Sequence[Point]) -> None:
            goes_on.wait(20)

    known(monkeypatch, Hanging())
    monkeypatch.setitem(follow.PATIENCE_S, "finished", 0.01)
    with follow_it(["kept"], stage, told):
        pass
    goes_on.set()
    assert told == ["warning: track: kept has not taken every step after 0.01 s; not waited for"]


def test_the_numbers_of_a_line_are_told_by_name() -> None:
    found = numbers({
        "step": 3, "loss": 2.5, "tokens": 96, "note": "text", "nothing": None, "dead": [[0, 1], [1, 1]],
        "spike": {"factor": 4.0, "skipped": False}, "load": [[0.75, 0.25], [0.5, 0.5]],
    }, ("math", "code"))  # fmt: skip
    assert found == {
        "loss": 2.5, "tokens": 96.0, "dead": 2.0, "spike/factor": 4.0, "load/math": 0.625, "load/code": 0.375,
        "load/smallest": 0.25, "load/largest": 0.75,
    }  # fmt: skip


# In a recipe


def test_a_recipe_names_each_tracker_once_and_only_those_there_are() -> None:
    with pytest.raises(RecipeError, match="expected one of tensorboard, wandb, trackio, mlflow, got 'tensorbord'"):
        load_recipe("demo", ["track=[tensorbord]"])
    with pytest.raises(RecipeError, match="wandb is named twice"):
        load_recipe("demo", ["track=[wandb, wandb]"])


def test_every_tracker_has_a_file_and_an_extra_of_its_name() -> None:
    files = {file.stem for file in Path(follow.__file__).parent.glob("*.py")} - {"__init__", "follow", "tracker"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert files == TRACKERS.keys() <= extras.keys()


def test_trackers_decide_no_result(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path)
    tracked = recipe.model_copy(update={"track": list(TRACKERS)})
    before, after = (RunFolder(tmp_path / "run", one).graph for one in (recipe, tracked))
    assert [stage.inputs for stage in before] == [stage.inputs for stage in after]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "find_spec", lambda name: None)
    recipe = pico_recipe(tmp_path).model_copy(update={"track": ["tensorboard", "mlflow"], "run": str(tmp_path / "run")})
    why = r'track: tensorboard, mlflow: not installed: pip install "branchtrainmix\[tensorboard,mlflow\]"; or leave it'
    with pytest.raises(UserError, match=why):
        check_packages(recipe)
    with pytest.raises(UserError, match=why):
        run_stages(RunFolder.create(recipe), ["seed"], Interrupts(), lambda text: None)
    check_trackers([])


# The libraries themselves


def test_tensorboard_shows_every_step_once_after_a_kill(stage: Tracked) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from btx.training.trackers.tensorboard import Run

    killed = Run(stage)
    killed.add([Point(step, 1000.0 + step, {"loss": 99.0}) for step in range(1, 9)])  # and then killed: steps 6-8 again
    with follow_it(["tensorboard"], stage):
        write(stage.folder.parent / "metrics.jsonl", [line(step) for step in range(6, 10)], "a")
    (file,) = stage.folder.glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == losses(range(1, 10))
    assert b'"tokens": 512' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("default")  # of SQLAlchemy's, at MLflow
def test_mlflow_shows_every_step_once_after_a_kill(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    from btx.training.trackers.mlflow import Run

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (stage.run / ".mlflow.db.making").parent.mkdir()
    (stage.run / ".mlflow.db.making").write_bytes(b"cut off")
    Run(stage).add([Point(step, 1000.0, {"loss": step / 8}) for step in range(1, 5)])  # and then killed
    with follow_it(["mlflow"], stage):
        write(stage.folder.parent / "metrics.jsonl", [line(6)], "a")
    client = MlflowClient(tracking_uri=f"sqlite:///{stage.run / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("pico").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == losses(range(1, 7))
    assert (run.info.run_name, run.info.status) == ("run/train/birds", "FINISHED")
    assert run.data.params == {"train.tokens": "512"}


def test_trackio_shows_every_step_once_after_a_kill(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(stage.run / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    from btx.training.trackers.trackio import Run

    begun = Run(stage)
    begun.add([Point(step, 1000.0, {"loss": step / 8}) for step in range(1, 5)])
    begun.close("failed")
    with follow_it(["trackio"], stage):
        write(stage.folder.parent / "metrics.jsonl", [line(6)], "a")
    logs = SQLiteStorage.get_logs("pico", stage.kept("trackio", "name", lambda: pytest.fail("it was kept")))
    assert [(log["step"], log["loss"]) for log in logs] == losses(range(1, 7))


def test_wandb_writes_one_offline_run_with_every_step(stage: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from btx.training.trackers.wandb import Run

    monkeypatch.setenv("HOME", str(stage.run))
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    Run(stage).add([Point(step, 1000.0, {"loss": 99.0}) for step in range(1, 9)])  # and then killed
    import wandb

    wandb.finish()
    with follow_it(["wandb"], stage):
        write(stage.folder.parent / "metrics.jsonl", [line(6)], "a")
    (run,) = (stage.folder / "wandb").glob("offline-run-*")
    assert run.name.endswith(stage.kept("wandb", "id", lambda: pytest.fail("it was kept")))
    logged: list[dict[str, float]] = []
    while len(logged) < 6:  # a process of wandb's own writes them, and ends later
        logged = [values for values in histories(next(run.glob("*.wandb"))) if "loss" in values]
    assert [(values["_step"], values["loss"]) for values in logged] == losses(range(1, 7))


def histories(file: Path) -> Iterator[dict[str, float]]:
    """What was logged in a W&B file: records in blocks of 32 KiB, as LevelDB's logs have them, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, record, at = file.read_bytes(), b"", 7
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its end
            items = Record.FromString(record).history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            record = b""


@pytest.mark.parametrize(("variables", "file", "there"), [
    ({}, None, False),
    ({"WANDB_API_KEY": "k"}, None, True),
    ({}, "machine api.wandb.ai login user password k", True),
    ({}, "machine other.org login user password k", False),
    ({"WANDB_BASE_URL": "https://other.org"}, "machine other.org login user password k", True),
    ({}, "not a netrc", False),
])  # fmt: skip
def test_wandb_is_offline_unless_there_is_a_key_or_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], file: str | None, there: bool
) -> None:
    from btx.training.trackers.wandb import _logged_in

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / ".netrc").write_text(file)
        (tmp_path / ".netrc").chmod(0o600)
    assert _logged_in() is there


def test_a_stage_is_tracked_and_what_trackers_change_later_damages_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    run = RunFolder.create(pico_recipe(tmp_path, "run", "track=[tensorboard]"))
    run_stages(run, ["data", "seed"], Interrupts(), lambda text: None)
    (file,) = (run.folder("seed") / "trackers").glob("events.*")
    file.write_bytes(b"")
    assert damage(run.folder("seed"), "whole") is None
    assert run.state(run.graph["seed"]) == "done"
