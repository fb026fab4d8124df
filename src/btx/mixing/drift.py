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
        """Cosines, norms, ‖mean Δ‖ / mean ‖Δ‖ and spread of the group.

        `spread` is how far the experts are from their own mean, √(mean_i ‖Δ_i - Δ̄‖²) / ‖θ_seed‖: what averaging does to
        an expert's weights, relative to their size.
        """
        E, seed_norm = len(self.gram_EE), self.seed_square**0.5
        from_mean = float(self.gram_EE.trace()) / E - float(self.gram_EE.sum()) / E**2
        norms_E = self.gram_EE.diagonal().sqrt()
        pairs = [cosine for row in cosines(self.gram_EE) for cosine in row if cosine is not None]
        own = sum(norm > 0 for norm in norms_E.tolist())  # each expert's cosine with itself, 1
        pairs_left = len(pairs) - own
        return {
            "tensors": self.tensors,
            "task_vector_norms": norms_E.tolist(),
            "mean_cosine": (sum(pairs) - own) / pairs_left if pairs_left else None,
            "mean_norm_ratio": norm_ratio(self.gram_EE),
            "relative_norms": [norm / seed_norm if seed_norm else None for norm in norms_E.tolist()],
            "spread": max(from_mean, 0.0) ** 0.5 / seed_norm if seed_norm else None,
        }


@dataclass
class Drifts:
    """Drift of every tensor and group of tensors."""

    groups: dict[str, Drift] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, group: str, experts: Sequence[FileTensor], start: FileTensor) -> None:
        """Measure one tensor; it also counts into its group."""
        gram_EE, seed_square = gram(experts, start)
        drift = self.groups.setdefault(group, Drift(torch.zeros_like(gram_EE)))
        drift.gram_EE = drift.gram_EE + gram_EE
        drift.seed_square += seed_square
        drift.tensors += 1
        self.tensors[name] = {"cosines": cosines(gram_EE), "mean_norm_ratio": norm_ratio(gram_EE)}

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


def cosines(gram_EE: Tensor) -> list[list[float | None]]:
    """Cosine between each pair of task vectors; None where a task vector is zero.

    Averaging keeps what experts agree on: cosines near 1 mean that the mean loses nothing, cosines near 0 that every
    expert keeps only 1/N of its own change.
    """
    norms = gram_EE.diagonal().sqrt().tolist()
    return [
        [value / (a * b) if a and b else None for value, b in zip(row, norms, strict=True)]
        for row, a in zip(gram_EE.tolist(), norms, strict=True)
    ]


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
