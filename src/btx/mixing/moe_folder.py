"""A finished MoE model's folder, opened to be changed: its config, its family, its tensors and its experts' names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.choices.families import Config, Family, moe_family_of
from btx.choices.families.family import match
from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.files import read_json, write_json
from btx.model_files.btx_folder import is_btx_folder, open_btx_folder, write_router
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.model_folder import check_model_folder
from btx.reporting.shapes import MixRecord

RECORD = "mix.json"
NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
TOP_KS = ("num_experts_per_tok", "moe_k", "moe_topk")
UNKNOWN: dict[str, Any] = {
    "merge": {"method": "unknown"}, "router_init": {"method": "unknown"}, "split": None, "blend": False, "inputs": {},
    "diagnostics": {}, "warnings": [], "paths": {}, "history": [],
}  # fmt: skip


@dataclass
class MoeFolder:
    """An opened MoE folder."""

    path: Path
    config: Config
    """config.json of the plain class."""
    family: Family
    """A family that mixes into this class: it knows the published names."""
    tensors: TensorFolder
    names: list[str]
    """The experts' names: those in mix.json, else their numbers."""
    routing: RoutingRule | None
    """The router of a folder that only btx reads; None for a plain one."""
    record: dict[str, Any]
    """mix.json; what a folder without one cannot tell is unknown."""

    @classmethod
    def open(cls, path: Path) -> MoeFolder:
        """Open a MoE folder.

        Raises:
            CheckpointError: not a folder of a MoE class that btx writes, or experts that are parts of models.
        """
        config, routing = check_model_folder(path), None
        if is_btx_folder(config):
            config, routing = open_btx_folder(path, config)
        family = moe_family_of(config, str(path))
        count = int(config[count_key(config, path)])
        record = UNKNOWN | (read_json(path / RECORD, MixRecord) or {})
        names = list(record.get("experts") or map(str, range(count)))
        if len(names) != count:
            raise CheckpointError(f"{path / RECORD}: names {len(names)} experts, but config.json says {count}")
        if record["split"] or record["blend"]:
            raise CheckpointError(
                f"{path}: its experts are chunks of models (split or blend), of which none can be added or removed "
                f"alone; mix again"
            )
        return cls(path, config, family, TensorFolder(path), names, routing, record)

    @property
    def top_k(self) -> int:
        """Experts a token uses."""
        return int(next(self.config[key] for key in TOP_KS if key in self.config))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.config["num_hidden_layers"])

    def write_config(self, folder: Path, config: Config) -> None:
        """Write config.json, and btx.json for a router that only btx reads."""
        write_json(folder / "config.json", config)
        if self.routing is not None:
            write_router(folder, self.routing)

    def config_with(self, num_experts: int) -> Config:
        """config.json for another number of experts."""
        return self.config | {count_key(self.config, self.path): num_experts}

    def place_of(self, name: str) -> tuple[str, int, int] | None:
        """(pattern, layer, expert) of one expert's tensor; None for tensors that belong to none or hold all experts."""
        for pattern in self.family.experts:
            if "{expert}" in pattern:
                regex = re.escape(pattern).replace(r"\{layer\}", r"(\d+)").replace(r"\{expert\}", r"(\d+)")
                if found := re.fullmatch(regex, name):
                    return pattern, int(found.group(1)), int(found.group(2))
        return None

    def expert_axis(self, name: str) -> int | None:
        """The axis along which a tensor has one entry an expert (a selection bias, for example), None if it has none.

        Routers and stacked experts have axis 0.
        """
        if self.holds_all_experts(name):
            return 0
        n = len(self.names)
        now, more = (self.family.inert(self.config_with(number)) for number in (n, n + 1))
        for pattern, filled in now.items():
            if match(pattern, name) is not None:
                differing = [axis for axis, size in enumerate(filled.shape) if size != more[pattern].shape[axis]]
                return differing[0] if differing else None
        return None

    def holds_all_experts(self, name: str) -> bool:
        """Whether a tensor has one row an expert: a router, or stacked experts."""
        stacked = [pattern for pattern in self.family.experts if "{expert}" not in pattern]
        return any(match(pattern, name) is not None for pattern in [self.family.router, *stacked])


def count_key(config: Config, path: Path) -> str:
    """The config key that holds the number of experts.

    Raises:
        CheckpointError: there is none.
    """
    for key in NUMBERS_OF_EXPERTS:
        if isinstance(config.get(key), int):
            return key
    raise CheckpointError(f"{path / 'config.json'}: no number of experts; known keys: {', '.join(NUMBERS_OF_EXPERTS)}")
