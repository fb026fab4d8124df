"""A run under seeded random kills, compared with one that nothing disturbed.

    python -m tests.faults.chaos demo device=cpu                     # the demo, twice
    python -m tests.faults.chaos demo device=cpu --rng-seed 7 --every 20 --keep FOLDER

A kill is SIGKILL or SIGTERM to one process of the run's tree, or to all of them, at a random time; then `btx run` is
called again, until it ends well. What must come out: the same models and results, bit for bit but for times; and of
what was finished before a kill nothing may be lost. Ends with exit code 1 where that is not so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from btx.files import file_sha256
from btx.outputs import DONE
from btx.run_folder.folder import RunFolder
from tests.faults.kills import outcome

GOES_ON_S = 1.0
"""Seconds within which the next call of `btx run` follows."""


class Process(Protocol):
    """A call of `btx run`; subprocess.Popen is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Path], Process]
"""Arguments of `btx run`, and a log → the process."""


def start_run(arguments: Sequence[str], log: Path) -> Process:
    """`btx run` as users start it."""
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "btx", "run", *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


@dataclass
class Chaos:
    """Runs a recipe to its end whatever happens to it.

    Args:
        arguments: of `btx run`.
        run: its run folder.
        chance: decides when which process is killed.
        every_s: mean seconds between two kills; 0: nothing is disturbed.
        most: kills at most, so that it ends.
        start: starts `btx run`.
    """

    arguments: Sequence[str]
    run: Path
    chance: random.Random
    every_s: float
    most: int
    start: Start
    kills: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def to_the_end(self) -> float:
        """Call `btx run` until it ends well; returns the seconds it took. Raises RuntimeError if it fails by itself."""
        started = time.monotonic()
        log = self.run.with_name(f"{self.run.name}.log")
        while True:
            process = self.start([*self.arguments, f"run={self.run}"], log)
            finished, killed = self._finished(), self._disturb(process)
            code = process.wait()
            if code == 0:
                seconds = time.monotonic() - started
                print(f"{self.run.name}: {len(self.kills)} kills, {seconds:.0f} s", flush=True)
                return seconds
            if not killed:
                raise RuntimeError(f"ended with {code} though nothing was killed:\n{log.read_text()[-3000:]}")
            now = self._finished()
            self.lost += [f"{stage} after {killed}" for stage in finished if finished[stage] != now.get(stage)]
            time.sleep(self.chance.uniform(0, GOES_ON_S))

    def _disturb(self, process: Process) -> str:
        """Wait for the process's end, or kill something of its tree; says what was killed."""
        if not self.every_s or len(self.kills) >= self.most:
            process.wait()
            return ""
        until, killed = time.monotonic() + self.chance.expovariate(1 / self.every_s), ""
        while process.poll() is None:
            if time.monotonic() >= until:
                killed = killed or self._kill(process)
                until = float("inf")  # who was spared ends by itself: a job without its run, a run without its job
            time.sleep(0.02)
        return killed

    def _kill(self, process: Process) -> str:
        number = self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        whom = self.chance.choice(["coordinator", "worker", "all"])
        try:
            coordinator = psutil.Process(process.pid)
            workers = [child for child in coordinator.children(recursive=True) if child.name() != "git"]
        except psutil.Error:
            return ""
        victims = {"coordinator": [coordinator], "all": [coordinator, *workers]}.get(
            whom, [self.chance.choice(workers)] if workers else [coordinator]
        )
        stages = [_stages(victim) for victim in victims]
        for victim in victims:
            try:
                victim.send_signal(number)
            except psutil.Error:
                continue
        said = f"{signal.Signals(number).name} to {whom} ({'; '.join(stages)})"
        self.kills.append(said)
        print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)
        return said

    def _finished(self) -> dict[str, str]:
        """Finished stage → hash of its done.json."""
        return {str(path.parent.relative_to(self.run)): file_sha256(path)
                for path in self.run.rglob(DONE) if "stale" not in path.parts}  # fmt: skip


def _stages(process: psutil.Process) -> str:
    """The stages of a job, or its number."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return "gone"
    return " ".join(command[command.index("work") + 2 :]) if "work" in command else f"process {process.pid}"


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, apart from times and where their models lay."""
    came_to = [outcome(RunFolder.open(path)) for path in (one, other)]
    names = [name for name in came_to[0] | came_to[1] if not name.endswith("mix.json")]
    return [name for name in names if came_to[0].get(name) != came_to[1].get(name)]


def chaos(
    arguments: Sequence[str],
    folder: Path,
    *,
    rng_seed: int,
    every_s: float = 0.0,
    most: int = 12,
    start: Start = start_run,
) -> list[str]:
    """Run a recipe undisturbed and under kills in `folder`; what is wrong with the second, empty if nothing is.

    Args:
        every_s: mean seconds between two kills; 0: an eighth of what the undisturbed run takes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads decides the last bits
    calm = Chaos(arguments, folder / "calm", random.Random(rng_seed), 0.0, 0, start)
    seconds = calm.to_the_end()
    wild = Chaos(arguments, folder / "wild", random.Random(rng_seed), every_s or seconds / 8, most, start)
    wild.to_the_end()
    return [f"lost: {what}" for what in wild.lost] + [f"differs: {what}" for what in compare(calm.run, wild.run)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe and overrides, as for btx run", nargs="+")
    parser.add_argument("--rng-seed", type=int, default=0)
    parser.add_argument(
        "--every",
        type=float,
        default=0.0,
        help="mean seconds between two kills; default: an eighth of the undisturbed run's time",
    )
    parser.add_argument("--most", type=int, default=12, help="kills at most")
    parser.add_argument("--keep", type=Path, help="folder for both runs; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btx-chaos-") as temporary:
        folder = (asked.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        wrong = chaos(asked.recipe, folder, rng_seed=asked.rng_seed, every_s=asked.every, most=asked.most)
    print("\n".join(wrong) or "the same models and results, bit for bit; nothing finished was lost")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
