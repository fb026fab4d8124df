"""One piece of writing at a time, in a thread, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Writes in a thread of its own. What a piece of writing raised, whoever asks next for the writer raises.

    A process that ends by itself ends after the writing; one that is killed leaves what a killed writer leaves.
    """

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Let `write` run, after what was started before has ended; what it reads must not change until it has."""
        self.wait()
        pool = ThreadPoolExecutor(1, thread_name_prefix="writes checkpoints")
        self._under_way = pool.submit(write)
        pool.shutdown(wait=False)  # its thread ends with this piece

    def wait(self) -> None:
        """Until nothing is being written; raises what the writing raised."""
        if self._under_way is not None:
            ended, self._under_way = self._under_way, None
            ended.result()

    def check(self) -> None:
        """Raise what the writing raised, if it has ended; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()
