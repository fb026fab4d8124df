"""Where a run's numbers can go besides metrics.jsonl: the names behind `track`. No torch.

What writes to each is in `btx.training.trackers`, a file of the same name. Each is a package that is installed as the
extra of its name, `pip install "branchtrainmix[NAME]"`, and imported as NAME.
"""

TRACKERS: dict[str, str] = {
    "tensorboard": "event files in the stages' folders; look at them with tensorboard --logdir RUN",
    "wandb": "Weights & Biases; offline, in the stages' folders, unless there is a key or a login",
    "trackio": "a trackio project in RUN/trackio, unless its variables name a place",
    "mlflow": "an MLflow experiment in RUN/mlflow.db, unless MLFLOW_TRACKING_URI names a store",
}
"""Name → one line for `btx ls trackers`."""
