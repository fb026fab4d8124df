"""btx push: what goes up and what never does, who sees it, again, refusals, no token; against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from btx.cli import out
from btx.errors import BtxError, CheckpointError, RunFolderError, SystemFailed, UserError
from btx.mixing.mix import mix
from btx.publishing.hub_card import card, licence_of, origin_of_folder, origin_of_run
from btx.publishing.push import push, redacted, upload_of
from btx.recipe.training import SeedModel
from btx.run_folder.folder import RunFolder
from tests.hub_fake import Hub, hub_here
from tests.pico_models import llama, mixtral
from tests.pico_run import as_finished, pico_recipe

# huggingface_hub gives the body of a large file to httpx under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with hub_here(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with what belongs on the hub and what does not."""
    folder = mixtral(tmp_path_factory.mktemp("push") / "moe")
    (folder / "mix.json").write_text(json.dumps({
        "experts": ["math", "generalist"],
        "inputs": {"seed_model": {"path": "/home/me/seed", "hub": "hf:org/seed@abc"},
                   "math": {"path": "/home/me/math"}},
    }))  # fmt: skip
    for name in ("training_args.bin", "data.jsonl", "own.py", ".env"):
        (folder / name).write_text("mine")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.safetensors").write_text("mine")
    (folder / "LICENSE").write_text("Do good.")
    return folder


@pytest.fixture
def run(tmp_path: Path, made: Path) -> RunFolder:
    """A run that has finished: a seed model with a licence, a result, a report."""
    run = RunFolder.create(pico_recipe(tmp_path))
    shutil.copytree(made, run.path / "finetune" / "model")
    (run.path / "finetune" / "model" / "LICENSE").unlink()
    seed = llama(run.path / "seed" / "model")
    (seed / "README.md").write_text("---\nlicense: llama3.2\n---\n# Seed")
    (run.path / "evaluate").mkdir()
    (run.path / "evaluate" / "results.json").write_text(json.dumps({"models": {
        name: {"domains": {"birds": {"bits_per_byte": bits}}, "tasks": {}, "mean_bits_per_byte": bits}
        for name, bits in (("seed", 2.5), ("btx", 2.125))
    }}))  # fmt: skip
    (run.path / "report").mkdir()
    (run.path / "report" / "report.md").write_text("# Report")
    (run.path / "report" / "routing.png").write_bytes(b"png")
    (run.path / "report" / "index.html").write_text("<html>")
    as_finished(run, "finetune", "evaluate")
    return run


def front(text: str) -> dict[str, object]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_weights_config_tokenizer_licence_and_card_go_up_privately_and_nothing_else(hub: Hub, made: Path) -> None:
    url = push(upload_of(made, origin_of_folder(made), "org/moe"), "org/moe")
    assert url.startswith(f"{hub.endpoint}/org/moe/commit/")
    assert hub.repositories["org/moe"].private
    files = hub.files("org/moe")
    assert {*files} - {".gitattributes"} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "mix.json", "LICENSE", "README.md",
    }  # fmt: skip
    assert files["model.safetensors"] == (made / "model.safetensors").read_bytes()
    assert b"/home/me" not in b"".join(files.values())
    assert json.loads(files["mix.json"])["inputs"]["math"]["path"] == "math"


def test_public_is_asked_for(hub: Hub, made: Path) -> None:
    push(upload_of(made, origin_of_folder(made), "org/open"), "org/open", public=True)
    assert not hub.repositories["org/open"].private


def test_pushed_again_nothing_is_sent_and_a_change_alone_is(hub: Hub, made: Path, tmp_path: Path) -> None:
    upload = upload_of(made, origin_of_folder(made), "org/moe")
    first = push(upload, "org/moe")
    hub.asked.clear()
    assert push(upload_of(made, origin_of_folder(made), "org/moe"), "org/moe") == first
    assert not hub.asked_for("/commit/")
    assert not hub.asked_for("/large/")
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    (folder / "LICENSE").write_text("Do better.")
    push(upload_of(folder, origin_of_folder(folder), "org/moe"), "org/moe")
    assert len(hub.asked_for("/commit/")) == 1
    assert not hub.asked_for("/large/")


def test_after_an_upload_that_broke_off_what_had_gone_up_is_not_sent_again(hub: Hub, made: Path) -> None:
    hub.refuse["/commit/"] = 500
    upload = upload_of(made, origin_of_folder(made), "org/moe")
    with pytest.raises(SystemFailed, match=r"the hub failed \(HTTP 500"):
        push(upload, "org/moe")
    assert len(hub.asked_for("PUT /large/")) == 1
    del hub.refuse["/commit/"]
    push(upload_of(made, origin_of_folder(made), "org/moe"), "org/moe")
    assert len(hub.asked_for("PUT /large/")) == 1
    assert "model.safetensors" in hub.files("org/moe")


@pytest.mark.parametrize(
    ("part", "status", "kind", "told"),
    [
        ("repos/create", 401, UserError, "the token is not valid"),
        ("repos/create", 403, UserError, "the token may not write there"),
        ("repos/create", 404, UserError, "is the organisation's name right"),
        ("/commit/", 409, UserError, "somebody has changed it at the same time; run the same command again"),
        ("/commit/", 413, UserError, "write smaller shards"),
        ("/commit/", 429, UserError, "too many requests"),
        ("/preupload/", 403, UserError, "the token may not write there"),
        ("/commit/", 502, SystemFailed, "run the same command again later"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do_and_without_the_token(
    hub: Hub, made: Path, part: str, status: int, kind: type[BtxError], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuse[part] = status
    if status in (401, 403):
        hub.refuse["/api/models/org/moe"] = status
    lines: list[str] = []
    with pytest.raises(kind, match=told) as caught:
        push(upload_of(made, origin_of_folder(made), "org/moe"), "org/moe", log=lines.append)
    assert f"Bearer {SECRET}" in hub.tokens
    assert caught.value.__suppress_context__
    assert SECRET not in "".join([str(caught.value), *lines, caplog.text])


def test_without_a_network(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = upload_of(made, origin_of_folder(made), "org/moe")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemFailed, match="org/moe: the hub cannot be reached"):
        push(upload, "org/moe")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(upload, "org/moe")


def test_without_a_token_how_to_get_one_is_told(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match=r"no token for the hub is here: `hf auth login`"):
        push(upload_of(made, origin_of_folder(made), "org/moe"), "org/moe")
    assert hub.asked == []


def test_what_looks_like_a_token_or_is_one_is_crossed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainword")
    assert redacted(f"sent plainword and {SECRET} to hf_hub") == "sent *** and *** to hf_hub"


@pytest.mark.parametrize("name", ["moe", "a/b/c", "org/", "org/na me", "../x"])
def test_a_name_that_is_none_is_refused(made: Path, name: str) -> None:
    with pytest.raises(UserError, match="is named ORGANISATION/NAME"):
        upload_of(made, origin_of_folder(made), name)


def test_links_that_lead_out_of_the_folder_are_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="lies outside the model's folder"):
        upload_of(folder, origin_of_folder(folder), "org/moe")


@pytest.mark.parametrize("name", ["README.md", "report.md", "chart.png"])
def test_a_card_or_report_that_is_a_link_to_somebodys_file_is_refused(made: Path, tmp_path: Path, name: str) -> None:
    folder, report, secret = tmp_path / "m", tmp_path / "report", tmp_path / "secret"
    shutil.copytree(made, folder)
    report.mkdir()
    (report / "report.md").write_text("# Report\n")
    secret.write_text("mine")
    file = (folder if name == "README.md" else report) / name
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name}: a link to .*secret, which lies outside"):
        upload_of(folder, origin_of_folder(folder), "org/moe", report)


# The card


def test_the_card_of_a_run_has_results_data_licence_and_report(run: RunFolder) -> None:
    upload = upload_of(run.path / "finetune" / "model", origin_of_run(run), "org/moe", run.path / "report")
    text = upload["README.md"]
    assert isinstance(text, bytes)
    told = text.decode()
    assert front(told)["license"] == "llama3.2"
    assert front(told)["library_name"] == "transformers"
    assert "| model | birds | mean |" in told
    assert "| btx | **2.125** |" in told
    assert "| birds | files birds.jsonl |" in told
    assert "The seed model's: llama3.2" in told
    assert "[report.md](report.md)" in told
    assert {"report.md", "routing.png"} <= upload.keys()
    assert "index.html" not in upload
    assert str(run.path.parent) not in told


def test_only_what_can_be_a_name_of_the_hub_is_a_base_model(run: RunFolder) -> None:
    for path, base_models in (("org/seed", ("org/seed",)), ("/home/me/seed", ())):
        seed = SeedModel(path=path)
        assert origin_of_run(replace(run, recipe=run.recipe.model_copy(update={"seed_model": seed}))).base_models == (
            base_models
        )


def test_results_that_the_recipe_no_longer_means_stay_here(
    hub: Hub, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run.path / "recipe.yaml").read_text("utf-8")
    (run.path / "recipe.yaml").write_text(text.replace("questions: 6", "questions: 5"), "utf-8")
    out.push(run.path, "org/moe", dry_run=True)
    told = capsys.readouterr()
    assert "warning: evaluate is stale: the card has no results" in told.err
    assert "report.md" not in told.out
    assert "2.125" not in card(run.path / "finetune" / "model", origin_of_run(RunFolder.open(run.path)), "org/moe",
                               has_report=False)  # fmt: skip


def test_what_is_not_known_is_said(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    (folder / "LICENSE").unlink()
    (folder / "mix.json").unlink()
    told = card(folder, origin_of_folder(folder), "org/moe", has_report=False)
    assert front(told)["license"] == "unknown"
    assert "Unknown: neither the seed model's card nor a file beside it says its licence" in told
    assert "base_model" not in front(told)


def test_the_base_model_is_named_as_on_the_hub_and_a_card_keeps_its_text(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words\n")
    told = card(folder, origin_of_folder(folder), "org/moe", has_report=False)
    assert front(told)["base_model"] == ["org/seed"]
    assert front(told)["license"] == "mit"
    assert "# My own words" in told
    assert licence_of(made) == "other"


def test_the_licence_of_a_mixed_folder_without_one_is_its_seed_models(tmp_path: Path) -> None:
    mix(llama(tmp_path / "seed"), {"math": llama(tmp_path / "math", 1)}, tmp_path / "moe")
    assert origin_of_folder(tmp_path / "moe").licence is None
    (tmp_path / "seed" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert origin_of_folder(tmp_path / "moe").licence == "apache-2.0"


def test_no_path_of_a_mix_goes_up(tmp_path: Path) -> None:
    mix(llama(tmp_path / "seed"), {"math": llama(tmp_path / "math", 1)}, tmp_path / "moe")
    upload = upload_of(tmp_path / "moe", origin_of_folder(tmp_path / "moe"), "org/moe")
    record = upload["mix.json"]
    assert isinstance(record, bytes)
    assert str(tmp_path) not in record.decode()
    assert json.loads(record)["paths"] == {"math": "math"}
    assert str(tmp_path) in (tmp_path / "moe" / "mix.json").read_text("utf-8")


def test_where_a_model_was_loaded_from_goes_up_as_a_name(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        for said, sent in ((f"{tmp_path}/mine", "mine"), ("org/seed", "org/seed")):
            value = json.loads((folder / file).read_text("utf-8")) | {key: said}
            (folder / file).write_text(json.dumps(value), "utf-8")
            it = upload_of(folder, origin_of_folder(folder), "org/moe")[file]
            assert json.loads(it if isinstance(it, bytes) else it.read_text("utf-8")) == value | {key: sent}


@pytest.mark.parametrize(("card_text", "licence"), [
    ("\ufeff---\nlicense: mit\n---\n# Words\n", "mit"), ("---\r\nlicense: mit\r\n---\r\n# Words\r\n", "mit"),
    ("---\nlicense: " + "[" * 20_000 + "\n---\n# Words\n", "other"),
])  # fmt: skip
def test_odd_cards_are_read_or_passed_over(made: Path, tmp_path: Path, card_text: str, licence: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    (folder / "README.md").write_bytes(card_text.encode())
    told = card(folder, origin_of_folder(folder), "org/moe", has_report=False)
    assert front(told)["license"] == licence
    assert told.count("license") == 1
    assert "# Words" in told


@pytest.mark.parametrize("record", [[1], {"inputs": []}, {"inputs": {"seed_model": "x"}}, {"experts": 3}])
def test_a_mix_json_of_another_shape_is_refused(made: Path, tmp_path: Path, record: Any) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    (folder / "mix.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=r"mix\.json: "):
        origin_of_folder(folder)


# The command


def test_a_dry_run_lists_what_would_go_up_and_asks_nothing(
    hub: Hub, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out.push(run.path, "org/moe", dry_run=True)
    told = capsys.readouterr().out
    for name in ("model.safetensors", "README.md", "report.md"):
        assert name in told
    assert "would go to org/moe (private); none were" in told
    assert hub.asked == []
    out.push(run.path, "org/moe", as_json=True)
    assert json.loads(capsys.readouterr().out)["commit"].startswith(hub.endpoint)


def test_a_run_without_a_model_says_so(tmp_path: Path) -> None:
    run = RunFolder.create(pico_recipe(tmp_path))
    with pytest.raises(UserError, match="no mixed model of this run is finished yet"):
        out.push(run.path, "org/moe", dry_run=True)
