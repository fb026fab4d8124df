"""The models of one mix, opened: their configs, their family and their tensors, fused ones taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from btx.choices.families import Config, Family
from btx.model_files.adapted_tensors import merge_into
from btx.model_files.adapter_folder import AdapterFolder
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.lazy_tensors import FileTensor

GENERALIST = "generalist"


@dataclass
class MixInputs:
    """Seed model and expert models, checked against each other and ready to stream."""

    seed_model: Path
    experts: dict[str, Path]
    """Folders of models, or of adapters of the seed model."""
    generalist: bool
    config: Config
    """The seed model's, completed with its class's defaults."""
    family: Family
    seed_tensors: TensorFolder
    expert_tensors: dict[str, TensorFolder]

    @property
    def members(self) -> dict[str, TensorFolder]:
        """Everything that becomes an expert, in order: the expert models, then the generalist."""
        return self.expert_tensors | ({GENERALIST: self.seed_tensors} if self.generalist else {})

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def shared_names(self) -> list[str]:
        """Names of the shared weights, sorted."""
        return [name for name in self.seed_tensors.names if self.family.feed_forward_match(name) is None]

    def values(self, name: str) -> list[FileTensor]:
        """One tensor from every member."""
        return [folder[name] for folder in self.members.values()]


def open_tensors(
    folder: Path, family: Family, config: Config, who: str = "model", adapter: AdapterFolder | None = None
) -> TensorFolder:
    """The tensors of a dense model's folder, fused ones (Phi-3's qkv) replaced by views of their parts.

    A copy of the embeddings as an LM head that is tied to them is left out.

    Args:
        who: whose tensors these are, for messages.
        adapter: is merged into them.
    """
    tensors = TensorFolder(folder, who)
    tensors.leave_out_tied_head(config)
    if adapter is not None:
        merge_into(tensors, adapter)
    for layer in range(int(config["num_hidden_layers"])):
        for fused, parts in family.fused(config).items():
            if fused.format(layer=layer) in tensors:
                tensors.split(
                    fused.format(layer=layer), {part.format(layer=layer): rows for part, rows in parts.items()}
                )
    return tensors
