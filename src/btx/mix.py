"""Mix expert models into one MoE model (paper, section 2.2).

In every layer the experts' FF sublayers become the experts of one MoE layer, copied bit for bit; every other weight is
the float32 mean over the experts (the generalist included); the routers are new. Tensors are streamed one at a time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx import merge, router_init
from btx.checkpoints import TensorFolder, require_finite, write_shards
from btx.errors import CheckpointError
from btx.families import Config, Family, family_of
from btx.folders import atomic_folder, write_json
from btx.models import copy_beside_weights, read_config

GENERALIST = "generalist"

# Values that may differ between the seed model and an expert without changing what the tensors mean.
HARMLESS_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pad_token_id", "name_or_path",
}  # fmt: skip


@dataclass
class Drift:
    """Inner products of the experts' task vectors, summed over the tensors of a group."""

    gram_EE: Tensor
    tensors: int = 0

    def add(self, task_vectors: list[Tensor]) -> None:
        """Take one more tensor into the group."""
        flat_EN = torch.stack([vector.flatten().double() for vector in task_vectors])
        self.gram_EE = self.gram_EE + flat_EN @ flat_EN.T
        self.tensors += 1

    def summary(self) -> dict[str, Any]:
        """Cosines, norms and ‖mean Δ‖ / mean ‖Δ‖ of the group."""
        norms_E = self.gram_EE.diagonal().sqrt()
        E, mean_norm = len(norms_E), float(norms_E.mean())
        pairs = [
            float(self.gram_EE[i, j] / (norms_E[i] * norms_E[j]))
            for i in range(E) for j in range(i) if norms_E[i] > 0 and norms_E[j] > 0
        ]  # fmt: skip
        return {
            "tensors": self.tensors,
            "task_vector_norms": norms_E.tolist(),
            "mean_cosine": sum(pairs) / len(pairs) if pairs else None,
            "mean_norm_ratio": float(self.gram_EE.sum().clamp(min=0).sqrt()) / E / mean_norm if mean_norm else None,
        }


@dataclass
class Mixture:
    """The models of one mix, opened, checked against each other and ready to stream."""

    seed_model: Path
    experts: dict[str, Path]
    generalist: bool
    config: Config
    family: Family
    seed_tensors: TensorFolder
    expert_tensors: dict[str, TensorFolder]
    origins: dict[str, Any] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)

    @property
    def members(self) -> dict[str, TensorFolder]:
        """Everything that becomes an expert, in order: the expert models, then the generalist."""
        return self.expert_tensors | ({GENERALIST: self.seed_tensors} if self.generalist else {})

    def read(self, name: str) -> dict[str, Tensor]:
        """One tensor from every member, checked for NaN."""
        return {
            member: require_finite(name, folder[name], folder.where(name)) for member, folder in self.members.items()
        }

    def task_vectors(self, name: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Expert minus seed model, for each expert model (the generalist's is zero and left out)."""
        start = values[GENERALIST] if self.generalist else self.seed_tensors[name]
        return [values[expert].float() - start.float() for expert in self.experts]

    def measure(self, group: str, name: str, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Drift of one tensor; it also counts into its group."""
        vectors = self.task_vectors(name, values)
        drift = self.drifts.setdefault(group, Drift(torch.zeros(len(vectors), len(vectors), dtype=torch.float64)))
        drift.add(vectors)
        return {"cosines": merge.cosines(vectors), "mean_norm_ratio": merge.norm_ratio(vectors)}


def mix(
    seed_model: Path,
    experts: Mapping[str, Path],
    output: Path,
    *,
    record: Path | None = None,
    generalist: bool = True,
    top_k: int = 2,
    router_std: float = 0.02,
    rng_seed: int = 0,
    max_shard_size: int = 5_000_000_000,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Mix expert models into one MoE folder that transformers loads without btx.

    Args:
        seed_model: folder of the dense model all experts were branched from.
        experts: expert name → folder of a dense model of the same shape.
        output: folder to write; it appears when it is complete.
        record: where to write what came from where; default: mix.json in `output`.
        generalist: add the seed model as one more expert and into the mean.
        top_k: experts a token uses.
        router_std: standard deviation of the new routers.
        rng_seed: random number seed of the routers.
        max_shard_size: bytes an output file holds at most.
        log: called with lines for the user.

    Returns:
        The record, as written.

    Raises:
        CheckpointError: the models do not fit each other or the family; all problems in one message.
    """
    mixture = _open(seed_model, experts, generalist)
    num_experts = len(mixture.members)
    if not 1 <= top_k <= num_experts:
        raise CheckpointError(f"top_k is {top_k}, but there are {num_experts} experts")
    with atomic_folder(output) as folder:
        config = mixture.family.moe_config(mixture.config, num_experts, top_k)
        copy_beside_weights(seed_model, folder)
        write_json(folder / "config.json", config)
        tensors = _mixed_tensors(mixture, router_std=router_std, rng_seed=rng_seed)
        written = write_shards(folder, tensors, max_shard_size=max_shard_size)
        report = _record(mixture, config, written, top_k, router_std, rng_seed)
        if record is None:
            write_json(folder / "mix.json", report)
    if record is not None:
        write_json(record, report)
    for group, summary in report["diagnostics"].items():
        if summary["mean_cosine"] is not None:
            log(f"mix: {group}: task vectors' mean cosine {summary['mean_cosine']:.2f}, "
                f"‖mean Δ‖ / mean ‖Δ‖ {summary['mean_norm_ratio']:.2f}")  # fmt: skip
    return report


def soup(seed_model: Path, experts: Mapping[str, Path], output: Path, *, generalist: bool = True) -> None:
    """The baseline without routing: one dense model, every weight the mean over the experts.

    Args and Raises: as `mix`.
    """
    mixture = _open(seed_model, experts, generalist)

    def averaged() -> Iterator[tuple[str, Tensor]]:
        for name in mixture.seed_tensors.names:
            yield name, merge.mean(list(mixture.read(name).values()))

    with atomic_folder(output) as folder:
        copy_beside_weights(seed_model, folder)
        write_shards(folder, averaged())


def _open(seed_model: Path, experts: Mapping[str, Path], generalist: bool) -> Mixture:
    """Open all models and refuse, in one message, everything that does not fit."""
    config = read_config(seed_model)
    family = family_of(config, str(seed_model))
    if GENERALIST in experts:
        raise CheckpointError(f"an expert cannot be called {GENERALIST!r}: the word names the seed model's expert")
    if len(experts) + generalist < 2:
        raise CheckpointError("a mixture needs at least two experts; give another expert or keep the generalist")
    problems: list[str] = []
    seed_tensors = TensorFolder(seed_model)
    opened: dict[str, TensorFolder] = {}
    for name, path in experts.items():
        try:
            opened[name] = TensorFolder(path)
            problems += _differences(name, path, config, read_config(path), seed_tensors, opened[name])
        except CheckpointError as error:
            problems.append(f"expert {name}: {error}")
    if problems:
        raise CheckpointError(
            "these models cannot be mixed:\n  " + "\n  ".join(problems)
            + f"\nEvery expert has to be branched from {seed_model} and keep its shape and tokenizer."
        )  # fmt: skip
    return Mixture(seed_model, dict(experts), generalist, config, family, seed_tensors, opened)


def _differences(
    name: str, path: Path, seed: Config, expert: Config, seed_tensors: TensorFolder, tensors: TensorFolder
) -> list[str]:
    """Every reason why an expert does not fit the seed model."""
    found = [
        f"expert {name}: {path / 'config.json'}: {key} is {expert.get(key)!r}, the seed model has {seed.get(key)!r}"
        for key in sorted(seed.keys() | expert.keys())
        if key not in HARMLESS_KEYS and seed.get(key) != expert.get(key)
    ]
    missing = [tensor for tensor in seed_tensors.names if tensor not in tensors]
    extra = [tensor for tensor in tensors.names if tensor not in seed_tensors]
    if missing:
        found.append(f"expert {name}: {path}: lacks {len(missing)} tensors, first {missing[0]}")
    if extra:
        found.append(f"expert {name}: {path}: has {len(extra)} tensors the seed model lacks, first {extra[0]}")
    found += [
        f"expert {name}: {tensors.where(tensor)}: {tensor} is {tensors.shape(tensor)}, "
        f"the seed model's is {seed_tensors.shape(tensor)}"
        for tensor in tensors.names
        if tensor in seed_tensors and tensors.shape(tensor) != seed_tensors.shape(tensor)
    ][:3]
    if _vocabulary(path) != _vocabulary(seed_tensors.folder):
        found.append(f"expert {name}: {path / 'tokenizer.json'}: another vocabulary than the seed model's")
    return found


def _vocabulary(folder: Path) -> Any:
    """Vocabulary and added tokens of a fast tokenizer, None if the folder has none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = json.loads(file.read_text("utf-8"))
    return tokenizer.get("model", {}).get("vocab"), tokenizer.get("added_tokens")


def _mixed_tensors(mixture: Mixture, *, router_std: float, rng_seed: int) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the MoE model in the published layout; what each came from is noted on the way."""
    family, members = mixture.family, list(mixture.members)
    layers: set[int] = set()
    dtype = torch.float32
    for name in mixture.seed_tensors.names:
        values = mixture.read(name)
        feed_forward = family.feed_forward_match(name)
        if feed_forward is None:
            drift = mixture.measure(_group(name), name, values)
            mixture.origins[name] = {"from": "mean", "of": members, **drift}
            yield name, merge.mean(list(values.values()))
            continue
        layer, pattern = feed_forward
        layers.add(layer)
        drift = mixture.measure("feed_forward", name, values)
        for expert, (member, tensor) in enumerate(values.items()):
            target = family.feed_forward[pattern].format(layer=layer, expert=expert)
            mixture.origins[target] = {"from": "copy", "of": member, "tensor": name, **drift}
            dtype = tensor.dtype
            yield target, tensor
    for layer in sorted(layers):
        weight = router_init.random(
            len(members), mixture.config["hidden_size"], std=router_std, rng_seed=rng_seed, layer=layer
        )
        target = family.router.format(layer=layer)
        mixture.origins[target] = {"from": "router_init", "method": "random", "std": router_std, "rng_seed": rng_seed}
        yield target, weight.to(dtype)


def _group(name: str) -> str:
    """The part of the model a shared tensor belongs to, for diagnostics."""
    for mark, group in (("embed", "embeddings"), ("lm_head", "lm_head"), ("attn", "attention"), ("norm", "norms")):
        if mark in name:
            return group
    return "other"


def _record(
    mixture: Mixture, config: Config, written: int, top_k: int, router_std: float, rng_seed: int
) -> dict[str, Any]:
    by_kind: dict[str, int] = defaultdict(int)
    for origin in mixture.origins.values():
        by_kind[origin["from"]] += 1
    return {
        "family": f"{mixture.family.dense} -> {mixture.family.moe}",
        "experts": list(mixture.members),
        "seed_model": str(mixture.seed_model),
        "paths": {name: str(path) for name, path in mixture.experts.items()},
        "generalist": mixture.generalist,
        "top_k": top_k,
        "merge": "mean",
        "router_init": {"method": "random", "std": router_std, "rng_seed": rng_seed},
        "bytes": written,
        "config": config,
        "tensors_by_origin": dict(by_kind),
        "diagnostics": {group: drift.summary() for group, drift in mixture.drifts.items()},
        "tensors": mixture.origins,
    }
