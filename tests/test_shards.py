"""One model on several processes: its checkpoints, how it is loaded and how it is written. One set of four processes
works through all cases; what they found is compared here with one process.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from btx.choices.routers import RoutingRule
from btx.errors import RunFolderError
from btx.files import atomic_folder, read_json
from btx.model_files.btx_folder import write_router
from btx.models.adapters import add_adapters, merge_adapters
from btx.models.from_scratch import new_model
from btx.models.loading import load_model, save_model
from btx.models.sharded_loading import load_skeleton, share_out
from btx.models.sharding import local_rows, shard, whole
from btx.moe.layer import moe_blocks, swap_in_moe, use_selection_bias
from btx.training.optimizer import kept_tensors
from btx.training.state import StateFolder
from tests import pico_models
from tests.processes import run_ranks

MARKS = {"inputs": "i", "data": "d"}
COUNTS = (4, 4, 2, 1, 4)
"""Numbers of processes that go on one after another, a step each."""
MODELS = ("llama", "tied", "mixtral", "qwen2_moe", "only_btx", "in_memory")
NEW = ("llama", "tied", "mixtral")
"""Of these, what is written as models from scratch are."""
CPU = torch.device("cpu")
SCRATCH = {
    "llama": {}, "cohere2": {"tie_word_embeddings": True}, "qwen2": {"tie_word_embeddings": True}, "phi3": {},
    "gemma3_text": {"pad_token_id": 3}, "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "mixtral": {},
}  # fmt: skip
"""Classes of models from scratch: with biases, fused weights, norms that begin with ones and with zeros, buffers,
weights of their own kind."""


def from_scratch(model_type: str) -> PreTrainedModel:
    """A pico model of a class."""
    sizes = {"vocab_size": 97, "intermediate_size": 42, "hidden_size": 24, "pad_token_id": 0}
    return new_model(
        {"model_type": model_type} | pico_models.SIZES | sizes | SCRATCH[model_type], rng_seed=5
    )  # fmt: skip


@contextlib.contextmanager
def processes(store: Path, rank: int, count: int) -> Iterator[bool]:
    """Within, the first `count` of the processes train together; says whether this is one of them."""
    if rank < count:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(str(store), count), rank=rank, world_size=count
        )
    yield rank < count
    if rank < count:
        distributed.destroy_process_group()


def pico() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tied Mixtral with selection biases, of sizes that neither two nor four processes can share equally."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    swap_in_moe(model)
    use_selection_bias(model)
    model.model.norm.requires_grad_(False)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step whose gradients depend on nothing but its number, so that every number of processes takes the same."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient if parameter.requires_grad else None
    optimizer.step()
    for block in moe_blocks(model):
        assert block.selection_bias is not None
        block.selection_bias += number


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, put together."""
    weights, moments = kept_tensors(model, optimizer)
    return {name: whole(tensor).detach().clone() for name, tensor in (weights | moments).items()}


def change_processes(folder: Path, rank: int) -> dict[str, Any]:
    """A training goes on on other numbers of processes; is what was restored what was saved?"""
    resumed, exact, before = [], [], None
    for step, count in enumerate(COUNTS):
        with processes(folder / f"store-{step}", rank, count) as takes_part:
            if not takes_part:
                continue
            model, optimizer = pico()
            state = StateFolder(folder / "state", MARKS)
            resumed.append(state.load(model, optimizer))
            restored = state_of(model, optimizer)
            if before is not None:
                exact.append(restored.keys() == before.keys()
                             and all(torch.equal(restored[name], before[name]) for name in before))  # fmt: skip
            train(model, optimizer, step + 1)
            state.save(step + 1, model, optimizer)
            state.close()
            before = state_of(model, optimizer)
    if rank == 0:
        assert before is not None
        torch.save(before, folder / "end.pt")
    return {"resumed": resumed, "exact": exact}


def suffer(folder: Path, rank: int) -> dict[str, Any]:
    """What two processes resume after each accident to the checkpoint of step 2, what they say and what is left."""
    found: dict[str, Any] = {}
    with processes(folder / "store", rank, 2) as takes_part:
        if not takes_part:
            return found
        model, optimizer = pico()
        for start in ("first start", "second start"):
            state = StateFolder(folder / start, MARKS)
            state.load(model, optimizer)
            for step in (1, 2):
                train(model, optimizer, step)
                state.save(step, model, optimizer)
            state.close()
        distributed.barrier()
        for name, harm in ACCIDENTS.items():
            path, lines = folder / name, list[str]()
            with contextlib.ExitStack() as until_resumed:
                if rank == 0:
                    shutil.copytree(folder / "first start", path)
                    harm(path / "step-00000002", until_resumed)
                distributed.barrier()
                try:
                    resumed: int | str = StateFolder(path, MARKS, log=lines.append).load(model, optimizer)
                except RunFolderError as error:
                    resumed = str(error)
                distributed.barrier()
                left = sorted(file.name for file in path.glob("step-*"))
            found[name] = {"resumed": resumed, "lines": lines, "left": left}
    return found


SECOND = "part-00001-of-00002"
Harm = Callable[[Path, contextlib.ExitStack], object]


def a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def dies_before_it_writes(checkpoint: Path, _: object) -> None:
    shutil.rmtree(checkpoint / SECOND)


def is_killed_while_it_writes(checkpoint: Path, _: object) -> None:
    (checkpoint / SECOND).rename(checkpoint / f".{SECOND}.0123abcd.tmp")


def still_writes(checkpoint: Path, until_resumed: contextlib.ExitStack) -> None:
    shutil.rmtree(checkpoint / SECOND)
    until_resumed.enter_context(given_up(checkpoint / SECOND))


def is_of_another_start(checkpoint: Path, _: object) -> None:
    shutil.rmtree(checkpoint / SECOND)
    shutil.copytree(checkpoint.parent.parent / "second start" / checkpoint.name / SECOND, checkpoint / SECOND)


def three_processes_had_begun_it(checkpoint: Path, _: object) -> None:
    shutil.copytree(checkpoint / SECOND, checkpoint / "part-00001-of-00003")


def neither_is_whole(checkpoint: Path, _: object) -> None:
    for step in ("step-00000001", "step-00000002"):
        a_bit(checkpoint.parent / step / SECOND / "weights.safetensors")


ACCIDENTS: dict[str, Harm] = {
    "nothing": lambda *_: None,
    "the second dies": dies_before_it_writes,
    "the second is killed": is_killed_while_it_writes,
    "the second still writes": still_writes,
    "the second is of another start": is_of_another_start,
    "another number of processes": three_processes_had_begun_it,
    "a bit": lambda checkpoint, _: a_bit(checkpoint / SECOND / "optimizer.safetensors"),
    "a file": lambda checkpoint, _: (checkpoint / SECOND / "state.json").unlink(),
    "neither is whole": neither_is_whole,
}  # fmt: skip
"""Name → what happens to a checkpoint of two processes."""


@contextlib.contextmanager
def given_up(part: Path) -> Iterator[None]:
    """A part that somebody is writing, and gives up in the end."""
    with contextlib.suppress(KeyError), atomic_folder(part):
        yield
        raise KeyError


def models(folder: Path) -> None:
    """A folder of every kind of model."""
    pico_models.llama(folder / "llama")
    tied = load_model(pico_models.llama(folder / "float32", tie_word_embeddings=True), dtype=torch.bfloat16)
    tied.model.norm.float()
    tied.save_pretrained(folder / "tied", max_shard_size="20KB")
    pico_models.mixtral(folder / "mixtral", experts=5)
    (folder / "mixtral" / "generation_config.json").unlink()
    shutil.copytree(folder / "mixtral", folder / "only_btx")
    write_router(folder / "only_btx", RoutingRule("switch"))
    load_model(folder / "mixtral").save_pretrained(folder / "in_memory", save_original_format=False)
    qwen2_moe(folder / "qwen2_moe")


def qwen2_moe(folder: Path) -> None:
    """With a shared expert, tied embeddings and positions that are scaled."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    sizes = {key: value for key, value in pico_models.SIZES.items() if key != "intermediate_size"}
    torch.manual_seed(3)
    Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=320, num_experts=3, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=20,
        shared_expert_intermediate_size=24, rope_parameters=rope, tie_word_embeddings=True, **sizes,
    )).save_pretrained(folder)  # fmt: skip


def write(model: Any, folder: Path, like: Path | None) -> None:
    """In shards of at most 40 kB."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained = partial(model.save_pretrained, max_shard_size="40KB")
    save_model(model, folder, like=like, tokenizer=pico_models.tokenizer())


def load_and_write(folder: Path, rank: int) -> dict[str, Any]:
    """Four processes load every model and write it again; what they hold of it, and what it computes."""
    found: dict[str, Any] = {}
    with processes(folder / "store", rank, 4):
        for name in MODELS:
            model = load_skeleton(folder / name)
            adapters = name == "llama" and find_spec("peft") is not None
            if adapters:
                add_adapters(model, 2, 4.0, rng_seed=1)
            share_out(model, folder / name, CPU)
            held = sum(local_rows(parameter).numel() for parameter in model.parameters())
            with torch.no_grad():
                logits = model(torch.arange(12).view(1, 12)).logits
            found[name] = {
                "held": held,
                "buffers": {key: buffer.tolist() for key, buffer in model.named_buffers()},
                "logits": logits.tolist(), "rules": [repr(block.rule) for block in moe_blocks(model)],
                "one head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            }  # fmt: skip
            if adapters:
                found["adapters"] = {key: whole(parameter).tolist() for key, parameter in model.named_parameters()
                                     if "lora_" in key}  # fmt: skip
                merge_adapters(model)
            write(model, folder / "written" / name, folder / name)
            if name in NEW:
                write(model, folder / "from scratch" / name, None)
    return found


def draw(folder: Path, rank: int) -> dict[str, Any]:
    """Four processes build every model from scratch."""
    found: dict[str, Any] = {}
    with processes(folder / "store", rank, 4):
        for model_type in SCRATCH:
            model = from_scratch(model_type)
            found[model_type] = {"before": all(weight.is_meta for weight in model.parameters())}
            share_out(model, None, CPU)
            torch.save({name: whole(weight).detach() for name, weight in model.named_parameters()} |
                       dict(model.named_buffers()), folder / f"{model_type}-{rank}.pt")  # fmt: skip
            found[model_type] |= {
                "held": sum(local_rows(weight).numel() for weight in model.parameters()),
                "one head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            }  # fmt: skip
    return found


CASES = (change_processes, suffer, load_and_write, draw)


def all_cases(rank: int, folder: str) -> None:
    """One of four processes."""
    torch.set_num_threads(1)
    for case in CASES:
        found = case(Path(folder) / case.__name__, rank)
        (Path(folder) / f"{case.__name__}-{rank}.json").write_text(json.dumps(found))


pytestmark = pytest.mark.long  # two processes train, save and resume what one does in test_processes.py, in seconds


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which four processes have worked through all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        (folder / case.__name__).mkdir()
    models(folder / "load_and_write")
    run_ranks(all_cases, folder, 4)
    return folder


def told(ranks: Path, case: Callable[..., Any], rank: int = 0) -> Any:
    """What a process has found."""
    return json.loads((ranks / f"{case.__name__}-{rank}.json").read_text())


def test_any_number_of_processes_goes_on_exactly_where_any_other_stopped(ranks: Path) -> None:
    found = told(ranks, change_processes)
    assert found["resumed"] == list(range(len(COUNTS)))
    assert found["exact"] == [True] * (len(COUNTS) - 1)
    model, optimizer = pico()
    for step in range(len(COUNTS)):
        train(model, optimizer, step + 1)
    expected, end = state_of(model, optimizer), torch.load(ranks / "change_processes" / "end.pt")
    assert expected.keys() == end.keys()
    for name, tensor in expected.items():  # which rows lie in one vector decides the last bit of a step
        torch.testing.assert_close(end[name], tensor, rtol=1e-6, atol=1e-6)


def test_parts_hold_each_row_once_and_what_has_no_rows_lies_in_the_first(ranks: Path) -> None:
    (last,) = (ranks / "change_processes" / "state").glob("step-00000005")
    parts = [load_file(part / "weights.safetensors") for part in sorted(last.iterdir())]
    assert [len(part["model.embed_tokens.weight"]) for part in parts] == [10, 10, 10, 7]
    assert [len(part["model.layers.0.mlp.experts.down_proj"]) for part in parts] == [1, 1, 1, 0]
    assert ["model.layers.0.mlp.selection_bias" in part for part in parts] == [True, False, False, False]
    assert {"model.norm.weight", "lm_head.weight"}.isdisjoint(parts[0])
    states = [read_json(part / "state.json") for part in sorted(last.iterdir())]
    assert states[3]["rows"]["exp_avg/model.embed_tokens.weight"] == [30, 37, 16]
    assert ["metrics" in state for state in states] == [True, False, False, False]


def test_the_last_two_checkpoints_stay_whatever_processes_wrote_them(ranks: Path) -> None:
    left = sorted(path.name for path in (ranks / "change_processes" / "state").iterdir())
    assert left[-2:] == ["step-00000004", "step-00000005"]
    assert len(left) <= 3  # the others' parts of step 5 may have come later than the first process looked


@pytest.mark.parametrize("model_type", SCRATCH)
def test_a_model_from_scratch_has_the_numbers_of_one_process_and_is_whole_on_none(ranks: Path, model_type: str) -> None:
    model = from_scratch(model_type)
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    total, held = sum(weight.numel() for weight in model.parameters()), 0
    for rank in range(4):
        found = told(ranks, draw, rank)[model_type]
        assert found["before"]
        assert found["one head"] == SCRATCH[model_type].get("tie_word_embeddings", model_type == "gemma3_text")
        tensors = torch.load(ranks / "draw" / f"{model_type}-{rank}.pt")
        assert tensors.keys() == expected.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []
        held += found["held"]
    assert held == total


NOT_WRITTEN = "step-00000002: not every process has written its part"


@pytest.mark.parametrize(("accident", "resumed", "left", "line"), [
    ("nothing", 2, [1, 2], None),
    ("the second dies", 1, [1], NOT_WRITTEN),
    ("the second is killed", 1, [1], NOT_WRITTEN),
    ("the second still writes", 1, [1, 2], None),
    ("the second is of another start", 1, [1], NOT_WRITTEN),
    ("another number of processes", 2, [1, 2], None),
    ("a bit", 1, [1, 2], "passed over: .*/part-00001-of-00002/optimizer.safetensors: its bytes are others"),
    ("a file", 1, [1, 2], "passed over: .*/part-00001-of-00002/state.json: there is no such file"),
])  # fmt: skip
def test_all_processes_resume_the_newest_checkpoint_whose_parts_are_whole(
    ranks: Path, accident: str, resumed: int, left: list[int], line: str | None
) -> None:
    first, second = (told(ranks, suffer, rank)[accident] for rank in (0, 1))
    assert (first["resumed"], second["resumed"]) == (resumed, resumed)
    assert first["left"] == [f"step-{step:08d}" for step in left]
    assert len(first["lines"]) == (line is not None)
    assert line is None or re.search(line, first["lines"][0])


def test_where_no_checkpoint_is_whole_no_process_starts_anew(ranks: Path) -> None:
    for rank in (0, 1):
        error = told(ranks, suffer, rank)["neither is whole"]["resumed"]
        assert re.search("no checkpoint is whole: .*step-00000002/part-00001.*step-00000001/part-00001", error)


def test_adapters_of_a_sharded_model_are_those_of_one_process(ranks: Path) -> None:
    pytest.importorskip("peft", reason='needs peft: pip install "branchtrainmix[lora]"')
    model = load_model(ranks / "load_and_write" / "llama")
    add_adapters(model, 2, 4.0, rng_seed=1)
    expected = {key: parameter.tolist() for key, parameter in model.named_parameters() if "lora_" in key}
    assert len(expected) == 12
    assert told(ranks, load_and_write)["adapters"] == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_is_the_folders_and_no_process_holds_more_than_its_rows(ranks: Path, name: str) -> None:
    expected = load_model(ranks / "load_and_write" / name)
    with torch.no_grad():
        logits = expected(torch.arange(12).view(1, 12)).logits
    found = [told(ranks, load_and_write, rank)[name] for rank in range(4)]
    assert all(torch.equal(torch.tensor(each["logits"]), logits) for each in found)
    assert found[0]["buffers"] == {key: buffer.tolist() for key, buffer in expected.named_buffers()}
    assert found[0]["rules"] == [repr(block.rule) for block in moe_blocks(expected)]
    assert found[0]["one head"] == (name in ("tied", "qwen2_moe"))
    total = sum(parameter.numel() for parameter in expected.parameters())
    assert name == "llama" or sum(each["held"] for each in found) == total  # that one has adapters beside
    assert max(each["held"] for each in found) < 0.5 * total


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "written") for name in MODELS), *((name, "from scratch") for name in NEW)
])  # fmt: skip
def test_what_several_processes_write_are_the_bytes_that_one_writes(ranks: Path, name: str, kind: str) -> None:
    source = ranks / "load_and_write" / name
    write(load_model(source), ranks / "one" / kind / name, source if kind == "written" else None)
    one, several = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (ranks / "one" / kind / name, ranks / "load_and_write" / kind / name)
    )
    assert one.keys() == several.keys()
    assert [file for file in one if one[file] != several[file]] == []
    assert len(list((ranks / "one" / kind / name).glob("model-*.safetensors"))) > 1
