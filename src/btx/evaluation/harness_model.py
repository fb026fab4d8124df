"""A loaded model as lm-eval wants it: its own Hugging Face adapter, with batches that fit and prompts counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from btx.models.measuring_memory import ANSWERING
from btx.process import note_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.models.outputs import SideBySide

LOGITS_AT_ONCE = 2**27
"""Logits of one forward pass: 512 MiB in float32, which lm-eval holds twice."""
MOST_ROWS = 64


class HarnessModel(HFLM):
    """lm-eval's adapter around a model object: dense, MoE, of a folder that only btx reads, or several side by side.

    Texts are encoded as lm-eval does it, with the special tokens the tokenizer adds by itself.
    """

    def __init__(self, model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.truncated = 0
        """Prompts so far that did not fit and lost their beginning; the choices of a question share one."""

    def _model_call(self, *arguments: Any, **named: Any) -> Any:
        note_progress()
        return super()._model_call(*arguments, **named)

    def _model_generate(self, *arguments: Any, **named: Any) -> Any:
        note_progress()
        return super()._model_generate(*arguments, **named)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        cut = {texts[0] for (texts, *_), length in zip(requests, lengths, strict=True)
               if texts and length > self.max_length + 1}  # fmt: skip
        self.truncated += len(cut)
        longest = min(max(lengths, default=1), self.max_length)
        rows = LOGITS_AT_ONCE // (longest * self.model.config.vocab_size)
        self.batch_size_per_gpu = max(1, min(rows, MOST_ROWS))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As lm-eval; a model with a short context gives at most half of it to the answer."""
        lengths = []
        for request in requests:
            prompt, settings = request.args
            settings["max_gen_toks"] = min(settings.get("max_gen_toks", self.max_gen_toks), self.max_length // 2)
            length, room = len(self.tok_encode(prompt)), self.max_length - settings["max_gen_toks"]
            self.truncated += length > room
            lengths.append(min(length, room) + settings["max_gen_toks"])
        self.batch_size_per_gpu = max(1, min(ANSWERING.tokens // max(lengths, default=1), MOST_ROWS))
        return super().generate_until(requests, disable_tqdm=True)
