"""Extend and drop: what is there stays bit for bit, names are kept, the new row works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from btx.choices.router_inits import RouterInit
from btx.cli.main import app
from btx.data.expert_text import text_from_files
from btx.errors import CheckpointError
from btx.files import read_json
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.models.loading import load_model, load_tokenizer
from btx.moe.layer import moe_blocks
from tests.test_router_init import write_texts

MakeLlama = Callable[..., Path]
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture
def moe(make_llama: MakeLlama, tmp_path: Path) -> Path:
    """A mixture of birds, tools and the generalist."""
    experts = {"birds": make_llama("birds", 1), "tools": make_llama("tools", 2)}
    mix(make_llama("seed"), experts, tmp_path / "moe")
    return tmp_path / "moe"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(folder: Path) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, expert ids and gates of a fixed batch."""
    model = load_model(folder)
    ids = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(ids).logits
    routings = [block.routing for block in moe_blocks(model) if block.routing]
    return logits, [routing.expert_ids_TK for routing in routings], [routing.gates_TK for routing in routings]


def test_with_shared_weights_left_everything_that_was_there_stays_bit_for_bit(
    make_llama: MakeLlama, moe: Path, tmp_path: Path
) -> None:
    law = make_llama("law", 3)
    record = extend(moe, "law", law, tmp_path / "moe4")
    old, new, expert = weights(moe), weights(tmp_path / "moe4"), weights(law)
    for name, tensor in old.items():
        kept = new[name][:3] if name.endswith("gate.weight") and "block_sparse_moe" in name else new[name]
        assert torch.equal(kept, tensor), name
    for layer in (0, 1):
        prefix = f"model.layers.{layer}."
        for dense, published in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            added = new[f"{prefix}block_sparse_moe.experts.3.{published}.weight"]
            assert torch.equal(added, expert[f"{prefix}mlp.{dense}.weight"])
        assert new[ROUTER.format(layer)].shape == (4, 32)
    assert record["experts"] == ["birds", "tools", "generalist", "law"]
    assert read_json(tmp_path / "moe4" / "config.json")["num_local_experts"] == 4
    assert load_model(tmp_path / "moe4").config.num_local_experts == 4


def test_routing_among_the_old_experts_is_unchanged_by_a_row_that_is_never_selected(
    make_llama: MakeLlama, moe: Path, tmp_path: Path
) -> None:
    config = read_json(moe / "config.json")
    (moe / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    extend(moe, "law", make_llama("law", 3), tmp_path / "moe4", router_init="zeros")
    # With top-1, the mean of the other rows never has the largest logit.
    larger = weights(tmp_path / "moe4")
    for layer in (0, 1):
        router = larger[ROUTER.format(layer)]
        router[3] = router[:3].mean(dim=0)
    save_file(larger, tmp_path / "moe4" / "model.safetensors", metadata={"format": "pt"})
    before, after = run(moe), run(tmp_path / "moe4")
    assert len({int(expert) for ids in before[1] for expert in ids.flatten()}) > 1
    assert all(torch.equal(one, two) for one, two in zip(before[1], after[1], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before[2], after[2], strict=True))
    assert torch.equal(before[0], after[0])


def test_drop_after_extend_gives_back_the_same_tensors(make_llama: MakeLlama, moe: Path, tmp_path: Path) -> None:
    extend(moe, "law", make_llama("law", 3), tmp_path / "moe4")
    record = drop(tmp_path / "moe4", "law", tmp_path / "again")
    old, again = weights(moe), weights(tmp_path / "again")
    assert old.keys() == again.keys()
    assert all(torch.equal(old[name], again[name]) for name in old)
    assert read_json(moe / "config.json") == read_json(tmp_path / "again" / "config.json")
    assert record["experts"] == ["birds", "tools", "generalist"]
    assert [list(step) for step in record["history"]] == [["extend", "path", "shared", "router_init"], ["drop"]]


@pytest.mark.parametrize("gone", ["birds", "tools", "generalist"])
def test_dropping_an_expert_keeps_the_others_under_their_names(moe: Path, tmp_path: Path, gone: str) -> None:
    names = ["birds", "tools", "generalist"]
    left = [name for name in names if name != gone]
    record = drop(moe, gone, tmp_path / "moe2")
    old, new = weights(moe), weights(tmp_path / "moe2")
    assert record["experts"] == left
    for number, name in enumerate(left):
        for part in ("w1", "w2", "w3"):
            pattern = f"model.layers.1.block_sparse_moe.experts.{{}}.{part}.weight"
            assert torch.equal(new[pattern.format(number)], old[pattern.format(names.index(name))])
        assert torch.equal(new[ROUTER.format(1)][number], old[ROUTER.format(1)][names.index(name)])
    assert len([name for name in new if ".experts." in name]) == 2 * 2 * 3
    assert load_model(tmp_path / "moe2").config.num_local_experts == 2


def test_folding_makes_the_shared_weights_the_mean_over_all_experts(
    make_llama: MakeLlama, moe: Path, tmp_path: Path
) -> None:
    law = make_llama("law", 3)
    extend(moe, "law", law, tmp_path / "folded", shared="fold")
    together = {name: tmp_path / name for name in ("birds", "tools")} | {"law": law}
    mix(tmp_path / "seed", together, tmp_path / "together")
    folded, mixed = weights(tmp_path / "folded"), weights(tmp_path / "together")
    shared = [name for name in folded if "block_sparse_moe" not in name]
    assert len(shared) > 5
    for name in shared:
        assert torch.allclose(folded[name], mixed[name], atol=1e-6), name


@pytest.mark.parametrize("method", ["ridge", "hidden_mean"])
def test_a_row_from_text_sends_the_new_text_to_the_new_expert_and_little_else(
    make_llama: MakeLlama, moe: Path, tmp_path: Path, method: str
) -> None:
    texts = write_texts(tmp_path, "birds tools generalist law")
    # Old rows by the same method, as in a model that was mixed so.
    old_texts = {name: path for name, path in texts.items() if name != "law"}
    experts = {name: tmp_path / name for name in ("birds", "tools")}
    mix(tmp_path / "seed", experts, tmp_path / "fitted", router_init=method, texts=old_texts, top_k=1)
    extend(tmp_path / "fitted", "law", make_llama("law", 3), tmp_path / "moe4", router_init=method, texts=texts)
    model = load_model(tmp_path / "moe4")
    for name, rows in text_from_files(texts, load_tokenizer(moe), tokens=300).items():
        with torch.no_grad():
            model(torch.from_numpy(rows.input_ids_BS[:1]), use_cache=False)
        for block in moe_blocks(model):
            assert block.routing is not None
            share = float((block.routing.expert_ids_TK[1:] == 3).float().mean())
            assert share > 0.6 if name == "law" else share < 0.2, (name, share)


def test_the_names_survive_finetuning(make_llama: MakeLlama, moe: Path, tmp_path: Path) -> None:
    from btx.models.loading import save_model

    model = load_model(moe)
    (tmp_path / "tuned").mkdir()
    save_model(model, tmp_path / "tuned", like=moe, tokenizer=load_tokenizer(moe))
    record = drop(tmp_path / "tuned", "tools", tmp_path / "without")
    assert record["experts"] == ["birds", "generalist"]


def test_without_a_record_experts_are_called_by_their_numbers(moe: Path, tmp_path: Path) -> None:
    (moe / "mix.json").unlink()
    config = read_json(moe / "config.json")
    config.pop("btx_experts")
    (moe / "config.json").write_text(json.dumps(config), "utf-8")
    record = drop(moe, "1", tmp_path / "moe2")
    assert record["experts"] == ["0", "2"]
    assert "2 experts" in (tmp_path / "moe2" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size would be 64, the MoE model has 32"),
        ({"intermediate_size": 64}, r"intermediate_size would be 64, the MoE model has 48"),
        ({"num_hidden_layers": 3}, "num_hidden_layers would be 3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters would be"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_and_nothing_is_written(
    make_llama: MakeLlama, moe: Path, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        extend(moe, "law", make_llama("law", 3, **change), tmp_path / "moe4")
    assert not (tmp_path / "moe4").exists()


def test_what_cannot_be_extended_or_dropped_says_why(make_llama: MakeLlama, moe: Path, tmp_path: Path) -> None:
    law, out = make_llama("law", 3), tmp_path / "out"
    with pytest.raises(CheckpointError, match="has an expert 'tools' already"):
        extend(moe, "tools", law, out)
    with pytest.raises(CheckpointError, match="needs text of law and of at least one of birds"):
        extend(moe, "law", law, out, router_init="ridge", texts={"law": tmp_path / "law.jsonl"})
    with pytest.raises(CheckpointError, match="takes no scale here"):
        extend(moe, "law", law, out, router_init=RouterInit("ridge", scale=2.0))
    with pytest.raises(CheckpointError, match="'halved': allowed: left, fold"):
        extend(moe, "law", law, out, shared="halved")
    with pytest.raises(CheckpointError, match="is no MoE class"):
        extend(law, "law", law, out)
    with pytest.raises(CheckpointError, match="no expert 'law'; its experts: birds, tools, generalist"):
        drop(moe, "law", out)
    drop(moe, "birds", tmp_path / "two")
    with pytest.raises(CheckpointError, match="one expert is left"):
        drop(tmp_path / "two", "tools", out)
    mix(tmp_path / "seed", {"law": law}, tmp_path / "split", split=2)
    with pytest.raises(CheckpointError, match="chunks of models"):
        drop(tmp_path / "split", "law/0", out)
    assert not out.exists()


def test_the_commands_mix_extend_and_drop(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def btx(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.output

    monkeypatch.chdir(tmp_path)
    make_llama("seed")
    make_llama("law", 3)
    texts = write_texts(tmp_path)
    shutil.copy(texts["tools"], tmp_path / "law.jsonl")
    btx("mix", "--seed-model", "seed", "--copies", "3", "-o", "up", "--merge", "ties", "--merge-density", "0.5")
    assert read_json(tmp_path / "up" / "mix.json")["experts"] == ["copy0", "copy1", "copy2"]
    printed = btx("extend", "up", "--expert", "law=law", "-o", "up4", "--router-init", "ridge", "--shared", "fold",
                  "--text", "law=law.jsonl", "--text", f"copy0={texts['birds']}")  # fmt: skip
    assert "copy0, copy1, copy2, law" in printed
    assert "3 experts: copy0, copy2, law" in btx("drop", "up4", "--expert", "copy1", "-o", "up3")
