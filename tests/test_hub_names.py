"""hf:ORG/NAME wherever a folder is taken: every command, the recipe, Python; against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from huggingface_hub import constants

import btx
from btx.cli import main
from btx.errors import CheckpointError, RecipeError, UserError
from btx.hub_names import HubName, hub_name, is_hub_name
from btx.mixing.mix import mix
from btx.model_files import hub as hub_models
from btx.model_files.hub import hub_origin, local_model, shown_name
from btx.recipe.loading import parse_recipe
from tests.hub_fake import Hub, hub_here
from tests.pico_models import llama
from tests.pico_run import pico_recipe, run_here


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a seed model, two branches, what they mix into, and what nobody should fetch."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, hub_here(folder / "cache", patch) as hub:
        for number, name in enumerate(("seed", "math", "code")):
            made = llama(folder / name, number)
            (made / "training_args.bin").write_bytes(b"pickled")
            (made / "modeling_own.py").write_text("raise SystemExit")
            hub.put(f"org/{name}", made)
        mix(folder / "seed", {"math": folder / "math", "code": folder / "code"}, folder / "moe")
        hub.put("org/moe", folder / "moe")
        (folder / "old").mkdir()
        for name, text in {"config.json": '{"model_type": "llama"}', "pytorch_model.bin": "pickled"}.items():
            (folder / "old" / name).write_text(text)
        hub.put("org/old", folder / "old")
        yield hub


def test_names_of_the_hub_are_told_from_folders() -> None:
    assert hub_name("hf:org/name") == HubName("org/name", None)
    assert hub_name(Path("hf:org/name@refs/pr/1")) == HubName("org/name", "refs/pr/1")
    assert not is_hub_name("org/name")
    assert local_model(Path("models/mine")) == Path("models/mine")
    assert local_model("org/name") == "org/name"


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:a/b/c", "hf:org/name@", "hf:../x", "hf:org/name@a b", "hf:/x/y"]
)
def test_what_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"is written hf:ORGANISATION/NAME, or hf:ORGANISATION/NAME@REVISION"):
        local_model(text)


def test_a_model_is_fetched_without_code_or_pickles_and_its_folder_names_the_commit(hub: Hub) -> None:
    folder = Path(local_model("hf:org/seed"))
    sha = hub.repositories["org/seed"].commits[-1][0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".py")]
    assert hub_origin(folder) == f"hf:org/seed@{sha}"
    assert shown_name(folder) == "seed"
    assert hub_origin(folder.parent) is None


def test_a_revision_is_that_one(hub: Hub) -> None:
    repository = hub.repositories["org/seed"]
    first = repository.commits[-1][0]
    repository.tags["v1"] = first
    config = json.loads(repository.commits[-1][1]["config.json"])
    repository.commit({"config.json": json.dumps(config | {"later": True}).encode()})
    for revision in ("v1", first):
        assert "later" not in json.loads((Path(local_model(f"hf:org/seed@{revision}")) / "config.json").read_text())
    assert "later" in json.loads((Path(local_model("hf:org/seed")) / "config.json").read_text())
    del repository.commits[1:]
    with pytest.raises(CheckpointError, match=r"hf:org/seed@v9: cannot be had from the hub: it has no revision 'v9'"):
        local_model("hf:org/seed@v9")


def test_what_cannot_be_had_is_refused_with_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"hf:org/none: .* no such model, or it is private \(`hf auth login`\)"):
        local_model("hf:org/none")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).* nothing was fetched"):
        local_model("hf:org/old")
    assert not hub.asked_for("/org/old/resolve")
    monkeypatch.setattr(hub_models.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match=r"hf:org/code: its weights have .* GB are free .*HF_HUB_CACHE"):
        local_model("hf:org/code")


def test_without_a_network_what_came_before_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_model("hf:org/math")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_models._why_not.cache_clear()
    asked = len(hub.asked)
    assert local_model("hf:org/math") == folder
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and it was not downloaded before"):
        local_model("hf:org/never")
    assert len(hub.asked) == asked
    hub_models._why_not.cache_clear()


# Commands

MIX = [
    "mix",
    "--seed-model",
    "hf:org/seed",
    "--expert",
    "math=hf:org/math",
    "--expert",
    "code=hf:org/code",
    "-o",
    "out",
]


def invoke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, output and messages of a command."""
    monkeypatch.setattr("sys.argv", ["btx", *arguments])
    capsys.readouterr()
    code: Any = 0
    try:
        main.main()
    except SystemExit as ended:
        code = ended.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (MIX, "out: 3 experts"),
        (["mix", "--seed-model", "hf:org/seed", "--copies", "2", "-o", "out"], "out: 2 experts"),
        ([*MIX, "--tokenizer-from", "hf:org/math"], "out: 3 experts"),
        (["extend", "hf:org/moe", "--expert", "law=hf:org/math", "-o", "out"], "math, code, generalist, law"),
        (["drop", "hf:org/moe", "--expert", "math", "-o", "out"], "2 experts: code, generalist"),
        (["chat", "hf:org/moe", "--prompt", "the sum of", "--max-new-tokens", "2"], ""),
        (["chat", "hf:org/seed", "--prompt", "hf:org/none", "--max-new-tokens", "1"], ""),
        (["analyze", "hf:org/moe", "--text", "a=a.jsonl", "-o", "out", "--tokens", "64"], "report: out"),
        (["export", "hf:org/moe", "--to", "gguf", "--dry-run"], "moe.gguf"),
        (["push", "hf:org/moe", "me/copy", "--dry-run"], "model.safetensors"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_command_that_takes_a_model_takes_one_of_the_hub(
    hub: Hub, command: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the sum of {n} and four"}) for n in range(40)))
    monkeypatch.chdir(tmp_path)
    code, output, messages = invoke(monkeypatch, capsys, *command)
    assert (code, expected in output) == (0, True), output + messages


def test_python_takes_a_revision_of_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the sum of {n} and four"}) for n in range(40)))
    sha = hub.repositories["org/moe"].commits[-1][0]
    analysis = btx.analyze(f"hf:org/moe@{sha}", {"a": "a.jsonl"}, "out", tokens=64, examples=1)
    assert list(analysis.experts) == ["math", "code", "generalist"]


def test_every_path_of_every_command_is_looked_at(
    hub: Hub,
) -> None:
    """Whatever a command calls it: a model that the hub has not is refused as such, and nothing is written there."""
    seen = 0
    for command in main.app.registered_commands:
        assert command.callback is not None
        hints = get_type_hints(command.callback)
        for name in [name for name, hint in hints.items() if Path in (hint, *get_args(hint))]:
            with pytest.raises(UserError, match=r"hf:org/none: (cannot be had from the hub|what is written goes into)"):
                command.callback(**dict.fromkeys(hints) | {name: Path("hf:org/none")})
            seen += 1
    assert seen > 20


def test_the_record_says_which_commit_it_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(monkeypatch, capsys, *MIX)[0] == 0
    record = json.loads((tmp_path / "out" / "mix.json").read_text())
    sha = hub.repositories["org/math"].commits[-1][0]
    assert record["inputs"]["math"]["hub"] == f"hf:org/math@{sha}"
    assert f"hf:org/math@{sha}".replace("@", "\\@") in (tmp_path / "out" / "README.md").read_text()


# The recipe

RECIPE = """\
data: {domains: {law: {generate: math}, general: {generate: general}}}
train: {domains: [law], tokens: 100_000}
finetune: {tokens: 100_000}
"""


def test_the_seed_model_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seed = parse_recipe(f"seed_model: {{path: 'hf:org/seed@v1'}}\n{RECIPE}", "my.yaml").seed_model
    assert (seed.path, seed.revision) == ("org/seed", "v1")
    plain = parse_recipe(f"seed_model: {{path: 'hf:org/seed'}}\n{RECIPE}", "my.yaml").seed_model
    assert (plain.path, plain.revision) == ("org/seed", None)
    with pytest.raises(RecipeError, match="is written hf:ORGANISATION/NAME"):
        parse_recipe(f"seed_model: {{path: 'hf:seed'}}\n{RECIPE}", "my.yaml")
    with pytest.raises(RecipeError, match="name two revisions"):
        parse_recipe(f"seed_model: {{path: 'hf:org/seed@v1', revision: v2}}\n{RECIPE}", "my.yaml")
    (tmp_path / "org" / "seed").mkdir(parents=True)
    with pytest.raises(RecipeError, match="there is a folder org/seed here"):
        parse_recipe(f"seed_model: {{path: 'hf:org/seed'}}\n{RECIPE}", "my.yaml")


def test_a_run_links_the_commit_and_adopts_from_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(
        tmp_path, "run", "seed_model={path: 'hf:org/seed'}", "train.domains=[birds, tools]", "finetune.tokens=2560"
    )
    run, _ = run_here(recipe, ["data/tokenizer", "data/birds", "data/tools", "data/general", "seed"])
    sha = hub.repositories["org/seed"].commits[-1][0]
    assert run.model("seed").resolve().name == sha
    code, output, messages = invoke(monkeypatch, capsys, "adopt", str(run.path), "birds", "hf:org/math")
    assert code == 0, output + messages
    assert (run.model("train/birds") / "model.safetensors").is_file()
