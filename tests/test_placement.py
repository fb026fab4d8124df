"""A model that fits no single device is measured all the same, with the numbers of the undivided one. Here the devices
are this machine's memory, of which a model is given a part, and its disk; on GPUs the rest goes to the next one and to
host memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.baselines.btm import write_btm_folder
from btx.baselines.btm_model import load_model_or_btm
from btx.choices.routers import RoutingRule
from btx.data.expert_text import text_from_files
from btx.data.held_out import Packed, held_out_documents, pack
from btx.errors import UserError
from btx.evaluation.analyze import analyze
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.mixing.mix import mix
from btx.model_files.btx_folder import write_router
from btx.models import placement
from btx.models.cost import config_cost
from btx.models.measuring_memory import Reading, cache_bytes, forward_bytes
from btx.models.outputs import open_reader, token_nll
from btx.models.packed import packed_hidden
from btx.models.placement import Place, load_placed, spread_text
from btx.moe.layer import moe_blocks
from btx.recipe.loading import parse_recipe
from tests.live_memory import LiveMemory
from tests.pico_models import RECIPE, llama, mixtral, prepared_run, recipe, texts, tokenizer

ROOM = 115_000
"""Bytes: the embedding and the largest layer of the pico models, and not much more."""
MOE_ROOM = 160_000


def tied(folder: Path) -> Path:
    return llama(folder, tie_word_embeddings=True)


def for_btx_alone(folder: Path) -> Path:
    """A MoE model with a router that the plain class cannot express."""
    write_router(mixtral(folder), RoutingRule("switch"))
    return folder


def rows_of(run: Path) -> Packed:
    return pack(held_out_documents(run, recipe(), "math", 300), 24)


def where(model: Any) -> set[str]:
    return {str(place) for place in model.hf_device_map.values()}


TOO_SMALL = [(llama, ROOM), (tied, 80_000), (mixtral, MOE_ROOM), (for_btx_alone, MOE_ROOM)]
"""Makers of models, and a room that does not hold all of each."""


@pytest.mark.parametrize(("make", "room"), TOO_SMALL)
def test_a_spread_model_says_what_the_undivided_one_says(make: Any, room: int, tmp_path: Path) -> None:
    folder, rows, lines = make(tmp_path / "model"), rows_of(prepared_run(tmp_path)), list[str]()
    whole = load_placed(folder, Place())
    model = load_placed(folder, Place(weights_per_device=room, log=lines.append))
    assert where(model) == {"cpu", "disk"}
    assert len(lines) == 1
    assert "embed_tokens on host memory; " in lines[0] or "embed_tokens, lm_head on host memory; " in lines[0]
    assert lines[0].endswith("and the model's own files) is copied in every forward pass: slow")
    assert torch.equal(token_nll(model, rows), token_nll(whole, rows))
    for spread, undivided in zip(moe_blocks(model), moe_blocks(whole), strict=True):
        assert spread.routing is not None
        assert undivided.routing is not None
        assert torch.equal(spread.routing.gates_TK, undivided.routing.gates_TK)
    ids_BS = torch.randint(0, 320, (3, 9))
    readers = [open_reader(model), open_reader(whole)]
    for width in (6, 7, 9):
        scores = [reader.scores(ids_BS[:, :width], torch.ones(3, width, dtype=torch.long)) for reader in readers]
        torch.testing.assert_close(*scores, rtol=0, atol=4e-6)  # a few rows are multiplied by memory's alignment
    for reader in readers:
        reader.keep(torch.tensor([2, 0]))
    ids_BS = ids_BS[[2, 0]].repeat(1, 2)[:, :10]
    scores = [reader.scores(ids_BS, torch.ones_like(ids_BS)) for reader in readers]
    torch.testing.assert_close(*scores, rtol=0, atol=4e-6)


@pytest.mark.long
def test_a_run_is_evaluated_and_analyzed_with_the_same_numbers(tmp_path: Path) -> None:
    run, lines = prepared_run(tmp_path), list[str]()
    folder = mixtral(tmp_path / "moe", experts=2)
    bounded = parse_recipe(f"{RECIPE}launch: {{weights_per_device: {MOE_ROOM - 30_000}}}\n", "pico.yaml")
    found = []
    for name, settings in (("whole", recipe()), ("spread", bounded)):
        models = {"btx": ModelEntry(folder, 0, 0.0, 0.0, name)}
        measured = evaluate_models(run, settings, models, log=lines.append, folder=tmp_path / name)["models"]["btx"]
        measured.pop("eval_tokens_per_s")
        found.append((measured, analyze(run, settings, folder, log=lines.append, folder=tmp_path / name)))
    assert found[0] == found[1]
    assert sum("disk" in line for line in lines) == 2, "evaluation and analysis say so, the undivided model does not"


def test_routers_are_fitted_as_with_the_undivided_model(tmp_path: Path) -> None:
    seed, given = llama(tmp_path / "seed"), {}
    for number, name in enumerate(("a", "generalist")):
        given[name] = tmp_path / f"{name}.txt"
        given[name].write_text("\n".join(texts(20, rng_seed=number)), "utf-8")
    lines: list[str] = []
    for name, room in (("whole", None), ("spread", MOE_ROOM - 30_000)):
        mix(seed, {"a": llama(tmp_path / "a", 1)}, tmp_path / name, router_init="ridge", texts=given,
            weights_per_device=room, log=lines.append)  # fmt: skip
    whole, spread = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "spread"))
    assert sum("disk" in line for line in lines) == 1
    for name, weight in whole.items():
        assert torch.equal(spread[name], weight)
        assert weight.any()


def test_models_side_by_side_share_the_room(tmp_path: Path) -> None:
    models = {"a": llama(tmp_path / "a"), "b": llama(tmp_path / "b", 1)}
    for number, name in enumerate(models):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts(8, rng_seed=number)), "utf-8")
    read = text_from_files(
        {name: tmp_path / f"{name}.txt" for name in models}, tokenizer(), tokens=50_000, sequence_length=24
    )
    place = Place(weights_per_device=2 * ROOM)
    write_btm_folder(tmp_path / "btm", models, read, top_k=2, place=place)
    whole, spread = load_model_or_btm(tmp_path / "btm"), load_model_or_btm(tmp_path / "btm", place)
    rows = rows_of(prepared_run(tmp_path))
    assert [where(member) for member in spread.members.values()] == [{"cpu", "disk"}] * 2  # type: ignore[union-attr]
    assert torch.equal(token_nll(spread, rows), token_nll(whole, rows))


def test_what_was_written_for_a_spread_model_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "written"))
    (tmp_path / "written").mkdir()
    model = load_placed(mixtral(tmp_path / "model"), Place(weights_per_device=MOE_ROOM))
    assert list((tmp_path / "written").rglob("*.safetensors")), "fused experts are in no file of the model's"
    del model
    gc.collect()
    assert not list((tmp_path / "written").iterdir())


def test_where_not_even_the_embedding_fits_the_bytes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.1 MB of weights not even the embedding and the largest layer fit"):
        load_placed(llama(tmp_path / "model"), Place(weights_per_device=50_000))


@pytest.mark.parametrize(("device", "name"), [("cuda:0", "cuda:0"), ("cpu", "host memory")])
def test_a_model_that_fits_one_device_after_all_is_said_to_lie_there(
    device: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole:
        """transformers notes no places of a model that it puts on one device."""

        def __init__(self) -> None:
            self.device = torch.device(device)

        def get_input_embeddings(self) -> Any:
            return SimpleNamespace(weight=SimpleNamespace(is_meta=False))

    lines: list[str] = []
    monkeypatch.setattr(placement, "load_model", lambda *_, **__: Whole())
    load_placed(llama(tmp_path / "model"), Place(weights_per_device=ROOM, log=lines.append))
    assert lines[0].endswith(f"room for 0.1 MB on host memory: all on {name}")


def test_the_line_for_the_user_says_which_layers_are_where() -> None:
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
                              "model.rotary_emb": 1, "model.norm": 1, "lm_head": 1}  # fmt: skip
    assert spread_text(places, Path("x")) == "layer 0, embed_tokens on cuda:0; layers 1 to 2, norm, lm_head on cuda:1"
    assert spread_text(places | {"lm_head": "cpu"}, Path("x")) == (
        "layer 0, embed_tokens on cuda:0; layers 1 to 2, norm on cuda:1; lm_head on host memory. What is on host "
        "memory is copied in every forward pass: slow"
    )


LLAMA = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 192}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "config", [LLAMA, LLAMA | {"hidden_size": 128}, MIXTRAL | {"intermediate_size": 512}], ids=["dense", "wide", "moe"]
)
def test_what_a_forward_pass_takes_is_predicted_within_a_tenth(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from btx.moe.layer import swap_in_moe

    monkeypatch.setattr("btx.models.packed.without_kernel", lambda device, dtype: "as on a GPU in float32")
    values, rows, length = dict(config), 4, 64
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    swap_in_moe(model.eval())
    packed = Packed(*(torch.zeros(rows, length, dtype=torch.long) for _ in range(2)),
                    torch.arange(length).repeat(rows, 1) % 24, torch.zeros(rows, length, dtype=torch.long),
                    torch.ones(1))  # fmt: skip
    with torch.inference_mode(), LiveMemory(model) as live:
        before = live.now
        packed_hidden(model, packed.input_ids_BS, packed.position_ids_BS)
    shape = config_cost(config).shape
    predicted = forward_bytes(replace(shape, vocabulary=0), 4, Reading(rows * length), dense_mask_of=length)
    assert predicted == pytest.approx(live.peak - before, rel=0.1)


def test_keys_and_values_of_the_paper_s_size_in_bfloat16() -> None:
    llama_7b = LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip
    shape = config_cost(llama_7b).shape
    assert cache_bytes(shape, 2, Reading(1, cached_tokens=1)) == 32 * 2 * 4096 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("make", "room"), TOO_SMALL)
def test_gpus_and_host_memory_together_say_what_one_gpu_says(make: Any, room: int, tmp_path: Path) -> None:
    """With two GPUs or more the second one has the last layers, with one host memory has them."""
    folder, rows = make(tmp_path / "model"), rows_of(prepared_run(tmp_path))
    models = [load_placed(folder, Place("cuda", weights_per_device=most)) for most in (None, room)]
    assert "0" in where(models[1])
    assert where(models[1]) & {"1", "cpu"}
    nlls = [token_nll(model, rows).cpu() for model in models]
    torch.testing.assert_close(*nlls, rtol=1e-5, atol=1e-5)
    assert len({completion_of(model) for model in models}) == 1


def completion_of(model: Any) -> tuple[int, ...]:
    ids_1S, reader = torch.tensor([[5, 6, 7]], device=model.device), open_reader(model)
    for _ in range(6):
        chosen = reader.scores(ids_1S, torch.ones_like(ids_1S)).argmax(dim=-1)
        ids_1S = torch.cat([ids_1S, chosen[:, None]], dim=1)
    return tuple(ids_1S[0].tolist())
