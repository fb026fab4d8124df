"""Routers from text, extend and drop in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from btx.data.expert_text import TextRows
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from tests.test_families import branch, every_family, logits, make, plain


def text(first_id: int) -> TextRows:
    """Rows of tokens from a range of their own."""
    ids = np.random.default_rng(first_id).integers(first_id, first_id + 10, (8, 24))
    return TextRows("test", ids, np.tile(np.arange(24), (8, 1)))


@pytest.mark.long  # tests/test_extend.py has Mixtral
@every_family
def test_every_family_takes_routers_from_text_and_can_be_extended_and_cut_back(
    tmp_path: Path, dense: str, moe: str, config: dict[str, Any]
) -> None:
    seed = make(tmp_path / "seed", dense, config)
    experts = {name: branch(seed, tmp_path / name, number + 1) for number, name in enumerate("ab")}
    texts = {"a": text(10), "b": text(40), "generalist": text(70)}
    mix(seed, experts, tmp_path / "moe", router_init="ridge", texts=texts)
    old = load_file(tmp_path / "moe" / "model.safetensors")
    routers = [tensor for tensor in old.values() if tensor.shape == (3, 32)]
    assert len(routers) == 4
    assert all(tensor.abs().max() > 0 for tensor in routers)

    extend(tmp_path / "moe", "c", branch(seed, tmp_path / "c", 3), tmp_path / "moe4", router_init="zeros")
    assert torch.isfinite(logits(plain(tmp_path / "moe4"))).all()
    drop(tmp_path / "moe4", "c", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == again.keys()
    assert all(torch.equal(old[name], again[name]) for name in old)
    assert (tmp_path / "moe" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
