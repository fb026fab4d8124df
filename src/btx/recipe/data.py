"""Recipe sections: where documents come from, and how they become training sequences. Plain Python."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from btx.recipe.section import GeneratorName, Name, PathText, PositiveInt, Section, Weight


class Source(Section):
    """One place documents come from: exactly one of `path`, `hub`, `generate`, `domain`."""

    path: PathText | None = None
    """File, folder or glob: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt (documents are separated by
    `document_separator`); relative to `data.root`, else to the working directory."""
    hub: str | None = None
    """Dataset name on the Hugging Face hub, or a local dataset folder that `datasets.load_dataset` reads."""
    generate: GeneratorName | None = None
    """Text made on the spot, without network: the demo's domains."""
    domain: str | None = None
    """Another domain of this recipe, whose token files are shared, not copied."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Git revision of a hub dataset."""
    streaming: bool = True
    """Read a hub dataset without downloading all of it first."""
    text: str = "text"
    """Column (parquet, hub) or key (JSONL) that holds the document."""
    document_separator: str = "\n\n\n"
    """In .txt files: the text between two documents, two blank lines if not said otherwise; empty: a file is one
    document."""
    max_bytes: PositiveInt | None = None
    """Stop after this many bytes of UTF-8 text (train and held-out together)."""
    weight: Weight = 1.0
    """Sampling weight among this domain's sources; weights are normalised."""

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        kinds = [kind for kind in ("path", "hub", "generate", "domain") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"a source needs exactly one of path, hub, generate, domain; given: {kinds or 'none'}")
        return self


class Domain(Section):
    """A named data mixture. Short forms: a string is one `path`; a list is `sources`; a source's keys stand alone."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the documents come from, with weights."""
    held_out: PathText | None = None
    """File, folder or glob with the held-out documents. Without it: files named val*, valid*, test* or heldout*
    beside train* files, else `data.held_out` of the documents."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"sources": [{"path": value}]}
        if isinstance(value, list):
            return {"sources": [{"path": item} if isinstance(item, str) else item for item in value]}
        if isinstance(value, dict) and "sources" not in value:
            source = {key: item for key, item in value.items() if key != "held_out"}
            return {"sources": [source], **({"held_out": value["held_out"]} if "held_out" in value else {})}
        return value


class Data(Section):
    """The domains and how their documents become training sequences."""

    root: PathText | None = None
    """Folder that relative `path`s start from."""
    domains: dict[Name, Domain]
    """Domain name → sources."""
    general: Name = "general"
    """The domain the seed model is (or was) trained on: replay text of the branches, the generalist's domain."""
    sequence_length: PositiveInt = 4096
    """Tokens a training sequence (paper: 4096); documents are packed, attention stops at their borders."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    """Share of the documents kept out of training, where a source brings no held-out files."""

    @model_validator(mode="after")
    def _references(self) -> Data:
        takes_from_others = {
            name for name, domain in self.domains.items() if any(source.domain for source in domain.sources)
        }
        for name, domain in self.domains.items():
            for source in domain.sources:
                if source.domain is None:
                    continue
                if source.domain not in self.domains or source.domain == name:
                    raise ValueError(
                        f"domain {name!r} takes from unknown domain {source.domain!r}; "
                        f"there are: {', '.join(self.domains)}"
                    )
                if source.domain in takes_from_others:
                    raise ValueError(f"domain {name!r} takes from {source.domain!r}, which itself takes from others")
        if self.general not in self.domains:
            raise ValueError(
                f"data.general names {self.general!r}, which is not in data.domains: {', '.join(self.domains)}"
            )
        return self
