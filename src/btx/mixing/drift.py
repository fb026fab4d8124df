"""How far the experts have drifted from the seed model and from each other: what averaging will lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from btx.model_files.lazy_tensors import FileTensor

SAMPLED_ELEMENTS = 2**16
"""Elements of one tensor looked at: a tensor's cosine is right to about 0.004, that of a group of tensors to less."""
_BLOCK = 2**12


@dataclass
class Drift:
    """Inner products of the experts' task vectors, summed over the tensors of a group."""

    gram_EE: Tensor
    seed_square: float = 0.0
    """Squared norm of the seed model's tensors."""
    tensors: int = 0

    def summary(self) -> dict[str, Any]:
        """Each expert's mean cosine with the others and the mean of all, norms, ‖mean Δ‖ / mean ‖Δ‖ and spread of the
        group.

        `spread` is how far the experts are from their own mean, √(mean_i ‖Δ_i - Δ̄‖²) / ‖θ_seed‖: what averaging does to
        an expert's weights, relative to their size.
        """
        E, seed_norm = len(self.gram_EE), self.seed_square**0.5
        from_mean = float(self.gram_EE.trace()) / E - float(self.gram_EE.sum()) / E**2
        norms_E = self.gram_EE.diagonal().sqrt()
        return {
            "tensors": self.tensors,
            "task_vector_norms": norms_E.tolist(),
            "cosines": cosines_with_others(self.gram_EE),
            "mean_cosine": mean_cosine(self.gram_EE),
            "mean_norm_ratio": norm_ratio(self.gram_EE),
            "relative_norms": [norm / seed_norm if seed_norm else None for norm in norms_E.tolist()],
            "spread": max(from_mean, 0.0) ** 0.5 / seed_norm if seed_norm else None,
        }


@dataclass
class Drifts:
    """Drift of every tensor and group of tensors."""

    groups: dict[str, Drift] = field(default_factory=dict)
    tensors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Two numbers a tensor: those of all pairs would be the larger part of a record of many experts."""

    def add(self, name: str, group: str, experts: Sequence[FileTensor], start: FileTensor) -> None:
        """Measure one tensor; it also counts into its group."""
        gram_EE, seed_square = gram(experts, start)
        drift = self.groups.setdefault(group, Drift(torch.zeros_like(gram_EE)))
        drift.gram_EE = drift.gram_EE + gram_EE
        drift.seed_square += seed_square
        drift.tensors += 1
        self.tensors[name] = {"mean_cosine": mean_cosine(gram_EE), "mean_norm_ratio": norm_ratio(gram_EE)}

    def summary(self) -> Mapping[str, dict[str, Any]]:
        """Group → its summary."""
        return {group: drift.summary() for group, drift in self.groups.items()}


def gram(experts: Sequence[FileTensor], start: FileTensor) -> tuple[Tensor, float]:
    """Inner products (E, E) of the experts' task vectors in one tensor, float64, and the seed tensor's squared norm.

    Tensors of more than `SAMPLED_ELEMENTS` are measured on evenly spaced blocks, scaled up to the whole.
    """
    origin = _sample(start).double()
    vectors_EN = torch.stack([_sample(expert).double() for expert in experts]).sub_(origin)
    gram_EE, seed_square = vectors_EN @ vectors_EN.T, float(origin.square().sum())
    scale = start.numel / max(1, origin.numel())
    return gram_EE * scale, seed_square * scale


def _sample(tensor: FileTensor) -> Tensor:
    """All elements of a tensor, or about `SAMPLED_ELEMENTS` of them in evenly spaced blocks; flat and finite."""
    if tensor.numel <= SAMPLED_ELEMENTS:
        return tensor.finite(0, tensor.numel)
    blocks = SAMPLED_ELEMENTS // _BLOCK
    starts = [(tensor.numel - _BLOCK) * number // (blocks - 1) for number in range(blocks)]
    return torch.cat([tensor.finite(start, start + _BLOCK) for start in starts])


def cosines_with_others(gram_EE: Tensor) -> list[float | None]:
    """Mean cosine of each task vector with the others; None for a zero one, and where no other is different from zero.

    Averaging keeps what experts agree on: cosines near 1 mean that the mean loses nothing, cosines near 0 that every
    expert keeps only 1/N of its own change. Pair by pair they would grow with the square of the experts.
    """
    norms_E = gram_EE.diagonal().sqrt()
    moved_E = norms_E > 0
    scale_E = torch.where(moved_E, 1 / norms_E, 0.0)
    cosines_EE = gram_EE * scale_E[:, None] * scale_E
    others = int(moved_E.sum()) - 1
    sums_E = cosines_EE.sum(dim=1) - cosines_EE.diagonal()
    return [
        float(total) / others if moved and others > 0 else None for total, moved in zip(sums_E, moved_E, strict=True)
    ]


def mean_cosine(gram_EE: Tensor) -> float | None:
    """Mean of the cosines of different task vectors; None if fewer than two are different from zero."""
    known = [cosine for cosine in cosines_with_others(gram_EE) if cosine is not None]
    return sum(known) / len(known) if known else None


def norm_ratio(gram_EE: Tensor) -> float | None:
    """‖mean Δ‖ / mean ‖Δ‖: 1 when the experts moved alike, 1/√N when they moved apart; None when none moved."""
    mean_norm = float(gram_EE.diagonal().sqrt().mean())
    return float(gram_EE.sum().clamp(min=0).sqrt()) / len(gram_EE) / mean_norm if mean_norm else None


def group_of(name: str) -> str:
    """The part of the model a shared tensor belongs to."""
    for mark, group in (("embed", "embeddings"), ("lm_head", "lm_head"), ("attn", "attention"), ("norm", "norms")):
        if mark in name:
            return group
    return "other"
