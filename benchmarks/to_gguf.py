"""Convert a model folder to GGUF with llama.cpp's own converter, naming the tokenizer's way of splitting text.

    python benchmarks/to_gguf.py runs/demo/finetune/model demo.gguf --converter llama.cpp/convert_hf_to_gguf.py

The converter knows tokenizers by a hash and refuses one that btx has trained ("BPE pre-tokenizer was not recognized").
These split off digits one by one and then use GPT-2's pattern, which llama.cpp calls `smollm`. A folder with a known
model's tokenizer needs no such help: call convert_hf_to_gguf.py itself. Needs torch, transformers, sentencepiece.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Name the pre-tokenizer, then let the converter do its work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--converter", type=Path, required=True, help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--outtype", default="f32")
    parser.add_argument("--pre", default="smollm", help="llama.cpp's name of the pre-tokenizer")
    given = parser.parse_args()
    sys.path.insert(0, str(given.converter.resolve().parent))
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: given.pre
    sys.argv = [
        str(given.converter),
        str(given.folder),
        "--outfile",
        str(given.output),
        "--outtype",
        given.outtype,
        "--model-name",
        "btx",
    ]  # some names switch on what is for one vendor's vocabulary
    converter.main()


if __name__ == "__main__":
    main()
