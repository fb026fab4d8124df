"""A finished MoE model's folder, opened to be changed: its config, its family, its tensors and its experts' names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.choices.families import Config, Family, moe_family_of
from btx.choices.families.family import match
from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError, RunFolderError
from btx.files import atomic_folder, misfit, read_json, write_json
from btx.mixing.report import parameters
from btx.model_files.beside_weights import copy_beside_weights
from btx.model_files.btx_folder import is_btx_folder, open_btx_folder, write_router
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.model_card import write_model_card
from btx.model_files.model_folder import check_model_folder
from btx.model_files.provenance import versions
from btx.model_files.shard_writer import OutputTensor, require_space, write_shards
from btx.models.configs import as_the_files_say, read_config
from btx.models.expert_names import names_in, with_names
from btx.models.whole import check_planned, check_whole
from btx.system_errors import first_line

RECORD = "mix.json"
NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
OF_TENSORS = ("tensors", "tensors_by_origin", "drift")
"""What of mix.json is about single tensors."""
TOP_KS = ("num_experts_per_tok", "moe_k", "moe_topk")


class _Method(TypedDict):
    method: str


class _Weights(TypedDict):
    file: str


class _Input(TypedDict):
    path: str
    sha256: dict[str, str]
    weights: list[_Weights]


class _Split(TypedDict):
    chunks: int
    rescale: bool


class _Drift(TypedDict):
    mean_norm_ratio: float | None
    mean_cosine: float | None
    relative_norms: list[float | None]


class _Record(TypedDict):
    """What is read of mix.json when it is carried on: into the next mix.json and the model card."""

    merge: _Method
    router_init: _Method
    split: _Split | None
    blend: bool
    inputs: dict[str, _Input]
    diagnostics: dict[str, _Drift]
    warnings: list[str]
    paths: dict[str, Any]
    history: list[Any]
    experts: NotRequired[list[str | int]]
    seed_model: NotRequired[str]


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
    completed: Config
    """The same, completed with its class's defaults."""
    family: Family
    """A family that mixes into this class: it knows the published names."""
    tensors: TensorFolder
    names: list[str]
    """The experts' names: those in config.json, else in mix.json, else their numbers."""
    routing: RoutingRule | None
    """The router of a folder that only btx reads; None for a plain one."""
    record: dict[str, Any]
    """mix.json; what a folder without one cannot tell is unknown."""

    @classmethod
    def open(cls, path: Path) -> MoeFolder:
        """Open a MoE folder.

        Raises:
            CheckpointError: not a folder of a MoE class that btx writes, tensors that are not its class's, or experts
                that are parts of models.
        """
        config, routing = check_model_folder(path), None
        if is_btx_folder(config):
            config, routing = open_btx_folder(path, config)
        family = moe_family_of(config, str(path / "config.json"))
        completed = read_config(path)
        check_whole(path, completed)
        count = _count(config) or _count(completed)
        if count is None:
            known = ", ".join(NUMBERS_OF_EXPERTS)
            raise CheckpointError(f"{path / 'config.json'}: no number of experts; known keys: {known}")
        record = _record(path)
        names = names_in(config, count) or list(record.get("experts") or map(str, range(count)))
        if len(names) != count:
            raise CheckpointError(f"{path / RECORD}: names {len(names)} experts, but config.json says {count}")
        if record["split"] or record["blend"]:
            raise CheckpointError(
                f"{path}: its experts are chunks of models (split or blend), of which none can be added or removed "
                f"alone; mix again"
            )
        tensors = TensorFolder(path)
        tensors.leave_out_tied_head(completed)
        config = as_the_files_say(config, path)
        return cls(path, config, completed, family, tensors, names, routing, record)

    @property
    def top_k(self) -> int:
        """Experts a token uses."""
        return int(next(self.completed[key] for key in TOP_KS if key in self.completed))

    @property
    def num_layers(self) -> int:
        return int(self.completed["num_hidden_layers"])

    @property
    def shared_names(self) -> list[str]:
        """Names of the tensors that a dense model of the family has, too, and that are in no expert."""
        inert = set(self.family.inert(self.completed))
        return [
            name for name in self.tensors.names
            if self.place_of(name) is None and not self.holds_all_experts(name)
            and not any(match(pattern, name) is not None for pattern in inert)
        ]  # fmt: skip

    def write_with(
        self, names: Sequence[str], tensors: Sequence[OutputTensor], output: Path, changes: Mapping[str, Any],
        event: Mapping[str, Any], max_shard_size: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Write a folder like this one with other experts; it appears when it is complete.

        Args:
            changes: what else is new in mix.json, where what was known of single tensors holds no longer.
            event: what the history in mix.json tells of it.
            max_shard_size: bytes that an output file has at most.

        Returns:
            mix.json, as written.
        """
        config = with_names(self._config_for(len(names)), names)
        check_planned({tensor.name: tensor.shape for tensor in tensors}, config)
        require_space(output, tensors)
        with atomic_folder(output) as folder:
            copy_beside_weights(self.path, folder)
            write_json(folder / "config.json", config)
            if self.routing is not None:
                write_router(folder, self.routing)
            written = write_shards(folder, tensors, max_shard_size=max_shard_size)
            kept = {key: value for key, value in self.record.items() if key not in OF_TENSORS}
            record = kept | {
                "experts": list(names), "top_k": self.top_k, "config": config, "bytes": written,
                "parameters": parameters(tensors, len(names), self.top_k),
                "history": [*self.record["history"], event], "versions": versions(), **changes,
            }  # fmt: skip
            write_json(folder / RECORD, record)
            write_model_card(folder, record)
        return record

    def _config_for(self, num_experts: int) -> Config:
        """config.json for another number of experts."""
        said_in = [key for key in NUMBERS_OF_EXPERTS if isinstance(self.config.get(key), int)]
        missing = [key for key in NUMBERS_OF_EXPERTS if isinstance(self.completed.get(key), int)]
        return self.config | dict.fromkeys(said_in or missing[:1], num_experts)

    def place_of(self, name: str) -> tuple[str, int, int] | None:
        """(pattern, layer, expert) of one expert's tensor; None for tensors that belong to none or hold all experts."""
        for pattern in self.family.experts:
            if "{expert}" in pattern:
                regex = re.escape(pattern).replace(r"\{layer\}", r"(\d+)").replace(r"\{expert\}", r"(\d+)")
                if matched := re.fullmatch(regex, name):
                    return pattern, int(matched.group(1)), int(matched.group(2))
        return None

    def expert_axis(self, name: str) -> int | None:
        """The axis along which a tensor has one entry an expert (a selection bias, for example), None if it has none.

        Routers and stacked experts have axis 0.
        """
        if self.holds_all_experts(name):
            return 0
        n = len(self.names)
        now, more = (self.family.inert(self._config_for(number)) for number in (n, n + 1))
        for pattern, filled in now.items():
            if match(pattern, name) is not None:
                differing = [axis for axis, size in enumerate(filled.shape) if size != more[pattern].shape[axis]]
                return differing[0] if differing else None
        return None

    def holds_all_experts(self, name: str) -> bool:
        """Whether a tensor has one row an expert: a router, or stacked experts."""
        stacked = [pattern for pattern in self.family.experts if "{expert}" not in pattern]
        return any(match(pattern, name) is not None for pattern in [self.family.router, *stacked])


def _record(path: Path) -> dict[str, Any]:
    """mix.json with what it lacks."""
    try:
        record = read_json(path / RECORD)
        completed = UNKNOWN | ({} if record is None else {**record})
        if problem := misfit(completed, _Record):
            raise ValueError(problem)
        names = completed.get("experts") or []
        if len(set(map(str, names))) < len(names):
            raise ValueError("two experts of one name")
    except (RunFolderError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / RECORD}: this is no record of a mix ({first_line(error)}); mend it, or remove "
                              f"it: without it experts are called by their numbers") from error  # fmt: skip
    return completed | {"experts": list(map(str, names))}


def _count(config: Config) -> int | None:
    """The number of experts, if the config says it."""
    return next((config[key] for key in NUMBERS_OF_EXPERTS if isinstance(config.get(key), int)), None)
