"""Weights & Biases: offline unless there is a key. Its error reports, machine statistics and copies of code and console
are off. Checked with wandb 0.31, offline.

Several offline runs of one id do not add up, `wandb sync` puts one in the place of the other
(https://github.com/wandb/wandb/issues/3841): so each start of a stage writes one that has all steps, and takes away the
one before. Online the run is resumed by its id, behind the last step that the server has; a step that is done again
after a kill stays what it was.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from collections.abc import Sequence
from urllib.parse import urlparse

from btx.training.trackers.tracker import Ending, Point, Tracked, Tracker

EXIT_CODES = {"finished": 0, "interrupted": 143, "failed": 1}


class Run(Tracker):
    """The stage's run, offline or resumed."""

    def __init__(self, tracked: Tracked) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True,
        )  # fmt: skip
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        tracked.folder.mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            for before in (tracked.folder / "wandb").glob("offline-run-*"):
                shutil.rmtree(before, ignore_errors=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or tracked.project, group=tracked.group, name=tracked.name,
            job_type=tracked.stage.split("/")[0], id=tracked.kept("wandb", "id", lambda: secrets.token_hex(8)),
            resume="allow", config=dict(tracked.config), dir=str(tracked.folder), mode=mode, settings=settings,
        )  # fmt: skip
        self.last_step = max(self._run.starting_step - 1, 0)

    def add(self, points: Sequence[Point]) -> None:
        """Hand them to wandb's own process, which writes and sends."""
        for point in points:
            self._run.log(point.values, step=point.step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=EXIT_CODES[ending])


def _logged_in() -> bool:
    """Whether wandb would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in map(os.path.expanduser, names):
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
