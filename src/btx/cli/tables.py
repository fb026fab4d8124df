"""Tables for the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Container, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from btx.choices.families import FAMILIES
from btx.number_texts import clock_text, count_text, duration_text, percent_text

FAMILIES_WIDTH = 100
UNDER_WAY = ("queued", "begun", "running", "stale")
"""States of stages that a sweep's run is at."""


def _table(columns: Sequence[str], left: Container[str] = (), **looks: Any) -> Table:
    """A table whose first column is never wrapped; it and those `left` begin at the left, numbers end at the right."""
    table = Table(**looks)
    for column in columns:
        is_first = column == columns[0]
        table.add_column(column, justify="left" if is_first or column in left else "right", no_wrap=is_first)
    return table


def plan_tables(planned: dict[str, Any]) -> list[Any]:
    """`btx plan`: data, models, stages, totals."""
    stages = _table(
        ("stage", "needs", "tokens", "FLOPs", "time", "memory", "disk", "state"), ("needs", "state"),
        title=f"stages, in {planned['run']}",
        caption=f"memory of each process; all: of a machine at once\n{planned['formula']}",
    )  # fmt: skip
    for row in planned["stages"]:
        why = f" ({row['why_stale']})" if row.get("why_stale") else ""
        stages.add_row(
            row["stage"], _short(row["needs"]), f"{row['tokens']:,}" if row["tokens"] else "",
            f"{row['flops']:.2e}" if row["flops"] else "", _time(row["hours"]), _size(row["memory_bytes"]),
            _size(row["disk_bytes"]), row["state"] + why,
        )  # fmt: skip
    totals = planned["totals"]
    stages.add_section()
    stages.add_row("all", "", f"{totals['tokens']:,}", f"{totals['flops']:.2e}", _time(totals["machine_hours"]),
                   _size(totals["memory_bytes"]), _size(totals["disk_bytes"]), "")  # fmt: skip
    baselines = [_baselines_table(planned["baselines"])] if planned["baselines"] else []
    speed = _speed_text(planned["speed"])
    work = work_text(planned["to_do"], planned["stays"])
    gpu = [_gpu_table(planned["gpu"]), _measuring_table(planned["gpu"])] if planned["gpu"] else []
    tables = [*_data_tables(planned["data"]), _models_table(planned), stages, *baselines, *gpu]
    return [*tables, speed, work, *_disk_note(totals),
            *(note if note.startswith("warning: ") else f"note: {note}"
              for note in (*planned["notes"], *planned["router"]["notes"]))]  # fmt: skip


def _data_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """What was found in the text that is not prepared yet."""
    table = _table(
        ("domain", "from", "files", "size", "columns", "documents", "characters", "tokens", "epochs", "held out"),
        ("from", "columns", "held out"), title="data, as far as a look into it tells",
        caption="~ about; a token is taken for 4 bytes; epochs: in the stage that reads it most",
    )  # fmt: skip
    for row in rows:
        if "files" not in row:
            table.add_row(row["domain"], row["from"])
            continue
        about, (middle, longest) = "~" if row["estimated"] else "", row["characters"]
        table.add_row(
            row["domain"], row["from"], f"{row['files']:,}", _size(row["bytes"]), ", ".join(row["columns"]),
            f"{about}{row['documents']:,}", f"{middle:,}, longest {longest:,}", f"~{count_text(row['tokens'])}",
            f"{row['epochs']:.2g}", row["held_out"],
        )  # fmt: skip
    return [table] if rows else []


def _disk_note(totals: Mapping[str, Any]) -> list[str]:
    """Only said of this machine, not refused: the run may be planned for another."""
    if totals["to_write_bytes"] <= totals["free_bytes"]:
        return []
    return [f"here the run would be refused: what it still has to write takes about {_size(totals['to_write_bytes'])}, "
            f"and {_size(totals['free_bytes'])} are free in its folder"]  # fmt: skip


def work_text(to_do: list[str], stays: list[str]) -> str:
    """What a run would make, and what stays as it is."""
    return f"to do: {', '.join(to_do) or 'nothing'}; stays: {', '.join(stays) or 'nothing'}"


def _models_table(planned: dict[str, Any]) -> Table:
    """What every model will be, and what it costs from the seed model on."""
    table = _table(
        ("model", "total parameters", "active parameters", "inference FLOPs a token", "training FLOPs", "hours",
         "machine-hours"), title=f"models of {planned['name']}", caption="training from the seed model on",
    )  # fmt: skip
    for name, row in planned["models"].items():
        table.add_row(name, f"{row['total_params']:,}", f"{row['active_params']:,}",
                      f"{row['inference_flops_per_token']:.2e}", f"{row['flops']:.2e}" if row["flops"] else "",
                      _hours(row["hours"]), _hours(row["machine_hours"]))  # fmt: skip
    return table


def _gpu_table(gpu: Mapping[str, Any]) -> Table:
    """Which trainings fit into a GPU's memory, and what makes the others fit."""
    changed = "with these settings it does"
    table = _table(
        ("stage", "processes", "memory", "micro-batch", "fits", changed, "then", "or with processes"),
        ("fits", changed), title=f"in a GPU of {_size(gpu['memory_bytes'])}, one training at a time, a GPU a process",
        caption="peak of a step to about 10 %; 3 % of the memory and 0.6 GB are left for CUDA",
    )  # fmt: skip
    for row in gpu["stages"]:
        change = row["change"]
        settings = [f"{row['section']}.{name}: {str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in (change or {}).items()]  # fmt: skip
        table.add_row(
            row["stage"], str(row["processes"]), _size(row["memory_bytes"]), f"{row['micro_batch_tokens']:,}",
            "yes" if row["fits"] else "no",
            "\n".join(settings) if change is not None else "none does",
            _size(row["memory_bytes_after"]) if settings else "",
            "" if row["fits"] else str(row["processes_that_fit"] or "none"),
        )  # fmt: skip
    return table


def _measuring_table(gpu: Mapping[str, Any]) -> Table:
    """Which models fit into a GPU's memory where they are measured."""
    table = _table(
        ("model", "weights", "memory", "fits", "GPUs"), ("fits",),
        title=f"measuring in a GPU of {_size(gpu['memory_bytes'])}",
        caption="GPUs: the fewest that hold a model by layers; with fewer, host memory or disk has the rest",
    )  # fmt: skip
    for row in gpu["measuring"]:
        table.add_row(row["model"], _size(row["weights_bytes"]), _size(row["memory_bytes"]),
                      "yes" if row["fits"] else "no", str(row["gpus"] or "none"))  # fmt: skip
    return table


def _speed_text(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return "no hours: this machine cannot time the model in a moment; --flops-per-second says what yours reaches"
    return f"hours at {speed['flops_per_s']:.2e} FLOP/s a device: {speed['source']}; evaluation comes on top"


def _baselines_table(baselines: dict[str, Any]) -> Table:
    """What each baseline costs from the seed model on, and how that compares with the run."""
    columns = ("baseline", "tokens", "FLOPs", "memory", "disk", "matched by", "FLOPs of the run's")
    table = _table(columns, ("matched by",), title="baselines: all training from the seed model on")
    for name, row in baselines.items():
        ratio = row["matched"]["flops_ratio"]
        shown = f"{100 * ratio:.1f} %" + (f" ({100 * (ratio - 1):+.3f} %)" if row["matched"]["by"] == "flops" else "")
        table.add_row(name, f"{row['tokens']:,}", f"{row['flops']:.2e}", _size(row["memory_bytes"]),
                      _size(row["disk_bytes"]), row["matched"]["by"], shown)  # fmt: skip
    return table


def status_table(rows: list[dict[str, Any]]) -> Table:
    """`btx status`: one line a stage."""
    mfu = any(row["mfu"] is not None for row in rows)
    table = _table(("stage", "state", "step", "loss", "tokens/s", *(["MFU"] if mfu else []), "ETA"), ("state",))
    for row in rows:
        step = f"{row['step']}/{row['steps']}" if row["step"] is not None else ""
        where = f" on {row['node']}" if row["state"] == "running" else ""
        where += f", {row['processes']} processes" if row["processes"] > 1 else ""
        table.add_row(
            row["stage"], row["state"] + where + (f": {row['why']}" if row["why"] else ""), step,
            f"{row['loss']:.3f}" if row["loss"] is not None else "",
            f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "",
            *([percent_text(row["mfu"]) if row["mfu"] is not None else ""] if mfu else []),
            clock_text(row["eta_s"]) if row["eta_s"] is not None else "",
        )  # fmt: skip
    return table


def sweep_overview(overview: dict[str, Any]) -> list[Any]:
    """`btx sweep --dry-run`: what every run takes over and makes, and what sharing saves."""
    table = Table(title=f"runs of {overview['name']}, in {overview['folder']}")
    for column in ("variant", "rng seed", "done", "shared", "to make", "FLOPs"):
        table.add_column(column, justify="right" if column in ("rng seed", "FLOPs") else "left")
    for row in overview["runs"]:
        done, shared, left = _by_state(row["stages"])
        left += "".join(f"; {name} goes on from {share:.0%}" for name, share in row["goes_on"].items())
        table.add_row(row["variant"], str(row["rng_seed"]), done, shared, left, f"{row['flops']:.2e}")
    saved = f"{overview['flops']:.2e} training FLOPs to make; {overview['flops_without_sharing']:.2e} without sharing"
    return [table, saved]


def sweep_status_table(rows: list[dict[str, Any]]) -> Table:
    """`btx status` of a sweep's folder: one line a run."""
    table = Table()
    for column in ("variant", "rng seed", "done", "under way", "failed", "to make"):
        table.add_column(column, justify="right" if column == "rng seed" else "left")
    for row in rows:
        done, _, left = _by_state(row["stages"] or {"everything": "absent"})
        begun = ", ".join(name for name, state in row["stages"].items() if state in UNDER_WAY)
        failed = ", ".join(name for name, state in row["stages"].items() if state == "failed")
        table.add_row(row["variant"], str(row["rng_seed"]), done, begun, failed, left)
    return table


def _by_state(stages: Mapping[str, str]) -> list[str]:
    """Names of the stages that are done, shared, and neither."""
    done = [name for name, state in stages.items() if state == "done"]
    shared = [name for name, state in stages.items() if state == "shared"]
    left = [name for name in stages if name not in done and name not in shared]
    return ["all" if len(names) == len(stages) else ", ".join(names) for names in (done, shared, left)]


def pairs_table(title: str, pairs: Mapping[str, str]) -> Table:
    """Names with a line each."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, line in pairs.items():
        table.add_row(name, line)
    return table


def families_table() -> Table:
    """`btx ls families`: a line for each class that a dense one mixes into, at most 100 columns wide."""
    width = min(FAMILIES_WIDTH, shutil.get_terminal_size((FAMILIES_WIDTH, 24)).columns)
    table = Table(title="families", title_justify="left", width=width, show_lines=True)
    for column in ("model_type", "mixes into", "exact for", "notes"):
        table.add_column(column, no_wrap=column in ("model_type", "mixes into"))
    for family in FAMILIES:
        notes = [family.notes] * bool(family.notes)
        notes += ["btx mixes it, but cannot finetune it"] * (not family.finetunes)
        table.add_row(family.dense, family.moe, family.exact, "; ".join(notes))
    return table


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """`btx compare`: a line a model, a column a set; differences whose 95 % interval leaves out 0 are bold."""
    from btx.python.results import sets_of

    rows = {name: sets_of(row, "{} (task)") for name, row in comparison["models"].items()}
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    table = _table(
        ("against", *columns), title=f"{comparison['model']} minus the other: difference [95 % interval] p",
        caption="bits per byte: negative is better; tasks: share of right answers, positive is better", highlight=False,
    )  # fmt: skip
    for name, cells in rows.items():
        table.add_row(name, *(_difference_text(cells[column]) if column in cells else "" for column in columns))
    return table


def _difference_text(value: Mapping[str, Any]) -> Text:
    text = f"{value['difference']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
    text += f" p {value['p']:.3f}" if value["p"] >= 0.001 else " p < 0.001"
    return Text(text, style="bold" if value["low"] > 0 or value["high"] < 0 else "")


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def _time(hours: float | None) -> str:
    return duration_text(3600 * hours) if hours else ""


def _hours(hours: float | None) -> str:
    return f"{hours:.3g}" if hours else ""


def _size(count: int) -> str:
    if not count:
        return ""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
