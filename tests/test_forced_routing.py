"""benchmarks/forced_routing.py: a second half routed as it is alone, with the first half in sight."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from btx.evaluation.lag import Change
from tests.pico_models import mixtral

TOKENS = np.array([0, *range(5, 25), *range(40, 60)], np.int64)
CHANGE = Change(TOKENS, 21, 0, 1)


@pytest.fixture(scope="module")
def forcing() -> Iterator[ModuleType]:
    """The file, imported as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("forced_routing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = mixtral(tmp_path_factory.mktemp("forced") / "moe")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_forcing_what_a_model_decides_itself_changes_nothing(forcing: ModuleType, model: PreTrainedModel):
    tokens_T = torch.from_numpy(TOKENS)
    with forcing.recorded(model) as decisions:
        bits = forcing.bits_behind(model, tokens_T, CHANGE.at)
    assert len(decisions) == model.config.num_hidden_layers
    with forcing.forced(model, [tuple(output[CHANGE.at :] for output in of_layer) for of_layer in decisions]):
        assert forcing.bits_behind(model, tokens_T, CHANGE.at) == pytest.approx(bits, rel=1e-6)
    assert forcing.bits_behind(model, tokens_T, CHANGE.at) == pytest.approx(bits, rel=1e-6)  # hooks are gone


def test_the_second_half_takes_the_experts_it_takes_alone(forcing: ModuleType, model: PreTrainedModel):
    as_it_is, afresh, alone = forcing.bits_of(model, CHANGE)
    assert len({as_it_is, afresh, alone}) == 3
    with forcing.recorded(model) as wanted:
        forcing.bits_behind(model, torch.from_numpy(np.delete(TOKENS, np.s_[1 : CHANGE.at])), 1)
    own = [tuple(output[1:] for output in of_layer) for of_layer in wanted]
    with forcing.forced(model, own), forcing.recorded(model) as decisions:
        assert forcing.bits_behind(model, torch.from_numpy(TOKENS), CHANGE.at) == afresh
    for of_layer, of_layer_alone in zip(decisions, own, strict=True):
        for output, output_alone in zip(of_layer, of_layer_alone, strict=True):
            assert torch.equal(output[CHANGE.at :], output_alone)


def test_bits_of_a_half_with_nothing_before_it_are_the_same_three_times(forcing: ModuleType, model: PreTrainedModel):
    as_it_is, afresh, alone = forcing.bits_of(model, Change(TOKENS, 1, 0, 1))
    assert as_it_is == pytest.approx(alone, rel=1e-6)
    assert afresh == pytest.approx(alone, rel=1e-6)
    logits_TV = model(input_ids=torch.from_numpy(TOKENS)[None]).logits[0]
    nats = -torch.log_softmax(logits_TV[:-1], -1)[range(len(TOKENS) - 1), TOKENS[1:]].sum().item()
    assert alone == pytest.approx(nats / math.log(2), rel=1e-5)


def test_a_model_without_routers_has_no_second_column(forcing: ModuleType):
    rows = forcing.table([{"btx": [2.0, 1.5, 1.0], "dense_cm": [2.0, None, 1.0]}] * 2).split("\n")
    assert rows[2] == "| btx | 2.000 ± 0.000 | 1.500 ± 0.000 | 1.000 ± 0.000 |"
    assert rows[3] == "| dense_cm | 2.000 ± 0.000 |  | 1.000 ± 0.000 |"
