"""Split and blend: what the layer puts out must be what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from btx.errors import CheckpointError
from btx.files import read_json
from btx.mixing.mix import mix
from btx.models.loading import load_model
from btx.moe.layer import moe_blocks

MakeLlama = Callable[..., Path]


def outputs(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a fixed batch and what every FF or MoE sublayer put out."""
    model = load_model(folder)
    seen: list[torch.Tensor] = []
    for layer in model.base_model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits, seen


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_all_chunks_of_equal_experts_with_equal_gates_are_the_dense_feed_forward(
    make_llama: MakeLlama, tmp_path: Path, chunks: int
) -> None:
    seed = make_llama("seed")
    mix(seed, {"a": seed}, tmp_path / "moe", split=chunks, top_k=2 * chunks, router_init="zeros")
    found, expected = outputs(tmp_path / "moe"), outputs(seed)
    assert (found[0] - expected[0]).abs().max() < 1e-5


def test_the_chunks_of_one_expert_alone_are_its_feed_forward(make_llama: MakeLlama, tmp_path: Path) -> None:
    # Zero routers choose the first experts, here all chunks of the first member, with equal gates.
    seed = make_llama("seed")
    mix(seed, {"a": seed}, tmp_path / "moe", split=2, top_k=2, router_init="zeros")
    assert moe_blocks(load_model(tmp_path / "moe"))[0].gate.weight.shape[0] == 4
    assert (outputs(tmp_path / "moe")[0] - outputs(seed)[0]).abs().max() < 1e-5


def test_without_rescaling_the_layers_output_shrinks_by_the_number_of_chunks(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed = make_llama("seed")
    mix(seed, {"a": seed}, tmp_path / "moe", split=3, top_k=6, router_init="zeros", split_rescale=False)
    first, dense = outputs(tmp_path / "moe")[1][0], outputs(seed)[1][0]
    assert torch.allclose(first, dense / 3, atol=1e-5)


def test_blended_experts_in_equal_parts_are_the_mean_of_the_members(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, other = make_llama("seed"), make_llama("a", 1)
    mix(seed, {"a": other, "b": seed}, tmp_path / "moe", blend=True, top_k=3, router_init="zeros", merge="seed")
    record = read_json(tmp_path / "moe" / "mix.json")
    assert record["experts"] == ["blend/0", "blend/1", "blend/2"]
    # The first layer's input is the seed's: shared weights are the seed's. So compare with each member's FF there.
    model, members = load_model(tmp_path / "moe"), [load_model(path) for path in (other, seed, seed)]
    x_BSD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.base_model.layers[0].mlp(x_BSD)
        expected = torch.stack([member.base_model.layers[0].mlp(x_BSD) for member in members]).mean(dim=0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_each_chunk_is_named_after_its_expert_and_the_config_has_the_chunks_width(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed = make_llama("seed")
    record = mix(seed, {"a": make_llama("a", 1)}, tmp_path / "moe", split=2)
    assert record["experts"] == ["a/0", "a/1", "generalist/0", "generalist/1"]
    assert record["config"]["intermediate_size"] == 24
    assert record["config"]["num_local_experts"] == 4
    assert record["split"] == {"chunks": 2, "rescale": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 5}, "48 inner units, which 5 does not divide"),
        ({"split": 0}, "split is 0"),
        ({"split": 2, "blend": True}, "exclude each other"),
        ({"blend": True, "router_init": "ridge"}, "blended experts have none"),
        ({"split": 2, "top_k": 5}, "top_k is 5, but there are 4 experts"),
    ],
)
def test_impossible_parts_are_refused_before_anything_is_written(
    make_llama: MakeLlama, tmp_path: Path, options: dict, message: str
) -> None:
    seed = make_llama("seed")
    with pytest.raises(CheckpointError, match=message):
        mix(seed, {"a": seed}, tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()
