"""What a report shows of every model, beside its numbers: the bits of single tokens, answers, the load of its experts.

Kept for each model in evaluate/models/, put together in evaluate/shown.json.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btx.choices.baselines import BASELINES
from btx.data.held_out import HeldOutDocument, held_out_documents
from btx.data.token_files import DocumentEncoder
from btx.evaluation.analyze import RoutingTotals, domain_routing
from btx.evaluation.bits_per_byte import token_bits
from btx.evaluation.routed_text import example_documents, name_of, token_by_token
from btx.evaluation.tasks import go_on
from btx.files import value_hash
from btx.models.outputs import SideBySide
from btx.moe.layer import moe_blocks
from btx.reporting.shapes import Shown, ShownAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

VERSION = 1
"""Goes into the key of what is kept; raised whenever something would come out differently, or is new."""
LOAD_TOKENS = 5_000
"""Tokens a domain on which the load of models is compared."""
ANSWERS = 2
"""Questions a domain."""
PROMPT_TOKENS = NEW_TOKENS = 32
"""Of a document that a model goes on with, where a domain has no task."""

RUN_MODEL = "btx"
"""The model whose routing the report shows."""


@dataclass(frozen=True)
class Start:
    """The start of a document, and how it goes on."""

    prompt: str
    gold: str


@dataclass(frozen=True)
class ToShow:
    """What every model of a run is shown on."""

    recipe: Recipe
    examples: dict[str, HeldOutDocument]
    """Name of the document → the document."""
    starts: dict[str, list[Start]]
    """Domain without a task → what there is to go on with."""
    tasks: dict[str, str]
    """Domain → the task that asks of it."""
    texts: dict[str, list[HeldOutDocument]]
    """Domain → the text on which loads are compared."""

    def key(self, measured: str) -> str:
        """Hash of everything that decides what is kept of a model.

        Args:
            measured: hash of everything that decides the model's numbers.
        """
        return value_hash({
            "version": VERSION, "measured": measured, "examples": list(self.examples), "tasks": self.tasks,
            "starts": {domain: [start.prompt for start in starts] for domain, starts in self.starts.items()},
            "texts": {domain: [name_of(text) for text in texts] for domain, texts in self.texts.items()},
            "experts": self.recipe.expert_names,
        })  # fmt: skip

    def of(
        self, name: str, model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase,
        measured: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """What is kept of a model.

        Args:
            name: in the results.
            measured: what results.json says of it.
        """
        length, prompts = self.recipe.data.sequence_length, self._starts_for(name)
        outputs = go_on(model, tokenizer, [prompt for _, prompt in prompts], NEW_TOKENS)
        answers: dict[str, dict[str, str]] = {domain: {} for domain, _ in prompts}
        for (domain, prompt), output in zip(prompts, outputs, strict=True):
            answers[domain][prompt] = output
        kept: dict[str, Any] = {
            "losses": {key: token_bits(model, document, length) for key, document in self.examples.items()},
            "answers": answers,
        }
        blocks = [] if isinstance(model, SideBySide) else moe_blocks(model)
        experts_are_ours = name not in self.recipe.baselines or BASELINES[name].start == "mix"
        if blocks and experts_are_ours and blocks[0].num_experts == len(self.recipe.expert_names):
            routed = cast("PreTrainedModel", model)
            kept["loads"] = {
                domain: _load(domain_routing(routed, texts, length)) for domain, texts in self.texts.items()
            }
            if name == RUN_MODEL:
                kept["tokens"] = [
                    routed_answer(routed, tokenizer, answer["prompt"], answer["answers"][name])
                    for answer in self.answers({name: measured}, {name: kept})
                ]
        return kept

    def _starts_for(self, name: str) -> list[tuple[str, str]]:
        """(domain, prompt) of what a model goes on with: an expert only with its own domain's texts."""
        if name in self.recipe.baselines or name == "mix":
            return []
        own = name.removeprefix("expert/") if name.startswith("expert/") else None
        return [(domain, start.prompt) for domain, starts in self.starts.items() if own in (None, domain)
                for start in starts]  # fmt: skip

    def answers(
        self, measured: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The questions of every domain with the answers of those who answer, without tokens.

        Args:
            measured: model → what results.json says of it.
            kept: model → what `of` gave.
        """
        shown = []
        for domain in self.recipe.data.domains:
            who = [name for name in measured if name not in self.recipe.baselines and name != "mix"
                   and (not name.startswith("expert/") or name == f"expert/{domain}")]  # fmt: skip
            for start in self.starts.get(domain, []):
                given = {name: kept[name]["answers"][domain][start.prompt] for name in who}
                shown.append({"domain": domain, "prompt": start.prompt, "gold": start.gold, "answers": given})
            if (task := self.tasks.get(domain)) is not None:
                examples = {name: measured[name]["tasks"][task]["examples"] for name in who}
                for number, asked in enumerate(_some(examples[who[0]]) if who else []):
                    said = {name: _some(found)[number] for name, found in examples.items()}
                    shown.append({
                        "domain": domain, "task": task, "prompt": asked["prompt"], "gold": asked["gold"],
                        "answers": {name: answer["output"] for name, answer in said.items()},
                        "correct": {name: answer["correct"] for name, answer in said.items()},
                    })  # fmt: skip
        return shown

    def together(self, measured: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Mapping[str, Any]]) -> Shown:
        """shown.json; its answers are empty where the run's model is not among the models."""
        answers = self.answers(measured, kept) if "tokens" in kept.get(RUN_MODEL, {}) else []
        tokens = kept[RUN_MODEL]["tokens"] if answers else []
        return {
            "losses": {key: {name: found["losses"][key] for name, found in kept.items()} for key in self.examples},
            "answers": [cast(ShownAnswer, answer | routed) for answer, routed in zip(answers, tokens, strict=True)],
            "loads": {name: found["loads"] for name, found in kept.items() if "loads" in found},
        }


def to_show(run_folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ToShow:
    """What the models of a run are shown on.

    Args:
        run_folder: holds the prepared data.
        tokenizer: the one that made the data's token files.

    Raises:
        DataError: held-out data are missing.
    """
    tasks = {domain: task for domain in recipe.data.domains if (task := task_of(recipe, domain)) is not None}
    examples, starts, texts = {}, {}, {}
    for domain in recipe.data.domains:
        documents = example_documents(run_folder, recipe, domain, recipe.analyze.scored_examples)
        examples |= {name_of(document): document for document in documents}
        texts[domain] = held_out_documents(run_folder, recipe, domain, LOAD_TOKENS)
        if domain not in tasks:
            starts[domain] = [start for document in documents if (start := _start(tokenizer, document))][:ANSWERS]
    return ToShow(recipe, examples, starts, tasks, texts)


def task_of(recipe: Recipe, domain: str) -> str | None:
    """The task that asks of a domain: the one of its name, else the first made by a generator of its text."""
    generators = {source.generate for source in recipe.data.domains[domain].sources} - {None}
    made = [name for name, task in recipe.evaluate.tasks.items() if task.generate in generators]
    return domain if domain in recipe.evaluate.tasks else next(iter(made), None)


def routed_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> dict[str, Any]:  # fmt: skip
    """The tokens of an answer as `token_by_token` gives them, read after its prompt."""
    encoder = DocumentEncoder(tokenizer)
    asked, said = (ids[:-1] if encoder.trailing_eos else ids for ids in encoder([prompt, answer]))
    return token_by_token(model, tokenizer, np.array([*asked, *said[1:]], np.int64), shown_from=len(asked))


def _load(totals: RoutingTotals) -> list[list[float]]:
    return [[round(share, 4) for share in load_E] for load_E in totals.load().tolist()]


def _some(examples: Sequence[Any]) -> list[Any]:
    """ANSWERS of the questions that results.json shows, spread over them."""
    return list(examples[:: max(1, len(examples) // ANSWERS)][:ANSWERS])


def _start(tokenizer: PreTrainedTokenizerBase, document: HeldOutDocument) -> Start | None:
    """The start of a document and the tokens after it, halves of a short one; None where there are not two."""
    ids_T = document.tokens[1:]
    cut = min(PROMPT_TOKENS, len(ids_T) // 2)
    prompt, gold = (
        cast(str, tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
        for ids in (ids_T[:cut], ids_T[cut : cut + NEW_TOKENS])
    )
    return Start(prompt, gold) if prompt.strip() and gold.strip() else None
