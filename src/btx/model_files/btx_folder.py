"""Model folders that only btx reads: where the router is one that the plain Hugging Face class cannot express.

Weights lie in the plain class's published layout. What a plain reader must not miss is in its way: config.json has a
`model_type` that transformers, vLLM and llama.cpp do not know, and a `num_experts_per_tok` that is no number, so that
neither the Auto classes nor the class called by name load it with other results. btx.json beside it holds the router
and the config's true values. Plain Python, no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from btx.choices.families import Config, moe_family_of
from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.files import write_json
from btx.system_errors import blame

FILE = "btx.json"
FORMAT = 1
PREFIX = "btx_"
REFUSED = "read btx.json"
"""Stands in config.json for the number of experts a token: no reader can take it for one."""
HIDDEN = ("model_type", "architectures", "num_experts_per_tok")


def is_btx_folder(config: Config) -> bool:
    """Whether a config.json belongs to a folder that only btx reads."""
    return str(config.get("model_type")).startswith(PREFIX)


def write_router(folder: Path, rule: RoutingRule) -> bool:
    """Let a plain MoE folder route by `rule`.

    Returns:
        True if it became a folder that only btx reads; False if the plain class expresses the router.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = moe_family_of(config, str(folder / "config.json"))
    why = rule.why_not_plain(family.probability_gates)
    if why is None:
        if family.probability_gates:
            write_json(folder / "config.json", config | {"norm_topk_prob": rule.kind != "switch"})
        return False
    true = {key: config[key] for key in HIDDEN if key in config}
    hidden = {
        "model_type": PREFIX + true["model_type"],
        "architectures": [f"Btx{name}" for name in true.get("architectures", ())],
        "num_experts_per_tok": REFUSED,
    }
    # First the file that explains the config, then the config: a folder is never without its router.
    write_json(folder / FILE, {
        "format": FORMAT, "router": rule.as_json(), "config": true,
        "why": f"the plain class cannot express this router: {why}",
    })  # fmt: skip
    write_json(folder / "config.json", config | hidden)
    return True


def change_router(folder: Path, rule: RoutingRule) -> None:
    """Let a MoE folder route by `rule`, whatever it says now. Not for a folder that somebody may be reading."""
    config: Config = json.loads((folder / "config.json").read_text("utf-8"))
    plain, now = open_btx_folder(folder, config) if is_btx_folder(config) else (config, None)
    if "num_experts_per_tok" not in plain or now == rule:
        return  # routers of the class's own kind, which go by another name; or nothing to do
    num_experts = plain.get("num_local_experts") or plain["num_experts"]
    wanted = plain | {"num_experts_per_tok": rule.plain_top_k(num_experts)}
    if wanted != config:
        (folder / FILE).unlink(missing_ok=True)
        write_json(folder / "config.json", wanted)
    write_router(folder, rule)


def open_btx_folder(folder: Path, config: Config) -> tuple[Config, RoutingRule]:
    """The plain class's config and the router of a folder that only btx reads.

    Raises:
        CheckpointError: btx.json is missing, broken or of a later format.
    """
    file = folder / FILE
    try:
        facts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        blame(error)
        raise CheckpointError(f"{file}: this folder's router is described there, but unreadable: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("config"), dict):
        raise CheckpointError(f"{file}: expected format {FORMAT}; this folder was written by another version of btx")
    return config | facts["config"], RoutingRule.from_json(facts.get("router"), str(file))
