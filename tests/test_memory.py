"""The memory of a training step as it is predicted, against tensors that are alive in real steps and measured peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btx.data.mixture import Batch
from btx.models import device as device_module
from btx.models.cost import config_cost
from btx.models.loading import checkpoint_activations
from btx.models.memory import training_memory
from btx.models.step_counts import MemoryScheme, MicroBatch, model_shape
from btx.models.trainable import set_trainable
from btx.moe.balancing import Balancing
from btx.moe.layer import experts_run_in_training, swap_in_moe
from btx.planning.speed import RandomSamples
from btx.recipe.training import Finetune, Train
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.memory import MemoryNeeds, trained_as
from btx.training.micro_batch import try_step
from btx.training.optimizer import adamw
from tests.live_memory import LiveMemory

LENGTH, DOCUMENT = 64, 24
LLAMA = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 192}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
WIDE = {"intermediate_size": 512}
QWEN = {"model_type": "qwen2_moe", "moe_intermediate_size": 128, "shared_expert_intermediate_size": 96,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}  # fmt: skip


class Documents(RandomSamples):
    """Random tokens in documents of `DOCUMENT` tokens."""

    def batch(self, start: int, count: int) -> Batch:
        batch = super().batch(start, count)
        batch.position_ids[:] %= DOCUMENT
        return batch


def a_model(config: dict[str, Any], settings: Finetune, trainable: str) -> PreTrainedModel:
    values = dict(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    swap_in_moe(model)
    set_trainable(model.train(), trainable)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def needs_and_live(
    config: dict[str, Any], trainable: str = "all", micro: int = 256, steps: int = 2, **settings: Any
) -> tuple[MemoryNeeds, LiveMemory]:
    """What is predicted for a training on this CPU, and what a real step held, the optimiser's moments left out."""
    given = Finetune(tokens=1, batch_tokens=steps * micro, micro_batch_tokens=micro, **settings)
    model = a_model(config, given, trainable)
    job = TrainingJob(model=model, mixture=Documents(config["vocab_size"], LENGTH), settings=given, folder=Path(),
                      checkpoints=Checkpoints(), flops_per_token=1.0, rng_seed=0,
                      balancing=Balancing.of(given))  # fmt: skip
    with LiveMemory(model) as live:
        try_step(job, adamw(model, given), micro)
    shape = model_shape(model, experts_per_token=experts_run_in_training(model) or 0.0)
    return MemoryNeeds(given, shape, LENGTH, "cpu"), live


@pytest.mark.parametrize(("config", "settings"), [
    (LLAMA, {}), (LLAMA | WIDE, {}), (LLAMA | {"tie_word_embeddings": True}, {"micro": 128}), (LLAMA, {"steps": 1}),
    (LLAMA, {"trainable": "feed_forward"}), (LLAMA | WIDE, {"gradient_checkpointing": True}),
    (LLAMA, {"precision": "bfloat16"}), (LLAMA, {"precision": "bfloat16", "gradient_checkpointing": True}),
    (LLAMA | {"vocab_size": 4096}, {"precision": "bfloat16", "gradient_checkpointing": True}),
    (LLAMA | {"vocab_size": 2048}, {"precision": "bfloat16", "micro": 2048}),
    (LLAMA | {"vocab_size": 2048}, {"gradient_checkpointing": True, "micro": 1024}),
    (LLAMA | {"model_type": "qwen3", "head_dim": 24}, {}), (MIXTRAL, {}), (MIXTRAL | WIDE, {}),
    (MIXTRAL, {"precision": "bfloat16", "micro": 128}),
    (MIXTRAL, {"gradient_checkpointing": True}), (MIXTRAL, {"trainable": "all_but_experts"}),
    (MIXTRAL, {"trainable": "routers"}), (LLAMA | QWEN, {}),
], ids=lambda value: "-".join(map(str, value.values())))  # fmt: skip
def test_the_peak_of_a_step_is_predicted_within_a_tenth(
    config: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)
    needs, live = needs_and_live(config, **settings)
    predicted = needs.memory.peak - needs.memory.optimizer
    assert predicted == pytest.approx(live.peak, rel=0.1)
    state = needs.memory.weights + needs.memory.gradients
    assert predicted - state == pytest.approx(live.peak - state, rel=0.16), "what is not just counted"


def test_a_checkpointed_moe_step_leaves_nothing_of_its_activations_behind() -> None:
    needs, live = needs_and_live(MIXTRAL, gradient_checkpointing=True)
    left = live.now - needs.memory.weights
    assert left < 0.03 * (live.peak - needs.memory.state), "a layer's routing must not hold what was recomputed"


def test_a_wider_feed_forward_sublayer_takes_more_and_not_only_for_its_weights() -> None:
    narrow, wide = (MemoryNeeds(Finetune(tokens=1), config_cost(config).shape, LENGTH, "cpu").memory
                    for config in (LLAMA, LLAMA | WIDE))  # fmt: skip
    more = (WIDE["intermediate_size"] - 128) * 4 * 4 * LLAMA["num_hidden_layers"] * 16_384
    assert wide.activations - narrow.activations == more


# One H100, torch 2.11, the shape of Llama-3.2-1B; sequences of 4096, four micro-batches of 8192 or two of 16384. The
# first figures are of commit 9922b84: dense masks, nothing compiled, weights cast in every micro-batch, 512 rows of
# logits at a time.

LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FOUR_1B = LLAMA_1B | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
AUTOCAST = MemoryScheme(arithmetic=2)


@pytest.mark.parametrize(("config", "trainable", "batch", "measured"), [
    (LLAMA_1B, "all", {}, 43), (LLAMA_1B, "feed_forward", {}, 33),
    (LLAMA_1B, "all", {"tokens": 16_384, "checkpointed": True}, 27), (LLAMA_1B, "all", {"dense_mask": False}, 42),
    (FOUR_1B | {"num_hidden_layers": 8}, "all", {}, 52),
], ids=["all", "feed-forward", "checkpointed", "one document a sequence", "4 experts, 8 layers"])  # fmt: skip
def test_peaks_measured_on_an_h100_are_predicted_within_a_twentieth(
    config: dict[str, Any], trainable: str, batch: dict[str, Any], measured: float
) -> None:
    shape = config_cost(config, trainable=trainable).shape
    how = MicroBatch(**({"tokens": 8192, "sequence_length": 4096, "on_gpu": True} | batch))
    assert training_memory(shape, AUTOCAST, how).peak / 1e9 == pytest.approx(measured, rel=0.05)


def test_the_checkpointed_moe_took_more_on_the_h100_by_what_its_routings_held() -> None:
    """72 GB were measured when every layer's routing held what its layer had recomputed up to the router."""
    shape, how = config_cost(FOUR_1B).shape, MicroBatch(8192, 4096, checkpointed=True, on_gpu=True)
    peak = training_memory(shape, AUTOCAST, how).peak / 1e9
    D, S = 2048, 4096
    up_to_the_router = 8192 * (32 * D + 2 * S) / 1e9  # norms, copies, attention and its mask, of one layer
    assert 62 < peak < 68
    assert peak + 15 * up_to_the_router == pytest.approx(72, rel=0.05)


SMALL = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize(("config", "settings", "measured"), [
    (LLAMA_1B, {}, 36.686), (LLAMA_1B, {"trainable": "feed_forward"}, 29.008),
    (LLAMA_1B | {"intermediate_size": 16_384}, {"gradient_checkpointing": True}, 41.766),
    (FOUR_1B, {"gradient_checkpointing": True}, 70.771), (SMALL, {"batch_tokens": 8192}, 1.17),
], ids=["all", "feed-forward", "checkpointed", "4 experts, checkpointed", "small"])  # fmt: skip
def test_peaks_of_compiled_steps_on_an_h100_are_predicted_within_a_hundredth(
    config: dict[str, Any], settings: dict[str, Any], measured: float
) -> None:
    """`benchmarks/train.py`, commit 09ba6e1. The loss then held the bfloat16 gradient of a chunk's logits until that of
    the next one was there: 2048 rows, where a micro-batch has several chunks. It does no longer."""
    values = {"trainable": "all", "batch_tokens": 32_768} | settings
    given = Train(domains=["a"], tokens=10**9, micro_batch_tokens=8192, **values)
    shape = config_cost(config, trainable=given.trainable).shape
    predicted = MemoryNeeds(given, shape, 1024 if config is SMALL else 4096, "cuda").memory.peak
    held = 2048 * 128_256 * 2 * (config is not SMALL)
    assert (predicted + held) / 1e9 == pytest.approx(measured, rel=0.01)


def test_the_peak_of_an_eager_step_on_an_h100_is_what_its_tensors_add_up_to() -> None:
    """Measured by the test on a GPU in tests/test_micro_batch.py: dense, checkpointed, one chunk of logits."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8192}
    given = Finetune(tokens=1, batch_tokens=512 * LENGTH, micro_batch_tokens=256 * LENGTH, precision="bfloat16",
                     gradient_checkpointing=True, compile=False)  # fmt: skip
    memory = MemoryNeeds(given, config_cost(LLAMA | wide).shape, LENGTH, "cuda").memory
    assert memory.peak - memory.optimizer == pytest.approx(2_057_104_896, rel=0.001)


@pytest.mark.parametrize(("scheme", "state_gb"), [
    (MemoryScheme(), 58), (MemoryScheme(working=2, moments=2), 44), (MemoryScheme(weight=2, moments=2), 29),
])  # fmt: skip
def test_the_state_of_four_1b_experts_is_that_of_its_bytes_a_parameter(scheme: MemoryScheme, state_gb: float) -> None:
    memory = training_memory(config_cost(FOUR_1B).shape, scheme, MicroBatch(4096, 4096))
    assert memory.state / 1e9 == pytest.approx(state_gb, rel=0.05)  # embeddings and norms stay in float32


# Other settings


@pytest.mark.parametrize(("config", "trainable"), [
    (LLAMA, "feed_forward"), (LLAMA, "lora"), (MIXTRAL, "all_but_experts"), (MIXTRAL, "routers"), (MIXTRAL, "shared"),
])  # fmt: skip
def test_what_else_could_train_is_counted_without_building_the_model_again(
    config: dict[str, Any], trainable: str
) -> None:
    counted = trained_as(config_cost(config).shape, trainable, lora_rank=4)
    real = config_cost(config, trainable=trainable, lora_rank=4).shape
    assert counted.trained == {part: count for part, count in real.trained.items() if count}
    assert counted.total == real.total


def four_1b(**settings: Any) -> MemoryNeeds:
    given = Finetune(tokens=10**9, batch_tokens=262_144, precision="bfloat16", **settings)
    return MemoryNeeds(given, config_cost(FOUR_1B).shape, 4096, "cuda", may_freeze=True)


def test_the_fewest_and_mildest_changes_are_told_that_fit() -> None:
    needs = four_1b()
    for gigabytes, changed in {200: {}, 82: {"micro_batch_tokens": 8192, "gradient_checkpointing": True}}.items():
        found = needs.that_fits(int(gigabytes * 1e9))
        assert found is not None
        assert found.memory.peak <= gigabytes * 1e9
        assert found.changed.keys() <= changed.keys() or not changed
    frozen = needs.that_fits(int(50e9))
    assert frozen is not None
    assert frozen.changed["trainable"] == "all_but_experts"
    assert needs.that_fits(int(1e9)) is None


def test_savings_name_what_is_not_used_yet_the_largest_first() -> None:
    told = [str(variant) for variant, _ in four_1b().savings()]
    saved = [count for _, count in four_1b().savings()]
    assert saved == sorted(saved, reverse=True)
    assert {"micro_batch_tokens: 8192", "gradient_checkpointing: true", "trainable: routers"} <= set(told)
    used = [str(variant) for variant, _ in four_1b(gradient_checkpointing=True, micro_batch_tokens=4096).savings()]
    assert not [name for name in used if "checkpointing" in name or "micro_batch" in name]


def test_adapters_are_told_where_no_weights_of_a_branch_fit() -> None:
    given = Train(tokens=1, domains=["law"], precision="bfloat16", gradient_checkpointing=True)
    seven_b = {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32,
               "num_attention_heads": 32, "intermediate_size": 11_008}  # fmt: skip
    needs = MemoryNeeds(given, config_cost(seven_b).shape, 4096, "cuda", may_freeze=True)
    found = needs.that_fits(int(22e9))
    assert found is not None
    assert found.changed["trainable"] == "lora"


def test_automatic_micro_batches_are_planned_as_the_largest_that_fits() -> None:
    needs = four_1b(micro_batch_tokens="auto", gradient_checkpointing=True)
    sizes = {gigabytes: needs.that_fits(int(gigabytes * 1e9)) for gigabytes in (80, 90, 200)}
    assert all(found is not None and not found.changed for found in sizes.values())
    taken = [found.micro_batch_tokens for found in sizes.values() if found is not None]
    assert taken == sorted(taken)
    assert 8192 <= taken[0] < taken[-1] <= 262_144


def test_a_branch_of_which_the_feed_forward_sublayers_train_is_told_of_adapters_alone() -> None:
    given = Train(domains=["law"], tokens=1, trainable="feed_forward")
    shape = config_cost(LLAMA, trainable="feed_forward").shape
    told = [str(variant) for variant, _ in MemoryNeeds(given, shape, LENGTH, "cpu", may_freeze=True).savings()]
    assert [text for text in told if "train" in text] == ["trainable: lora"]


def test_the_loop_over_experts_is_counted_by_this_machines_tiles() -> None:
    shape = config_cost(MIXTRAL).shape
    loop, grouped = (training_memory(shape, MemoryScheme(), MicroBatch(4096, LENGTH, on_gpu=how)).peak
                     for how in (False, True))  # fmt: skip
    assert loop < grouped
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(("settings", "bytes_a_weight"), [
    ({}, 12), ({"optimizer": "adamw_8bit"}, 6), ({"optimizer": "adamw_8bit", "weights": "bfloat16"}, 4),
])  # fmt: skip
def test_a_checkpoint_holds_weights_and_moments_in_their_types(settings: dict[str, Any], bytes_a_weight: int) -> None:
    given = Train(domains=["a"], tokens=1, precision="bfloat16", trainable="all", **settings)
    cost = config_cost(LLAMA)
    needs = MemoryNeeds(given, cost.shape, LENGTH, "cuda")
    assert needs.checkpoint_bytes == bytes_a_weight * cost.total_params
