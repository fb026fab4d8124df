"""What a stage's folder says of itself: started.json, done.json, and the files that a finished stage has left, each
known by its hash. Plain Python.

done.json names every file that is read later with its size and SHA-256. So a file that was damaged, replaced or cut off
is noticed before a later stage, a report or a chat takes it for what the stage has made. Where a folder lies, and when
its files were written, says nothing: a copy on another machine is as finished as it was. What was made before there
were such records has none and is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import RunFolderError
from btx.files import check_shape, content_sha256, file_sha256, read_json, write_sealed

FORMAT = 2
"""Of started.json; 1, without a number, was of the time when all data were one stage."""
STARTED, DONE = "started.json", "done.json"
FOR_PEOPLE = {".md", ".html", ".svg", ".png"}
"""Endings of files that nothing reads again: anybody may change them."""
NOT_READ = {"state", "trackers"}
"""Folders of a stage that are no outputs: checkpoints, and what trackers keep there."""
SMALL = 1 << 20
"""Bytes up to which a file is always read whole."""

Depth = Literal["quick", "used", "whole"]
"""How closely files are looked at: sizes, and small ones whole; all of them, but for those that were hashed before and
whose size, times and inode are still the same; every byte."""


class Output(TypedDict):
    """A file that a finished stage has left."""

    size: int
    sha256: str


class Done(TypedDict):
    """done.json; more facts of a stage may stand in it."""

    inputs: str
    tokens: float
    flops: float
    wall_s: float
    steps: NotRequired[int]
    loss: NotRequired[float]
    node: NotRequired[str]
    machines: NotRequired[int]
    started_from: NotRequired[str]
    data: NotRequired[str]
    peak_memory_bytes: NotRequired[int | None]
    mfu: NotRequired[float]
    outputs: NotRequired[dict[str, Output]]


class TokenizerDone(Done):
    """done.json of the tokenizer."""

    bos: int | None
    eos: int | None


class Noted(TypedDict):
    """What a stage notes of the data it reads."""

    inputs: str
    settings: dict[str, Any]
    shown: dict[str, Any]
    files: dict[str, str]


class Started(Noted):
    """started.json."""

    format: int
    upstream: dict[str, str]
    read: dict[str, Noted]


class EarlierStarted(TypedDict):
    """started.json of format 1."""

    inputs: str
    settings: dict[str, Any]


Hashes = TypedDict("Hashes", {"weights.safetensors": str, "optimizer.safetensors": str})


class Metrics(TypedDict):
    """metrics.jsonl as it was at a checkpoint."""

    bytes: int
    sha256: str


class CheckpointState(TypedDict):
    """state.json of a checkpoint, or of one process's part of it."""

    step: int
    marks: dict[str, str]
    sha256: Hashes
    device: NotRequired[str]
    metrics: NotRequired[Metrics]
    together: NotRequired[str]
    trunk: NotRequired[str]
    rows: NotRequired[dict[str, list[int]]]


def read_done(folder: Path) -> dict[str, Any] | None:
    """done.json of a stage's folder, None if it is not finished; raises as `btx.files.read_json`."""
    done: dict[str, Any] | None = read_json(folder / DONE, Done)
    return done


def read_started(folder: Path) -> dict[str, Any] | None:
    """started.json of a stage's folder, None if it was not begun; raises as `btx.files.read_json`."""
    begun: dict[str, Any] | None = read_json(folder / STARTED, EarlierStarted)
    if begun is not None and begun.get("format") == FORMAT:
        check_shape(folder / STARTED, begun, Started)
    return begun


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Write the done.json of a stage whose files are all there."""
    write_sealed(folder / DONE, facts | {"outputs": dict(_recorded(folder))})


def check_outputs(folder: Path, *, suffixes: set[str] | None = None) -> None:
    """Refuse a finished stage's folder in which a file is not as the stage has left it.

    Args:
        suffixes: look only at files directly in the folder that end so; None: at all.

    Raises:
        RunFolderError: names the file.
    """
    if (problem := damage(folder, "used", suffixes=suffixes)) is not None:
        raise RunFolderError(problem)


def damage(folder: Path, depth: Depth, *, suffixes: set[str] | None = None) -> str | None:
    """What is wrong with the first file that is not as a finished stage has left it, and what to do; None if all are.

    Arguments as `check_outputs`.
    """
    done = read_done(folder) or {}
    recorded = done.get("outputs", {})
    for name, output in recorded.items():
        if suffixes is not None and ("/" in name or Path(name).suffix not in suffixes):
            continue
        if why := _difference(folder / name, output, depth):
            anew = "adopt the model again" if "adopted" in done else "run the same command again: it is made anew"
            return (f"{folder / name}: {why}; {folder.parent.name}/{folder.name} left it otherwise. Restore it from a "
                    f"copy, or remove the folder {folder} and {anew}")  # fmt: skip
    weights = {path.relative_to(folder).as_posix() for path in folder.glob("model/*.safetensors*")}
    if recorded and not (folder / "model").is_symlink() and (younger := sorted(weights - recorded.keys())):
        return f"{folder / younger[0]}: was not there when the stage was finished, and would be read; remove it"
    return None


def check_model_of_stage(model: Path) -> None:
    """Refuse a model folder that a finished stage has left otherwise; any other folder says nothing of itself."""
    if model.name == "model":
        check_outputs(model.parent)


def read_output(path: Path, shape: Any = None) -> Any:
    """A JSON file that a finished stage has left directly in its folder, as it was left; None if there is none.

    Raises:
        RunFolderError: it is not what the stage has left, or not of this shape; as `btx.files.read_json`.
    """
    output = (read_done(path.parent) or {}).get("outputs", {}).get(path.name)
    if output is not None:
        check_outputs(path.parent, suffixes={path.suffix})
    return read_json(path, shape)


def _recorded(folder: Path) -> Iterator[tuple[str, Output]]:
    """Every file of a stage that is read later. Not those of checkpoints, which say themselves what they are, nor those
    of trackers, which other programs alter, nor those of a model that is only linked, which is known by what it
    holds."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        left_out = name.parts[0] in NOT_READ or any(part.startswith(".") for part in name.parts)
        if left_out or name.as_posix() in (STARTED, DONE) or path.suffix in FOR_PEOPLE:
            continue
        if path.is_file():
            yield name.as_posix(), {"size": path.stat().st_size, "sha256": content_sha256(path)}


def _difference(path: Path, output: Output, depth: Depth) -> str:
    try:
        size = path.stat().st_size
        if size != output["size"]:
            return f"has {size:,} bytes instead of {output['size']:,}"
        if depth == "quick" and size > SMALL:
            return ""
        if depth != "whole" and content_sha256(path) == output["sha256"]:
            return ""
        return "" if file_sha256(path) == output["sha256"] else "its bytes are others than those that were written"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
