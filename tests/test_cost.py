"""Training FLOPs as counted from a config, against those torch counts in a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from btx.models.cost import config_cost
from btx.models.trainable import set_trainable
from btx.moe.layer import swap_in_moe

LENGTH = 64
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def counted(config: dict[str, Any], trainable: str) -> float:
    """FLOPs a token that torch counts."""
    values = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values, attn_implementation="eager")
    )
    swap_in_moe(model)
    set_trainable(model, trainable)
    ids = torch.randint(0, config["vocab_size"], (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "moe"])
def test_flops_are_those_torch_counts(config: dict[str, Any], tied: bool) -> None:
    config = config | {"tie_word_embeddings": tied}
    ours = config_cost(config).training_flops_per_token(LENGTH)
    assert ours == pytest.approx(counted(config, "all"), rel=0.01)  # norms count as products, though they are none


@pytest.mark.parametrize(("config", "trainable"), [
    (LLAMA, "feed_forward"), (MIXTRAL, "all_but_experts"), (MIXTRAL, "routers"), (MIXTRAL, "shared"),
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_weights_save_their_own_gradient_and_no_more_is_credited(
    config: dict[str, Any], trainable: str, tied: bool
) -> None:
    config = config | {"tie_word_embeddings": tied}
    everything = config_cost(config).training_flops_per_token(LENGTH)
    ours, real = config_cost(config, trainable=trainable).training_flops_per_token(LENGTH), counted(config, trainable)
    below_lowest = everything / (3 * LLAMA["num_hidden_layers"])  # a layer's input gradients at most
    assert real <= ours * 1.005 < everything
    assert ours - real < below_lowest


def test_a_forward_pass_is_a_third_of_training_everything() -> None:
    cost = config_cost(MIXTRAL)
    assert cost.inference_flops_per_token(LENGTH) == pytest.approx(cost.training_flops_per_token(LENGTH) / 3)
    assert config_cost(MIXTRAL, trainable="routers").inference_flops_per_token(LENGTH) == pytest.approx(
        cost.inference_flops_per_token(LENGTH)
    )
