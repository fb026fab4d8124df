"""What can be refused about tasks of lm-evaluation-harness before anything is trained. Plain Python."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from btx.errors import UserError
from btx.evaluation.code_execution import check_code_execution
from btx.evaluation.harness_files import TaskDocuments, TaskRequest, local_tasks, read_documents

INSTALL = 'pip install "branchtrainmix[eval]"'
PACKAGES = ("lm_eval", "accelerate", "datasets")


def check_harness(requests: Sequence[TaskRequest], *, allow_code_execution: bool) -> dict[str, TaskDocuments | None]:
    """Refuse tasks that cannot be measured here.

    Returns:
        Label → documents of the task's file, read and checked; None for a task from the hub.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or it runs code that is not allowed to run here.
        DataError: a file is missing or broken.
    """
    if not requests:
        return {}
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"tasks of lm-evaluation-harness ({', '.join(request.label for request in requests)}) need "
                        f"packages that are not installed ({', '.join(missing)}): {INSTALL}")  # fmt: skip
    if any(request.task and request.task.program for request in requests):
        if not allow_code_execution:
            raise UserError("these tasks run programs that the models write; read docs/evaluation-tasks.md, then allow "
                            "it: --allow-code-execution, or evaluate.harness.allow_code_execution: true")  # fmt: skip
        check_code_execution()
    for request in requests:
        if request.task is None:
            _check_installed_task(request)
    return {request.label: read_documents(request, shots_of(request)) if request.file else None for request in requests}


def shots_of(request: TaskRequest) -> int:
    """How many shots are read from a task's file: what is asked for, else the paper's, else lm-eval's own number."""
    if request.shots is not None:
        return request.shots
    if request.paper_shots is not None:
        return request.paper_shots
    config = installed_task(request.name)
    own_samples = (config.get("fewshot_config") or {}).get("samples")
    return 0 if own_samples and request.shots_file is None else int(config.get("num_fewshot") or 0)


@cache
def task_manager() -> Any:
    """lm-eval's list of its tasks. Takes some seconds the first time: 15000 files are read."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager()


def installed_tasks() -> dict[str, Any]:
    """Every task, group and tag that the installed lm-eval knows, by name."""
    return dict(task_manager().task_index)


def installed_task(name: str) -> dict[str, Any]:
    """lm-eval's own description of a task, functions as the paths they lie in; {} for a tag."""
    return dict(installed_tasks()[name].cfg or {})


def _check_installed_task(request: TaskRequest) -> None:
    known = installed_tasks()
    if request.name not in known:
        close = difflib.get_close_matches(request.name, known, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{request.label}: lm-eval has no task {request.name!r}{meant} From a file btx reads "
                        f"{', '.join(local_tasks())}; `lm-eval ls tasks` lists lm-eval's own")  # fmt: skip
    unsafe = [name for name in _leaves(request.name) if installed_task(name).get("unsafe_code")]
    if unsafe:
        raise UserError(
            f"{request.label}: in {', '.join(unsafe[:3])} lm-eval runs programs that the model writes, "
            f"without limits; btx does not start it. humaneval and mbpp from a file run behind a fence"
        )
    if request.file is not None and not isinstance(installed_task(request.name).get("task"), str):
        raise UserError(f"{request.label}: {request.name} is a group of tasks; a file goes with one task")


def _leaves(name: str) -> Iterator[str]:
    """The tasks that a task, group or tag stands for, those that are known by name."""
    entry = installed_tasks().get(name)
    if entry is None:
        return
    members = (entry.cfg or {}).get("task")
    if entry.kind.name == "GROUP" and isinstance(members, list):
        for member in members:
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            if isinstance(inner, str) and inner != name:
                yield from _leaves(inner)
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member)
    else:
        yield name
