"""Mix expert models into one MoE model (paper, section 2.2).

In every layer the experts' FF sublayers become the experts of one MoE layer, copied bit for bit; every other weight is
the mean over the experts (the generalist included); the routers are new. Tensors are streamed one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from btx import router_init
from btx.beside_weights import copy_beside_weights, tokenizer_folder, write_generation_config
from btx.drift import Drifts, group_of
from btx.errors import CheckpointError
from btx.families import Config
from btx.folders import atomic_folder, write_json
from btx.merge import MERGES, Merge
from btx.mix_checks import open_checked
from btx.mix_inputs import MixInputs
from btx.moe_layout import (
    ExpertsTransform,
    RouterInit,
    expert_tensors,
    experts_of_layer,
    fused_again,
    router_tensor,
    shared_tensor,
    zero_tensors,
)
from btx.output_types import dtype_of, in_one_type
from btx.shard_writer import OutputTensor, Progress, no_progress, require_space, write_shards
from btx.sizes import bytes_of


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
    dtype: str | None = None,
    tokenizer_from: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress = no_progress,
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
        dtype: type of all weights, `float32`, `bfloat16` or `float16`; default: the seed model's.
        tokenizer_from: an expert's name, `seed` or a folder: whose tokenizer the output gets. Vocabularies that differ
            are then allowed.
        max_shard_size: size an output file has at most, in bytes or as `500MB`.
        progress: called with bytes written and bytes in all, many times; raising stops the mix and discards the output.
        log: called with lines for the user.

    Returns:
        The record, as written.

    Raises:
        CheckpointError: the models do not fit each other or the family; all problems in one message.
        RunFolderError: the output does not fit on the disk.
    """
    seed_model, experts, output = Path(seed_model), {name: Path(path) for name, path in experts.items()}, Path(output)
    shard_bytes, forced = bytes_of(max_shard_size), dtype_of(dtype)
    tokenizer = tokenizer_folder(tokenizer_from, seed_model, experts)
    inputs = open_checked(seed_model, experts, generalist, any_tokenizer=tokenizer is not None, warn=warning_to(log))
    transform: ExpertsTransform = list
    merge = MERGES["mean"]
    first_layer = transform(experts_of_layer(inputs, 0))
    names = [expert.name for expert in first_layer]
    if not 1 <= top_k <= len(names):
        raise CheckpointError(f"top_k is {top_k}, but there are {len(names)} experts")
    width = first_layer[0].gate.shape[0]
    config = inputs.family.moe_config(inputs.config | {"intermediate_size": width}, len(names), top_k)
    router, router_origin = _random_routers(inputs, len(names), router_std, rng_seed)
    drifts = _measure(inputs)
    tensors = list(_planned(inputs, config, transform, merge, router, router_origin, drifts))
    tensors, config = in_one_type(tensors, config, forced)
    require_space(output, tensors)
    with atomic_folder(output) as folder:
        copy_beside_weights(seed_model, folder, tokenizer_from=tokenizer)
        write_json(folder / "config.json", config)
        write_generation_config(folder, config)
        written = write_shards(folder, tensors, max_shard_size=shard_bytes, progress=progress)
        report = _record(inputs, names, config, top_k, merge, router_origin) | {
            "bytes": written,
            "tensors_by_origin": _by_origin(tensors),
            "diagnostics": drifts.summary(),
            "tensors": {tensor.name: tensor.origin for tensor in tensors},
        }
        if record is None:
            write_json(folder / "mix.json", report)
    if record is not None:
        write_json(record, report)
    for group, summary in drifts.summary().items():
        if summary["mean_cosine"] is not None:
            log(f"mix: {group}: task vectors' mean cosine {summary['mean_cosine']:.2f}, "
                f"‖mean Δ‖ / mean ‖Δ‖ {summary['mean_norm_ratio']:.2f}")  # fmt: skip
    return report


def soup(seed_model: Path, experts: Mapping[str, Path], output: Path, *, generalist: bool = True) -> None:
    """The baseline without routing: one dense model, every weight the mean over the experts.

    Args and Raises: as `mix`.
    """
    inputs, merge = open_checked(seed_model, experts, generalist), MERGES["mean"]
    tensors: list[OutputTensor] = []
    for name in inputs.seed_tensors.names:
        start = inputs.seed_tensors[name]
        tensors.append(shared_tensor(name, inputs.values(name), start, merge, start.dtype, {}))
    require_space(output, tensors)
    with atomic_folder(output) as folder:
        copy_beside_weights(seed_model, folder)
        write_shards(folder, fused_again(inputs, tensors))


def warning_to(log: Callable[[str], None]) -> Callable[[str], None]:
    """Warnings as lines of the log."""
    return lambda line: log(f"mix: warning: {line}")


def _random_routers(
    inputs: MixInputs, num_experts: int, std: float, rng_seed: int
) -> tuple[RouterInit, dict[str, Any]]:
    """Routers of N(0, std²), and their origin for the record."""
    hidden_size = int(inputs.config["hidden_size"])

    def init(layer: int) -> torch.Tensor:
        return router_init.random(num_experts, hidden_size, std=std, rng_seed=rng_seed, layer=layer)

    return init, {"method": "random", "std": std, "rng_seed": rng_seed}


def _measure(inputs: MixInputs) -> Drifts:
    """How far the experts have drifted, tensor by tensor."""
    drifts = Drifts()
    for name in inputs.seed_tensors.names:
        group = group_of(name) if inputs.family.feed_forward_match(name) is None else "feed_forward"
        experts = [folder[name] for folder in inputs.expert_tensors.values()]
        drifts.add(name, group, experts, inputs.seed_tensors[name])
    return drifts


def _planned(
    inputs: MixInputs,
    config: Config,
    transform: ExpertsTransform,
    merge: Merge,
    router: RouterInit,
    router_origin: dict[str, Any],
    drifts: Drifts,
) -> Iterator[OutputTensor]:
    """All tensors of the MoE model, in the order they are written."""
    family = inputs.family
    hidden_size = int(inputs.config["hidden_size"])
    for layer in range(inputs.num_layers):
        dtype = inputs.seed_tensors[family.feed_forward["gate"].format(layer=layer)].dtype
        experts = transform(experts_of_layer(inputs, layer))
        yield from expert_tensors(family, layer, experts, dtype)
        origin = {"from": "router_init", **router_origin}
        yield router_tensor(family, layer, (len(experts), hidden_size), router, dtype, origin)
        yield from zero_tensors(family, layer, config, dtype)
    for name in inputs.shared_names:
        start = inputs.seed_tensors[name]
        origin = {"of": list(inputs.members), **drifts.tensors[name]}
        yield shared_tensor(name, inputs.values(name), start, merge, start.dtype, origin)


def _by_origin(tensors: Sequence[OutputTensor]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        counts[tensor.origin["from"]] += 1
    return dict(counts)


def _record(
    inputs: MixInputs, names: Sequence[str], config: Config, top_k: int, merge: Merge, router_origin: dict[str, Any]
) -> dict[str, Any]:
    """What the mix was told to do; what it did is added by the caller."""
    return {
        "family": f"{inputs.family.dense} -> {inputs.family.moe}",
        "experts": list(names),
        "seed_model": str(inputs.seed_model),
        "paths": {name: str(path) for name, path in inputs.experts.items()},
        "generalist": inputs.generalist,
        "top_k": top_k,
        "merge": merge.name,
        "router_init": router_origin,
        "config": config,
    }
