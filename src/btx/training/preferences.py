"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7) on packed pairs of answers.

    L = -log σ(β [(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))]),    mean over pairs

log π(y) is the sum over an answer's tokens. What the reference says of the answers is computed once, before training,
by the weights that training starts from: so it takes no second model in memory and no second forward pass a step.

Shape letters: B rows, S places, T = B·S tokens, D model, V vocabulary, A answers of a row, two by two pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.data.mixture import Batch
from btx.data.packed_conversations import NO_ANSWER, PackedPairs, PairBatch
from btx.files import read_json, write_sealed
from btx.models.packed import copied_to
from btx.models.sharding import added_up, as_forward, process_count, process_number, same_everywhere
from btx.process import note_progress
from btx.training.losses import head_inputs, linear_cross_entropy, token_losses

FILE = "reference.json"


class Reference(TypedDict):
    """reference.json: what the reference says of the answers."""

    data: str
    """Fingerprint of the pairs."""
    log_probs: list[list[float]]
    """Of each answer of each row (R, A)."""


def dpo_losses(margins: Tensor) -> Tensor:
    """-log σ of the pairs' margins, β [(log π/π_ref)(better) - (log π/π_ref)(worse)]."""
    return -F.logsigmoid(margins)


def preference_objective(beta: float) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """`TrainingJob.objective` of DPO: the summed loss of some rows' pairs; tells how often the better answer has gained
    more on the reference than the worse one (`reward_accuracy`), and by how much (`reward_margin`, β included)."""

    def objective(model: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(rows, PairBatch)
        hidden_TD, weight_VD, labels_T = _head_inputs(model, rows)
        answers_T, is_pair_P = _answers(rows, hidden_TD.device)
        losses_T = token_losses(hidden_TD, weight_VD, labels_T)
        reference_BA = copied_to(hidden_TD.device, torch.from_numpy(rows.reference))
        with torch.enable_grad():
            log_probs_N = _log_probs(losses_T, answers_T, reference_BA.numel()).requires_grad_()
            gained_P2 = (log_probs_N.view_as(reference_BA) - reference_BA).view(-1, 2)
            margins = beta * (gained_P2[:, 0] - gained_P2[:, 1])[is_pair_P]
            total = dpo_losses(margins).sum()
            (gradient_N,) = torch.autograd.grad(total, log_probs_N)
        # A token's cross-entropy is minus its part of its answer's log probability.
        factors_T = -F.pad(gradient_N, (0, 1))[answers_T]
        weighted = linear_cross_entropy(hidden_TD, weight_VD, labels_T, factors_T=factors_T)
        margins = margins.detach()
        return total.detach() + (weighted - weighted.detach()), {
            "reward_accuracy": (margins > 0).float().sum(), "reward_margin": margins.sum(),
        }  # fmt: skip

    return objective


def _head_inputs(model: nn.Module, rows: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return head_inputs(model, *map(torch.from_numpy, (rows.input_ids, rows.position_ids, rows.labels)))


def _answers(rows: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number among B·A answers that each token belongs to (T,), B·A for none; and which of the B·A/2 pairs are
    there."""
    B, A = rows.reference.shape
    numbers = np.where(rows.answers == NO_ANSWER, B * A, rows.answers + A * np.arange(B)[:, None])
    is_pair = np.arange(A // 2)[None, :] <= rows.answers.max(axis=1, keepdims=True) // 2
    return copied_to(device, torch.from_numpy(numbers.flatten())), copied_to(
        device, torch.from_numpy(is_pair.flatten())
    )


def _log_probs(losses_T: Tensor, answers_T: Tensor, count: int) -> Tensor:
    """Log probability of each of `count` answers: (count,)."""
    return -losses_T.new_zeros(count + 1).index_add(0, answers_T, losses_T)[:count]


def with_reference(
    pairs: PackedPairs, model: nn.Module, file: Path, *, rows_at_once: int, device: torch.device, in_bfloat16: bool
) -> PackedPairs:
    """The pairs with what `model` says of them. It is kept in `file`, so that a training which goes on compares with
    what it began with; several processes share the work, and the first writes.

    Args:
        model: the reference, with the weights that training starts from.
        rows_at_once: rows of a forward pass.
    """
    kept: Reference | None = read_json(file, Reference)
    if not same_everywhere(kept is not None and kept["data"] == pairs.fingerprint):
        found_RA = _reference(pairs, model.to(device), rows_at_once, device, in_bfloat16)
        if process_number() == 0:
            write_sealed(file, {"data": pairs.fingerprint, "log_probs": found_RA.tolist()})
        same_everywhere(None)  # it is there
        kept = read_json(file, Reference)
    assert kept is not None
    reference_RA = np.array(kept["log_probs"], np.float32)
    return PackedPairs(pairs.groups, pairs.sequence_length, pairs.rng_seed, reference_RA)


@torch.no_grad()
def _reference(
    pairs: PackedPairs, model: nn.Module, rows_at_once: int, device: torch.device, in_bfloat16: bool
) -> np.ndarray:  # fmt: skip
    """Log probability of each answer of each row (R, A)."""
    was_training = model.training
    model.eval()
    found_RA = torch.zeros(pairs.reference.shape, device=device)
    starts = list(range(0, len(pairs.rows), rows_at_once))
    for first in range(0, len(starts), process_count()):  # all processes compute as often: each holds a part of a model
        mine = first + process_number()
        start = starts[min(mine, len(starts) - 1)]
        rows = pairs.of_rows(range(start, min(start + rows_at_once, len(pairs.rows))))
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            log_probs = as_forward(model, partial(_of_rows, model, rows))
        if mine < len(starts):
            found_RA[start : start + len(log_probs)] = log_probs
        note_progress()
    model.train(was_training)
    return added_up(found_RA).cpu().numpy()


def _of_rows(model: nn.Module, rows: PairBatch) -> Tensor:
    """Log probability of each answer (B, A)."""
    hidden_TD, weight_VD, labels_T = _head_inputs(model, rows)
    answers_T, _ = _answers(rows, hidden_TD.device)
    return _log_probs(token_losses(hidden_TD, weight_VD, labels_T), answers_T, rows.reference.size).view(
        rows.reference.shape
    )  # fmt: skip
