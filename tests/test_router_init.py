"""Routers: closed forms against slow references, and routing that works before any finetuning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from btx.choices.router_inits import RouterInit
from btx.data.expert_text import TextRows, text_from_files, text_from_run
from btx.errors import CheckpointError, DataError
from btx.files import read_json
from btx.mixing.mix import mix
from btx.mixing.router_fit import experts_in_equal_parts, router_sums
from btx.mixing.router_init import RouterSums, hidden_mean, initial_router, ridge
from btx.models.loading import load_model, load_tokenizer
from btx.moe.layer import moe_blocks
from btx.planning.plan import plan
from btx.run_folder.folder import RunFolder
from tests.pico_run import pico_recipe, run_here

MakeLlama = Callable[..., Path]
LETTERS = {"birds": "abcd", "tools": "mnop", "generalist": "wxyz", "law": "0123"}


def write_texts(folder: Path, names: str = "birds tools generalist") -> dict[str, Path]:
    """A file of text for every expert, each in letters of its own; of different lengths."""
    files = {}
    for number, name in enumerate(names.split()):
        rng = random.Random(number)
        files[name] = folder / f"{name}.jsonl"
        texts = ["".join(rng.choices(LETTERS[name], k=30)) for _ in range(10 * (number + 1))]
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return files


def filled_sums(tokens: int = 200) -> tuple[RouterSums, Tensor, Tensor]:
    """Sums over three domains with means of their own, and the inputs and labels they were made from."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(3 * tokens, 6, generator=generator) + 3 * torch.eye(6)[:3].repeat_interleave(tokens, 0) + 0.5
    y_TE = torch.eye(3).repeat_interleave(tokens, 0)
    sums = RouterSums.zeros(6, 3)
    for start in range(0, 3 * tokens, 50):
        sums.add(x_TD[start : start + 50], y_TE[start : start + 50], 1 / tokens)
    return sums, x_TD, y_TE


def test_ridge_is_the_least_squares_solution_with_a_penalty() -> None:
    sums, x_TD, y_TE = filled_sums()
    found = ridge(sums, ridge=0.1, scale=2.0)
    penalty = 0.1 * float((x_TD.double().T @ x_TD.double()).diagonal().mean())
    # Reference: ordinary least squares on rows appended for the penalty.
    padded_x = torch.cat([x_TD.double(), penalty**0.5 * torch.eye(6, dtype=torch.float64)])
    padded_y = torch.cat([y_TE.double(), torch.zeros(6, 3, dtype=torch.float64)])
    expected = 2.0 * torch.linalg.lstsq(padded_x, padded_y).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_ridge_tells_the_domains_apart() -> None:
    sums, x_TD, y_TE = filled_sums()
    right = (x_TD @ ridge(sums, ridge=1e-3, scale=10).T).argmax(dim=1) == y_TE.argmax(dim=1)
    assert float(right.float().mean()) > 0.9  # chance is 1/3


def test_hidden_mean_rows_point_from_the_common_mean_to_their_own_and_are_equally_long() -> None:
    sums, x_TD, y_TE = filled_sums()
    means = torch.stack([x_TD[y_TE[:, e] == 1].mean(dim=0) for e in range(3)])
    expected = means - means.mean(dim=0)
    expected = 1.5 * expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(hidden_mean(sums, scale=1.5), expected, atol=1e-5)


def test_a_text_ten_times_longer_counts_the_same() -> None:
    x_TD, y_TE = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.eye(2)[[0]].expand(20, 2)
    once, often = RouterSums.zeros(4, 2), RouterSums.zeros(4, 2)
    once.add(x_TD, y_TE, 1 / 20)
    for _ in range(10):
        often.add(x_TD, y_TE, 1 / 200)
    assert torch.allclose(once.gram_DD, often.gram_DD, atol=1e-6)
    assert torch.allclose(once.cross_ED, often.cross_ED, atol=1e-6)


def test_sums_are_over_what_the_plain_class_puts_into_its_routers(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    mix(seed, {"a": make_llama("a", 1), "b": make_llama("b", 2)}, tmp_path / "moe", top_k=3, router_init="zeros")
    ids = np.random.default_rng(0).integers(0, 320, (2, 9))
    text = TextRows("", ids, np.tile(np.arange(9), (2, 1)))
    model = load_model(tmp_path / "moe")
    with experts_in_equal_parts(model):
        found = router_sums(model, [text], 1, lambda layer, number, x_TD: torch.ones(len(x_TD), 1))
    # Reference: the class of transformers without our blocks; with top-3 of 3 and zero routers all gates are 1/3.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    seen: list[Tensor] = []
    for layer in plain.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 1:].flatten(0, 1)))
    with torch.no_grad():
        plain(torch.from_numpy(ids))
    for sums, x_TD in zip(found, seen, strict=True):
        assert torch.allclose(sums.gram_DD, x_TD.T @ x_TD / 16, atol=1e-4)
        assert torch.allclose(sums.cross_ED[0], x_TD.mean(dim=0), atol=1e-5)


def test_looking_at_a_model_leaves_it_as_it_was(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    mix(seed, {"a": seed}, tmp_path / "moe")
    model = load_model(tmp_path / "moe")
    before = [(block.rule, block.gate.weight.clone()) for block in moe_blocks(model)]
    with experts_in_equal_parts(model):
        for block in moe_blocks(model):
            assert block.rule.experts_per_token(2) == 2
            assert not block.gate(torch.ones_like(block.gate.weight)).any(), "logits of zero"
    for block, (rule, weight) in zip(moe_blocks(model), before, strict=True):
        assert block.rule == rule
        assert torch.equal(block.gate.weight, weight)
        assert block.gate(torch.ones_like(weight)).all()


@pytest.mark.parametrize("method", ["ridge", "hidden_mean"])
@pytest.mark.parametrize("split", [1, 2])
def test_routers_from_text_send_each_text_to_its_own_expert(
    make_llama: MakeLlama, tmp_path: Path, method: str, split: int
) -> None:
    seed, texts = make_llama("seed"), write_texts(tmp_path)
    experts = {"birds": make_llama("birds", 1), "tools": make_llama("tools", 2)}
    record = mix(seed, experts, tmp_path / "moe", router_init=method, texts=texts, split=split, top_k=1)
    assert record["router_init"]["method"] == method
    assert record["texts"]["birds"] == {"source": str(texts["birds"]), "tokens": record["texts"]["birds"]["tokens"]}
    model = load_model(tmp_path / "moe")
    for number, (name, rows) in enumerate(text_from_files(texts, load_tokenizer(seed), tokens=300).items()):
        with torch.no_grad():
            model(torch.from_numpy(rows.input_ids_BS[:1]), use_cache=False)
        for block in moe_blocks(model):
            assert block.routing is not None
            own = (block.routing.expert_ids_TK[1:, 0] // split == number).float().mean()
            assert float(own) > 0.6, (name, float(own))


def test_only_the_routers_depend_on_the_text(make_llama: MakeLlama, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    seed, texts = make_llama("seed"), write_texts(tmp_path)
    experts = {"birds": make_llama("birds", 1), "tools": make_llama("tools", 2)}
    mix(seed, experts, tmp_path / "plain")
    mix(seed, experts, tmp_path / "ridge", router_init="ridge", texts=texts)
    plain, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ridge"))
    different = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert different == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)}


def router_flops_counted(run: RunFolder, texts: dict[str, TextRows]) -> float:
    """FLOPs that torch counts in the forward passes over `texts`."""
    model = load_model(run.model("mix"))
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), experts_in_equal_parts(model):
        for text in texts.values():
            for input_ids, position_ids in text.batches():
                model.base_model(input_ids=torch.from_numpy(input_ids), position_ids=torch.from_numpy(position_ids))
    return float(counter.get_total_flops())


def test_a_run_takes_its_domains_token_files_as_text(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "mix.router_init=ridge", "mix.router_tokens=400")
    run, _ = run_here(recipe, ["data", "seed", "train/birds", "train/tools", "mix"])
    record = read_json(run.path / "mix" / "mix.json")
    assert record["router_init"] == {"method": "ridge", "ridge": 1e-3, "scale": 10.0, "tokens": 400}
    assert [text["source"] for text in record["texts"].values()] == ["domain birds", "domain tools", "domain general"]
    texts = text_from_run(run.path, recipe, tokens=400)
    planned = next(row["flops"] for row in plan(recipe)["stages"] if row["stage"] == "mix")
    assert run.done("mix")["flops"] == pytest.approx(planned)
    # torch does not count a CPU's fused attention (11 % here), and only whole sequences are read (4 %).
    assert 0.8 * planned < router_flops_counted(run, texts) < planned
    model = load_model(run.model("mix"))
    own = []
    for number, rows in enumerate(texts.values()):
        with torch.no_grad():
            model(torch.from_numpy(rows.input_ids_BS), use_cache=False)
        routing = moe_blocks(model)[0].routing
        assert routing is not None
        own.append(float((routing.expert_ids_TK[:, 0] == number).float().mean()))
    assert sum(own) / 3 > 0.5, own  # chance is 1/3


def test_zero_routers_are_zero_and_random_ones_are_not() -> None:
    assert not initial_router(RouterInit("zeros"), 4, 8, layer=0).any()
    assert initial_router(RouterInit("random"), 4, 8, layer=0).std() > 0.01


def test_text_is_read_up_to_the_tokens_asked_for_and_positions_restart_at_documents(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path)
    rows = text_from_files({"birds": texts["birds"]}, load_tokenizer(make_llama("seed")), tokens=100,
                           sequence_length=16)  # fmt: skip
    assert rows["birds"].input_ids_BS.shape == (6, 16)
    starts = rows["birds"].input_ids_BS == 0  # the separator
    assert starts.sum() > 1
    assert not rows["birds"].position_ids_BS[starts].any()
    assert not rows["birds"].position_ids_BS[:, 0].any()
    assert rows["birds"].tokens == 96 - (rows["birds"].position_ids_BS == 0).sum()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": {}}, CheckpointError, "no text for birds, tools, generalist"),
        ({"texts": {"x": Path("x.txt")}}, CheckpointError, "text for x, which is no expert"),
        ({"router_init": "wise"}, CheckpointError, "there are: random, zeros, hidden_mean, ridge"),
        ({"router_init": RouterInit("random", scale=2)}, CheckpointError, "random takes no scale"),
        ({"router_init": RouterInit("ridge", ridge=0)}, CheckpointError, "has to be above 0"),
        ({"missing": True}, DataError, "no such file"),
    ],
)
def test_what_cannot_give_routers_is_refused_before_anything_is_written(
    make_llama: MakeLlama, tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    seed, texts = make_llama("seed"), write_texts(tmp_path)
    if change.pop("missing", False):
        texts["tools"].unlink()
    options = {"router_init": "ridge", "texts": texts} | change
    with pytest.raises(error, match=message):
        mix(seed, {"birds": seed, "tools": seed}, tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["ridge", "hidden_mean"])
def test_a_gpu_computes_nearly_the_routers_of_a_cpu(make_llama: MakeLlama, tmp_path: Path, method: str) -> None:
    from safetensors.torch import load_file

    seed, texts = make_llama("seed"), write_texts(tmp_path)
    experts = {"birds": make_llama("birds", 1), "tools": make_llama("tools", 2)}
    for device in ("cpu", "cuda"):
        mix(seed, experts, tmp_path / device, router_init=method, texts=texts, device=device)
    wanted, found = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 0.05 * wanted[name].norm() * name.endswith("moe.gate.weight")
