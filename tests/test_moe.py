"""The MoE block against transformers' own, and its dispatch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.models.loading import checkpoint_activations, load_model
from btx.moe.balancing import load_balancing_loss
from btx.moe.layer import moe_blocks, set_router
from tests.processes import run_ranks


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=320, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.normal_(std=0.5)
    model.save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_logits_and_gradients_equal_the_plain_class(mixtral: Path) -> None:
    from transformers import MixtralForCausalLM

    ids = torch.randint(0, 320, (3, 50), generator=torch.Generator().manual_seed(1))
    plain, ours = MixtralForCausalLM.from_pretrained(mixtral), load_model(mixtral)
    results = [model(ids, labels=ids) for model in (plain, ours)]
    assert (results[0].logits - results[1].logits).abs().max() < 1e-5
    for result in results:
        result.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-6), name


def test_an_expert_without_tokens_gets_exactly_zero_gradient(mixtral: Path) -> None:
    model = load_model(mixtral)
    for block in moe_blocks(model):
        with torch.no_grad():
            block.gate.weight.zero_()
            block.gate.weight[3:] = 0.0
        block.gate.forward = lambda x: torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]).expand(len(x), 5)
    ids = torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    for block in moe_blocks(model):
        assert (block.experts.down_proj.grad[:2].abs().amax(dim=(1, 2)) > 0).all()
        assert torch.equal(block.experts.down_proj.grad[2:], torch.zeros_like(block.experts.down_proj.grad[2:]))


def _steered(folder: str, rank: int) -> torch.nn.Module:
    """A model whose tokens never reach expert 4; on process 1 only 0 and 1 get any, on process 0 only 2 and 3."""
    model = load_model(f"{folder}/mixtral").train()
    for block in moe_blocks(model):
        order = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]) if rank else torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
        block.gate.forward = lambda x, block=block, order=order: order + 0 * F.linear(x, block.gate.weight)
    return model


def _empty_expert_rank(rank: int, folder: str) -> None:
    """One of two processes: the experts' gradients under DDP, then under FSDP, with 5 experts sharded over 2."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ids = torch.arange(40)[None] + 40 * rank
    model = _steered(folder, rank)
    parallel = DistributedDataParallel(model)
    parallel(ids, labels=ids).loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/ddp{rank}.pt")
    sharded = _steered(folder, rank)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(ids, labels=ids).loss.backward()
    torch.save({name: p.grad.full_tensor() for name, p in sharded.named_parameters()}, f"{folder}/fsdp{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_experts_without_tokens_work_under_ddp_and_fsdp(mixtral: Path, tmp_path: Path) -> None:
    run_ranks(_empty_expert_rank, tmp_path)
    alone = {}
    for rank in range(2):
        model, ids = _steered(str(tmp_path), rank), torch.arange(40)[None] + 40 * rank
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            alone[name] = alone.get(name, 0) + parameter.grad / 2
    for file in ("ddp0", "ddp1", "fsdp0", "fsdp1"):
        found = torch.load(tmp_path / f"{file}.pt", weights_only=True)
        for name, gradient in alone.items():
            assert torch.allclose(found[name], gradient, atol=1e-6), (file, name)
            if "experts" in name:
                assert [bool(part.any()) for part in found[name]] == [True, True, True, True, False]


def test_gradient_checkpointing_changes_nothing(mixtral: Path) -> None:
    ids = torch.arange(40).view(2, 20)
    grads = []
    for kind in ("top_k", "sample_top1"):
        for checkpointed in (False, True):
            model = load_model(mixtral).train()
            set_router(model, RoutingRule(kind))
            if checkpointed:
                checkpoint_activations(model)
            torch.manual_seed(5)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss = loss + sum(load_balancing_loss(block.routing) for block in moe_blocks(model))
            loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
    for plain, checkpointed in (grads[:2], grads[2:]):
        for name, gradient in plain.items():
            assert torch.allclose(gradient, checkpointed[name], atol=1e-7), name


def test_saving_writes_the_published_layout_that_transformers_reads_alone(mixtral: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    ours = load_model(mixtral)
    ours.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert "model.layers.1.block_sparse_moe.experts.4.w1.weight" in set(file.keys())
    ids = torch.arange(30)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits
        assert torch.equal(again, AutoModelForCausalLM.from_pretrained(mixtral)(ids).logits)


def test_routing_of_the_last_pass_is_kept_for_losses_and_metrics(mixtral: Path) -> None:
    model = load_model(mixtral)
    model(torch.arange(24).view(2, 12))
    for block in moe_blocks(model):
        assert block.routing.logits_TE.shape == (24, 5)
        assert block.routing.expert_ids_TK.shape == (24, 2)
        assert torch.allclose(block.routing.gates_TK.sum(dim=1), torch.ones(24))


@pytest.mark.parametrize(("model_type", "values", "blocks"), [
    ("qwen2_moe", {"norm_topk_prob": True, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}, 2),
    ("qwen2_moe", {"norm_topk_prob": False, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}, 0),
    ("qwen3_moe", {"norm_topk_prob": True, "moe_intermediate_size": 24}, 2),
    ("qwen3_moe", {"norm_topk_prob": False, "moe_intermediate_size": 24, "num_experts_per_tok": 1}, 2),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True, "num_shared_experts": 0,
                     "mlp_layer_types": ["sparse"] * 2}, 0),
    ("flex_olmo", {"norm_topk_prob": True}, 2),
    ("granitemoe", {}, 2),
])  # fmt: skip
def test_other_classes_are_computed_exactly_or_left_alone(
    tmp_path: Path, model_type: str, values: dict[str, object], blocks: int
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = "num_local_experts" if model_type == "granitemoe" else "num_experts"
    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=320, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        **{"num_experts_per_tok": 2} | values | {experts: 5},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    model.save_pretrained(tmp_path / "plain")
    plain, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), load_model(tmp_path / "plain")
    assert len(moe_blocks(ours)) == blocks
    ids = torch.arange(60).view(2, 30)
    wanted, found = plain(ids, labels=ids), ours(ids, labels=ids)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    wanted.loss.backward()
    found.loss.backward()
    assert list(dict(ours.named_parameters()).keys() - dict(plain.named_parameters()).keys()) == []
    for name, parameter in plain.named_parameters():
        assert torch.allclose(ours.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-3), name
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    if not blocks:
        with pytest.raises(CheckpointError, match="route by top_k alone"):
            set_router(ours, RoutingRule("switch"))


def test_a_model_whose_config_asks_for_transformers_router_losses_is_computed_as_any_other(mixtral: Path) -> None:
    ids = torch.arange(2, 20)[None]
    expected = load_model(mixtral)(input_ids=ids, labels=ids)
    config = json.loads((mixtral / "config.json").read_text())
    asks = config | {"output_router_logits": True, "router_aux_loss_coef": 0.01}  # as TRL leaves it
    (mixtral / "config.json").write_text(json.dumps(asks))
    output = load_model(mixtral)(input_ids=ids, labels=ids)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
