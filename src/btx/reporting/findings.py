"""What the report's views say, in a sentence each: the answer to the question above a table or a figure.

Each function gives the sentence, or "" where nothing was measured. Plain text: whoever shows it escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from btx.number_texts import count_text, flops_text, hours_text, is_number, percent_text, ratio_text, signed_percent
from btx.reporting.headline import paired_differences
from btx.reporting.oracle import mean_of
from btx.reporting.paired_bootstrap import chance_text
from btx.reporting.results import EXPERT, Results, learning_and_keeping_means
from btx.reporting.run_files import Run, Stage
from btx.reporting.tokens import mean_load

AS_GOOD = 0.01
"""Relative change of the bits per byte up to which fewer experts count as as good."""

SMOOTH = 4
"""Tokens over which the loads after a change of domain are averaged: single positions are noisy."""


def gains(table: Results) -> str:
    """In which domain btx saves most, and least."""
    ours = next((row.gains for row in table.rows if row.name == "btx"), [])
    by_domain = [(gain, domain) for gain, domain in zip(ours, table.domains, strict=False) if gain is not None]
    if not by_domain:
        return ""
    (most, best), (least, worst) = max(by_domain), min(by_domain)
    if _saves(most) == _saves(least):
        return f"btx {_saves(most)} on {'every domain' if best != worst else best}."
    return f"btx {_saves(most)} on {best}, where it gains most, and {_saves(least)} on {worst}, where it gains least."


def _saves(gain: float) -> str:
    share = f"{percent_text(abs(gain))} of the seed model's bits"
    return f"saves {share}" if gain >= 0 else f"needs {percent_text(-gain)} more bits than the seed model"


def learning(run: Run) -> str:
    """btx on the branches' domains and on all other text, beside the seed model and the baselines that learn the
    same."""
    models, branches = run.models, run.branches
    ours = learning_and_keeping_means(models.get("btx", {}), branches)
    if not ours:
        return ""
    rivals = [next((name for name in names if name in models), "")
              for names in (("dense_cm", "dense_dm"), ("upcycling_cm", "upcycling_dm"), ("seed",))]  # fmt: skip
    places = dict(zip(ours, ("On the domains with a branch", "on all other text"), strict=True))
    parts = []
    for part, bits in ours.items():
        against = []
        for name in filter(None, rivals):
            theirs = learning_and_keeping_means(models[name], branches).get(part)
            p = paired_differences(run.documents, "btx", name, branches).get(part, {}).get("p")
            if theirs is not None:
                fewer = "fewer" if bits < theirs else "more"
                against.append(f"{abs(bits - theirs):.3f} {fewer} than {name}{chance_text(p)}")
        parts.append(f"{places[part]} btx needs {bits:.3f} bits per byte{': ' * bool(against)}{', '.join(against)}")
    return "; ".join(parts) + "."


def cost(run: Run) -> str:
    """What btx cost after the seed model, and what the plan had said."""
    btx = run.models.get("btx", {})
    if not is_number(btx.get("flops")):
        return ""
    hours = btx.get("machine_hours", btx.get("hours"))
    time = f" and {hours_text(hours)} of machine time" if is_number(hours) else ""
    planned = btx.get("predicted", {}).get("flops")
    against = f"; the plan had said {flops_text(planned)} FLOPs" if is_number(planned) else ""
    return (
        f"btx took {count_text(btx.get('tokens'))} training tokens, {flops_text(btx['flops'])} FLOPs{time} "
        f"after the seed model{against}."
    )


def predicted(run: Run) -> str:
    """What the plan has predicted of btx against dense training, and what came out, where a dense baseline is there."""
    models = run.models
    told = models.get("btx", {}).get("predicted_gain")
    if not told:
        return ""
    when = "the plan predicted" if told.get("made_before", "seed") else "the law says, asked only after the training,"
    said = (
        f"At {ratio_text(told['tokens_per_parameter'], 10)} tokens a parameter of the seed model {when} a gain of "
        f"{told['gain']:+.3f} bits per byte over dense training at equal FLOPs, between {told['low']:+.3f} and "
        f"{told['high']:+.3f}"
    )
    ours = models["btx"].get("mean_bits_per_byte")
    dense = next((name for name in ("dense_cm", "dense_dm") if name in models), None)
    if dense is None or not is_number(ours) or not is_number(models[dense].get("mean_bits_per_byte")):
        return f"{said}; no dense baseline was trained to compare with."
    theirs, parts = (learning_and_keeping_means(models[name], run.branches) for name in (dense, "btx"))
    apart = ", ".join(f"{part} {theirs[part] - bits:+.3f}" for part, bits in parts.items() if part in theirs)
    gained = f"{models[dense]['mean_bits_per_byte'] - ours:+.3f}" + (f" ({apart})" if apart else "")
    matched = "" if dense == "dense_cm" else ", which had the same data and other FLOPs,"
    return f"{said}; against {dense}{matched} it is {gained}."


def oracle(run: Run) -> str:
    """How far the mix was behind the best model of every domain, and what the experts' divergence lets expect."""
    if not run.oracle:
        return ""
    mean, gap = mean_of(run.oracle["divergence"]), run.oracle["mean_gap"]
    return (
        f"Before the finetuning the mix was {abs(gap):.3f} bits per byte {'behind' if gap > 0 else 'ahead of'} each "
        f"domain's best model; experts needed {mean:.1f} % fewer bits at home than the seed model, which lets expect "
        f"{run.oracle['predicted_gain']:.1f} % over the best single expert (arXiv 2603.22755){_over_best_expert(run)}."
    )


def _over_best_expert(run: Run) -> str:
    """What btx has come to need against the expert model with the lowest mean."""
    models = run.models
    means = {name: bits for name in models if is_number(bits := models[name].get("mean_bits_per_byte"))}
    best = min(filter(lambda name: name.startswith(EXPERT), means), key=means.__getitem__, default=None)
    if "btx" not in means or best is None:
        return ""
    saved = 100 * (1 - means["btx"] / means[best])
    return f"; after it btx needs {abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} bits than {best}"


def training(run: Run) -> str:
    """From where to where training brought the loss: finetuning, or before that the expert models in the mean."""
    finetuning, branches = [run.stage("finetune")], run.branch_stages
    for whose, stages in (("Finetuning's loss", finetuning), ("The expert models' mean loss", branches)):
        ends = [both for stage in stages if (both := _first_and_last(stage))]
        if ends:
            first, last = (math.fsum(values) / len(ends) for values in zip(*ends, strict=True))
            verb = "fell" if last < first else "rose"
            return f"{whose} {verb} from {first:.2f} to {last:.2f} nats per token (first and last tenth of the steps)."
    return ""


def _first_and_last(stage: Stage) -> tuple[float, float] | None:
    """Mean loss of the first and of the last tenth of a stage's steps."""
    losses = [row["loss"] for row in stage.metrics if is_number(row.get("loss"))]
    tenth = max(1, len(losses) // 10)
    return (math.fsum(losses[:tenth]) / tenth, math.fsum(losses[-tenth:]) / tenth) if len(losses) > 1 else None


def routing(run: Run) -> str:
    """How much of its domain the in-domain expert reads; without such experts, how uneven the load is."""
    experts, domains = run.routing.get("experts", []), run.routing.get("domains", {})
    if not domains:
        return ""
    means = {
        domain: [mean_load(of_domain["load"], e) for e in range(len(of_domain["load"][0]))]
        for domain, of_domain in domains.items()
    }
    if in_domain := run.own_experts:
        largest = sum(means[domain][index] == max(means[domain]) for domain, index in in_domain.items())
        share = math.fsum(means[domain][index] for domain, index in in_domain.items()) / len(in_domain)
        return (
            f"In {largest} of {len(in_domain)} domains the in-domain expert has the largest load; on average it takes "
            f"{percent_text(share)}, where an even load would give {percent_text(1 / len(experts))}."
        )
    load, expert, domain = max((load, experts[e], name) for name, mean in means.items() for e, load in enumerate(mean))
    return (
        f"The largest load of any expert in any domain is {percent_text(load)} (expert {expert} on {domain}, mean over "
        f"layers), where an even load would give {percent_text(1 / len(experts))}."
    )


def lag(run: Run) -> str:
    """After how many tokens the new domain's expert has the larger load, smoothed over a few tokens."""
    measured = run.routing.get("lag")
    if not measured or not measured["positions"]:
        return ""
    rows = list(zip(measured["positions"], measured["old"], measured["new"], strict=True))
    before, after = [row for row in rows if row[0] < 0], [row for row in rows if row[0] >= 0]
    over = f"mean over {measured['documents']} documents"
    if not after:
        return ""
    if before and math.fsum(new - old for _, old, new in before) >= 0:
        return (
            f"Before the change already the new domain's expert has no smaller load than the old one's ({over}): "
            "routing does not tell the domains apart, so there is no lag to see."
        )
    last, old, new = after[-1]
    ends = f"{last} tokens after it takes {percent_text(new)}, the old one {percent_text(old)} ({over})"
    for start, (position, _, _) in enumerate(after):
        window = after[start : start + SMOOTH]
        if math.fsum(new - old for _, old, new in window) > 0:
            later = f"from {position} token{'' if position == 1 else 's'} after the change on"
            return f"The new domain's expert has the larger load {later if position else 'at once'}; {ends}."
    return f"The new domain's expert does not overtake the old one's; {ends}."


def kept(run: Run) -> str:
    """How few experts are as good as all, and what one alone costs."""
    points = [point for point in run.kept if is_number(point["mean"]) and point["mean"] > 0]
    if len(points) < 2:
        return ""
    whole = points[0]
    change = [(len(point["experts"]), point["mean"] / whole["mean"] - 1) for point in points]
    count = change[0][0]
    enough = [fewer for fewer, _ in takewhile(lambda point: point[1] <= AS_GOOD, change)][-1]
    first = (
        f"{enough} of {count} experts are within {percent_text(AS_GOOD, 0)} of all of them"
        if enough < count
        else f"Every one of the {count} experts counts: without the least used one bits per byte change by "
        f"{signed_percent(change[1][1])}"
    )
    alone, more = change[-1]
    return (
        f"{first}; with {alone} {'alone' if alone == 1 else 'of them'} bits per byte change by {signed_percent(more)}."
    )


def used_for(run: Run) -> str:
    """The class of tokens that each expert gets most above the others' mean."""
    uses: Mapping[str, Any] = run.routing.get("used_for") or {}
    parts = []
    for expert, use in uses.items():
        others = [other["classes"] for name, other in uses.items() if name != expert]
        above = [
            (share - math.fsum(other.get(name, 0.0) for other in others) / (len(others) or 1), name, share)
            for name, share in use["classes"].items()
        ]
        if above and others:
            more, name, share = max(above)
            if more > 0:
                parts.append(f"{expert} {name} ({percent_text(share, 0)} of its tokens)")
    return f"Measured against the other experts, each gets most of: {', '.join(parts)}." if parts else ""


def specialisation(run: Run) -> str:
    """In which layer the first expert says most of the domain, and in which least."""
    intervals = run.statistics.get("specialisation", [])
    if not intervals:
        return ""
    most, least = (choose(range(len(intervals)), key=lambda layer: intervals[layer]["value"]) for choose in (max, min))
    told = [f"{intervals[layer]['value']:.3f} (95 %: {intervals[layer]['low']:.3f} to {intervals[layer]['high']:.3f})"
            for layer in (most, least)]  # fmt: skip
    if most == least:
        return f"The first expert tells {told[0]} of the domain, where 1 is all and 0 nothing."
    return (
        f"The first expert tells most of the domain in layer {most}, {told[0]}, and least in layer {least}, "
        f"{told[1]}; 1 would be all and 0 nothing."
    )


def similarity(run: Run) -> str:
    """Which neighbouring layers route most alike."""
    similarity_LL = run.statistics.get("similarity", [])
    if len(similarity_LL) < 2:
        return ""
    value, layer = max((similarity_LL[layer][layer + 1], layer) for layer in range(len(similarity_LL) - 1))
    return f"Of neighbouring layers, {layer} and {layer + 1} route most alike ({value:.2f}; 1 is the same)."


def shift(run: Run, model: str) -> str:
    """How many tokens of an aligned model go to another first expert than before."""
    domains = run.aligned.get("models", {}).get(model, {})
    moved = {name: math.fsum(of_domain["moved"]) / len(of_domain["moved"])
             for name, of_domain in domains.items() if of_domain["moved"]}  # fmt: skip
    if not moved:
        return ""
    most = max(moved, key=lambda name: moved[name])
    before = run.aligned.get("before", "btx")
    return (
        f"{model} sends {percent_text(math.fsum(moved.values()) / len(moved))} of the tokens to another first expert "
        f"than {before} did, most on {most} ({percent_text(moved[most])})."
    )
