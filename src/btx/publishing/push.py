"""Put a model on the Hugging Face hub: what goes up is chosen by name, what is said never holds a token."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from btx.errors import BtxError, SystemFailed, UserError
from btx.files import read_json
from btx.hub_names import REPOSITORY
from btx.model_files.beside_weights import LEGAL, SETTINGS, TOKENIZER, check_links, files_of
from btx.model_files.hub import CARD
from btx.model_files.model_folder import check_model_folder
from btx.process import Log
from btx.publishing.hub_card import Origin, card
from btx.system_errors import blame, first_line

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
REPORT = ("report.md", "*.png")
TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}")
PATHS = ("path", "paths", "source", "seed_model")
"""Keys of mix.json, at any depth, whose texts are paths, as are all below `paths`."""
LOADED_FROM = ("_name_or_path", "name_or_path")
"""Keys of config.json and tokenizer_config.json that say where a model was loaded from: a name, or a path."""
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


Upload = dict[str, Path | bytes]
"""What goes up: name on the hub → file here, or its bytes."""


def upload_of(folder: Path, origin: Origin, name: str, report: Path | None = None) -> Upload:
    """What `btx push` would put on the hub: weights, config, tokenizer, licence, card and report; nothing else that
    lies in the folder, and no path of this machine."""
    if not REPOSITORY.fullmatch(name):
        raise UserError(
            f"{name!r}: a model of the hub is named ORGANISATION/NAME (your own user name is an organisation too)"
        )
    check_model_folder(folder)
    check_links(folder, (*WEIGHTS, *SETTINGS, *TOKENIZER, *LEGAL, CARD))
    files: Upload = {
        file.relative_to(folder).as_posix(): file
        for file in files_of(folder, (*WEIGHTS, *SETTINGS, *TOKENIZER, *LEGAL))
    }
    if "mix.json" in files:
        files["mix.json"] = _without_paths(read_json(folder / "mix.json"))
    for name_of_file in {"config.json", "tokenizer_config.json"} & files.keys():
        value = read_json(folder / name_of_file)
        if local := {key: Path(value[key]).name for key in LOADED_FROM if str(value.get(key, "")).startswith("/")}:
            files[name_of_file] = _as_json(value | local)
    if report is not None and (report / "report.md").is_file():
        check_links(report, REPORT)
        files |= {file.name: file for file in files_of(report, REPORT)}
    files[CARD] = card(folder, origin, name, has_report="report.md" in files).encode()
    return files


def _without_paths(record: Any) -> bytes:
    """mix.json with folders' names in place of their paths."""

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: plain(it, key if key == "paths" else name) for name, it in value.items()}
        if isinstance(value, list):
            return [plain(each, key) for each in value]
        return Path(value).name if key in PATHS and isinstance(value, str) else value

    return _as_json(plain(record))


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def push(upload: Upload, name: str, *, public: bool = False, log: Log = lambda line: None) -> str:
    """Put files on the hub in one commit; what is there already is not sent again. The commit's address.

    Args:
        name: ORG/NAME; made if it is not there, private unless `public`. One that is there stays as visible as it is.

    Raises:
        UserError: no token, or one that may not; what the hub does not take.
        SystemFailed: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("btx push: HF_HUB_OFFLINE is set; unset it to reach the hub")
    if not get_token():
        raise UserError(
            "btx push: no token for the hub is here: `hf auth login` once, or HF_TOKEN in the environment; it needs "
            "the right to write (https://huggingface.co/settings/tokens)"
        )
    api = HfApi(library_name="btx")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        log(f"{name}: {'public' if public else 'private, if it is new'}; {len(upload)} files")
        operations = [CommitOperationAdd(path, str(it) if isinstance(it, Path) else it) for path, it in upload.items()]
        commit = api.create_commit(name, operations, commit_message="A model made with btx")
    except Exception as error:
        _tell(name, error)
    return redacted(str(commit.commit_url))


def redacted(text: str) -> str:
    """A text without anything that is, or looks like, a token."""
    from huggingface_hub import get_token

    secrets = {get_token(), *(os.environ.get(name) for name in VARIABLES)}
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return TOKEN.sub("***", text)


KEPT = "what has gone up is not sent again"
STATUS = {
    400: "the hub does not take it as it is",
    401: "the token is not valid: `hf auth login` again, or mend HF_TOKEN",
    402: "the account may store no more private files; make room, or pay for it",
    403: "the token may not write there: take one with the right to write (https://huggingface.co/settings/tokens), "
    "and a name whose organisation you belong to",
    404: "there is no such place, or the token may not see it: is the organisation's name right?",
    409: "somebody has changed it at the same time; run the same command again",
    413: "a file is too large for the hub; write smaller shards (btx mix --max-shard-size 5GB, or save_pretrained with "
    "max_shard_size)",
    429: "too many requests; wait some minutes and run the same command again",
}
"""What to do about the hub's answers."""


def _tell(name: str, error: Exception) -> NoReturn:
    """Raise what an error of the hub or of the network means, without tokens and without the error it came from: that
    holds the request."""
    blame(error)
    while error.__cause__ is not None and not hasattr(error, "response"):  # "Error while uploading ..."
        if not isinstance(error.__cause__, Exception):
            break
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = redacted(first_line(error))
    if status in STATUS:
        raise UserError(f"{name}: {STATUS[status]} (HTTP {status}: {said})") from None
    if status is not None:
        raise SystemFailed(
            f"{name}: the hub failed (HTTP {status}: {said}); run the same command again later: {KEPT}"
        ) from None
    if isinstance(error, OSError) or "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
        raise SystemFailed(f"{name}: the hub cannot be reached ({said}); run the same command again: {KEPT}") from None
    raise BtxError(f"{name}: could not be pushed: {type(error).__name__}: {said}") from None
