"""Mix expert models into one MoE model (paper, section 3.2).

In every layer the experts' FF sublayers become the experts of one MoE layer, copied bit for bit; every other weight is
the mean over the experts (the generalist included); the routers are new. Tensors are streamed one at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btx.choices.families import Config
from btx.choices.merges import MergeSettings
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.data.expert_text import SEQUENCE_LENGTH, TextRows, text_from_files
from btx.errors import CheckpointError
from btx.files import atomic_folder, write_json
from btx.mixing.checks import open_checked
from btx.mixing.chosen_tokenizer import ChosenTokenizer, tokenizer_folder
from btx.mixing.dense_folder import write_dense
from btx.mixing.drift import Drifts, group_of
from btx.mixing.expert_parts import experts_transform
from btx.mixing.inputs import MixInputs
from btx.mixing.merge import Merge
from btx.mixing.merge_methods import bind
from btx.mixing.moe_layout import (
    Expert,
    ExpertsTransform,
    expert_tensors,
    experts_of_layer,
    inert_tensors,
    shared_tensor,
)
from btx.mixing.report import FINETUNE_NEXT, inputs_provenance, parameters, screen_lines, warnings
from btx.mixing.router_fit import check_texts, fit_routers
from btx.mixing.router_init import initial_router
from btx.mixing.settings import MixSettings
from btx.model_files.beside_weights import copy_beside_weights, write_generation_config
from btx.model_files.btx_folder import write_router
from btx.model_files.hub import local_model
from btx.model_files.lazy_tensors import Computed
from btx.model_files.model_card import write_model_card
from btx.model_files.output_types import dtype_of, in_one_type
from btx.model_files.shard_writer import OutputTensor, Progress, no_progress, require_space, write_shards
from btx.models.device import choose_device
from btx.models.expert_names import with_names
from btx.models.loading import load_tokenizer
from btx.models.placement import Place
from btx.models.whole import check_planned
from btx.recipe.sizes import bytes_of


def mix(
    seed_model: str | Path,
    experts: Mapping[str, str | Path],
    output: str | Path,
    settings: MixSettings | None = None,
    *,
    record: Path | None = None,
    texts: Mapping[str, Path | TextRows] | None = None,
    device: str = "auto",
    weights_per_device: int | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = lambda line: None,
    **knobs: Any,
) -> dict[str, Any]:
    """Mix expert models into one MoE folder that transformers loads without btx.

    Args:
        seed_model: folder of the dense model all experts were branched from.
        experts: expert name → folder of a dense model of the same shape, or of a LoRA adapter of the seed model, as
            peft saves it, which is merged into it while it is read.
        output: folder to write; it appears when it is complete.
        settings: how they are mixed; default: the paper's way.
        record: where to write what came from where; default: mix.json in `output`.
        texts: expert name → file with text of its domain, for routers that need text; the generalist's is general text.
        device: where routers are computed from text: auto, cpu or cuda.
        weights_per_device: bytes of weights that a device is given at most then (`launch.weights_per_device`).
        progress: called with bytes written and bytes in all, many times; raising stops the mix and discards the output.
        log: called with lines for the user.
        **knobs: instead of `settings`, any of the attributes that `MixSettings` lists: `top_k=1`, `merge="ties"`, ...

    Returns:
        The record, as written.

    Raises:
        CheckpointError: the models do not fit each other or the family; all problems in one message.
        RunFolderError: the output does not fit on the disk.
        TypeError: a keyword that is no setting, or keywords beside `settings`.
    """
    settings = MixSettings.of_arguments(settings, knobs)
    seed_model, output = local_model(Path(seed_model)), Path(output)
    folders = {name: local_model(Path(path)) for name, path in experts.items()}
    shard_bytes, forced = bytes_of(settings.max_shard_size), dtype_of(settings.dtype)
    tokenizer = tokenizer_folder(settings.tokenizer_from, seed_model, folders)
    init = settings.start
    if problems := init.problems():
        raise CheckpointError("; ".join(problems))
    inputs = open_checked(
        seed_model, folders, settings.generalist, any_tokenizer=tokenizer is not None, warn=warning_to(log)
    )
    rows = int(inputs.config["vocab_size"])
    chosen = ChosenTokenizer.open(tokenizer, seed_model, rows, warning_to(log)) if tokenizer is not None else None
    planned = _plan(inputs, settings, forced)
    config = planned.config
    text_rows = _texts(inputs, texts, init, settings.blend)
    drifts = _measure(inputs)
    require_space(output, planned.tensors)
    with atomic_folder(output) as folder:
        copy_beside_weights(seed_model, folder, tokenizer_from=tokenizer, warn=warning_to(log))
        write_generation_config(folder, config)
        if chosen is not None:
            config = chosen.config_with_its_ids(folder, config)
        write_json(folder / "config.json", config)
        config = route_by(folder, settings.rule, log)
        written = write_shards(folder, planned.tensors, max_shard_size=shard_bytes, progress=progress)
        if text_rows:
            log(f"mix: routers from {sum(text.tokens for text in text_rows.values()):,} tokens of text ({init.method})")
            owners = [list(text_rows).index(expert.origin["of"]) for expert in planned.experts]
            place = Place(choose_device(device).type, weights_per_device=weights_per_device, log=log)
            fit_routers(folder, inputs.family, list(text_rows.values()), owners, init, place)
        report = _record(inputs, planned, settings, config, text_rows, drifts, written)
        write_json(folder / "mix.json", report)
        write_model_card(folder, report)
    if record is not None:
        write_json(record, report)
    for line in screen_lines(report, str(output)):
        log(f"mix: {line}")
    return report


@dataclass(frozen=True)
class _Planned:
    """The MoE model before anything of it is read."""

    experts: list[Expert]
    """Those of the first layer; every other has as many, made likewise."""
    top_k: int
    tensors: list[OutputTensor]
    """In the order they are written."""
    config: Config
    """Of the plain class, the tokenizer's ids as the seed model has them."""


def _plan(inputs: MixInputs, settings: MixSettings, forced: torch.dtype | None) -> _Planned:
    """What will be written.

    Args:
        forced: type of all weights; None: as they are.
    """
    transform = experts_transform(split=settings.split, rescale=settings.split_rescale, blend=settings.blend)
    bound = bind(settings.merging, list(inputs.members))
    experts = transform(experts_of_layer(inputs, 0))
    top_k = settings.rule.plain_top_k(len(experts))
    if not 1 <= top_k <= len(experts):
        raise CheckpointError(f"top_k is {top_k}, but there are {len(experts)} experts")
    width = experts[0].gate.shape[0]
    config = inputs.family.moe_config(inputs.config | {"intermediate_size": width}, len(experts), top_k)
    config = with_names(config, [expert.name for expert in experts])
    tensors, config = in_one_type(list(_tensors(inputs, config, transform, bound, settings.start)), config, forced)
    check_planned({tensor.name: tensor.shape for tensor in tensors}, config)
    return _Planned(experts, top_k, tensors, config)


def route_by(folder: Path, rule: RoutingRule, log: Callable[[str], None]) -> Config:
    """Let a new folder route by `rule`, and tell the user if only btx can read it now.

    Returns:
        Its config; that of the plain class where the folder's own is for btx alone.
    """
    plain: Config = json.loads((folder / "config.json").read_text("utf-8"))
    if write_router(folder, rule):
        log(f"mix: router {rule.kind}: saved in a folder that only btx reads: {rule.why_not_plain()}")
        return plain
    return dict(json.loads((folder / "config.json").read_text("utf-8")))


def soup(
    seed_model: str | Path, experts: Mapping[str, str | Path], output: str | Path, *, generalist: bool = True
) -> None:
    """The baseline without routing: one dense model, every weight the mean over the experts.

    Args and Raises: as `mix`.
    """
    seed_model, output = Path(seed_model), Path(output)
    inputs = open_checked(seed_model, {name: Path(path) for name, path in experts.items()}, generalist)
    merge = bind(MergeSettings(), list(inputs.members))
    tensors: list[OutputTensor] = []
    for name in inputs.seed_tensors.names:
        start = inputs.seed_tensors[name]
        tensors.append(shared_tensor(name, inputs.values(name), start, merge, start.dtype, {}))
    require_space(output, tensors)
    with atomic_folder(output) as folder:
        write_dense(inputs, tensors, folder)


def warning_to(log: Callable[[str], None]) -> Callable[[str], None]:
    """Warnings as lines of the log."""
    return lambda line: log(f"mix: warning: {line}")


def _texts(
    inputs: MixInputs, texts: Mapping[str, Path | TextRows] | None, init: RouterInit, blend: bool
) -> dict[str, TextRows]:
    """Text of every member in their order, files read; empty if the routers need none."""
    if not init.needs_text:
        return {}
    if blend:
        raise CheckpointError(f"router_init {init.method} needs experts with domains; blended experts have none")
    check_texts(texts, list(inputs.members), init.method)
    files = {name: text for name, text in (texts or {}).items() if not isinstance(text, TextRows)}
    length = min(SEQUENCE_LENGTH, int(inputs.config.get("max_position_embeddings", SEQUENCE_LENGTH)))
    read = text_from_files(
        files, load_tokenizer(inputs.seed_model), tokens=init.tokens, sequence_length=length
    ) if files else {}  # fmt: skip
    ready = {name: text for name, text in (texts or {}).items() if isinstance(text, TextRows)}
    return {name: (read | ready)[name] for name in inputs.members}


def _measure(inputs: MixInputs) -> Drifts:
    """How far the experts have drifted, tensor by tensor."""
    drifts = Drifts()
    for name in inputs.seed_tensors.names:
        group = group_of(name) if inputs.family.feed_forward_match(name) is None else "feed_forward"
        experts = [folder[name] for folder in inputs.expert_tensors.values()]
        drifts.add(name, group, experts, inputs.seed_tensors[name])
    return drifts


def _tensors(
    inputs: MixInputs, config: Config, transform: ExpertsTransform, merge: Merge, init: RouterInit
) -> Iterator[OutputTensor]:
    """All tensors of the MoE model, in the order they are written."""
    family = inputs.family
    origin: dict[str, Any]
    for layer in range(inputs.num_layers):
        dtype = inputs.seed_tensors[family.feed_forward["gate"].format(layer=layer)].dtype
        experts = transform(experts_of_layer(inputs, layer))
        yield from expert_tensors(family, layer, experts, dtype)
        shape = (len(experts), int(inputs.config["hidden_size"]))
        router = Computed(shape, dtype, partial(initial_router, init, *shape, layer))
        origin = {"from": "router_init", "method": init.method}
        yield OutputTensor(family.router.format(layer=layer), shape, dtype, [router], origin)
        yield from inert_tensors(family, layer, config, dtype)
    for name in inputs.shared_names:
        start = inputs.seed_tensors[name]
        origin = {"of": list(inputs.members)}
        yield shared_tensor(name, inputs.values(name), start, merge, start.dtype, origin)


def _record(
    inputs: MixInputs, planned: _Planned, settings: MixSettings, config: Config, texts: Mapping[str, TextRows],
    drifts: Drifts, written: int,
) -> dict[str, Any]:  # fmt: skip
    """mix.json: what the mix was told to do, and what it did.

    Args:
        config: as it was written.
        texts: what routers were made from.
    """
    names, top_k = [expert.name for expert in planned.experts], planned.top_k
    return {
        "family": f"{inputs.family.dense} -> {inputs.family.moe}",
        "experts": names,
        "seed_model": str(inputs.seed_model),
        "paths": {name: str(path) for name, path in inputs.experts.items()},
        "generalist": inputs.generalist,
        "top_k": top_k,
        "merge": settings.merging.as_json(),
        "router_init": settings.start.as_json(),
        "config": config,
        "split": {"chunks": settings.split, "rescale": settings.split_rescale} if settings.split > 1 else None,
        "blend": settings.blend,
        "texts": {name: {"source": text.source, "tokens": text.tokens} for name, text in texts.items()},
        "bytes": written,
        "parameters": parameters(planned.tensors, len(names), top_k),
        "diagnostics": drifts.summary(),
        "warnings": warnings(drifts.summary()),
        "next": FINETUNE_NEXT,
        **inputs_provenance(inputs),
        "tensors_by_origin": dict(Counter(tensor.origin["from"] for tensor in planned.tensors)),
        "tensors": {tensor.name: tensor.origin for tensor in planned.tensors},
        "drift": drifts.tensors,
    }
