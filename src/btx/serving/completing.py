"""Completions token by token, each with the pair of experts that made it.

Shape letters: B batch, S sequence, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from btx.baselines.btm_model import BtmModel, BtmReader, load_model_or_btm
from btx.data.token_files import DocumentEncoder
from btx.data.token_texts import TokenTexts
from btx.errors import CheckpointError
from btx.models.device import choose_device
from btx.models.loading import load_tokenizer
from btx.models.outputs import SideBySide, open_reader
from btx.models.placement import Place
from btx.moe.balancing import sparse_gates
from btx.moe.layer import moe_blocks
from btx.outputs import read_output
from btx.reporting.shapes import MixRecord
from btx.serving.refusals import check_completion, check_prompt
from btx.system_errors import blame, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShownToken:
    """A token of the prompt or the completion, ready to print."""

    text: str
    pair: tuple[int, ...]
    """The two experts with the most gate weight over all layers, ascending; empty for a dense model."""
    from_prompt: bool


def completion(
    model_path: Path, prompt: str, *, max_new_tokens: int = 200, temperature: float = 0.0, rng_seed: int = 0
) -> dict[str, Any]:
    """A completion as a JSON value: {"prompt", "completion", "experts": names or null, "tokens"}.

    Each of `tokens` is {"text", "experts": [names of the two with the most gate weight], "from_prompt"}, prompt's and
    completion's in order.

    Args and Raises: as `chat`.
    """
    check_completion(model_path, temperature, prompt)
    model, tokenizer = load_to_chat(model_path), load_tokenizer(model_path)
    names = expert_names(model_path, model) if count_experts(model) else None
    choose = pick(temperature, torch.Generator().manual_seed(rng_seed))
    shown = list(complete_token_by_token(model, tokenizer, prompt_ids(tokenizer, prompt), max_new_tokens, choose))
    return {
        "prompt": prompt,
        "completion": "".join(token.text for token in shown if not token.from_prompt),
        "experts": names,
        "tokens": [
            {"text": token.text, "experts": [names[i] for i in token.pair] if names else [],
             "from_prompt": token.from_prompt}
            for token in shown
        ],
    }  # fmt: skip


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens of a prompt: as the chat template says where there is one, else like a document's start.

    Raises:
        UserError: the prompt is no valid text.
        CheckpointError: the chat template is broken, refuses the prompt or makes nothing of it.
    """
    check_prompt(prompt)
    if not getattr(tokenizer, "chat_template", None):
        encoder = DocumentEncoder(tokenizer)
        ids = encoder([prompt])[0]
        return ids[:-1] if encoder.trailing_eos else ids
    where = f"{tokenizer.name_or_path}: its chat template"
    otherwise = "Mend chat_template.jinja, or move it away and the prompt is completed as plain text"
    try:
        message = [{"role": "user", "content": prompt}]
        rendered = cast(str, tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything
        blame(error)
        raise CheckpointError(
            f"{where} does not take the message: {first_line(error)} ({type(error).__name__}). {otherwise}"
        ) from error
    ids = cast(list[int], tokenizer.encode(rendered, add_special_tokens=False))
    if not ids:
        raise CheckpointError(f"{where} makes nothing of the message. {otherwise}")
    return ids


def pick(temperature: float, random: torch.Generator) -> Callable[[Tensor], int]:
    """How the next token is chosen from its logits (V,)."""
    if temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    return lambda logits_V: int(
        torch.multinomial((logits_V.float().cpu() / temperature).softmax(dim=-1), 1, generator=random)
    )


@torch.inference_mode()
def complete_token_by_token(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int],
    max_new_tokens: int, choose: Callable[[Tensor], int],
) -> Iterator[ShownToken]:  # fmt: skip
    """The prompt's tokens, but for a separator at its start, then the completion's, each as soon as its experts are
    known.

    Experts are those that read the token, so a new token comes with the forward pass after the one that chose it. Of
    Branch-Train-Merge they are the two models with the most weight in what follows the token.
    """
    texts, reader = TokenTexts(tokenizer), open_reader(model)
    new_ids, ids_1S = list(prompt), torch.empty(1, 0, dtype=torch.long, device=model.device)
    shown, separators = 0, {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for made in range(max_new_tokens + 1):
        ids_1S = torch.cat([ids_1S, torch.tensor([new_ids], device=model.device)], dim=1)
        scores_V = reader.scores(ids_1S, torch.ones_like(ids_1S))[0]
        if isinstance(reader, BtmReader):
            pairs = [tuple(sorted(reader.weights_BN[0].topk(2).indices.tolist()))] * len(new_ids)
        else:
            pairs = top_pairs(cast(Any, model), len(new_ids))
        for token, pair in zip(new_ids, pairs, strict=True):
            if shown or token not in separators:
                yield ShownToken(texts(token), pair, from_prompt=shown < len(prompt))
            shown += 1
        token = choose(scores_V)
        if made == max_new_tokens or token == tokenizer.eos_token_id:
            break
        new_ids = [token]
    if rest := texts.rest():
        yield ShownToken(rest, (), from_prompt=shown <= len(prompt))


def top_pairs(model: PreTrainedModel, tokens: int) -> list[tuple[int, ...]]:
    """For each token of the last forward pass the two experts with the most gate weight over all layers, ascending."""
    routings = [block.routing for block in moe_blocks(model) if block.routing is not None]
    if not routings:
        return [()] * tokens
    gates_TE = torch.stack([sparse_gates(routing).cpu() for routing in routings]).sum(dim=0)  # of several devices
    return [tuple(sorted(pair)) for pair in gates_TE.topk(min(2, gates_TE.shape[1]), dim=-1).indices.tolist()]


def load_to_chat(model_path: Path, log: Callable[[str], None] = lambda line: None) -> PreTrainedModel | SideBySide:
    """A model, or several side by side, where it answers: on GPUs if there are any.

    Args:
        log: called with a line where it does not fit one device.
    """
    return load_model_or_btm(model_path, Place(choose_device("auto").type, log=log))


def count_experts(model: PreTrainedModel | SideBySide) -> int:
    """Experts of a layer, or models side by side; 0 for a dense model."""
    if isinstance(model, BtmModel):
        return len(model.members)
    blocks = moe_blocks(cast(nn.Module, model))
    return blocks[0].gate.weight.shape[0] if blocks else 0


def expert_names(model_path: Path, model: PreTrainedModel | SideBySide) -> list[str]:
    """Names of the experts from the mix's record where one lies beside the model or in its run, else their numbers."""
    if isinstance(model, BtmModel):
        return list(model.members)
    if not count_experts(model):
        raise CheckpointError(f"{model_path}: a dense model has no experts to show; leave out --show-experts")
    count = count_experts(model)
    folder = model_path.resolve()
    for record in (folder / "mix.json", folder.parent / "mix.json", folder.parent.parent / "mix" / "mix.json"):
        if record.is_file():
            names = list(read_output(record, MixRecord).get("experts", ()))
            if len(names) == count:
                return names
    return [f"expert {i}" for i in range(count)]
