"""Tiny models, a tiny tokenizer and a tiny run folder, made on the spot for tests that measure models."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer

from btx.data.token_files import DocumentEncoder, TokenFile, token_file_writer
from btx.data.tokenizer import train_tokenizer
from btx.recipe.loading import parse_recipe
from btx.recipe.schema import Recipe

WORDS = ["the", "sum", "of", "three", "and", "four", "is", "seven", "naïve", "café", "Zürich", "😀", "def", "return",
         "x", "+", "1\n", "Answer:", "Question:", "42", "7", "€", "\n"]  # fmt: skip
RECIPE = """\
name: pico
device: cpu
data:
  sequence_length: 24
  domains:
    math: ./math.jsonl
    general: [{path: ./general.jsonl, weight: 0.75}, {domain: math, weight: 0.25}]
seed_model: {path: ./seed}
train: {domains: [math], tokens: 1000}
finetune: {tokens: 1000}
evaluate:
  tokens: 300
  tasks: {knowledge: {generate: knowledge, questions: 7, max_new_tokens: 5}}
analyze: {tokens: 200, examples: 2}
"""
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def texts(count: int, rng_seed: int, longest: int = 60) -> list[str]:
    """Documents of random words, among them characters of two to four bytes; some are longer than a sequence."""
    rng = random.Random(rng_seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 320 entries."""
    return train_tokenizer(texts(50, rng_seed=0), 320)


def write_token_file(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, *, rng_seed: int, source: dict[str, Any]
) -> TokenFile:
    """A token file of some texts."""
    with token_file_writer(folder, DocumentEncoder(tokenizer), rng_seed=rng_seed, source=source) as writer:
        for text in texts:
            writer.add(text)
    return TokenFile.open(folder)


def other_tokenizer() -> Tokenizer:
    """The same one with a bos that is not the eos."""
    other = Tokenizer(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", eos_token="<|endoftext|>")
    assert other.bos_token_id != other.eos_token_id
    return other


def llama(folder: Path, rng_seed: int = 0, *, tie_word_embeddings: bool = False) -> Path:
    """A Llama folder with tokenizer."""
    return _written(folder, LlamaConfig, rng_seed, tie_word_embeddings=tie_word_embeddings)


def mixtral(folder: Path, experts: int = 4, top_k: int = 2, rng_seed: int = 0) -> Path:
    """A Mixtral folder with tokenizer."""
    return _written(folder, MixtralConfig, rng_seed, num_local_experts=experts, num_experts_per_tok=top_k)


def _written(folder: Path, kind: type[PreTrainedConfig], rng_seed: int, **config: Any) -> Path:
    """A model's folder, of files that are made once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(kind, rng_seed, *config.items()).items():
        (folder / name).write_bytes(content)
    return folder


@cache
def _files(kind: type[PreTrainedConfig], rng_seed: int, *config: tuple[str, Any]) -> dict[str, bytes]:
    """Large random weights, norms too: such a model has clear opinions, so wrong positions or masks show."""
    model = AutoModelForCausalLM.from_config(kind(vocab_size=320, **SIZES, **dict(config)))
    generator = torch.Generator().manual_seed(rng_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.25, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def recipe(change: tuple[str, str] = ("", "")) -> Recipe:
    """RECIPE with one replacement."""
    assert change[0] in RECIPE
    return parse_recipe(RECIPE.replace(*change, 1), "pico.yaml")


def prepared_run(folder: Path) -> Path:
    """A run folder with RECIPE and the held-out token files of its domains."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    for number, domain in enumerate(("math", "general")):
        documents = texts(40, rng_seed=1 + number)
        write_token_file(folder / "data" / domain / "0" / "val", documents, tokenizer(), rng_seed=0, source={})
    return folder
