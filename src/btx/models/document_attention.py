"""Attention of packed rows, document by document, for transformers: on a GPU through torch's `varlen_attn` (Flash
Attention), on a CPU in blocks (`btx.models.attention_in_blocks`).

Both take the tokens of all rows as one sequence, and the places where documents begin. These borders reach them as
the model's attention mask: transformers hands a mask of four dimensions on to every layer as it is. So nothing has to
be remembered beside the arguments: a layer that gradient checkpointing runs again sees the same borders, and a compiled
layer has no state to guard. With any other mask the registered function is transformers' own SDPA, so that generation
does not notice.

Shape letters: B batch, S sequence, T = B·S tokens, H heads, D head width.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from btx.models.attention_in_blocks import attend_in_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "btx_documents"
KEYWORDS = frozenset({"dropout", "scaling", "sliding_window", "position_ids"})
"""What an attention module may hand over by name: anything else (a soft cap, sinks, a bias) the kernels cannot do."""
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes fewer key than query heads as they are; later versions want to be told."""

_reasons: WeakKeyDictionary[nn.Module, dict[bool, str | None]] = WeakKeyDictionary()


def let_read_documents(model: PreTrainedModel) -> str | None:
    """Let `model` take borders for a mask, if its class allows it; else say why not.

    The model keeps this attention: gradient checkpointing runs layers again when the forward pass is long over.
    """
    reasons, kernel = _reasons.setdefault(model, {}), has_varlen(model.device)
    if kernel not in reasons:
        reasons[kernel] = why_not(model)
        if reasons[kernel] is None:
            model.set_attn_implementation(NAME)
    return reasons[kernel]


def mask_of_borders(borders_N: Tensor) -> Tensor:
    """Borders as a mask for `attend`: (1, 1, 1, N), int32. A compiled layer is told that N may change."""
    mask = borders_N[None, None, None]
    torch._dynamo.maybe_mark_dynamic(mask, 3)
    return mask


def attend(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within documents, as transformers' attention functions give it: (B, S, H, D) and no weights.

    Args:
        attention_mask: borders (1, 1, 1, N), int32, as `btx.models.packed.document_borders` gives them; or a mask for
            SDPA.
        sliding_window: tokens that a token sees, itself included; None: its document up to itself.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(
                module, query_BHSD, key_BHSD, value_BHSD, attention_mask, dropout=dropout, scaling=scaling,
                sliding_window=sliding_window, **kwargs,
            ),
        )  # fmt: skip
    B, H, S, _ = query_BHSD.shape
    # Under autocast a rotary embedding leaves queries and keys in float32; values come from a product, in its type.
    query, key, value = (
        heads.transpose(1, 2).flatten(0, 1).to(value_BHSD.dtype) for heads in (query_BHSD, key_BHSD, value_BHSD)
    )
    borders = attention_mask.flatten()
    if has_varlen(query.device):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        # The row's length for the longest document: a bound that no batch changes.
        out = varlen_attn(query, key, value, borders, borders, S, S, scale=scaling, window_size=window, **GROUPED)
    else:
        out = attend_in_blocks(query, key, value, borders, S, scale=scaling, window=sliding_window)
    return cast(Tensor, out).view(B, S, H, -1), None  # values may be narrower than queries


def has_varlen(device: torch.device) -> bool:
    """Whether torch's kernel for documents is there for this device."""
    return device.type == "cuda"


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def why_not(model: PreTrainedModel) -> str | None:
    """What of the model's class or config the kernels cannot do; None if they can do all.

    What is not known to be right is refused: attention functions get what they need by name, so the names in the
    source of the attention modules tell what an attention is made of.
    """
    base, config = cast(Any, model).base_model, cast(Any, model).config
    name = type(model).__name__
    masks = inspect.getsource(type(base).forward)
    if "create_causal_mask" not in masks:
        return f"{name} makes its masks itself"
    calls = {module: attention_keywords(type(module).forward) for module in base.modules()}
    attentions = {module: keywords for module, keywords in calls.items() if keywords is not None}
    if len(attentions) != config.num_hidden_layers or set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"{name} has layers other than full and sliding attention"
    keywords = frozenset().union(*attentions.values())
    if more := keywords - KEYWORDS:
        return f"the attention of {name} also takes {', '.join(sorted(more))}"
    windows = {"sliding_window" in keywords, "create_sliding_window_causal_mask" in masks}
    if getattr(config, "sliding_window", None) and len(windows) > 1:  # OLMoE, PhiMoE
        return f"{name} has a sliding window in its masks or in its attention only"
    if any(getattr(module, "attention_dropout", None) != 0 for module in attentions):
        return f"the attention of {name} has dropout"
    if not has_varlen(base.device):
        return None
    if widths := {width for module in attentions if not _fits(width := getattr(module, "head_dim", None))}:
        return f"the heads of {name} are {', '.join(map(str, widths))} wide; the kernel's a multiple of 8, at most 256"
    return None


def _fits(head_width: int | None) -> bool:
    return head_width is not None and head_width % 8 == 0 and head_width <= 256


@cache
def attention_keywords(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the arguments that a forward function hands to transformers' attention interface; None if it does not
    call it."""
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):
        return None
    calls = [
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
    ]  # fmt: skip
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg) if calls else None
