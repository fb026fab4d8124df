"""Models of the hub: whether a name can be one, asked once and answered in seconds; their files, fetched. No torch."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from btx.errors import CheckpointError, first_few
from btx.files import home_filled
from btx.hub_names import REPOSITORY, HubName, hub_name, is_hub_name
from btx.model_files.beside_weights import LEGAL, SETTINGS, TOKENIZER
from btx.system_errors import blame, first_line

TIMEOUT_S = 5.0
CARD = "README.md"
WANTED = (
    *SETTINGS, *TOKENIZER, *LEGAL, "*.safetensors", "*.safetensors.index.json", "adapter_config.json", CARD,
)  # fmt: skip
"""What is fetched of a model: nothing pickled, no code."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)")
AnyPath = TypeVar("AnyPath", bound=str | Path)


def local_model(path: AnyPath) -> AnyPath | Path:
    """A folder as it is, or the folder into which a model of the hub (`hf:ORG/NAME[@REVISION]`) is fetched.

    Its last part is the commit, so that whoever writes down the folder has pinned the revision.

    Raises:
        CheckpointError: no such model, not open to this user, pickled weights alone, no network and never fetched
            before, no space; with what to do.
    """
    if not is_hub_name(path):
        return path
    try:
        wanted = hub_name(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if problem := _why_not(*wanted):
        raise CheckpointError(f"{path}: cannot be had from the hub: {problem}")
    return fetch(wanted, str(path))


def folder_or_name(model: str | Path) -> str | Path:
    """What names a model: a folder here, a model of the hub that `hf:` fetches, or ORG/NAME as it is written."""
    folder = local_model(model)
    return Path(folder) if Path(folder).exists() else str(folder)


def fetch(model: HubName, where: str) -> Path:
    """Fetch a model's files, as far as they are not here; its folder in the hub's cache.

    Args:
        where: what asks for it, for messages.
    """
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        _check_files(model, where)
    try:
        return Path(snapshot_download(model.repository, revision=model.revision, allow_patterns=list(WANTED)))
    except Exception as error:  # the network's errors are of half a dozen libraries
        blame(error)
        raise CheckpointError(f"{where}: could not be fetched from the hub: {first_line(error)}; what has come stays, "
                              f"the same command goes on") from error  # fmt: skip


def model_card(model: str | Path, revision: str | None = None, *, may_fetch: bool = True) -> str:
    """Text of README.md of a folder, or of a model of the hub; empty if there is none, or it cannot be had.

    Args:
        model: folder, or ORG/NAME where no such folder is.
        may_fetch: ask the hub; else look into its cache alone.
    """
    import huggingface_hub

    card: str | Path = home_filled(model) / CARD
    if not home_filled(model).is_dir():
        try:
            card = huggingface_hub.hf_hub_download(
                str(model), CARD, revision=revision, local_files_only=not may_fetch, etag_timeout=TIMEOUT_S
            )
        except Exception:  # the network's errors are of half a dozen libraries, and a model may have no card
            return ""
    return Path(card).read_text("utf-8", errors="replace") if Path(card).is_file() else ""


def hub_origin(folder: Path) -> str | None:
    """`hf:ORG/NAME@COMMIT` of a folder that the hub's cache holds; None for any other."""
    matched = SNAPSHOT.search(os.path.realpath(folder))
    return f"hf:{matched[1]}/{matched[2]}@{matched[3]}" if matched else None


def shown_name(folder: str | Path) -> str:
    """What a model is called by itself: its name on the hub, or its folder's."""
    origin = hub_origin(Path(folder))
    return origin.partition("@")[0].rpartition("/")[2] if origin else Path(folder).resolve().name


def _check_files(model: HubName, where: str) -> None:
    """Refuse what could not be used, or has no space, before gigabytes of it have come."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        info = huggingface_hub.HfApi().model_info(model.repository, revision=model.revision, files_metadata=True)
    except Exception:  # the download says it
        return
    files: dict[str, Any] = {file.rfilename: file.size for file in info.siblings or ()}
    safe = {name: size or 0 for name, size in files.items() if name.endswith(".safetensors")}
    if not safe and (pickled := [name for name in files if name.endswith(PICKLED)]):
        raise CheckpointError(
            f"{where}: only pickled weights ({pickled[0]}), which can run code when read: nothing was fetched. "
            f"Look for a revision with .safetensors (hf:{model.repository}@REVISION), or convert them in an "
            f"environment you trust and give the folder"
        )
    cache_folder = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache_folder, *cache_folder.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(there).free, sum(safe.values())
    kept = cache_folder / f"models--{model.repository.replace('/', '--')}" / "snapshots" / str(info.sha)
    if needed > free and not kept.is_dir():
        raise CheckpointError(f"{where}: its weights have {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in "
                              f"{there}; free space, or let the hub's cache be elsewhere (HF_HUB_CACHE)")  # fmt: skip


def check_hub_name(path: str, *, revision: str | None = None, ask: bool = True) -> None:
    """Refuse what is neither a folder here nor a model of the hub; without a network, what was not downloaded before.

    Args:
        path: what the user has written; nothing of that name is here.
        ask: look whether the hub has it; otherwise only whether it can have.
    """
    if not REPOSITORY.fullmatch(path):
        raise CheckpointError(f"{path}: there is no such folder here (in {Path.cwd()}){_nearby(path)}; a model of the "
                              f"hub is named organisation/name")  # fmt: skip
    if ask and (problem := _why_not(path, revision)):
        raise CheckpointError(f"{path}: there is no such folder here (in {Path.cwd()}){_nearby(path)}, and as a hub "
                              f"name it cannot be had: {problem}")  # fmt: skip


def _nearby(path: str) -> str:
    """The models beside it, for one who has misspelt a folder's name."""
    parent = home_filled(path).parent
    try:
        folders = sorted(str(file.parent) for file in parent.glob("*/config.json"))
    except OSError:
        return ""
    return f"; models there: {first_few(folders, 5, ' ...')}" if folders else ""


@cache
def _why_not(name: str, revision: str | None) -> str:
    """Why a hub name cannot be had; empty if it can. Without a network everything downloaded before is used as it is,
    for the rest of the process: each file would be asked for six times otherwise."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    downloaded = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str)
    if constants.HF_HUB_OFFLINE:
        return "" if downloaded else "HF_HUB_OFFLINE is set, and it was not downloaded before"
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except errors.GatedRepoError:
        return f"its owner has to let you in: see https://huggingface.co/{name}, then `hf auth login`"
    except errors.RevisionNotFoundError:
        return f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        return "the hub has no such model, or it is private (`hf auth login`)"
    except Exception as error:  # the network's errors are of half a dozen libraries
        if not downloaded:
            return f"the hub cannot be reached ({first_line(error)})"
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that are started from here
        constants.HF_HUB_OFFLINE = True
    return ""
