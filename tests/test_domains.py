"""The generated domains: deterministic, split without leaks, and clearly apart from each other."""

import ast
import subprocess
import sys
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

import btx
from btx.choices.generators import GENERATORS
from btx.data.domains import QUESTION_GENERATORS, Document, documents, questions
from btx.data.domains.document import split_by_group
from btx.data.domains.general_text import passages, prose
from btx.data.domains.stdlib_sources import read_source, standard_library
from btx.errors import DataError

MAX_BYTES = 300_000
HELD_OUT = 0.1


@cache
def side(generator: str, split: str, rng_seed: int = 0) -> list[Document]:
    return list(documents(generator, split, rng_seed, MAX_BYTES, HELD_OUT))


def size(items: list[Document]) -> int:
    return sum(len(item.text.encode()) for item in items)


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_same_arguments_give_the_same_documents_and_another_rng_seed_gives_others(generator):
    for split in ("train", "val"):
        first = list(islice(documents(generator, split, 1, MAX_BYTES, HELD_OUT), 20))
        assert list(documents(generator, split, 0, MAX_BYTES, HELD_OUT)) == side(generator, split)
        assert first != side(generator, split)[:20]


@pytest.mark.parametrize("generator", GENERATORS)
def test_train_and_val_share_the_bytes_as_asked(generator):
    assert 0.95 * MAX_BYTES * (1 - HELD_OUT) < size(side(generator, "train")) <= MAX_BYTES * (1 - HELD_OUT)
    assert 0.9 * MAX_BYTES * HELD_OUT < size(side(generator, "val")) <= MAX_BYTES * HELD_OUT


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_tiny_corpus_still_has_a_document_on_each_side(generator):
    for split in ("train", "val"):
        assert len(list(documents(generator, split, 0, 50, HELD_OUT))) == 1


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_group_and_no_document_of_val_is_in_train(generator):
    train, val = side(generator, "train"), side(generator, "val")
    assert not {item.group for item in train} & {item.group for item in val}
    train_text = "\0".join(item.text for item in train)
    assert [item.group for item in val if item.text in train_text] == []


@pytest.mark.parametrize("generator", QUESTION_GENERATORS)
def test_no_question_is_in_train_and_its_parts_fit_together(generator):
    train_text = "\0".join(item.text for item in side(generator, "train"))
    asked = questions(generator, 0, 200)
    assert len({item.prompt for item in asked}) == 200
    assert asked == questions(generator, 0, 200) != questions(generator, 1, 200)
    for item in asked:
        assert item.prompt not in train_text
        assert item.full.startswith(item.prompt)
        assert item.full.endswith(f" {item.answer}")
        assert item.prompt.endswith(":")


def test_a_larger_corpus_never_trains_on_what_a_smaller_one_held_out():
    for generator in ("code", "general"):
        small = {item.group for item in documents(generator, "val", 0, 200_000, HELD_OUT)}
        large = {item.group for item in documents(generator, "train", 0, 10**9, HELD_OUT)}
        assert not small & large


def test_a_finite_corpus_is_used_up_and_divided_by_the_share_held_out():
    corpus = [Document(f"{group} {number} " + "x" * 90, f"group {group}") for group in range(50) for number in range(5)]
    train, val = (list(split_by_group(corpus, split, 0, 10**9, 0.1)) for split in ("train", "val"))
    assert size(train) + size(val) == pytest.approx(size(corpus), rel=0.03)
    assert size(val) == pytest.approx(0.1 * size(corpus), rel=0.05)


def test_more_questions_than_there_are_are_the_users_mistake():
    with pytest.raises(DataError, match="has 358 held-out questions; 1000 were asked for"):
        questions("knowledge", 0, 1000)


def test_docstrings_are_taken_out_and_every_other_line_stays():
    source = '''"""Module."""
import os  # kept

# about f
def f():
    """Do f.

    At length.
    """

    return """no docstring"""

class Only:
    "alone"

async def g(): "one line"; return 1
def h():
    'ä' 'two'  # comment
    return h
'''
    file = read_source("x.py", source.encode())
    assert file.docstrings == ["Module.", "Do f.\n\nAt length.", "alone", "one line", "ätwo"]
    assert (
        "".join(file.pieces).rstrip()
        == '''import os  # kept

# about f
def f():
    return """no docstring"""

class Only:
    pass

async def g(): pass; return 1
def h():
      # comment
    return h'''
    )


def test_every_module_of_the_standard_library_still_parses_and_has_no_docstring_left():
    files = standard_library()
    assert len(files) > 200
    assert sum(len(file.docstrings) for file in files) > 3000
    for file in files[::7]:  # a seventh, to keep the test short
        tree = ast.parse("".join(file.pieces))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        assert [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)] == [], file.path


def test_general_text_repeats_no_paragraph():
    paragraphs = [" ".join(part.lower().split()) for item in passages() for part in item.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 2000


def test_prose_leaves_out_tables_code_and_headings():
    sentence = "A sentence that is long enough to count as prose."
    code = ">>> print_everything(there, might, be) and so on\neverything"
    table = "| 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 7.0 | 8.0 |"
    assert prose("\n\n".join(["HEADING", sentence, code, table])) == [sentence]


# --- a small language model tells the domains apart -----------------------------------------------------------------

ORDER = 4
N_GRAM_BYTES = {"math": 300_000, "code": 2_000_000, "knowledge": 300_000, "general": 2_000_000}
VOCABULARY = 2048


class WittenBell:
    """An n-gram model: interpolated Witten-Bell (Chen and Goodman 1998, section 2.5), counts in sorted arrays."""

    def __init__(self, tokens_N: np.ndarray):
        self.levels = []
        for n in range(1, ORDER + 1):
            grams, counts = np.unique(self._keys(tokens_N, n), return_counts=True)
            contexts, first = np.unique(grams // VOCABULARY, return_index=True)
            self.levels.append((grams, counts, contexts, np.add.reduceat(counts, first), np.diff([*first, len(grams)])))

    @staticmethod
    def _keys(tokens_N: np.ndarray, n: int) -> np.ndarray:
        """One integer for every n-gram; the last token varies fastest."""
        length = len(tokens_N) - n + 1
        return sum(
            (tokens_N[i : i + length].astype(np.int64) * VOCABULARY ** (n - 1 - i) for i in range(n)),
            np.zeros(length, np.int64),
        )

    @staticmethod
    def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[index] == wanted, values[index], 0)

    def bits(self, tokens_N: np.ndarray) -> float:
        """Code length of the text after its first tokens."""
        probability = np.full(len(tokens_N) - ORDER + 1, 1 / VOCABULARY)
        for n, (grams, counts, contexts, totals, followers) in enumerate(self.levels, start=1):
            keys = self._keys(tokens_N, n)[ORDER - n :]
            count = self._look_up(grams, counts, keys)
            total = self._look_up(contexts, totals, keys // VOCABULARY)
            kinds = self._look_up(contexts, followers, keys // VOCABULARY)
            mixed = (count + kinds * probability) / np.maximum(total + kinds, 1)
            probability = np.where(total > 0, mixed, probability)
        return float(-np.log2(probability).sum())


def bits_per_byte() -> dict[str, dict[str, float]]:
    """Model's domain → text's domain → bits per byte of val; one byte-level BPE for all domains."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = {
        split: {
            name: [f"{item.text}\n\n" for item in documents(name, split, 0, N_GRAM_BYTES[name], HELD_OUT)]
            for name in GENERATORS
        }
        for split in ("train", "val")
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        chain.from_iterable("".join(items)[:200_000].split("\n") for items in texts["train"].values()),
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokens = {
        split: {
            name: np.concatenate([item.ids for item in tokenizer.encode_batch(items)])
            for name, items in by_name.items()
        }
        for split, by_name in texts.items()
    }
    fitted = {name: WittenBell(tokens["train"][name]) for name in GENERATORS}
    return {
        model: {
            name: fitted[model].bits(tokens["val"][name]) / len("".join(texts["val"][name]).encode())
            for name in GENERATORS
        }
        for model in GENERATORS
    }


@pytest.mark.long
def test_an_n_gram_model_of_a_domain_knows_it_and_no_other():
    table = bits_per_byte()
    for own in GENERATORS:
        assert 0.3 < table[own][own] < 2.2, table
        for other in set(GENERATORS) - {own}:
            # code and general overlap: the comments in the code are English, and docstrings speak of code
            apart = 1.2 if {own, other} == {"code", "general"} else 1.5
            assert table[own][other] > apart * table[own][own], table
            assert table[other][own] > apart * table[own][own], table


@pytest.mark.long
def test_general_text_is_the_pythons_own_whatever_is_installed_beside_it():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(btx.__file__).parents[1])!r})\n"
        "from btx.data.domains.general_text import passages\n"
        "print('\\n'.join(repr(passage.text) for passage in passages()))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, encoding="utf-8",
                          env={"PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert done.stdout.splitlines() == [repr(passage.text) for passage in passages()], done.stderr
