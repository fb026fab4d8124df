"""Real documents that change their subject, not made by cutting: which held-out documents go over from prose to code or
formulas and back within themselves?

    python benchmarks/changing_subject.py ../shared/data -o changing.jsonl
    python benchmarks/changing_subject.py ../shared/data -o changing.jsonl --show 3      # prints some to look at
    python benchmarks/changing_subject_bits.py changing.jsonl runs/my                    # how well models read them

Reads DOMAIN/val.jsonl.gz below the folder: what a recipe with `held_out: DOMAIN/val.jsonl.gz` never trains on. The
rule, line by line (`line_kind`):

formula   more than half of what is no white space is TeX (`$...$`, `\\command`) or digits and operators
code      else a statement: a keyword and its colon, a prompt, an import, an assignment, a string, a comment of C, a tag
prose     else three plain words at least, which are 60 % of what is neither white space nor TeX
code      else, without TeX, a mark of code: a call, a bracket or a comma at its end, an arrow, an option of a command
nothing   everything else (blank lines, titles, lists of names): goes with the lines before it

Neighbouring lines of one kind are a passage. One of fewer than 200 bytes goes with the passage before it (the first
with the one after it), so that a line of code in a paragraph changes nothing. A document counts if two kinds have 20 %
of its bytes each at least, and if it changes 3 times at least.

Writes a document a line, {"text", "source", "domain", "passages": [[first character, kind], ...]}, and prints a table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_table import markdown_table

DOMAINS = ("math", "code", "wiki", "general", "general_large")
LEAST_BYTES = 200
"""Of a passage."""
LEAST_SHARE = 0.2
"""Of a document's bytes that each of two kinds has."""
LEAST_CHANGES = 3
LEAST_WORDS = 0.6
"""Share of a line of prose that its plain words have."""

WORD = re.compile(r"(?<![\w.\\/@_-])[A-Za-z]?[a-z]+(?:['’-][a-z]+)*(?=[,.;:!?)\"'’]*(?:\s|$))")
TEX = re.compile(r"\$[^$]*\$|\\[A-Za-z]+\*?|\$")
ARITHMETIC = re.compile(r"[\d+*/=<>^×÷%−-]")
OPERATION = re.compile(r"\d.*[+*/=<>^×÷%−]|[+*/=<>^×÷%−].*\d|\d\s*-\s*\d")
STATEMENT = re.compile(
    r"(?:>>>|\.\.\. |@\w|#include|//|/\*|[rbfu]?[\"'].*[\"'][,)\]}]+$|\$ |</?\w|"
    r"(?:def|class|async|with|for|while|if|elif|else|try|except|finally)\b.*:$|(?:import|from) [\w.]+(?: import .*)?$|"
    r"(?:return|raise|assert|yield|await|del|int|void|const|char|struct|SELECT|CREATE|INSERT|UPDATE|FROM|WHERE)\b|"
    r"[\w.,\[\]()'\" ]+ [-+*/|:]?= )"
)
CODE = re.compile(r"\w\([^)]*\)?|\w\s*=\s*\S|->|::\w|[{}\[(;,\\]$|^[)\]}]|</\w|\s--?\w")


@dataclass(frozen=True)
class Passage:
    """Neighbouring lines of one kind."""

    start: int
    """Its first character in the text."""
    kind: str
    bytes: int


def line_kind(line: str) -> str | None:
    """formula, prose or code, as the rule above says; None for what has no kind of its own."""
    line = line.strip()
    solid = _solid(line)
    rest = TEX.sub(" ", line)
    tex = solid - _solid(rest)
    arithmetic = len(ARITHMETIC.findall(rest)) if tex or OPERATION.search(rest) else 0  # a lone number is none
    if 2 * (tex + arithmetic) > solid:
        return "formula"
    if STATEMENT.match(line):
        return "code"
    words = WORD.findall(rest)
    if len(words) >= 3 and sum(map(len, words)) >= LEAST_WORDS * _solid(rest):
        return "prose"
    return "code" if not tex and CODE.search(line) else None


def _solid(text: str) -> int:
    """Characters that are no white space."""
    return len(re.sub(r"\s", "", text))


def passages(text: str) -> list[Passage]:
    """The text from start to end in passages, two neighbours never of one kind; empty where no line has a kind."""
    found: list[Passage] = []
    start = 0
    for line in text.split("\n"):
        kind = line_kind(line)
        found.append(Passage(start, kind or (found[-1].kind if found else ""), len(line.encode()) + 1))
        start += len(line) + 1
    first = next((passage.kind for passage in found if passage.kind), None)
    if first is None:
        return []
    joined = _joined(Passage(passage.start, passage.kind or first, passage.bytes) for passage in found)
    long = [passage for passage in joined if passage.bytes >= LEAST_BYTES]
    kind = (
        long[0].kind if long else first
    )  # a short passage has the kind of what is before it, else of what is after it
    kinds = []
    for passage in joined:
        kind = passage.kind if passage.bytes >= LEAST_BYTES else kind
        kinds.append(Passage(passage.start, kind, passage.bytes))
    return _joined(kinds)


def _joined(parts: Iterable[Passage]) -> list[Passage]:
    """Neighbours of one kind as one passage."""
    joined: list[Passage] = []
    for part in parts:
        if joined and joined[-1].kind == part.kind:
            joined[-1] = Passage(joined[-1].start, part.kind, joined[-1].bytes + part.bytes)
        else:
            joined.append(part)
    return joined


def changes_subject(parts: Sequence[Passage]) -> bool:
    """Whether a document of these passages counts."""
    sizes = Counter[str]()
    for part in parts:
        sizes[part.kind] += part.bytes
    large = [kind for kind, size in sizes.items() if size >= LEAST_SHARE * sizes.total()]
    return len(large) >= 2 and len(parts) > LEAST_CHANGES


def held_out(root: Path, domain: str) -> Iterator[dict[str, Any]]:
    """The documents of a domain that no training reads."""
    path = root / domain / "val.jsonl.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)


def picked(root: Path) -> Iterator[tuple[str, dict[str, Any], list[Passage]]]:
    """Domain, document and passages of all that count, each text once."""
    seen = set[str]()
    for domain in DOMAINS:
        for document in held_out(root, domain):
            parts = passages(document["text"])
            if changes_subject(parts) and document["text"] not in seen:
                seen.add(document["text"])
                yield domain, document, parts


def table(rows: Sequence[tuple[str, dict[str, Any], list[Passage]]]) -> str:
    """Documents, bytes by kind and changes of every source, in Markdown."""
    columns = ("documents", "changes", "prose", "code", "formula")
    counts: dict[str, Counter[str]] = {}
    for domain, document, parts in rows:
        for name in (f"{domain}: {document['source']}", "all"):
            count = counts.setdefault(name, Counter())
            count.update({"documents": 1, "changes": len(parts) - 1})
            for part in parts:
                count[part.kind] += part.bytes
    ordered = sorted(counts.items(), key=lambda item: (item[0] == "all", -item[1]["documents"]))
    rows = [[name, *(f"{count[column]:,}" for column in columns)] for name, count in ordered]
    return markdown_table(["source", *columns], rows)


def shown(document: dict[str, Any], parts: Sequence[Passage], longest: int = 200) -> str:
    """The start of every passage behind its kind."""
    ends = [*(part.start for part in parts[1:]), len(document["text"])]
    cut = [f"[{part.kind}] {document['text'][part.start : min(end, part.start + longest)].rstrip()}"
           for part, end in zip(parts, ends, strict=True)]  # fmt: skip
    return "\n".join([f"===== {document['source']}", *cut])


def main() -> None:
    """Pick, write, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with DOMAIN/val.jsonl.gz")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--show", type=int, default=0, help="documents printed passage by passage, evenly spread")
    arguments = parser.parse_args()
    rows = list(picked(arguments.data))
    if not rows:
        raise SystemExit(f"{arguments.data}: no document that changes its subject in DOMAIN/val.jsonl.gz; domains: "
                         f"{', '.join(DOMAINS)}")  # fmt: skip
    with arguments.output.open("w", encoding="utf-8", newline="\n") as file:
        for domain, document, parts in rows:
            line = {"text": document["text"], "source": document["source"], "domain": domain,
                    "passages": [[part.start, part.kind] for part in parts]}  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(table(rows))
    for _, document, parts in rows[:: max(1, len(rows) // max(1, arguments.show))][: arguments.show]:
        print(shown(document, parts))


if __name__ == "__main__":
    main()
