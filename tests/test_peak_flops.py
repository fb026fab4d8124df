"""MFU: a training's tokens a second as a share of what its devices could do at most."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from btx.cli.tables import status_table
from btx.models import peak_flops as peaks
from btx.models.cost import config_cost
from btx.models.peak_flops import mfu_fact, peak_flops, peak_tokens_per_s
from btx.reporting.costs import cost_table
from btx.training.metrics import Metrics


@pytest.mark.parametrize(("name", "in_bfloat16", "in_float32"), [
    ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12), ("NVIDIA H200", 989e12, 67e12),
    ("NVIDIA GH200 480GB", 989e12, 67e12), ("NVIDIA B200", 2250e12, 75e12), ("NVIDIA GB200", 2500e12, 80e12),
    ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12), ("NVIDIA A10", 125e12, 31.2e12), ("NVIDIA A10G", None, None),
    ("NVIDIA L4", 121e12, 30.3e12), ("NVIDIA L40S", 362e12, 91.6e12), ("NVIDIA L40", 181e12, 90.5e12),
    ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12), ("NVIDIA GeForce RTX 4090 D", None, None),
    ("NVIDIA GeForce RTX 3090 Ti", None, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ("Tesla V100-SXM2-16GB", None, 15.7e12), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ("NVIDIA H20", None, None),
])  # fmt: skip
def test_a_peak_is_known_by_the_whole_name_of_a_device(
    name: str, in_bfloat16: float | None, in_float32: float | None
) -> None:
    assert peak_flops(name, bfloat16=True) == in_bfloat16
    assert peak_flops(name, bfloat16=False) == in_float32


CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip


def test_the_share_is_of_all_processes_peaks_and_half_of_the_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up 9000")
    monkeypatch.setitem(peaks.PEAK_TFLOPS, "Made-up 9000", (2.0, 1.0))
    cost, device = config_cost(CONFIG), torch.device("cuda")
    attention, feed_forward, head = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32 * 100
    flops = 6 * (2 * (attention + feed_forward + 2 * 32) + 32 + head) + 6 * 2 * 4 * 8 * 64  # with norms; H·Q = 32
    assert peak_tokens_per_s(cost, 64, device, bfloat16=True) == pytest.approx(2e12 / flops)
    assert peak_tokens_per_s(cost, 64, device, bfloat16=False, processes=3) == pytest.approx(3e12 / flops)
    frozen = config_cost(CONFIG, trainable="feed_forward")
    saved = 2 * (2 * (attention + 2 * 32) + 32 + head)  # gradients of weights that do not train
    assert peak_tokens_per_s(frozen, 64, device, bfloat16=True) == pytest.approx(2e12 / (flops - saved))


def test_no_cpu_and_no_unknown_gpu_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = config_cost(CONFIG)
    assert peak_tokens_per_s(cost, 64, torch.device("cpu"), bfloat16=False) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard-of 1")
    assert peak_tokens_per_s(cost, 64, torch.device("cuda"), bfloat16=True) is None


def test_a_step_tells_its_share_where_the_peak_is_known(tmp_path: Path) -> None:
    file = io.StringIO()
    facts = {"step": 1, "loss": 2.0}
    Metrics(tmp_path / "known.jsonl", 0, 1000.0).write(file, facts, tokens=100, seconds=0.4)
    Metrics(tmp_path / "unknown.jsonl", 0).write(file, facts, tokens=100, seconds=0.4)
    known, unknown = map(json.loads, file.getvalue().splitlines())
    assert known == {"step": 1, "loss": 2.0, "tokens_per_s": 250.0, "wall_s": 0.4, "mfu": 0.25}
    assert "mfu" not in unknown
    assert (mfu_fact(100, 0.4, 1000.0), mfu_fact(100, 0.4, None)) == ({"mfu": 0.25}, {})


def test_status_and_report_have_a_column_for_it_only_where_it_is_known() -> None:
    row = {"stage": "seed", "state": "done", "processes": 1, "step": 1, "steps": 1, "loss": 2.0, "tokens_per_s": None,
           "eta_s": None,
           "wall_s": 1.0, "mfu": None, "why": None, "node": None}  # fmt: skip
    titles = [[str(column.header) for column in status_table([row | {"mfu": mfu}]).columns] for mfu in (None, 0.25)]
    assert [title for title in titles[1] if title not in titles[0]] == ["MFU"]
    model = {"predicted": {"tokens": 1}, "tokens": 1}
    unknown, rows = cost_table({"models": {"seed": model}})
    assert [len(cells) for _, cells in rows] == [len(unknown)]
    known, rows = cost_table({"models": {"seed": model, "btx": model | {"mfu": 0.25}}})
    assert known == [*unknown, "MFU of the last training"]
    assert [cells[-1].text for _, cells in rows] == ["–", "25.0 %"]
