"""What `btx mix` tells about the model it made: size, provenance, warnings, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btx.mixing.inputs import MixInputs
from btx.model_files.provenance import model_provenance, versions
from btx.model_files.shard_writer import OutputTensor

FINETUNE_NEXT = (
    "finetune {output} on text of all experts' domains and of the seed model's kind (paper, section 3.2): "
    "`btx finetune RUN` in a run, else any trainer that takes transformers models"
)
RISKY_DRIFT = 0.35
"""Share of ‖θ_seed‖ that the experts have moved apart from each other in a group of shared weights."""


def parameters(tensors: Sequence[OutputTensor], num_experts: int, top_k: int) -> dict[str, int]:
    """Parameters in all, and those a token uses: all but the experts it is not routed to."""
    sizes = [(sum(part.numel for part in tensor.parts), tensor.origin["from"]) for tensor in tensors]
    in_experts = sum(size for size, origin in sizes if origin in ("copy", "stack", "split", "blend"))
    total = sum(size for size, _ in sizes)
    return {"total": total, "active": total - in_experts + in_experts * top_k // num_experts}


def inputs_provenance(inputs: MixInputs) -> dict[str, Any]:
    """Hashes of every input model and the versions of the packages at work."""
    models = {"seed_model": inputs.seed_model, **inputs.experts}
    known: dict[Any, dict[str, Any]] = {}  # copies of one model are looked at once
    for path in models.values():
        if path not in known:
            known[path] = model_provenance(path)
    return {"inputs": {name: known[path] for name, path in models.items()}, "versions": versions()}


def warnings(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What in the experts' drift makes a mean of shared weights dangerous."""
    lines = []
    for group, drift in diagnostics.items():
        if group != "feed_forward" and (spread := drift.get("spread")) is not None and spread > RISKY_DRIFT:
            lines.append(
                f"{group}: the experts have drifted apart by {spread:.2f} of the seed model's norm (more than "
                f"{RISKY_DRIFT}): averaging these weights will hurt every expert"
            )
    if lines:
        lines.append(
            "train the branches with a lower learning rate and more general text, or their FF weights only "
            "(train.trainable=feed_forward); or try --merge ties; and finetune the mixed model longer"
        )
    return lines


def screen_lines(report: Mapping[str, Any], output: str) -> list[str]:
    """The lines shown at the end of a mix."""
    lines = []
    for group, drift in report["diagnostics"].items():
        if drift["mean_norm_ratio"] is None:
            lines.append(f"{group}: unchanged by every expert")
            continue
        cosine = "one expert" if drift["mean_cosine"] is None else f"cosine {drift['mean_cosine']:.2f}"
        norms = [norm for norm in drift["relative_norms"] if norm is not None]  # None: the seed's tensors are zero
        relative = f", ‖Δ‖ / ‖seed‖ {max(norms):.3f}" if norms else ""
        lines.append(f"{group}: task vectors' {cosine}, ‖mean Δ‖ / mean ‖Δ‖ {drift['mean_norm_ratio']:.2f}{relative}")
    lines += [f"warning: {line}" for line in report["warnings"]]
    size = report["parameters"]
    lines.append(f"{size['total'] / 1e6:,.1f}M parameters, {size['active'] / 1e6:,.1f}M active for each token")
    lines.append(f"next: {report['next'].format(output=output)}")
    return lines
