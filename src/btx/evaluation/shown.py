"""What a report shows of every model, beside its numbers: the bits of single tokens, answers, the load of its experts.

Kept for each model in evaluate/models/, put together in evaluate/shown.json.

Shape letters: T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btx.choices.baselines import BASELINES
from btx.data.domains import Question
from btx.data.held_out import HeldOutDocument, held_out_documents
from btx.data.token_files import DocumentEncoder
from btx.data.token_texts import decoded
from btx.evaluation.analyze import domain_routing
from btx.evaluation.bits_per_byte import token_bits
from btx.evaluation.routed_text import example_documents, name_of, token_by_token
from btx.evaluation.tasks import example_numbers, go_on, gold_answer
from btx.files import value_hash
from btx.models.expert_names import names_in
from btx.models.outputs import SideBySide
from btx.moe.any_moe import num_experts
from btx.reporting.shapes import Shown, ShownAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

VERSION = 2
"""Goes into the key of what is kept; raised whenever something would come out differently, or is new."""
LOAD_TOKENS = 5_000
"""Tokens a domain on which the load of models is compared, unless `evaluate.tokens` are fewer."""
ANSWERS = 3
"""Questions a domain."""
PROMPT_TOKENS = NEW_TOKENS = 32
"""Of a document that a model goes on with, where a domain has no task."""

RUN_MODEL = "btx"
"""The model whose routing the report shows."""


@dataclass(frozen=True)
class Asked:
    """A question, or the start of a document that a model goes on with."""

    domain: str
    prompt: str
    gold: str
    task: str | None = None
    """None: a document."""


@dataclass(frozen=True)
class ToShow:
    """What every model of a run is shown on."""

    recipe: Recipe
    examples: dict[str, HeldOutDocument]
    """Name of the document → the document."""
    asked: list[Asked]
    texts: dict[str, list[HeldOutDocument]]
    """Domain → the text on which loads are compared."""
    only_named: bool = False
    """Whether a model has the run's experts only if its config says so: for models that the run has not made."""

    def key(self, measured: str) -> str:
        """Hash of everything that decides what is kept of a model.

        Args:
            measured: hash of everything that decides the model's numbers.
        """
        return value_hash({
            "version": VERSION, "measured": measured, "examples": list(self.examples),
            "asked": [asdict(asked) for asked in self.asked], "experts": self.recipe.expert_names,
            "texts": {domain: [name_of(text) for text in texts] for domain, texts in self.texts.items()},
        })  # fmt: skip

    def of(
        self, name: str, model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase,
        measured: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """What is kept of a model: `losses` (document → bits of every token), `answers` (number of the question →
        `output`, of a task also `correct`), of the run's own kind of MoE model `loads`, of the run's model `tokens`
        (those of each answer), of every other MoE model `routes` (document → experts and gates of its tokens).

        Args:
            measured: what results.json says of it.
        """
        length = self.recipe.data.sequence_length
        answers = self._answers(name, model, tokenizer, measured)
        kept: dict[str, Any] = {
            "losses": dict(zip(self.examples, token_bits(model, list(self.examples.values()), length), strict=True)),
            "answers": answers,
        }
        if not isinstance(model, SideBySide) and self._has_experts_of_the_run(name, model):
            loads = {domain: domain_routing(model, texts, length)[0].load() for domain, texts in self.texts.items()}
            kept["loads"] = {domain: load_LE.round(decimals=4).tolist() for domain, load_LE in loads.items()}
            if name == RUN_MODEL:
                kept["tokens"] = {
                    number: routed_answer(model, tokenizer, self.asked[int(number)].prompt, answer["output"])
                    for number, answer in answers.items()
                }
        if not isinstance(model, SideBySide) and name != RUN_MODEL and num_experts(cast(Any, model)):
            routed = {key: token_by_token(model, tokenizer, text.tokens) for key, text in self.examples.items()}
            kept["routes"] = {key: {part: each[part] for part in ("experts", "gates")} for key, each in routed.items()}
        return kept

    def _answers(
        self, name: str, model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase,
        measured: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """Of baselines none, of an expert those in its own domain. Answers in tasks are those that were measured."""
        if name in self.recipe.baselines or name == "mix":
            return {}
        domain = name.removeprefix("expert/") if name.startswith("expert/") else None
        to_answer = {str(i): asked for i, asked in enumerate(self.asked) if domain in (None, asked.domain)}
        answers: dict[str, dict[str, Any]] = {}
        for number, asked in to_answer.items():
            if asked.task is not None:
                examples = measured["tasks"][asked.task]["examples"]
                one = next(example for example in examples if example["prompt"] == asked.prompt)
                answers[number] = {"output": one["output"], "correct": one["correct"]}
        documents = {number: asked.prompt for number, asked in to_answer.items() if asked.task is None}
        outputs = go_on(model, tokenizer, list(documents.values()), NEW_TOKENS)
        return answers | {number: {"output": text} for number, text in zip(documents, outputs, strict=True)}

    def _has_experts_of_the_run(self, name: str, model: PreTrainedModel) -> bool:
        """Whether its experts are those that the run has trained, so that their names are right for it."""
        if name in self.recipe.baselines and BASELINES[name].start != "mix":
            return False
        experts = self.recipe.expert_names
        if (count := num_experts(cast(Any, model))) != len(experts) or not self.texts:
            return False
        said = names_in(model.config.to_dict(), count)
        return said == experts if said is not None or self.only_named else True

    def together(self, kept: Mapping[str, Mapping[str, Any]]) -> Shown:
        """shown.json; it has no answers where the run's model is not among the models."""
        answers = []
        for number, tokens in kept.get(RUN_MODEL, {}).get("tokens", {}).items():
            asked = self.asked[int(number)]
            said = {name: of_model["answers"].get(number) for name, of_model in kept.items()}
            answers.append({
                "domain": asked.domain, "prompt": asked.prompt, "gold": asked.gold,
                "answers": {name: answer["output"] for name, answer in said.items() if answer},
                **({"task": asked.task, "correct": {name: answer["correct"] for name, answer in said.items() if answer}}
                   if asked.task is not None else {}),
                **tokens,
            })  # fmt: skip

        def by_document(part: str) -> dict[str, dict[str, Any]]:
            return {key: {name: of_model[part][key] for name, of_model in kept.items() if key in of_model.get(part, ())}
                    for key in self.examples}  # fmt: skip

        return {
            "losses": by_document("losses"), "answers": cast(list[ShownAnswer], answers),
            "routes": by_document("routes"),
            "loads": {name: of_model["loads"] for name, of_model in kept.items() if "loads" in of_model},
        }  # fmt: skip


def to_show(
    run_folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, questions: Mapping[str, Sequence[Question]]
) -> ToShow:
    """What the models of a run are shown on."""
    examples: dict[str, HeldOutDocument] = {}
    asked: list[Asked] = []
    texts: dict[str, list[HeldOutDocument]] = {}
    load_tokens = min(LOAD_TOKENS, recipe.evaluate.tokens)
    for domain in recipe.data.domains:
        documents = example_documents(run_folder, recipe, domain, recipe.analyze.scored_examples)
        examples |= {name_of(document): document for document in documents}
        texts[domain] = [
            text.start(load_tokens) for text in held_out_documents(run_folder, recipe, domain, load_tokens)
        ]
        if (task := task_of(recipe, domain)) is not None:
            some, after = questions[task], recipe.evaluate.tasks[task].answer_after
            numbers = example_numbers(len(some))
            numbers = numbers[:: max(1, len(numbers) // ANSWERS)][:ANSWERS]
            asked += [Asked(domain, some[i].prompt, gold_answer(some[i].answer, after), task) for i in numbers]
        else:
            starts = (_start(tokenizer, domain, document) for document in documents)
            asked += [start for start in starts if start is not None][:ANSWERS]
    return ToShow(recipe, examples, asked, texts)


def task_of(recipe: Recipe, domain: str) -> str | None:
    """The task that asks of a domain: the one of its name, else the first made by a generator of its text."""
    generators = {source.generate for source in recipe.data.domains[domain].sources} - {None}
    made = [name for name, task in recipe.evaluate.tasks.items() if task.generate in generators]
    return domain if domain in recipe.evaluate.tasks else next(iter(made), None)


def routed_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> dict[str, Any]:
    """The tokens of an answer as `token_by_token` gives them, read after its prompt."""
    asked, said = map(DocumentEncoder(tokenizer).beginning, (prompt, answer))
    return token_by_token(model, tokenizer, np.array([*asked, *said[1:]], np.int64), shown_from=len(asked))


def _start(tokenizer: PreTrainedTokenizerBase, domain: str, document: HeldOutDocument) -> Asked | None:
    """The start of a document and the tokens after it, halves of a short one; None where there are not two."""
    ids_T = document.tokens[1:]
    cut = min(PROMPT_TOKENS, len(ids_T) // 2)
    prompt, gold = decoded(tokenizer, ids_T[:cut]), decoded(tokenizer, ids_T[cut : cut + NEW_TOKENS])
    return Asked(domain, prompt, gold) if prompt.strip() and gold.strip() else None
