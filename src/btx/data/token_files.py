"""Documents → token files: a folder with all tokens of a source, one after the other, and where documents start.

    tokens.bin      uint16 if the vocabulary has at most 65536 entries, else uint32
    documents.npy   int64 (documents + 1,): offset of each document's first token, then the number of tokens
    bytes.npy       int64 (documents,): UTF-8 bytes of each document's text, for bits per byte
    digests.npy     uint64 (documents,): what each document says, white space apart (`btx.data.sources.digest_of`)
    index.json      tokens, bytes, documents, dtype, trailing_eos, sha256 (of tokens.bin), tokenizer_sha256, rng_seed,
                    source (description of where the documents come from), and what was left out, counted

A document is `separator text`, the separator being bos, or eos if the tokenizer has no bos. So the label of a
document's last token is the next document's separator: it says that the document is over. Only if there is a bos that
is not the eos, that would teach the wrong token: then a document is `bos text eos` (`trailing_eos`), and its eos has no
label. Attention and position ids restart at the separator.

Documents are encoded as `tokenizer(text, add_special_tokens=False)` does: special tokens spelt out in a text become
those tokens. They start no document; only documents.npy says where one starts.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NotRequired

import numpy as np
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.data.sources import digest_of
from btx.data.tokenizer import TokenizerFile, fast_tokenizer, tokenizer_sha256
from btx.errors import CheckpointError, DataError, RunFolderError
from btx.files import atomic_folder, read_json
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index.json"
BATCH_CHARACTERS = 1 << 20
LONG_DOCUMENT = 1 << 20
PART_CHARACTERS = 1 << 19
"""A document longer than `LONG_DOCUMENT` characters is encoded in parts of this many."""
WINDOW = 1 << 13
"""Characters on either side of a place to cut that are looked at."""
CUTS_TRIED = 8


class Index(TypedDict):
    """index.json."""

    tokens: int
    bytes: int
    documents: int
    dtype: Literal["uint16", "uint32"]
    trailing_eos: bool
    sha256: str
    tokenizer_sha256: str
    rng_seed: int
    source: dict[str, Any]
    taken_out: NotRequired[dict[str, int]]


class DocumentEncoder:
    """Texts → token ids with their separators, as token files have them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | TokenizerFile) -> None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise CheckpointError(f"{tokenizer.name_or_path}: the tokenizer has neither a bos nor an eos token; "
                                  f"one has to separate documents")  # fmt: skip
        self._fast = fast_tokenizer(tokenizer)
        self._fast.post_processor = None  # it places special tokens, which are placed here, and trims offsets
        self.sha256 = tokenizer_sha256(tokenizer)
        ids = [int(token) for token in (bos, eos) if token is not None]
        self.separator = ids[0]
        self.trailing_eos = len(ids) == 2 and ids[0] != ids[1]
        self._tail = ids[1:] if self.trailing_eos else []
        entries = 1 + max(max(tokenizer.get_vocab().values()), self.separator, *self._tail)
        self.dtype = np.dtype("<u2" if entries <= 1 << 16 else "<u4")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each document; uses all cores."""
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.separator, *document.ids, *self._tail] for document in encoded]

    def beginning(self, text: str) -> list[int]:
        """The token ids of a text of any length that may go on: the end-of-text token of a document is left out."""
        ids = [token for part in self.in_parts(text) for token in part]
        return ids[:-1] if self.trailing_eos else ids

    def in_parts(self, text: str) -> Iterator[list[int]]:
        """The token ids of a long document, part by part: tokenizers take 150 bytes of memory a character.

        The ids are those of the whole text. Where no place to cut it is found, because a tokenizer has no words or one
        of them is very long, a part goes on to the next one.
        """
        yield [self.separator]
        start = 0
        for near in range(PART_CHARACTERS, len(text) - WINDOW, PART_CHARACTERS):
            if (cut := self._safe_cut(text, near)) is not None:
                yield self._ids(text[start:cut])
                start = cut
        yield [*self._ids(text[start:]), *self._tail]

    def _safe_cut(self, text: str, near: int) -> int | None:
        """A place near `near` on whose two sides a text can be encoded apart, or None.

        It is the start of a word, from wherever the reading begins: two readings that begin one character apart agree
        on it. And the tokens around it are the same with the cut and without.
        """
        first, last = near - WINDOW, near + WINDOW
        one, other = ({start + begin for begin in self._word_starts(text[start:last])} for start in (first, first + 1))
        for cut in sorted(begin for begin in one & other if abs(begin - near) < WINDOW // 2)[:CUTS_TRIED]:
            if self._ids(text[first:cut]) + self._ids(text[cut:last]) == self._ids(text[first:last]):
                return cut
        return None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _word_starts(self, text: str) -> Iterator[int]:
        """The characters at which words start, but for the first."""
        encoded = self._fast.encode(text, add_special_tokens=False)
        for (before, word), (begin, _) in zip(pairwise(encoded.word_ids), encoded.offsets[1:], strict=True):
            if word != before:
                yield begin


class TokenFileWriter:
    """Collects documents of one token file; `token_file_writer` makes it and completes the folder."""

    def __init__(self, folder: Path, encoder: DocumentEncoder, tokens: BinaryIO) -> None:
        self._folder, self._encoder, self._file = folder, encoder, tokens
        self._starts, self._bytes, self._digests = array("q", [0]), array("q"), array("Q")
        self._sha256 = hashlib.sha256()
        self._waiting: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        """Append a document."""
        if len(text) > LONG_DOCUMENT:
            self._encode()
            self._write(text, self._encoder.in_parts(text))
            return
        self._waiting.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self._encode()

    def finish(self, rng_seed: int, source: dict[str, Any], skipped: dict[str, int]) -> None:
        """Write the offsets, then the index."""
        self._encode()
        self._file.flush()
        _complete(self._folder, np.array(self._starts), np.array(self._bytes), np.array(self._digests), {
            "dtype": self._encoder.dtype.name, "trailing_eos": self._encoder.trailing_eos,
            "sha256": self._sha256.hexdigest(), "tokenizer_sha256": self._encoder.sha256, "rng_seed": rng_seed,
            "source": source, **({"skipped": skipped} if skipped else {}),
        })  # fmt: skip

    def _encode(self) -> None:
        if not self._waiting:
            return
        for text, ids in zip(self._waiting, self._encoder(self._waiting), strict=True):
            self._write(text, [ids])
        self._waiting, self._characters = [], 0

    def _write(self, text: str, parts: Iterable[list[int]]) -> None:
        end = self._starts[-1]
        for ids in parts:
            block = np.array(ids, dtype=self._encoder.dtype).tobytes()
            self._file.write(block)
            self._sha256.update(block)
            end += len(ids)
        self._starts.append(end)
        self._bytes.append(len(text.encode()))
        self._digests.append(digest_of(text))


@contextmanager
def token_file_writer(
    folder: Path, encoder: DocumentEncoder, *, rng_seed: int, source: dict[str, Any],
    skipped: Mapping[str, int] | None = None,
) -> Iterator[TokenFileWriter]:  # fmt: skip
    """A writer whose token file appears at `folder`, in place of what was there, when the block ends without an error.

    Args:
        rng_seed: written to the index.
        source: JSON description of where the documents come from, written to the index.
        skipped: why documents were left out → how many, as it is when the block ends; written to the index.
    """
    with atomic_folder(folder) as beside, open(beside / "tokens.bin", "wb") as tokens:
        writer = TokenFileWriter(beside, encoder, tokens)
        yield writer
        writer.finish(rng_seed, source, dict(skipped or {}))


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A complete token file, mapped into memory."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> TokenFile:
        """Open `folder`, checking the sizes of its files.

        Raises:
            DataError: a file is missing, cut off, or not what the index says.
        """
        file = cls(Path(folder), _read_index(Path(folder)))
        file._check_sizes()
        return file

    def __len__(self) -> int:
        """Tokens."""
        return int(self.index["tokens"])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.index["documents"])

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents' texts."""
        return int(self.index["bytes"])

    @property
    def sha256(self) -> str:
        """SHA-256 of tokens.bin."""
        return str(self.index["sha256"])

    @property
    def trailing_eos(self) -> bool:
        """True if documents end with an eos, which has no label."""
        return bool(self.index["trailing_eos"])

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens (tokens,), read-only; pages are read from the disk when they are used."""
        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        if not len(self):
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.folder / "tokens.bin", dtype, mode="r"))

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Offset of each document's first token, then the number of tokens: int64 (documents + 1,)."""
        return self._array("documents.npy")

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text: int64 (documents,)."""
        return self._array("bytes.npy")

    @cached_property
    def digests(self) -> np.ndarray:
        """64 bits of what each document says, white space apart: uint64 (documents,)."""
        return self._array("digests.npy")

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.asarray(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            blame(error)
            raise DataError(f"{self.folder / name}: {_BROKEN.format(error)}") from error

    def _check_sizes(self) -> None:
        tokens = self.folder / "tokens.bin"
        expected = len(self) * np.dtype(self.index["dtype"]).itemsize
        if not tokens.is_file():
            raise DataError(f"{tokens}: {_BROKEN.format('it is missing')}")
        if tokens.stat().st_size != expected:
            raise DataError(f"{tokens}: {_BROKEN.format(f'{tokens.stat().st_size} bytes instead of {expected}')}")
        starts, counts = self.document_starts, self.document_bytes
        if starts.shape != (self.documents + 1,) or starts[0] != 0 or starts[-1] != len(self):
            raise DataError(f"{self.folder / 'documents.npy'}: {_BROKEN.format('it does not fit the index')}")
        if counts.shape != (self.documents,):
            raise DataError(f"{self.folder / 'bytes.npy'}: {_BROKEN.format('it does not fit the index')}")


def take_out(folder: Path, digests: np.ndarray, *, because: str) -> int:
    """Write a token file anew without the documents whose digests are among `digests`; returns how many there were.

    A file without any of them stays as it is. The index counts them: "taken_out": {because: documents}.

    Args:
        digests: uint64 (any number,), as `digest_of` gives them.
        because: the domain on whose account they go.
    """
    file = TokenFile.open(folder)
    goes_N = np.isin(file.digests, digests)
    if not goes_N.any():
        return 0
    stays = np.flatnonzero(~goes_N)
    lengths = np.diff(file.document_starts)[stays]
    sha256 = hashlib.sha256()
    with atomic_folder(folder) as beside:
        with open(beside / "tokens.bin", "wb") as tokens:
            for number in stays.tolist():
                start, end = file.document_starts[number : number + 2].tolist()
                block = file.tokens[start:end].tobytes()
                tokens.write(block)
                sha256.update(block)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        _complete(beside, starts, file.document_bytes[stays], file.digests[stays], file.index | {
            "sha256": sha256.hexdigest(), "taken_out": file.index.get("taken_out", {}) | {because: int(goes_N.sum())},
        })  # fmt: skip
    return int(goes_N.sum())


def _complete(folder: Path, starts: np.ndarray, sizes: np.ndarray, digests: np.ndarray, facts: dict[str, Any]) -> None:
    """Write all of a token file but its tokens: what each document is, then the index, with `facts` in it."""
    np.save(folder / "documents.npy", starts.astype("<i8"))
    np.save(folder / "bytes.npy", sizes.astype("<i8"))
    np.save(folder / "digests.npy", digests.astype("<u8"))
    counts = {"tokens": int(starts[-1]), "bytes": int(sizes.sum()), "documents": len(sizes)}
    (folder / INDEX).write_text(json.dumps({**counts, **facts, **counts}, indent=1) + "\n", "utf-8")


_BROKEN = "this token file is broken: {}; remove its folder and prepare the data again"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index: dict[str, Any] | None = read_json(path, Index)
    except RunFolderError as error:
        raise DataError(_BROKEN.format(error)) from error
    if index is None:
        raise DataError(f"{path}: no such file: {folder} is no token file, or was not completed; "
                        f"prepare the data first")  # fmt: skip
    return index
