"""The model card of a mixed model: README.md as the Hugging Face hub reads it, with YAML front matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.files import read_json, write_text
from btx.markdown_text import literal
from btx.model_files.btx_folder import FILE


def write_model_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write README.md into a MoE folder: what it is made from, how, by which versions, and what to know before use.

    Args:
        folder: the MoE folder, its config.json (and btx.json) in place.
        record: mix.json, as `mix`, `extend` and `drop` write it.
    """
    from huggingface_hub import ModelCardData

    family = record["config"]["model_type"]
    private = read_json(folder / FILE)
    data = ModelCardData(
        library_name="btx" if private else "transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "moe", "merge", "branch-train-mix", "btx", family],
    )
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n{_body(record, private)}")


def _body(record: Mapping[str, Any], private: Mapping[str, Any] | None) -> str:
    """The text; `private` is btx.json of a folder that only btx reads."""
    size = record["parameters"]
    readers = "The folder loads in transformers without btx."
    if private:
        readers = (
            f"Router: {literal(private['router']['kind'])}. Only btx reads this folder: {literal(private['why'])}."
        )
    lines = [
        f"# A mixture of {len(record['experts'])} experts",
        "",
        f"Made with [btx](https://arxiv.org/abs/2403.07816) (Branch-Train-MiX): {literal(record['family'])}, "
        f"top-{record['top_k']}, {size['total'] / 1e6:,.1f}M parameters, {size['active'] / 1e6:,.1f}M active for each "
        f"token. {readers}",
        "",
        "| expert | number |",
        "|---|---|",
        *[f"| {literal(name)} | {number} |" for number, name in enumerate(record["experts"])],
        "",
        f"Feed-forward weights: {_feed_forward(record)}. Shared weights: {_method(record['merge'])}. "
        f"Routers: {_method(record['router_init'])}.",
        "",
        "## Inputs",
        "",
        "| model | folder | config.json (SHA-256) | weights (fingerprints) |",
        "|---|---|---|---|",
        *[_input_row(name, model) for name, model in record["inputs"].items()],
        "",
        "A fingerprint is the SHA-256 of a file's size, its header and 256 evenly spaced samples of its data; it tells "
        "models apart, but does not notice every flipped byte. `sha256:` is the SHA-256 of the whole file.",
        "",
        "## How far the experts have drifted from the seed model",
        "",
        "| weights | mean cosine of task vectors | norm of the mean / mean norm | largest norm / seed's norm |",
        "|---|---|---|---|",
        *[_drift_row(group, drift) for group, drift in record["diagnostics"].items()],
        *([""] if record["warnings"] else []),
        *[f"**Warning:** {literal(line)}." for line in record["warnings"]],
        "",
        "## Before use",
        "",
        f"This model has not been finetuned after mixing. Next: {record['next'].format(output='it')}. Its licence is "
        "whatever the licences of all inputs allow; fill in `license` and `base_model` above before you publish it.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _feed_forward(record: Mapping[str, Any]) -> str:
    if record["blend"]:
        return "blended, expert n having the n-th chunk of every input"
    if record["split"]:
        how = "rescaled" if record["split"]["rescale"] else "not rescaled"
        return f"split into {record['split']['chunks']} chunks each, {how}"
    return "copied bit for bit"


def _method(settings: Mapping[str, Any]) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "method")
    return literal(settings["method"] + (f" ({parameters})" if parameters else ""))


def _input_row(name: str, model: Mapping[str, Any]) -> str:
    marks = [
        f"{literal(file['file'])}: "
        + (f"sha256:`{_hash(file['sha256'])}`" if "sha256" in file else f"`{_hash(file['sampled_sha256'])}`")
        for file in model["weights"]
    ]
    config = f"`{_hash(model['sha256']['config.json'])}`" if "config.json" in model["sha256"] else ""
    folder = model.get("hub") or Path(model["path"]).name
    return f"| {literal(name)} | {literal(folder)} | {config} | {'<br>'.join(marks)} |"


def _drift_row(group: str, drift: Mapping[str, Any]) -> str:
    ratio = drift["mean_norm_ratio"]
    if ratio is None:
        return f"| {literal(group)} | unchanged | | |"
    cosine = "" if drift["mean_cosine"] is None else f"{drift['mean_cosine']:.3f}"
    norms = [norm for norm in drift["relative_norms"] if norm is not None]  # None: the seed's tensors are zero
    return f"| {literal(group)} | {cosine} | {ratio:.3f} | {f'{max(norms):.4f}' if norms else ''} |"


def _hash(text: object) -> str:
    """Hexadecimal digits alone."""
    return re.sub(r"[^0-9a-f]", "", str(text))
