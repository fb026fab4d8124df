"""Sources: every format, held-out documents, duplicates, limits, and errors with file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from btx.data import domains
from btx.data.sources import read_documents, split_documents
from btx.errors import DataError, UserError
from btx.recipe.data import Data

TEXTS = [f"Document {n}: ä\u2028 {'x' * n}" for n in range(200)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def read(source: Any, root: Path, **data: Any) -> tuple[list[str], list[str]]:
    """Train and held-out documents of domain `d`, whose one source (or domain) is `source`."""
    section = Data.model_validate({"domains": {"d": source}, "general": "d", "root": str(root), **data})
    first = section.domains["d"].sources[0]
    train, val = (
        list(read_documents(first, split, domain="d", data=section, rng_seed=0)) for split in ("train", "val")
    )
    return train, val


def both(source: Any, root: Path) -> list[str]:
    """Train and held-out documents together."""
    train, val = read(source, root)
    return train + val


def error_of(source: Any, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(source, root)
    return str(caught.value)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, {"id": list(range(200)), "text": TEXTS})
    elif name.endswith(".txt"):
        path.write_bytes("\n\n\n".join(TEXTS).encode() + b"\n")
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
        path.write_bytes(pack(json_lines(TEXTS)))
    train, val = read(name, tmp_path)
    assert set(train) | set(val) == set(TEXTS)
    assert len(train) + len(val) == 200
    assert train == [text for text in TEXTS if text in set(train)]
    assert 2 <= len(val) <= 20


def test_another_key_or_column_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "body"))
    write_parquet(tmp_path / "b.parquet", {"text": [1] * 200, "body": TEXTS})
    for name in ("a.jsonl", "b.parquet"):
        assert len(both({"path": name, "text": "body"}, tmp_path)) == 200


def test_several_zstd_frames_and_gzip_members_are_read_on(tmp_path: Path) -> None:
    halves = json_lines(TEXTS[:100]), json_lines(TEXTS[100:])
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    for name in ("a.jsonl.zst", "b.jsonl.gz"):
        assert len(both(name, tmp_path)) == 200


def test_lines_end_at_newlines_only_and_longer_than_a_block(tmp_path: Path) -> None:
    texts = ["a\u2028b\u0085c\x0b\x0cd\x1ce\r\nf", "y" * 3_000_000, "last"]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(texts).replace(b"\n", b"\r\n\n").rstrip())
    assert sorted(both("a.jsonl", tmp_path)) == sorted(texts)


def test_text_files_are_cut_at_their_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\nstill one\r\n\r\n\r\n\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"one\n\n\nmore<end>\ntwo<end>\n  \n<end>")
    assert sorted(both("a.txt", tmp_path)) == ["one\n\nstill one", "two"]
    assert sorted(both({"path": "b.txt", "document_separator": "<end>"}, tmp_path)) == ["one\n\n\nmore", "two"]
    assert len(both({"path": "b.txt", "document_separator": ""}, tmp_path)) == 1
    (tmp_path / "c.txt").write_bytes(b"one\r\n---\r\ntwo\r\n")
    for separator in ("\r\n---\r\n", "\n---\n", "---"):  # line ends are alike in the file and here
        assert sorted(both({"path": "c.txt", "document_separator": separator}, tmp_path)) == ["one", "two"]


def test_folders_and_globs_are_read_with_their_subfolders_in_order(tmp_path: Path) -> None:
    for n, name in enumerate(["b/1.jsonl", "a.jsonl", "b/c/2.jsonl", ".hidden/3.jsonl", "b/notes.md"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([f"{n}"]))
    assert read({"sources": [{"path": "."}]}, tmp_path, held_out=1e-9)[0] == ["1", "0", "2"]
    assert read("b/**/*.jsonl", tmp_path, held_out=1e-9)[0] == ["0", "2"]
    assert read(str(tmp_path / "b" / "?.jsonl"), Path("/"), held_out=1e-9)[0] == ["0"]


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data[1]" / "train.jsonl").write_bytes(json_lines(["a"]))
    (tmp_path / "data[1]" / "test.jsonl").write_bytes(json_lines(["b"]))
    assert read("data[1]", tmp_path) == (["a"], ["b"])
    (tmp_path / "data1").mkdir()  # what the brackets would stand for, were there no folder called so
    (tmp_path / "data1" / "train.jsonl").write_bytes(json_lines(["c"]))
    for glob in ("data[[]1]/*.jsonl", "data[1]/*.jsonl", "data[1]/**/*.jsonl", str(tmp_path / "data[1]" / "t*")):
        assert read(glob, tmp_path) == (["a"], ["b"])
    assert both("data[1-3]/*.jsonl", tmp_path) == ["c"]
    assert sorted(both("**/[a.t]*.jsonl", tmp_path)) == ["a", "b", "c"]


def test_files_named_for_it_are_held_out_beside_train_files(tmp_path: Path) -> None:
    names = ["train-0.jsonl", "train/1.jsonl", "more.jsonl", "validation.jsonl", "Test.jsonl", "heldout/2.jsonl"]
    for n, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([f"{n}"]))
    train, val = read({"path": "."}, tmp_path)
    assert (sorted(train), sorted(val)) == (["0", "1", "2"], ["3", "4", "5"])
    assert sorted(read({"path": "*.jsonl"}, tmp_path)[1]) == ["3", "4"]


def test_without_train_files_a_name_holds_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(json_lines(TEXTS))
    train, val = read({"path": "."}, tmp_path)
    assert len(train) > 150
    assert len(val) > 1


def test_held_out_files_of_the_domain_come_first_and_belong_to_its_first_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, texts in {"a/train": ["1", "2"], "a/test": ["3"], "b": ["4", "5"], "held": ["5", "1"]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts))
    domain = {"sources": [{"path": "a"}, {"path": "b.jsonl"}], "held_out": "held.jsonl"}
    assert read(domain, tmp_path) == (["2"], ["5", "1"])
    domain["sources"].reverse()
    assert read(domain, tmp_path) == (["4"], ["5", "1"])
    data = Data.model_validate({"domains": {"d": domain}, "general": "d", "root": str(tmp_path)})
    second = split_documents(data.domains["d"].sources[1], domain="d", data=data, rng_seed=0)
    assert list(second) == [("train", "2")]


def test_a_document_is_on_one_side_whatever_its_source_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS + TEXTS[::-1]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["other", *TEXTS[::2]]))
    train, val = read("a.jsonl", tmp_path)
    assert len(train) == len(set(train))
    assert not set(train) & set(val)
    train_b, val_b = read("b.jsonl", tmp_path)
    assert set(train_b) - {"other"} <= set(train)
    assert set(val_b) - {"other"} <= set(val)


def test_the_held_out_share_is_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([str(n) for n in range(10_000)]))
    assert len(read("a.jsonl", tmp_path, held_out=0.2)[1]) == pytest.approx(2000, abs=200)


def test_a_train_document_that_is_held_out_elsewhere_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json_lines(["a", "b", "c", "a"]))
    (tmp_path / "val.jsonl").write_bytes(json_lines(["b", "d", "d"]))
    assert read({"path": "."}, tmp_path) == (["a", "c"], ["b", "d"])
    assert read({"path": ".", "max_bytes": 2}, tmp_path, held_out=0.4) == (["a"], ["b"])


def test_max_bytes_counts_utf8_bytes_of_both_sides(tmp_path: Path) -> None:
    texts = [f"{n:03}ä" for n in range(200)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    train, val = read({"path": "a.jsonl", "max_bytes": 500}, tmp_path)
    assert len(train) + len(val) == 100
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "train.jsonl").write_bytes(json_lines(texts[:100]))
    (tmp_path / "f" / "val.jsonl").write_bytes(json_lines(texts[100:]))
    train, val = read({"path": "f", "max_bytes": 100}, tmp_path, held_out=0.2)
    assert (len(train), len(val)) == (16, 4)


def test_a_local_dataset_folder_is_read_like_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-00000.parquet", {"body": TEXTS, "id": list(range(200))})
    write_parquet(tmp_path / "set" / "test-00000.parquet", {"body": ["held"], "id": [1]})
    hub = {"hub": "set", "text": "body"}
    for streaming in (True, False):
        assert len(both({**hub, "streaming": streaming}, tmp_path)) == 200
    assert both({**hub, "split": "test"}, tmp_path) == ["held"]
    message = error_of({"hub": "set"}, tmp_path)
    assert "split 'train', row 1: no key 'text'; keys there: 'body', 'id'" in message
    assert "split 'dev': cannot be read" in error_of({**hub, "split": "dev"}, tmp_path)


def test_generated_documents_are_those_of_the_generator() -> None:
    train, val = read({"generate": "math", "max_bytes": 20_000}, Path(), held_out=0.2)
    made = [document.text for document in domains.documents("math", "val", 0, 20_000, 0.2)]
    assert val == list(dict.fromkeys(made))
    assert sum(len(text.encode()) for text in train) > 8000
    assert not set(train) & set(val)


def test_missing_files_are_named_with_absolute_path_and_domain(tmp_path: Path) -> None:
    message = error_of("no/such.jsonl", tmp_path)
    assert message.startswith(f"domain 'd': {tmp_path}/no/such.jsonl: no such file or folder")
    assert "data.root" in message
    assert f"{tmp_path}/*.jsonl: no file matches" in error_of("*.jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    assert f"{tmp_path}/h.jsonl: no such file" in error_of({"path": "a.jsonl", "held_out": "h.jsonl"}, tmp_path)


def test_a_folder_without_readable_files_says_what_is_there_and_what_could_be(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    assert "found: nothing" in error_of("f", tmp_path)
    (tmp_path / "f" / "notes.docx").touch()
    assert "formats: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt; found: notes.docx" in error_of("f", tmp_path)
    assert "found: notes.docx" in error_of("f/notes.docx", tmp_path)


BROKEN_LINES = [
    (b"{oops}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "a list, not a JSON object"),
    (b'{"body": "a", "id": 1}', "no key 'text'; keys there: 'body', 'id'"),
    (b'{"text": null}', "'text' is null, not a string"),
    (b'{"text": 3}', "'text' is a int, not a string"),
    (b'{"text": "\xff"}', "not UTF-8 (invalid start byte at byte 11 of the line)"),
    (b'{"text": "\\ud83d"}', "not valid Unicode (surrogates not allowed)"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN_LINES)
def test_a_broken_line_is_named_with_file_and_number(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["a\u2028b"]) + b"\n" + line + b"\n")
    message = error_of("a.jsonl", tmp_path)
    assert message.startswith(f"domain 'd': {path}, line 3: ")
    assert problem in message


def test_parquet_errors_name_the_columns_or_the_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    write_parquet(tmp_path / "b.parquet", {"text": ["a", None]})
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet PAR1")
    assert "a.parquet: no column 'text'; columns there: 'body', 'id'" in error_of("a.parquet", tmp_path)
    assert "b.parquet, row 2: 'text' is null, not a string" in error_of("b.parquet", tmp_path)
    assert "c.parquet: cannot be read: broken parquet" in error_of("c.parquet", tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_cut_off_and_broken_compressed_files_are_refused(tmp_path: Path, keep: float) -> None:
    plain = json_lines(TEXTS * 20)
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        packed = pack(plain)
        (tmp_path / name).write_bytes(packed[: int(len(packed) * keep)])
        assert "cut off" in error_of(name, tmp_path)
        (tmp_path / name).write_bytes(plain)
        assert f"{name}: cannot be read" in error_of(name, tmp_path)


def test_files_that_hold_no_document_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": [" "]})
    for name, content in {
        "a.jsonl": b"",
        "b.jsonl": b"\n\n",
        "a.txt": b" \n",
        "a.jsonl.gz": gzip.compress(b""),
    }.items():
        (tmp_path / name).write_bytes(content)
    for path in tmp_path.iterdir():
        assert f"{path}: this file holds no document" in error_of(path.name, tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    assert "a.txt: not UTF-8" in error_of("a.txt", tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard"), (None, "datasets")]
)
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.jsonl.zst").touch()
    with pytest.raises(UserError, match=rf"package {package}: pip install 'branchtrainmix\[data\]'"):
        read(name or {"hub": "somebody/something"}, tmp_path)
