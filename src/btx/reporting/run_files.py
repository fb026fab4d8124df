"""What a report reads of a run folder. Missing files are fine, broken ones an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from btx.errors import RunFolderError
from btx.files import misfit
from btx.metrics_file import read_metrics
from btx.outputs import check_outputs, read_done, read_output
from btx.reporting.drawing import COLOURS
from btx.reporting.oracle import read_oracle
from btx.reporting.paired_bootstrap import read_documents
from btx.reporting.shapes import (
    AlignedRouting,
    Manifest,
    MixRecord,
    ResolvedRecipe,
    Results,
    Routing,
    Shown,
    Tokens,
)
from btx.reporting.tokens import own_expert, own_experts

MEASURING = ("evaluate", "analyze")
"""Stages whose outputs are shown beside those of the models that they have measured."""
ROUTING, TOKENS = "routing.json", "tokens.json"


@dataclass(frozen=True)
class Stage:
    """One stage of the run that has left something: its `done.json` (None while it runs) and its metrics."""

    name: str
    done: dict[str, Any] | None
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds for the report, or the folder of an analysed model; files that are missing are empty."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    documents: dict[str, Any]
    routing: dict[str, Any]
    aligned: dict[str, Any]
    tokens: dict[str, Any]
    mix: dict[str, Any]
    oracle: dict[str, Any]
    stages: list[Stage]
    stale: Mapping[str, str]
    """Of the stages in `MEASURING` those that have measured models of before → why."""

    @property
    def of_model(self) -> bool:
        """Whether this is an analysed model (routing.json in the folder itself), which no run has trained."""
        return (self.folder / ROUTING).is_file()

    @property
    def name(self) -> str:
        """The title: the recipe's name, the analysed model's, or the folder's."""
        return str(
            self.recipe.get("name")
            or "/".join(Path(self.routing.get("model", "")).parts[-2:])
            or self.folder.resolve().name
        )

    @property
    def statistics(self) -> dict[str, Any]:
        """What the routing says as a whole; empty where an earlier version measured less."""
        return self.routing.get("statistics") or {}

    @property
    def models(self) -> dict[str, Any]:
        """Model → its row of results.json; empty before the evaluation."""
        return self.results.get("models", {})

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Quality with fewer and fewer experts, all of them first; empty where it was not measured."""
        return sorted(self.routing.get("kept", []), key=lambda point: -len(point["experts"]))

    @property
    def branch_stages(self) -> list[Stage]:
        """The branches' trainings that have left something."""
        return [stage for stage in self.stages if stage.name.startswith("train/")]

    @property
    def experts(self) -> list[str]:
        """Names of the MoE model's experts, from the first file that knows them."""
        trained = [stage.name.removeprefix("train/") for stage in self.branch_stages]
        return self.routing.get("experts") or self.mix.get("experts") or self.tokens.get("experts") or trained

    @property
    def general(self) -> str:
        """The general domain, which is the generalist's."""
        return self.recipe.get("data", {}).get("general", "general")

    @property
    def branches(self) -> list[str]:
        """The domains that have a branch."""
        return self.recipe.get("train", {}).get("domains", [])

    @property
    def own_experts(self) -> dict[str, int]:
        """Domain → index of its own expert, of the routed domains that have one."""
        return own_experts(self.routing.get("domains", {}), self.routing.get("experts", []), self.general)

    def stage(self, name: str) -> Stage:
        """The stage of this name, empty if it has left nothing."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, None, []))

    def colour(self, domain: str) -> str:
        """Palette name of a domain's expert."""
        expert = own_expert(domain, self.experts, self.general)
        return "quiet" if expert is None else f"c{expert % COLOURS}"


def read_run(folder: Path, stale: Mapping[str, str] | None = None) -> Run:
    """Read what the report shows. Missing files are fine; broken ones raise RunFolderError.

    Args:
        stale: `Run.stale`; the report says so, and tells nothing of these stages beside what is newer.
    """
    stale = stale or {}
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder; `btx run RECIPE` makes one")
    recipe_text, recipe = _read_recipe(folder / "recipe.yaml")
    analysis = folder if (folder / ROUTING).is_file() else folder / "analyze"
    shown = read_output(folder / "evaluate" / "shown.json", Shown) or {}
    results = read_output(folder / "evaluate" / "results.json", Results) or {}
    routing = read_output(analysis / ROUTING, Routing) or {}
    tokens = read_output(analysis / TOKENS, Tokens) or {}
    return Run(
        folder, recipe_text, recipe,
        manifest=read_output(folder / "manifest.json", Manifest) or {},
        results=results,
        documents=read_documents(folder / "evaluate" / "documents.json") or {},
        routing=routing | ({"loads": shown["loads"]} if routing and shown else {}),
        aligned=read_output(analysis / "align.json", AlignedRouting) or {},
        tokens=_with_shown(tokens, shown) if shown else tokens,
        mix=read_output(folder / "mix" / "mix.json", MixRecord) or {},
        oracle=read_oracle(folder, {} if "evaluate" in stale else results),
        stages=_read_stages(folder, recipe.get("train", {}).get("domains", [])),
        stale=stale,
    )  # fmt: skip


def stale_lines(run: Run) -> list[str]:
    """A line for each stage that has measured models of before: what is shown of it, and what makes it anew."""
    shown = dict(zip(MEASURING, ("Results, costs and answers", "Routing and tokens"), strict=True))
    return [f"{shown[name]} below are of models that were there before: {name} is stale ({why}). `btx run` makes it "
            f"anew." for name, why in run.stale.items()]  # fmt: skip


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """The recipe as it stands in a run folder, and what it says; nothing if there is none."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        recipe = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: not valid YAML ({error}); `btx run` writes it again") from error
    if problem := misfit(recipe, ResolvedRecipe):
        raise RunFolderError(f"{path}: {problem}; `btx run` writes it again")
    return text, recipe


def _with_shown(tokens: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """tokens.json with what the evaluation has of the same documents, known by their names, and with the answers."""
    examples = [
        example | {key: shown[key][example["document"]] for key in ("losses", "routes")
                   if example.get("document") in shown.get(key, {})}
        for example in tokens.get("examples", [])
    ]  # fmt: skip
    return tokens and tokens | {"examples": examples, "answers": shown["answers"]}


def _read_stages(folder: Path, domains: Sequence[str]) -> list[Stage]:
    """Stages in the order of the method; data and branches in the recipe's order."""

    def below(group: str) -> list[str]:
        names = [path.name for path in (folder / group).glob("*/") if not path.name.startswith(".")]
        known = {name: number for number, name in enumerate(["tokenizer", *domains])}
        return [f"{group}/{name}" for name in sorted(names, key=lambda name: (known.get(name, len(known)), name))]

    names = [*below("data"), "seed", *below("train"), "mix", "finetune", "align/sft", "align/dpo", *below("baselines"),
             "evaluate", "analyze"]  # fmt: skip
    there = [name for name in names if (folder / name).is_dir()]
    for name in there:
        check_outputs(folder / name, suffixes={".jsonl"})
    return [Stage(name, read_done(folder / name), read_metrics(folder / name / "metrics.jsonl")) for name in there]
