"""Which stages a recipe has: what each reads, and which settings decide it. Plain Python.

    data/tokenizer → data/<domain>... → seed → train/<domain>... → mix → finetune → evaluate, analyze → report
                                                                     baselines/... ↗
                                                              (finetune → align/sft → align/dpo ↗)

A stage needs what it reads and nothing else: the seed model the domains of its mixture, a branch its own domain and the
general one, the finetuning those of its mixture. So a domain more, or less, leaves the others' stages as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any, TypeVar

from btx.baselines.settings import matching_inputs, phases_of, routing_of
from btx.choices.baselines import BASELINES, BTM, UPCYCLED
from btx.data.conversations import data_files
from btx.data.document_files import located
from btx.errors import DataError
from btx.files import content_sha256
from btx.recipe.evaluate import Analyze
from btx.recipe.mixtures import domain_mixture, domains_in, finetune_mixture, resolve, seed_mixture
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune, SeedTraining
from btx.run_folder.data_stages import TOKENIZER_FILES, DataStages
from btx.run_folder.graph import Graph, Recorded, Settings, Stage, nothing_recorded
from btx.system_errors import blame

Mixed = TypeVar("Mixed", SeedTraining, Finetune)


def build_graph(
    recipe: Recipe, recorded: Recorded = nothing_recorded, read: Mapping[str, Mapping[str, Any]] | None = None,
    begun: Recorded = nothing_recorded,
) -> Graph:  # fmt: skip
    """The stages of `recipe`, in an order in which they can run.

    Args:
        recorded: what is known of the run's finished stages, so that nothing of them has to be at hand.
        read: label of a data stage → its started.json, as noted by the finished models that have read it.
        begun: as `recorded`, of stages that are begun or finished.
    """
    return _Stages(recipe, recorded, read or {}, begun).graph()


class _Stages:
    """One recipe's stages while they are put together."""

    def __init__(
        self, recipe: Recipe, recorded: Recorded, read: Mapping[str, Mapping[str, Any]], begun: Recorded
    ) -> None:
        self.recipe, self.recorded, self.begun = recipe, recorded, begun
        self.data = DataStages(recipe, recorded, read)
        self.rng = {"rng_seed": recipe.rng_seed}
        self.texts = [{domain: 1.0} for domain in (*recipe.train.domains, recipe.data.general)]
        """Of every expert and of the generalist, each by itself."""

    def graph(self) -> Graph:
        recipe, seed = self.recipe, self._seed()
        branches = tuple(self._branch(domain, seed) for domain in recipe.train.domains)
        mixed = self._mix(seed, branches)
        finetune = self._stage("finetune", self._finetune, (*self._read([finetune_mixture(recipe)]), mixed))
        aligned = self._aligned(finetune)
        baselines = self._baselines({"seed": seed, "mix": mixed}, branches)
        # The soup is made beside the mix; what trains comes after the finetuning: `--until finetune` leaves it out.
        soup = [stage for stage in baselines if stage.name == "baselines/soup"]
        others = [stage for stage in baselines if stage not in soup]
        results = [stage for stage in others if stage.name.removeprefix("baselines/") in recipe.baselines]
        every_domain = self.data.of(recipe.data.domains)
        models = (*every_domain, seed, *branches, mixed, *soup, finetune, *aligned, *results)
        evaluate = self._stage("evaluate", self._evaluate, models, files=self._task_files, recorded=None)
        analyze = self._stage("analyze", self._analyze, (*every_domain, finetune, *aligned))
        report = self._stage("report", dict, (evaluate, analyze))
        made = (seed, *branches, mixed, *soup, finetune, *aligned, *others)
        return Graph(recipe, (*self.data, *made, evaluate, analyze, report))

    def _stage(self, name: str, describe: Any, needs: Iterable[Stage], **more: Any) -> Stage:
        return Stage(
            name, describe, tuple(needs), **{"recorded": self.recorded(name), "begun": self.begun(name)} | more
        )

    def _read(self, mixtures: list[dict[str, float]]) -> list[Stage]:
        """The data stages behind some mixtures of domains."""
        return self.data.of(domain for weights in mixtures for domain in domains_in(self.recipe, weights))

    def _mixture(self, weights: Mapping[str, float]) -> Settings:
        """What decides which samples a mixture of domains gives, besides what the domains hold."""
        components = [[name, weight] for name, _, weight in resolve(self.recipe, weights, known_as=self.data.known_as)]
        return {"mixture": components, "sequence_length": self.recipe.data.sequence_length}

    def _known(self, training: Mixed) -> Mixed:
        """A section with the domains of its mixture under the names by which they are known."""
        mixture = training.mixture and {self.data.known_as[name]: weight for name, weight in training.mixture.items()}
        return training.model_copy(update={"mixture": mixture})

    def _seed(self) -> Stage:
        seed = self.recipe.seed_model
        if seed.path is not None:
            return self._stage("seed", self._seed_folder, (), files=self._seed_files)
        mixture = seed_mixture(self.recipe)

        def trained() -> Settings:
            training = {"train": self._known(seed.train)} if seed.train else {}
            return {"seed_model": seed.model_copy(update=training), **self._mixture(mixture), **self.rng}

        return self._stage("seed", trained, (self.data.tokenizer, *self._read([mixture])))

    def _seed_folder(self) -> Settings:
        """An existing seed model is its files, or what it is called on the hub."""
        if files := self._seed_files():
            return {"files": {Path(name).name: sha256 for name, sha256 in files.items()}}
        return self.data.seed_on_hub("seed")

    def _seed_files(self) -> dict[str, str]:
        return model_files(self.recipe.seed_model.path)

    def _branch(self, domain: str, seed: Stage) -> Stage:
        name, recipe = f"train/{domain}", self.recipe
        known = self.recorded(name)
        if known is not None and "adopted" in known["settings"]:  # trained elsewhere: nothing here decides it
            return Stage(name, lambda: dict(known["settings"]), recorded=known)
        mixture = domain_mixture(recipe, domain)

        def trained() -> Settings:
            training = recipe.branch_training(domain).model_copy(update={"domains": [domain]})  # others decide nothing
            return {"train": training, **self._mixture(mixture), **self.rng}

        return self._stage(name, trained, (*self._read([mixture]), seed))

    def _mix(self, seed: Stage, branches: tuple[Stage, ...]) -> Stage:
        recipe = self.recipe
        texts = self.texts if recipe.router_init.needs_text else []

        def mixed() -> Settings:
            read = {"texts": [self._mixture(weights) for weights in texts]} if texts else {}
            return {"mix": recipe.mix, "experts": recipe.expert_names, **read, **self.rng}

        return self._stage("mix", mixed, (*self._read(texts), seed, *branches))

    def _finetune(self) -> Settings:
        recipe = self.recipe
        return {"finetune": self._known(recipe.finetune), **self._mixture(finetune_mixture(recipe)), **self.rng}

    def _aligned(self, finetune: Stage) -> list[Stage]:
        """A stage for each section of `align`, each from the model of the one before."""
        stages = [finetune]
        for name in self.recipe.alignments:
            settings, files = partial(self._phase, name), partial(self._phase_files, name)
            stages.append(self._stage(f"align/{name}", settings, stages[-1:], files=files, recorded=None))
        return stages[1:]

    def _phase(self, name: str) -> Settings:
        """What decides SFT or DPO: of its data what they hold, of `finetune` nothing that is not upstream."""
        section = self.recipe.alignments[name].model_copy(update={"data": []})
        files, length = list(self._phase_files(name).values()), self.recipe.data.sequence_length
        return {"align": {name: section}, "files": files, "sequence_length": length, **self.rng}

    def _phase_files(self, name: str) -> dict[str, str]:
        section, root, stage = self.recipe.alignments[name], self.recipe.data.root, f"align/{name}"
        try:
            data_files(section, root, name)
        except DataError:
            if self.recorded(stage) is None:
                raise
        return self._contents(stage, {f"align.{name}.data: {path}": located(path, root) for path in section.data})

    def _evaluate(self) -> Settings:
        recipe = self.recipe
        domains = {domain: self._mixture({domain: 1.0}) for domain in recipe.data.domains}
        generated = {"held_out": recipe.data.held_out} if recipe.evaluate.mixed.kind == "generated" else {}
        paths, contents = task_files(recipe), self._task_files()
        files = {where: contents[str(path)] for where, path in paths.items()}
        more: Settings = (
            {} if recipe.analyze.scored_examples == Analyze().examples else {"examples": recipe.analyze.examples}
        )
        if recipe.seed_model.pretrained_tokens is not None:  # results tell what follows from it, and are made anew
            more["pretrained_tokens"] = recipe.seed_model.pretrained_tokens
        return {"evaluate": recipe.evaluate, "domains": domains, "files": files, **generated, **more, **self.rng}

    def _task_files(self) -> dict[str, str]:
        return self._contents("evaluate", task_files(self.recipe))

    def _contents(self, stage: str, paths: Mapping[str, Path]) -> dict[str, str]:
        """Path of each file → its SHA-256; of one that is not here, what a file of its name held when the stage was
        finished.

        Args:
            paths: where the recipe names the file → the file.

        Raises:
            DataError: it is not here, and no file of its name was.
        """
        recorded = {
            PurePath(file).name: sha256 for file, sha256 in (self.recorded(stage) or {"files": {}})["files"].items()
        }
        return {
            str(path): recorded[path.name] if path.name in recorded and not path.exists() else _content(path, where)
            for where, path in paths.items()
        }

    def _analyze(self) -> Settings:
        domains = {domain: self._mixture({domain: 1.0}) for domain in self.recipe.data.domains}
        return {"analyze": self.recipe.analyze, "domains": domains, **self.rng}

    def _baselines(self, known: dict[str, Stage], branches: tuple[Stage, ...]) -> list[Stage]:
        """The stages of the recipe's baselines, in its order. A trained stage's last need holds its start weights."""
        recipe, seed, stages = self.recipe, known["seed"], list[Stage]()
        for name in recipe.baselines:
            kind = BASELINES[name]
            if name == "soup":
                settings: Settings = {"generalist": recipe.mix.generalist}
                stages.append(self._stage("baselines/soup", partial(dict, settings), (seed, *branches)))
            elif name in BTM:
                settings = {"experts": BTM[name], "generalist": recipe.mix.generalist, "tokens": recipe.train.tokens,
                            "texts": [self._mixture(weights) for weights in self.texts]}  # fmt: skip
                needs = (*self._read(self.texts), seed, *branches)
                stages.append(self._stage(f"baselines/{name}", partial(dict, settings), needs))
            elif kind.start == "upcycled" and UPCYCLED not in known:
                known[UPCYCLED] = self._stage(f"baselines/{UPCYCLED}", self._upcycled, (seed,))
                stages.append(known[UPCYCLED])
            if kind.trains:
                stages += self._trained_baseline(name, known[kind.start])
        return stages

    def _upcycled(self) -> Settings:
        """Copies of the seed model's FF sublayers as experts: the start of both upcycling baselines."""
        recipe, mix = self.recipe, self.recipe.mix
        return {
            "members": len(recipe.member_names), "split": [mix.split, mix.split_rescale], "router_std": mix.router_std,
            "router": recipe.routing.as_json(), "dtype": mix.dtype, "max_shard_size": mix.max_shard_size, **self.rng,
        }  # fmt: skip

    def _trained_baseline(self, name: str, start: Stage) -> list[Stage]:
        """One stage a phase."""
        recipe, stages = self.recipe, list[Stage]()
        for phase in phases_of(recipe, name):
            mixtures = phase.mixtures(recipe)
            settings = {
                "training": self._known(phase.settings), "matched": matching_inputs(recipe, name),
                "mixtures": [self._mixture(weights) for weights in mixtures], **self.rng,
            }  # fmt: skip
            if BASELINES[name].has_routers:
                settings["router"] = routing_of(recipe, name).as_json()
            start = self._stage(phase.stage, partial(dict, settings), (*self._read(mixtures), start))
            stages.append(start)
        return stages


def aligned_from(recipe: Recipe, name: str) -> str:
    """The stage from whose model a section of `align` goes on."""
    return "align/sft" if name == "dpo" and "sft" in recipe.alignments else "finetune"


def _content(path: Path, where: str) -> str:
    """SHA-256 of a file that the recipe names at `where`; raises DataError if it is not there."""
    try:
        return content_sha256(path)
    except OSError as error:
        blame(error)
        raise DataError(f"{where}: {path}: {error.strerror or error}") from error


def model_files(path: str | None) -> dict[str, str]:
    """Path of each file of a local model folder that decides the model → its SHA-256; empty if there is no such folder.

    A model card, hidden files and folders in the folder decide nothing.
    """
    folder = Path(path or "")
    if path is None or not folder.is_dir():
        return {}
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    return {str(file): content_sha256(file) for file in files if not file.name.startswith(".")}


MODEL_FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "*.jinja", *TOKENIZER_FILES,
)  # fmt: skip
"""What decides a model, of all that lies in its folder."""


def task_files(recipe: Recipe) -> dict[str, Path]:
    """Where the recipe names a local file of a task → the file."""
    tasks = {f"evaluate.tasks.{name}.path": task.path for name, task in recipe.evaluate.tasks.items()}
    for name, task in recipe.evaluate.harness.tasks.items():
        tasks |= {f"evaluate.harness.tasks.{name}.file": task.file,
                  f"evaluate.harness.tasks.{name}.shots_file": task.shots_file}  # fmt: skip
    return {where: located(name, recipe.data.root) for where, name in tasks.items() if name is not None}
