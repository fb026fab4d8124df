"""What a run's model gains over dense training at equal FLOPs, predicted before anything is trained.

More experts lower the part of a loss that parameters are to blame for, and raise the part that data are (Ludziejewski
et al., arXiv 2502.05172, section 4): a mixture loses while the seed model has read few tokens a parameter, and wins
when it has read many. Continued from the seed model's loss on the law of either kind, that gives the sign and size of
dense minus mixture. Nothing of it is fitted to our runs; how far off it was in them is its uncertainty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from btx.model_files.card_tokens import card_tokens
from btx.model_files.hub import model_card
from btx.models.cost import ModelCost, config_cost
from btx.number_texts import count_text
from btx.planning.costs import Costs
from btx.run_folder.folder import RunFolder

ENOUGH = 10
"""Tokens a parameter from which the law says that a mixture of small models wins (docs/results.md)."""
BYTES_PER_TOKEN = 4.0
"""Where the text is not prepared yet. The law is in nats a token, the gain per byte: fewer bytes a token, more gain."""
UNCERTAINTY = 0.02
"""Bits per byte: half as much again as the root mean square of outcome minus prediction in the runs of docs/results.md.
Their FLOPs after the seed model were 0.38 to 0.47 of the seed model's, in the demo 1.04."""
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
    bytes_per_token, length = bytes_per_token_of(run) or BYTES_PER_TOKEN, recipe.data.sequence_length
    flops, seed_flops = costs.behind("finetune").flops, seed_tokens * dense.training_flops_per_token(length)
    gain, in_proportion = (
        law_gain(dense, mixture, len(recipe.expert_names), seed_tokens, spent, length) / math.log(2) / bytes_per_token
        for spent in (flops, PROPORTION * seed_flops)
    )
    return Prediction(seed_tokens, seed_tokens / dense.total_params, source, gain, gain - UNCERTAINTY,
                      gain + UNCERTAINTY, bytes_per_token, flops / seed_flops, in_proportion)  # fmt: skip


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


def gain_notes(prediction: Prediction | None) -> list[str]:
    """What `btx plan` says of it."""
    if prediction is None:
        return ["gain over dense training: not predicted, as nobody says how many tokens the seed model has read; "
                "seed_model.pretrained_tokens does"]  # fmt: skip
    ratio = prediction.tokens_per_parameter
    said = (
        f"the seed model has read {_ratio_text(ratio)} tokens a parameter (by {prediction.source}); "
        f"predicted gain over dense training at equal FLOPs: {prediction.gain:+.3f} ± {UNCERTAINTY:.2f} bits per byte "
        f"at {prediction.bytes_per_token:.1f} bytes a token (law of arXiv 2502.05172, docs/results.md)"
    )
    short = (
        f"the training after the seed model is {100 * prediction.phase_share:.2g} % of its tokens: were it a third, "
        f"the law would say {prediction.gain_in_proportion:+.3f}; of text unlike the seed model's it knows nothing"
    )
    few = (
        f"warning: below {ENOUGH} tokens a parameter a mixture is expected to gain nothing over dense training, or to "
        f"lose: train the seed model longer, or branch one that was"
    )
    return [said] + [few] * (ratio < ENOUGH) + [short] * (prediction.phase_share < SMALL)


def _ratio_text(ratio: float) -> str:
    """Tokens a parameter; of a number that nobody can mean, as of 15 for 15 trillion, how large it is."""
    if 0.1 <= ratio < 1e6:
        return f"{ratio:,.{0 if ratio >= 100 else 1}f}"
    return f"{ratio:.2g}"
