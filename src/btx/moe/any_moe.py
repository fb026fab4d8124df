"""The MoE layers of any causal language model of transformers: what they decide, and which experts they may use.

`btx.moe.layer.MoE` says so itself. Of any other class the routers are watched while the model runs, and nothing is
replaced: what comes out of a router is what the model computes with.

Shape letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from btx.errors import CheckpointError
from btx.moe.layer import MoE
from btx.moe.routers import Routing

ROUTERS = ("gate", "router")
"""What a router is called that lies beside a module `experts`."""


def moe_layers(model: nn.Module) -> list[nn.Module]:
    """What decides in every MoE layer, in layer order: a `MoE`, or the router of another class; none of a dense model.

    A router is known by the experts beside it, else by what the class names for `output_router_logits`
    (`_can_record_outputs`), but for routers of attention.
    """
    if blocks := blocks_with_routers(model):
        return [block if isinstance(block, MoE) else router for block, router in blocks]
    recorded = _recorded(model)
    return [module for name, module in model.named_modules()
            if isinstance(module, recorded) and "attention" not in name and "attn" not in name]  # fmt: skip


def blocks_with_routers(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The blocks of any MoE class that have their router beside `experts`, in layer order, each with its router."""
    children = [(block, dict(block.named_children())) for block in model.modules()]
    return [(block, next(parts[name] for name in ROUTERS if name in parts))
            for block, parts in children if "experts" in parts and not parts.keys().isdisjoint(ROUTERS)]  # fmt: skip


def _recorded(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of whose outputs transformers takes router logits."""
    said = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    wanted = [recorders.get("router_logits") for recorders in said]
    flat = [recorder for entry in wanted for recorder in (entry if isinstance(entry, list) else [entry])]
    classes = [getattr(recorder, "target_class", recorder) for recorder in flat]
    return tuple({each for each in classes if isinstance(each, type) and issubclass(each, nn.Module)})


def num_experts(model: nn.Module) -> int:
    """E, without shared experts; 0 of a dense model. Layers that differ in it are refused."""
    counts = [_experts_of(layer) for layer in moe_layers(model)]
    if len(set(counts)) > 1:
        raise CheckpointError(f"{type(model).__name__}: its MoE layers have different numbers of experts: {counts}")
    return counts[0] if counts else 0


def _experts_of(layer: nn.Module) -> int:
    """A router has a row an expert; where it has more matrices, it says how many experts there are."""
    if isinstance(layer, MoE):
        return layer.num_experts
    rows = [parameter.shape[0] for parameter in layer.parameters() if parameter.dim() == 2]
    if len(rows) == 1:
        return rows[0]
    said = [getattr(layer, name, None) for name in ("num_experts", "n_routed_experts", "num_local_experts")]
    return next((count for count in said if isinstance(count, int)), rows[0] if rows else 0)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Routing]]:
    """Within, a forward pass leaves what every MoE layer decides in the list, in layer order; clear it before the
    next one."""
    routings: list[Routing] = []

    def watch(layer: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(layer, MoE):
            routings.append(_routing_of(layer, output, model))
        elif layer.routing is not None:
            routings.append(layer.routing)

    with _hooked(layer.register_forward_hook(watch) for layer in moe_layers(model)):
        yield routings


def _routing_of(router: nn.Module, output: Any, model: nn.Module) -> Routing:
    """What a router of transformers gave: logits, gates and expert ids, by their types and shapes.

    Most give logits (T, E), gates (T, K) and ids (T, K), in this order or, before transformers 5.24, another. DBRX and
    JetMoe give logits alone, of which the K largest are taken with the softmax over them; Llama 4 gives gates of all
    experts before them.
    """
    tensors = [tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,))
               if isinstance(tensor, Tensor) and tensor.dim() > 1]  # fmt: skip
    tensors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    ids = [tensor for tensor in tensors if not tensor.is_floating_point()]
    floats = [tensor.float() for tensor in tensors if tensor.is_floating_point()]
    if not floats:
        raise CheckpointError(f"{type(router).__name__}: this router's decisions are not readable")
    if ids:
        chosen_TK, E = ids[0], _experts_of(router)
        of_all = [tensor for tensor in floats if tensor.shape[1] == E] or floats
        # Where a token uses all experts, gates have the shape of logits, but are never negative.
        logits_TE = next((tensor for tensor in of_all if (tensor < 0).any()), of_all[0])
        others = [tensor for tensor in floats if tensor is not logits_TE]
        gates_TK = next((tensor for tensor in others if tensor.shape == chosen_TK.shape), None)
        if gates_TK is None:
            gates_TK = next((tensor for tensor in others if tensor.shape[1] == E), logits_TE.softmax(dim=-1))
            gates_TK = gates_TK.gather(1, chosen_TK)
    else:
        logits_TE = floats[-1]
        chosen_TK = logits_TE.topk(_top_k(router, model), dim=-1).indices
        all_gates = len(floats) > 1 and floats[0].shape == logits_TE.shape
        gates_TK = (floats[0] if all_gates else logits_TE).gather(1, chosen_TK)
        gates_TK = gates_TK if all_gates else gates_TK.softmax(dim=-1)
    gates_TK, order_TK = gates_TK.sort(dim=-1, descending=True)
    return Routing(_as_logits(logits_TE), gates_TK, chosen_TK.gather(1, order_TK))


def _top_k(router: nn.Module, model: nn.Module) -> int:
    """K of a router that does not say which experts it chose."""
    config: Any = getattr(model, "config", None)
    for place in (router, config, getattr(config, "ffn_config", None)):
        for name in ("top_k", "num_experts_per_tok", "moe_top_k"):
            if isinstance(k := getattr(place, name, None), int):
                return k
    raise CheckpointError(f"{type(router).__name__}: how many experts a token uses is not known")


def _as_logits(values_TE: Tensor) -> Tensor:
    """Some routers give probabilities in place of logits (Gemma 4)."""
    are_probabilities = bool((values_TE >= 0).all()) and torch.allclose(
        values_TE.sum(dim=-1), torch.ones(len(values_TE), device=values_TE.device), atol=1e-3
    )
    return values_TE.log() if are_probabilities else values_TE


@contextmanager
def only_experts(model: nn.Module, allowed_E: Tensor | None) -> Iterator[None]:
    """Within, tokens use no expert but those where `allowed_E` is True: the router's other logits count as -inf. Where
    fewer than K are left, the gates of the rest are 0. None allows all."""
    if allowed_E is None:
        yield
        return
    layers = moe_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, MoE):
                before_E = layer.allowed_E
                stack.callback(setattr, layer, "allowed_E", before_E)
                layer.allowed_E = allowed_E if before_E is None else allowed_E & before_E
            else:
                stack.enter_context(_forbidden(layer, ~allowed_E))
        yield


@contextmanager
def _forbidden(router: nn.Module, forbidden_E: Tensor) -> Iterator[None]:
    """Within, a router of transformers gives none of these experts a chance."""
    mode = _MinusInfinity(forbidden_E)

    def enter(router: nn.Module, inputs: Any) -> None:
        mode.__enter__()

    def leave(router: nn.Module, inputs: Any, output: Any) -> Any:
        mode.__exit__(None, None, None)
        return _without_gates_of(forbidden_E, output) if isinstance(output, tuple) else output

    with _hooked([router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]):
        yield


def _without_gates_of(forbidden_E: Tensor, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """A router's output in which forbidden experts that were chosen because fewer than K are left have gate 0."""
    chosen = [tensor for tensor in output
              if isinstance(tensor, Tensor) and tensor.dim() > 1 and not tensor.is_floating_point()]  # fmt: skip
    if not chosen:
        return output
    gone = forbidden_E.to(chosen[0].device)[chosen[0]]
    return tuple(
        part.masked_fill(gone, 0.0) if isinstance(part, Tensor) and part.is_floating_point()
        and part.shape == gone.shape else part for part in output
    )  # fmt: skip


class _MinusInfinity(TorchFunctionMode):
    """Makes -inf of the forbidden experts' logits where a router computes them, and of whatever it chooses the largest
    K of: scores may have a bias that is no logit."""

    def __init__(self, forbidden_E: Tensor) -> None:
        super().__init__()
        self.forbidden_E = forbidden_E

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.topk, Tensor.topk) and args and args[0].shape[-1] == len(self.forbidden_E):
            indices = function(self._masked(args[0]), *args[1:], **kwargs).indices
            return torch.return_types.topk((args[0].gather(-1, indices), indices))
        result = function(*args, **kwargs)
        return self._masked(result) if function in (F.linear, torch.matmul, Tensor.matmul) else result

    def _masked(self, values: Tensor) -> Tensor:
        if values.shape[-1] != len(self.forbidden_E):
            return values
        return values.masked_fill(self.forbidden_E.to(values.device), -torch.inf)


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
