"""Recipe sections: what is measured on which models, and which expert each token uses. Plain Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from btx.recipe.section import Name, PathText, PositiveInt, QuestionsName, Section


class Task(Section):
    """Questions answered greedily and scored by exact match."""

    generate: QuestionsName | None = None
    """Held-out questions of a generated domain."""
    path: PathText | None = None
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
    chat: bool = False
    """Ask models that have a chat template, as those of `align`, each prompt as a user's message; models without one
    complete it as it stands."""

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
    file: PathText | None = None
    """JSONL file (.jsonl, .jsonl.gz) with its documents, relative to `data.root`; without it lm-eval loads them from
    the Hugging Face hub."""
    shots_file: PathText | None = None
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
                raise ValueError(
                    f"evaluate.harness.tasks.{label}: {name} runs programs that the models write; read "
                    f"docs/evaluation-tasks.md, then set evaluate.harness.allow_code_execution: true"
                )
            if name in CODE_TASKS and task.file is None:
                raise ValueError(
                    f"evaluate.harness.tasks.{label}: {name} needs a file; lm-eval's own {name} would run "
                    f"programs without limits and load code from the hub"
                )
        return self


class Evaluate(Section):
    """What is measured on which models."""

    tokens: PositiveInt = 200_000
    """Held-out tokens a domain, at most."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic in which models are measured, here and in `analyze`. auto: on a GPU that of the finetuning, on a CPU
    float32."""
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

    @property
    def scored_examples(self) -> int:
        """Documents a domain whose tokens the evaluation scores one by one: as many as are shown by default, or more
        where more are shown."""
        return max(self.examples, int(type(self).model_fields["examples"].default))
