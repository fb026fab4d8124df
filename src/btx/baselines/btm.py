"""Branch-Train-Merge, the baseline in which the experts stay whole models (BTX paper, section 4.1; arXiv 2208.03306).

For every token the K experts whose training text is most like the context so far are run, and their next-token
*distributions* are mixed, p = Σ_i w_i p_i. Weights: `btx.baselines.text_similarity`. The context is what the models
themselves have read before the token, never the token itself or anything after it, and never the domain a text comes
from.

A folder of this baseline holds no weights, only where the experts are:

    btm.json          members (name → model folder, relative), top_k, window, temperature
    similarity.npz    idf and mean tf-idf vectors
    and the tokenizer

Shape letters: B batch, S sequence, N member models, R scored tokens, T texts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from btx.baselines.btm_model import ON_CPU, SIMILARITY, weights_of
from btx.baselines.text_similarity import WINDOW, TextSimilarity
from btx.data.expert_text import TextRows
from btx.data.held_out import HeldOutDocument, Packed, pack
from btx.data.tokenizer import save_tokenizer
from btx.errors import UserError
from btx.files import atomic_folder, write_json
from btx.model_files.model_folder import BTM_FILE
from btx.models.loading import load_tokenizer
from btx.models.outputs import MICRO_BATCH_TOKENS, token_nll
from btx.models.placement import Place, load_placed

PIECE_TOKENS = 256
"""Its documents are cut into pieces of so many tokens at most: contexts are not much longer."""
TEMPERATURES = tuple(float(f"{value:.3g}") for value in np.geomspace(0.005, 1.0, 24))
"""Among these T is chosen."""
ASIDE_EVERY = 8
"""One piece in so many decides T instead of what the members are compared by..."""
MOST_ASIDE = 32
"""...up to so many pieces of each member."""


def write_btm_folder(
    folder: Path, models: Mapping[str, Path], texts: Mapping[str, TextRows], *, top_k: int, window: int = WINDOW,
    place: Place = ON_CPU,
) -> float:  # fmt: skip
    """Write a folder that `BtmModel.load` reads.

    T is the one of `TEMPERATURES` with which the models give some text of all of them, put aside from what contexts are
    compared with, the highest likelihood. It stays c-BTM's with too little text for that, and with `top_k` 1, where it
    changes nothing.

    Args:
        folder: takes the place of what is there.
        models: name → folder of a dense model; all share one tokenizer, the last one's is copied.
        texts: name → rows of the text it was trained on.
        top_k: models mixed for a token.
        window: tokens after which the context is looked at again.
        place: where the models are run, one after the other, to choose T.

    Returns:
        T, the temperature of the weights.

    Raises:
        UserError: `top_k` is above the number of models.
        DataError: a model without text.
    """
    if top_k > len(models):
        raise UserError(f"btm_top{top_k}: there are only {len(models)} models: {', '.join(models)}")
    tokenizer = load_tokenizer(list(models.values())[-1])
    highest = max(int(rows.input_ids_BS.max(initial=0)) for rows in texts.values())
    pieces = {name: pieces_of(texts[name]) for name in models}
    aside = [_put_aside(of_member) for of_member in pieces.values()]
    similarity = TextSimilarity.fit(pieces, max(len(tokenizer), highest + 1), special=tokenizer.all_special_ids)
    if top_k > 1 and all(aside):
        rows = [pack([HeldOutDocument(piece, 1) for piece in of_member if len(piece) > 1], PIECE_TOKENS)
                for of_member in aside]  # fmt: skip
        best = best_temperature(similarity, list(models.values()), rows, top_k=top_k, window=window, place=place)
        similarity = replace(similarity, temperature=best)
    with atomic_folder(folder) as beside:
        similarity.save(beside / SIMILARITY)
        save_tokenizer(tokenizer, beside)
        write_json(beside / BTM_FILE, {
            "members": {name: os.path.relpath(path, folder) for name, path in models.items()},
            "top_k": top_k, "window": window, "temperature": similarity.temperature,
            "text_tokens": {name: texts[name].tokens for name in models},
        })  # fmt: skip
    return similarity.temperature


def _put_aside(pieces: list[np.ndarray]) -> list[np.ndarray]:
    """Take some of a member's pieces out; none of a single one."""
    taken = slice(None, ASIDE_EVERY * MOST_ASIDE, ASIDE_EVERY)
    aside = pieces[taken] if len(pieces) > 1 else []
    if aside:
        del pieces[taken]
    return aside


def best_temperature(
    similarity: TextSimilarity, models: Sequence[Path], texts: Sequence[Packed], *, top_k: int, window: int,
    place: Place,
) -> float:  # fmt: skip
    """The one of `TEMPERATURES` with the lowest mixed negative log-likelihood a token; every text counts the same.

    Each model reads all texts once; then the likelihoods are mixed with the weights of every temperature.
    """
    nll_TNR = [torch.empty(len(models), int(rows.scored_BS.sum())) for rows in texts]
    for number, path in enumerate(models):
        model = load_placed(path, place)
        for nll_NR, rows in zip(nll_TNR, texts, strict=True):
            nll_NR[number] = torch.cat([token_nll(model, part).cpu() for part in rows.batches(MICRO_BATCH_TOKENS)])
    totals = []
    for temperature in TEMPERATURES:
        tried = replace(similarity, temperature=temperature)
        total = 0.0
        for nll_NR, rows in zip(nll_TNR, texts, strict=True):
            weights_NR = weights_of(rows, tried, top_k, window)[rows.scored_BS].T
            total -= float((weights_NR.log() - nll_NR).logsumexp(dim=0).mean())
        totals.append(total)
    return TEMPERATURES[int(np.argmin(totals))]


def pieces_of(rows: TextRows) -> list[np.ndarray]:
    """A text's documents, cut where a row ends and after `PIECE_TOKENS` tokens."""
    pieces = []
    for ids_S, positions_S in zip(rows.input_ids_BS, rows.position_ids_BS, strict=True):
        starts = np.flatnonzero(positions_S == 0)
        for document in np.split(ids_S, starts[starts > 0]):
            pieces += [document[start : start + PIECE_TOKENS] for start in range(0, len(document), PIECE_TOKENS)]
    return pieces
