"""The family of a config."""

from __future__ import annotations

from btx.choices.families.family import Config, Family
from btx.choices.families.table import FAMILIES, REFUSED
from btx.errors import CheckpointError


def family_of(config: Config, where: str) -> Family:
    """The family of a dense config read from `where`.

    Raises:
        CheckpointError: unknown family, or a variant no MoE class can express.
    """
    model_type = str(config.get("model_type"))
    known = ", ".join(sorted({family.dense for family in FAMILIES}))
    candidates = [family for family in FAMILIES if family.dense == model_type]
    if not candidates:
        why = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise CheckpointError(f"{where}: model_type {model_type!r} cannot be mixed{why}; families: {known}")
    reasons = []
    for family in candidates:
        reason = family.refuse(config)
        if reason is None:
            return family
        reasons.append(f"{model_type} cannot become {family.moe}: {reason}")
    raise CheckpointError(f"{where}: {'; '.join(reasons)}; families: {known}")


def moe_family_of(config: Config, where: str) -> Family:
    """The family whose MoE class a MoE config read from `where` is of: it knows the published names."""
    model_type = str(config.get("model_type"))
    for family in FAMILIES:
        if family.moe == model_type:
            return family
    known = ", ".join(sorted({family.moe for family in FAMILIES}))
    raise CheckpointError(f"{where}: model_type {model_type!r} is no MoE class that btx writes; those are: {known}")


def family_table() -> dict[str, str]:
    """Dense class → MoE class with the exact variants and notes, one line each, for `btx ls families`."""
    lines: dict[str, str] = {}
    for family in FAMILIES:
        line = f"→ {family.moe}; exact: {family.exact}" + (f"; {family.notes}" if family.notes else "")
        line += "" if family.finetunes else "; mixes, but cannot be finetuned with btx"
        lines[family.dense] = f"{lines[family.dense]} | {line}" if family.dense in lines else line
    return lines
