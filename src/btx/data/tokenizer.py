"""The byte-level BPE tokenizer of a seed model from scratch, and what identifies any tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from btx.errors import CheckpointError, DataError
from btx.files import value_hash, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 2000
LONG_RUN = re.compile(
    r"(?<![^\W\d_])[^\W\d_]{N,}|(?<![^\w\s])(?<!_)(?:[^\w\s]|_){N,}|(?<!\s)\s{N,}".replace("N", str(LONGEST_WORD + 1))
)
LONGEST_TEXT = 1 << 20
END_OF_WORD = re.compile(r"[^\W\d_](?=[\W\d_])")
"""Between a letter and what is none there is the end of a word, whatever comes after."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; equal texts give an equal tokenizer, in whatever order they come.

    Every text can be encoded and decodes to itself; digits are tokens of their own, as in Llama. `<|endoftext|>`, id 0,
    is begin and end of text and padding. Few texts can give fewer than `vocab_size` entries.

    Args:
        vocab_size: entries wanted, special token and the 256 bytes included.

    Raises:
        DataError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield from _in_parts(text)

    bpe.train_from_iterator(counted(), trainer)
    if not characters:
        raise DataError("there is no text to train a tokenizer on")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=1_000_000,  # tokens that it encodes without complaint
        clean_up_tokenization_spaces=False,
    )


def _in_parts(text: str) -> Iterator[str]:
    """A text for the training of a tokenizer: ordinary ones whole.

    The work of learning merges grows with the square of the longest word, that is of a run of letters, of signs or of
    white space: such runs come in slices of `LONGEST_WORD`, which nothing but words that long ever feels. Words are
    looked for in a whole text at once, at 100 times its memory: long texts come in parts that end where a word ends.
    """
    runs = (range(run.start(), run.end(), LONGEST_WORD) for run in LONG_RUN.finditer(text))
    cuts = [cut for run in runs for cut in run[1:]]
    end = LONGEST_TEXT
    while end < len(text) and (word := END_OF_WORD.search(text, end)):
        cuts.append(word.end())
        end = word.end() + LONGEST_TEXT
    for start, cut in pairwise([0, *sorted(set(cuts)), len(text)]):
        yield text[start:cut]


def as_loaded_beside(tokenizer: PreTrainedTokenizerBase, model_type: str) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of `tokenizer` once it is saved beside a model of type `model_type`.

    For most types that is the same tokenizer. A few (qwen2) have a class of their own that keeps the vocabulary but
    splits text in its own way; data have to be tokenised as everyone will tokenise who loads the model.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    loaded.name_or_path = tokenizer.name_or_path
    return loaded


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 reads it too.

    transformers 5 names the class of a plain fast tokenizer `TokenizersBackend`, which 4.57 does not know; under its
    older name both load the same tokenizer.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json without the rest of transformers: all that token files take, in a fraction of the time."""

    backend_tokenizer: Any
    """Of the library `tokenizers`."""
    bos_token_id: int | None
    eos_token_id: int | None
    name_or_path: str

    @classmethod
    def open(cls, folder: Path, *, bos: int | None, eos: int | None) -> TokenizerFile:
        """The tokenizer in `folder`, as transformers wrote it.

        Args:
            bos: id of the begin-of-text token, which tokenizer.json does not tell.
            eos: id of the end-of-text token.
        """
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), bos, eos, str(folder))

    def get_vocab(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        vocab: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocab


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase | TokenizerFile) -> Any:
    """A copy of the `tokenizers.Tokenizer` behind `tokenizer`, without its truncation and padding.

    Raises:
        CheckpointError: the tokenizer is not one of the library `tokenizers`.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: btx needs a fast tokenizer (tokenizer.json); "
            f"convert this one, for example with transformers' convert_slow_tokenizer"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase | TokenizerFile) -> str:
    """SHA-256 of everything that decides a document's tokens; the same after saving and loading.

    The post-processor is left out: it only places special tokens, which token files place themselves.
    """
    state = json.loads(fast_tokenizer(tokenizer).to_str())
    state.pop("post_processor")
    return value_hash({"tokenizer": state, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id})
