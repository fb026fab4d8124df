"""A whole run under random kills of its processes comes to the same end; `tests/faults/chaos.py` does it with any
recipe."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.faults.chaos import chaos
from tests.pico_run import write_pico_recipe
from tests.processes import run_with_forked_jobs, start


class Forked:
    """A call of `btx run` whose jobs are its children, none of which has to import anything."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.process: BaseProcess = start(run_with_forked_jobs, *arguments, log=log)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return int(self.process.exitcode or 0)


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rng_seed", [1, 2])
def test_a_run_whose_processes_are_killed_again_and_again_ends_as_one_that_was_left_alone(
    tmp_path: Path, rng_seed: int
) -> None:
    recipe = write_pico_recipe(tmp_path)
    arguments = [str(recipe), f"data.root={tmp_path}", "train.tokens=25600", "finetune.tokens=25600", "launch.jobs=2"]
    assert chaos(arguments, tmp_path, rng_seed=rng_seed, start=Forked) == []
