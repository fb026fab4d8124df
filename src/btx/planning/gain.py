"""What a run's model gains over dense training at equal FLOPs, predicted before anything is trained.

More experts lower the part of a loss that parameters are to blame for, and raise the part that data are (Ludziejewski
et al., arXiv 2502.05172, section 4): a mixture loses while the seed model has read few tokens a parameter, and wins
when it has read many. Continued from the seed model's loss on the law of either kind, that gives the sign and size of
dense minus mixture. Nothing of it is fitted to our runs; how far off it was in them is its uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from btx.model_files.card_tokens import card_tokens
from btx.model_files.hub import model_card
from btx.models.cost import ModelCost, config_cost
from btx.number_texts import count_text, ratio_text
from btx.planning.costs import Costs
from btx.run_folder.folder import RunFolder

ENOUGH = 10
"""Tokens a parameter from which the law says that a mixture of small models wins (docs/results.md)."""
BYTES_PER_TOKEN = 4.0
"""Where the text is not prepared yet, of a vocabulary of 32,768 entries or more. The law is in nats a token, the gain
per byte: fewer bytes a token, more gain."""
BYTES_PER_DOUBLING = 0.4
"""So many fewer for every halving below that: 2.4 of 2048 entries (measured: 2.45 in `gain`'s text, 2.98 in the demo's)
and 1.3 of 320 (1.4)."""
UNCERTAINTY = 0.02
"""Bits per byte: half as much again as the root mean square of outcome minus prediction in the runs of docs/results.md.
"""
UNCERTAIN_SHARE = 0.37
"""Of the gain, beside it: the root mean square of (outcome - prediction) / prediction in the two of these runs that are
farthest from 0, -0.038 and +0.036 (benchmarks/gain.json). Nearer to 0 it adds nothing that can be seen."""
CHECKED_RATIOS = (1.4, 48.0)
"""Tokens a parameter of these runs' seed models, from least to most."""
CHECKED_SHARES = (0.38, 1.04)
"""Their FLOPs after the seed model over the seed model's: up to 0.47, in the demo 1.04."""
FAR = 1.5
"""Times outside of either from which on it is said."""
PROPORTION = 1 / 3
"""Share of the seed model's FLOPs that is spent after it, for comparison with a run that spends less."""
SMALL = 0.1
"""A share of the seed model's tokens below which the law has little to gain from."""

# Table 2 of the paper: loss in nats a token of N active parameters after D tokens with E experts,
# A·Ê^δ·N^(α + γ ln Ê) + B·Ê^ω·D^(β + ζ ln Ê) + C, with 1/Ê = 1/(E - 1 + 1/(1/Es - 1/Em)) + 1/Em.
A, ALPHA, GAMMA, DELTA = 35.91, -0.1889, 0.0098, -0.2285
B, BETA, ZETA, OMEGA = 35.98, -0.1775, -0.0259, 0.5529
C, E_START, E_MAX = 1.3637, 2.0732, 290.4521


@dataclass(frozen=True)
class Prediction:
    """Dense minus btx at equal training FLOPs, mean over domains: positive where btx is better. `btx plan --json` and
    results.json have all fields."""

    seed_tokens: float
    """That the seed model has read."""
    tokens_per_parameter: float
    source: str
    """Where its tokens are known from."""
    gain: float
    """Bits per byte."""
    low: float
    high: float
    """One standard error to either side."""
    bytes_per_token: float
    phase_share: float
    """Tokens of dense training for the FLOPs after the seed model, as a share of those it has read."""
    gain_in_proportion: float
    """Bits per byte, were that share `PROPORTION`."""


def law_loss(active_params: float, tokens: float, experts: float) -> float:
    """Nats a token of a model of `experts` experts (1: dense), as the law says."""
    hat = 1 / (1 / (experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)
    log = math.log(hat)
    of_parameters = A * hat**DELTA * active_params ** (ALPHA + GAMMA * log)
    of_data = B * hat**OMEGA * tokens ** (BETA + ZETA * log)
    return of_parameters + of_data + C


def law_tokens(active_params: float, loss: float, experts: float) -> float:
    """Tokens after which the law has this loss; infinite where it never has."""
    low, high = 1.0, 1e30
    if law_loss(active_params, high, experts) > loss:
        return math.inf
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if law_loss(active_params, middle, experts) > loss else (low, middle)
    return high


def law_gain(dense: ModelCost, mixture: ModelCost, experts: int, seed_tokens: float, flops: float,
             sequence_length: int) -> float:  # fmt: skip
    """Nats a token that a mixture gains over a dense model when both train with `flops` more from the same seed model.

    Each goes on from the tokens after which its own law has the seed model's loss.
    """
    loss = law_loss(dense.active_params, seed_tokens, 1)
    begun = law_tokens(mixture.active_params, loss, experts)
    more_dense, more = (flops / cost.training_flops_per_token(sequence_length) for cost in (dense, mixture))
    return (law_loss(dense.active_params, seed_tokens + more_dense, 1)
            - law_loss(mixture.active_params, begun + more, experts))  # fmt: skip


def predict_gain(run: RunFolder, dense_config: dict[str, Any], mixture: ModelCost, costs: Costs) -> Prediction | None:
    """What `btx plan` predicts of a run; None where nobody says how much the seed model has read.

    Args:
        mixture: size and cost of the run's own model.
        costs: of the run's stages.
    """
    recipe, dense = run.recipe, config_cost(dense_config)
    seed_tokens, source = tokens_read(run, dense.total_params, costs)
    if not seed_tokens:
        return None
    bytes_per_token = bytes_per_token_of(run) or usual_bytes_per_token(dense_config)
    length = recipe.data.sequence_length
    flops, seed_flops = costs.behind("finetune").flops, seed_tokens * dense.training_flops_per_token(length)
    gain, in_proportion = (
        law_gain(dense, mixture, len(recipe.expert_names), seed_tokens, spent, length) / math.log(2) / bytes_per_token
        for spent in (flops, PROPORTION * seed_flops)
    )
    return Prediction(seed_tokens, seed_tokens / dense.total_params, source, gain, gain - uncertainty(gain),
                      gain + uncertainty(gain), bytes_per_token, flops / seed_flops, in_proportion)  # fmt: skip


def uncertainty(gain: float) -> float:
    """Standard error of a predicted gain, both in bits per byte."""
    return math.hypot(UNCERTAINTY, UNCERTAIN_SHARE * gain)


def tokens_read(run: RunFolder, parameters: int, costs: Costs) -> tuple[float, str]:
    """Tokens that the seed model has read, and where that is known from; 0 where nobody says.

    Args:
        parameters: of the seed model: a card may tell of several models.
    """
    seed = run.recipe.seed_model
    if seed.config is not None:
        return costs["seed"].tokens, "the recipe"
    if seed.pretrained_tokens is not None:
        return seed.pretrained_tokens, "seed_model.pretrained_tokens"
    assert seed.path is not None  # the schema guarantees it
    there = run.model("seed") if run.model("seed").exists() else seed.path
    card = model_card(there, seed.revision, may_fetch=seed.plan_config is None)
    tokens, numbers = card_tokens(card, parameters)
    if len(numbers) < 2:
        return tokens, f"the card of {seed.path}"
    return tokens, (f"the card of {seed.path}, the most of {', '.join(map(count_text, numbers))} there; "
                    f"seed_model.pretrained_tokens says which")  # fmt: skip


def bytes_per_token_of(run: RunFolder) -> float | None:
    """Mean over the prepared domains; None before any is."""
    ratios = []
    for domain in run.prepared():
        done = run.done(f"data/{domain}") or {}
        if tokens := done.get("train_tokens", 0) + done.get("val_tokens", 0):
            ratios.append(done["bytes"] / tokens)
    return sum(ratios) / len(ratios) if ratios else None


def usual_bytes_per_token(dense_config: Mapping[str, Any]) -> float:
    """What the size of the vocabulary says of it, before there is text to count."""
    halvings = max(0.0, math.log2(32_768 / dense_config.get("vocab_size", 32_768)))
    return max(1.0, BYTES_PER_TOKEN - BYTES_PER_DOUBLING * halvings)


def gain_notes(prediction: Prediction | None) -> list[str]:
    """What `btx plan` says of it."""
    if prediction is None:
        return ["gain over dense training: not predicted, as nobody says how many tokens the seed model has read; "
                "seed_model.pretrained_tokens does"]  # fmt: skip
    said = (
        f"the seed model has read {ratio_text(prediction.tokens_per_parameter, ENOUGH)} tokens a parameter (by "
        f"{prediction.source}); predicted gain over dense training at equal FLOPs: {prediction.gain:+.3f} ± "
        f"{uncertainty(prediction.gain):.2f} bits per byte at {prediction.bytes_per_token:.1f} bytes a token (law of "
        f"arXiv 2502.05172, docs/results.md){_far_text(prediction)}"
    )
    short = (
        f"the training after the seed model is {100 * prediction.phase_share:.2g} % of its tokens: were it a third, "
        f"the law would say {prediction.gain_in_proportion:+.3f}; of text unlike the seed model's it knows nothing"
    )
    return [said, *_warnings(prediction), *[short] * (prediction.phase_share < SMALL)]


def _warnings(prediction: Prediction) -> list[str]:
    """That a mixture may not pay: always below `ENOUGH`, where all runs lost, and wherever the law says so."""
    loses, then = round(prediction.gain, 3) < 0, "train the seed model longer, or branch one that was"
    if prediction.tokens_per_parameter >= ENOUGH:
        return [f"warning: a mixture is expected to lose to dense training here: {then}"] if loses else []
    few = f"warning: below {ENOUGH} tokens a parameter a mixture"
    if loses:
        return [f"{few} is expected to gain nothing over dense training, or to lose: {then}"]
    return [f"{few} gained nothing over dense training in any run of docs/results.md, though the law says otherwise of "
            f"this one: {then}"]  # fmt: skip


def _far_text(prediction: Prediction) -> str:
    """Which of two numbers are nothing like those of the runs that the law was checked on."""
    ratio, share = prediction.tokens_per_parameter, prediction.phase_share
    low, high = CHECKED_RATIOS
    least, most = CHECKED_SHARES
    far = [f"{low:g} to {high:g} tokens a parameter"] * (not low / FAR <= ratio <= high * FAR)
    far += [f"{100 * least:.0f} to {100 * most:.0f} % of the seed model's FLOPs after it"] * (
        not least / FAR <= share <= most * FAR
    )
    return f"; far outside the runs it was checked on: they had {' and '.join(far)}" if far else ""
