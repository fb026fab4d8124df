"""Documents that change their subject within themselves: picked by the rule that is stated, measured where it says."""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from btx.data.held_out import pack
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.models.loading import load_model, load_tokenizer

PROSE = "This paragraph says in plain words what the code below it does, and why it was written that way.\n" * 3
CODE = "    total = total + weights[number] * values[number]\n    return total(first, second)\n" * 4
FORMULA = "\\begin{align*} \\alpha + \\beta &= \\gamma \\\\ \\sum_{i} x_i &= 3 \\cdot 4 + 12^2 \\end{align*}\n" * 4


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of benchmarks/ as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def picking(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("changing_subject")


@pytest.fixture(scope="module")
def measuring(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("changing_subject_bits")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("The trainer reads every document once, from start to end.", "prose"),
        ("    # Attention stops between documents, so nothing leaks.", "prose"),
        ("'I never said so!' she exclaimed; 'he never loved me at all.'", "prose"),
        ("difference = predict - actual", "code"),
        ("for number in range(4):", "code"),
        ("from os import path", "code"),
        ("from the window we saw how the rain fell", "prose"),
        (">>> text.split()", "code"),
        ("int main(void)", "code"),
        ("print(total, flush=True)", "code"),
        ("$x^2 + y^2 = z^2$ \\quad \\text{for}", "formula"),
        ("12 * 4 + 3 = 51", "formula"),
        ("------------", None),
        ("    315.0", None),
        ("Introduction", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_line_is_prose_code_or_a_formula_by_its_words_and_marks(picking: ModuleType, line: str, kind: str | None):
    assert picking.line_kind(line) == kind


def test_passages_cover_the_text_change_their_kind_and_leave_short_ones_to_what_is_before_them(picking: ModuleType):
    short = "x = total(3)\n"
    text = "A Title\n\n" + PROSE + short + PROSE + CODE + "\n" + FORMULA
    found = picking.passages(text)
    assert [part.kind for part in found] == ["prose", "code", "formula"]
    assert [part.start for part in found] == [0, text.index(CODE), text.index(FORMULA)]
    assert sum(part.bytes for part in found) == len(text.encode()) + 1  # a line end is counted behind the last line too
    assert picking.passages(short + PROSE)[0].kind == "prose"  # the first goes with what is after it
    assert picking.passages("Title\n\nName\n") == []


def test_a_document_counts_with_two_kinds_of_a_fifth_each_and_three_changes(picking: ModuleType):
    def counts(text: str) -> bool:
        return bool(picking.changes_subject(picking.passages(text)))

    assert counts(PROSE + CODE + PROSE + CODE)
    assert not counts(PROSE + CODE + PROSE)
    assert not counts(20 * PROSE + CODE + PROSE + CODE)
    assert not counts("")


def test_held_out_documents_are_written_with_their_passages_each_text_once(
    picking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = PROSE + CODE + PROSE + CODE
    for domain, texts in {"code": [text, PROSE], "general": [text]}.items():
        (tmp_path / domain).mkdir()
        with gzip.open(tmp_path / domain / "val.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": one, "source": "somewhere"}) + "\n" for one in texts)
    output = tmp_path / "changing.jsonl"
    monkeypatch.setattr("sys.argv", ["changing_subject", str(tmp_path), "-o", str(output), "--show", "1"])
    picking.main()
    (line,) = map(json.loads, output.read_text("utf-8").splitlines())
    assert line["domain"] == "code"
    assert [text[start:].startswith((PROSE, CODE)) for start, _ in line["passages"]] == [True] * 4
    said = capsys.readouterr().out
    assert f"| code: somewhere | 1 | 3 | {2 * len(PROSE)} | {2 * len(CODE) + 1} | 0 |" in said.replace(",", "")
    monkeypatch.setattr("sys.argv", ["changing_subject", str(tmp_path / "none"), "-o", str(output)])
    with pytest.raises(SystemExit, match="no document that changes"):
        picking.main()


@pytest.fixture
def line(picking: ModuleType) -> dict[str, Any]:
    text = PROSE + CODE + FORMULA + CODE
    return {"text": text, "domain": "math", "passages": [[part.start, part.kind] for part in picking.passages(text)]}


def test_tokens_are_told_apart_by_how_long_ago_the_last_change_in_sight_was(
    measuring: ModuleType, line: dict[str, Any], pico_tokenizer_folder: Path
):
    tokenizer = load_tokenizer(pico_tokenizer_folder)
    whole = measuring.in_tokens(line, tokenizer, 100_000)
    assert whole.bytes[measuring.WHOLE] == len(line["text"])
    assert sum(whole.bytes[name] for name in (measuring.SOON, measuring.LATER, measuring.REST)) == len(line["text"])
    assert [end for *_, end in whole.parts][-1] == len(whole.tokens) - 1
    soon = [(start, end) for names, start, end in whole.parts if measuring.SOON in names]
    changes = [start for start, _ in soon]
    assert [end - start for start, end in soon] == [32, 32, 32]
    starts = [start for start, _ in line["passages"]][1:]
    decoded = [len(tokenizer.decode(whole.tokens[1 : 1 + change])) for change in changes]
    assert decoded == starts
    assert {f"{measuring.SOON}, {pair}" for pair in ("prose to code", "code to formula", "formula to code")} <= set(
        whole.bytes
    )

    length = changes[0] + measuring.IN_SIGHT  # pieces that start shortly before and after changes
    pieces = measuring.in_tokens(line, tokenizer, length)
    for names, start, end in pieces.parts:
        for token in range(start, end):
            piece = token // (length - 1) * (length - 1)
            last = max((change for change in changes if change <= token), default=-1)
            seen = last >= 0 and last + 1 - piece >= measuring.IN_SIGHT
            assert (measuring.SOON in names) == (seen and token - last < 32), token
            assert (measuring.LATER in names) == (seen and 32 <= token - last < 128), token


def test_changes_are_read_with_what_was_before_them_and_know_the_experts_of_their_kinds(
    measuring: ModuleType, line: dict[str, Any], pico_tokenizer_folder: Path
):
    tokenizer = load_tokenizer(pico_tokenizer_folder)
    found = measuring.changes_of([line], measuring.DocumentEncoder(tokenizer), ["math", "code", "generalist"])
    assert list(found) == ["math, prose to code", "math, code to formula", "math, formula to code"]
    assert [(change.old, change.new) for (change,) in found.values()] == [(2, 1), (1, 0), (0, 1)]
    (change,) = found["math, code to formula"]
    before, after = (tokenizer.decode(part) for part in (change.tokens[1 : change.at], change.tokens[change.at :]))
    assert CODE.endswith(before)
    assert FORMULA.startswith(after)
    assert not measuring.changes_of([line], measuring.DocumentEncoder(tokenizer), ["birds", "tools"])


def test_bits_are_those_of_the_evaluation_and_differences_are_taken_run_by_run(
    measuring: ModuleType, line: dict[str, Any], make_llama: Callable[..., Path], pico_tokenizer_folder: Path
):
    tokenizer = load_tokenizer(pico_tokenizer_folder)
    lines = [line, {"text": PROSE, "domain": "code", "passages": [[0, "prose"]]}]
    documents = [measuring.in_tokens(one, tokenizer, 64) for one in lines]
    model = load_model(make_llama("one"))
    sums = measuring.bits_of(model, documents, 64)
    held_out = [
        measuring.HeldOutDocument(one.tokens, len(text["text"])) for one, text in zip(documents, lines, strict=True)
    ]
    assert sums[measuring.WHOLE] == pytest.approx(bits_per_byte(model, pack(held_out, 64)).document_bits, abs=0.3)

    sizes = {name: [float(one.bytes[name]) for one in documents] for name in sums}
    halved = {name: [value / 2 for value in values] for name, values in sums.items()}
    models = {name: {"domains": found, "tasks": {}} for name, found in (("btx", halved), ("a", sums))}
    measured = {"bytes": {"domains": sizes}, "models": models}
    table = measuring.bits_table(measuring.added([measured, measured]))
    assert f"| {measuring.WHOLE} | 2 | {2 * (len(line['text']) + len(PROSE)):,} |" in table
    assert f"| {measuring.SOON} | 1 |" in table  # the other document never changes
    rows = measuring.differences_table({"btx − a": [measuring.Pair(measured, "btx", measured, "a")] * 2}).split("\n")
    fewer = {"bytes": {"domains": {measuring.WHOLE: sizes[measuring.WHOLE]}}, "models": models}  # of another tokenizer
    assert list(measuring.added([measured, fewer])["bytes"]["domains"]) == [measuring.WHOLE]
    (row,) = [row for row in rows if row.startswith(f"| {measuring.WHOLE} |")]
    gap = sum(sums[measuring.WHOLE]) / sum(sizes[measuring.WHOLE]) / 2
    assert row.split("|")[2].startswith(f" −{gap:.3f} ± 0.000 (−")
