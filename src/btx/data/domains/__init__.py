"""Text made on the spot, without network: the demo's domains.

What generators there are is in `btx.choices.generators`; their functions are listed here.
`documents` yields the train or held-out documents of a generator, `questions` its held-out questions. Both depend on
their arguments only (code and general also on the Python whose standard library they read).
"""

from __future__ import annotations

from collections.abc import Iterator

from btx.data.domains import general_text, math_problems, stdlib_code, world_text
from btx.data.domains.document import Document, DocumentGenerator, Question, QuestionGenerator, Split

DOCUMENT_GENERATORS: dict[str, DocumentGenerator] = {
    "math": math_problems.documents,
    "code": stdlib_code.documents,
    "knowledge": world_text.documents,
    "general": general_text.documents,
}
QUESTION_GENERATORS: dict[str, QuestionGenerator] = {
    "math": math_problems.questions,
    "knowledge": world_text.questions,
}

__all__ = ["DOCUMENT_GENERATORS", "QUESTION_GENERATORS", "Document", "Question", "documents", "questions"]


def documents(generator: str, split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """Yield the documents of one side of the split, the same for the same arguments.

    `max_bytes` of UTF-8 text are for both sides together: val gets the share `held_out`, train the rest, at least one
    document each. No document of val, nor any problem, fact rendering or paragraph it is made of, is in train.
    """
    return DOCUMENT_GENERATORS[generator](split, rng_seed, max_bytes, held_out)


def questions(generator: str, rng_seed: int, count: int) -> list[Question]:
    """`count` different held-out questions; none is in a train document made with the same `rng_seed`.

    Raises DataError for more than there are facts.
    """
    return QUESTION_GENERATORS[generator](rng_seed, count)
