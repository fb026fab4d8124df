"""The stages that prepare data: the tokenizer, then one for each domain, kept apart from the others. Plain Python.

What any domain holds out is in no domain's training text, so what a domain is depends on what the others hold out. It
must not depend on it for ever, or a domain more would make all others stale, and with them every model. So a finished
domain stays as it is, kept apart from those that were known when it was made; a domain that comes later holds out
nothing that the finished ones are trained on. Both are in the hash, as they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from itertools import count
from pathlib import Path, PurePath
from typing import Any

from btx.data.identity import domain_files, domain_identity, held_out_identity
from btx.errors import CheckpointError, UserError
from btx.files import content_sha256
from btx.recipe.mixtures import domains_in, resolve, seed_mixture
from btx.recipe.schema import Recipe
from btx.run_folder.graph import Recorded, Settings, Stage, inputs_hash

TOKENIZER = "data/tokenizer"
TOKENIZER_FILES = ("*token*.json", "*.model", "vocab.*", "merges.txt", "tekken.json", "chat_template*")
"""What is a tokenizer's in a model's folder."""


class DataStages:
    """The data stages of a recipe.

    Args:
        recorded: what is known of the run's finished stages.
        read: label of a data stage → its started.json, as noted by the finished models that have read it.
    """

    def __init__(self, recipe: Recipe, recorded: Recorded, read: Mapping[str, Mapping[str, Any]]) -> None:
        self.recipe, self.recorded, self.read = recipe, recorded, read
        self._identity = cache(self._identity_of)
        self.tokenizer = Stage(TOKENIZER, self._tokenizer, files=self._tokenizer_text, recorded=recorded(TOKENIZER))
        self._domains = {
            domain: Stage(f"data/{domain}", partial(self._domain, domain), (self.tokenizer,),
                          partial(self._files, domain), partial(self._label, domain))
            for domain in recipe.data.domains
        }  # fmt: skip

    def __iter__(self) -> Iterator[Stage]:
        return iter((self.tokenizer, *self._domains.values()))

    def of(self, domains: Iterable[str]) -> list[Stage]:
        """The stages of some domains, each once."""
        return [self._domains[domain] for domain in dict.fromkeys(domains)]

    @cached_property
    def known_as(self) -> dict[str, str]:
        """Domain → the name under which the run's models have read it: its own, unless it has been renamed since.

        Names are in the hashes of what reads a domain, and in the order of its samples; they must not be a reason to
        train again.
        """
        held = {name.removeprefix("data/"): noted["settings"]["sources"]
                for name, noted in self.read.items() if name != TOKENIZER}  # fmt: skip
        sources = {domain: self._sources_if_known(domain) for domain in self.recipe.data.domains}
        names = {
            domain: domain
            for domain, name_before in sources.items()
            if name_before is None or held.get(domain) == name_before
        }
        for domain in sorted(sources.keys() - names.keys()):
            free = held.keys() - names.values()
            if same := sorted(name for name in free if held[name] == sources[domain]):
                names[domain] = same[0]
        for domain in sorted(sources.keys() - names.keys()):  # not read yet: of any name that no other one bears
            names[domain] = next(name for name in (domain + "'" * i for i in count()) if name not in names.values())
        return names

    def _label(self, domain: str) -> str:
        return f"data/{self.known_as[domain]}"

    def _sources_if_known(self, domain: str) -> dict[str, Any] | None:
        try:
            return self._identity(domain)
        except UserError:
            return None

    def _tokenizer(self) -> Settings:
        """A tokenizer from scratch is what it is trained on, any other what its files hold."""
        seed = self.recipe.seed_model
        if seed.config is not None:
            texts = [[weight, self._identity(name.split("/")[0])[name.split("/")[1]]]
                     for name, _, weight in resolve(self.recipe, seed_mixture(self.recipe))]  # fmt: skip
            return {"tokenizer": seed.tokenizer, "model_type": seed.config["model_type"], "texts": texts}
        assert seed.path is not None  # the schema guarantees one of the two
        if (folder := Path(seed.path)).is_dir():
            files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
            return {"files": {file.name: content_sha256(file) for file in files}}
        return self.seed_on_hub(TOKENIZER)

    def seed_on_hub(self, stage: str) -> Settings:
        """An existing seed model, of which no folder is here, as a stage reads it: by its name on the hub.

        Raises:
            CheckpointError: the stage has read it from a folder, which had this name when the model was taken.
        """
        seed, known, taken = self.recipe.seed_model, self.recorded(stage), self.recorded("seed")
        name = PurePath(seed.path or "").name
        was_here = taken is not None and any(name in PurePath(file).parts for file in taken["files"])
        if known is not None and "files" in known["settings"] and was_here:
            raise CheckpointError(f"seed_model.path: {seed.path}: there is no such folder")
        return {"path": seed.path, "revision": seed.revision}

    def _tokenizer_text(self) -> dict[str, str]:
        if self.recipe.seed_model.config is None:
            return {}
        names = domains_in(self.recipe, seed_mixture(self.recipe))
        return {file: sha256 for name in names for file, sha256 in domain_files(self.recipe.data, name).items()}

    def _domain(self, domain: str) -> Settings:
        if (kept := self._kept(domain)) is not None:
            return kept
        identity, held_out = self._identity(domain), self.held_out(domain)
        others = [other for other in self.recipe.data.domains if other != domain]
        finished = {other: kept for other in others if (kept := self._kept(other)) is not None}
        return {
            "sources": identity,
            "apart_from": sorted(self.held_out(other) for other in others),
            "trained_on_before": sorted(
                self._domains[other].inputs for other, kept in finished.items() if held_out not in kept["apart_from"]
            ),
        }  # fmt: skip

    def _kept(self, domain: str) -> Settings | None:
        """The settings of a finished domain that is still what the recipe says, as they were when it was made."""
        for known in (self.recorded(f"data/{domain}"), self.read.get(self._label(domain))):
            if known is not None:
                settings = {**known["settings"], "sources": self._identity(domain)}
                if inputs_hash(settings, {TOKENIZER: self.tokenizer.inputs}) == known["inputs"]:
                    return settings
        return None

    def _files(self, domain: str) -> dict[str, str]:
        try:
            return domain_files(self.recipe.data, domain)
        except UserError:
            return dict((self.recorded(f"data/{domain}") or {"files": {}})["files"])

    def held_out(self, domain: str) -> str:
        """Hash of what decides which documents a domain holds out."""
        return held_out_identity(self._identity(domain))

    def _identity_of(self, domain: str) -> dict[str, Any]:
        """What a domain's own documents are, from its files; where these are not here, what they held as recorded."""
        try:
            return domain_identity(self.recipe.data, domain, self.recipe.rng_seed)
        except UserError:
            known = self.recorded(f"data/{domain}")
            if known is None:
                raise
            files = {number: source["files"] for number, source in known["settings"]["sources"].items()}
            return domain_identity(self.recipe.data, domain, self.recipe.rng_seed, recorded=files, names=known["files"])
