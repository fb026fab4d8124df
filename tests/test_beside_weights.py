"""What is copied beside a mixed model's weights: never what a link in somebody's folder leads to outside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from btx.errors import CheckpointError
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.model_files.beside_weights import check_links, copy_beside_weights
from btx.running.preflight import preflight
from tests.pico_run import pico_recipe

MakeLlama = Callable[..., Path]
SECRET = "root:$6$secret"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside every model's folder."""
    (tmp_path / "shadow").write_text(SECRET)
    return tmp_path / "shadow"


def holds_the_secret(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_a_licence_that_is_a_link_out_of_the_folder_is_left_out(
    make_llama: MakeLlama, tmp_path: Path, secret: Path
) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    (seed / "LICENSE").symlink_to("../shadow")
    (seed / "NOTICE.txt").symlink_to("README.md")  # inside, as some folders have it
    (seed / "README.md").write_text("notice")
    lines: list[str] = []
    mix(seed, {"math": math}, tmp_path / "moe", log=lines.append)
    assert [line for line in lines if f"{seed}/LICENSE: a link to {secret}, which lies outside the model" in line]
    assert not holds_the_secret(tmp_path / "moe")
    assert not (tmp_path / "moe" / "LICENSE").exists()
    assert (tmp_path / "moe" / "NOTICE.txt").read_text() == "notice"
    assert not (tmp_path / "moe" / "NOTICE.txt").is_symlink()


@pytest.mark.parametrize("name", [
    "chat_template.jinja", "tokenizer.model", "generation_config.json", "additional_chat_templates/rag.jinja",
    "additional_chat_templates", "tokenizer_config.json",
])  # fmt: skip
def test_a_file_that_is_needed_and_a_link_out_of_the_folder_is_refused(
    make_llama: MakeLlama, tmp_path: Path, secret: Path, name: str
) -> None:
    seed, moe, output = make_llama("seed"), tmp_path / "moe", tmp_path / "made"
    mix(seed, {"a": seed, "b": seed}, moe)
    secret.write_text("{}" if name.endswith("json") else SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text(SECRET)
    for folder in (seed, moe):
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "elsewhere" if name == "additional_chat_templates" else secret)
    said = rf"{name}.*: a link to .*, which lies outside the model's folder"
    with pytest.raises(CheckpointError, match=said):
        mix(seed, {"a": seed, "b": seed}, output)
    with pytest.raises(CheckpointError, match=said):
        drop(moe, "a", output)
    with pytest.raises(CheckpointError, match=said):
        preflight(pico_recipe(tmp_path, "run", f"seed_model={{path: {seed}}}"))
    if name != "tokenizer_config.json":  # without which the expert has other special tokens than the model
        with pytest.raises(CheckpointError, match=said):
            extend(moe, "c", seed, output)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("aim", "words"), [
    ("gone", "tokenizer.model: a link to .*gone, where nothing is"),
    ("tokenizer.model", "tokenizer.model: a link to .*tokenizer.model, where nothing is"),
    (None, "config.json: cannot be read: Permission denied"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_and_not_what_is_written(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aim: str | None, words: str
) -> None:
    seed = make_llama("seed")
    if aim is not None:
        (seed / "tokenizer.model").symlink_to(aim)
    else:
        (seed / "tokenizer.model").touch()

        def unreadable(source: Path, target: Path) -> None:
            raise PermissionError(13, "Permission denied", str(source))

        monkeypatch.setattr("btx.model_files.beside_weights.shutil.copyfile", unreadable)
    with pytest.raises(CheckpointError, match=words):
        copy_beside_weights(seed, tmp_path)


def test_a_folder_of_the_hubs_cache_has_links_into_its_entry_and_works(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, entry = make_llama("seed"), tmp_path / "hub" / "models--org--seed"
    (seed / "LICENSE").write_text("free")
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(seed.iterdir())):
        shutil.move(file, entry / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    (tmp_path / "link").symlink_to(snapshot)  # as a run folder has its seed model
    for given in (snapshot, tmp_path / "link"):
        record = mix(
            given, {"a": given, "b": given}, tmp_path / given.name / "moe" if given != snapshot else tmp_path / "m"
        )
        assert record["inputs"]["seed_model"]["weights"][0]["sha256"].startswith("0" * 60)
    assert (tmp_path / "m" / "LICENSE").read_text() == "free"
    assert not any(file.is_symlink() for file in (tmp_path / "m").iterdir())


def test_only_the_hubs_own_entry_counts_as_its_cache(tmp_path: Path) -> None:
    for entry in ("models--org--x", "evil"):
        folder = tmp_path / entry / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (tmp_path / entry / "secret").write_text(SECRET)
        (folder / "chat_template.jinja").symlink_to("../../secret")
    check_links(tmp_path / "models--org--x" / "snapshots" / "abc")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        copy_beside_weights(tmp_path / "evil" / "snapshots" / "abc", tmp_path)
    (tmp_path / "models--org--x" / "snapshots" / "abc" / "tokenizer.json").symlink_to("../../../evil/secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link to"):
        check_links(tmp_path / "models--org--x" / "snapshots" / "abc")
