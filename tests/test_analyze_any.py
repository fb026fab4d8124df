"""Any MoE class of transformers: its routing is seen as it is, experts can be dropped, and the analysis says it all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from btx.cli.main import app
from btx.cli.measuring import default_output
from btx.errors import CheckpointError
from btx.evaluation.analysis_request import has_experts, read_texts
from btx.evaluation.any_model import keeps_apart
from btx.models.cost import model_cost
from btx.models.loading import load_model
from btx.models.measuring_memory import SCORING, forward_bytes
from btx.moe.any_moe import moe_layers, num_experts, only_experts, watched
from btx.moe.layer import MoE
from tests.pico_models import WORDS, llama
from tests.tiny_moe import MOE, tiny_moe

HALF = len(WORDS) // 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of every family, a dense one, and text of two domains."""
    folder = tmp_path_factory.mktemp("any")
    for kind in MOE:
        tiny_moe(kind, folder / kind)
    llama(folder / "dense")
    random = np.random.default_rng(0)
    for name, words in (("a", WORDS[:HALF]), ("b", WORDS[HALF:])):
        texts = [" ".join(random.choice(words, 12)) for _ in range(5)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
        (folder / f"{name}.txt").write_text("\n\n".join(texts), "utf-8")
    return folder


@pytest.mark.parametrize("kind", MOE)
def test_what_is_watched_is_what_the_class_computes_with(kind: str, folders: Path) -> None:
    model = load_model(folders / kind)
    ids = torch.arange(3, 40)[None]
    settings = MOE[kind]
    E = next(value for key, value in settings.items() if key.startswith(("num_", "n_routed")) and "per_tok" not in key
             and "experts" in key)  # fmt: skip
    chosen: list[torch.Tensor] = []
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    hooks = [part.register_forward_pre_hook(lambda _, args, kwargs: chosen.append((*args, *kwargs.values())[1:]),
                                            with_kwargs=True) for part in experts]  # fmt: skip
    with torch.inference_mode():
        with watched(model) as routings:
            logits = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=0)  # watching changes nothing
        is_ours = isinstance(moe_layers(model)[0], MoE)  # whose logits transformers does not find
        own = None if is_ours else model(input_ids=ids, output_router_logits=True).router_logits
    dense = settings.get("first_k_dense_replace", 0) + settings.get("num_dense_layers", 0)
    assert num_experts(model) == E
    assert len(routings) == len(moe_layers(model)) == 2 - dense
    for number, routing in enumerate(routings):
        assert routing.expert_ids_TK.shape == (37, settings.get("num_experts_per_tok", 2))
        assert (routing.gates_TK.diff(dim=1) <= 0).all()
        if own is not None:
            said_TE = own[number].reshape(37, E).float()
            said_TE = said_TE.log() if (said_TE >= 0).all() else said_TE  # Gemma 4 says probabilities
            torch.testing.assert_close(routing.logits_TE, said_TE)
        given = [part for part in chosen[number] if isinstance(part, torch.Tensor) and part.shape[-1] < E]
        ids_TK = next((part for part in given if not part.is_floating_point()), None)
        if ids_TK is not None:
            assert routing.expert_ids_TK.sort(dim=1).values.equal(ids_TK.sort(dim=1).values)
            gates_TK = next(part for part in given if part.is_floating_point())
            torch.testing.assert_close(routing.gates_TK, gates_TK.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("kind", MOE)
def test_a_dropped_expert_is_not_used_and_down_to_one_the_model_answers(kind: str, folders: Path) -> None:
    model = load_model(folders / kind)
    E, ids = num_experts(model), torch.arange(3, 40)[None]
    with torch.inference_mode():
        with watched(model) as before:
            logits = model(input_ids=ids).logits
        dropped = int(before[0].expert_ids_TK.flatten().mode().values)
        for left in ({e for e in range(E) if e != dropped}, {dropped}):
            with only_experts(model, torch.tensor([e in left for e in range(E)])), watched(model) as routings:
                changed = model(input_ids=ids).logits
            assert changed.isfinite().all()
            assert not torch.allclose(changed, logits)
            used = {int(e) for routing in routings for e in routing.expert_ids_TK[routing.gates_TK > 0]}
            assert used <= left
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=0)  # all are back


@pytest.mark.parametrize("kind", ["hunyuan_v1_moe", "gemma4_text"])
def test_classes_that_name_k_or_a_width_a_layer_their_own_way_are_counted(kind: str, folders: Path) -> None:
    model = load_model(folders / kind)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    cost = model_cost(model)
    assert cost.total_params - cost.active_params == in_experts // 2  # two of four are used
    assert cost.shape.feed_forward == 24
    assert forward_bytes(cost.shape, 4, SCORING) > 0


def test_experts_that_are_forbidden_twice_are_both_forbidden(folders: Path) -> None:
    for kind in ("mixtral", "olmoe"):
        model = load_model(folders / kind)
        allowed = torch.ones(2, num_experts(model), dtype=torch.bool)
        allowed[0, 0] = allowed[1, 1] = False
        with torch.inference_mode(), only_experts(model, allowed[0]):
            with only_experts(model, allowed[1]), watched(model) as routings:
                model(input_ids=torch.arange(3, 60)[None])
            assert not {0, 1} & set(torch.cat([routing.expert_ids_TK.flatten() for routing in routings]).tolist())
            with watched(model) as routings:
                model(input_ids=torch.arange(3, 60)[None])
            ids = set(torch.cat([routing.expert_ids_TK.flatten() for routing in routings]).tolist())
            assert 0 not in ids
            assert 1 in ids


def test_which_classes_keep_texts_of_a_row_apart_is_looked_at(folders: Path) -> None:
    assert keeps_apart(load_model(folders / "mixtral"))
    assert keeps_apart(load_model(folders / "deepseek_v3"))
    assert not keeps_apart(load_model(folders / "lfm2_moe"))  # its convolution reads on


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3", "phimoe", "lfm2_moe"])
def test_the_analysis_of_any_class_has_the_files_of_a_run_s(kind: str, folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "found"
    command = ["analyze", str(folders / kind), "--text", f"a={folders}/a.jsonl", f"b={folders}/b.txt",
               "-o", str(output), "--tokens", "90", "--examples", "2", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert json.loads((output / "routing.json").read_text("utf-8")) == found
    model = load_model(folders / kind)
    E, L, K = num_experts(model), len(moe_layers(model)), MOE[kind]["num_experts_per_tok"]
    assert (found["layers"], found["experts"]) == (L, [f"expert {e}" for e in range(E)])
    for name in ("a", "b"):
        for load_E, intervals in zip(found["domains"][name]["load"], found["statistics"]["load"][name], strict=True):
            assert sum(load_E) == pytest.approx(1)
            assert [interval["value"] for interval in intervals] == pytest.approx(load_E, abs=1e-4)
            assert all(0 <= i["low"] <= i["value"] <= i["high"] <= 1 for i in intervals)
    assert len(found["statistics"]["specialisation"]) == L == len(found["statistics"]["similarity"])
    assert len(found["kept"]) == E
    assert len(found["kept"][-1]["experts"]) == 1
    tokens = json.loads((output / "tokens.json").read_text("utf-8"))
    assert {example["domain"] for example in tokens["examples"]} == {"a", "b"}
    assert len(tokens["examples"]) == 3
    assert len(tokens["examples"][0]["experts"][0][0]) == K
    assert "<html" in (output / "index.html").read_text("utf-8")


def test_text_counts_the_same_in_a_class_that_is_read_text_by_text(folders: Path) -> None:
    from btx.data.held_out import HeldOutDocument
    from btx.evaluation.analyze import domain_routing

    model = load_model(folders / "olmoe")
    random = np.random.default_rng(1)
    documents = [HeldOutDocument(random.integers(3, 300, length), length) for length in (5, 30, 12, 8)]
    packed, apart = (domain_routing(model, documents, 16, apart=apart)[0] for apart in (False, True))
    torch.testing.assert_close(packed.load_LE, apart.load_LE)


def test_the_key_of_the_text_is_said_by_one_flag(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((folders / "a.jsonl").read_text().replace('"text"', '"body"'))
    assert read_texts({"a": tmp_path / "a.jsonl"}, 100, "body") == read_texts({"a": folders / "a.jsonl"}, 100)
    command = ["analyze", str(folders / "mixtral"), "--text", f"a={tmp_path}/a.jsonl", "--text-key", "body",
               "--tokens", "20", "-o", str(tmp_path / "found"), "--json"]  # fmt: skip
    assert json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)["domains"]["a"]["tokens"]


def test_an_expert_is_dropped_by_one_flag(folders: Path, tmp_path: Path) -> None:
    command = ["analyze", "--text", f"a={folders}/a.jsonl", f"b={folders}/b.jsonl", str(folders / "olmoe"),
               "-o", str(tmp_path / "found"), "--without", "expert 3", "--json"]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert found["dropped"] == ["expert 3"]
    assert all(load_E[3] == 0 for name in "ab" for load_E in found["domains"][name]["load"])
    assert all(0 < entropy < np.log(7) for entropy in found["domains"]["a"]["entropy"])
    assert [len(kept["experts"]) for kept in found["kept"]] == [8, 7]
    assert "expert 3" not in found["kept"][1]["experts"]
    assert found["kept"][0]["mean"] != found["kept"][1]["mean"]
    assert not [layer for layer, expert in found["dead"] if expert == 3]  # it is dropped, not dead


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/mixtral"], "a model is analysed on text"),
        (["{0}/dense", "--text", "a={0}/a.jsonl"], r"dense model (llama)"),
        (["{0}/mixtral", "--text", "a={0}/none.jsonl"], "--text a: "),
        (["{0}/mixtral", "--text", "a={0}/a.jsonl", "--text-key", "body"],
         "--text a: {0}/a.jsonl, line 1: no key 'body'; keys there: 'text'. Name the right one with `text:` in the "
         "source, or --text-key of btx analyze"),
        (["{0}/mixtral", "--text", "a={0}/a.jsonl", "a={0}/b.jsonl"], "named twice"),
        (["{0}/mixtral", "--text", "a={0}/a.jsonl", "--text", "b"], "write NAME=FILE"),
        (["{0}/mixtral", "{0}/olmoe", "--text", "a={0}/a.jsonl"], "one folder is wanted"),
        (["{0}/nothing", "--text", "a={0}/a.jsonl"], "there is no such folder"),
        (["{0}/mixtral", "--text", "a={0}/a.jsonl", "-o", "{0}/mixtral"], "exists already and is no analysis"),
        (["{0}/mixtral", "--text", "a={0}/a.jsonl", "--without", "math"], "no such expert; its experts: expert 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_analysed_is_refused(arguments: list[str], message: str, folders: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as error:  # noqa: PT011 (of several kinds)
        CliRunner().invoke(app, ["analyze", *(each.format(folders) for each in arguments)], catch_exceptions=False)
    assert message.replace("{0}", str(folders)) in str(error.value)
    assert getattr(error.value, "exit_code", None) == 2
    assert not list(tmp_path.iterdir())


def test_an_analysis_goes_beside_where_one_is_and_is_called_after_the_model() -> None:
    assert default_output("models/olmoe/") == Path("olmoe-analysis")
    assert default_output("runs/demo/finetune/model") == Path("finetune-analysis")
    assert default_output("hf:allenai/OLMoE-1B-7B") == Path("OLMoE-1B-7B-analysis")


def test_a_config_says_whether_it_is_of_a_moe_model() -> None:
    assert has_experts({"model_type": "mixtral"})
    assert has_experts({"model_type": "new", "num_routed_experts": 4})
    assert has_experts({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}})
    assert not has_experts({"model_type": "gemma4_text", "num_experts": None, "num_experts_per_tok": 2})


def test_layers_of_different_numbers_of_experts_are_refused(folders: Path) -> None:
    model = load_model(folders / "olmoe")
    router = model.model.layers[0].mlp.gate
    router.weight = torch.nn.Parameter(router.weight[:4].clone())
    with pytest.raises(CheckpointError, match="different numbers of experts"):
        num_experts(model)


@pytest.mark.parametrize("K", [2, 4])
def test_a_router_s_output_is_read_in_any_order(K: int) -> None:
    from itertools import permutations

    from btx.moe.any_moe import _routing_of

    router = torch.nn.Linear(8, 4, bias=False)
    logits_TE = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    top_TK, ids_TK = logits_TE.topk(K)
    gates_TK = top_TK.softmax(dim=-1)
    for order in permutations((logits_TE, gates_TK, ids_TK)):
        found = _routing_of(router, order, router)
        for part, expected in ((found.logits_TE, logits_TE), (found.gates_TK, gates_TK), (found.expert_ids_TK, ids_TK)):
            torch.testing.assert_close(part, expected)
