"""`btx analyze MODEL`: the routing of any MoE model of transformers on anybody's text, with the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btx.data.held_out import HeldOutDocument, shortened
from btx.data.token_files import DocumentEncoder
from btx.data.token_texts import UNFINISHED, decoded
from btx.errors import CheckpointError, DataError
from btx.evaluation.analysis_request import dropped_experts
from btx.evaluation.analyze import HALVES, Analysis, DomainText, say
from btx.evaluation.any_model import keeps_apart, load_any
from btx.evaluation.kept_experts import TOKENS as CURVE_TOKENS
from btx.evaluation.routed_text import EXAMPLE_TOKENS
from btx.files import atomic_folder, write_json
from btx.models.expert_names import names_of_experts
from btx.models.loading import load_tokenizer
from btx.models.measuring_memory import SCORING
from btx.moe.any_moe import num_experts
from btx.number_texts import decimal_text, spread
from btx.process import Log
from btx.reporting.report import write_report
from btx.reporting.tokens import own_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL = "general"
"""The domain whose expert is the generalist, as in a recipe that says nothing else."""
SEQUENCE_LENGTH = 512
"""Tokens that are read at once, at most."""


def analyze_model(
    path: str | Path, texts: Mapping[str, Sequence[str]], output: Path, *, tokens: int, examples: int,
    without: Sequence[str] = (), log: Log = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Route text of several domains through a MoE model; write routing.json, tokens.json and the report's page.

    Args:
        texts: domain → its documents.
        output: folder to write; it appears when it is complete.
        tokens: of each domain, at most.
        examples: documents of each domain shown token by token.
        without: names of experts that tokens may not use.

    Returns:
        routing.json, as written.

    Raises:
        CheckpointError: the model cannot be loaded, is dense, or has routers that nobody can read.
        DataError: a domain's text is too short.
        UserError: `without` names what is not there.
    """
    model, tokenizer = cast("PreTrainedModel", load_any(path, log, SCORING)), load_tokenizer(path)
    if not num_experts(cast(Any, model)):
        raise CheckpointError(f"{path}: {type(model).__name__} has no MoE layer that btx finds: no router beside "
                              f"experts")  # fmt: skip
    names = names_of_experts(model, Path(path))
    longest = int(getattr(model.config, "max_position_embeddings", None) or SEQUENCE_LENGTH)
    analysis = Analysis(
        names, own_experts(texts, names, GENERAL), min(SEQUENCE_LENGTH, longest), dropped_experts(without, names),
        apart=not keeps_apart(model),
    )  # fmt: skip
    domains = {domain: _text_of(domain, documents, tokenizer, tokens, examples) for domain, documents in texts.items()}
    routing, shown = analysis.of(model, tokenizer, domains)
    routing["model"] = str(path)
    with atomic_folder(output) as folder:
        write_json(folder / "routing.json", routing)
        write_json(folder / "tokens.json", shown)
        write_report(folder, folder)
    say(routing, GENERAL, log)
    first, last = routing["kept"][0], routing["kept"][-1]
    dropped = f"; without {', '.join(without)} {decimal_text(last['mean'])}" if without else ""
    log(f"mean {decimal_text(first['mean'])} bits per byte with all experts{dropped}")
    return routing


def _text_of(
    domain: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int, examples: int
) -> DomainText:
    """What the routing of a domain is looked at on: its first documents."""
    encoder = DocumentEncoder(tokenizer)
    encoded = [HeldOutDocument(np.array(ids, np.int64), len(text.encode()))
               for text in documents if len(ids := encoder.beginning(text)) > 1]  # fmt: skip
    if not encoded:
        raise DataError(f"--text {domain}: no document has a token")
    shown = [document.start(EXAMPLE_TOKENS) for document in spread(encoded, examples)]
    starts = (document.tokens[1 : SEQUENCE_LENGTH // 2] for document in spread(encoded, HALVES))
    halves = [text for start in starts if len((text := decoded(tokenizer, start).strip(UNFINISHED)).split()) > 1]
    counted, curve = (_up_to(encoded, most, tokenizer) for most in (tokens, CURVE_TOKENS))
    return DomainText(counted, curve, shown, halves)


def _up_to(
    documents: Sequence[HeldOutDocument], tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[HeldOutDocument]:
    """The first documents up to so many text tokens, the last one cut."""
    chosen: list[HeldOutDocument] = []
    for document in documents:
        if tokens < 1:
            break
        chosen.append(shortened(document, tokens, tokenizer))
        tokens -= len(chosen[-1].tokens) - 1
    return chosen
