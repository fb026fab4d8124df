"""Whether a name that is no folder here can be a model of the hub: asked once, and answered in seconds. No torch."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from btx.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
TIMEOUT_S = 5.0


def check_hub_name(path: str, *, revision: str | None = None, ask: bool = True) -> None:
    """Refuse what is neither a folder here nor a model of the hub; without a network, what was not downloaded before.

    Args:
        path: what the user has written; nothing of that name is here.
        revision: git revision of a hub name.
        ask: look whether the hub has it; otherwise only whether it can have.

    Raises:
        CheckpointError: with what to do.
    """
    if not HUB_NAME.fullmatch(path):
        raise CheckpointError(f"{path}: there is no such folder here (in {Path.cwd()}){_nearby(path)}; a model of the "
                              f"hub is named organisation/name")  # fmt: skip
    if ask and (problem := _why_not(path, revision)):
        raise CheckpointError(f"{path}: there is no such folder here (in {Path.cwd()}){_nearby(path)}, and as a hub "
                              f"name it cannot be had: {problem}")  # fmt: skip


def _nearby(path: str) -> str:
    """The models beside it, for one who has misspelt a folder's name."""
    parent = Path(path).expanduser().parent
    try:
        found = sorted(str(file.parent) for file in parent.glob("*/config.json"))
    except OSError:
        return ""
    return f"; models there: {', '.join(found[:5])}{' ...' * (len(found) > 5)}" if found else ""


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
            return f"the hub cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that are started from here
        constants.HF_HUB_OFFLINE = True
    return ""
