"""Recipe sections: training of the seed model, the branches, the mixed model and the baselines. Plain Python.

Defaults are the paper's (arXiv 2403.07816, section 4.1) wherever it states a number; without `paper: true` those of
batch, learning rate, warm-up and checkpoint interval give way to what `btx.recipe.derived` fills in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from btx.files import home_filled
from btx.hub_names import hub_name, is_hub_name
from btx.recipe.section import (
    DenseTrainable,
    MoeTrainable,
    Name,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Weight,
)

OnSpike = Literal["log", "skip", "stop"]
Schedule = Literal["cosine", "wsd", "constant"]
DecayShape = Literal["linear", "cosine", "sqrt"]
OF_THE_DECAY = ("decay_share", "decay_shape")
"""Settings that go with `schedule: wsd` alone."""
MicroBatchTokens = PositiveInt | Literal["auto"]
WORTH_COMPILING = 10_000
"""Layers times micro-batches of a training. On one H100 compiling took 9 to 20 s, whatever the model, and saved 1.3 to
2.5 ms a layer and micro-batch, of 1.2B and of 7M parameters (LOG.md)."""
UNTRIED_MICRO_BATCH = 16_384
"""What `micro_batch_tokens: auto` counts as where nothing was tried: in plans."""


class Training(Section):
    """One training stage: the paper's optimiser recipe (section 4.1) unless overridden."""

    tokens: PositiveInt
    """Training tokens."""
    batch_tokens: PositiveInt = 4_000_000
    """Tokens an optimiser step (paper: 4M)."""
    micro_batch_tokens: MicroBatchTokens = 16_384
    """Tokens a forward and backward pass, or auto for the most that fit into memory. Gradients accumulate up to
    `batch_tokens`. auto is tried out when the training begins, and noted (docs/memory.md)."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up. cosine: falls from the first step to the last (the paper's); constant: stays at
    the peak, so that a training can be gone on with, or branched from, as if it had been longer from the start; wsd:
    stays there and falls at the end (warm-up, stable, decay: arXiv 2404.06395, section 4). Where the command line, a
    sweep's variant or a recipe that extends another names one without a decay, the other's decay_* no longer count."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """wsd: share of the steps in which it falls; never before the warm-up is over."""
    decay_shape: DecayShape = "sqrt"
    """wsd: how it falls. linear, cosine, or sqrt: 1 - √progress, fastest at its start (arXiv 2405.18392, section 4)."""
    final_learning_rate_share: Share = 0.1
    """Learning rate at the end of a cosine or decay, as a share of the peak (paper: 10 %); of no use to constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps of linear warm-up, at most all."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's first decay (not stated in the paper)."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's second decay (not stated in the paper)."""
    weight_decay: Weight = 0.1
    """AdamW's decoupled weight decay; norms and biases are left out."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; master weights and optimiser state stay float32. auto: bfloat16 on a GPU that
    has units for it, float32 on a CPU, so that results do not depend on the kind of CPU."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps both moments in 8 bits, 2 bytes a weight instead of 8; needs `pip install
    "branchtrainmix[adam8bit]"`."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrices have no float32 master; the optimiser rounds its update by chance, which is right on average.
    Goes with `precision: bfloat16` and `optimizer: adamw_8bit`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    compile: Literal["auto"] | bool = "auto"
    """Whether torch compiles the decoder layers before training: the same results but for rounding. auto: on GPUs
    alone, in trainings long enough for it to pay, and with CUDA graphs where a layer is so small that launching its
    kernels takes longer than running them. Where nothing can be compiled, training says so and goes on without."""
    checkpoint_every: PositiveInt = 100
    """Optimiser steps between two resumable checkpoints."""
    on_spike: OnSpike = "log"
    """What to do about a step whose loss or gradient norm stands far out from the last 100 (docs/footguns.md). log: say
    so; skip: say so and leave weights and moments as they were; stop: save what was before it, and fail. A NaN fails
    too, unless it is skip, and then after more than ten such steps in a row."""

    @model_validator(mode="after")
    def _what_falls_is_wsd(self) -> Training:
        for name in OF_THE_DECAY:
            if self.schedule != "wsd" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} goes with schedule: wsd; here it is {self.schedule}")
        return self

    @model_validator(mode="after")
    def _weights_go_with_the_rest(self) -> Training:
        if self.weights == "bfloat16" and (self.precision, self.optimizer) != ("bfloat16", "adamw_8bit"):
            raise ValueError(
                f"weights: bfloat16 goes with precision: bfloat16 and optimizer: adamw_8bit; precision is "
                f"{self.precision}, optimizer is {self.optimizer}"
            )
        return self

    def step_samples(self, sequence_length: int) -> int:
        """Sequences of an optimiser step, one at least."""
        return max(1, self.batch_tokens // sequence_length)

    def step_tokens(self, sequence_length: int) -> int:
        """Tokens of an optimiser step, in whole sequences."""
        return self.step_samples(sequence_length) * sequence_length

    def micro_batch(self, sequence_length: int) -> int:
        """Tokens of a forward and backward pass: whole sequences, one at least."""
        tokens = UNTRIED_MICRO_BATCH if self.micro_batch_tokens == "auto" else self.micro_batch_tokens
        whole = max(1, tokens // sequence_length) * sequence_length
        return min(whole, self.step_tokens(sequence_length))

    def steps(self, sequence_length: int) -> int:
        """Optimiser steps that use up `tokens`, the last one whole."""
        return math.ceil(self.tokens / self.step_tokens(sequence_length))

    def trained_tokens(self, sequence_length: int) -> int:
        """Tokens of all steps: `tokens`, up to the end of the last step."""
        return self.steps(sequence_length) * self.step_tokens(sequence_length)

    def compiles(self, sequence_length: int, layers: int, *, on_gpu: bool) -> bool:
        """Whether a model of so many decoder layers is to be compiled; when a training goes on, too."""
        micro_batches = math.ceil(self.step_tokens(sequence_length) / self.micro_batch(sequence_length))
        if self.compile == "auto":
            return on_gpu and self.steps(sequence_length) * micro_batches * layers >= WORTH_COMPILING
        return self.compile


class SeedTraining(Training):
    """Training of a small seed model from scratch."""

    mixture: dict[str, Weight] | None = None
    """Domain → sampling weight; default: the general domain alone."""


class TokenizerTraining(Section):
    """A byte-level BPE tokenizer trained on the seed model's data."""

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    """Entries, special tokens included."""
    train_bytes: PositiveInt = 4_000_000
    """Bytes of text it is trained on."""


class SeedModel(Section):
    """The LLM that is branched: a folder, a hub name, or a small config to train from scratch."""

    path: PathText | None = None
    """Folder or hub name of a Hugging Face causal language model: `hf:ORG/NAME`, `hf:ORG/NAME@REVISION`, or ORG/NAME
    where no such folder is."""
    revision: str | None = None
    """Git revision of a hub name."""
    plan_config: dict[str, Any] | None = None
    """Config of the model at `path`, so that `btx plan` needs neither the hub nor the folder; a run checks that the
    model is what is said here."""
    pretrained_tokens: Annotated[float, Field(ge=1, le=1e18)] | None = None
    """Tokens that the model at `path` has read, as a number (15e12): with them `btx plan` predicts what a mixture
    gains. Default: what its card says."""
    config: dict[str, Any] | None = None
    """Config of a model to train from scratch: `model_type` and what its config class takes."""
    tokenizer: TokenizerTraining = TokenizerTraining()
    """Tokenizer of a model from scratch."""
    train: SeedTraining | None = None
    """Training of a model from scratch."""

    @model_validator(mode="before")
    @classmethod
    def _from_the_hub(cls, values: Any) -> Any:
        """`hf:ORG/NAME@REVISION` is a hub name and its revision."""
        if not isinstance(values, dict) or not is_hub_name(values.get("path")):
            return values
        model = hub_name(values["path"])
        if Path(model.repository).exists():
            raise ValueError(f"{values['path']} is a model of the hub, but there is a folder {model.repository} here, "
                             f"which would be taken for it; move it, or start btx elsewhere")  # fmt: skip
        if model.revision and values.get("revision") not in (None, model.revision):
            raise ValueError(f"{values['path']} and revision: {values['revision']} name two revisions")
        return values | {"path": model.repository, "revision": model.revision or values.get("revision")}

    @field_validator("path")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        """`~` is filled in once, for all who read it: what is no folder would be taken for a hub name."""
        return str(home_filled(path)) if path is not None and path.startswith("~") else path

    @model_validator(mode="after")
    def _one_kind(self) -> SeedModel:
        if (self.path is None) == (self.config is None):
            raise ValueError("seed_model needs exactly one of `path` (folder or hub name) and `config` (from scratch)")
        if self.config is not None and self.train is None:
            raise ValueError("seed_model.config needs seed_model.train: a model from scratch has to be trained")
        if self.path is not None and self.train is not None:
            raise ValueError("seed_model.path is taken as it is; seed_model.train goes with seed_model.config only")
        for name in ("plan_config", "pretrained_tokens"):
            if getattr(self, name) is not None and self.path is None:
                raise ValueError(f"seed_model.{name} goes with seed_model.path; a model from scratch has its own")
        for name, config in (("config", self.config), ("plan_config", self.plan_config)):
            if config is not None and "model_type" not in config:
                raise ValueError(f"seed_model.{name} needs model_type, for example llama")
        return self


class Lora(Section):
    """The adapter that a branch trains with `trainable: lora`: W + (alpha / rank) B A on every FF projection W."""

    rank: PositiveInt = 16
    """Rows of A and columns of B; more holds more of a domain, and costs memory."""
    alpha: PositiveFloat = 32.0
    """The product is scaled by alpha / rank, so that one learning rate suits all ranks."""


class Train(Training):
    """Training of the branches, one process each (paper section 3.1)."""

    domains: Annotated[list[Name], Field(min_length=1)]
    """One expert model is trained on each."""
    domain_tokens: dict[Name, PositiveInt] = {}
    """Domain → training tokens, for branches that train on another number than `tokens`."""
    replay: Share = 0.1
    """Share of general text mixed into every domain (paper: 5-9 %)."""
    trainable: DenseTrainable = "feed_forward"
    """Which weights train. feed_forward: the shared weights stay the seed's, so the mix loses nothing, and a learning
    rate of two to four times that of all weights is right; the paper: all. lora: adapters on the feed-forward weights,
    merged into them at the end; for machines that cannot hold the gradients and moments of feed_forward."""
    lora: Lora = Lora()
    """Size of the adapter, with `trainable: lora`."""

    @model_validator(mode="after")
    def _lora_trains(self) -> Train:
        if self.trainable != "lora" and self.lora != Lora():
            raise ValueError(f"train.lora goes with train.trainable: lora; here it is {self.trainable}")
        return self


class LearningRateFactors(Section):
    """Multiples of the learning rate for the parts of a MoE model; 1 for all is one learning rate."""

    routers: PositiveFloat = 1.0
    """Factor of the learning rate for the routers."""
    experts: PositiveFloat = 1.0
    """Factor of the learning rate for the experts."""
    shared: PositiveFloat = 1.0
    """All other weights."""


class Finetune(Training):
    """Finetuning of the mixed model (paper section 3.2)."""

    mixture: dict[str, Weight] | None = None
    """Domain → sampling weight, normalised; default: all experts' domains and the general domain equally."""
    switching: Share = 0.0
    """Share of the training sequences that go on, from their middle, with the second half of another sequence of the
    mixture (by chance at times of the same domain); attention goes on across. For texts that mix domains; baselines
    get the same (docs/results.md)."""
    trainable: MoeTrainable = "all"
    """Which weights train; shared are all but experts and routers."""
    learning_rate_factors: LearningRateFactors = LearningRateFactors()
    """Learning rate of each part, as a multiple of learning_rate."""
    load_balancing: Weight = 0.01
    """Weight α of the load-balancing loss, per layer (paper: 0.01)."""
    load_balancing_kind: Literal["paper", "pooled"] = "paper"
    """paper: gates times probabilities, in every layer; pooled: transformers' loss, to compare with."""
    load_balancing_over_layers: Literal["sum", "mean"] = "sum"
    """How the layers' losses become one (not stated in the paper)."""
    load_balancing_over: Literal["micro_batch", "global_batch"] = "micro_batch"
    """Batch whose means are balanced: each micro-batch for itself, or all of an optimiser step on all processes."""
    load_balancing_bias: Weight = 0.0
    """top_k: balancing without a loss (arXiv 2408.15664; 0.001 there): after each optimiser step the bias that is added
    to an expert's probability when experts are chosen rises or falls by this much; in training alone."""
    router_z_loss: Weight = 0.0
    """Weight of the router z-loss, logsumexp² of the router logits (arXiv 2202.08906; 0.001 there)."""
    dense_router_gradient: bool = False
    """top_k: run every expert on every token in training, so that the router learns from all (DenseMixer); costs N/k
    times the feed-forward FLOPs."""


class BaselineTraining(Section):
    """Training settings of one baseline; what is left out is as in the run: the first of two phases (the branches'
    data) has the settings of `train`, all else those of `finetune`."""

    tokens: PositiveInt | None = None
    """Training tokens of all phases together, instead of those it is matched by; phases are scaled alike."""
    batch_tokens: PositiveInt | None = None
    """Tokens an optimiser step."""
    micro_batch_tokens: MicroBatchTokens | None = None
    """Tokens a forward and backward pass, or auto for the most that fit."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of every phase."""
    domains_learning_rate: PositiveFloat | None = None
    """dense, upcycling: peak learning rate of the first phase; default: learning_rate."""
    schedule: Schedule | None = None
    """Learning rate after the warm-up of each phase: cosine, constant or wsd."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """wsd: share of each phase's steps in which it falls."""
    decay_shape: DecayShape | None = None
    """wsd: how it falls."""
    final_learning_rate_share: Share | None = None
    """Learning rate at the end of each phase, as a share of its peak."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps of linear warm-up in each phase."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """AdamW's first decay."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """AdamW's second decay."""
    weight_decay: Weight | None = None
    """AdamW's decoupled weight decay."""
    clip: PositiveFloat | None = None
    """Largest global gradient norm."""
    on_spike: OnSpike | None = None
    """What to do about a loss spike: log, skip or stop."""
    load_balancing: Weight | None = None
    """MoE baselines: weight α of the load-balancing loss."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given, except for the tokens and the first phase's learning rate."""
        return self.model_dump(exclude_none=True, exclude={"tokens", "domains_learning_rate"})
