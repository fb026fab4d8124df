"""Checkpoints of several processes: each writes its part, any number of them goes on from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from btx.models.sharding import shard, whole
from btx.moe.layer import swap_in_moe, use_selection_bias
from btx.training.state import StateFolder
from tests.processes import run_ranks

MARKS = {"inputs": "i", "data": "d"}


@contextmanager
def processes(folder: Path, rank: int, count: int) -> Iterator[bool]:
    """Within, the first `count` ranks train together; says whether this is one of them."""
    if rank < count:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(str(folder), count), rank=rank, world_size=count
        )
    yield rank < count
    if rank < count:
        distributed.destroy_process_group()


def pico(count: int) -> nn.Module:
    """A Mixtral with a selection bias, three experts and a dozen of odd sizes, sharded among `count` processes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    swap_in_moe(model)
    use_selection_bias(model)
    if count > 1:
        shard(model)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step whose gradients depend on no process's batch."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * number + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim and hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer += number


def all_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    from btx.training.optimizer import kept_tensors

    weights, moments = kept_tensors(model, optimizer)
    return {name: whole(tensor).detach().clone() for name, tensor in (weights | moments).items()}


def changing(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    path = Path(folder)
    for position, (count, before) in enumerate([(1, 0), (4, 1), (4, 2), (2, 3), (1, 4), (4, 5)]):
        with processes(path / f"store-{position}", rank, count) as here:
            if not here:
                continue
            model = pico(count)
            optimizer = torch.optim.AdamW([p for p in model.parameters()], lr=0.1, fused=True)
            state = StateFolder(path / "state", MARKS, log=lambda line: print(line))
            assert state.load(model, optimizer) == before, (position, count)
            if before:
                found, expected = all_of(model, optimizer), torch.load(path / "expected.pt", weights_only=True)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in found)
            step(model, optimizer, position)
            state.save(position + 1, model, optimizer)
            state.close()
            content = all_of(model, optimizer)
            if count > 1:
                distributed.barrier()
            if rank == 0:
                torch.save(content, path / "expected.pt")


def test_any_number_of_processes_goes_on(tmp_path: Path) -> None:
    run_ranks(changing, tmp_path, 4)
    print(sorted(p.relative_to(tmp_path) for p in (tmp_path/"state").rglob("*")))
