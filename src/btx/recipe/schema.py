"""The recipe: everything a run is made from, typed, with a sentence and a unit under each field.

Defaults are the paper's (arXiv 2403.07816, section 4.1) wherever it states a number, except for `PAPER`; a recipe for a
small machine overrides them. What sections have to agree on is in the rules at the end. Reading YAML, dotted overrides
and error positions live in `btx.recipe.loading`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from btx.choices.baselines import BASELINES
from btx.choices.generators import GENERATORS
from btx.choices.merges import MergeSettings
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.choices.trainable import ONE_PROCESS
from btx.errors import RecipeError, UserError
from btx.files import home_filled
from btx.recipe.align import Align, Alignment
from btx.recipe.data import Data
from btx.recipe.evaluate import Analyze, Evaluate
from btx.recipe.launch import Launch
from btx.recipe.mix import Mix
from btx.recipe.section import BaselineName, Name, PathText, PositiveInt, Section, TrackerName
from btx.recipe.training import OF_THE_DECAY, BaselineTraining, Finetune, SeedModel, Train

PAPER: dict[str, dict[str, Any]] = {"train": {"trainable": "all"}, "mix": {"router_init": "random"}}
"""Section → settings whose default is not the paper's, and what they are there (sections 3.1 and 3.2)."""


def _each_once(names: list[str]) -> list[str]:
    """Refuse what is named twice."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice")
    return names


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


class Derived(Section):
    """What was filled in in one training section."""

    basis: dict[str, int | str | None]
    """What it follows from: tokens, parameters outside the embeddings, ..."""
    values: dict[str, float | int]
    """Setting → its value."""

    @field_validator("basis")
    @classmethod
    def _is_btxs(cls, basis: dict[str, Any]) -> dict[str, Any]:
        if not is_basis(basis):
            raise ValueError("not for you to write: leave `derived` out")
        return basis


def is_basis(value: Any) -> bool:
    """Whether this says what a section's settings follow from: its tokens, and parameters where they are known."""
    counts = (value.get("tokens"), value.get("parameters", 1) or 1) if isinstance(value, dict) else (None,)
    return all(isinstance(count, int) and count > 0 for count in counts)


class Recipe(Section):
    """A whole Branch-Train-MiX run."""

    name: Name
    """Name of the run; its folder is runs/<name> unless `run` says otherwise."""
    description: str = ""
    """What the recipe is for, what it costs and what to expect."""
    extends: str | None = None
    """Packaged recipe or recipe file that says what this one leaves out. Sections are merged key by key; a list, a
    mixture, the domains, the tasks, a config or a sweep given here replace the other recipe's as a whole."""
    paper: bool = False
    """The paper's choice wherever btx's default is another one: `train.trainable: all` and `mix.router_init: random`
    (why not: docs/results.md). What the recipe says itself stays."""
    run: PathText | None = None
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
    align: Align | None = None
    """SFT and DPO of the finetuned model (docs/after.md); default: neither."""
    baselines: Annotated[list[BaselineName], AfterValidator(_each_once)] = ["soup"]
    """Models to compare with, each a stage `baselines/<name>` and a row of the results; `btx ls baselines` explains
    them."""
    baseline_training: dict[BaselineName, BaselineTraining] = {}
    """Baseline → training settings of its own, for example from a learning-rate search."""
    evaluate: Evaluate = Evaluate()
    analyze: Analyze = Analyze()
    track: Annotated[list[TrackerName], AfterValidator(_each_once)] = []
    """Where the numbers of metrics.jsonl go as well, while stages train, and the results in the end; `btx ls trackers`
    explains them. It decides no result."""
    launch: Launch = Launch()
    sweep: Sweep | None = None
    """Variants `btx sweep` runs; `btx run` takes no notice of it."""
    derived: dict[str, Derived] | None = None
    """Not for you to write: training section → what btx filled in because the recipe did not name it. A run folder
    keeps it, so that a later version's rules change no finished run."""

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, values: Any) -> Any:
        """With `paper`, what a section leaves out is the paper's; a section that is missing or broken stays so."""
        if not isinstance(values, dict) or values.get("paper") is not True:
            return values
        sections = {name: values.get(name, {} if name == "mix" else None) for name in PAPER}
        return values | {name: PAPER[name] | section for name, section in sections.items() if isinstance(section, dict)}

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Recipe:
        for rule in RULES:
            if problem := rule(self):
                raise ValueError(problem)
        return self

    def without(self, domains: Collection[str]) -> Recipe:
        """The recipe with some branches fewer; their domains' text is still measured on.

        Raises:
            UserError: no branch is called so, or none would be left.
        """
        unknown = [domain for domain in domains if domain not in self.data.domains]  # a branch may be left out already
        if unknown:
            raise UserError(f"--without: no branch {', '.join(unknown)}; there are: {', '.join(self.train.domains)}")
        if not set(self.train.domains) - set(domains):
            raise UserError("--without: a mixture needs at least one branch, and all would be left out")
        values = self.model_dump()
        train, weights = values["train"], values["mix"]["merge_weights"]
        train["domains"] = [domain for domain in self.train.domains if domain not in domains]
        train["domain_tokens"] = {name: n for name, n in self.train.domain_tokens.items() if name not in domains}
        if weights is not None:
            values["mix"]["merge_weights"] = {name: n for name, n in weights.items() if name not in domains}
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            problems = (problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            raise RecipeError("; ".join(f"--without: {problem}" for problem in problems)) from None

    @property
    def merge_settings(self) -> MergeSettings:
        """How shared weights are merged."""
        mix = self.mix
        return MergeSettings(
            mix.merge, weights=mix.merge_weights, t=mix.slerp_t, density=mix.merge_density, scale=mix.merge_scale,
            rng_seed=self.rng_seed,
        )  # fmt: skip

    @property
    def router_init(self) -> RouterInit:
        """How the mixed model's routers start."""
        mix = self.mix
        return RouterInit(
            mix.router_init, std=mix.router_std, scale=mix.router_scale, ridge=mix.router_ridge,
            tokens=mix.router_tokens, rng_seed=self.rng_seed,
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
    def routing(self) -> RoutingRule:
        """The rule by which the mixed model routes."""
        mix = self.mix
        return RoutingRule(mix.router, mix.top_k, mix.capacity_factor, mix.temperature_floor, mix.temperature_rate,
                              mix.soft_first_layer)  # fmt: skip

    @property
    def alignments(self) -> dict[str, Alignment]:
        """Name → section of `align`, in the order in which they train; empty without it."""
        return self.align.sections if self.align is not None else {}

    @property
    def run_folder(self) -> str:
        """The run's folder, as written by the user but for `~`, the home folder."""
        run = self.run or f"runs/{self.name}"
        return str(home_filled(run)) if run.startswith("~") else run


# --- rules across sections: what is wrong with a recipe, or None ------------------------------------------------------


def _named_domains_exist(recipe: Recipe) -> str | None:
    named = {
        "train.domains": recipe.train.domains,
        "finetune.mixture": recipe.finetune.mixture or (),
        "seed_model.train.mixture": (recipe.seed_model.train and recipe.seed_model.train.mixture) or (),
    }
    for where, names in named.items():
        for name in names:
            if name not in recipe.data.domains:
                there = ", ".join(sorted(recipe.data.domains))
                return f"{where} names {name!r}, which is not in data.domains: {there}"
    return None


def _branches_are_named_once(recipe: Recipe) -> str | None:
    domains = recipe.train.domains
    return f"train.domains names a domain twice: {domains}" if len(set(domains)) != len(domains) else None


def _own_tokens_are_a_branchs(recipe: Recipe) -> str | None:
    for name in recipe.train.domain_tokens.keys() - set(recipe.train.domains):
        return f"train.domain_tokens names {name!r}, which is not in train.domains"
    return None


def _no_domain_is_called_seed(recipe: Recipe) -> str | None:
    if "seed" in recipe.data.domains:
        return "a domain cannot be called 'seed': the word names the seed model's job"
    return None


def _no_domain_is_called_tokenizer(recipe: Recipe) -> str | None:
    if "tokenizer" in recipe.data.domains:
        return "a domain cannot be called 'tokenizer': the tokenizer lies beside the domains' folders; rename it"
    return None


def _no_branch_is_called_generalist(recipe: Recipe) -> str | None:
    if "generalist" in recipe.train.domains:
        return "train.domains: a branch cannot be called 'generalist': the word names the seed model as an expert"
    return None


def _there_are_two_experts(recipe: Recipe) -> str | None:
    if len(recipe.member_names) < 2:
        return "a mixture needs at least two experts: add a domain to train.domains or mix.generalist"
    return None


def _a_token_uses_no_more_experts_than_there_are(recipe: Recipe) -> str | None:
    mix, there = recipe.mix, len(recipe.expert_names)
    if mix.router == "top_k" and mix.top_k > there:
        return f"mix.top_k is {mix.top_k}, but there are only {there} experts"
    return None


def _a_dense_router_gradient_is_top_ks(recipe: Recipe) -> str | None:
    if recipe.finetune.dense_router_gradient and recipe.mix.router != "top_k":
        return f"finetune.dense_router_gradient goes with mix.router: top_k, not {recipe.mix.router}"
    return None


def _biases_have_something_to_choose(recipe: Recipe) -> str | None:
    mix = recipe.mix
    chooses = mix.router == "top_k" and mix.top_k != len(recipe.expert_names)
    if recipe.finetune.load_balancing_bias and not chooses:
        return "finetune.load_balancing_bias goes with mix.router: top_k and fewer experts a token than there are"
    return None


def _a_dense_router_gradient_has_a_router_to_train(recipe: Recipe) -> str | None:
    if recipe.finetune.dense_router_gradient and recipe.finetune.trainable == "shared":
        return "finetune.dense_router_gradient: with finetune.trainable: shared no router trains"
    return None


def _the_pooled_loss_is_of_a_micro_batch(recipe: Recipe) -> str | None:
    if recipe.finetune.load_balancing_kind == "pooled" and recipe.finetune.load_balancing_over == "global_batch":
        return ("finetune.load_balancing_over: global_batch goes with load_balancing_kind: paper; the pooled loss is "
                "transformers', which sees one micro-batch")  # fmt: skip
    return None


def _experts_are_split_or_blended(recipe: Recipe) -> str | None:
    return "mix.split and mix.blend exclude each other" if recipe.mix.blend and recipe.mix.split > 1 else None


def _routers_from_text_need_experts_with_domains(recipe: Recipe) -> str | None:
    if recipe.mix.blend and recipe.router_init.needs_text:
        return "mix.router_init needs experts with domains; with mix.blend they have none"
    return None


def _halves_are_of_two_domains(recipe: Recipe) -> str | None:
    mixed = recipe.evaluate.mixed
    if mixed.documents and mixed.kind == "halves" and len(recipe.data.domains) < 2:
        return "evaluate.mixed: halves needs at least two domains in data.domains"
    return None


def _generated_mixed_documents_have_their_generators(recipe: Recipe) -> str | None:
    mixed = recipe.evaluate.mixed
    used = {source.generate for domain in recipe.data.domains.values() for source in domain.sources}
    needed = [name for name, generator in GENERATORS.items() if generator.in_mixed_text]
    if mixed.documents and mixed.kind == "generated" and (missing := set(needed) - used):
        return (
            f"evaluate.mixed: generated documents need domains from the generators {', '.join(needed)}; there "
            f"is none of {', '.join(sorted(missing))}; use kind: halves"
        )
    return None


def _adapters_on_experts_are_trained_by_one_process(recipe: Recipe) -> str | None:
    for name, section in recipe.alignments.items():
        count = recipe.launch.processes_of(f"align/{name}")
        if section.trainable == "lora" and count > 1:
            return (f"align.{name}.trainable: {ONE_PROCESS}; launch.processes is {count} for it: write "
                    f"`processes: {{align: 1, ...}}`, or train all weights")  # fmt: skip
    return None


def _the_merge_fits_its_members(recipe: Recipe) -> str | None:
    for problem in recipe.merge_settings.problems(recipe.member_names):
        return f"mix.merge: {problem}"
    return None


def _branches_are_equal_where_baselines_need_it(recipe: Recipe) -> str | None:
    two_phases = [name for name in recipe.baselines if BASELINES[name].two_phases]
    tokens = {recipe.branch_training(domain).tokens for domain in recipe.train.domains}
    if two_phases and tokens != {recipe.train.tokens}:
        return (
            f"train.domain_tokens: {', '.join(two_phases)} read the branches' sequences in turn, which needs "
            f"branches of equal tokens; leave these baselines or domain_tokens out"
        )
    return None


def _baselines_take_their_settings(recipe: Recipe) -> str | None:
    trained = ", ".join(name for name, kind in BASELINES.items() if kind.trains)
    for name, named in recipe.baseline_training.items():
        kind, where = BASELINES[name], f"baseline_training.{name}"
        if not kind.trains:
            return f"{where}: {name} is made without training; these are trained: {trained}"
        if named.domains_learning_rate is not None and not kind.two_phases:
            return f"{where}.domains_learning_rate: {name} has one phase; set learning_rate"
        if named.load_balancing is not None and not kind.has_routers:
            return f"{where}.load_balancing: {name} is dense, it has no routers to balance"
        if named.load_balancing is not None and "load_balancing" in kind.changes:
            return f"{where}.load_balancing: {name} is the baseline without it"
        phases = [recipe.train.schedule] * kind.two_phases + [recipe.finetune.schedule]
        schedules = [named.schedule] if named.schedule else phases
        for field in OF_THE_DECAY:
            if getattr(named, field) is not None and "wsd" not in schedules:
                return f"{where}.{field} goes with schedule: wsd; here it is {' and '.join(dict.fromkeys(schedules))}"
    return None


RULES: tuple[Callable[[Recipe], str | None], ...] = (
    _named_domains_exist,
    _branches_are_named_once,
    _own_tokens_are_a_branchs,
    _no_domain_is_called_seed,
    _no_domain_is_called_tokenizer,
    _no_branch_is_called_generalist,
    _there_are_two_experts,
    _a_token_uses_no_more_experts_than_there_are,
    _a_dense_router_gradient_is_top_ks,
    _biases_have_something_to_choose,
    _a_dense_router_gradient_has_a_router_to_train,
    _the_pooled_loss_is_of_a_micro_batch,
    _experts_are_split_or_blended,
    _routers_from_text_need_experts_with_domains,
    _halves_are_of_two_domains,
    _generated_mixed_documents_have_their_generators,
    _adapters_on_experts_are_trained_by_one_process,
    _the_merge_fits_its_members,
    _branches_are_equal_where_baselines_need_it,
    _baselines_take_their_settings,
)
"""In the order in which they are asked: the first problem is the one that is told."""
