"""Every error btx raises on purpose.

    BtxError                    exit code 1: something failed
    ├── StageFailed             a stage's process ended with a failure
    ├── NotFinite               the loss became NaN or infinite
    ├── LossSpike               the loss jumped, and the recipe says to stop then
    ├── OutOfMemory             memory of the machine or of a GPU is used up
    ├── SystemFailed            the system refused something that is no file's fault
    ├── Interrupted             (btx.process) a signal came and all is saved; exit code 128 + its number
    └── UserError               exit code 2: the user can mend it
        ├── Refused             (btx.serving.requests) a request to `btx serve` that is not answered
        ├── RecipeError         unknown key, wrong type, impossible value
        ├── DataError           missing, empty or broken data
        ├── CheckpointError     a folder that is no model, or does not fit the others
        └── RunFolderError      the run folder is busy, unwritable or belongs to another recipe
            └── NotYet          what a stage needs is not finished, or another process is at it; of `btx work`, which
                                launchers start, exit code 75 (EX_TEMPFAIL): start it again later

The message of each says what is wrong, where, what is allowed and what to do.
"""

from collections.abc import Sequence


class BtxError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


class StageFailed(BtxError):
    """A stage's process ended with a failure; the message holds the end of its log."""


class NotFinite(BtxError):
    """The loss became NaN or infinite; the message names the step and the last good checkpoint."""


class LossSpike(BtxError):
    """The loss jumped and `on_spike` is `stop`; everything before that step is saved."""


class OutOfMemory(BtxError):
    """Memory of the machine or of a GPU is used up; the message names what to turn."""


class SystemFailed(BtxError):
    """The system refused something: too many open files, a broken disk, a closed output."""


class UserError(BtxError):
    """Something the user can mend: exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be run: unknown key, wrong type, impossible value."""


class DataError(UserError):
    """Data that are missing, empty, broken or too few for their budget."""


class CheckpointError(UserError):
    """A folder that holds no model, or a model that does not fit the others."""


class RunFolderError(UserError):
    """A run folder that is busy, unwritable or belongs to another recipe."""


NOT_YET = 75
"""Exit code of a job that ends with `NotYet` (EX_TEMPFAIL of sysexits.h)."""


class NotYet(RunFolderError):
    """What a stage needs is not finished, or another process is at it: nothing is wrong but the time."""


def first_few(names: Sequence[str], most: int, rest: str = " and {} more", between: str = ", ") -> str:
    """The first `most` of what a message names; where there are more, `rest` says so, `{}` in it being how many."""
    return between.join(names[:most]) + rest.format(len(names) - most) * (len(names) > most)
