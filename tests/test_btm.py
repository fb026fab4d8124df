"""Branch-Train-Merge: weights from the context alone, mixed distributions against slow references, the folder."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from btx.baselines.btm import TEMPERATURES, best_temperature, pieces_of, write_btm_folder
from btx.baselines.btm_model import BtmModel, load_model_or_btm
from btx.baselines.text_similarity import TextSimilarity, looks
from btx.data.expert_text import TextRows
from btx.data.held_out import HeldOutDocument, Packed, pack
from btx.data.token_files import DocumentEncoder
from btx.errors import CheckpointError, UserError
from btx.evaluation import bits_per_byte as bits_per_byte_module
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.evaluation.tasks import complete
from btx.models.loading import load_model
from btx.models.outputs import token_nll
from btx.models.placement import Place
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.serving.sampling import Sampling
from btx.serving.speaker import completion
from btx.stages.baselines import write_btm
from tests.pico_models import llama, prepared_run, recipe, tokenizer, write_token_file

WORDS = {
    "math": ["sum", "three", "four", "seven", "42", "7", "+", "x"],
    "code": ["def", "return", "Answer:", "naïve", "€", "😀", "Zürich"],
    "generalist": ["the", "of", "and", "is", "café", "Question:", "1\n"],
}
WINDOW = 8


def text_of(kind: str, words: int, rng_seed: int) -> str:
    """Mostly words of one kind, some of all: no single word settles it."""
    rng = random.Random(f"{kind} {rng_seed}")
    every = [word for own in WORDS.values() for word in own]
    return " ".join(rng.choice(WORDS[kind] if rng.random() < 0.7 else every) for _ in range(words))


def encoded(texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids) for ids in DocumentEncoder(tokenizer())(texts)]


def rows_of(kind: str) -> TextRows:
    pieces = encoded([text_of(kind, 30, rng_seed) for rng_seed in range(24)])
    width = max(map(len, pieces))
    ids_BS = np.zeros((len(pieces), width), np.int64)
    for row, piece in enumerate(pieces):
        ids_BS[row, : len(piece)] = piece
    return TextRows(kind, ids_BS, np.tile(np.arange(width), (len(pieces), 1)))


def folder_of(place: Path, top_k: int = 2) -> Path:
    models = {name: llama(place / name, rng_seed=number) for number, name in enumerate(WORDS)}
    write_btm_folder(place / "btm", models, {name: rows_of(name) for name in WORDS}, top_k=top_k, window=WINDOW)
    return place / "btm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("btm"))


@pytest.fixture(scope="module")
def btm(folder) -> BtmModel:
    return BtmModel.load(folder)


def mixed_documents() -> list[HeldOutDocument]:
    """Texts that begin as one kind and end as another, one of them longer than a sequence of 48."""
    texts = [
        f"{text_of(a, 9, i)} {text_of(b, 9, i)}"
        for i, (a, b) in enumerate(
            [("math", "code"), ("code", "generalist"), ("generalist", "math"), ("math", "math"), ("code", "math")]
        )
    ]
    texts.append(" ".join(text_of(kind, 12, 9) for kind in WORDS))
    return [HeldOutDocument(ids, len(text.encode())) for ids, text in zip(encoded(texts), texts, strict=True)]


@cache
def plain_models(place: Path) -> list:
    return [AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float64) for name in WORDS]


def slow_log_probs(place: Path, ids: np.ndarray) -> torch.Tensor:
    """Next-token log-probabilities of every member by the plain class in float64: (N, S, V)."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(dim=-1)
                            for model in plain_models(place)])  # fmt: skip


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_text_is_most_like_its_own_kind_and_the_more_so_the_longer_it_is(btm):
    similarity = replace(btm.similarity, temperature=0.1)
    for number, kind in enumerate(WORDS):
        short, long = encoded([text_of(kind, 2, 99)])[0], encoded([text_of(kind, 60, 99)])[0]
        own_short, own_long = similarity.weights([short, long], 3)[:, number]
        assert own_long > 0.9
        assert own_long > own_short


def test_weights_are_a_softmax_of_the_cosines_of_tf_idf_vectors_written_out_by_hand():
    kinds = {"a": [np.array([9, 1, 1, 2]), np.array([9, 2, 3])], "b": [np.array([9, 4, 4]), np.array([9, 2, 4, 5])]}
    found = TextSimilarity.fit(kinds, 10, special=[9])
    texts = [*kinds["a"], *kinds["b"]]
    idf = {token: math.log(5 / (1 + sum(token in text for text in texts))) + 1 for token in (1, 2, 3, 4, 5)}

    def vector(text: np.ndarray) -> np.ndarray:
        raw = np.zeros(10)
        for token, weight in idf.items():
            count = int((text == token).sum())
            raw[token] = weight * (1 + math.log(count)) if count else 0.0
        return raw / np.linalg.norm(raw)

    means = [sum(map(vector, texts)) for texts in kinds.values()]
    cosines = [float(vector(np.array([9, 2, 2, 4])) @ mean) / float(np.linalg.norm(mean)) for mean in means]
    np.testing.assert_allclose(found.cosines([np.array([9, 2, 2, 4])])[0], cosines, rtol=1e-5)
    raised = np.exp(2 * np.array(cosines) / found.temperature)
    np.testing.assert_allclose(found.weights([np.array([9, 2, 2, 4])], 2)[0], raised / raised.sum(), rtol=1e-5)


def test_exactly_k_models_have_a_weight_but_all_have_the_same_where_the_context_says_nothing(btm):
    contexts = encoded([text_of("code", 20, 1), ""])
    weights = btm.similarity.weights(contexts, 2)
    assert (weights[0] > 0).sum() == 2
    np.testing.assert_allclose(weights[1], 1 / 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_the_context_is_looked_at_often_at_first_and_then_once_a_window():
    assert looks(200, 64) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 192]
    assert looks(3, 64) == [0, 1, 2]
    assert looks(1, 64) == [0]


def test_the_temperature_is_the_one_that_predicts_text_put_aside_best(folder, btm, monkeypatch):
    tries = (0.005, 0.03, 0.1, 0.3, 1.0)
    monkeypatch.setattr("btx.baselines.btm.TEMPERATURES", tries)
    texts = [pack([HeldOutDocument(ids, 1) for ids in encoded([text_of(kind, 30, seed) for seed in (77, 78)])], 256)
             for kind in WORDS]  # fmt: skip
    paths = [folder.parent / kind for kind in WORDS]
    found = best_temperature(btm.similarity, paths, texts, top_k=2, window=WINDOW, place=Place())
    nlls = {}
    for temperature in tries:
        tried = BtmModel(btm.members, replace(btm.similarity, temperature=temperature), top_k=2, window=WINDOW)
        nlls[temperature] = sum(float(tried.token_nll(rows).mean()) for rows in texts)
    assert found == min(nlls, key=nlls.__getitem__)
    assert len(set(nlls.values())) == len(tries)
    assert json.loads((folder / "btm.json").read_text("utf-8"))["temperature"] in TEMPERATURES


def test_what_comes_later_changes_no_weight_and_no_likelihood_before_it(btm):
    document = mixed_documents()[0]
    cut = len(document.tokens) * 2 // 3
    other = document.tokens.copy()
    other[cut:] = encoded([text_of("generalist", 60, 5)])[0][1 : len(other) - cut + 1]
    assert (other[cut:] != document.tokens[cut:]).all() | (other[-1] != document.tokens[-1])
    rows, changed = (pack([HeldOutDocument(tokens, document.bytes)], 128) for tokens in (document.tokens, other))
    torch.testing.assert_close(btm.weights(rows)[0, :cut], btm.weights(changed)[0, :cut], rtol=0, atol=0)
    torch.testing.assert_close(btm.token_nll(rows)[: cut - 1], btm.token_nll(changed)[: cut - 1])
    assert not torch.equal(btm.weights(rows)[0, cut:], btm.weights(changed)[0, cut:])


# --- likelihoods ----------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_mixed_distributions_one_token_after_the_other(btm, folder):
    documents = mixed_documents()[:3]
    bits, switched = 0.0, False
    for document in documents:
        ids, log_probs_NSV = document.tokens, slow_log_probs(folder.parent, document.tokens)
        for position in range(len(ids) - 1):
            look = max(at for at in looks(len(ids), WINDOW) if at <= position)
            weights_N = torch.from_numpy(btm.similarity.weights([ids[: look + 1]], 2)[0])
            switched |= look > 0 and int((weights_N > 0).sum()) == 2
            bits -= math.log2(float(weights_N @ log_probs_NSV[:, position, ids[position + 1]].exp()))
    found = bits_per_byte(btm, pack(documents, 128))
    assert switched
    assert found.bits_per_byte == pytest.approx(bits / sum(document.bytes for document in documents), rel=1e-5)


def test_neither_packing_nor_the_micro_batch_changes_the_bits(btm, monkeypatch):
    packed = pack(mixed_documents(), 48)
    whole = bits_per_byte(btm, packed).bits_per_byte
    monkeypatch.setattr(bits_per_byte_module, "MICRO_BATCH_TOKENS", 1)
    assert bits_per_byte(btm, packed).bits_per_byte == pytest.approx(whole, rel=1e-6)
    alone = [bits_per_byte(btm, pack([document], 48)) for document in mixed_documents()]
    bits = sum(one.bits_per_byte * one.bytes for one in alone)
    assert bits / sum(one.bytes for one in alone) == pytest.approx(whole, rel=1e-6)


def test_equal_members_say_what_one_of_them_says(tmp_path):
    model = load_model(llama(tmp_path / "one"))
    similarity = TextSimilarity.fit({name: pieces_of(rows_of(name)) for name in WORDS}, 320)
    btm = BtmModel(dict.fromkeys(WORDS, model), similarity, top_k=2, window=WINDOW)
    packed = pack(mixed_documents(), 48)
    torch.testing.assert_close(btm.token_nll(packed), token_nll(model, packed), rtol=1e-5, atol=1e-5)


# --- generation -----------------------------------------------------------------------------------------------------


def test_left_padded_batches_answer_like_one_prompt_after_the_other_by_hand(btm, folder):
    prompts = [text_of(kind, words, 4) for kind, words in (("math", 3), ("code", 9), ("generalist", 6))]
    together = complete(btm, tokenizer(), prompts, "never written", 20)
    used = []
    for prompt, output in zip(prompts, together, strict=True):
        ids = encoded([prompt])[0]
        for step in range(20):
            if step % WINDOW == 0:
                weights_N = torch.from_numpy(btm.similarity.weights([ids], 2)[0])
                used.append(tuple((weights_N > 0).tolist()))
            mixed_V = (weights_N @ slow_log_probs(folder.parent, ids)[:, -1].exp()).log()
            ids = np.append(ids, int(mixed_V.argmax()))
            if ids[-1] == tokenizer().eos_token_id:
                break
        assert output == tokenizer().decode(ids, skip_special_tokens=True).removeprefix(prompt)
    assert len(set(used)) > 1, "no member took over from another: this test says little"


def test_called_like_a_model_of_transformers_it_says_and_generates_the_same(btm):
    document = mixed_documents()[0]
    logits_SV = btm(torch.from_numpy(np.r_[document.tokens, [5, 6, 7]])[None]).logits[0, : len(document.tokens)]
    torch.testing.assert_close(logits_SV.exp().sum(dim=-1), torch.ones(len(logits_SV)))
    nll_R = btm.token_nll(pack([document], 128))
    torch.testing.assert_close(-logits_SV[:-1].gather(1, torch.from_numpy(document.tokens)[1:, None])[:, 0], nll_R)
    prompts = [text_of(kind, words, 6) for kind, words in (("math", 3), ("code", 9))]
    encoded_prompts = [ids.tolist() for ids in encoded(prompts)]
    width = max(map(len, encoded_prompts))
    ids_BS = torch.tensor([[0] * (width - len(ids)) + ids for ids in encoded_prompts])
    mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded_prompts])
    made_BS = btm.generate(ids_BS, attention_mask=mask_BS, max_length=width + 12, pad_token_id=0)
    texts = tokenizer().batch_decode(made_BS[:, width:], skip_special_tokens=True)
    assert texts == complete(btm, tokenizer(), prompts, "never written", 12)
    stopped = btm.generate(ids_BS, attention_mask=mask_BS, max_length=99, stopping_criteria=lambda ids, _: True)
    assert torch.equal(stopped, made_BS[:, : width + 1])
    with pytest.raises(UserError, match="greedily"):
        btm.generate(ids_BS, max_length=width + 1, do_sample=True)


def test_chat_completes_with_it_and_names_the_members_that_were_mixed(folder):
    found = completion(folder, text_of("math", 8, 3), Sampling(max_new_tokens=5))
    assert found["completion"] == complete(BtmModel.load(folder), tokenizer(), [found["prompt"]], "never", 5)[0]
    assert found["experts"] == list(WORDS)
    assert all(len(token["experts"]) == 2 for token in found["tokens"] if token["from_prompt"])
    assert "math" in found["tokens"][0]["experts"]


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_no_weights_and_can_move_together_with_its_members(folder, tmp_path):
    facts = json.loads((folder / "btm.json").read_text("utf-8"))
    assert facts["members"] == {name: f"../{name}" for name in WORDS}
    assert facts["top_k"] == 2
    assert not list(folder.rglob("*.safetensors"))
    folder.parent.rename(tmp_path / "moved")
    try:
        packed = pack(mixed_documents(), 48)
        moved = load_model_or_btm(tmp_path / "moved" / "btm")
        assert bits_per_byte(moved, packed).bits_per_byte > 0
    finally:
        (tmp_path / "moved").rename(folder.parent)


@pytest.mark.parametrize(("name", "content"), [
    ("btm.json", "{"), ("btm.json", '{"members": ["a"]}'), ("similarity.npz", "nothing"),
])  # fmt: skip
def test_a_broken_folder_is_named(name, content, folder, tmp_path):
    broken = shutil.copytree(folder.parent, tmp_path / "models") / folder.name
    (broken / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=name):
        BtmModel.load(broken)


def test_more_models_than_there_are_cannot_be_mixed(tmp_path):
    with pytest.raises(UserError, match="only 3 models: math, code, generalist"):
        folder_of(tmp_path, top_k=4)


def test_cost_counts_k_members_as_active_and_all_in_total(btm):
    one = sum(parameter.numel() for parameter in btm.members["math"].parameters())
    assert (btm.cost().active_params, btm.cost().total_params) == (2 * one, 3 * one)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_s_stage_names_its_experts_and_is_evaluated_like_any_model(tmp_path):
    settings = recipe(("name: pico", f"name: pico\nrun: {tmp_path / 'run'}"))
    run = RunFolder.create(settings)
    prepared_run(run.path)
    for domain in ("math", "general"):
        texts = [text_of("math" if domain == "math" else "generalist", 30, i) for i in range(40)]
        write_token_file(run.path / "data" / domain / "0" / "train", texts, tokenizer(), rng_seed=0, source={})
    entries = {
        name: llama(run.model(stage), rng_seed=number)
        for number, (name, stage) in enumerate({"seed": "seed", "expert/math": "train/math"}.items())
    }
    stage, lines = Stage("baselines/btm_top1", dict), []
    write_btm(run, stage, lines.append)
    assert run.state(stage) == "done"
    assert "2 models side by side" in lines[0]
    entries["btm_top1"] = run.model(stage.name)
    models = {name: ModelEntry(path, 0, 0.0, 0.0, name) for name, path in entries.items()}
    results = evaluate_models(run.path, settings, models, log=lines.append)["models"]
    domain, whole = results["btm_top1"]["domains"]["math"]["bits_per_byte"], results["btm_top1"]["total_params"]
    each = [results[name]["domains"]["math"]["bits_per_byte"] for name in ("seed", "expert/math")]
    assert min(each) - 0.5 < domain < max(each) + 0.5
    assert domain not in each
    assert whole == 2 * results["btm_top1"]["active_params"] == 2 * results["seed"]["total_params"]
    assert "knowledge" in results["btm_top1"]["tasks"]


def test_documents_are_cut_at_their_starts_and_at_the_longest_piece(monkeypatch):
    monkeypatch.setattr("btx.baselines.btm.PIECE_TOKENS", 3)
    rows = TextRows("", np.array([[5, 6, 7, 8, 1, 2]]), np.array([[0, 1, 2, 3, 0, 1]]))
    assert [piece.tolist() for piece in pieces_of(rows)] == [[5, 6, 7], [8], [1, 2]]


def test_rows_can_be_selected(btm):
    packed = pack(mixed_documents(), 48)
    part = packed.select(torch.tensor([True] + [False] * (len(packed.input_ids_BS) - 1)))
    assert isinstance(part, Packed)
    torch.testing.assert_close(btm.token_nll(part), btm.token_nll(packed)[: int(part.scored_BS.sum())])
