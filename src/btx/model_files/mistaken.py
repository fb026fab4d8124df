"""What is given for a model folder by mistake, told by what it holds: what it is, and what to do. Plain Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from btx.errors import first_few

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024
"""A pointer of Git LFS is smaller than this."""
OF_A_MODEL = (".safetensors", ".json", ".model", ".tiktoken", ".txt", ".jinja", ".bin", ".pth", ".gguf")
"""Endings of the files that a model folder needs; a picture in its card may stay a pointer."""
PICKLED = ("*.bin", "*.pth", "*.pt")
OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""How pickled files begin that a trainer leaves beside a model, and that are no weights."""
OTHER_MODELS_IN = ("text_config", "vision_config", "audio_config", "language_config", "llm_config", "thinker_config")
"""Keys of a config that consists of configs."""
MODELS_BELOW = ("snapshots/*", "models--*/snapshots/*", "*", "*/model")
"""Where below a folder that is no model one may be: hub cache, checkpoints of a trainer, run folder of btx."""
MOST_NAMED = 3


def mistaken_file(file: Path) -> str:
    """Why a file is no model folder."""
    with open(file, "rb") as opened:
        start = opened.read(8)
    if start.startswith(b"GGUF"):
        return f"a GGUF file, which llama.cpp reads; {_ORIGINAL}"
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")) or file.suffix == ".tar":
        return "an archive; unpack it and give the folder that holds config.json"
    if file.suffix == ".safetensors" and (file.parent / "config.json").is_file():
        return f"a model is a folder, as save_pretrained writes it; give {file.parent}"
    return "a model is a folder, as save_pretrained writes it; this is a file"


def mistaken_folder(folder: Path) -> str | None:
    """What a folder is that holds no model transformers can read as it is, and what to do; None if nothing shows."""
    if (adapter := folder / "adapter_config.json").is_file():
        return _adapter(folder, adapter)
    if pointer := next(_lfs_pointers(folder), None):
        return (
            f"{pointer.name} is a Git LFS pointer, not the file itself; run `git lfs install` once and `git lfs pull` "
            f"in this folder, or download the model with `hf download`"
        )
    if nowhere := [file for file in folder.glob("*.safetensors") if file.is_symlink() and not file.exists()]:
        return f"{nowhere[0].name} is a link to {nowhere[0].readlink()}, where nothing is; download the model again"
    if (folder / "config.json").is_file():
        return _other_weights(folder)
    if below := _models_below(folder):
        what = "a Hugging Face cache entry" if (folder / "snapshots").is_dir() else "no model, but there are some below"
        return f"{what}; give the model's own folder: {first_few(list(map(str, below)), MOST_NAMED, ', ...')}"
    if (folder / "params.json").is_file():
        return (
            "a model in its maker's own format (params.json), not in that of Hugging Face; download that one, or "
            "convert it with transformers' convert_..._weights_to_hf"
        )
    if (folder / "model_index.json").is_file():
        return "a diffusion pipeline (model_index.json); btx mixes causal language models"
    if (folder / "snapshots").is_dir():
        return "a Hugging Face cache entry without a model: its download is not complete; download the model again"
    return _other_weights(folder)


def several_models(config: Mapping[str, Any]) -> str | None:
    """What to do with a config that consists of those of several models; None for a language model's."""
    inside = [key for key in OTHER_MODELS_IN if isinstance(config.get(key), dict)]
    if not inside:
        return None
    return (
        f"{config.get('model_type')} is a multimodal model ({', '.join(inside)}); save its text model first: "
        "m = AutoModelForImageTextToText.from_pretrained(FOLDER); "
        "t = AutoModelForCausalLM.from_config(m.config.text_config, dtype=m.dtype); "
        "t.model.load_state_dict(m.model.language_model.state_dict()); "
        "t.lm_head.load_state_dict(m.lm_head.state_dict()); t.save_pretrained(NEW), and copy its tokenizer files there"
    )


_ORIGINAL = "give the model it was made from, in the format of Hugging Face (config.json and .safetensors)"


def _adapter(folder: Path, file: Path) -> str:
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return (
            "a model and an adapter (adapter_config.json) in one folder, of which transformers may load either; remove "
            "the adapter's files if it is merged into the model, else save the merged model (merge_and_unload)"
        )
    try:
        told = json.loads(file.read_text("utf-8"))
        base, kind = told.get("base_model_name_or_path"), told.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = kind = None
    return (
        f"an adapter ({kind or 'PEFT'}, adapter_config.json) of {base or 'a model it does not name'}, no model of its "
        "own. btx mix, extend and adopt take a LoRA adapter as an expert; else merge it first: "
        "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(NEW), and save the tokenizer there"
    )


def _lfs_pointers(folder: Path) -> Iterator[Path]:
    """Files that stand for others, which were never downloaded."""
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix in OF_A_MODEL and file.is_file() and file.stat().st_size < POINTER_BYTES:
                with open(file, "rb") as opened:
                    if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                        yield file
        except OSError:  # whoever needs it will say so
            continue


def _models_below(folder: Path) -> list[Path]:
    """Model folders below one that is none; of a cache entry that of its branch `main` first."""
    for pattern in MODELS_BELOW:
        folders = sorted(file.parent for file in folder.glob(f"{pattern}/config.json"))
        if folders:
            main = folder / "refs" / "main"
            revision = main.read_text("utf-8", errors="replace").strip() if main.is_file() else ""
            return sorted(folders, key=lambda path: path.name != revision)
    return []


def _other_weights(folder: Path) -> str | None:
    """Weights that are no safetensors, where there are none of those."""
    if any(folder.glob("*.safetensors")):
        return None
    if any(folder.glob("*.gguf")):
        return f"GGUF files, which llama.cpp reads; {_ORIGINAL}"
    pickled = [file for pattern in PICKLED for file in folder.glob(pattern) if not file.name.startswith(OF_TRAINING)]
    if pickled:
        return (
            f"only pickled weights ({pickled[0].suffix}), which can run code when read; convert them once with "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) in an environment you trust"
        )
    if (folder / "config.json").is_file():
        return None
    if archives := [file.name for ending in ("*.zip", "*.tar", "*.tar.*", "*.tgz") for file in folder.glob(ending)]:
        return f"an archive ({archives[0]}); unpack it and give the folder that holds config.json"
    return None
