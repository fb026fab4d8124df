"""What is predicted of a run, written down before its outcome: prediction.json in the folder of the seed model and,
where the recipe has changed since, in that of the finetuned one. Results and report show what stands there.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import UserError
from btx.files import read_json, write_json
from btx.planning.costs import dense_config, run_costs
from btx.planning.gain import Prediction, gain_notes, predict_gain
from btx.planning.models import cost_in_use
from btx.process import Log
from btx.run_folder.folder import RunFolder

FILE = "prediction.json"
STAGES = ("seed", "finetune")
"""Before whose training it is written."""


class Kept(TypedDict):
    """prediction.json."""

    of: dict[str, float]
    """What it depends on, but for bytes a token: those are known better when more data are prepared, and that alone
    makes no other prediction."""
    prediction: dict[str, Any] | None
    """`Prediction`; None where nobody said how many tokens the seed model has read."""


def keep_prediction(run: RunFolder, stage: str, log: Log) -> None:
    """Write what is predicted into the folder of a stage of `STAGES` whose training is about to begin, and say it,
    unless an earlier one holds it already. Whatever fails here is told, and the training goes on.
    """
    if stage not in STAGES:
        return
    try:
        of, prediction = _predict(run)
        if _kept_at(run, of) is None:
            write_json(run.folder(stage) / FILE, Kept(of=of, prediction=_fields(prediction)))
            for note in gain_notes(prediction):
                log(note)
    except (UserError, OSError) as error:
        log(f"warning: the gain over dense training is not predicted: {error}")


def prediction_of(run: RunFolder) -> dict[str, Any] | None:
    """What was predicted of a run as its recipe is now: the fields of `Prediction`, and `made_before`, the stage before
    whose training it was written; None where it is worked out only now. None in all where nobody says how much the seed
    model has read.
    """
    of, prediction = _predict(run)
    stage, told = _kept_at(run, of) or (None, _fields(prediction))
    return told and told | {"made_before": stage}


def _fields(prediction: Prediction | None) -> dict[str, Any] | None:
    return None if prediction is None else asdict(prediction)


def _kept_at(run: RunFolder, of: dict[str, float]) -> tuple[str, dict[str, Any] | None] | None:
    """The first stage whose folder holds a prediction of just this, and the prediction."""
    for stage in STAGES:
        kept = read_json(run.folder(stage) / FILE, Kept)
        if kept is not None and kept["of"] == of:
            return stage, kept["prediction"]
    return None


def _predict(run: RunFolder) -> tuple[dict[str, float], Prediction | None]:
    """What the prediction depends on, and the prediction."""
    recipe, dense = run.recipe, dense_config(run)
    mixture, costs = cost_in_use(recipe, dense, "btx"), run_costs(run, dense, None)
    prediction = predict_gain(run, dense, mixture, costs)
    of = {
        "seed_tokens": prediction.seed_tokens if prediction else 0.0,
        "parameters": cost_in_use(recipe, dense, "seed").total_params,
        "active_params": mixture.active_params,
        "experts": len(recipe.expert_names),
        "flops": costs.behind("finetune").flops,
        "sequence_length": recipe.data.sequence_length,
    }
    return of, prediction
