"""The recipe: everything a run is made from, typed, with a sentence and a unit under each field.

Defaults are the paper's (arXiv 2403.07816, section 4.1) wherever it states a number, except for `PAPER`; a recipe for a
small machine overrides them. Reading YAML, dotted overrides and error positions live in `btx.recipe.loading`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from btx.choices.baselines import BASELINES
from btx.choices.generators import GENERATORS
from btx.choices.merges import MergeSettings
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.errors import RecipeError, UserError
from btx.recipe.data import Data
from btx.recipe.evaluate import Analyze, Evaluate
from btx.recipe.mix import Mix
from btx.recipe.section import BaselineName, LauncherName, Name, PositiveInt, Section
from btx.recipe.training import BaselineTraining, Finetune, SeedModel, Train

PAPER: dict[str, dict[str, Any]] = {"train": {"trainable": "all"}, "mix": {"router_init": "random"}}
"""Section → settings whose default is not the paper's, and what they are there (sections 3.1 and 3.2)."""


def _each_once(names: list[BaselineName]) -> list[BaselineName]:
    """Refuse a baseline that is named twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice")
    return names


class Launch(Section):
    """How jobs are started."""

    kind: LauncherName = "local"
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
    mixture, the domains, the tasks, a config or a sweep given here replace the other recipe's as a whole."""
    paper: bool = False
    """The paper's choice wherever btx's default is another one: `train.trainable: all` and `mix.router_init: random`
    (why not: docs/results.md). What the recipe says itself stays."""
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

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, given: Any) -> Any:
        """With `paper`, what a section leaves out is the paper's; a section that is missing or broken stays so."""
        if not isinstance(given, dict) or given.get("paper") is not True:
            return given
        sections = {name: given.get(name, {} if name == "mix" else None) for name in PAPER}
        return given | {name: PAPER[name] | section for name, section in sections.items() if isinstance(section, dict)}

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
        if self.mix.blend and self.router_init.needs_text:
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
        needed = [name for name, generator in GENERATORS.items() if generator.in_mixed_text]
        if mixed.kind == "generated" and (missing := set(needed) - used):
            raise ValueError(
                f"evaluate.mixed: generated documents need domains from the generators {', '.join(needed)}; there "
                f"is none of {', '.join(sorted(missing))}; use kind: halves"
            )

    def without(self, domains: Collection[str]) -> Recipe:
        """The recipe with some branches fewer; their domains' text is still measured on.

        Raises:
            UserError: no branch is called so, or none would be left.
        """
        unknown = [domain for domain in domains if domain not in self.train.domains]
        if unknown:
            raise UserError(f"--without: no branch {', '.join(unknown)}; there are: {', '.join(self.train.domains)}")
        values = self.model_dump()
        train, weights = values["train"], values["mix"]["merge_weights"]
        train["domains"] = [domain for domain in self.train.domains if domain not in domains]
        train["domain_tokens"] = {name: n for name, n in self.train.domain_tokens.items() if name not in domains}
        if weights is not None:
            values["mix"]["merge_weights"] = {name: n for name, n in weights.items() if name not in domains}
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            raise RecipeError("; ".join(f"--without: {problem['msg']}" for problem in error.errors())) from None

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
    def run_folder(self) -> str:
        """The run's folder, as written by the user."""
        return self.run or f"runs/{self.name}"
