"""The MoE layers of any causal language model of transformers: what they decide, and which experts they may use.

`btx.moe.layer.MoE` says so itself. Of any other class the router is watched while the model runs, and nothing in it is
replaced: what comes out of a router, and goes into its experts, is what the model computes with.

Shape letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from btx.moe.layer import MoE
from btx.moe.routers import Routing

ROUTERS = ("gate", "router")
"""What the router is called beside the module `experts`, in every class of transformers 5 that has both."""


def moe_layers(model: nn.Module) -> list[nn.Module]:
    """What decides in every MoE layer, in layer order: a `MoE` block, or the router of another class. Empty for a dense
    model."""
    recorded = _recorded_classes(model)
    layers: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        children = dict(module.named_children())
        routers = [children[name] for name in ROUTERS if name in children and "experts" in children]
        if isinstance(module, MoE):
            inside |= {id(child) for child in module.modules()}
            layers.append(module)
        elif id(module) not in inside and (isinstance(module, recorded) or id(module) in {id(r) for r in layers}):
            layers.append(module)
        else:
            del routers
    return layers
