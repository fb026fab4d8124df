"""What llama.cpp would compute otherwise, or its converter does not know: said before anything is converted.

Measured against transformers: docs/compatibility.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.model_files.beside_weights import TOKENIZER, files_of
from btx.model_files.btx_folder import FILE, is_btx_folder
from btx.model_files.headers import Headers
from btx.model_files.model_folder import check_model_folder
from btx.model_files.token_ids import read_object

Config = Mapping[str, Any]
ELSEWHERE = "It runs in transformers, in btx serve and, where docs/compatibility.md says so, in vLLM"
OWN_ROUTER = "its router is btx's own"
UNKNOWN_CLASSES = {
    "flex_olmo": "llama.cpp's converter does not know FlexOlmo",
    "qwen3_5_moe": "llama.cpp's converter does not know the text model of Qwen3.5-MoE alone",
    "qwen3_5_moe_text": "llama.cpp's converter does not know the text model of Qwen3.5-MoE alone",
    "granitemoe_swa": "llama.cpp computes GraniteMoE-SWA with other frequencies than its layers have",
    "mellum": "llama.cpp's converter does not know Mellum with windows of its own in every layer",
}
NEVER_NORMALISED = {"qwen2_moe": "Qwen2-MoE", "olmoe": "OLMoE"}
UNCHECKED = {
    "ernie4_5_moe": "the converter wants Ernie's own tokenizer files",
    "hunyuan_v1_moe": "the converter wants Hunyuan's own tokenizer files",
    "gpt_oss": "a pico model's logits differ by 0.02",
    "deepseek_v3": "a pico model's logits differ by 2.6; compare answers before you give it to anybody",
    **dict.fromkeys(("llama4", "llama4_text", "gemma4", "gemma4_text"), "pico models did not come through"),
}
CHECKED = {"mixtral", "granitemoe", "granitemoeshared", "lfm2_moe", "qwen2_moe", "qwen3_moe", "olmoe", "cohere2_moe"}
"""MoE classes whose logits or greedy tokens were compared, and are equal where nothing above refuses them."""
PUBLISHED_FUSED = {"gpt_oss", "llama4", "llama4_text", "gemma4", "gemma4_text"}
"""Classes whose published layout has fused experts, as transformers has them in memory."""
PRE_TOKENIZERS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}
"""Pre-tokenizers of tokenizer.json, one after the other → llama.cpp's name of the same splitting."""


def check_gguf(folder: Path) -> list[str]:
    """Refuse a model that llama.cpp would not compute as transformers does.

    Returns:
        What has not been checked by anybody, for the user.
    """
    config = check_model_folder(folder)
    if is_btx_folder(config):
        why = read_object(folder / FILE).get("why", OWN_ROUTER)
        raise CheckpointError(
            f"{folder}: only btx reads this folder: {why}. No GGUF can hold it; run it with btx serve, or mix and "
            f"finetune with a router that the plain class has (mix.router: top_k; btx ls routers)"
        )
    if problem := _of_its_class(config):
        raise CheckpointError(f"{folder}/config.json: {problem}")
    if config["model_type"] not in PUBLISHED_FUSED and any(
        name.endswith("experts.gate_up_proj") for name in Headers(folder).tensors
    ):
        raise CheckpointError(
            f"{folder}: the experts lie in transformers' layout of memory (save_original_format=False), which the "
            f"converter does not know. A model that was loaded keeps its layout: load its weights into a new model, "
            f"AutoModelForCausalLM.from_config(config).load_state_dict(...), and save that with save_pretrained(FOLDER)"
        )
    if not any(files_of(folder, TOKENIZER)):
        raise CheckpointError(
            f"{folder}: has no tokenizer, and a GGUF file holds one; copy the seed model's files here"
        )
    model_type = config["model_type"]
    if model_type in UNCHECKED:
        return [f"{model_type} was not checked against llama.cpp: {UNCHECKED[model_type]}"]
    if model_type not in CHECKED and any(".experts." in name for name in Headers(folder).tensors):
        return [f"{model_type} was not checked against llama.cpp: compare answers before you give it to anybody"]
    return []


def _of_its_class(config: Config) -> str | None:
    """What of a config llama.cpp reads otherwise, and what to do; None if nothing is known."""
    model_type = config["model_type"]
    if model_type in UNKNOWN_CLASSES:
        return f"{UNKNOWN_CLASSES[model_type]}. {ELSEWHERE}"
    if model_type == "mixtral":
        return _mixtral(config)
    if model_type in NEVER_NORMALISED and config.get("norm_topk_prob"):
        name = NEVER_NORMALISED[model_type]
        return f"llama.cpp never normalises the gates of {name} (norm_topk_prob: true): other answers. {ELSEWHERE}"
    if model_type == "qwen3_moe" and not config.get("norm_topk_prob", False):
        return f"llama.cpp always normalises the gates of Qwen3-MoE (norm_topk_prob: false): other answers. {ELSEWHERE}"
    return None


def _mixtral(config: Config) -> str | None:
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings", 131072)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"llama.cpp's Mixtral computes SiLU whatever hidden_act says ({config['hidden_act']}). {ELSEWHERE}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "llama_4_scaling_beta" in rope:
        return f"llama.cpp's Mixtral has no llama 4 scaling (llama_4_scaling_beta): other answers. {ELSEWHERE}"
    if window and window < longest:
        return (
            f"llama.cpp's Mixtral has no sliding window ({window} of {longest} tokens). Up to {window} tokens it is "
            f"the same model: in a copy of the folder set sliding_window to null and "
            f"max_position_embeddings to {window}"
        )
    return None


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name of how a byte-level BPE splits text, for tokenizers whose hash its converter does not know; None
    if it is neither GPT-2's way nor that of tokenizers which btx trains."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        chain = tokenizer["pre_tokenizer"]
        steps = chain["pretokenizers"] if chain["type"] == "Sequence" else [chain]
        plain = all(step.get("individual_digits", True) and step.get("use_regex", True) for step in steps)
        is_bpe = tokenizer["model"]["type"] == "BPE" and not any(step.get("add_prefix_space") for step in steps)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        PRE_TOKENIZERS.get(tuple(step["type"] for step in steps))
        if plain and is_bpe and not tokenizer.get("normalizer")
        else None
    )
