"""A whole run small enough for tests: a recipe over local files, and its stages run in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from btx.files import write_sealed
from btx.outputs import STARTED, finish
from btx.process import Interrupted, Interrupts
from btx.recipe.loading import load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.stage_notes import done_json, started_json
from btx.run_folder.stages_of_recipe import build_graph
from btx.stages.work import run_stages

WORDS = {
    "birds": "heron finch owl wren kite crow swift robin nests sings flies hunts over under near the a".split(),
    "tools": "hammer saw drill lathe plane file chisel clamp cuts bores turns holds with from into the a".split(),
    "general": "people time year way day thing man world life hand part child and of to in is that it".split(),
}

FEW = {"btx.evaluation.shown.NEW_TOKENS": 4, "btx.evaluation.analyze.DOCUMENTS": 6}
"""What a run here shows less of, for the time it takes: tokens of an answer, texts that change domain."""

TRAINING = {"batch_tokens": 256, "micro_batch_tokens": 128, "warmup_steps": 2, "checkpoint_every": 3}

RECIPE = {
    "paper": True,  # all weights train, so that merging has something to do
    "rng_seed": 3,
    "device": "cpu",
    "data": {
        "sequence_length": 32,
        "domains": {"birds": "birds.jsonl", "tools": "tools.jsonl", "general": "general.jsonl"},
    },
    "seed_model": {
        "config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                   "attention_dropout": 0.1},
        "tokenizer": {"vocab_size": 320, "train_bytes": 50_000},
        "train": {"tokens": 256 * 10, "learning_rate": 3e-3, **TRAINING},
    },
    "train": {"domains": ["birds", "tools"], "tokens": 256 * 8, "learning_rate": 2e-3, **TRAINING},
    "finetune": {"tokens": 256 * 7, "learning_rate": 1e-3, **TRAINING},
    "evaluate": {"tokens": 500, "tasks": {"quiz": {"path": "quiz.jsonl", "questions": 6, "max_new_tokens": 4}}},
    "analyze": {"tokens": 300, "examples": 1},
}  # fmt: skip


def write_pico_recipe(folder: Path) -> Path:
    """The recipe file, its data beside it."""
    for domain, words in WORDS.items():
        lines = [
            json.dumps({"text": " ".join(words[(i * i + i * k + k * k) % len(words)] for k in range(40)) + f" {i}"})
            for i in range(240)
        ]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    quiz = [json.dumps({"prompt": f"the {word}", "answer": "sings"}) for word in WORDS["birds"][:6]]
    (folder / "quiz.jsonl").write_text("\n".join(quiz) + "\n", "utf-8")
    path = folder / "pico.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False), "utf-8")
    return path


def pico_recipe(folder: Path, run: str = "run", *overrides: str) -> Recipe:
    """The recipe, with its run folder in `folder`."""
    path = folder / "pico.yaml"
    if not path.exists():
        write_pico_recipe(folder)
    return load_recipe(str(path), [f"data.root={folder}", f"run={folder / run}", *overrides])


def run_here(recipe: Recipe, stages: Sequence[str] | None = None) -> tuple[RunFolder, list[str]]:
    """Run stages in this process, without the pipeline; returns what they logged."""
    run, lines = RunFolder.create(recipe), []
    with pytest.MonkeyPatch.context() as patch:
        for name, few in FEW.items():
            patch.setattr(name, few)
        run_stages(run, stages or [stage.name for stage in run.graph], Interrupts(), lines.append)
    return run, lines


def finished_here(recipe: Recipe) -> RunFolder:
    """A finished run; of its report, which takes as long as all else, there is an empty page."""
    run, _ = run_here(recipe, [stage.name for stage in build_graph(recipe) if stage.name != "report"])
    as_finished(run, "report")
    (run.folder("report") / "index.html").touch()
    return run


def as_finished(run: RunFolder, *stages: str) -> None:
    """Note stages as finished, whose files a test has put there or does not need."""
    for stage in map(run.graph.__getitem__, stages):
        run.model(stage.name).mkdir(parents=True, exist_ok=True)
        write_sealed(run.folder(stage.name) / STARTED, started_json(stage))
        finish(run.folder(stage.name), done_json(stage, {}))


class StopAfter(Interrupts):
    """Ends training after a step, wherever the last checkpoint is: what `kill -9` leaves, in this process."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def raise_if_pending(self, message: str) -> None:
        """Called after every step."""
        self.left -= 1
        if self.left == 0:
            raise Interrupted(message, 9)


def stopped_after(run: RunFolder, stage: str, step: int) -> None:
    """Train a stage up to a step and no further."""
    with contextlib.suppress(Interrupted):
        run_stages(run, [stage], StopAfter(step), lambda line: None)


if __name__ == "__main__":  # python -m tests.pico_run FOLDER: a finished run to look at, with every file of the report
    import sys

    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    more = ["baselines=[soup,dense_dm,btx_no_balancing]", "evaluate.mixed=12", "analyze.examples=2",
            "analyze.tokens=3000", f"seed_model.train.tokens={256 * 200}", f"train.tokens={256 * 150}",
            f"finetune.tokens={256 * 100}"]  # fmt: skip
    run_here(pico_recipe(where, "run", *more))
