"""Reading and writing weights: shards, types, rounding, atomic output."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btx.errors import UserError
from btx.mixing.merge import mean
from btx.mixing.mix import mix, soup
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.headers import INDEX
from btx.model_files.lazy_tensors import Computed, Elementwise, FileTensor, cast, is_finite, rounded
from btx.model_files.shard_writer import OutputTensor, write_shards
from btx.recipe.sizes import bytes_of
from tests.processes import btx, start

MakeLlama = Callable[..., Path]


def reshard(folder: Path, size: str) -> Path:
    """The same model in shards, as `save_pretrained` writes them."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
    (folder / "model.safetensors").unlink()
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_shards_in_and_shards_out_give_the_same_tensors_as_single_files(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    mix(seed, {"math": math}, tmp_path / "whole")
    mix(reshard(seed, "20KB"), {"math": reshard(math, "30KB")}, tmp_path / "shards", max_shard_size="25KB")
    whole, shards = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "shards")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert index["weight_map"].keys() == shards.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in shards.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_no_file_is_larger_than_asked_unless_one_tensor_is(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    mix(seed, {"math": seed}, tmp_path / "moe", max_shard_size="12KB")
    for file in (tmp_path / "moe").glob("*.safetensors"):
        assert file.stat().st_size <= 12_000 or len(load_file(file)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_can_be_chosen_and_every_value_is_rounded_once(
    make_llama: MakeLlama, tmp_path: Path, dtype: str
) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    mix(seed, {"math": math}, tmp_path / "moe", dtype=dtype)
    found = all_tensors(tmp_path / "moe")
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    models = [load_file(folder / "model.safetensors") for folder in (math, seed)]
    exact = (models[0]["lm_head.weight"].double() + models[1]["lm_head.weight"].double()) / 2
    assert torch.equal(found["lm_head.weight"], rounded(exact, getattr(torch, dtype)))
    copied = found["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert torch.equal(copied, models[0]["model.layers.0.mlp.gate_proj.weight"].to(getattr(torch, dtype)))


def nearest(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values of a 16-bit type, ties to even, by trying the neighbours: slow and sure."""
    guess = torch.from_numpy(exact).to(dtype)
    around = [guess, *(step(guess, dtype) for step in (up, down))]
    distances = np.stack([np.abs(other.double().numpy() - exact) for other in around])
    odd = np.stack([(other.view(torch.int16) & 1).numpy() for other in around])
    best = np.lexsort((odd, distances), axis=0)[0]
    return torch.stack(around).gather(0, torch.from_numpy(best)[None])[0]


def up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, torch.inf))


def down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


FINITE_16 = st.integers(-(2**15), 2**15 - 1)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.bfloat16, 0x7F80), (torch.float16, 0x7C00)])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), members=st.integers(2, 5))
def test_the_mean_of_any_16_bit_values_is_the_nearest_to_the_exact_mean(
    dtype: torch.dtype, exponent: int, data: st.DataObject, members: int
) -> None:
    patterns = data.draw(arrays(np.int16, (members, 40), elements=FINITE_16))
    patterns = np.where((patterns & exponent) == exponent, patterns & 0x3FFF, patterns).astype(np.int16)
    values = list(torch.from_numpy(patterns).view(dtype))
    found = rounded(mean(values), dtype)
    exact = sum(value.double().numpy() for value in values) / members
    assert torch.equal(found.double(), nearest(exact, dtype).double())


@settings(max_examples=60, deadline=None)
@given(
    bits=arrays(np.uint8, st.integers(1, 40).map(lambda n: 8 * n), elements=st.integers(0, 255)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_the_quick_check_for_nan_agrees_with_torch(bits: np.ndarray, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(bits.copy()).view(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_a_tensor_larger_than_a_block_is_read_whole_and_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.model_files.lazy_tensors.BLOCK_ELEMENTS", 7)
    monkeypatch.setattr("btx.model_files.lazy_tensors.COMPUTED_ELEMENTS", 4)
    values = torch.arange(60, dtype=torch.float32).view(12, 5)
    computed = Computed((12, 5), torch.float32, lambda: values)
    write_shards(tmp_path, [OutputTensor("a", (12, 5), torch.float32, [computed])])
    tensor = TensorFolder(tmp_path)["a"]
    assert torch.equal(tensor.load(), values)
    assert torch.equal(torch.cat([task.run() for task in tensor.rows(3, 7).tasks()]).view(4, 5), values[3:7])
    assert torch.equal(tensor.rows(3, 7).rows(1, 2).load(), values[4:5])
    halves = Elementwise((12, 5), torch.bfloat16, [tensor], lambda blocks: blocks[0] / 2)
    assert torch.equal(halves.load(), (values / 2).bfloat16())
    assert torch.equal(cast(halves, torch.float32).rows(2, 4).load(), values[2:4] / 2)
    assert isinstance(cast(tensor, torch.float32), FileTensor)


def test_feed_forward_weights_are_the_same_bytes(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    mix(seed, {"math": math}, tmp_path / "moe")
    written = (tmp_path / "moe" / "model.safetensors").read_bytes()
    with safe_open(math / "model.safetensors", "pt") as file:
        for layer in range(2):
            for role in ("gate", "up", "down"):
                assert file.get_tensor(f"model.layers.{layer}.mlp.{role}_proj.weight").numpy().tobytes() in written


def test_a_soup_of_fused_weights_has_the_fused_names_again(tmp_path: Path) -> None:
    from tests.test_families import logits, make, plain

    seed = make(tmp_path / "seed", "phi3", {})
    soup(seed, {"a": seed}, tmp_path / "soup")
    assert torch.equal(logits(plain(tmp_path / "soup")), logits(plain(seed)))


class Stop(Exception):
    """Raised in the middle of writing."""


def test_an_interrupted_mix_leaves_nothing_and_the_old_output_whole(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, output = make_llama("seed"), tmp_path / "moe"
    seen: list[tuple[int, int]] = []

    def stop(written: int, total: int) -> None:
        seen.append((written, total))
        if len(seen) == 20:
            raise Stop

    before = sorted(tmp_path.iterdir())
    with pytest.raises(Stop):
        mix(seed, {"a": seed}, output, progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / ".moe.0123abcd.tmp").mkdir()  # what kill -9 leaves
    mix(seed, {"a": seed}, output, progress=lambda written, total: seen.append((written, total)))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in all_tensors(output).values())
    assert sorted(tmp_path.iterdir()) == sorted([*before, output])
    old = (output / "model.safetensors").read_bytes()
    seen.clear()
    with pytest.raises(Stop):
        mix(seed, {"a": seed, "b": seed}, output, progress=stop)
    assert (output / "model.safetensors").read_bytes() == old


def signalled_in_the_middle(number: int, *arguments: str) -> None:
    """`btx mix` that sends itself a signal when half is written."""
    from btx.mixing import mix as module

    def end(written: int, total: int) -> None:
        if written * 2 > total:
            os.kill(os.getpid(), number)

    module.mix = partial(module.mix, progress=end)
    btx("mix", *arguments)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_a_signal_leaves_nothing_that_looks_finished(make_llama: MakeLlama, tmp_path: Path, number: int) -> None:
    seed = make_llama("seed")
    arguments = ("--seed-model", str(seed), "--expert", f"a={seed}", "-o", str(tmp_path / "moe"))
    log = tmp_path / "log"
    done = start(signalled_in_the_middle, int(number), *arguments, log=log)
    done.join()
    assert not (tmp_path / "moe").exists()
    if number == signal.SIGKILL:
        assert done.exitcode == -number
        assert list(tmp_path.glob(".moe.*.tmp"))
    else:
        assert done.exitcode == 128 + number
        assert log.read_text().strip() == f"error: stopped; nothing was written to {tmp_path / 'moe'}"
        assert not list(tmp_path.glob(".moe.*"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5KiB", 1536),
        (7, 7),
        ("24e9", 24 * 10**9),
        ("80 gib", 80 * 2**30),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 XB", "1e400", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        bytes_of(text)


def mix_with_few_files(soft: int, hard: int, seed: str, experts: dict[str, str], output: str) -> None:
    """Mix where a process may open no more files than `soft`, and raise that to `hard` at most."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    btx("mix", "--seed-model", seed, *(f"--expert={name}={path}" for name, path in experts.items()), "-o", output)


@pytest.mark.parametrize(
    ("soft", "hard", "distinct", "code"), [(60, 400, True, 0), (60, 100, True, 2), (90, 90, False, 0)]
)
def test_many_shards_are_opened_or_the_limit_is_named(
    make_llama: MakeLlama, tmp_path: Path, soft: int, hard: int, distinct: bool, code: int
) -> None:
    seed = reshard(make_llama("seed"), "12KB")
    shards = len(list(seed.glob("*.safetensors")))
    folders = [Path(shutil.copytree(seed, tmp_path / f"e{n}")) if distinct else seed for n in range(10)]
    experts = {f"e{n}": str(folder) for n, folder in enumerate(folders)}
    output, log = tmp_path / "moe", tmp_path / "log"
    job = start(mix_with_few_files, soft, hard, str(seed), experts, str(output), log=log)
    job.join()
    printed = log.read_text()
    assert job.exitcode == code, printed
    assert output.exists() == (code == 0)
    if code:
        said = (
            rf"error: too many open files: the models' {11 * shards} files of weights .* needs \d+ open files, .* 100\."
        )
        assert re.search(said, printed)


def test_a_file_is_opened_once_until_it_changes(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    (tmp_path / "link").symlink_to(seed)
    one, two = (TensorFolder(folder)["model.norm.weight"].source for folder in (seed, tmp_path / "link"))
    assert one is two
    time.sleep(0.01)
    (seed / "model.safetensors").write_bytes((seed / "model.safetensors").read_bytes())
    assert TensorFolder(seed)["model.norm.weight"].source is not one
