"""Several processes train one model: the function is that of one process, whatever it is made of.

The ranks are forked once and do all cases, four together and then two; what they found is compared case by case with
what this process finds alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from btx.choices.routers import RoutingRule
from btx.data.mixture import Batch
from btx.data.switching import Switching
from btx.errors import NotFinite
from btx.models import device
from btx.models.adapters import add_adapters
from btx.models.from_scratch import new_model
from btx.models.loading import checkpoint_activations
from btx.models.sharded_loading import share_out
from btx.models.sharding import process_count, whole
from btx.models.trainable import set_trainable
from btx.moe.balancing import Balancing
from btx.moe.layer import moe_blocks, set_router, swap_in_moe, use_selection_bias
from btx.process import Interrupted, Interrupts
from btx.recipe.training import Finetune
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.loop import run_training
from btx.training.optimizer import kept_tensors
from tests.processes import run_ranks

LENGTH, SAMPLES, STEPS = 12, 8, 3
CONFIG = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 0,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64, "eos_token_id": 0,
}  # fmt: skip
DENSE, MOE = {"model_type": "llama"}, {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


class Counted:
    """Sample g is a function of g alone, as in a mixture; documents restart within it."""

    sequence_length = LENGTH
    fingerprint = "0123456789abcdef" * 4

    def batch(self, start: int, count: int) -> Batch:
        ids = np.stack([np.random.default_rng(g).integers(0, 64, LENGTH + 1) for g in range(start, start + count)])
        positions = np.broadcast_to(np.arange(LENGTH) % 7, (count, LENGTH)).copy()
        labels = np.where(np.arange(1, LENGTH + 1) % 7 == 0, -100, ids[:, 1:])
        return Batch(ids[:, :-1].copy(), labels, positions)


@dataclass(frozen=True)
class Case:
    config: dict[str, Any] = field(default_factory=lambda: MOE)
    router: RoutingRule | None = None
    trainable: str = "all"
    settings: dict[str, Any] = field(default_factory=dict)
    micro: int = 2
    """Samples of a micro-batch."""
    dtype: torch.dtype = torch.float32
    lora: bool = False
    read_later: bool = False
    switching: float = 0.0
    near: tuple[float, float] = (1e-6, 3e-6)
    """How near the losses and the weights are."""


CASES = {
    "dense": Case(DENSE, micro=4, near=(1e-6, 3e-6)),  # four processes share its micro-batches
    "tied": Case(DENSE | {"tie_word_embeddings": True}),
    "feed-forward only": Case(DENSE, trainable="feed_forward"),
    "top_k": Case(settings={"clip": 0.05}, read_later=True),
    "switch": Case(router=RoutingRule("switch", capacity_factor=1.0)),
    "sample_top1": Case(MOE | {"num_hidden_layers": 2, "attention_dropout": 0.3}, router=RoutingRule("sample_top1")),
    "soft": Case(router=RoutingRule("soft"), switching=0.5),
    "frozen experts": Case(trainable="shared", settings={"gradient_checkpointing": True}),
    "selection bias": Case(settings={"load_balancing_bias": 0.01}, dtype=torch.float64, near=(1e-6, 1e-15)),
    "global batch": Case(settings={"load_balancing_over": "global_batch", "router_z_loss": 0.01}, micro=8),
    "one micro-batch each": Case(micro=4, near=(0.0, 0.0)),
    "lora": Case(DENSE, lora=True),
    "bfloat16": Case(DENSE, settings={"precision": "bfloat16"}, near=(1e-3, 3e-3)),
}
FOUR = list(CASES)[:10]
"""Cases that four processes do too."""


class Kept(Checkpoints):
    """Keeps what the last checkpoint would hold, and after which steps there was one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.saved: list[int] = []

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.saved.append(step)
        weights, _ = kept_tensors(model, optimizer)
        self.tensors = {name: whole(tensor.detach()).clone() for name, tensor in weights.items()}


def job_of(case: Case, folder: Path) -> TrainingJob:
    config = CONFIG | case.config
    model = new_model(config, rng_seed=0).to(case.dtype)
    swap_in_moe(model)
    if case.router is not None:
        set_router(model, case.router)
    settings = Finetune.model_validate({
        "tokens": STEPS * SAMPLES * LENGTH, "batch_tokens": SAMPLES * LENGTH, "learning_rate": 1e-3, "clip": 1e9,
        "micro_batch_tokens": case.micro * LENGTH, "warmup_steps": 0, "compile": False, **case.settings,
    })  # fmt: skip
    if settings.load_balancing_bias:
        use_selection_bias(model)
    if case.lora:
        add_adapters(model, 4, 8.0, rng_seed=1)
    else:
        set_trainable(model, case.trainable)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    mixture = Switching(cast(Any, Counted()), case.switching) if case.switching else Counted()
    job = TrainingJob(
        model=model, mixture=mixture, settings=settings, folder=folder, checkpoints=Kept(), flops_per_token=1.0,
        rng_seed=5, balancing=Balancing.of(settings) if moe_blocks(model) else Balancing(),
    )  # fmt: skip
    if process_count() > 1:
        share_out(model, None, job.device, in_bfloat16=job.in_bfloat16)
    return job


def trained(case: Case, folder: Path) -> dict[str, Any]:
    """Weights at the end, and what metrics.jsonl says of the steps."""
    folder.mkdir(parents=True, exist_ok=True)
    job = job_of(case, folder)
    run_training(job, Interrupts(), lambda line: None, read_later=case.read_later)
    return {"weights": job.checkpoints.tensors, "lines": lines(folder)}


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


@contextmanager
def together(folder: Path, rank: int, count: int) -> Iterator[bool]:
    """Within, the first `count` ranks train together; says whether this is one of them."""
    if rank < count:
        store = distributed.FileStore(str(folder / f"meet-{count}"), count)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    yield rank < count
    if rank < count:
        distributed.destroy_process_group()


class Disturbed(Counted):
    """On one process something happens when it asks for a step's samples."""

    def __init__(self, step: int, happens: Callable[[], None]) -> None:
        self.step, self.happens = step, happens

    def batch(self, start: int, count: int) -> Batch:
        if start // SAMPLES == self.step and distributed.get_rank() == 1:
            self.happens()
        return super().batch(start, count)


def disturbed(
    folder: Path, case: Case, read_later: bool, happens: Callable[[nn.Module, Interrupts], None]
) -> list[Any]:
    """How a training ends in which something happens to the second process in the third step."""
    folder.mkdir(parents=True, exist_ok=True)
    job, interrupts = job_of(case, folder), Interrupts()
    job = replace(job, mixture=Disturbed(2, lambda: happens(job.model, interrupts)))
    try:
        run_training(job, interrupts, lambda line: None, read_later=read_later)
    except (NotFinite, Interrupted) as error:
        return [type(error).__name__, str(error), error.exit_code, job.checkpoints.saved]
    return ["trained"]


def broken(model: nn.Module, interrupts: Interrupts) -> None:
    with torch.no_grad():
        model.model.norm.weight.to_local().fill_(math.inf)


def asked(model: nn.Module, interrupts: Interrupts) -> None:
    interrupts.pending = 15


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Arithmetic that every CPU can do, slowly."""
    patch.setattr(device, "has_bfloat16_units", lambda: True)


def rank_main(rank: int, folder: str, *, counts: Sequence[int]) -> None:
    torch.set_num_threads(1)
    prepare(pytest.MonkeyPatch())
    for count in counts:
        with together(Path(folder), rank, count) as takes_part:
            for name in names_for(count) if takes_part else ():
                found = trained(CASES[name], Path(folder) / f"{count}" / name)
                if rank == 0:
                    torch.save(found, Path(folder) / f"{count}-{name}.pt")
            if count == 2 and takes_part:
                ends = {f"{happens.__name__}, {later}": disturbed(Path(folder) / f"{happens.__name__}-{later}",
                                                                  CASES["top_k"], later, happens)
                        for happens in (broken, asked) for later in (False, True)}  # fmt: skip
                Path(folder, f"ends-{rank}.json").write_text(json.dumps(ends))


def names_for(count: int) -> list[str]:
    return [name for name in CASES if count == 2 or name in FOUR]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    counts = (4, 2) if request.config.getoption("--engines") else (2,)
    run_ranks(partial(rank_main, counts=counts), folder, max(counts))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    known: dict[str, dict[str, Any]] = {}

    def one(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = trained(CASES[name], tmp_path_factory.mktemp("alone"))
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        yield one


@pytest.mark.parametrize(("name", "count"), [
    pytest.param(name, count, marks=[pytest.mark.long] * (count == 4)) for count in (2, 4) for name in names_for(count)
])  # fmt: skip
def test_several_processes_train_what_one_does(ranks: Path, alone: Any, name: str, count: int) -> None:
    one, several = alone(name), torch.load(ranks / f"{count}-{name}.pt", weights_only=True)
    loss_near, weights_near = CASES[name].near
    exact = CASES[name].dtype == torch.float64
    assert [line["step"] for line in several["lines"]] == list(range(1, STEPS + 1))
    for line, wanted in zip(several["lines"], one["lines"], strict=True):
        assert line.pop("processes") == count
        assert line.keys() == wanted.keys()
        assert abs(line["loss"] - wanted["loss"]) <= loss_near
        assert line["grad_norm"] == pytest.approx(
            wanted["grad_norm"], rel=1e-12 if exact else max(1e-5, loss_near * 30)
        )
        for fact in line.keys() & {"load", "dropped", "dead", "tokens", "flops"}:
            assert line[fact] == wanted[fact]
        for fact in line.keys() & {"router_entropy", "load_balancing"}:
            assert line[fact] == pytest.approx(wanted[fact], abs=2e-4)
    assert several["weights"].keys() == one["weights"].keys()
    far = {name: (several["weights"][name] - one["weights"][name]).abs().max().item() for name in one["weights"]}
    assert max(far.values()) <= weights_near, far


def test_what_happens_to_one_process_ends_all_after_the_same_step(ranks: Path) -> None:
    ends = [json.loads((ranks / f"ends-{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    for later in (False, True):
        kind, message, _, saved = ends[0][f"broken, {later}"]
        assert (kind, saved) == ("NotFinite", []), message
        assert message.startswith("step 3: the loss is nan") or message.startswith("step 3: the loss is inf")
        assert ends[0][f"asked, {later}"] == [
            "Interrupted", f"stopped after step 3 of {STEPS}; run it again to continue", 128 + 15, [3]
        ]  # fmt: skip
