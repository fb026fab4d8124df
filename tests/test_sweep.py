"""Sweeps: combinations, what runs share, that a stopped sweep continues, and the table with its errors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import sub
from pathlib import Path
from typing import Any

import pytest

from btx.errors import StageFailed, UserError
from btx.files import link_or_copy, read_json
from btx.process import Interrupted
from btx.recipe.loading import load_recipe
from btx.reporting.charts import BarPanels
from btx.run_folder.finished_models import model_stages
from btx.run_folder.folder import RunFolder
from btx.running.launchers.local import start_run
from btx.sweeps.figure import sweep_figure
from btx.sweeps.sharing import take_over
from btx.sweeps.starting import check_plans
from btx.sweeps.sweep import not_of_this_sweep, set_earlier_aside, sweep, sweep_state
from btx.sweeps.table import notes, paired, sweep_cells, sweep_rows
from btx.sweeps.variants import SweepPlan, SweepRun, combinations, plan_sweep, split_values, value_label
from tests.pico_run import pico_recipe, run_here, write_pico_recipe

pytestmark = pytest.mark.usefixtures("figures_drawn_once")
FAST = ["seed_model.train.tokens=512", "train.tokens=512", "evaluate.tasks={}",
        "evaluate.tokens=200", "analyze={tokens: 100, examples: 0}"]  # fmt: skip
VARIED = "finetune.learning_rate=1e-3,2e-3"
DATA = ["data/tokenizer", "data/birds", "data/tools", "data/general"]
MEANS = [f"{name}_bits_per_byte" for name in ("mean", "learning", "keeping")]
SHARED = [*DATA, "seed", "train/birds", "train/tools", "mix", "baselines/soup"]


def plan_here(folder: Path, *arguments: str, rng_seeds: int = 2, **options: Any) -> SweepPlan:
    if not (folder / "pico.yaml").exists():
        write_pico_recipe(folder)
    fixed = [f"data.root={folder}", f"run={folder / 'sweep'}", *FAST]
    return plan_sweep(str(folder / "pico.yaml"), [*fixed, *arguments], rng_seeds=rng_seeds, **options)


@dataclass
class Here:
    """Starts runs in this process instead of one of their own; notes what they said."""

    said: dict[str, list[str]] = field(default_factory=dict)
    before: Callable[[SweepRun], None] = lambda run: None

    def __call__(self, run: SweepRun, output: Path) -> Done:
        self.before(run)
        output.touch()
        *stages, report = run.stages
        folder, self.said[str(run.folder)] = run_here(run.recipe, [stage.name for stage in stages])
        with folder.making(report, print):  # its pages are drawn in tests of their own
            pass
        return Done(output)


@dataclass
class Done:
    """A run that has ended."""

    log: Path

    def exit_code(self) -> int | None:
        return 0

    def terminate(self) -> None: ...

    def wait(self) -> None: ...


def run_sweep(plan: SweepPlan, start: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return sweep(plan, start, log=lines.append, **options), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepPlan, Here, dict[str, Any]]:
    """A sweep of 2 variants and 2 rng seeds that was killed when the second run was to start, and continued."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = plan_here(folder, VARIED)
    started: list[str] = []

    def killed(run: SweepRun) -> None:
        started.append(run.name)
        if len(started) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, Here(before=killed))
    here = Here()
    written, _ = run_sweep(plan, here)
    return plan, here, written


def test_a_killed_sweep_continues_with_what_is_left(finished: tuple[SweepPlan, Here, dict[str, Any]]) -> None:
    plan, here, written = finished
    assert list(here.said) == [str(run.folder) for run in plan.runs[1:]]
    assert [run["state"] for variant in written["variants"].values() for run in variant["runs"]] == ["done"] * 4
    again = Here()
    _, lines = run_sweep(plan, again)
    assert again.said == {}
    assert lines == ["4 of 4 runs are done already"]


def test_variants_that_differ_in_finetuning_train_one_seed_model_and_one_set_of_experts(
    finished: tuple[SweepPlan, Here, dict[str, Any]],
) -> None:
    plan, here, _ = finished
    first, second = plan.runs[0].folder, plan.runs[1].folder
    assert (first.name, second.name) == ("rng-3", "rng-3")
    for stage in SHARED:
        assert read_json(second / stage / "done.json")["taken_over_from"] == str(first)
        assert f"{stage}: already done, skipped" in here.said[str(second)]
        assert "taken_over_from" not in read_json(first / stage / "done.json")
    for file in ("seed/model/model.safetensors", "data/birds/0/train/tokens.bin", "mix/model/model.safetensors"):
        assert (first / file).samefile(second / file)  # a link: no byte is written twice
    for file in ("seed/metrics.jsonl", "seed/model/config.json", "data/birds/0/train/index.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert not (first / file).samefile(second / file)  # files that grow or that people edit are copies
    assert not (first / "finetune/model/model.safetensors").samefile(second / "finetune/model/model.safetensors")
    kept = [line for line in here.said[str(second)] if line.endswith(": measured before, kept")]
    assert [line.split(":")[0] for line in kept] == ["seed", "expert/birds", "expert/tools", "soup", "mix"]


def test_rng_seeds_share_the_data_alone_and_every_run_is_an_ordinary_one(
    finished: tuple[SweepPlan, Here, dict[str, Any]],
) -> None:
    plan, here, _ = finished
    third = plan.runs[2]
    assert (third.rng_seed, third.folder.name) == (4, "rng-4")
    done = [line.split(":")[0] for line in here.said[str(third.folder)] if "already done" in line]
    assert done == DATA  # files are the same whatever the rng seed
    opened = RunFolder.open(third.folder)
    assert opened.recipe.sweep is None
    assert {opened.state(stage) for stage in opened.graph} == {"done"}


def test_the_table_has_the_mean_and_error_of_the_runs_results(
    finished: tuple[SweepPlan, Here, dict[str, Any]],
) -> None:
    plan, _, written = finished
    assert read_json(plan.folder / "sweep.json") == json.loads(json.dumps(written))
    rows = sweep_rows(written)
    assert [(row.variant, row.model) for row in rows] == [
        *(("all variants", name) for name in ("seed", "expert/birds", "expert/tools", "soup", "mix")),
        ("finetune.learning_rate=0.001", "btx"), ("finetune.learning_rate=0.002", "btx"),
    ]  # fmt: skip
    results = [read_json(run.folder / "evaluate" / "results.json")["models"] for run in plan.runs]
    a, b = (results[number]["btx"]["domains"]["birds"]["bits_per_byte"] for number in (0, 2))
    found = rows[5].domains["birds"]
    assert found["mean"] == pytest.approx((a + b) / 2)
    assert found["stderr"] == pytest.approx(abs(a - b) / 2)
    changes = [results[k + 1]["btx"]["mean_bits_per_byte"] - results[k]["btx"]["mean_bits_per_byte"] for k in (0, 2)]
    assert rows[6].to_first is not None
    assert rows[6].to_first["mean"] == pytest.approx(sum(changes) / 2)
    text = (plan.folder / "sweep.md").read_text("utf-8")
    assert f"{found['mean']:.3f} ± {found['stderr']:.3f}" in text
    assert (plan.folder / "sweep.svg").read_text("utf-8").count("<svg") == 3  # the file and its two charts


def test_a_sweep_takes_over_stages_of_runs_it_is_pointed_at(
    finished: tuple[SweepPlan, Here, dict[str, Any]], tmp_path: Path
) -> None:
    plan, _, _ = finished
    root = plan.folder.parent
    overrides = [f"data.root={root}", f"run={tmp_path / 'other'}", *FAST, "finetune.learning_rate=2e-3,3e-3"]
    other = plan_sweep(str(root / "pico.yaml"), overrides, rng_seeds=1)
    states = [row["stages"] for row in sweep_state(other, [run.folder for run in plan.runs])]
    assert set(states[0].values()) == {"shared"}
    assert [name for name, state in states[1].items() if state == "shared"] == SHARED
    assert not other.folder.exists()

    def never(run: SweepRun, output: Path) -> Done:
        raise AssertionError(f"{run.name}: there is nothing to do")

    one = plan_sweep(str(root / "pico.yaml"), [*overrides[:-1], "finetune.learning_rate=2e-3"], rng_seeds=1)
    written, _ = run_sweep(one, never, share=[plan.folder])
    assert [run["state"] for run in written["variants"]["pico"]["runs"]] == ["done"]
    with pytest.raises(UserError, match="nothing to share"):
        run_sweep(one, never, share=[tmp_path / "nowhere"])


def test_a_run_is_started_as_a_process_of_its_own(finished: tuple[SweepPlan, Here, dict[str, Any]]) -> None:
    folder = finished[0].runs[0].folder
    job = start_run(folder, folder / "logs" / "test.log", {"OMP_NUM_THREADS": "1"})
    job.wait()
    assert job.exit_code() == 0, job.log.read_text()
    assert "finetune: already done, skipped" in job.log.read_text()


def test_a_failing_variant_stops_no_other_and_the_end_names_it(
    finished: tuple[SweepPlan, Here, dict[str, Any]], tmp_path: Path
) -> None:
    root = finished[0].folder.parent
    plan = plan_sweep(str(root / "pico.yaml"), [
        f"data.root={root}", f"run={tmp_path / 'other'}", *FAST, "finetune.learning_rate=1e-3",
        "finetune.tokens=100_000_000,1792",
    ], rng_seeds=1)  # fmt: skip
    # Its token files come from a run with a smaller budget, for which they were enough.
    with pytest.raises(StageFailed, match=r"1 of 2 runs failed.*\n.*finetune.tokens=100000000.*epochs") as failed:
        run_sweep(plan, Here(), share=[root / "sweep"])
    assert failed.value.exit_code == 1
    written = read_json(plan.folder / "sweep.json")["variants"]
    assert [variant["runs"][0]["state"] for variant in written.values()] == ["failed", "done"]
    assert "epochs" in written["finetune.tokens=100000000"]["runs"][0]["failure"]
    assert "1 of 2 runs: finetune.tokens=100000000, rng seed 3 (failed)" in (plan.folder / "sweep.md").read_text()


def test_a_run_that_cannot_read_another_ones_files_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable_for_the_first(run: RunFolder, *_: Any) -> list[str]:
        if "512" in str(run.path):
            raise PermissionError(13, "Permission denied", "/elsewhere/optimizer.safetensors")
        return []

    monkeypatch.setattr("btx.sweeps.sweep.take_over", unreadable_for_the_first)
    with pytest.raises(StageFailed, match=r"1 of 2 runs failed.*\n.*512.*/elsewhere/optimizer.safetensors: cannot be"):
        pretend(plan_here(tmp_path, "finetune.tokens=256,512", rng_seeds=1), monkeypatch)
    written = read_json(tmp_path / "sweep/sweep.json")["variants"]
    assert [variant["runs"][0]["state"] for variant in written.values()] == ["done", "failed"]


@dataclass
class Pretending:
    """A run that makes one stage each time it is asked how it is; only its files count."""

    run: SweepRun
    log: Path
    exit: int | None = None
    asked: int = 0

    def exit_code(self) -> int | None:
        folder = RunFolder(self.run.folder, self.run.recipe)
        left = [stage for stage in self.run.stages if folder.state(stage) != "done"]
        if left:
            with folder.making(left[0], print) as facts:
                facts["wall_s"] = 0.0
                if left[0].name == "evaluate":
                    (facts.folder / "results.json").write_text('{"models": {}}')
        self.exit = 0 if len(left) <= 1 else None
        return self.exit

    def terminate(self) -> None:
        self.exit = -15

    def wait(self) -> None: ...


def pretend(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[str, ...]]:
    """Run the plan with runs that pretend; returns which were under way whenever one was started."""
    monkeypatch.setattr("btx.sweeps.sweep.POLL_S", 0.0)
    monkeypatch.setattr("btx.planning.budgets.check_budgets", lambda recipe, folders: None)
    log = options.pop("log", lambda line: None)
    jobs: list[Pretending] = []
    under_way: list[tuple[str, ...]] = []

    def start(run: SweepRun, output: Path) -> Pretending:
        output.touch()
        jobs.append(Pretending(run, output))
        under_way.append(tuple(job.run.name for job in jobs if job.exit is None))
        return jobs[-1]

    sweep(plan, start, log=log, **options)
    return under_way


def test_of_runs_side_by_side_none_makes_a_stage_that_another_is_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_here(tmp_path, "finetune.tokens=256,512", jobs=2)
    assert plan.runs[0].recipe.launch.threads is not None  # the processors are shared among the runs
    first, second, third, fourth = (run.name for run in plan.runs)
    under_way = pretend(plan, monkeypatch, jobs=2)
    assert under_way[:2] == [(first,), (first, third)]  # another rng seed shares nothing with the first
    assert all(len(names) <= 2 for names in under_way)
    assert {names[-1] for names in under_way} == {first, second, third, fourth}
    for run in (plan.runs[1], plan.runs[3]):
        assert "taken_over_from" in read_json(run.folder / "train" / "birds" / "done.json")


def test_a_signal_ends_the_runs_under_way(tmp_path: Path) -> None:
    plan = plan_here(tmp_path, "finetune.tokens=256,512", rng_seeds=1)
    job = None

    def start(run: SweepRun, output: Path) -> Pretending:
        nonlocal job
        output.touch()
        signal.raise_signal(signal.SIGTERM)
        job = Pretending(run, output)
        return job

    with pytest.raises(Interrupted) as stopped:
        sweep(plan, start, log=lambda line: None)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert job is not None
    assert job.exit == -15


def test_what_another_sweep_in_the_same_folder_has_written_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: str, rng_seeds: int = 1) -> tuple[list[str], list[dict[str, Any]]]:
        """What another sweep will say, has said, and what lies aside then."""
        plan = plan_here(tmp_path, *arguments, rng_seeds=rng_seeds)
        will, lines = not_of_this_sweep(plan), list[str]()
        pretend(plan, monkeypatch, log=lines.append)
        said = [line for line in lines if "finished runs that this sweep has not" in line]
        assert [line.startswith(will) for line in said] == [True] * bool(will)
        assert list(read_json(sweep_json)["variants"]) == [variant.label for variant in plan.variants]
        return said, [read_json(file) for file in sorted((tmp_path / "sweep/stale").glob("*/sweep.json"))]

    sweep_json = tmp_path / "sweep/sweep.json"
    assert again("finetune.tokens=256,512") == ([], [])
    first = read_json(sweep_json)
    assert again("finetune.tokens=256,512,768") == ([], [])  # one more: all that was said is said again
    more = read_json(sweep_json)
    assert more["variants"].items() > first["variants"].items()
    (said,), aside = again("finetune.tokens=512,1024")
    assert aside == [more]
    assert "finetune.tokens=256, rng seed 3; finetune.tokens=768, rng seed 3" in said
    assert all((tmp_path / f"sweep/finetune.tokens={tokens}/rng-3").is_dir() for tokens in (256, 768))
    _, aside = again("finetune.tokens=512,1024", "finetune.learning_rate=5e-4")  # the same names, and other runs
    assert len(aside) == 2
    assert again("finetune.tokens=512,1024", "finetune.learning_rate=5e-4", rng_seeds=2)[0] == []
    sweep_json.write_text("{")
    plan = plan_here(tmp_path, "finetune.tokens=512,1024", "finetune.learning_rate=5e-4")
    assert "not readable as JSON" in not_of_this_sweep(plan)
    set_earlier_aside(plan, print)
    assert not sweep_json.exists()


# Sharing


def test_without_hard_links_files_are_copied_and_a_stale_stage_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, _ = run_here(pico_recipe(tmp_path, "donor"), ["data", "seed"])
    run, _ = run_here(pico_recipe(tmp_path, "mine", "seed_model.train.learning_rate=1e-3"), ["data", "seed"])
    mine = RunFolder.create(pico_recipe(tmp_path, "mine"))
    assert mine.state(mine.graph["seed"]) == "stale"

    def no_links(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    lines: list[str] = []
    assert take_over(mine, [donor.path, mine.path], lines.append) == ["seed"]
    assert mine.state(mine.graph["seed"]) == "done"
    weights = "seed/model/model.safetensors"
    assert (mine.path / weights).read_bytes() == (donor.path / weights).read_bytes()
    assert not (mine.path / weights).samefile(donor.path / weights)
    assert "seed_model.train.learning_rate: 0.001 → 0.003" in lines[0]
    assert list((run.path / "stale").glob("*/seed/done.json"))


def test_nothing_unfinished_or_made_from_other_inputs_is_taken_over(tmp_path: Path) -> None:
    donor, _ = run_here(pico_recipe(tmp_path, "donor"), ["data"])
    with pytest.raises(KeyboardInterrupt), donor.making(donor.graph["seed"], print):
        raise KeyboardInterrupt
    same = RunFolder.create(pico_recipe(tmp_path, "same"))
    assert take_over(same, [donor.path], lambda line: None) == DATA
    other = RunFolder.create(pico_recipe(tmp_path, "other", "seed_model.tokenizer.vocab_size=310"))
    assert take_over(other, [donor.path], lambda line: None) == []
    assert not (other.path / "data").exists()


def test_a_finished_stage_that_its_owner_moves_aside_meanwhile_is_taken_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donors = [run_here(pico_recipe(tmp_path, name), ["data"])[0] for name in ("first", "second")]
    copied = link_or_copy

    def moved(source: Path, target: Path) -> None:
        if source == donors[0].path / "data/birds":
            donors[0].set_aside("data/birds")
        copied(source, target)

    monkeypatch.setattr("btx.sweeps.sharing.link_or_copy", moved)
    mine, lines = RunFolder.create(pico_recipe(tmp_path, "mine")), list[str]()
    assert take_over(mine, [donor.path for donor in donors], lines.append) == DATA
    assert f"data/birds: not taken over from {donors[0].path}: it was removed meanwhile" in lines
    assert read_json(mine.path / "data/birds/done.json")["taken_over_from"] == str(donors[1].path)
    assert mine.state(mine.graph["data/birds"]) == "done"


# Combinations


@pytest.mark.parametrize(("text", "values"), [
    ("1,2", ["1", "2"]), ("1e-3", ["1e-3"]), ("[math,code],[math]", ["[math,code]", "[math]"]),
    ("{a: 1, b: [2,3]}, null", ["{a: 1, b: [2,3]}", "null"]), ("'a,b',c", ["'a,b'", "c"]), ("it's,so", ["it's", "so"]),
])  # fmt: skip
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: Sequence[str]) -> None:
    assert split_values(text) == list(values)


@pytest.mark.parametrize("text", ["1,,2", "1,", "[1,2", "'a,b"])
def test_values_that_cannot_be_split_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"empty value|not closed"):
        split_values(text)


def test_equal_values_have_one_label_and_others_have_others() -> None:
    assert value_label(1e6) == value_label(1_000_000) == "1000000"
    assert (value_label(1e-3), value_label(True), value_label("soft")) == ("0.001", "true", "soft")
    odd = [["math", "code"], "math-code", "[math, code]", "1", 1, "../up", {"a": 1}, "x" * 50, "x" * 51, None, "null"]
    labels = [value_label(value) for value in odd]
    assert len(set(labels)) == len(odd)
    assert all(label and "/" not in label and len(label) < 60 for label in labels)


def test_named_variants_and_varied_values_multiply_and_a_single_value_is_in_no_label() -> None:
    found = combinations({"plain": {}, "sparse": {"mix.top_k": 1}}, {"a.b": [1, 2], "c": ["x"]}, plain="mine")
    assert {variant.label: variant.settings for variant in found} == {
        "plain,a.b=1": {"c": "x", "a.b": 1}, "plain,a.b=2": {"c": "x", "a.b": 2},
        "sparse,a.b=1": {"c": "x", "mix.top_k": 1, "a.b": 1}, "sparse,a.b=2": {"c": "x", "mix.top_k": 1, "a.b": 2},
    }  # fmt: skip
    assert [variant.label for variant in combinations({}, {"c": ["x"]}, plain="mine")] == ["mine"]


def test_a_recipe_brings_its_own_sweep_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    path = write_pico_recipe(tmp_path)
    path.write_text(path.read_text() + "sweep:\n  vary: {mix.top_k: [1, 2], train.replay: [0, 0.2]}\n  rng_seeds: 2\n")
    plan = plan_sweep(str(path), [f"data.root={tmp_path}", "mix.top_k=2", "train.replay=0.1,0.3"])
    assert [variant.label for variant in plan.variants] == ["train.replay=0.1", "train.replay=0.3"]
    assert [(run.rng_seed, run.recipe.train.replay) for run in plan.runs] == [(3, 0.1), (3, 0.3), (4, 0.1), (4, 0.3)]
    assert {run.recipe.mix.top_k for run in plan.runs} == {2}
    assert str(plan.runs[0].folder) == "runs/pico-sweep/train.replay=0.1/rng-3"


def test_a_table_may_show_the_aligned_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx.planning.plan.plan", lambda recipe: {})
    aligned = ["align.sft.data=chat.jsonl"]
    assert len(check_plans(plan_sweep("demo", aligned, models=["btx", "sft"]))) == 1
    with pytest.raises(UserError, match=r"no variant has a model 'dpo'; there are: seed, .*, btx, sft"):
        check_plans(plan_sweep("demo", aligned, models=["dpo"]))


@pytest.mark.parametrize(("name", "variants"), [
    ("paper-table2", 1), ("paper-table3", 1), ("paper-table4", 3), ("paper-table5", 6),
])  # fmt: skip
@pytest.mark.parametrize("data", ["demo", "corpora"])
def test_the_papers_tables_are_sweeps_of_the_demo_and_of_ones_own_data(name: str, variants: int, data: str) -> None:
    plan = plan_sweep(name, [] if data == "demo" else [f"extends={data}", "data.root=mine"])
    assert (len(plan.variants), plan.rng_seeds, len(plan.runs)) == (variants, [0, 1, 2], 3 * variants)
    assert plan.folder == Path("runs") / f"{name}-sweep"
    for run in plan.runs:
        assert list(run.recipe.data.domains) == list(load_recipe(data).data.domains)
        assert set(plan.models or ()) <= model_stages(run.recipe).keys()
    if name == "paper-table4" and data == "demo":  # what the budgets do not change is made once
        shared = set.intersection(*({stage.inputs for stage in run.stages} for run in plan.runs[:variants]))
        assert [stage.name for stage in plan.runs[0].stages if stage.inputs in shared][-1] == "mix"


@pytest.mark.parametrize(("section", "arguments", "labels"), [
    ("", ["mix.merge=ties,dare", "mix.merge_density=0.3"], ["mix.merge=ties", "mix.merge=dare"]),
    ("sweep: {vary: {mix.merge: [ties]}}", ["mix.merge_density=0.3"], ["pico"]),
    ("sweep: {variants: {a: {finetune.schedule: wsd}}}", ["finetune.decay_share=0.3"], ["a"]),
])  # fmt: skip
def test_a_sweep_all_of_whose_variants_are_right_needs_no_right_recipe_without_them(
    tmp_path: Path, section: str, arguments: list[str], labels: list[str]
) -> None:
    path = write_pico_recipe(tmp_path)
    path.write_text(f"{path.read_text()}{section}\n")
    plan = plan_sweep(str(path), arguments, rng_seeds=1, jobs=2)
    assert [variant.label for variant in plan.variants] == labels
    assert (plan.name, plan.folder, plan.rng_seeds) == ("pico", Path("runs/pico-sweep"), [3])
    assert plan.runs[0].folder.parent == plan.folder / plan.variants[0].label


@pytest.mark.parametrize(("arguments", "told"), [
    (["mix.merge=ties,dare", "mix.merge_density=3"], ["override 'mix.merge_density=3': "]),
    (["mix.topk=5", "mix.top_l=1,2"], ["override 'mix.topk=5': "]),
    (["sweep.rng_sed=3", "mix.top_k=1,2"], ["override 'sweep.rng_sed=3': "]),
    (["mix.merge=mean,linear", "mix.merge_density=0.3"], ["variant mix.merge=mean: ", "variant mix.merge=linear: "]),
    (["mix.merge=mean,ties", "mix.merge_density=0.3"], ["variant mix.merge=mean: "]),
    (["mix.merge=ties,dare", "mix.merge_density=0.3", "baseline_training.soup.tokens=9"],
     ["override 'baseline_training.soup.tokens=9': baseline_training.soup: soup is made without training"]),
])  # fmt: skip
def test_what_is_wrong_with_all_variants_is_told_once(tmp_path: Path, arguments: list[str], told: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        plan_here(tmp_path, *arguments)
    lines = str(refused.value).splitlines()
    assert [line[: len(beginning)] for line, beginning in zip(lines, told, strict=True)] == told


@pytest.mark.parametrize(("arguments", "expected"), [
    (["mix.top_k=1,9"], r"^variant mix.top_k=9: override 'mix.top_k=9': mix.top_k is 9, but there are only 3 experts$"),
    (["mix.topk=1,2"], "unknown key 'topk'; did you mean 'top_k'"),
    (["rng_seed=1,2"], "--rng-seeds"), (["name=a,b"], "name cannot vary"),
    (["mix.top_k=1,1"], "the same variant twice"),
    (["mix.top_k=1,2", "mix.top_k=1,3"], "given twice"), (["mix.top_k=1,2", "mix.top_k=2"], "given twice"),
    (["mix.top_k"], "expected key=value"),
    (["mix.router=soft,*x"], "quotes"),
])  # fmt: skip
def test_what_cannot_be_swept_is_refused_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        plan_here(tmp_path, *arguments)
    assert not (tmp_path / "sweep").exists()


def test_a_model_that_is_only_in_some_variants_has_rows_there_and_no_error_with_one_rng_seed() -> None:
    def stat(*values: float) -> dict[str, Any]:
        return {"mean": sum(values) / len(values), "stderr": None, "n": len(values), "values": list(values)}

    btx = {"domains": {"a": {"bits_per_byte": stat(1.0)}}, "mean_bits_per_byte": stat(1.0), "flops": stat(1e9),
           "tasks": {"quiz": {"questions": stat(7), "acc": stat(0.5)}}}  # fmt: skip
    dense = {"mean_bits_per_byte": stat(1.5), "mixed": {"bits_per_byte": stat(2.0)}}
    models = [{"btx": btx}, {"btx": {**btx, "mean_bits_per_byte": stat(0.75)}, "dense_cm": dense}]
    variants = {
        label: {"settings": {}, "runs": [], "aggregated": {"runs": 1, "rng_seeds": [0], "models": found}}
        for label, found in zip("xy", models, strict=True)
    }
    titles, rows = sweep_cells({"name": "s", "rng_seeds": [0], "models": None, "variants": variants})
    assert titles == ["variant", "model", "a", "mixed", "mean", "− first variant", "quiz %", "FLOPs"]
    assert [[text for text, _ in row] for row in rows] == [
        ["x", "btx", "1.000", "–", "1.000", "–", "50.0", "1.00e9"],
        ["y", "btx", "1.000", "–", "0.750", "−0.250", "50.0", "1.00e9"],
        ["y", "dense_cm", "–", "2.000", "1.500", "–", "–", "–"],
    ]
    assert [best for _, best in rows[1]] == [False, False, False, False, True, False, False, False]


def test_learning_is_not_compared_where_branches_vary() -> None:
    def written(*branches: list[str]) -> dict[str, Any]:
        variants = {}
        for number, domains in enumerate(branches):
            stat = {"mean": 1.0 + number, "stderr": None, "n": 1, "values": [1.0 + number]}
            means = {f"{name}_bits_per_byte": stat for name in ("mean", "learning", "keeping")}
            variants[f"v{number}"] = {"settings": {"train.domains": domains}, "runs": [], "aggregated": {
                "runs": 1, "rng_seeds": [0], "models": {"btx": means}
            }}  # fmt: skip
        return {"name": "s", "rng_seeds": [0, 1], "models": None, "variants": variants}

    for table, compared in ((written(["a"], ["a"]), True), (written(["a"], ["a", "b"]), False)):
        titles, rows = sweep_cells(table)
        best = {title for title, (_, is_best) in zip(titles, rows[0], strict=True) if is_best}
        assert best == ({"mean", "learning", "keeping"} if compared else {"mean"})
        assert any("train.domains varies" in line for line in notes(table)) != compared


@dataclass
class Variants:
    """Two variants of two models, as sweep.json has them: bits per byte of domains a and b, mean, learning, keeping."""

    drawn: list[BarPanels] = field(default_factory=list)

    def bars(self, seeds: Sequence[Sequence[float]], branches: Sequence[list[str]]) -> dict[str, list[float | None]]:
        """Variant → bars of btx, whose bits are 1 less than (2, 4, 3, 4, 2)."""
        variants = {}
        for label, seed, domains in zip("xy", seeds, branches, strict=True):
            models = {}
            for name, values in (("seed", seed), ("btx", (1.0, 3.0, 2.0, 3.0, 1.0))):
                a, b, *means = ({"mean": value, "stderr": None, "n": 1, "values": [value]} for value in values)
                models[name] = {"domains": {"a": {"bits_per_byte": a}, "b": {"bits_per_byte": b}}, "flops": a,
                                "active_params": {**a, "mean": ord(label)}}  # fmt: skip
                models[name] |= dict(zip(MEANS, means, strict=True))
            variants[label] = {"settings": {"train.domains": domains}, "runs": [],
                               "aggregated": {"runs": 1, "rng_seeds": [0], "models": models}}  # fmt: skip
        sweep_figure({"name": "s", "rng_seeds": [0], "models": None, "variants": variants})
        return {bar.label: bar.values for bar in self.drawn[-1].bars}


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    made = Variants()
    monkeypatch.setattr(BarPanels, "svg", lambda bars: made.drawn.append(bars) or '<svg viewBox="0 0 1 1"></svg>')
    return made


SEED = (2.0, 4.0, 3.0, 4.0, 2.0)


def test_the_figure_has_learning_and_keeping_where_they_are_of_the_same_domains(variants: Variants) -> None:
    for branches, titles in (("bb", ["a", "b", "mean", "learning", "keeping"]), ("ba", ["a", "b", "mean"])):
        bars = variants.bars([SEED, SEED], [[branch] for branch in branches])
        assert list(variants.drawn[-1].columns) == titles
        assert bars == dict.fromkeys(["btx, x", "btx, y"], pytest.approx([50, 25, 100 / 3, 25, 50][: len(titles)]))


def test_the_figure_compares_each_variant_with_its_own_seed_model(variants: Variants) -> None:
    bars = variants.bars([SEED, [2 * bits for bits in SEED]], [["b"], ["b"]])
    assert bars == {"btx, x": pytest.approx([50, 25, 100 / 3, 25, 50]),
                    "btx, y": pytest.approx([75, 62.5, 200 / 3, 62.5, 75])}  # fmt: skip


def test_differences_pair_rng_seeds_and_not_places() -> None:
    assert paired({"n": 2, "values": [1.0, 2.0]}, [0, 1], {"n": 2, "values": [2.0, 3.0]}, [1, 2], sub) == {
        "mean": 0.0, "stderr": None, "n": 1, "values": [0.0]
    }  # fmt: skip
    one = {"n": 1, "values": [1.0]}
    assert paired(one, [0], one, [1], sub) is None  # no rng seed in common
    assert paired(one, [0, 1], one, [0], sub) is None  # a model that one of the runs does not have
    assert paired(None, [0], one, [0], sub) is None
