"""What finished stages and checkpoints have left is checked before it is used: damage is named, nothing is trained in
silence, nothing is lost."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btx import outputs
from btx.errors import RunFolderError, UserError
from btx.files import SEAL, read_json, write_json, write_sealed
from btx.outputs import Done, check_model_of_stage, check_outputs, damage, read_done, read_output
from btx.process import Interrupted
from btx.reporting.run_files import read_run
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.status import run_status
from btx.run_folder.stumps import clear_stumps
from btx.running import pipeline
from btx.stages import evaluate
from btx.sweeps.sharing import take_over
from tests.pico_run import finished_here, pico_recipe

SMALL = ("seed_model.train.tokens=512", "train.tokens=512", "finetune.tokens=512", "evaluate.tokens=200",
         "evaluate.tasks={}", "analyze.tokens=100")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; nobody may change it."""
    return finished_here(pico_recipe(tmp_path_factory.mktemp("finished"), "run", *SMALL))


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it elsewhere, as rsync or git leave one: other times, other inodes."""
    shutil.copytree(finished.path, tmp_path / "run", copy_function=shutil.copyfile)
    return RunFolder(tmp_path / "run", finished.recipe)


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    """Put the other expert's model in its place: same size, same names."""
    shutil.copyfile(str(path).replace("birds", "tools"), path)


WEIGHTS = "model/model.safetensors"


@pytest.mark.parametrize(("stage", "file", "harm", "made_from_it"), [
    ("train/birds", WEIGHTS, flip, "mix"), ("train/birds", WEIGHTS, swap, "mix"),
    ("train/birds", WEIGHTS, Path.unlink, "mix"), ("train/birds", "model/config.json", flip, "evaluate"),
    ("data/birds", "0/train/tokens.bin", flip, "train/birds"), ("data/birds", "0/val/bytes.npy", flip, "evaluate"),
    ("data/tokenizer", "tokenizer.json", flip, "data/birds evaluate"), ("seed", WEIGHTS, halve, "train/birds"),
    ("mix", WEIGHTS, flip, "finetune"), ("finetune", WEIGHTS, flip, "analyze"),
    ("evaluate", "results.json", flip, "report"),
])  # fmt: skip
def test_a_changed_file_of_a_finished_stage_is_named_before_it_is_used(
    run: RunFolder, stage: str, file: str, harm: Callable[[Path], None], made_from_it: str
) -> None:
    made = made_from_it.split()
    for name in made:
        shutil.rmtree(run.folder(name))
    path = run.folder(stage) / file
    before = path.read_bytes()
    run.check_finished(lambda line: pytest.fail(line))
    harm(path)
    again = RunFolder(run.path, run.recipe)
    with pytest.raises(RunFolderError, match=re.escape(f"{path}: ") + r".*remove the folder .*: it is made anew"):
        again.check_needs(again.graph[made[0]])
    with pytest.raises(RunFolderError, match=re.escape(str(path))):
        again.check_finished(lambda line: None)
    assert [row["stage"] for row in run_status(again) if row["state"] == "damaged"] == [stage]
    path.write_bytes(before)
    again.check_needs(again.graph[made[0]])


def test_a_copy_of_a_finished_run_is_as_finished_and_what_was_made_without_a_record_is_taken(run: RunFolder) -> None:
    assert {row["state"] for row in run_status(run, verify=True)} == {"done"}
    for stage in run.graph:
        done = run.done(stage) or {}
        assert set(done.pop("outputs")) >= ({WEIGHTS, "model/config.json"} if stage.trains else set())
        write_json(run.folder(stage.name) / "done.json", done)
    flip(run.model("finetune") / "model.safetensors")
    assert {row["state"] for row in run_status(RunFolder(run.path, run.recipe), verify=True)} == {"done"}


def test_people_may_change_what_nothing_reads_and_weights_that_come_later_are_refused(run: RunFolder) -> None:
    (run.model("finetune") / "README.md").write_text("mine")
    check_model_of_stage(run.model("finetune"))
    (run.model("finetune") / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(RunFolderError, match=r"model-00002-of-00002\.safetensors: was not there"):
        check_model_of_stage(run.model("finetune"))


def test_what_nothing_waits_for_is_told_and_read_whole_only_on_demand(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.model("seed") / "model.safetensors"
    flip(path)
    told: list[str] = []
    run.check_finished(told.append)
    assert len(told) == 1
    assert told[0].startswith(f"warning: {path}: its bytes are others")
    monkeypatch.setattr(outputs, "SMALL", 0)
    run.check_finished(pytest.fail)
    with pytest.raises(RunFolderError, match=re.escape(str(path))):
        run.check_finished(pytest.fail, verify=True)


def test_a_disk_that_forgets_in_silence_is_found_by_reading_whole(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.model("seed") / "model.safetensors"
    known = (run.done("seed") or {})["outputs"]
    flip(path)  # and size, times and inode are as they were:
    monkeypatch.setattr(outputs, "content_sha256", lambda file: known[f"model/{file.name}"]["sha256"]
                        if file.parent == run.model("seed") else outputs.file_sha256(file))  # fmt: skip
    check_outputs(run.folder("seed"))
    assert (damage(run.folder("seed"), "whole") or "").startswith(str(path))


def test_a_damaged_stage_is_shared_with_nobody_and_the_next_donor_gives_it(
    run: RunFolder, finished: RunFolder, tmp_path: Path
) -> None:
    flip(run.folder("data/tokenizer") / "tokenizer.json")
    other, lines = RunFolder.create(pico_recipe(finished.path.parent, str(tmp_path / "other"), *SMALL)), list[str]()
    take_over(other, [run.path, finished.path], lines.append)
    assert lines[0].startswith(f"data/tokenizer: not taken over from {run.path}: ")
    assert lines[1] == f"data/tokenizer: taken over from {finished.path}"
    assert {row["state"] for row in run_status(RunFolder(other.path, other.recipe), verify=True)} == {"done"}


class Told(pipeline.Display):
    """What `btx run` says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines += [message] if "already done" not in message else []


class NothingIsMade:
    """A launcher that must not be asked."""

    def __init__(self, launch: Any, device: str) -> None:
        pass

    def check(self, run: Path, jobs: Any) -> None:
        pass

    def submit(self, run: Path, stages: list[str], log: Path) -> Any:
        pytest.fail(f"made anew without a word: {stages}")


def changed(text: str, kind: str, chance: random.Random) -> str:
    """A JSON text after an accident."""
    if kind == "truncated":
        return text[: len(text) // 2]
    if kind == "digit":
        place = chance.choice([place for place, character in enumerate(text) if character.isdigit()])
        return f"{text[:place]}{(int(text[place]) + chance.randrange(1, 10)) % 10}{text[place + 1 :]}"
    if kind == "type":
        value = json.loads(text)
        value[chance.choice([key for key in value if key != SEAL])] = chance.choice([None, [7], {"a": []}, True])
        return json.dumps(value, indent=1)
    return kind


@pytest.mark.parametrize("sealed", [True, False], ids=["recorded", "made before there were records"])
@pytest.mark.parametrize("file", [
    "seed/started.json", "train/birds/done.json", "data/tokenizer/done.json", "manifest.json", "evaluate/results.json",
    "analyze/routing.json", "analyze/tokens.json", "mix/mix.json",
])  # fmt: skip
def test_no_accident_to_a_json_file_ends_in_a_traceback_or_goes_unsaid(
    finished: RunFolder, run: RunFolder, file: str, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "START", {"local": NothingIsMade})
    if not sealed:
        for path in (*run.path.rglob("done.json"), *run.path.rglob("started.json"), run.path / "manifest.json"):
            value = read_json(path)
            write_json(path, {key: found for key, found in value.items() if key != "outputs"})
    monkeypatch.setattr(RunFolder, "create", lambda recipe: RunFolder(run.path, recipe))  # would write the manifest
    path, results = run.path / file, (run.folder("evaluate") / "results.json").read_text()
    text, chance = path.read_text(), random.Random(file)
    for kind in (*chance.sample(["{}", "[]", '""', "null", "", "truncated"], 1), "type", *(["digit"] * sealed)):
        path.write_text(changed(text, kind, chance))
        said = list[str]()
        for look in (read_by_status, read_by_run, read_by_report):
            try:
                said += look(run)
            except UserError as error:
                said.append(str(error))
        if sealed:
            assert any(str(path) in line for line in said), (kind, said)
        path.write_text(text)
    assert (run.folder("evaluate") / "results.json").read_text() == results


def read_by_status(run: RunFolder) -> list[str]:
    return [row["why"] or "" for row in run_status(RunFolder(run.path, run.recipe))]


def read_by_run(run: RunFolder) -> list[str]:
    told = Told()
    pipeline.run(run.recipe.model_copy(update={"run_folder": str(run.path)}), display=told)
    return told.lines


def read_by_report(run: RunFolder) -> list[str]:
    read_run(run.path)
    return []


@pytest.mark.parametrize(("text", "problem"), [
    ("{}", "inputs: field required"), ("[]", "input should be a valid dictionary, found []"), ("null", "found null"),
    ('{"inputs": 3, "tokens": 1, "flops": 1, "wall_s": 1}', "inputs: input should be a valid string, found 3"),
    ('{"inputs": "a", "tokens": "1", "flops": 1, "wall_s": 1}', "tokens: input should be a valid number"),
    ("{oops", "not readable as JSON"), ("[" * 100_000, "not readable as JSON"), ("\udcff", "not readable as JSON"),
    ('{"inputs": "a", "tokens": 1, "flops": 1, "wall_s": 1, "seal": "0"}', "its seal does not fit"),
])  # fmt: skip
def test_a_json_file_of_another_shape_is_named_with_its_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "done.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunFolderError, match=re.escape(f"{path}: ") + ".*" + re.escape(problem)):
        read_json(path, Done)
    path.unlink()
    assert read_json(path, Done) is None
    path.mkdir()
    with pytest.raises(RunFolderError, match="cannot be read: Is a directory"):
        read_json(path, Done)


def test_a_sealed_file_is_read_as_it_was_given(tmp_path: Path) -> None:
    value = {"b": [0.1, 1e-300, None, {"é": "\ud800"}], "a": 2**70}
    write_sealed(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert read_output(tmp_path / "x.json") == value
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("0.1", "0.2"))
    with pytest.raises(RunFolderError, match="changed since btx wrote it"):
        read_json(tmp_path / "x.json")


@pytest.fixture
def stumps(run: RunFolder) -> list[Path]:
    """What killed writers leave, one of each kind."""
    names = [".mix.making", ".evaluate.replaced", "train/.birds.adopting", "data/.birds.0a1b2c3d.tmp", ".law.making",
             "seed/state/.step-00000009.0a1b2c3d.tmp", "train/birds/.model.old.tmp"]  # fmt: skip
    for name in names:
        (run.path / name / "model").mkdir(parents=True)
    files = [run.path / name for name in (".recipe.yaml.0a1b2c3d.tmp", "seed/.done.json.0a1b2c3d.tmp")]
    for file in files:
        file.touch()
    return [*(run.path / name for name in names), *files]


def test_stumps_of_killed_writers_go_where_nobody_is_at_work(run: RunFolder, stumps: list[Path]) -> None:
    (run.path / "train/birds/.mine").touch()
    before = {path for path in run.path.rglob("*") if ".locks" not in path.parts}
    with exclusive(run.path, "mix"):
        clear_stumps(run)
        assert [path for path in stumps if path.exists()] == [run.path / ".mix.making"]
    clear_stumps(run)
    gone = before - set(run.path.rglob("*"))
    assert {path for path in gone if path.name != "model"} == set(stumps)
    assert {row["state"] for row in run_status(run)} == {"done"}


def test_a_stage_that_is_made_again_is_not_done_before_its_end(run: RunFolder) -> None:
    making = run.path / ".evaluate.making"
    shutil.copytree(run.folder("evaluate"), making)  # what a process leaves that is killed before its last rename
    with pytest.raises(ZeroDivisionError), run.making(run.graph["evaluate"], print):
        print(1 // 0)
    assert (making / "started.json").exists()
    assert not (making / "done.json").exists()


def test_measurements_that_are_taken_over_are_there_whole_or_not_at_all(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(source: Path, target: Path, **more: Any) -> None:
        target.mkdir(exist_ok=True)
        (target / "seed.json").write_text((source / "seed.json").read_text()[:9])
        raise Interrupted("", 9)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(shutil, "copytree", cut_off)
    with pytest.raises(Interrupted):
        evaluate._measure(run, tmp_path / "new", ["models"], print)
    assert not (tmp_path / "new" / "models").exists()


def test_what_was_made_of_an_unfinished_stage_stays_and_a_last_rename_is_done(run: RunFolder) -> None:
    run.folder("mix").rename(run.path / ".mix.making")
    (run.path / ".evaluate.making").mkdir()
    shutil.rmtree(run.folder("evaluate"))
    clear_stumps(run)
    assert run.state(run.graph["mix"]) == "done"
    assert (run.path / ".evaluate.making").exists()
    assert read_done(run.folder("mix")) is not None
