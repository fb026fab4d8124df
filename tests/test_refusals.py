"""What needs no model is refused before torch and transformers are imported: in a moment, not in some seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from btx.recipe.loading import dump_recipe
from tests.pico_run import pico_recipe, write_pico_recipe

HEAVY = ("torch", "transformers", "pandas", "sklearn", "lm_eval", "datasets")
PROGRAM = f"""
import contextlib, io, json, sys
from btx.cli.main import main

seen = set()
for arguments in json.load(sys.stdin):
    sys.argv, code, errors = ["btx", *arguments], 0, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            code = end.code
    loaded = {{name for name in {HEAVY} if name in sys.modules}} - seen
    seen |= loaded
    print(json.dumps([code, errors.getvalue(), sorted(loaded)]), flush=True)
"""
"""Runs command after command; prints exit code, messages and the heavy modules that were imported."""
HERE = ["pico.yaml", "data.root=."]
FROM_A_FOLDER = ["seed_model.config=null", "seed_model.train=null"]
RECIPES = [
    (["no-such.yaml"], "no recipe, file or run folder 'no-such.yaml'"),
    (["broken.yaml"], "broken.yaml:"),
    ([*HERE, "train.lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
    ([*HERE, "mix.top_k=9"], "mix.top_k is 9, but there are only 3 experts"),
    (["pico.yaml", "data.root=elsewhere"], "elsewhere/birds.jsonl: no such file or folder"),
    ([*HERE, *FROM_A_FOLDER, "seed_model.path=./no-such"], "./no-such: there is no such folder"),
    ([*HERE, *FROM_A_FOLDER, "seed_model.path=notes"], "notes: this folder holds no model: config.json is missing"),
    ([*HERE, *FROM_A_FOLDER, "seed_model.path=gpt"], "families: "),
    ([*HERE, "run=quiz.jsonl/run"], "quiz.jsonl is a file"),
    ([*HERE, "evaluate.tasks.quiz.path=half.jsonl"], "half.jsonl:2: 'prompt' is not valid Unicode"),
    ([*HERE, "data.sequence_length=65"], "the seed model reads 64 tokens at once"),
    (["long.yaml"], "long.yaml:1:19999: cannot be read: more than 10,000 keys and values"),
]
RUNS = [["status"], ["prepare"], ["mix"], ["finetune"], ["baselines"], ["evaluate"], ["analyze"], ["compare"],
        ["report"]]  # fmt: skip
COMMANDS = [
    *(([command, *arguments], expected) for command in ("plan", "run", "sweep") for arguments, expected in RECIPES),
    *(([*command, "no-such"], "no-such") for command in RUNS),
    (["train", "no-such", "birds"], "no-such: this is no run folder"),
    (["adopt", "no-such", "birds", "gpt"], "no-such: this is no run folder"),
    (["mix", "--seed-model", "no-such", "--expert", "a=notes", "-o", "out"], "no-such: there is no such folder"),
    (["extend", "no-such", "--expert", "a=notes", "-o", "out"], "no-such: there is no such folder"),
    (["drop", "no-such", "--expert", "a", "-o", "out"], "no-such: there is no such folder"),
    (["train", "begun", "bird"], "the recipe has no stage 'train/bird'"),
    (["train", "begun", "law"], "no stage 'train/law'"),
    (["finetune", "begun"], "finetune needs data/birds, which is absent"),
    (["evaluate", "begun"], "evaluate needs data/birds, which is absent"),
    (["analyze", "begun", "--json"], "analyze needs data/birds, which is absent"),
    (["baselines", "begun", "dense"], "the recipe has no baseline 'dense'"),
    (["compare", "begun"], "there are no scores of single documents"),
    (["run", *HERE, "--until", "dinner"], "no stage 'dinner'"),
    (["sweep", *HERE, "train.tokens=1e6,1000000"], "the same variant twice"),
    (["sweep", *HERE, "--share", "notes"], "notes: no run folder and no sweep's folder"),
    (["chat", "no-such", "--prompt", "x"], "no-such: there is no such folder"),
    (["chat", "begun", "--prompt", "x", "--json"], "begun: no mixed model of this run is finished yet"),
    (["chat", "notes"], "notes: this folder holds no model"),
    (["chat", "notes", "--temperature", "-1"], "temperature is -1.0"),
    (["chat", "notes", "--json"], "needs --prompt TEXT"),
    (["chat", "notes", "--prompt", "\udcff"], "the prompt is no valid text: its character 1 is"),
    (["evaluate", "notes", "--task", "gsm8k", "--file", "quiz.jsonl"], "notes: this folder holds no model"),
    (["evaluate", "../no-such", "--task", "gsm8k"], "../no-such: there is no such folder"),
    (["evaluate", "gpt"], "gpt is a model, not a run"),
    (["mix", "--seed-model", "gpt", "-o", "out"], "btx mix needs a run folder"),
    *(
        (command, "lora: an adapter (LORA, adapter_config.json) of org/base")
        for command in (
            ["mix", "--seed-model", "gpt", "--expert", "a=lora", "-o", "out"],
            ["extend", "lora", "--expert", "a=gpt", "-o", "o"],
            ["extend", "gpt", "--expert", "a=lora", "-o", "out"],
            ["drop", "lora", "--expert", "a", "-o", "out"],
            ["adopt", "begun", "birds", "lora"],
            ["chat", "lora"],
            ["evaluate", "lora", "--task", "gsm8k", "--file", "quiz.jsonl"],
            ["plan", *HERE, *FROM_A_FOLDER, "seed_model.path=lora"],
        )
    ),
    (["ls", "nothing"], "nothing to list"),
    (["cp", "dmo", "x.yaml"], "no packaged recipe 'dmo'"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, a broken recipe, a folder of notes, a GPT-2 and a run that has just begun."""
    folder = tmp_path_factory.mktemp("refusals")
    write_pico_recipe(folder)
    (folder / "broken.yaml").write_text("data: [", "utf-8")
    (folder / "long.yaml").write_text("a: [" + "1," * 400_000 + "1]", "utf-8")
    lines = [{"prompt": "a", "answer": "b"}, {"prompt": "\ud83d", "answer": "b"}]
    (folder / "half.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for name in ("notes", "gpt", "begun", "lora"):
        (folder / name).mkdir()
    (folder / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}), "utf-8")
    (folder / "gpt" / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(adapter), "utf-8")
    (folder / "begun" / "recipe.yaml").write_text(dump_recipe(pico_recipe(folder, "begun")), "utf-8")
    return folder


@pytest.fixture(scope="module")
def refused(place: Path) -> dict[str, list[Any]]:
    """Command → exit code, messages, heavy imports; all in one process, which takes a second."""
    commands = [arguments for arguments, _ in COMMANDS]
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(commands), capture_output=True, text=True,
                          cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {" ".join(arguments): result for arguments, result in zip(commands, results, strict=True)}


@pytest.mark.parametrize(("command", "expected"), [(" ".join(arguments), expected) for arguments, expected in COMMANDS])
def test_what_needs_no_model_is_refused_without_torch(
    refused: dict[str, list[Any]], command: str, expected: str
) -> None:
    code, messages, loaded = refused[command]
    assert code == 2, messages
    assert expected in messages
    assert loaded == []
