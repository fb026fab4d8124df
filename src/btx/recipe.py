"""The recipe: everything a run is made from, typed, with a sentence and a unit under each field.

Defaults are the paper's (arXiv 2403.07816, section 4.1) wherever it states a number; a recipe for a small machine
overrides them. Reading YAML, dotted overrides and error positions live in `btx.recipe_loading`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from btx.baseline_kinds import BASELINES, BaselineName
from btx.merge_kinds import MergeSettings
from btx.router_kinds import RoutingSettings

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]

GENERATORS = ("math", "code", "knowledge", "general")


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Source(Section):
    """One place documents come from: exactly one of `path`, `hub`, `generate`, `domain`."""

    path: str | None = None
    """File, folder or glob: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt (documents are separated by
    `document_separator`); relative to `data.root`, else to the working directory."""
    hub: str | None = None
    """Dataset name on the Hugging Face hub, or a local dataset folder that `datasets.load_dataset` reads."""
    generate: Literal["math", "code", "knowledge", "general"] | None = None
    """Text made on the spot, without network: the demo's domains."""
    domain: str | None = None
    """Another domain of this recipe, whose token files are shared, not copied."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Git revision of a hub dataset."""
    streaming: bool = True
    """Read a hub dataset without downloading all of it first."""
    text: str = "text"
    """Column (parquet, hub) or key (JSONL) that holds the document."""
    document_separator: str = "\n\n\n"
    """In .txt files: the text between two documents, two blank lines if not said otherwise; empty: a file is one
    document."""
    max_bytes: PositiveInt | None = None
    """Stop after this many bytes of UTF-8 text (train and held-out together)."""
    weight: Weight = 1.0
    """Sampling weight among this domain's sources; weights are normalised."""

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        given = [kind for kind in ("path", "hub", "generate", "domain") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a source needs exactly one of path, hub, generate, domain; given: {given or 'none'}")
        return self


class Domain(Section):
    """A named data mixture. Short forms: a string is one `path`; a list is `sources`; a source's keys stand alone."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the documents come from, with weights."""
    held_out: str | None = None
    """File, folder or glob with the held-out documents. Without it: files named val*, valid*, test* or heldout*
    beside train* files, else `data.held_out` of the documents."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"sources": [{"path": value}]}
        if isinstance(value, list):
            return {"sources": [{"path": item} if isinstance(item, str) else item for item in value]}
        if isinstance(value, dict) and "sources" not in value:
            source = {key: item for key, item in value.items() if key != "held_out"}
            return {"sources": [source], **({"held_out": value["held_out"]} if "held_out" in value else {})}
        return value


class Data(Section):
    """The domains and how their documents become training sequences."""

    root: str | None = None
    """Folder that relative `path`s start from."""
    domains: dict[Name, Domain]
    """Domain name → sources."""
    general: Name = "general"
    """The domain the seed model is (or was) trained on: replay text of the branches, the generalist's domain."""
    sequence_length: PositiveInt = 4096
    """Tokens a training sequence (paper: 4096); documents are packed, attention stops at their borders."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Share of the documents kept out of training, where a source brings no held-out files."""

    @model_validator(mode="after")
    def _references(self) -> Data:
        for name, domain in self.domains.items():
            for source in domain.sources:
                if source.domain is None:
                    continue
                if source.domain not in self.domains or source.domain == name:
                    raise ValueError(f"domain {name!r} takes from unknown domain {source.domain!r}; "
                                     f"there are: {', '.join(self.domains)}")
                if any(inner.domain for inner in self.domains[source.domain].sources):
                    raise ValueError(f"domain {name!r} takes from {source.domain!r}, which itself takes from others")
        if self.general not in self.domains:
            raise ValueError(f"data.general names {self.general!r}, which is not in data.domains: "
                             f"{', '.join(self.domains)}")
        return self


class Training(Section):
    """One training stage: the paper's optimiser recipe (section 4.1) unless overridden."""

    tokens: PositiveInt
    """Training tokens."""
    batch_tokens: PositiveInt = 4_000_000
    """Tokens an optimiser step (paper: 4M)."""
    micro_batch_tokens: PositiveInt = 16_384
    """Tokens a forward and backward pass; gradients accumulate up to `batch_tokens`."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    final_learning_rate_share: Share = 0.1
    """Learning rate at the end of the cosine, as a share of the peak (paper: 10 %)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps of linear warm-up."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's first decay (not stated in the paper)."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's second decay (not stated in the paper)."""
    weight_decay: Weight = 0.1
    """AdamW's decoupled weight decay; norms and biases are left out."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; weights and optimiser state stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    checkpoint_every: PositiveInt = 100
    """Optimiser steps between two resumable checkpoints."""

    def step_tokens(self, sequence_length: int) -> int:
        """Tokens of an optimiser step: whole sequences, one at least."""
        return max(1, self.batch_tokens // sequence_length) * sequence_length

    def steps(self, sequence_length: int) -> int:
        """Optimiser steps that use up `tokens`, the last one whole."""
        return math.ceil(self.tokens / self.step_tokens(sequence_length))


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

    path: str | None = None
    """Folder or hub name of a Hugging Face causal language model."""
    revision: str | None = None
    """Git revision of a hub name."""
    plan_config: dict[str, Any] | None = None
    """Config of the model at `path`, so that `btx plan` needs neither the hub nor the folder; a run checks that the
    model is what is said here."""
    config: dict[str, Any] | None = None
    """Config of a model to train from scratch: `model_type` and what its config class takes."""
    tokenizer: TokenizerTraining = TokenizerTraining()
    """Tokenizer of a model from scratch."""
    train: SeedTraining | None = None
    """Training of a model from scratch."""

    @model_validator(mode="after")
    def _one_kind(self) -> SeedModel:
        if (self.path is None) == (self.config is None):
            raise ValueError("seed_model needs exactly one of `path` (folder or hub name) and `config` (from scratch)")
        if self.config is not None and self.train is None:
            raise ValueError("seed_model.config needs seed_model.train: a model from scratch has to be trained")
        if self.path is not None and self.train is not None:
            raise ValueError("seed_model.path is taken as it is; seed_model.train goes with seed_model.config only")
        if self.plan_config is not None and self.path is None:
            raise ValueError("seed_model.plan_config goes with seed_model.path; a model from scratch has its config")
        for name, config in (("config", self.config), ("plan_config", self.plan_config)):
            if config is not None and "model_type" not in config:
                raise ValueError(f"seed_model.{name} needs model_type, for example llama")
        return self


class Train(Training):
    """Training of the branches, one process each (paper section 3.1)."""

    domains: Annotated[list[Name], Field(min_length=1)]
    """One expert model is trained on each."""
    domain_tokens: dict[Name, PositiveInt] = {}
    """Domain → training tokens, for branches that train on another number than `tokens`."""
    replay: Share = 0.1
    """Share of general text mixed into every domain (paper: 5-9 %)."""
    trainable: Literal["all", "feed_forward"] = "all"
    """Which weights train; with feed_forward the shared weights stay the seed's and the mix loses nothing."""


class Mix(Section):
    """Mixing the expert models into one MoE model (paper section 3.2)."""

    generalist: bool = True
    """Add the untouched seed model as one more expert."""
    router: Literal["top_k", "switch", "sample_top1", "soft"] = "top_k"
    """How tokens are routed (paper: top_k; the others are its ablations); `btx ls routers` explains them."""
    top_k: PositiveInt = 2
    """Experts a token uses with the top_k router."""
    capacity_factor: PositiveFloat = 1.5
    """switch: rows an expert takes of a micro-batch in training, as a multiple of an equal share; more are dropped."""
    temperature_floor: PositiveFloat = 0.5
    """sample_top1: lowest temperature of the Gumbel-softmax."""
    temperature_rate: Weight = 1e-4
    """sample_top1: r of the temperature exp(-r·t) after t optimiser steps."""
    soft_first_layer: bool = True
    """sample_top1: the first layer uses all experts (paper); false makes the result a plain model with k = 1."""
    merge: Literal["mean", "seed", "weighted", "slerp", "ties", "dare"] = "mean"
    """How shared weights are merged; the paper: mean over experts and generalist. `btx ls merges` explains them."""
    merge_weights: dict[Name, Weight] | None = None
    """merge weighted: expert → weight, the generalist's too; normalised."""
    slerp_t: Share | None = None
    """merge slerp: 0 is the first model, 1 the second; default 0.5."""
    merge_density: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """merge ties, dare: share of every task vector's entries that is kept; default 0.2 and 0.5."""
    merge_scale: PositiveFloat | None = None
    """merge ties, dare: factor on the merged task vector (λ in the papers); default 1."""
    router_init: Literal["random", "zeros", "hidden_mean", "ridge"] = "random"
    """How the routers start; hidden_mean and ridge are computed from the domains' text."""
    router_std: PositiveFloat = 0.02
    """Standard deviation of random routers."""
    router_scale: PositiveFloat | None = None
    """hidden_mean, ridge: factor on the weights, the larger the sharper; default 1 and 10."""
    router_ridge: PositiveFloat = 1e-3
    """ridge: λ as a multiple of the mean of XᵀX's diagonal."""
    router_tokens: PositiveInt = 50_000
    """hidden_mean, ridge: tokens of every domain that are looked at."""
    split: PositiveInt = 1
    """Chunks every FF sublayer is cut into, each an expert of its own (paper section 4.3); 1 leaves experts whole."""
    split_rescale: bool = True
    """Multiply the chunks' outputs by `split`, so that the layer's output keeps its size."""
    blend: bool = False
    """Expert n gets the n-th chunk of every FF sublayer (paper section 4.3)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the mixed model's weights; default: the seed model's."""
    tokenizer_from: str | None = None
    """Expert (or `seed`) whose tokenizer the mixed model gets; vocabularies that differ are then allowed."""
    max_shard_size: str = "5GB"
    """Size a weights file has at most."""


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
    trainable: Literal["all", "all_but_experts", "routers", "shared"] = "all"
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


def _each_once(names: list[BaselineName]) -> list[BaselineName]:
    """Refuse a baseline that is named twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice")
    return names


class BaselineTraining(Section):
    """Training settings of one baseline; what is left out is as in the run: the first of two phases (the branches'
    data) has the settings of `train`, all else those of `finetune`."""

    tokens: PositiveInt | None = None
    """Training tokens of all phases together, instead of those it is matched by; phases are scaled alike."""
    batch_tokens: PositiveInt | None = None
    """Tokens an optimiser step."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens a forward and backward pass."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of every phase."""
    domains_learning_rate: PositiveFloat | None = None
    """dense, upcycling: peak learning rate of the first phase; default: learning_rate."""
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
    load_balancing: Weight | None = None
    """MoE baselines: weight α of the load-balancing loss."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given, except for the tokens and the first phase's learning rate."""
        return self.model_dump(exclude_none=True, exclude={"tokens", "domains_learning_rate"})


class Task(Section):
    """Questions answered greedily and scored by exact match."""

    generate: Literal["math", "knowledge"] | None = None
    """Held-out questions of a generated domain."""
    path: str | None = None
    """JSONL file (.jsonl, .jsonl.gz) with one question a line; relative to `data.root`."""
    prompt: str = "prompt"
    """Key of the question in the file."""
    answer: str = "answer"
    """Key of the gold answer in the file."""
    answer_after: str | None = None
    """Compare only what follows the last occurrence of this text in the output and in the gold answer."""
    questions: PositiveInt = 200
    """Questions asked, from the start of the file."""
    max_new_tokens: PositiveInt = 128
    """Tokens generated at most; a line end after the answer or the end-of-text token stops earlier."""

    @model_validator(mode="after")
    def _one_kind(self) -> Task:
        if (self.generate is None) == (self.path is None):
            raise ValueError("a task needs exactly one of `generate` and `path`")
        return self


class Mixed(Section):
    """Held-out documents that switch domain in the middle. They are no domain: the mean over domains leaves them out.
    Short form: a number is `documents`."""

    documents: Annotated[int, Field(ge=0)] = 0
    """Documents measured; 0: none."""
    kind: Literal["halves", "generated"] = "halves"
    """halves: the first half of a held-out document of one domain and the second half of one of another, every pair of
    domains equally often; generated: word problems solved in Python, calculations with facts, code with prose, in
    recipes whose domains come from the generators math, code, knowledge and general."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"documents": value} if isinstance(value, int) and not isinstance(value, bool) else value


class HarnessTask(Section):
    """A task of lm-evaluation-harness. Short form: a string is its `file`."""

    name: str | None = None
    """Task: gsm8k, humaneval, mbpp, triviaqa, arc_easy, arc_challenge, piqa, winogrande or mmlu, or any task, group or
    tag that the installed lm-eval knows; default: the name it has in the recipe."""
    file: str | None = None
    """JSONL file (.jsonl, .jsonl.gz) with its documents, relative to `data.root`; without it lm-eval loads them from
    the Hugging Face hub."""
    shots_file: str | None = None
    """JSONL file that the shots are taken from; default: the start of `file`, which is then not scored."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Solved examples shown before each question; default: the paper's where it uses the task, else lm-eval's."""
    limit: PositiveInt | None = None
    """Documents scored at most, evenly spread over the file (from the hub: the first); default: all."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else {} if value is None else value

    @model_validator(mode="after")
    def _shots_go_with_a_file(self) -> HarnessTask:
        if self.shots_file is not None and self.file is None:
            raise ValueError("shots_file goes with file: a task from the hub has its own shots")
        return self


CODE_TASKS = ("humaneval", "mbpp")


class Harness(Section):
    """Tasks of lm-evaluation-harness; needs `pip install "branchtrainmix[eval]"`."""

    tasks: dict[Name, HarnessTask] = {}
    """Name in the results → task. Short form: a list of names."""
    allow_code_execution: bool = False
    """Run programs that the models write (humaneval, mbpp), each in a fenced-in process; read
    docs/evaluation-tasks.md first."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_names(cls, value: Any) -> Any:
        names = value.get("tasks") if isinstance(value, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return value | {"tasks": {name: {} for name in names}}
        return value

    @model_validator(mode="after")
    def _code_is_run_only_if_allowed(self) -> Harness:
        for label, task in self.tasks.items():
            name = task.name or label
            if name in CODE_TASKS and not self.allow_code_execution:
                raise ValueError(f"evaluate.harness.tasks.{label}: {name} runs programs that the models write; read "
                                 f"docs/evaluation-tasks.md, then set evaluate.harness.allow_code_execution: true")
            if name in CODE_TASKS and task.file is None:
                raise ValueError(f"evaluate.harness.tasks.{label}: {name} needs a file; lm-eval's own {name} would run "
                                 f"programs without limits and load code from the hub")
        return self


class Evaluate(Section):
    """What is measured on which models."""

    tokens: PositiveInt = 200_000
    """Held-out tokens a domain, at most."""
    mixed: Mixed = Mixed()
    """Documents that switch domain in the middle."""
    tasks: dict[Name, Task] = {}
    """Task name → questions."""
    harness: Harness = Harness()
    """Tasks of lm-evaluation-harness, besides `tasks`."""

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluate:
        for name in self.tasks.keys() & self.harness.tasks.keys():
            raise ValueError(f"evaluate.tasks and evaluate.harness.tasks both have {name!r}; results need two names")
        return self


class Analyze(Section):
    """Which expert each token uses."""

    tokens: PositiveInt = 50_000
    """Held-out tokens a domain, at most."""
    examples: Annotated[int, Field(ge=0)] = 3
    """Documents a domain shown token by token in the report."""


class Launch(Section):
    """How jobs are started."""

    kind: Literal["local"] = "local"
    """Launcher: processes of this machine."""
    jobs: PositiveInt | None = None
    """Jobs (branches, finetuning, baselines) trained at the same time; default: as many as there are branches."""
    threads: PositiveInt | None = None
    """CPU threads a job; default: the processors shared among the jobs, at least one each."""


class Sweep(Section):
    """What `btx sweep` makes of the recipe: all combinations of variants and varied values, times rng seeds."""

    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted key → the values it takes, for example `finetune.tokens: [1e6, 2e6]`."""
    variants: dict[Name, dict[str, Any]] = {}
    """Name → dotted keys and the value each has in this variant; `{}` is the recipe as it stands."""
    rng_seeds: PositiveInt = 3
    """Rng seeds every variant runs with: rng_seed, rng_seed + 1, ..."""
    models: list[str] | None = None
    """Models (names in results.json) the table shows, in this order; default: all."""


class Recipe(Section):
    """A whole Branch-Train-MiX run."""

    name: Name
    """Name of the run; its folder is runs/<name> unless `run` says otherwise."""
    description: str = ""
    """What the recipe is for, what it costs and what to expect."""
    extends: str | None = None
    """Packaged recipe or recipe file that says what this one leaves out. Sections are merged key by key; a list, a
    mixture, the domains, the tasks or a config given here replace the other recipe's as a whole."""
    run: str | None = None
    """Run folder."""
    rng_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random number seed of everything."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training and evaluation run."""
    data: Data
    seed_model: SeedModel
    train: Train
    mix: Mix = Mix()
    finetune: Finetune
    baselines: Annotated[list[BaselineName], AfterValidator(_each_once)] = ["soup"]
    """Models to compare with, each a stage `baselines/<name>` and a row of the results; `btx ls baselines` explains
    them."""
    baseline_training: dict[BaselineName, BaselineTraining] = {}
    """Baseline → training settings of its own, for example from a learning-rate search."""
    evaluate: Evaluate = Evaluate()
    analyze: Analyze = Analyze()
    launch: Launch = Launch()
    sweep: Sweep | None = None
    """Variants `btx sweep` runs; `btx run` takes no notice of it."""

    @model_validator(mode="after")
    def _domains_exist(self) -> Recipe:
        known = set(self.data.domains)
        for where, names in (
            ("train.domains", self.train.domains),
            ("finetune.mixture", self.finetune.mixture or ()),
            ("seed_model.train.mixture", (self.seed_model.train and self.seed_model.train.mixture) or ()),
        ):
            for name in names:
                if name not in known:
                    there = ", ".join(sorted(known))
                    raise ValueError(f"{where} names {name!r}, which is not in data.domains: {there}")
        if len(set(self.train.domains)) != len(self.train.domains):
            raise ValueError(f"train.domains names a domain twice: {self.train.domains}")
        for name in self.train.domain_tokens.keys() - set(self.train.domains):
            raise ValueError(f"train.domain_tokens names {name!r}, which is not in train.domains")
        if "seed" in known:
            raise ValueError("a domain cannot be called 'seed': the word names the seed model's job")
        if len(self.member_names) < 2:
            raise ValueError("a mixture needs at least two experts: add a domain to train.domains or mix.generalist")
        if self.mix.router == "top_k" and self.mix.top_k > len(self.expert_names):
            raise ValueError(f"mix.top_k is {self.mix.top_k}, but there are only {len(self.expert_names)} experts")
        if self.finetune.dense_router_gradient and self.mix.router != "top_k":
            raise ValueError(f"finetune.dense_router_gradient goes with mix.router: top_k, not {self.mix.router}")
        self._check_finetuning()
        if self.mix.blend and self.mix.split > 1:
            raise ValueError("mix.split and mix.blend exclude each other")
        if self.mix.blend and self.mix.router_init in ("hidden_mean", "ridge"):
            raise ValueError("mix.router_init needs experts with domains; with mix.blend they have none")
        self._mixed_set_exists()
        for problem in self.merge_settings.problems(self.member_names):
            raise ValueError(f"mix.merge: {problem}")
        return self

    def _check_finetuning(self) -> None:
        """Refuse settings of the finetuning that would be ignored."""
        settings = self.finetune
        if settings.load_balancing_bias and (self.mix.router != "top_k" or self.mix.top_k == len(self.expert_names)):
            raise ValueError("finetune.load_balancing_bias goes with mix.router: top_k and fewer experts a token than "
                             "there are")  # fmt: skip
        if settings.dense_router_gradient and settings.trainable == "shared":
            raise ValueError("finetune.dense_router_gradient: with finetune.trainable: shared no router trains")
        if settings.load_balancing_kind == "pooled" and settings.load_balancing_over == "global_batch":
            raise ValueError("finetune.load_balancing_over: global_batch goes with load_balancing_kind: paper; the "
                             "pooled loss is transformers', which sees one micro-batch")  # fmt: skip

    @model_validator(mode="after")
    def _branches_are_equal_where_baselines_need_it(self) -> Recipe:
        two_phases = [name for name in self.baselines if BASELINES[name].two_phases]
        tokens = {self.branch_training(domain).tokens for domain in self.train.domains}
        if two_phases and tokens != {self.train.tokens}:
            raise ValueError(
                f"train.domain_tokens: {', '.join(two_phases)} read the branches' sequences in turn, which needs "
                f"branches of equal tokens; leave these baselines or domain_tokens out"
            )
        return self

    @model_validator(mode="after")
    def _baselines_take_their_settings(self) -> Recipe:
        trained = ", ".join(name for name, kind in BASELINES.items() if kind.trains)
        for name, given in self.baseline_training.items():
            kind, where = BASELINES[name], f"baseline_training.{name}"
            if not kind.trains:
                raise ValueError(f"{where}: {name} is made without training; these are trained: {trained}")
            if given.domains_learning_rate is not None and not kind.two_phases:
                raise ValueError(f"{where}.domains_learning_rate: {name} has one phase; set learning_rate")
            if given.load_balancing is not None and not kind.has_routers:
                raise ValueError(f"{where}.load_balancing: {name} is dense, it has no routers to balance")
            if given.load_balancing is not None and "load_balancing" in kind.changes:
                raise ValueError(f"{where}.load_balancing: {name} is the baseline without it")
        return self

    def _mixed_set_exists(self) -> None:
        mixed = self.evaluate.mixed
        if not mixed.documents:
            return
        if mixed.kind == "halves" and len(self.data.domains) < 2:
            raise ValueError("evaluate.mixed: halves needs at least two domains in data.domains")
        used = {source.generate for domain in self.data.domains.values() for source in domain.sources}
        if mixed.kind == "generated" and (missing := set(GENERATORS) - used):
            raise ValueError(
                f"evaluate.mixed: generated documents need domains from the generators {', '.join(GENERATORS)}; there "
                f"is none of {', '.join(sorted(missing))}; use kind: halves"
            )

    @property
    def merge_settings(self) -> MergeSettings:
        """How shared weights are merged."""
        mix = self.mix
        return MergeSettings(
            mix.merge, weights=mix.merge_weights, t=mix.slerp_t, density=mix.merge_density, scale=mix.merge_scale,
            rng_seed=self.rng_seed,
        )  # fmt: skip

    def branch_training(self, domain: str) -> Train:
        """Settings of one branch: `tokens` is its own number."""
        tokens = self.train.domain_tokens.get(domain, self.train.tokens)
        return self.train.model_copy(update={"tokens": tokens, "domain_tokens": {}})

    @property
    def member_names(self) -> list[str]:
        """Names of the models that are mixed, in order: the trained domains, then the generalist."""
        return [*self.train.domains, *(["generalist"] if self.mix.generalist else [])]

    @property
    def expert_names(self) -> list[str]:
        """Names of the MoE model's experts in order: those of the models, or of their parts."""
        if self.mix.blend:
            return [f"blend/{number}" for number in range(len(self.member_names))]
        if self.mix.split > 1:
            return [f"{name}/{number}" for name in self.member_names for number in range(self.mix.split)]
        return self.member_names

    @property
    def routing(self) -> RoutingSettings:
        """The router of the mixed model."""
        mix = self.mix
        return RoutingSettings(mix.router, mix.top_k, mix.capacity_factor, mix.temperature_floor, mix.temperature_rate,
                              mix.soft_first_layer)  # fmt: skip

    @property
    def run_folder(self) -> str:
        """The run's folder, as written by the user."""
        return self.run or f"runs/{self.name}"
