"""SFT and DPO of a run's model: what trains, how exactly it goes on, what is written, planned and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from btx.data.chat_text import Encoded
from btx.data.mixture import NO_LABEL, Batch
from btx.data.packed_conversations import PackedConversations, PackedPairs, PairBatch
from btx.errors import DataError, RecipeError, UserError
from btx.evaluation.routing_shift import shift
from btx.files import read_json
from btx.model_files.beside_weights import add_ends
from btx.models.loading import load_model, load_tokenizer
from btx.moe.layer import weight_parts
from btx.planning.aligned import aligned_notes
from btx.planning.plan import plan
from btx.process import Interrupts
from btx.recipe.align import Dpo, Sft
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune
from btx.run_folder.folder import RunFolder
from btx.running import preflight as preflight_module
from btx.running.preflight import check_packages, preflight
from btx.stages.align import align
from btx.stages.conversations import ends_of_turns
from btx.training.preferences import dpo_losses, preference_objective, with_reference
from tests.pico_run import WORDS, pico_recipe, run_here, stopped_after, write_pico_recipe
from tests.test_conversations import made

SHORT = ("data.sequence_length=64", "seed_model.train.tokens=512", "train.tokens=512", "finetune.tokens=512",
         "baselines=[]")  # fmt: skip
SFT = ("align.sft.data=chat.jsonl", "align.sft.learning_rate=5e-3", "align.sft.batch_tokens=256")
DPO = ("align.dpo.data=pairs.jsonl", "align.dpo.learning_rate=2e-3", "align.dpo.batch_tokens=256", "align.dpo.epochs=3")
LORA = ("align.sft.trainable=lora", "align.sft.lora.rank=4", "align.dpo.trainable=lora")


def write_talks(folder: Path) -> None:
    """Files for SFT and DPO, in the pico recipe's words."""
    birds = WORDS["birds"]

    def asked(number: int) -> dict[str, str]:
        return {"role": "user", "content": f"{birds[number % 8]} {number % 3}?"}

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    talks = [{"messages": [asked(i), *answer(f"{birds[i % 8]} nests")]} for i in range(24)]
    pairs = [{"prompt": [asked(i)], "chosen": answer("heron"), "rejected": answer("saw")} for i in range(12)]
    for name, lines in (("chat", talks), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is ready to be aligned."""
    folder = tmp_path_factory.mktemp("align")
    write_pico_recipe(folder)
    write_talks(folder)
    run_here(pico_recipe(folder, "run", *SHORT), ["data", "seed", "train", "mix", "finetune"])
    return folder


def recipe_of(folder: Path, name: str, *overrides: str) -> Recipe:
    return pico_recipe(folder, name, *SHORT, *SFT, *DPO, *overrides)


def copy(finetuned: Path, name: str) -> None:
    shutil.copytree(finetuned / "run", finetuned / name, symlinks=True)


@pytest.fixture(scope="module")
def aligned(finetuned: Path) -> RunFolder:
    """The same, aligned with all weights."""
    copy(finetuned, "aligned")
    return run_here(recipe_of(finetuned, "aligned"), ["align"])[0]


def test_where_its_conversations_are_missing_an_alignment_is_known_by_their_files_name(
    finetuned: Path, aligned: RunFolder
) -> None:
    chat = finetuned / "chat.jsonl"
    chat.rename(finetuned / "away.jsonl")
    try:
        overrides = ("align.sft.data=chat.jsonl", "align.sft.epochs=9", "align.sft.data=chta.jsonl")
        runs = [RunFolder(aligned.path, recipe_of(finetuned, "aligned", override)) for override in overrides]
        assert [run.state(run.graph["align/sft"]) for run in runs] == ["done", "stale", "stale"]
        assert "chta.jsonl: No such file" in runs[2].why_stale(runs[2].graph["align/sft"])
    finally:
        (finetuned / "away.jsonl").rename(chat)


def metrics(run: RunFolder, stage: str) -> list[dict[str, Any]]:
    timing = ("tokens_per_s", "wall_s")
    lines = (json.loads(line) for line in (run.folder(stage) / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def weights(run: RunFolder, stage: str) -> bytes:
    return (run.model(stage) / "model.safetensors").read_bytes()


def test_answers_and_preferences_are_learnt_with_loads_balanced(aligned: RunFolder) -> None:
    sft, dpo = metrics(aligned, "align/sft"), metrics(aligned, "align/dpo")
    assert sft[-1]["loss"] < sft[0]["loss"] - 0.1
    assert dpo[0]["loss"] == pytest.approx(np.log(2), abs=2e-3), "the reference is the model, without dropout"
    assert dpo[-1]["loss"] < dpo[0]["loss"]
    assert (dpo[-1]["reward_accuracy"], dpo[-1]["reward_margin"] > 0) == (1.0, True)
    assert all("load_balancing" in line for line in (*sft, *dpo))


def test_the_model_is_a_plain_folder_with_a_chat_template(aligned: RunFolder) -> None:
    for stage in ("align/sft", "align/dpo"):
        assert read_json(aligned.model(stage) / "config.json") == read_json(aligned.model("finetune") / "config.json")
        assert "generation" in str(load_tokenizer(aligned.model(stage)).chat_template)
    assert load_tokenizer(aligned.model("finetune")).chat_template is None


@pytest.mark.parametrize("overrides", [(), pytest.param(LORA, marks=pytest.mark.long)])
def test_a_killed_alignment_goes_on_bit_for_bit(
    finetuned: Path, aligned: RunFolder, overrides: tuple[str, ...]
) -> None:
    if overrides:
        pytest.importorskip("peft", reason='needs pip install "branchtrainmix[lora]"')
        copy(finetuned, "lora")
        aligned = run_here(recipe_of(finetuned, "lora", *overrides), ["align"])[0]
    name = f"cut{len(overrides)}"
    copy(finetuned, name)
    cut = RunFolder.create(recipe_of(finetuned, name, *overrides))
    for stage in ("align/sft", "align/dpo"):
        stopped_after(cut, stage, 4)
        assert not cut.done(stage)
        again, said = run_here(recipe_of(finetuned, name, *overrides), [stage])
        assert any("resumed after step 3" in line for line in said)
        assert weights(again, stage) == weights(aligned, stage)
        assert metrics(again, stage) == metrics(aligned, stage)


def test_adapters_change_experts_and_attention_alone(finetuned: Path) -> None:
    pytest.importorskip("peft", reason='needs pip install "branchtrainmix[lora]"')
    if not (finetuned / "lora").exists():
        copy(finetuned, "lora")
        run_here(recipe_of(finetuned, "lora", *LORA), ["align/sft"])
    run = RunFolder.open(finetuned / "lora")
    before, after = (load_model(run.model(stage)) for stage in ("finetune", "align/sft"))
    parts = weight_parts(after)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert (not torch.equal(old, new)) == (parts[name] == "experts" or "self_attn" in name), name
    kept = load_file(max((run.folder("align/sft") / "state").iterdir()) / "weights.safetensors")
    assert all("lora_" in name for name in kept)
    planned = next(row for row in plan(recipe_of(finetuned, "lora", *LORA))["stages"] if row["stage"] == "align/sft")
    config = read_json(run.model("seed") / "config.json")
    D, F, heads, E = config["hidden_size"], config["intermediate_size"], 4 * 8, 3
    adapters = 2 * 4 * (E * (D + 2 * F + F + D) + 2 * (D + heads) + 2 * (D + heads // 2))
    assert sum(tensor.numel() for tensor in kept.values()) == adapters
    assert planned["disk_bytes"] > 3 * 4 * adapters


def test_the_aligned_model_is_one_of_the_run(aligned: RunFolder, finetuned: Path) -> None:
    quick = ("evaluate.tasks.quiz.chat=true", "evaluate.tokens=100", "analyze.tokens=120")
    run = run_here(recipe_of(finetuned, "aligned", *quick), ["evaluate", "analyze"])[0]
    rows = read_json(run.path / "evaluate" / "results.json")["models"]
    assert list(rows)[-3:] == ["btx", "sft", "dpo"]
    assert rows["sft"]["tokens"] == rows["btx"]["tokens"] + run.done("align/sft")["tokens"]
    asked = rows["dpo"]["tasks"]["quiz"]["examples"][0]["output"], rows["btx"]["tasks"]["quiz"]["examples"][0]["output"]
    assert asked[0] != asked[1]
    routed = read_json(run.path / "analyze" / "align.json")
    assert (list(routed["models"]), list(routed["models"]["sft"])) == (["sft", "dpo"], ["birds", "tools", "general"])
    assert all(0 < share <= 1 for share in routed["models"]["dpo"]["birds"]["moved"])
    without = RunFolder(run.path, recipe_of(finetuned, "aligned", *quick, "align.dpo=null"))
    assert without.why_stale(without.graph["evaluate"]) == "align/dpo is gone"
    loads = read_json(run.path / "evaluate" / "shown.json")["loads"]
    assert {"btx", "sft", "dpo"} <= loads.keys()


def test_the_routing_shift_is_what_moved_and_how_far_the_loads_are_apart() -> None:
    before, after = np.array([[0], [0], [1], [2]]), np.array([[0], [1], [1], [2]])
    was_LE, load_LE = torch.tensor([[4, 2, 2]]) / 8, torch.tensor([[2, 3, 3]]) / 8
    assert shift(was_LE, before, load_LE, after) == {"moved": [0.25], "distance": [0.25]}


def test_what_decides_an_alignment_is_what_its_files_hold(aligned: RunFolder, finetuned: Path) -> None:
    shutil.copy(finetuned / "chat.jsonl", finetuned / "elsewhere.jsonl")
    moved = RunFolder(aligned.path, recipe_of(finetuned, "aligned", "align.sft.data=elsewhere.jsonl"))
    assert [moved.state(stage) for stage in moved.graph.aligned] == ["done", "done"]
    with open(finetuned / "elsewhere.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    changed = RunFolder(aligned.path, recipe_of(finetuned, "aligned", "align.sft.data=elsewhere.jsonl"))
    assert [changed.state(stage) for stage in changed.graph.aligned] == ["stale", "stale"]
    assert "elsewhere.jsonl" in changed.why_stale(changed.graph["align/sft"])
    beta = RunFolder(aligned.path, recipe_of(finetuned, "aligned", "align.dpo.beta=0.2"))
    assert [beta.state(stage) for stage in beta.graph.aligned] == ["done", "stale"]
    assert beta.why_stale(beta.graph["align/dpo"]) == "align.dpo.beta: 0.1 → 0.2"
    alone = RunFolder(aligned.path, pico_recipe(finetuned, "aligned", *SHORT, *SFT))
    assert [stage.name for stage in alone.graph.aligned] == ["align/sft"]
    assert alone.state(alone.graph["align/sft"]) == "done", "DPO can come later"


def test_dpo_without_sft_starts_from_the_finetuned_model(finetuned: Path) -> None:
    graph = RunFolder(finetuned / "x", pico_recipe(finetuned, "x", *SHORT, *DPO)).graph
    assert [need.name for need in graph["align/dpo"].needs] == ["finetune"]
    assert graph["align/dpo"] in graph["evaluate"].needs
    assert graph["align/dpo"] in next(job for job in graph.jobs() if graph["finetune"] in job)


def test_a_plan_counts_it_before_there_is_a_tokenizer(finetuned: Path) -> None:
    planned = plan(recipe_of(finetuned, "nowhere"), gpu_memory=10**9)
    rows = {row["stage"]: row for row in planned["stages"]}
    assert rows["align/sft"]["tokens"] > 0 < rows["align/dpo"]["memory_bytes"]
    per_token = {name: rows[name]["flops"] / rows[name]["tokens"] for name in ("finetune", "align/sft")}
    assert per_token["align/sft"] == pytest.approx(per_token["finetune"])
    assert {"sft", "dpo"} <= planned["models"].keys()
    assert {row["section"] for row in planned["gpu"]["stages"]} >= {"align.sft", "align.dpo"}
    assert any(note.startswith("align.sft: about") for note in planned["notes"])
    exact = plan(recipe_of(finetuned, "nowhere", "align.sft.tokens=2560"))
    assert next(row for row in exact["stages"] if row["stage"] == "align/sft")["tokens"] == 2560
    assert not any(note.startswith("align.sft:") for note in exact["notes"])


def test_a_plan_says_which_tokens_it_cannot_count(finetuned: Path) -> None:
    notes = aligned_notes(recipe_of(finetuned, "nowhere", "align.sft.data=gone.jsonl"))
    assert [note[:33] for note in notes] == ["align.sft: its files cannot be re", "align.dpo: about 2,304 tokens, at"]


def test_a_section_fills_in_from_the_finetuning() -> None:
    finetune = Finetune(tokens=10**6, learning_rate=1e-3, load_balancing=0.02, mixture={"a": 1.0}, switching=0.5)
    sft = Sft(data=["x"]).training(finetune, 1000, 64)
    assert (sft.tokens, sft.batch_tokens, sft.warmup_steps) == (192_000, 2048, 5)
    assert sft.learning_rate == pytest.approx(2e-4)
    assert (sft.load_balancing, sft.mixture, sft.switching) == (0.02, None, 0.0)
    dpo = Dpo(data=["x"], trainable="lora", load_balancing=0.0).training(finetune, 20, 64)
    assert (dpo.tokens, dpo.batch_tokens, dpo.load_balancing) == (1280, 128, 0.0)
    assert dpo.learning_rate == pytest.approx(5e-5)


@pytest.mark.parametrize(("overrides", "told"), [
    (("align.sft.epochs=2", "align.sft.tokens=100"), "tokens and epochs say the same thing"),
    (("align.sft.lora.rank=4",), "lora goes with trainable: lora"),
    (("align.sft.data=[chat.jsonl, chat.jsonl]",), "chat.jsonl is named twice"),
    (("align.sft.trainable=experts",), "align.sft.trainable"),
    (("align.sft.bta=1",), "unknown key 'bta'"),
    (("align.sft.trainable=lora", "launch.processes={align: 2}"), "lora is trained by one process"),
])  # fmt: skip
def test_a_section_that_contradicts_itself_is_refused(tmp_path: Path, overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        pico_recipe(tmp_path, "run", *SFT, *overrides)


@pytest.mark.parametrize("rank", [0, 1])
def test_adapters_under_a_torchrun_of_the_users_are_refused_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    run = RunFolder(tmp_path / "run", recipe_of(tmp_path, "run", *LORA))
    refused, said = [(UserError, "lora is trained by one process.*here are 2"), (SystemExit, "2")][rank]
    with pytest.raises(refused, match=said):
        align(run, run.graph["align/sft"], Interrupts(), lambda line: None)
    assert not run.path.exists()


def test_align_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="align needs sft, dpo or both"):
        pico_recipe(tmp_path, "run", "align={}")


def test_a_template_that_does_not_take_the_conversations_is_refused_before_anything_trains(
    tmp_path: Path, make_llama: Callable[..., Path]
) -> None:
    write_pico_recipe(tmp_path)
    write_talks(tmp_path)
    seed = make_llama("seed")
    (seed / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}", "utf-8")
    recipe = recipe_of(tmp_path, "run", f"seed_model={{path: {seed}}}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the chat template does not take .*no users here"):
        run_here(recipe, ["data/tokenizer", "seed"])


def test_engines_are_told_where_turns_end(tmp_path: Path, pico_tokenizer_folder: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}', "utf-8")
    add_ends(tmp_path, {0, 7})
    assert read_json(tmp_path / "generation_config.json") == {"eos_token_id": [0, 7], "temperature": 0.5}
    ends = (Encoded("", np.array([5, 0]), np.array([False, True])), Encoded("", np.array([5, 9]), np.ones(2, bool)))
    samples = PackedConversations([ends], 8, 0)
    assert ends_of_turns(samples, load_tokenizer(pico_tokenizer_folder)) == {0}, "an ordinary token ends nothing"


def test_broken_lines_are_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pico_recipe(tmp_path)
    write_talks(tmp_path)
    preflight(recipe_of(tmp_path, "run"))
    with open(tmp_path / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:13: a line has"):
        preflight(recipe_of(tmp_path, "run"))
    with pytest.raises(DataError, match=r"align\.sft\.data: .*gone\.jsonl: no such file"):
        preflight(recipe_of(tmp_path, "run", "align.sft.data=gone.jsonl"))
    monkeypatch.setattr(preflight_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'align\.sft\.trainable: lora .*pip install "branchtrainmix\[lora\]"'):
        check_packages(recipe_of(tmp_path, "run", "align.sft.trainable=lora"))


# --- the preference loss ----------------------------------------------------------------------------------------------


def plain_dpo(model: nn.Module, rows: PairBatch, beta: float) -> torch.Tensor:
    """The paper's formula with the logits of everything, answer by answer."""
    ids, positions = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids)
    log_probs = model(input_ids=ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)
    total = torch.zeros(())
    for row in range(len(ids)):
        for pair in range(int(rows.answers[row].max() + 1) // 2):
            gained = []
            for answer in (2 * pair, 2 * pair + 1):
                places = np.flatnonzero(rows.answers[row] == answer)
                said = sum(log_probs[row, place, rows.labels[row, place]] for place in places)
                gained.append(said - rows.reference[row, answer])
            total = total - F.logsigmoid(beta * (gained[0] - gained[1]))
    return total


def test_the_loss_and_its_gradients_are_the_formulas(aligned: RunFolder) -> None:
    model = load_model(aligned.model("finetune"))
    groups = [(made(2 * i, 5 + i), made(2 * i + 1, 6)) for i in range(5)]
    groups = [tuple(type(each)(each.where, each.ids_N % 300, each.is_answer_N) for each in pair) for pair in groups]
    pairs = PackedPairs(groups, 24, rng_seed=0)
    reference = np.random.default_rng(0).normal(-20, 3, pairs.reference.shape).astype(np.float32)
    rows = PackedPairs(groups, 24, rng_seed=0, reference=reference).batch(0, 3)
    total, told = preference_objective(0.3)(model, rows)
    total.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    wanted = plain_dpo(model, rows, 0.3)
    wanted.backward()
    torch.testing.assert_close(total.detach(), wanted.detach())
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    assert 0 <= told["reward_accuracy"] <= 5


def test_the_loss_of_a_margin_is_minus_its_log_sigmoid() -> None:
    margins = 0.1 * torch.tensor([0.0, 1.0, -2.5, 12.0])
    assert dpo_losses(margins).tolist() == pytest.approx([0.693147, 0.644397, 0.825939, 0.263282], abs=1e-6)


def test_the_reference_is_what_the_model_says_and_is_computed_once(aligned: RunFolder, tmp_path: Path) -> None:
    model = load_model(aligned.model("finetune"))
    groups = [tuple(type(each)(each.where, each.ids_N % 300, each.is_answer_N) for each in (made(2, 7), made(5, 9)))]
    cpu = torch.device("cpu")
    pairs = with_reference(PackedPairs(groups, 24, 0), model, tmp_path / "r.json", rows_at_once=2, device=cpu,
                           in_bfloat16=False)  # fmt: skip
    rows = pairs.of_rows([0])
    assert plain_dpo(model, rows, 1.0).item() == pytest.approx(np.log(2), abs=1e-5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    again = with_reference(PackedPairs(groups, 24, 0), model, tmp_path / "r.json", rows_at_once=2, device=cpu,
                           in_bfloat16=False)  # fmt: skip
    assert (again.reference == pairs.reference).all()


def test_a_batch_scores_what_its_loss_is_a_mean_over() -> None:
    labels = np.array([[1, NO_LABEL], [2, 3]])
    assert Batch(labels, labels, labels).scored == 3
