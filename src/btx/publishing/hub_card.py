"""The model card of what is pushed: README.md with the hub's front matter, results, data, licence and origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

import yaml
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.files import read_json
from btx.hub_names import REPOSITORY, hub_name
from btx.markdown_text import literal
from btx.model_files.btx_folder import FILE
from btx.model_files.hub import hub_origin
from btx.outputs import read_output
from btx.publishing.gguf_refusals import OWN_ROUTER
from btx.recipe.data import Source
from btx.reporting.results import results_table
from btx.reporting.shapes import Results
from btx.run_folder.folder import RunFolder

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """What a model was made from."""

    base_models: tuple[str, ...] = ()
    """Names on the hub."""
    licence: str | None = None
    """As the seed model's card has it; None: nothing says it."""
    datasets: tuple[str, ...] = ()
    """Names on the hub."""
    experts: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """Domain → where its text comes from."""
    results: Mapping[str, Any] = field(default_factory=dict)


class _Input(TypedDict):
    path: NotRequired[str]
    hub: NotRequired[str | None]


class _Record(TypedDict):
    """What is read of a mix.json."""

    inputs: NotRequired[dict[str, _Input]]
    experts: NotRequired[list[str | int]]


def origin_of_run(run: RunFolder) -> Origin:
    """What a run says of its model; no results where those that are there are not of the recipe as it is now."""
    seed = run.model("seed")
    on_hub = hub_origin(seed)
    path = run.recipe.seed_model.path or ""
    if on_hub is None and REPOSITORY.fullmatch(path) and not Path(path).exists():  # else a folder that is elsewhere now
        on_hub = f"hf:{path}"
    sources = {name: list(domain.sources) for name, domain in run.recipe.data.domains.items()}
    datasets = {
        source.hub for each in sources.values() for source in each if source.hub and not Path(source.hub).exists()
    }
    is_measured = run.state(run.graph["evaluate"]) == "done"
    return Origin(
        base_models=(hub_name(on_hub).repository,) if on_hub else (),
        licence=licence_of(seed),
        datasets=tuple(sorted(datasets)),
        experts=tuple(run.recipe.expert_names),
        sources={name: ", ".join(dict.fromkeys(map(_source, each))) for name, each in sources.items()},
        results=(read_output(run.path / "evaluate" / "results.json", Results) or {}) if is_measured else {},
    )


def origin_of_folder(folder: Path) -> Origin:
    """What a model folder says of itself: its mix.json and its card."""
    record = read_json(folder / "mix.json", _Record) or {}
    inputs = record.get("inputs", {})
    names = [hub_name(model["hub"]).repository for model in inputs.values() if model.get("hub")]
    seed = Path(inputs.get("seed_model", {}).get("path", folder))
    return Origin(
        base_models=tuple(dict.fromkeys(names)),
        licence=licence_of(folder) or licence_of(seed),
        experts=tuple(map(str, record.get("experts", ()))),
    )


def licence_of(folder: Path) -> str | None:
    """The licence that a model's card names, as the hub writes licences; `other` for a licence file alone."""
    card = front_matter(folder / "README.md")
    if isinstance(card.get("license"), str):
        return str(card["license"])
    return "other" if any(folder.glob("LICENSE*")) or any(folder.glob("LICENCE*")) else None


def front_matter(file: Path) -> dict[str, Any]:
    """What stands between the first two `---` of a card; empty if nothing does."""
    head, _, rest = _text_of(file).partition("---\n")
    try:
        values = yaml.safe_load(rest.partition("\n---")[0]) if not head.strip() else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _text_of(file: Path) -> str:
    """What a card says, without a byte order mark; nothing where there is none, or none that can be read."""
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError):
        return ""


def card(folder: Path, origin: Origin, name: str, *, has_report: bool) -> str:
    """README.md of a model on the hub; a card that lies in the folder keeps its text.

    Args:
        has_report: report.md goes up with it.
    """
    from huggingface_hub import ModelCardData

    private, config = read_json(folder / FILE), read_json(folder / "config.json")
    family = str((private or {}).get("config", {}).get("model_type") or config["model_type"])
    data = ModelCardData(
        license=origin.licence or UNKNOWN,
        base_model=list(origin.base_models) or None,
        datasets=list(origin.datasets) or None,
        library_name="btx" if private else "transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "moe", "branch-train-mix", "btx", family],
    )
    parts = [_own_text(folder / "README.md") or _text(origin, name, private, config)]
    parts += _results(origin.results)
    if has_report:
        parts.append("More figures and what they say: [report.md](report.md).")
    parts += _sources(origin)
    parts.append(_licence(origin))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"


def _own_text(file: Path) -> str:
    text = _text_of(file)
    return text.partition("---\n")[2].partition("\n---\n")[2] if text.startswith("---\n") else text


def _text(origin: Origin, name: str, private: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    experts = f" Its experts: {', '.join(map(literal, origin.experts))}." if origin.experts else ""
    reader = "The folder loads in transformers without btx."
    if private:
        reader = f"Only btx reads this folder: {literal(private.get('why', OWN_ROUTER))}."
    return (
        f"# {literal(name)}\n\nA mixture of experts, made with [btx](https://arxiv.org/abs/2403.07816) "
        f"(Branch-Train-MiX): {literal(config['model_type'])}.{experts} {reader}"
    )


def _results(results: Mapping[str, Any]) -> list[str]:
    """The results' table, best in bold."""
    if not results.get("models"):
        return []
    table = results_table(results)
    columns = ["model", *table.quality_titles(table.tasks)]
    lines = [f"| {' | '.join(map(literal, columns))} |", "|---" * len(columns) + "|"]
    for row in table.rows:
        texts = [f"**{literal(cell.text)}**" if cell.best else literal(cell.text) for cell in row.quality]
        lines.append(f"| {' | '.join([literal(row.name), *texts])} |")
    caption = (
        f"Held-out text in bits per byte (lower is better), tasks in per cent{table.meanings}. `btx` is this model "
        f"before any alignment."
    )
    return ["## Results", caption, "\n".join(lines)]


def _sources(origin: Origin) -> list[str]:
    if not origin.sources:
        return []
    rows = [f"| {literal(domain)} | {literal(text)} |" for domain, text in origin.sources.items()]
    return ["## Data", "\n".join(["| domain | from |", "|---|---|", *rows])]


def _source(source: Source) -> str:
    """Where text comes from; of files only the name: nobody else has the folders of this machine."""
    if source.hub is not None:
        subset = f" ({source.subset})" if source.subset else ""
        return f"{Path(source.hub).name if Path(source.hub).exists() else source.hub}{subset}"
    if source.path is not None:
        return f"files {Path(source.path).name}"
    return f"generated: {source.generate}" if source.generate else f"domain {source.domain}"


def _licence(origin: Origin) -> str:
    if origin.licence is None:
        said = "Unknown: neither the seed model's card nor a file beside it says its licence. Ask its makers before use"
    else:
        said = f"The seed model's: {literal(origin.licence)}"
    base = f" (made from {', '.join(map(literal, origin.base_models))})" if origin.base_models else ""
    return f"## Licence\n\n{said}{base}. The licences of the data and of other inputs hold too."
