"""Attention document by document against the dense mask: in blocks, as on a CPU, and through torch's kernel for GPUs,
which a twin replaces here; everything around it is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btx.data.held_out import HeldOutDocument, pack
from btx.models import attention_in_blocks, document_attention, packed
from btx.models.attention_in_blocks import blocks_of
from btx.models.loading import checkpoint_activations, quiet_transformers
from btx.models.outputs import token_nll
from btx.models.packed import dense_mask_because, document_borders, packed_hidden
from tests import varlen_on_cpu
from tests.test_families import SIZES

S = 48
WINDOW = {"sliding_window": 8}
MIXED = WINDOW | {"use_sliding_window": True, "max_window_layers": 2}
MOE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
       "num_experts_per_tok": 2}  # fmt: skip
ALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("mistral", WINDOW), ("phi3", WINDOW), ("qwen2", MIXED), ("qwen3", {"head_dim": 16}), ("olmo2", {}),
    ("granite", {"attention_multiplier": 0.2}), ("cohere2", WINDOW), ("mixtral", MOE | WINDOW), ("qwen3_moe", MOE),
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {}, "also takes softcap"),
    ("gpt_oss", MOE, "also takes s_aux"),
    ("llama", {"attention_dropout": 0.1}, "has dropout"),
    ("llama", {"head_dim": 12}, "are 12 wide"),
    ("bloom", {"n_layer": 2, "n_head": 4}, "other than full and sliding attention"),
    ("olmoe", MOE | WINDOW, "in its masks or in its attention only"),
    ("qwen3_5_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}, "other than full and sliding attention"),
]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """reading(way): from now on models read packed rows with a "dense" mask, in "blocks", or through the GPU's
    "kernel"."""
    varlen_on_cpu.register()
    monkeypatch.setattr(attention_in_blocks, "MOST_SHARED", 16)  # of rows as short as these
    blocks_of.cache_clear()

    def force(way: str) -> None:
        monkeypatch.setattr(
            packed, "without_kernel", lambda device, dtype: "for comparison" if way == "dense" else None
        )
        if way != "dense":
            monkeypatch.setattr(document_attention, "has_varlen", lambda device: way == "kernel")

    yield force
    blocks_of.cache_clear()


WAYS = pytest.mark.parametrize("way", ["blocks", "kernel"])


def model_of(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    """A pico model, everything random."""
    quiet_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **(SIZES | {"num_hidden_layers": 2} | config))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(float(parameter.dim() == 1), 0.2)
    return model


def positions(*lengths: Sequence[int]) -> Tensor:
    """Rows of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def ids_like(position_ids: Tensor) -> Tensor:
    return torch.randint(2, 96, position_ids.shape, generator=torch.Generator().manual_seed(7))


ROWS = positions([7, 23, 18], [S], [2, 44, 2])


def loss_of(hidden: Tensor) -> Tensor:
    """A number that tells apart all hidden states."""
    return (hidden.float() * torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)).sum()


def gradients(model: PreTrainedModel) -> Tensor:
    """All gradients one after the other."""
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def hidden_and_gradients(model: PreTrainedModel, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states, and the gradients of their loss."""
    model.zero_grad()
    hidden = packed_hidden(model, ids_like(position_ids), position_ids)
    loss_of(hidden).backward()
    return hidden.detach(), gradients(model)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Length of the difference in units of the length of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@WAYS
@pytest.mark.parametrize(("kind", "config"), ALLOWED, ids=[kind for kind, _ in ALLOWED])
def test_document_by_document_is_what_the_dense_mask_gives(
    reading: Callable[[str], None], kind: str, config: dict[str, Any], way: str
) -> None:
    model = model_of(kind, config).train()
    reading("dense")
    wanted = hidden_and_gradients(model, ROWS)
    reading(way)
    assert dense_mask_because(model) is None
    found = hidden_and_gradients(model, ROWS)
    assert not torch.equal(found[0], wanted[0]), "the dense mask again"
    assert distance(found[0], wanted[0]) < 1e-6
    assert distance(found[1], wanted[1]) < 1e-6


@WAYS
def test_layers_that_run_again_in_the_backward_pass_see_their_borders(reading: Callable[[str], None], way: str) -> None:
    model = model_of("mistral", WINDOW).train()
    reading(way)
    _, wanted = hidden_and_gradients(model, ROWS)
    checkpoint_activations(model)
    model.zero_grad()
    hidden = packed_hidden(model, ids_like(ROWS), ROWS)
    reading("dense")
    loss_of(hidden).backward()
    assert torch.equal(gradients(model), wanted)


@pytest.mark.parametrize(("kind", "config", "reason"), REFUSED, ids=[f"{row[0]}-{row[2][-9:]}" for row in REFUSED])
def test_what_the_kernel_cannot_do_keeps_the_dense_mask(
    reading: Callable[[str], None], kind: str, config: dict[str, Any], reason: str
) -> None:
    reading("kernel")
    model = model_of(kind, config)
    assert reason in (dense_mask_because(model) or "")
    assert model.config._attn_implementation != "btx_documents"


def test_a_cpu_reads_in_blocks_whatever_the_type_and_the_width_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", {"head_dim": 12}).to(torch.bfloat16)
    assert dense_mask_because(model) is None
    monkeypatch.setattr(document_attention, "varlen_attn", None)
    wanted = model.base_model(input_ids=ids_like(ROWS), position_ids=ROWS, use_cache=False).last_hidden_state
    found = packed_hidden(model, ids_like(ROWS), ROWS)
    assert distance(found.detach(), wanted.detach()) < 1e-2


def test_a_gpu_reads_document_by_document_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert "this model computes in float32" in (packed.without_kernel(gpu, torch.float32) or "")
    assert packed.without_kernel(gpu, torch.bfloat16) is None
    assert packed.without_kernel(torch.device("mps"), torch.bfloat16) == "its kernels are for CPUs and NVIDIA GPUs"


def test_short_neighbours_share_a_block_within_their_row() -> None:
    borders = (0, 20, 60, 70, 128, 130, 140, 256, 256, 256)
    blocks = blocks_of(borders, 128, None, torch.float32)
    assert [block.tokens for block in blocks] == [60, 10, 58, 12, 116]


def test_what_is_measured_can_be_trained_on(reading: Callable[[str], None]) -> None:
    model = model_of("llama", {})
    reading("blocks")
    with torch.inference_mode():
        packed_hidden(model, ids_like(ROWS), ROWS)
    hidden_and_gradients(model, ROWS)


@WAYS
def test_held_out_rows_with_padding_are_scored_alike(reading: Callable[[str], None], way: str) -> None:
    lengths = [30, 11, 9, 48, 5]
    rows = pack([HeldOutDocument(np.arange(2, 2 + length), length) for length in lengths], S)
    assert (rows.document_ids_BS < 0).any()
    model = model_of("mixtral", MOE).eval()
    reading("dense")
    wanted = token_nll(model, rows)
    reading(way)
    found = token_nll(model, rows)
    assert len(found) == sum(lengths) - len(lengths)
    assert not torch.equal(found, wanted), "the dense mask again"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@WAYS
def test_generation_does_not_notice(reading: Callable[[str], None], way: str) -> None:
    plain, other = model_of("mistral", WINDOW), model_of("mistral", WINDOW)
    reading(way)
    packed_hidden(other, ids_like(ROWS), ROWS)
    assert other.config._attn_implementation == "btx_documents"
    prompts = ids_like(ROWS)[:2, :20]
    mask = torch.ones_like(prompts)
    mask[0, :6] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True,
                               "return_dict_in_generate": True, "eos_token_id": 95}  # fmt: skip
    wanted, found = (model.eval().generate(prompts, **options) for model in (plain, other))
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
    assert "btx" not in other.config.to_json_string()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it
@pytest.mark.long
def test_compiled_layers_are_compiled_once_however_many_documents_there_are(reading: Callable[[str], None]) -> None:
    reading("kernel")
    model, eager = model_of("mistral", WINDOW).train(), model_of("mistral", WINDOW).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for each in (model, eager):
        checkpoint_activations(each)
    for layer in model.base_model.layers:
        layer.compile(backend=counter, fullgraph=True)
    shapes = set()
    for length in (S, 8, 2):
        rows = positions([length] * (S // length), [S])
        shapes.add(len(document_borders(rows.numpy())))
        for found, wanted in zip(*(hidden_and_gradients(each, rows) for each in (model, eager)), strict=True):
            assert torch.equal(found, wanted)
    assert len(shapes) == 3
    assert counter.frame_count == 1


def test_borders_are_the_documents_and_then_the_end() -> None:
    assert document_borders(ROWS.numpy()).tolist() == [0, 7, 30, 48, 96, 98, 142, *[144] * 6]
    # 256 tokens a document and more: the shape stays
    few, more = positions([1024], [1024]), positions([100, 324, 100, 500], [24, 1000])
    assert len(document_borders(few.numpy())) == len(document_borders(more.numpy())) == 9
    assert document_borders(few.numpy()).dtype == np.int32


def test_padding_is_one_document_and_a_separator_at_the_end_is_another() -> None:
    padded = np.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 0, 1, 2, 3, 4, 0]])
    assert document_borders(padded)[:7].tolist() == [0, 3, 5, 8, 10, 15, 16]
    assert document_borders(np.zeros((1, 4), np.int64)).tolist() == [0, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"), [("llama", {}), ("mistral", WINDOW), ("mixtral", MOE | {"num_experts_per_tok": 4})]
)
def test_a_gpu_reads_document_by_document_as_exactly_as_with_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, kind: str, config: dict[str, Any], autocast: bool
) -> None:
    exact = hidden_and_gradients(model_of(kind, config), ROWS)
    errors = []
    for dense in (True, False):
        model: Any = model_of(kind, config).cuda()
        model = model if autocast else model.to(torch.bfloat16)
        with monkeypatch.context() as patch, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            if dense:
                patch.setattr(packed, "without_kernel", lambda device, dtype: "for comparison")
            assert (dense_mask_because(model) is None) != dense
            found = hidden_and_gradients(model, ROWS)
        errors.append([distance(each.cpu(), wanted) for each, wanted in zip(found, exact, strict=True)])
    for by_mask, by_document in zip(*errors, strict=True):
        assert by_document < 1.5 * by_mask + 1e-3
