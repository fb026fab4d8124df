"""The report's token readers: documents and answers, token by token, coloured by the experts of a layer.

The first documents are in the page as they stand; the page's script (templates/report.js) takes them over, and shows
the others, other layers, the bits of tokens and other models from the reader's JSON.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from btx.errors import RunFolderError
from btx.number_texts import is_number
from btx.reporting.page_data import script_text
from btx.reporting.run_files import Run, read_run
from btx.reporting.tokens import RoutedText, Token, own_expert, parts, routed_text, same_text

MODEL = "btx"
MAX_CHOICES = 3_000_000
"""Experts of tokens in a reader, all layers together: about 5 bytes each, so 15 MB; tokens beyond are left out."""
SCREEN_TOKENS = 2000
"""Tokens on the screen at once, if documents are no longer; documents are turned like pages."""
SCREEN_DOCUMENTS = 4
"""On the screen at once, and as many more as every domain has its turn."""
ANALYSE = (
    "`btx analyze RUN` finds out which experts the tokens of a run use, `btx analyze MODEL --text NAME=FILE` those of "
    "any other model"
)
MAX_LEGEND = 6  # experts; with more, the pairs follow from the single experts' colours


@dataclass(frozen=True)
class Document:
    """A document or answer: its domain, the in-domain expert's index (None if there is none), which part of a long one
    it is, its tokens if it is among those that are seen first, and the answer that it is of."""

    domain: str
    own: int | None
    part: str
    tokens: list[Token]
    answer: Mapping[str, Any] | None


@dataclass(frozen=True)
class Reader:
    """Everything a token reader offers."""

    model: str
    """The one whose tokens are shown."""
    experts: list[str]
    layers: int
    documents: list[Document]
    legend: list[tuple[int, int]]
    """Pairs of experts; none for a Top-1 router."""
    measured: list[str]
    """Models whose bits every token has."""
    baselines: list[str]
    """Of these, those of which one is chosen, the best first."""
    beside: list[str]
    """Models that can stand beside it on the same text."""
    first_beside: str
    """The one that stands there at first; "" if none does."""
    left_out: int
    """Tokens that would have made the page too large."""
    data: str
    """JSON for the script."""

    @property
    def domains(self) -> list[str]:
        """Domains of the documents, each once."""
        return list(dict.fromkeys(document.domain for document in self.documents))

    @property
    def layer(self) -> int:
        """The one that is shown first."""
        return self.layers // 2


def token_readers(run: Run, other: Run | None = None) -> dict[str, Reader]:
    """The readers of a run: "tokens", its documents, and "answers"; those that it has anything for.

    Args:
        other: a run or analysed model whose model is shown beside, where it has routed the same text.
    """
    readers = {}
    for name, key in (("tokens", "examples"), ("answers", "answers")):
        documents = [document for document in run.tokens.get(key, []) if document["tokens"]]
        if documents:
            readers[name] = _reader(run, documents, _beside(run, documents, other), other)
    return readers


def read_beside(run: Run, folder: Path) -> Run:
    """The other run or analysed model.

    Raises:
        RunFolderError: it is neither, it or `run` is not analysed yet, or they show no text that is the same.
    """
    other = read_run(folder)
    if not other.recipe and not other.of_model:
        raise RunFolderError(f"{folder}: neither a run folder (recipe.yaml is missing) nor an analysed model's "
                             f"(routing.json); {ANALYSE}")  # fmt: skip
    for each in (run, other):
        if not each.tokens.get("examples"):
            raise RunFolderError(f"{each.folder}: its analysis shows no tokens, so nothing can stand side by side; "
                                 f"{ANALYSE}")  # fmt: skip
    if _name_beside(run, other) not in _beside(run, run.tokens["examples"], other):
        raise RunFolderError(f"{folder}: its analysis shows no text that {run.folder} shows too, so nothing can stand "
                             f"side by side; {ANALYSE}")  # fmt: skip
    return other


def _name_beside(run: Run, other: Run) -> str:
    return other.name if other.name not in (run.name, _model(run)) else str(other.folder)


def _beside(run: Run, documents: Sequence[Mapping[str, Any]], other: Run | None) -> dict[str, dict[int, RoutedText]]:
    """Other model → number of the document → the same text as that model routes it."""
    texts: dict[str, dict[int, RoutedText]] = {}
    for number, document in enumerate(documents):
        for model, route in document.get("routes", {}).items():
            texts.setdefault(model, {})[number] = routed_text(model, {**route, "tokens": document["tokens"]})
    if other is not None:
        name = _name_beside(run, other)
        theirs = [
            routed_text(name, {**each, "losses": {name: each.get("losses", {}).get(_model(other), [])}})
            for each in other.tokens.get("examples", [])
        ]
        for number, document in enumerate(documents):
            text = routed_text(_model(run), document)
            if (same := next((each for each in theirs if same_text(text, each)), None)) is not None:
                texts.setdefault(name, {})[number] = same
    return texts


def _model(run: Run) -> str:
    """The model whose routing was analysed."""
    return run.name if run.of_model else MODEL


def _reader(
    run: Run, documents: Sequence[Mapping[str, Any]], beside: Mapping[str, Mapping[int, RoutedText]], other: Run | None
) -> Reader:
    experts, layers, own_model = list(run.tokens["experts"]), int(run.tokens["layers"]), _model(run)
    texts = [routed_text(own_model, document) for document in documents]
    width = sum(len(layer) for layer in texts[0].experts[0]) * (1 + len(beside))
    budget, on_screen, left_out = MAX_CHOICES // max(1, width), 0, 0
    domains = len({document["domain"] for document in documents})
    most = domains * -(-SCREEN_DOCUMENTS // domains)
    shown: list[Document] = []
    data: list[dict[str, Any]] = []
    for number in _in_turn([document["domain"] for document in documents]):
        document, text = documents[number], texts[number]
        in_domain = own_expert(document["domain"], experts, run.general)
        cuts = parts([text, *(routed[number] for routed in beside.values() if number in routed)])
        for place, cut in enumerate(cuts, 1):
            count = len(cut[0].tokens)
            budget -= count
            if budget < 0:
                left_out += count
                continue
            on_screen += count
            seen = range(count if not shown or (on_screen <= SCREEN_TOKENS and len(shown) < most) else 0)
            shown.append(Document(
                document["domain"], in_domain, f"part {place} of {len(cuts)}" if len(cuts) > 1 else "",
                [cut[0].token(t, layers // 2, in_domain) for t in seen], document if "answers" in document else None,
            ))  # fmt: skip
            data.append({
                "domain": document["domain"], "own": in_domain, "texts": {each.model: each.data() for each in cut},
            })  # fmt: skip
    measured = list(dict.fromkeys(model for text in texts for model in text.bits))
    names = {own_model: experts} | {model: _experts_of(model, routed, run, other) for model, routed in beside.items()}
    baselines = [model for model in _best_first(run) if model in measured and model not in ("seed", MODEL)
                 and not model.startswith("expert/")]  # fmt: skip
    return Reader(
        own_model, experts, layers, shown, _legend(experts, texts), measured, baselines, list(beside),
        list(beside)[-1] if beside and other is not None else "", left_out,
        script_text({
            "model": own_model, "experts": names, "screen": SCREEN_TOKENS, "most": most, "documents": data,
            "shown": [model for model in measured if model not in baselines],
        }),
    )  # fmt: skip


def _in_turn(domains: Sequence[str]) -> list[int]:
    """Numbers of the documents, a document of each domain in turn."""
    met: Counter[str] = Counter()
    turns = []
    for number, domain in enumerate(domains):
        turns.append((met[domain], number))
        met[domain] += 1
    return [number for _, number in sorted(turns)]


def _experts_of(model: str, routed: Mapping[int, RoutedText], run: Run, other: Run | None) -> list[str]:
    """Names of a model's experts; copies of the seed model's have none but their numbers."""
    if model in run.routing.get("loads", {}):
        return list(run.tokens["experts"])
    if other is not None and model == _name_beside(run, other):
        return list(other.tokens["experts"])
    largest = max(e for text in routed.values() for token in text.experts for layer in token for e in layer)
    return [f"expert {number}" for number in range(largest + 1)]


def _best_first(run: Run) -> list[str]:
    """Models of the results, that with the fewest bits per byte first."""
    models = run.models

    def mean(name: str) -> float:
        value = models[name].get("mean_bits_per_byte")
        return value if is_number(value) else float("inf")

    return sorted(models, key=mean)


def _legend(experts: Sequence[str], texts: Sequence[RoutedText]) -> list[tuple[int, int]]:
    top_1 = all(len(layer) == 1 for text in texts for layer in text.experts[0])
    return [] if top_1 or len(experts) > MAX_LEGEND else list(combinations(range(len(experts)), 2))


@cache
def script() -> tuple[str, str]:
    """The page's own script, and its hash as a content policy names it."""
    text = (files("btx.reporting") / "templates" / "report.js").read_text("utf-8")
    return text, f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
