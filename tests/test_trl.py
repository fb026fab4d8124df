"""The examples of docs/after.md with TRL and peft, run as they stand there on a mixed model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import btx
from btx.serving.speaker import Speaker
from tests.pico_run import pico_recipe, run_here

pytestmark = pytest.mark.texts
ROOT = Path(__file__).parents[1]
MIXED = "runs/my/finetune/model"
SAVED = ["sft", "dpo", "grpo", "sft-lora"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples have run, on the model of a small run, with 16 lines of data."""
    pytest.importorskip("trl", reason='needs pip install "branchtrainmix[align]"')
    folder = tmp_path_factory.mktemp("trl")
    run_here(pico_recipe(folder, "runs/my"))
    asked = [[{"role": "user", "content": f"owl {number}"}] for number in range(16)]
    answers = [[{"role": "assistant", "content": word}] for word in ("the owl sings", "a saw cuts")]
    lines = {
        "chat": [{"messages": prompt + answers[0]} for prompt in asked],
        "pairs": [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]} for prompt in asked],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    section = (ROOT / "docs" / "after.md").read_text("utf-8").partition("\n## With TRL\n")[2].partition("\n## ")[0]
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    for trainer in ("SFT", "DPO", "GRPO"):  # two steps of each, on the CPU
        program = program.replace(f" = {trainer}Config(", f" = {trainer}Config(max_steps=2, use_cpu=True, output_dir=")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def kind(name: str) -> str:
    return next((part for part in ("experts", "gate", "self_attn") if f".{part}." in name), "other")


@pytest.mark.parametrize("name", SAVED)
def test_what_trl_saves_is_a_model_that_btx_and_transformers_load_alike(home: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32).eval()
    ours = btx.load_model(home / name).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("name", SAVED)
def test_the_config_stays_as_it_was_mixed(home: Path, name: str) -> None:
    before, after = (json.loads((home / folder / "config.json").read_text()) for folder in (MIXED, name))
    balancing = {"router_aux_loss_coef", "output_router_logits"}
    of_tokenizer = {"bos_token_id", "eos_token_id", "pad_token_id"}  # TRL writes what the tokenizer says
    spelling = {"dtype", "torch_dtype", "rope_theta", "rope_scaling", "transformers_version", "use_cache"}
    kept = before.keys() - balancing - of_tokenizer - spelling
    assert {key: after.get(key) for key in kept} == {key: before[key] for key in kept}
    assert before["router_aux_loss_coef"] == 0


@pytest.mark.parametrize("name", SAVED)
def test_experts_and_attention_learn_and_routers_but_for_lora(home: Path, name: str) -> None:
    before, after = tensors(home / ("sft" if name in ("dpo", "grpo") else MIXED)), tensors(home / name)
    assert before.keys() == after.keys()
    changed = {kind(tensor) for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert changed == ({"experts", "self_attn"} if name == "sft-lora" else {"experts", "gate", "self_attn", "other"})


def test_btx_knows_the_experts_again_and_measures_the_model_beside_its_runs_own(home: Path) -> None:
    assert Speaker(home / "sft").expert_names == ["birds", "tools", "generalist"]
    command = [sys.executable, "-m", "btx", "evaluate", "runs/my", "--model", "sft=sft", "--model", "lora=sft-lora"]
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    results = json.loads((home / "runs" / "my" / "evaluate" / "results.json").read_text())["models"]
    assert {"btx", "sft", "lora"} <= results.keys()
    assert 0 < results["sft"]["mean_bits_per_byte"] != results["btx"]["mean_bits_per_byte"]
