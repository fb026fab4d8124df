"""The report's token readers: what the page carries for its script, and two models on the same text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from btx.errors import RunFolderError
from btx.reporting.readers import MAX_CHOICES, read_beside, script, token_readers
from btx.reporting.report import write_report
from btx.reporting.run_files import Run, read_run
from btx.reporting.tokens import PART, parts, routed_text, same_text
from tests.reader_data import EXPERTS, document, run_with, token_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(run_with(tmp_path_factory.mktemp("readers") / "demo", token_file()))


def embedded(run: Run, name: str = "tokens", other: Run | None = None) -> dict[str, Any]:
    return json.loads(token_readers(run, other)[name].data)


def test_the_script_of_the_page_is_the_one_its_policy_names_and_it_is_short(tmp_path: Path) -> None:
    page = write_report(run_with(tmp_path / "demo", token_file())).read_text("utf-8")
    (text,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(text.encode()) <= 10_000
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page
    assert text == script()[0]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:", text)


def test_the_json_of_a_page_holds_tokens_experts_gates_and_bits_of_every_layer_and_model(run: Run) -> None:
    data = embedded(run)
    assert data["experts"] == {"btx": EXPERTS, "mix": ["expert 0", "expert 1", "expert 2"]}
    assert [(each["domain"], each["own"]) for each in data["documents"][:4]] == [
        ("math", 0), ("code", 1), ("general", 2), ("math", 0)]  # fmt: skip
    text = data["documents"][1]["texts"]["btx"]
    assert text["tokens"][:3] == ["def", " area", "("]
    assert text["k"] == [2, 2, 2]
    assert text["experts"][1][:6] == [1, 2, 2, 0, 0, 1]  # token t of layer 1: experts t + 1 and t + 2
    assert text["gates"][0][:4] == [75, 25, 75, 25]
    assert text["bits"]["btx"][5] == 12.25
    assert data["shown"] == ["seed", "expert/math", "expert/code", "mix", "soup", "btx"]  # no results say which is best
    assert data["documents"][1]["texts"]["mix"]["experts"][0][:2] == [1, 2]


def test_whatever_a_token_or_answer_holds_the_json_ends_no_script_element(tmp_path: Path) -> None:
    evil = ["</script><script>alert(1)</script>", "<!--", "]]>", "&lt;", "\ud83d", "\u2028", '"', "\\", "\x00"]
    tokens = {"layers": 1, "experts": ["<b>", "x", "y"], "examples": [document("</script>", evil, layers=1)]}
    folder = run_with(
        tmp_path / "demo", {**tokens, "answers": []} | {"examples": [{**tokens["examples"][0], "document": "a"}]}
    )
    page = write_report(folder).read_text("utf-8")
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert not re.search(r"[<>&]", text)
    assert json.loads(text)["documents"][0]["texts"]["btx"]["tokens"] == evil
    assert json.loads(text)["documents"][0]["domain"] == "</script>"


def test_answers_have_a_reader_of_their_own_beside_gold_seed_and_expert(run: Run) -> None:
    reader = token_readers(run)["answers"]
    assert reader.domains == ["math", "code", "general"]
    assert [token.text for token in reader.documents[0].tokens] == ["14", " +", " 5", " =", " 19"]
    page = write_report(run.folder).read_text("utf-8")
    for shown in ("What of math?", "an expert&#39;s answer", "expert/code, right", "seed, wrong", "gold answer"):
        assert shown in page
    assert reader.measured == []


def test_an_earlier_run_has_tokens_without_bits_and_no_answers(tmp_path: Path) -> None:
    old = token_file()
    folder = run_with(tmp_path / "demo", old)
    (folder / "evaluate/shown.json").unlink()
    readers = token_readers(read_run(folder))
    assert list(readers) == ["tokens"]
    assert readers["tokens"].measured == readers["tokens"].beside == []
    page = write_report(folder).read_text("utf-8")
    assert "next surprising" not in page.split("<script>")[0]
    assert "No answers are recorded" in page


def test_the_first_documents_are_in_the_page_without_its_script(run: Run) -> None:
    reader = token_readers(run)["tokens"]
    assert [len(each.tokens) for each in reader.documents] == [42] * 6
    assert reader.documents[1].tokens[0].classes == "a1 b2 first"  # layer 1 of 3
    assert reader.documents[1].tokens[2].classes == "a0 b1 second"


def test_a_top_1_router_has_one_expert_a_token_and_no_pairs(tmp_path: Path) -> None:
    one = {**document("math", ["a", "b"], layers=1), "experts": [[[0]], [[2]]], "gates": [[[0.9]], [[0.4]]]}
    run_folder = run_with(tmp_path / "demo", {"layers": 1, "experts": EXPERTS, "examples": [one | {"document": "a"}]})
    reader = token_readers(read_run(run_folder))["tokens"]
    assert [token.classes for token in reader.documents[0].tokens] == ["a0 b0 first", "a2 b2"]
    assert reader.legend == []


def test_gates_that_are_not_in_order_are_put_in_order() -> None:
    one = {**document("math", ["a"], layers=1), "gates": [[[0.25, 0.75]]]}
    text = routed_text("btx", one)
    assert (text.experts, text.gates) == ([[[1, 0]]], [[[0.75, 0.25]]])


@pytest.mark.long
def test_a_long_document_is_shown_in_parts_and_what_would_make_the_page_too_large_is_left_out(tmp_path: Path) -> None:
    tokens = token_file(count=2 * PART + 1, layers=1, documents=1)
    readers = token_readers(read_run(run_with(tmp_path / "long", tokens)))
    assert [each.part for each in readers["tokens"].documents if each.domain == "code"] == [
        "part 1 of 3", "part 2 of 3", "part 3 of 3"]  # fmt: skip
    wide = document("math", ["a"] * 300, layers=2)
    wide["experts"] = [[[0] * 3000] * 2] * 300
    wide["gates"] = [[[0.0] * 3000] * 2] * 300
    copies = [wide | {"document": str(number)} for number in range(3)]
    reader = token_readers(read_run(run_with(tmp_path / "wide", {"layers": 2, "experts": EXPERTS, "examples": copies})))
    assert reader["tokens"].left_out == 600
    assert 300 * 6000 <= MAX_CHOICES < 2 * 300 * 6000


def test_the_same_text_of_another_tokenizer_is_found_by_its_characters_and_cut_at_the_same_places(
    run: Run, tmp_path: Path
) -> None:
    theirs = token_file()
    for example in theirs["examples"]:
        letters = list("".join(example["tokens"]))
        example |= document(example["domain"], letters) | {"losses": {"btx": [0.5] * len(letters)}, "routes": {}}
    other = read_beside(run, run_with(tmp_path / "letters", theirs))
    data = embedded(run, other=other)
    texts = data["documents"][0]["texts"]
    assert list(texts) == ["btx", "mix", "letters"]
    assert "".join(texts["letters"]["tokens"]) == "".join(texts["btx"]["tokens"])
    assert texts["letters"]["bits"] == {"letters": [0.5] * len(texts["letters"]["tokens"])}
    assert token_readers(run, other)["tokens"].first_beside == "letters"


def test_parts_of_two_tokenizations_hold_the_same_characters() -> None:
    words = routed_text("a", document("math", ["one ", "two "] * PART))
    letters = routed_text("b", document("math", list("one two " * PART)))
    cut = parts([words, letters])
    assert ["".join(text.tokens) for text in cut[0]] == ["one two " * (PART // 2)] * 2
    assert sum(len(part[1].tokens) for part in cut) == len(letters.tokens)


def test_texts_cut_elsewhere_are_the_same_and_other_texts_are_not() -> None:
    def text(words: str) -> Any:
        return routed_text("a", document("math", words.split(" ")))

    long = "a long enough text of many words which goes on and on " * 2
    assert same_text(text(long), text(long[:70].strip()))
    assert not same_text(text(long), text(long.replace("many", "few")))
    assert not same_text(text(long), text("a"))


def test_a_folder_without_a_text_of_the_run_is_refused(run: Run, tmp_path: Path) -> None:
    other = {"layers": 3, "experts": EXPERTS, "examples": [document("math", ["quite", " another", " text"] * 30)]}
    other["examples"][0]["document"] = "x"
    with pytest.raises(RunFolderError, match=r"no text that .* shows too"):
        write_report(run.folder, beside=run_with(tmp_path / "other", other))
