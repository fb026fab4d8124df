"""The stages of a run, what each depends on, and the hash of everything that decides its result. Plain Python.

A stage's hash covers its own settings and the hashes of the stages before it. So it is known before anything runs,
two different recipes never share a result, and a changed setting makes exactly the stages after it stale.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from btx.baselines.settings import matching_inputs, phases_of, routing_of
from btx.choices.baselines import BASELINES, BTM, UPCYCLED, is_trained, stage_names
from btx.errors import UserError
from btx.files import value_hash
from btx.recipe.schema import Recipe

# How jobs run decides speed, not results, and plan_config only the plan: these settings never make a stage stale.
SPEED_ONLY = {"checkpoint_every", "plan_config"}


@dataclass(frozen=True)
class Stage:
    """One node of the graph. `name` is also its folder in the run folder."""

    name: str
    settings: dict[str, Any]
    """Everything of the recipe that decides the result."""
    needs: tuple[Stage, ...] = ()

    @cached_property
    def inputs(self) -> str:
        """Hash of the settings and of everything upstream."""
        return value_hash({"settings": self.settings, "upstream": self.upstream})

    @property
    def upstream(self) -> dict[str, str]:
        """Hashes of the stages this one needs."""
        return {stage.name: stage.inputs for stage in self.needs}

    @property
    def trains(self) -> bool:
        """True for the stages that run the training loop."""
        return self.name in ("seed", "finetune") or self.name.startswith("train/") or is_trained(self.name)

    @property
    def computes(self) -> bool:
        """True for the stages whose FLOPs count: those that train, and the mix, which may compute routers from text."""
        return self.trains or self.name == "mix"

    def training_behind(self) -> list[Stage]:
        """The stages that compute, from the seed model (itself not counted) up to this one, in an order that runs."""
        found: dict[str, Stage] = {}
        for needed in self.needs:
            found |= {stage.name: stage for stage in needed.training_behind() if stage.name != "seed"}
        if self.computes:
            found[self.name] = self
        return list(found.values())


@dataclass(frozen=True)
class Graph:
    """All stages of a recipe in an order in which they can run."""

    recipe: Recipe
    stages: tuple[Stage, ...]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def branches(self) -> list[Stage]:
        """The experts' training stages."""
        return [stage for stage in self.stages if stage.name.startswith("train/")]

    @property
    def baselines(self) -> list[Stage]:
        """The stages of all baselines."""
        return [stage for stage in self.stages if stage.name.startswith("baselines/")]

    def jobs(self) -> list[tuple[Stage, ...]]:
        """Stages grouped into processes: short stages share one, every branch and trained baseline has its own."""
        soup = [stage for stage in self.baselines if stage.name == "baselines/soup"]
        return [
            (self["data"], self["seed"]),
            *[(branch,) for branch in self.branches],
            (self["mix"], *soup, self["finetune"]),
            *self.baseline_jobs(),
            (self["evaluate"], self["analyze"], self["report"]),
        ]

    def baseline_stages(self, names: list[str] | None = None) -> list[Stage]:
        """The stages of some baselines, what they share included.

        Raises:
            UserError: the recipe has no such baseline.
        """
        wanted = set()
        for name in names or self.recipe.baselines:
            if name not in self.recipe.baselines:
                there = ", ".join(self.recipe.baselines) or "none"
                raise UserError(f"the recipe has no baseline {name!r}; its `baselines` are: {there}")
            last = self[f"baselines/{name}"]
            wanted |= {last.name, *(stage.name for stage in (*last.needs, *(n for s in last.needs for n in s.needs)))}
        return [stage for stage in self.baselines if stage.name in wanted]

    def baseline_jobs(self) -> list[tuple[Stage, ...]]:
        """Processes of the baselines, but for the soup, which is short. What baselines share is made by the first."""
        known = {stage.name: stage for stage in self.baselines}
        jobs = []
        for name in self.recipe.baselines:
            if BASELINES[name].trains:
                shared = known.pop(f"baselines/{UPCYCLED}", None) if BASELINES[name].start == "upcycled" else None
                jobs.append((*([shared] if shared else []), *[known[stage] for stage in stage_names(name)]))
        btm = tuple(known[f"baselines/{name}"] for name in self.recipe.baselines if name in BTM)
        return [*jobs, *([btm] if btm else [])]


def build_graph(recipe: Recipe) -> Graph:
    """The stages of `recipe`: data, seed → train/<domain>... → mix → finetune, baselines → evaluate → report."""
    rng = {"rng_seed": recipe.rng_seed}
    general = recipe.data.general
    data = Stage("data", {"data": recipe.data.model_dump(mode="json"), **rng, **_tokenizer(recipe),
                          "files": _marks(_data_files(recipe))})  # fmt: skip
    seed = Stage("seed", {"seed_model": _decisive(recipe.seed_model), "device": recipe.device, **rng}, (data,))
    branches = tuple(
        Stage(f"train/{domain}", {"train": _branch_settings(recipe, domain), "domain": domain, "general": general,
                                  "device": recipe.device, **rng}, (data, seed))
        for domain in recipe.train.domains
    )  # fmt: skip
    mixed = Stage("mix", {"mix": _decisive(recipe.mix), "domains": recipe.train.domains, "general": general, **rng},
                  (data, seed, *branches))  # fmt: skip
    finetune = Stage(
        "finetune", {"finetune": _decisive(recipe.finetune), "device": recipe.device, **rng}, (data, mixed)
    )
    baselines = _baselines(recipe, {"data": data, "seed": seed, "mix": mixed}, branches)
    # The soup is made beside the mix; what trains comes after the finetuning, so that `--until finetune` leaves it out.
    soup = [stage for stage in baselines if stage.name == "baselines/soup"]
    others = [stage for stage in baselines if stage not in soup]
    made = (data, seed, *branches, mixed, *soup, finetune, *others)
    results = [stage for stage in others if stage.name.removeprefix("baselines/") in recipe.baselines]
    models = (data, seed, *branches, mixed, *soup, finetune, *results)
    marks = _marks(_task_files(recipe))
    evaluate = Stage("evaluate", {"evaluate": _decisive(recipe.evaluate), **({"files": marks} if marks else {}), **rng},
                     models)  # fmt: skip
    analyze = Stage("analyze", {"analyze": _decisive(recipe.analyze), **rng}, (data, finetune))
    report = Stage("report", {}, (evaluate, analyze))
    return Graph(recipe, (*made, evaluate, analyze, report))


def _baselines(recipe: Recipe, known: dict[str, Stage], branches: tuple[Stage, ...]) -> list[Stage]:
    """The stages of the recipe's baselines, in its order. A trained stage's last need holds its start weights."""
    seed, found = known["seed"], []
    for name in recipe.baselines:
        kind = BASELINES[name]
        if name == "soup":
            found.append(Stage("baselines/soup", {"generalist": recipe.mix.generalist}, (seed, *branches)))
        elif name in BTM:
            settings = {"experts": BTM[name], "generalist": recipe.mix.generalist, "general": recipe.data.general}
            found.append(Stage(f"baselines/{name}", settings, (known["data"], seed, *branches)))
        elif kind.start == "upcycled" and UPCYCLED not in known:
            known[UPCYCLED] = _upcycled(recipe, seed)
            found.append(known[UPCYCLED])
        if kind.trains:
            found += _trained_baseline(recipe, name, known)
    return found


def _upcycled(recipe: Recipe, seed: Stage) -> Stage:
    """Copies of the seed model's FF sublayers as experts: the start of both upcycling baselines."""
    mix = recipe.mix
    settings = {
        "members": len(recipe.member_names), "split": [mix.split, mix.split_rescale], "router_std": mix.router_std,
        "router": recipe.routing.as_json(), "dtype": mix.dtype, "max_shard_size": mix.max_shard_size,
        "rng_seed": recipe.rng_seed,
    }  # fmt: skip
    return Stage(f"baselines/{UPCYCLED}", settings, (seed,))


def _trained_baseline(recipe: Recipe, name: str, known: dict[str, Stage]) -> list[Stage]:
    """One stage a phase."""
    start, found = known[BASELINES[name].start], []
    for phase in phases_of(recipe, name):
        mixture: dict[str, Any] = {"domains": recipe.train.domains, "general": recipe.data.general}
        if phase.data == "domains":
            mixture["replay"] = recipe.train.replay
        settings = {
            "training": _decisive(phase.settings), "data": {phase.data: mixture},
            "matched": matching_inputs(recipe, name), "device": recipe.device, "rng_seed": recipe.rng_seed,
        }  # fmt: skip
        if BASELINES[name].has_routers:
            settings["router"] = routing_of(recipe, name).as_json()
        start = Stage(phase.stage, settings, (known["data"], start))
        found.append(start)
    return found


def _branch_settings(recipe: Recipe, domain: str) -> dict[str, Any]:
    """What decides one branch's training: other branches' domains and tokens do not."""
    settings = _decisive(recipe.branch_training(domain))
    return {key: value for key, value in settings.items() if key not in ("domains", "domain_tokens")}


def _decisive(section: Any) -> dict[str, Any]:
    """A recipe section without the settings that only decide speed."""
    return _without_speed(section.model_dump(mode="json"))


def _without_speed(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_speed(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if key not in SPEED_ONLY
    }


def _tokenizer(recipe: Recipe) -> dict[str, Any]:
    if recipe.seed_model.path is None:
        return {"tokenizer": recipe.seed_model.tokenizer.model_dump(mode="json")}
    return {"tokenizer": {"path": recipe.seed_model.path, "revision": recipe.seed_model.revision}}


def _data_files(recipe: Recipe) -> list[Path]:
    """The local files that training reads, and a local seed model's folder."""
    root = Path(recipe.data.root or ".")
    patterns = [source.path for domain in recipe.data.domains.values() for source in domain.sources if source.path]
    patterns += [domain.held_out for domain in recipe.data.domains.values() if domain.held_out]
    paths = [Path(match) for pattern in patterns for match in sorted(glob(str(root / pattern)))]  # noqa: PTH207 - patterns may be absolute
    if recipe.seed_model.path and Path(recipe.seed_model.path).is_dir():
        paths.append(Path(recipe.seed_model.path))
    return paths


def _task_files(recipe: Recipe) -> list[Path]:
    """The local files that tasks are read from."""
    harness = recipe.evaluate.harness.tasks.values()
    names = [task.path for task in recipe.evaluate.tasks.values()]
    names += [name for task in harness for name in (task.file, task.shots_file)]
    return [Path(recipe.data.root or ".") / name for name in names if name is not None]


def _marks(paths: list[Path]) -> dict[str, list[int]]:
    """Size and modification time of every file that is still there, in folders too, so that changes are noticed."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {os.fspath(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, as `train.learning_rate: 0.001 → 0.002` lines."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} → {after}")
    return lines
