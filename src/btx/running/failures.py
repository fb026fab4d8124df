"""Jobs that failed: which are tried again, which others can still begin, and what is said at the end. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence

from btx.errors import BtxError, StageFailed, UserError
from btx.process import Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.jobs import log_of
from btx.run_folder.status import failure_of, last_line, note_failure
from btx.running.launchers import Standing

SILENT = "stopped from outside, or its machine is gone: it gave no sign of life"
ENDED_BY = {
    9: "killed from outside; so the system ends what takes too much memory: a smaller micro_batch_tokens, "
       "gradient_checkpointing, a shorter data.sequence_length or fewer launch.jobs take less",
    7: "a file was cut off while it was read, or the disk it is on failed; the next start says which, if it is one "
       "that btx has written",
}  # fmt: skip
"""Signal (SIGKILL, SIGBUS) → what it says about a job that it ended."""


class Failures:
    """Those of one `btx run`: a new one tries everything anew.

    Who fails leaves the others alone: what does not need its result begins all the same. Only bad data end the run as
    soon as they are known, before anything is trained; so does whoever cancels a job.
    """

    def __init__(self, run: RunFolder, say: Log) -> None:
        self._run, self._say = run, say
        self._errors: dict[str, BtxError] = {}
        self._retries: dict[str, int] = {}
        self._lost: list[str] = []
        self._ends_run = False

    def __bool__(self) -> bool:
        return bool(self._errors)

    def cancelled(self, job: str) -> None:
        """The user has ended a job, and with it the run."""
        self._ends_run = True
        self._errors[job] = StageFailed(f"{job}: cancelled; `btx run {self._run.path}` goes on with it")

    def note(self, stages: Sequence[Stage], standing: Standing, lines: Sequence[str], *, silent: bool) -> bool:
        """A job has failed; True if it is to be tried again.

        Args:
            lines: what it said.
            silent: it gave no sign of life, and was ended for it.
        """
        exit_code = standing.exit_code or 0
        launch = self._run.recipe.launch
        ended_by = f"{SILENT} for {launch.hung_after_s} s, as launch.hung_after_s says" if silent else (
            ENDED_BY.get(-exit_code))  # fmt: skip
        message = "\n".join([*lines[-30:], *([ended_by] if ended_by else [])]).removeprefix("error: ")
        how = standing.why or (f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}" if exit_code
                               else "it has left the queue without a trace")  # fmt: skip
        how += f" on {standing.node}" if standing.node else ""
        # A process may do several stages: the one that failed is the first that is not done.
        name = next((stage.name for stage in stages if self._run.state(stage) != "done"), stages[0].name)
        if exit_code == UserError.exit_code:
            self._errors[name] = UserError(message or last_line(message))
        else:
            if silent or (noted := failure_of(self._run, name)) is None:  # a job that was killed could not
                note_failure(self._run, name, message or how, node=standing.node)
            elif noted["error"] not in message:  # it hung, and then saved, for example
                message = f"{message}\n{noted['error']}".strip()
            retry, retries = self._retries.get(name, 0) + 1, launch.retries
            if retry <= retries:
                self._retries[name] = retry
                self._say(f"{name}: failed ({how}): {last_line(message)}; tried again, {retry} of {retries}")
                return True
            times = f" {retries + 1} times" if retries else ""
            self._errors[name] = StageFailed(
                f"{name} failed{times} ({how}); its log is {log_of(self._run.path, stages[0].name)}:\n"
                f"{message or last_line(message)}\n"
                f"`btx run {self._run.path}` continues from its last checkpoint"
            )
        self._lost += [name.removeprefix("train/")] if name.startswith("train/") else []
        self._say(f"{name}: failed: {last_line(message)}")
        self._ends_run |= name.startswith("data/")
        return False

    def hold_back(self, jobs: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """The jobs that can begin, as far as it depends on what has failed."""
        if not self._errors:
            return list(jobs)
        if self._ends_run:
            return []
        lost = {name for name in self._errors if self._run.state(self._run.graph[name]) != "done"}
        for stage in self._run.graph:  # in an order in which they can run
            if any(needed.name in lost for needed in stage.needs) and self._run.state(stage) != "done":
                lost.add(stage.name)
        return [job for job in jobs if not any(stage.name in lost for stage in job)]

    def summary(self, waiting: Sequence[tuple[Stage, ...]]) -> str:
        """What failed and what was not begun for it."""
        left = [stage.name for job in waiting for stage in job]
        return f"failed: {', '.join(self._errors)}; not begun: {', '.join(left) or 'nothing'}"

    def raise_first(self) -> None:
        """Raise what has failed, all in one message: the user's mistake only if there is nothing else."""
        if not self._errors:
            return
        errors = sorted(self._errors.values(), key=lambda error: error.exit_code)
        raise type(errors[0])("\n\n".join(map(str, errors)) + self._without())

    def _without(self) -> str:
        """How to go on without the experts that failed, where others are left."""
        lost = [domain for domain in self._run.recipe.train.domains if domain in self._lost]
        if len(lost) in (0, len(self._run.recipe.train.domains)):
            return ""
        options = " ".join(f"--without {domain}" for domain in lost)
        experts = "this expert" if len(lost) == 1 else "these experts"
        return f"\n`btx run {self._run.path} {options}` goes on without {experts}"
