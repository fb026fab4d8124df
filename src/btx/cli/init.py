"""`btx init`: a commented recipe for a model and texts of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from btx.choices.families import context_length
from btx.cli.mix import named
from btx.cli.terminal import remark
from btx.errors import CheckpointError, DataError, UserError
from btx.files import home_filled
from btx.model_files.token_ids import read_object
from btx.number_texts import count_text

TEXT_COLUMNS = ("text", "content", "body", "document", "raw_content", "abstract", "code")
"""What the column with a document is called, the likeliest first."""
LONGEST_SEQUENCE, MOST_TOKENS, LEAST_TOKENS = 2048, 100_000_000, 20_000
DEFAULT_TOKENS = 10_000_000
UNSAID = """\
  # pretrained_tokens: 15e12  # its card does not say how many it has read; with them `btx plan` predicts what is gained
"""

TEMPLATE = """\
# A run of Branch-Train-MiX on your own model and data.
#
#   btx plan {file}        what it reads, trains and costs; writes nothing
#   btx run {file}         everything; run it again and it continues
#   btx chat runs/{name}     talk to the model when it is done; the report is runs/{name}/report/index.html
#
# Change first: the two lines `tokens`. Paths are relative to where btx is started. Any line can also be set on the
# command line: btx run {file} train.tokens=1e6. Every key and its default: docs/recipe.md.
name: {name}
device: auto  # a GPU if there is one, else the CPU; or cuda, cpu

seed_model:
  # The model that is branched: a folder as save_pretrained writes it, or a name on the hub such as
  # meta-llama/Llama-3.2-1B. `btx ls families` lists what can be mixed.
  path: {model}
{read}
data:
  sequence_length: {length}  # tokens of a training sequence, at most what the model can read
  general: general  # the domain nearest to what the model was trained on: a tenth of every expert's text is of it
  held_out: 0.05  # share of the documents that is measured on, where no files are called val*, test* or held_out
  # Name of a domain: a file, a folder or a glob of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt, or
  # {{path: ..., text: COLUMN}}, or {{hub: NAME, subset: NAME}}. docs/data.md has the rest.
  domains:
{domains}

train:  # one expert for each of these domains, each in a process of its own
  domains: {experts}
  tokens: {tokens}  # of each expert; {why_tokens}
  # batch_tokens, learning_rate, warmup_steps and checkpoint_every follow from model and tokens; `btx plan` says which.
  # micro_batch_tokens: auto        # the most that fit into memory (default 16384)
  # gradient_checkpointing: true    # much less memory, a third more time

mix:
  top_k: 2  # experts a token uses

finetune:  # of the mixed model, on all domains
  tokens: {tokens}
  # gradient_checkpointing: true

evaluate:
  tokens: 50_000  # of held-out text of each domain
"""


def init(
    target: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("my.yaml"),
    model: Annotated[str | None, typer.Option(help="Model to branch: a folder, or a name on the hub.")] = None,
    domain: Annotated[list[str] | None, typer.Option(
        help="NAME=PATH of the text of an expert: a file, folder or glob; repeat.")] = None,
    general: Annotated[str | None, typer.Option(
        help="Text like what the model was trained on; default: all domains' text.")] = None,
) -> None:  # fmt: skip
    """Write a commented recipe for your own model and data: btx init my.yaml --model ./model --domain law=./law"""
    from btx.files import write_text
    from btx.recipe.loading import parse_recipe

    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target}: a recipe's file ends in .yaml")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already and is not overwritten: choose another name or remove it")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.absolute().parent}")
    texts = {name: str(path) for name, path in named(domain or [], "--domain", "PATH").items()}
    if "general" in texts and general is not None:
        raise UserError("--domain general and --general name the same domain; give one of them")
    text, missing = recipe_text(target, model or "./model", texts or {"law": "./law", "code": "./code"},
                                general if texts else general or "./general")  # fmt: skip
    parse_recipe(text, str(target))
    write_text(target, text)
    for line in missing:
        remark(f"note: {line}")
    typer.echo(f"wrote {target}; look at its lines `tokens`, then: btx plan {target}")


def recipe_text(target: Path, model: str, texts: Mapping[str, str], general: str | None) -> tuple[str, list[str]]:
    """The recipe, and what it names that is not there yet.

    Args:
        texts: name of an expert's domain → path of its text.
        general: path of the general text; None: all domains' text together.
    """
    from btx.recipe.loading import inline_yaml

    named_texts = {**texts, **({} if general is None else {"general": general})}
    looks = {name: _look(path) for name, path in named_texts.items()}
    missing = [f"{name}: {looked['problem']}" for name, looked in looks.items() if "problem" in looked]
    if "/" not in model and not home_filled(model).is_dir():
        model = f"./{model}"
    folder = home_filled(model)
    if folder.is_file():
        missing.append(f"seed_model.path: {model}: a model is a folder, as save_pretrained writes it; this is a file")
    elif not folder.is_dir() and model.startswith((".", "/", "~")):
        missing.append(f"seed_model.path: {model}: there is no such folder yet")
    lines = [f"    {inline_yaml(name)}: {inline_yaml(looked['source'])}" for name, looked in looks.items()]
    if "general" not in looks:
        lines.append(f"    general: {inline_yaml([{'domain': name} for name in texts])}  # better: text of its own")
    sizes = [looked["tokens"] for name, looked in looks.items() if name in texts and "tokens" in looked]
    tokens, why = DEFAULT_TOKENS, "more is better, up to a few times the text there is"
    if sizes:
        tokens = min(MOST_TOKENS, max(LEAST_TOKENS, int(float(f"{max(sizes):.1g}"))))
        why = f"the largest domain has about {count_text(max(sizes))}"
    experts = [name for name in texts if name != "general"] or list(texts)
    text = TEMPLATE.format(
        file=target, name=inline_yaml(target.stem), model=inline_yaml(model), length=_sequence_length(folder),
        read=UNSAID if folder.is_dir() and not _card_says_tokens(folder) else "",
        domains="\n".join(lines), experts=inline_yaml(experts), tokens=f"{tokens:_}", why_tokens=why,
    )  # fmt: skip
    return text, missing


def _look(path: str) -> dict[str, Any]:
    """What is at a path: {"source": as the recipe names it, "tokens", about, or the "problem"}."""
    from btx.data.document_files import find_files
    from btx.planning.data_look import BYTES_A_TOKEN, columns, text_bytes

    try:
        files = find_files(path, None)
        named_columns = columns(files[0])
    except DataError as error:
        return {"source": path, "problem": str(error)}
    column = next((name for name in TEXT_COLUMNS if name in named_columns), "text")
    source = path if column == "text" else {"path": path, "text": column}
    return {"source": source, "tokens": sum(map(text_bytes, files)) / BYTES_A_TOKEN}


def _card_says_tokens(model: Path) -> bool:
    from btx.model_files.card_tokens import card_tokens
    from btx.model_files.hub import model_card

    return card_tokens(model_card(model), parameters=1.0)[0] > 0  # of whatever size: nothing else is said of none


def _sequence_length(model: Path) -> int:
    """What the model can read, up to 2048 tokens."""
    try:
        longest = context_length(read_object(model / "config.json"))
    except CheckpointError:  # it is to come, or is no model: `btx plan` says so
        longest = None
    return min(LONGEST_SEQUENCE, longest[0]) if longest is not None else LONGEST_SEQUENCE
