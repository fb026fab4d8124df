"""Recipe section: what the finetuned model is trained on afterwards, conversations and preferences. Plain Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from btx.choices.trainable import ALIGN_TRAINABLE
from btx.recipe.section import PathText, PositiveFloat, PositiveInt, Section, Share, Weight
from btx.recipe.training import Finetune, Lora, MicroBatchTokens, OnSpike, Schedule

if TYPE_CHECKING:
    AlignTrainable = str
else:
    AlignTrainable = Literal[tuple(ALIGN_TRAINABLE)]

ROWS_A_STEP = 32
"""Sequences of an optimiser step that names no `batch_tokens`."""
LEAST_STEPS = 10
"""Steps that are made of few sequences, by taking fewer a step."""
WARMUP_SHARE = 0.05
"""Of the optimiser steps, where `warmup_steps` is not named."""
ADAPTERS_LEARN_FASTER = 10.0
"""Learning rate of adapters over that of all weights, where neither is named."""
OWN = {"data", "epochs", "too_long", "lora", "beta"}
"""Fields that a training section has not."""


class Alignment(Section):
    """What SFT and DPO have in common. What a section leaves out and has no default here is as in `finetune`."""

    data: Annotated[list[PathText], Field(min_length=1)]
    """JSONL file or files (.jsonl, .jsonl.gz, .jsonl.zst), or one path; relative to `data.root`."""
    epochs: PositiveFloat | None = None
    """How often the training goes through its data; default: SFT three times, DPO once."""
    tokens: PositiveInt | None = None
    """Training tokens, instead of `epochs`."""
    too_long: Literal["leave_out", "cut", "refuse"] = "leave_out"
    """What becomes of conversations that do not fit into `data.sequence_length`, of DPO pairs whose two answers with
    their prompts do not fit together. leave_out: not trained on; cut: what is beyond is not trained on; refuse: the
    training does not begin. The log says how many."""
    trainable: AlignTrainable = "all"
    """Which weights train. lora: adapters on the experts and on the attention, merged into the weights at the end, as
    in `train.trainable`; routers get none."""
    lora: Lora = Lora()
    """Size of the adapters, with `trainable: lora`."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; default: a share of `finetune.learning_rate`, for SFT a fifth, for DPO a two-hundredth, and
    ten times as much for adapters."""
    batch_tokens: PositiveInt | None = None
    """Tokens an optimiser step; default: 32 sequences, and at least ten steps."""
    micro_batch_tokens: MicroBatchTokens | None = None
    """Tokens a forward and backward pass, or auto."""
    schedule: Schedule | None = None
    """Learning rate after the warm-up: cosine, constant or wsd."""
    final_learning_rate_share: Share | None = None
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps of linear warm-up; default: a twentieth of the steps."""
    weight_decay: Weight | None = None
    """AdamW's decoupled weight decay."""
    clip: PositiveFloat | None = None
    """Largest global gradient norm."""
    on_spike: OnSpike | None = None
    """What to do about a loss spike: log, skip or stop."""
    load_balancing: Weight | None = None
    """Weight α of the load-balancing loss, the paper's, layer by layer, as in the finetuning; 0: none."""

    PAIRS: ClassVar[bool] = False
    """Whether a line has two answers, of which one is better."""
    EPOCHS: ClassVar[float]
    SHARE_OF_FINETUNING: ClassVar[float]

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("data"), str):
            return values | {"data": [values["data"]]}
        return values

    @field_validator("data")
    @classmethod
    def _each_file_once(cls, data: list[str]) -> list[str]:
        if twice := sorted({path for path in data if data.count(path) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice; `epochs` says how often it is read")
        return data

    @model_validator(mode="after")
    def _lora_trains(self) -> Alignment:
        if self.trainable != "lora" and self.lora != Lora():
            raise ValueError(f"lora goes with trainable: lora; here it is {self.trainable}")
        return self

    @model_validator(mode="after")
    def _tokens_or_epochs(self) -> Alignment:
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("tokens and epochs say the same thing in two ways; give one of them")
        return self

    def training(self, finetune: Finetune, rows: int, sequence_length: int) -> Finetune:
        """The settings of this training in full.

        Args:
            finetune: the recipe's, which says what is left out here.
            rows: training sequences there are.
            sequence_length: tokens of each.
        """
        epochs = self.EPOCHS if self.epochs is None else self.epochs
        tokens = self.tokens or math.ceil(epochs * rows) * sequence_length
        batch = min(ROWS_A_STEP, max(1, tokens // sequence_length // LEAST_STEPS)) * sequence_length
        faster = ADAPTERS_LEARN_FASTER if self.trainable == "lora" else 1.0
        settings = finetune.model_copy(update={
            "tokens": tokens, "batch_tokens": batch, "mixture": None, "switching": 0.0, "warmup_steps": 0,
            "learning_rate": finetune.learning_rate * self.SHARE_OF_FINETUNING * faster,
            **self.model_dump(exclude_none=True, exclude={*OWN, "tokens"}),
            **({"trainable": "all", "compile": False} if self.trainable == "lora" else {}),  # adapters are put on later
        })  # fmt: skip
        steps = settings.steps(sequence_length)
        warmup = self.warmup_steps if self.warmup_steps is not None else min(steps - 1, math.ceil(WARMUP_SHARE * steps))
        return settings.model_copy(update={"warmup_steps": warmup})


class Sft(Alignment):
    """Supervised finetuning on conversations: the loss is on the assistant's answers alone, the end of each included.

    A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, roles system,
    user and assistant; or {"prompt": ..., "completion": ...}, both texts or both lists of messages.
    """

    EPOCHS: ClassVar[float] = 3.0
    SHARE_OF_FINETUNING: ClassVar[float] = 1 / 5


class Dpo(Alignment):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) on pairs of a better and a worse answer, after
    SFT where there is one. The reference is the model before DPO; what it says of the pairs is computed once.

    A line is {"prompt": ..., "chosen": ..., "rejected": ...}, all texts or all lists of messages; without `prompt` it
    is what both answers begin with.
    """

    beta: PositiveFloat = 0.1
    """β of the loss: how closely the model keeps to the reference."""

    PAIRS: ClassVar[bool] = True
    EPOCHS: ClassVar[float] = 1.0
    SHARE_OF_FINETUNING: ClassVar[float] = 1 / 200


class Align(Section):
    """What the finetuned model is trained on afterwards; each part leaves a model of the run with its name."""

    sft: Sft | None = None
    """Supervised finetuning, model `sft`."""
    dpo: Dpo | None = None
    """Preference optimisation of `sft`, else of the finetuned model: model `dpo`."""

    @property
    def sections(self) -> dict[str, Alignment]:
        """Name → section, in the order in which they train."""
        return {name: section for name, section in (("sft", self.sft), ("dpo", self.dpo)) if section is not None}

    @model_validator(mode="after")
    def _something_to_do(self) -> Align:
        if not self.sections:
            raise ValueError("align needs sft, dpo or both; leave it out where the model stays as it is finetuned")
        return self
