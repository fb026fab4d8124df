"""Append an expert to a finished MoE model: its FF sublayers, and one row to every router (Nexus, arXiv 2408.15901).

What is there stays bit for bit, but for the shared weights if they are told to fold the new expert's in: with
λ = 1/(n+1) the mean over n experts becomes the mean over n+1 (Nexus, section 3.2). So with shared weights left, tokens
that do not choose the new expert are routed among the old ones as before.

The new row: `random` and `zeros` as in a new router; `hidden_mean` as in `btx mix`, from text of the new expert and of
old ones; `ridge` by regression on what the row should say beside the trained old ones: on the new expert's text half
the old logits' range above the largest of them, on other text as much as the smallest. That needs no common scale, so
it also suits routers that were finetuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx.choices.router_inits import RouterInit
from btx.data.expert_text import SEQUENCE_LENGTH, TextRows, text_from_files
from btx.errors import CheckpointError
from btx.mixing.checks import Opened
from btx.mixing.extend_checks import open_expert
from btx.mixing.moe_folder import MoeFolder
from btx.mixing.report import FINETUNE_NEXT
from btx.mixing.router_fit import Targets, load_for_text, router_sums
from btx.mixing.router_init import RouterSums, hidden_mean, initial_router, ridge
from btx.mixing.settings import seeded
from btx.model_files.checkpoints import allow_open_files
from btx.model_files.hub import local_model
from btx.model_files.lazy_tensors import Computed, Elementwise, FileTensor, LazyTensor, cast
from btx.model_files.provenance import model_provenance
from btx.model_files.shard_writer import OutputTensor
from btx.model_files.vocabularies import check_ids
from btx.models.device import choose_device
from btx.models.loading import load_tokenizer
from btx.models.placement import Place
from btx.recipe.sizes import bytes_of

SHARED = ("left", "fold")


def extend(
    moe: str | Path,
    name: str,
    expert: str | Path,
    output: str | Path,
    *,
    shared: str = "left",
    router_init: str | RouterInit = "random",
    texts: Mapping[str, Path] | None = None,
    rng_seed: int = 0,
    max_shard_size: int | str = "5GB",
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a MoE model with one more expert.

    Args:
        moe: folder of a MoE model of any supported family.
        name: name of the new expert.
        expert: folder of a dense model of the class and shape that the MoE model was mixed from, or of a LoRA adapter
            of its seed model, which then has to lie where it lay.
        output: folder to write; it appears when it is complete.
        shared: `left`, or `fold` the expert's shared weights in with weight 1/(n+1).
        router_init: how the new router row starts, by name or with parameters.
        texts: expert name → file with text of its domain, for rows that need text: the new expert's and at least one
            old one's, better all.
        rng_seed: random number seed of a random row.
        max_shard_size: size an output file has at most, in bytes or as `500MB`.
        log: called with lines for the user.

    Returns:
        mix.json, as written.

    Raises:
        CheckpointError: the expert does not fit; all problems in one message.
    """
    moe, expert, output = local_model(Path(moe)), local_model(Path(expert)), Path(output)
    allow_open_files((moe, expert))
    model = MoeFolder.open(moe)
    init = seeded(RouterInit(router_init) if isinstance(router_init, str) else router_init, rng_seed, "router_init")
    if problems := _problems(model, name, shared, init, texts or {}):
        raise CheckpointError("; ".join(problems))
    check_ids(moe, int(model.config["vocab_size"]))
    dense = open_expert(model, name, expert, lambda line: log(f"extend: warning: {line}"))
    rows_LD = _new_rows(model, name, init, texts or {})
    names = [*model.names, name]
    changes = {
        "family": model.record.get("family", f"{dense.family.dense} -> {dense.family.moe}"),
        "paths": model.record["paths"] | {name: str(expert)},
        "inputs": model.record["inputs"] | {name: model_provenance(expert)},
        "next": FINETUNE_NEXT,
    }
    event = {"extend": name, "path": str(expert), "shared": shared, "router_init": init.as_json()}
    planned = _planned(model, dense, rows_LD, 1 / len(names) if shared == "fold" else 0.0)
    record = model.write_with(names, list(planned), output, changes, event, bytes_of(max_shard_size))
    log(f"extend: {name} is expert {len(model.names)}; shared weights " + ("left as they were" if shared == "left" else
        f"folded with weight {1 / len(names):.3f}"))  # fmt: skip
    return record


def _problems(model: MoeFolder, name: str, shared: str, init: RouterInit, texts: Mapping[str, Path]) -> list[str]:
    """What is wrong with what was asked for."""
    problems = init.problems()
    if shared not in SHARED:
        problems.append(f"shared weights {shared!r}: allowed: {', '.join(SHARED)}")
    if name in model.names:
        problems.append(f"{model.path}: has an expert {name!r} already; its experts: {', '.join(model.names)}")
    if init.method == "ridge" and init.scale is not None:
        problems.append("router_init ridge takes no scale here: the old rows' logits set it")
    if init.needs_text:
        problems += _text_problems(texts, name, model.names, init.method)
    return problems


def _text_problems(texts: Mapping[str, Path], name: str, old: Sequence[str], method: str) -> list[str]:
    unknown = [text for text in texts if text != name and text not in old]
    wrong = [f"text for {', '.join(unknown)}, which is no expert"] if unknown else []
    if name not in texts or not any(text in old for text in texts):
        wrong.append(f"router_init {method} needs text of {name} and of at least one of {', '.join(old)}: the new row "
                     f"has to tell them apart")  # fmt: skip
    return wrong


def _new_rows(model: MoeFolder, name: str, init: RouterInit, texts: Mapping[str, Path]) -> list[Tensor]:
    """The new row (D,) of every layer's router."""
    hidden_size, n = int(model.config["hidden_size"]), len(model.names)
    if not init.needs_text:  # the last row of a router for n+1, so that it is no copy of an old one
        return [initial_router(init, n + 1, hidden_size, layer)[-1] for layer in range(model.num_layers)]
    length = min(SEQUENCE_LENGTH, int(model.config.get("max_position_embeddings", SEQUENCE_LENGTH)))
    ordered = {text: texts[text] for text in sorted(texts, key=lambda text: text == name)}  # the new one last
    rows = text_from_files(ordered, load_tokenizer(model.path), tokens=init.tokens, sequence_length=length)
    return ROW_FROM_TEXT[init.method](model, list(rows.values()), init)


def _sums(model: MoeFolder, texts: Sequence[TextRows], num_targets: int, targets: Targets) -> list[RouterSums]:
    """`router_sums` with the hidden states of the model as it is, routed by its own routers."""
    loaded = load_for_text(model.path, Place(choose_device("auto").type))
    return router_sums(loaded, texts, num_targets, targets)


def hidden_mean_row(model: MoeFolder, texts: Sequence[TextRows], init: RouterInit) -> list[Tensor]:
    """The new row (D,) of every layer's router as in a new router, from text, the new expert's last."""

    def labels(layer: int, text: int, x_TD: Tensor) -> Tensor:
        return torch.eye(len(texts), device=x_TD.device)[text].expand(len(x_TD), -1)

    return [hidden_mean(sums, scale=init.factor)[-1].cpu() for sums in _sums(model, texts, len(texts), labels)]


def ridge_row(model: MoeFolder, texts: Sequence[TextRows], init: RouterInit) -> list[Tensor]:
    """The new row (D,) of every layer's router beside the old ones, from text, the new expert's last."""
    new = len(texts) - 1
    old_weights = [model.tensors[model.family.router.format(layer=layer)].load().float()
                   for layer in range(model.num_layers)]  # fmt: skip

    def beside_the_old_rows(layer: int, text: int, x_TD: Tensor) -> Tensor:
        logits_TE = x_TD.float() @ old_weights[layer].to(x_TD.device).T
        largest_T, smallest_T = logits_TE.max(dim=1).values, logits_TE.min(dim=1).values
        wanted_T = largest_T + (largest_T - smallest_T) / 2 if text == new else smallest_T
        return wanted_T[:, None]

    sums_L = _sums(model, texts, 1, beside_the_old_rows)
    return [ridge(sums, ridge=init.ridge, scale=1.0)[0].cpu() for sums in sums_L]


ROW_FROM_TEXT: dict[str, Callable[[MoeFolder, Sequence[TextRows], RouterInit], list[Tensor]]] = {
    "hidden_mean": hidden_mean_row,
    "ridge": ridge_row,
}
"""Start that needs text → the new row of every layer's router."""


def _with_zero(tensor: FileTensor, axis: int) -> Tensor:
    """A tensor with one more entry along an axis, 0."""
    return torch.cat([tensor.load(), torch.zeros_like(tensor.load().narrow(axis, 0, 1))], dim=axis)


def _constant(value: Tensor, dtype: torch.dtype) -> Computed:
    return Computed(tuple(value.shape), dtype, lambda: value)


def _planned(model: MoeFolder, dense: Opened, rows_LD: Sequence[Tensor], fold: float) -> Iterator[OutputTensor]:
    """All tensors of the larger model: the old ones, each followed by what the new expert adds to it."""
    family, n = dense.family, len(model.names)

    def feed_forward(roles: Sequence[str], layer: int, dtype: torch.dtype) -> list[LazyTensor]:
        return [cast(dense.tensors[family.feed_forward[role].format(layer=layer)], dtype) for role in roles]

    added = {pattern.format(layer=layer): (layer, roles) for pattern, roles in family.experts.items()
             for layer in range(model.num_layers) if "{expert}" not in pattern}  # fmt: skip
    routers = {family.router.format(layer=layer): layer for layer in range(model.num_layers)}
    for tensor_name in model.tensors.names:
        tensor = model.tensors[tensor_name]
        shape, dtype = (tensor.shape[0] + 1, *tensor.shape[1:]), tensor.dtype
        if tensor_name in routers:
            parts = [tensor, _constant(rows_LD[routers[tensor_name]][None], dtype)]
            yield OutputTensor(tensor_name, shape, dtype, parts, {"from": "router"})
        elif tensor_name in added:
            layer, roles = added[tensor_name]
            parts = [tensor, *feed_forward(roles, layer, dtype)]
            yield OutputTensor(tensor_name, shape, dtype, parts, {"from": "stack"})
        elif (axis := model.expert_axis(tensor_name)) is not None:
            shape = tuple(size + (number == axis) for number, size in enumerate(tensor.shape))
            part = Computed(shape, dtype, partial(_with_zero, tensor, axis))
            yield OutputTensor(tensor_name, shape, dtype, [part], {"from": "zeros"})
        elif model.place_of(tensor_name) is not None:
            yield OutputTensor(tensor_name, tensor.shape, dtype, [tensor], {"from": "copy"})
        elif fold and tensor_name in dense.tensors:
            merged = Elementwise(tensor.shape, dtype, [tensor, dense.tensors[tensor_name]],
                                 lambda values: torch.lerp(values[0].double(), values[1].double(), fold))  # fmt: skip
            yield OutputTensor(tensor_name, tensor.shape, dtype, [merged], {"from": "fold"})
        else:
            yield OutputTensor(tensor_name, tensor.shape, dtype, [tensor], {"from": "shared"})
    for pattern, roles in family.experts.items():
        for layer in range(model.num_layers) if "{expert}" in pattern else ():
            dtype = model.tensors[pattern.format(layer=layer, expert=0)].dtype
            parts = feed_forward(roles, layer, dtype)
            shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
            yield OutputTensor(pattern.format(layer=layer, expert=n), shape, dtype, parts, {"from": "copy"})
