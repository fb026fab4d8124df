"""Does another engine say the same? Greedy tokens of MoE folders here, and in other environments that know no btx.

    python benchmarks/engines.py runs/demo/finetune/model ./moe --transformers ENV/bin/python --vllm ENV/bin/python
    python benchmarks/engines.py FOLDERS --llama-cpp ENV/bin/python --converter llama.cpp/convert_hf_to_gguf.py

Folders of every family: benchmarks/family_folders.py.

For every folder: 24 greedy tokens after each of 4 prompts in float32, here with transformers, there with the engine
of the environment whose Python is named (made with pip; see docs/compatibility.md). Prints one line a folder and
engine: the engine's version, how many tokens agree, and the largest difference of the logits after the prompts where
the engine gives logits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ["Problem: Compute 6 * 7.\nSolution:", "Question: What does", "def main(", "The"]
IDS = [[3, 5, 7, 11, 13], [17, 19, 23], [29, 31, 37, 41], [43]]
"""Prompts of a folder without a tokenizer."""
NEW_TOKENS = 24
PATIENCE_S = 300
TO_GGUF = Path(__file__).with_name("to_gguf.py")

# Runs in this environment and in others: nothing of btx may be imported.
TRANSFORMERS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder) if isinstance(prompts[0], str) else None
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
tokens, logits = [], []
for prompt in prompts:
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"] if tokenizer else prompt])
    with torch.no_grad():
        logits.append(model(ids).logits[0, -1].tolist())
        out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                             attention_mask=torch.ones_like(ids), pad_token_id=0)
    tokens.append(out[0, ids.shape[1]:].tolist())
version = "transformers " + transformers.__version__
print("RESULT" + json.dumps({"version": version, "tokens": tokens, "logits": logits}))
"""
VLLM = """
import json, os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
from transformers import AutoTokenizer
import vllm
folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    known = isinstance(prompts[0], str)
    tokenizer = AutoTokenizer.from_pretrained(folder) if known else None
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts] if known else prompts
    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=96, skip_tokenizer_init=not known)
    wanted = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens)
    out = engine.generate([{"prompt_token_ids": one} for one in ids], wanted)
    tokens = [list(one.outputs[0].token_ids) for one in out]
    print("RESULT" + json.dumps({"version": "vllm " + vllm.__version__, "tokens": tokens}))
"""
LLAMA_CPP = """
import json, sys
from importlib import metadata
from tokenizers import Tokenizer
import xllamacpp
folder, prompts, new_tokens, gguf = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if isinstance(prompts[0], str):
    tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.warmup = gguf, 256, False
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float16 if not said otherwise
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
server = xllamacpp.Server(settings)
tokens = []
for prompt in prompts:
    out = server.handle_completions({"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True,
                                     "cache_prompt": False, "return_tokens": True, "verbose": True})
    tokens.append(out["__verbose"]["tokens"])
print("RESULT" + json.dumps({"version": "llama.cpp (xllamacpp " + metadata.version("xllamacpp") + ")",
                             "tokens": tokens}), flush=True)
"""


def ask(python: str, program: str, folder: Path, *more: str) -> dict[str, Any]:
    """What an engine says; an "error" instead if it cannot load the folder."""
    prompts = PROMPTS if any(folder.glob("tokenizer*")) else IDS
    return _result([python, "-c", program, str(folder), json.dumps(prompts), str(NEW_TOKENS), *more])


def ask_llama_cpp(python: str, converter: str, folder: Path) -> dict[str, Any]:
    """Convert the folder with llama.cpp's converter, then ask llama.cpp."""
    with tempfile.TemporaryDirectory() as scratch:
        gguf = f"{scratch}/model.gguf"
        command = [python, str(TO_GGUF), str(folder), gguf, "--converter", converter]
        converted = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if converted.returncode:
            return {"error": "convert_hf_to_gguf: " + _last_error(converted.stderr)}
        return ask(python, LLAMA_CPP, folder, gguf)


def _result(command: list[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PATIENCE_S} s"}
    found = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return dict(json.loads(found[-1])) if found else {"error": _last_error(done.stderr)}


def _last_error(told: str) -> str:
    """The cause: the first line that names an exception (an engine of several processes repeats it), else the last that
    speaks of an error."""
    found = re.search(r"\w+Error: .*", told)
    lines = [line for line in told.splitlines() if "error" in line.lower()] or ["no message"]
    return (found.group() if found else lines[-1])[:160]


def agreement(here: dict[str, Any], there: dict[str, Any]) -> str:
    """One line: version, equal tokens, largest logit difference."""
    if "error" in there:
        return f"cannot load it: {there['error']}"
    pairs = [(a, b) for mine, theirs in zip(here["tokens"], there["tokens"], strict=True)
             for a, b in zip(mine, theirs, strict=True)]  # fmt: skip
    line = f"{there['version']}: {sum(a == b for a, b in pairs)} of {len(pairs)} greedy tokens equal"
    if "logits" in there:
        differences = (abs(a - b) for mine, theirs in zip(here["logits"], there["logits"], strict=True)
                       for a, b in zip(mine, theirs, strict=True))  # fmt: skip
        line += f", largest logit difference {max(differences):.1e}"
    return line


def main() -> None:
    """Ask every engine about every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--transformers", action="append", default=[], help="Python of an environment; repeat")
    parser.add_argument("--vllm", action="append", default=[], help="Python of an environment with vLLM; repeat")
    parser.add_argument(
        "--llama-cpp",
        action="append",
        default=[],
        help="Python of an environment with xllamacpp, torch, transformers, sentencepiece; repeat",
    )
    parser.add_argument("--converter", help="convert_hf_to_gguf.py of llama.cpp's repository")
    given = parser.parse_args()
    if given.llama_cpp and not given.converter:
        parser.error("--llama-cpp needs --converter")
    for folder in given.folders:
        here = ask(sys.executable, TRANSFORMERS, folder)
        if "error" in here:
            sys.exit(f"{folder}: {here['error']}")
        print(f"{folder}: here {here['version']}")
        engines = [(python, TRANSFORMERS) for python in given.transformers] + [(python, VLLM) for python in given.vllm]
        for python, program in engines:
            print(f"  {agreement(here, ask(python, program, folder))}", flush=True)
        for python in given.llama_cpp:
            print(f"  {agreement(here, ask_llama_cpp(python, given.converter, folder))}", flush=True)


if __name__ == "__main__":
    main()
