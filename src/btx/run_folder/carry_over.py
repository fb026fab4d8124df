"""A run folder of an earlier btx, in which all data were one stage that every other one needed, goes on untrained.

Its token files are made anew, which takes minutes, and compared: a stage that was trained with the same settings on the
same tokens from the same start stays, under the hash it has now. Plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.data.mixture import Mixture
from btx.data.samples import in_turn
from btx.data.token_files import TokenFile
from btx.files import read_json, write_sealed
from btx.outputs import DONE, FORMAT, STARTED, CheckpointState, read_done, read_started
from btx.process import Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.stage_notes import started_json

NOT_COMPARED = {"device", "domain", "domains", "general", "data", "files", "members", "domain_tokens"}
"""Keys of old settings that said where something is, or what the stages before and the tokens say now."""

NEUTRAL_THEN = {"precision": "float32"}
"""Settings whose neutral value was another one → that value; what is neutral now accepts it."""


def is_of_earlier_version(run: RunFolder) -> bool:
    """Whether a run folder was begun when all data were one stage."""
    return (run.path / "data" / "started.json").is_file()


def carry_over(run: RunFolder, log: Log) -> None:
    """Let stages of an earlier version stay whose settings, tokens and start are the same; say which, and which not.

    The data stages have to be done. Nobody may be at work in the run folder.
    """
    verified: set[str] = set()  # domains whose tokens some stage was trained on
    for stage in run.graph:
        begun = read_started(run.folder(stage.name))
        if begun is None or begun.get("format") == FORMAT:
            continue
        if reason := _why_not(run, stage, begun, verified):
            log(f"{stage.name}: has to be made anew: {reason}")
            continue
        if stage.trains and (domains := _domains(stage)):
            verified |= domains
        _adapt(run.folder(stage.name), stage, str(begun["inputs"]))
        log(f"{stage.name}: stays, though an earlier version made it: same settings, same tokens, same start")
    for name in ("started.json", "done.json"):  # of the one data stage: all it said is compared
        (run.path / "data" / name).unlink(missing_ok=True)


def _why_not(run: RunFolder, stage: Stage, begun: Mapping[str, Any], verified: set[str]) -> str:
    """Why a stage cannot stay; empty if it can."""
    for needed in stage.needs:
        if run.state(needed) != "done":
            return f"{needed.name} is {run.state(needed)}"
    if differing := _differing(begun["settings"], stage):
        return f"other settings: {', '.join(differing)}"
    if stage.name in ("evaluate", "analyze", "report"):
        return "what is measured depends on the held-out tokens, which an earlier version did not note"
    domains = _domains(stage)
    if not stage.trains:
        return "" if domains <= verified else f"the tokens of {', '.join(sorted(domains - verified))} were not noted"
    if not domains:
        return ""
    if trained_on(run, stage) == fingerprint(run, stage):
        return ""
    return ("the tokens are others: its text has changed, or held documents that another domain holds out, which is "
            "no longer trained on")  # fmt: skip


def _differing(old: Mapping[str, Any], stage: Stage) -> list[str]:
    """Settings that differ, but for those that other comparisons replace."""
    return [
        key for key, before in old.items()
        if key not in NOT_COMPARED and not _same(before, stage.shown.get(key), stage.settings.get(key))
    ]  # fmt: skip


def _same(before: Any, after: Any, decisive: Any) -> bool:
    """Whether settings say the same, at any depth: a younger field may be there if it has its neutral value, which is
    what is not among the decisive settings."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return bool(before == after)
    decides = decisive if isinstance(decisive, dict) else {}
    younger = after.keys() - before.keys() - NOT_COMPARED
    return not younger & decides.keys() and all(
        _same(value, after.get(name), decides.get(name))
        or (name not in decides and name in NEUTRAL_THEN and value == NEUTRAL_THEN[name])
        for name, value in before.items()
    )


def _mixtures(stage: Stage) -> list[dict[str, Any]]:
    """What a stage reads: {"mixture": [[component, weight]...], "sequence_length"} each."""
    settings = stage.settings
    if "mixture" in settings:
        return [settings]
    read: list[dict[str, Any]] = settings.get("mixtures") or settings.get("texts") or []
    return read


def _domains(stage: Stage) -> set[str]:
    return {name.split("/")[0] for mixture in _mixtures(stage) for name, _ in mixture["mixture"]}


def fingerprint(run: RunFolder, stage: Stage) -> str:
    """The fingerprint of the samples that a training stage would read now."""
    opened = [
        Mixture(
            [(name, TokenFile.open(run.folder("data") / name / "train"), weight) for name, weight in read["mixture"]],
            read["sequence_length"],
            stage.settings["rng_seed"],
        )
        for read in _mixtures(stage)
    ]
    section = stage.shown.get("finetune") or stage.shown.get("training") or {}
    return in_turn(opened, section.get("switching", 0.0)).fingerprint


def trained_on(run: RunFolder, stage: Stage) -> str | None:
    """The fingerprint of the samples that a stage has read, from done.json or its newest checkpoint."""
    done = run.done(stage)
    if done is not None:
        return done.get("data")
    states = sorted(run.folder(stage.name).glob("state/step-*/state.json"))
    return str(read_json(states[-1], CheckpointState)["marks"]["data"]) if states else fingerprint(run, stage)


def _adapt(folder: Path, stage: Stage, old: str) -> None:
    """Put the hash that a stage has now in place of the old one."""
    for file in folder.glob("state/step-*/state.json"):
        state = read_json(file, CheckpointState)
        write_sealed(file, state | {"marks": state["marks"] | {"inputs": stage.inputs}})
    done = read_done(folder)
    if done is not None:
        write_sealed(folder / DONE, done | {"inputs": stage.inputs})
    write_sealed(folder / STARTED, started_json(stage) | {"before": old})
