"""MLflow: an experiment in RUN/mlflow.db (SQLite), unless MLFLOW_TRACKING_URI names a store. Its telemetry is off.
Checked with mlflow 3.17 over SQLite.

`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it. A step that is done again after a kill stays what it
was: MLflow keeps two values of a step side by side and takes none back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from btx.training.trackers.tracker import Ending, Point, Tracked, Tracker, flat

MOST = 1000
"""Metrics of a call, as MLflow limits them."""
MOST_SETTINGS, LONGEST_SETTING = 100, 500
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Run(Tracker):
    """The stage's run, resumed by its id."""

    def __init__(self, tracked: Tracked) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)  # tells every table it makes
        locks = tracked.run / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "mlflow.lock", timeout=60):  # branches start together
            store = os.environ.get("MLFLOW_TRACKING_URI") or _database(tracked.run.absolute() / "mlflow.db")
            self._client = MlflowClient(tracking_uri=store)
            experiment = self._client.get_experiment_by_name(tracked.project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(tracked.project)

        def new_run() -> str:
            tags = {"run": tracked.group, "stage": tracked.stage}
            run = self._client.create_run(number, run_name=tracked.name, tags=tags)
            settings = [Param(name, str(value)[:LONGEST_SETTING]) for name, value in flat(tracked.config).items()]
            for first in range(0, len(settings), MOST_SETTINGS):
                self._client.log_batch(run.info.run_id, params=settings[first : first + MOST_SETTINGS])
            return str(run.info.run_id)

        self._id = tracked.kept("mlflow", "run_id", new_run)
        try:
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException:  # removed, or of another store
            self._id = tracked.kept("mlflow", "run_id", new_run, anew=True)
        history = self._client.get_metric_history(self._id, "loss")
        self.last_step = max((metric.step for metric in history), default=0)

    def add(self, points: Sequence[Point]) -> None:
        """Store them; whole steps in a call."""
        from mlflow.entities import Metric

        waiting: list[Metric] = []
        for point in points:
            time = round(1000 * point.time)  # milliseconds
            metrics = [Metric(name, value, time, point.step) for name, value in point.values.items()]
            if waiting and len(waiting) + len(metrics) > MOST:
                self._client.log_batch(self._id, metrics=waiting)
                waiting = []
            waiting += metrics
        for first in range(0, len(waiting), MOST):
            self._client.log_batch(self._id, metrics=waiting[first : first + MOST])

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, STATUS[ending])


def _database(path: Path) -> str:
    """The store in a file, made beside if it is not there: MLflow refuses for ever one whose making was cut off."""
    from mlflow.tracking import MlflowClient

    if not path.exists():
        beside = path.with_name(".mlflow.db.making")
        beside.unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments()
        beside.rename(path)
    return f"sqlite:///{path}"
