"""A whole run under random kills of its processes comes to the same end; `tests/faults/chaos.py` does it with any
recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import chaos
from tests.pico_run import write_pico_recipe


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rng_seed", [1, 2])
def test_a_run_whose_processes_are_killed_again_and_again_ends_as_one_that_was_left_alone(
    tmp_path: Path, rng_seed: int
) -> None:
    recipe = write_pico_recipe(tmp_path)
    arguments = [str(recipe), f"data.root={tmp_path}", "train.tokens=25600", "finetune.tokens=25600", "launch.jobs=2"]
    assert chaos(arguments, tmp_path, rng_seed=rng_seed, every_s=6.0, most=12) == []
