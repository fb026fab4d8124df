"""What compiled layers keep for their backward pass, as it is predicted, against what torch's partitioner chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from btx.models import device as device_module
from btx.models import document_attention
from btx.models.layer_memory import kept_bytes
from btx.models.step_counts import MicroBatch, model_shape
from btx.moe import dispatch
from btx.moe.balancing import Balancing
from btx.moe.layer import experts_run_in_training
from btx.recipe.training import Finetune
from btx.training import compiled
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.memory import memory_scheme
from btx.training.micro_batch import try_step
from btx.training.optimizer import adamw
from btx.training.working_weights import hold_frozen_in_bfloat16
from tests import varlen_on_cpu
from tests.test_memory import LENGTH, LLAMA, MIXTRAL, Documents, a_model

TOKENS = 4 * LENGTH
SIZES = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 40}
VIEWS = ("view", "alias", "permute", "transpose", "t.default", "unsqueeze", "squeeze", "expand")


def origin(node: fx.Node) -> fx.Node:
    """What a view is of."""
    while node.op == "call_function" and any(f"aten.{name}" in str(node.target) for name in VIEWS):
        node = node.all_input_nodes[0]
    return node


def bytes_kept(forward: fx.GraphModule, results: int) -> int:
    """Bytes of the tensors that a layer's forward graph computes for its backward graph, behind its results."""
    output = next(node for node in forward.graph.nodes if node.op == "output")
    kept = {origin(node) for node in output.args[0][results:] if isinstance(node, fx.Node)}
    values = [node.meta["val"] for node in kept if node.op != "placeholder"]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and not value.is_nested
               and all(isinstance(size, int) for size in value.shape))  # fmt: skip


def job_of(config: dict[str, Any], trainable: str, precision: str) -> TrainingJob:
    given = Finetune(tokens=1, batch_tokens=2 * TOKENS, micro_batch_tokens=TOKENS, precision=precision, compile=True)  # type: ignore[arg-type]
    model = a_model(config, given, trainable)
    if precision == "bfloat16":
        hold_frozen_in_bfloat16(model)
    return TrainingJob(model=model, mixture=Documents(config["vocab_size"], LENGTH), settings=given, folder=Path(),
                       checkpoints=Checkpoints(), flops_per_token=1.0, rng_seed=0,
                       balancing=Balancing.of(given))  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention document by document and the grouped product, in bfloat16, on this CPU."""
    varlen_on_cpu.register()
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(document_attention, "has_varlen", lambda device: True)
    for module in (dispatch, compiled):
        monkeypatch.setattr(module, "can_group", lambda x_TD, down_EDF: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("config", "trainable", "precision"), [
    (LLAMA, "all", "bfloat16"), (LLAMA, "all", "float32"), (LLAMA, "feed_forward", "bfloat16"),
    (LLAMA | {"model_type": "qwen3"}, "all", "bfloat16"), (MIXTRAL, "all", "bfloat16"),
    (MIXTRAL, "routers", "bfloat16"),
], ids=["dense", "float32", "feed-forward", "head norms", "moe", "routers"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch warns of what it does itself while it traces
@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_a_compiled_layer_keeps_is_predicted(config: dict[str, Any], trainable: str, precision: str) -> None:
    job = job_of(config | SIZES, trainable, precision)
    kept: list[int] = []

    def partition(joint: fx.GraphModule, inputs: Any, **how: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **how)
        kept.append(bytes_kept(forward, how["num_fwd_outputs"]))
        return forward, backward

    run: Any = lambda graph, inputs: make_boxed_func(graph.forward)  # noqa: E731
    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition,
                           decompositions=select_decomp_table)  # fmt: skip
    for layer in compiled.decoder_layers(job.model):
        layer.forward = compiled._compiled_forward(layer, backend=backend, dynamic=False)
    try_step(job, adamw(job.model, job.settings), TOKENS)
    shape = model_shape(job.model, experts_per_token=experts_run_in_training(job.model) or 0.0)
    batch = MicroBatch(TOKENS, LENGTH, dense_mask=False, on_gpu=True, compiled=True)
    predicted = TOKENS * (kept_bytes(shape, memory_scheme(job.settings, "cuda"), batch) - 4 * shape.width)
    assert predicted == pytest.approx(kept[-1], rel=0.02), "beside its input, which is what the layer below gave"
