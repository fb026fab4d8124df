"""Recipes: reading, overrides, error messages with places, round trips, packaged recipes and their copies."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from btx.errors import RecipeError, UserError
from btx.recipe.loading import copy_recipe, dump_recipe, load_recipe, packaged_recipes, parse_recipe, recipe_schema
from btx.recipe.schema import Recipe

SMALL = """\
data:
  domains:
    math: ./math.jsonl
    code: {path: ./code.jsonl, held_out: ./code-test.jsonl}
    general: [./a.jsonl, {hub: org/b, weight: 0.5}]
seed_model: {path: ./seed}
train:
  domains: [math, code]
  tokens: 1_000_000
  learning_rate: 1e-4
finetune: {tokens: 2e6}
"""


def small(old: str = "", new: str = "") -> str:
    """SMALL with one replacement, which has to take place."""
    assert old in SMALL
    return SMALL.replace(old, new, 1)


def problems(text: str, *overrides: str, file: str = "my.yaml") -> list[str]:
    """The lines of the error that reading `text` raises."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# ---- what is read


def test_values_keep_the_types_the_file_gives_them() -> None:
    recipe = parse_recipe(SMALL, "runs/mine.yaml")
    assert recipe.name == "mine"
    assert recipe.train.tokens == 1_000_000
    assert recipe.train.learning_rate == 1e-4
    assert recipe.finetune.tokens == 2_000_000
    assert isinstance(recipe.finetune.tokens, int)
    assert recipe.data.domains["code"].held_out == "./code-test.jsonl"
    assert [source.weight for source in recipe.data.domains["general"].sources] == [1.0, 0.5]


def test_who_names_points_to_branch_at_is_told_how_they_are_written() -> None:
    (line,) = problems(SMALL + "branch_at: [1e6, 2e6]\n")
    assert "branch_at: unknown key 'branch_at'; points at which models branch from one training are a sweep" in line


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000.5", 1000.5),
        ("10000.0", 10000.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("'1e-4'", "1e-4"),
        ('"3"', "3"),
        ("!!str 3", "3"),
        ("007", "007"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("[1, [2.0]]", [1, [2.0]]),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2_with_underscores(written: str, value: Any) -> None:
    text = small("{path: ./seed}", f"{{config: {{model_type: llama, x: {written}}}, train: {{tokens: 1}}}}")
    config = parse_recipe(text, "my.yaml").seed_model.config
    assert config is not None
    assert config["x"] == value
    assert type(config["x"]) is type(value)


def test_whole_numbers_do_for_real_ones_but_stay_real_in_a_model_config() -> None:
    recipe = parse_recipe(small("learning_rate: 1e-4", "learning_rate: 1"), "my.yaml")
    assert isinstance(recipe.train.learning_rate, float)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_recipe(str(file)) == parse_recipe(SMALL, "my.yaml")


# ---- what is refused, and where


def test_an_unknown_key_is_named_with_its_place_a_suggestion_and_what_is_allowed() -> None:
    (line,) = problems(small("learning_rate", "learning_rte"))
    assert line.startswith(
        "my.yaml:10:3: train.learning_rte: unknown key 'learning_rte'; did you mean 'learning_rate'? "
        "allowed: tokens, batch_tokens,"
    )


def test_what_is_allowed_follows_the_form_a_domain_is_written_in() -> None:
    (in_short_form,) = problems(small("held_out:", "heldout:"))
    assert in_short_form.endswith("max_bytes, weight, sources, held_out")
    (in_list,) = problems(small("hub:", "hubb:"))[:1]
    assert in_list.endswith("max_bytes, weight")


def test_all_problems_of_a_file_come_in_one_message_in_the_order_of_the_file() -> None:
    text = SMALL.replace("1_000_000", "3 epochs").replace("./code.jsonl,", "./code.jsonl, max_byte: 3,")
    text = text.replace("{tokens: 2e6}", "{tokens: 0, tokens: 5}\nmix: {top_k: '2'}\nmixx: {}")
    lines = problems(text)
    assert [line.split(": ")[0] for line in lines] == [
        "my.yaml:4:32",
        "my.yaml:9:11",
        "my.yaml:11:20",
        "my.yaml:11:23",
        "my.yaml:12:14",
        "my.yaml:13:1",
    ]
    assert "data.domains.code.max_byte: unknown key 'max_byte'; did you mean 'max_bytes'?" in lines[0]
    assert lines[1].endswith("train.tokens: expected a whole number, got '3 epochs' (Training tokens)")
    assert lines[2].endswith("finetune.tokens: must be greater than 0, got 0 (Training tokens)")
    assert lines[3].endswith("finetune.tokens: key 'tokens' is given twice (first in line 11): remove one")
    assert "mix.top_k: expected a whole number, got '2'" in lines[4]
    assert "mixx: unknown key 'mixx'; did you mean 'mix'?" in lines[5]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1_000_000", "'3'", "my.yaml:9:11: train.tokens: expected a whole number, got '3'"),
        ("1_000_000", "1.5", "my.yaml:9:11: train.tokens: expected a whole number, got 1.5"),
        ("1_000_000", ".inf", "my.yaml:9:11: train.tokens: expected a whole number, got inf"),
        ("1_000_000", "true", "my.yaml:9:11: train.tokens: expected a whole number, got true"),
        ("1_000_000", "-3", "my.yaml:9:11: train.tokens: must be greater than 0, got -3"),
        ("1_000_000", "", "my.yaml:9:10: train.tokens: expected a whole number, got nothing"),
        ("1e-4", "fast", "my.yaml:10:18: train.learning_rate: expected a number, got 'fast'"),
        ("1e-4", "true", "my.yaml:10:18: train.learning_rate: expected a number, got true"),
        ("1e-4", ".inf", "my.yaml:10:18: train.learning_rate: must be a finite number, got inf"),
        ("1e-4", ".nan", "my.yaml:10:18: train.learning_rate: not a number (.nan)"),
        ("1e-4", "1e999", "my.yaml:10:18: train.learning_rate: 1e999 is too large for a number"),
        ("1_000_000", "9" * 5000, "my.yaml:9:11: train.tokens: a whole number of 5000 digits is too long"),
        ("1_000_000", "9223372036854775808", "my.yaml:9:11: train.tokens: a whole number of 19 digits is too long"),
        ("1_000_000", "1e300", "my.yaml:9:11: train.tokens: expected a whole number, got 1e+300"),
        ("1_000_000", "!!int three", "my.yaml:9:11: train.tokens: 'three' does not fit its tag"),
        ("./seed", "12", "my.yaml:6:20: seed_model.path: expected text, got 12: put it in quotes"),
        ("./seed", "[a]", "my.yaml:6:20: seed_model.path: expected text, got a list"),
        ("[math, code]", "[]", "my.yaml:8:12: train.domains: expected at least 1 entry"),
        ("[math, code]", "math", "my.yaml:8:12: train.domains: expected a list, got 'math'"),
        ("[math, code]", "[math, a b]", "my.yaml:8:19: train.domains.1: expected a name"),
        ("{path: ./seed}", "./seed", "my.yaml:6:13: seed_model: expected a mapping (name: value), got './seed'"),
        ("./math.jsonl", "", "my.yaml:3:10: data.domains.math: expected a mapping (name: value), got nothing"),
        ("    math:", "    ma th:", "my.yaml:3:5: data.domains.'ma th': expected a name"),
        ("    math:", "    1984:", "my.yaml:3:5: data.domains: key 1984 is no text: put it in quotes"),
        ("    math:", "    ? [a]\n    :", "my.yaml:3:7: data.domains: a key has to be a text"),
        ("weight: 0.5", "weight: -1", "my.yaml:5:47: data.domains.general.1.weight: must be greater"),
        ("hub:", "hubb:", "my.yaml:5:27: data.domains.general.1.hubb: unknown key 'hubb'; did you mean 'hub'?"),
        ("held_out:", "heldout:", "my.yaml:4:32: data.domains.code.heldout: unknown key 'heldout'; did you mean"),
        ("{tokens: 2e6}", "{}", "my.yaml:11:1: finetune: missing key 'tokens' (Training tokens)"),
        ("finetune:", "finetun:", "my.yaml:1:1: missing key 'finetune'"),
        ("data:", "device: gpu\ndata:", "my.yaml:1:9: device: expected one of auto, cpu, cuda, got 'gpu'"),
        ("data:", "launch: {processes: 0}\ndata:", "my.yaml:1:21: launch.processes: must be greater than 0, got 0 (P"),
        ("data:", "launch: {processes: {two: 2}}\ndata:", "my.yaml:1:22: launch.processes.two: expected one of seed"),
        ("data:", "launch: {nodes: {seed: 0}}\ndata:", "my.yaml:1:24: launch.nodes.seed: must be greater than 0"),
        ("data:", "launch: {nodes: a}\ndata:", "my.yaml:1:17: launch.nodes: expected a whole number, got 'a' (M"),
        ("data:", "launch: {ray: {address: a}}\ndata:", "my.yaml:1:16: launch.ray.address: the address of a Ray"),
        ("data:", "launch: {slurm: {options: [--outp=a]}}\ndata:", "my.yaml:1:28: launch.slurm.options.0: --outp is"),
        ("data:", "name: 3\ndata:", "my.yaml:1:7: name: expected text, got 3: put it in quotes"),
        ("./seed", "!!python/object/apply:os.getcwd []", "my.yaml:6:20: seed_model.path: tag '!!python/object/apply"),
        ("./seed", "!env SEED", "my.yaml:6:20: seed_model.path: tag '!env' is not read"),
        ("./seed", '"\\ud800"', "my.yaml:6:20: seed_model.path: '\\ud800' holds half of a surrogate pair"),
    ],
)
def test_a_wrong_value_is_named_with_line_column_and_key(old: str, new: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in problems(small(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[math, code]", "[math, law]", "my.yaml:8:12: train.domains names 'law', which is not in data.domains"),
        ("{tokens: 2e6}", "{tokens: 1}\nmix:\n  top_k: 4", "my.yaml:13:10: mix.top_k is 4, but there are only 3"),
        ("./math.jsonl", "{domain: law}", "my.yaml:1:1: data: domain 'math' takes from unknown domain 'law'"),
        ("./math.jsonl", "{path: a, hub: b}", "my.yaml:3:5: data.domains.math: a source needs exactly one of path,"),
        ("{path: ./seed}", "{}", "my.yaml:6:1: seed_model: seed_model needs exactly one of `path`"),
    ],
)
def test_a_contradiction_between_fields_is_placed_at_the_field_or_its_section(
    old: str, new: str, expected: str
) -> None:
    (line,) = problems(small(old, new))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "my.yaml:1:1: the recipe is empty"),
        ("# nothing\n", "my.yaml:1:1: the recipe is empty"),
        ("~", "my.yaml:1:1: the recipe is empty"),
        ("\n- a\n", "my.yaml:2:1: expected a mapping (name: value) at the top"),
        ("text", "my.yaml:1:1: expected a mapping (name: value) at the top"),
        ("a: 1\nb: [1,\nc: 2", "my.yaml:3:5: cannot be read: while parsing a flow sequence"),
        ("a:\n\tb: 1", "my.yaml:2:1: cannot be read: while scanning for the next token found character '\\t'"),
        ("a: 1\n---\nb: 2", "my.yaml:2:1: cannot be read: expected a single document in the stream"),
        ("a: 1\nb: x\x00y", "my.yaml:2:5: cannot be read: character '\\x00' is not allowed"),
        ("a:\n  - *.jsonl", "my.yaml:2:6: cannot be read: while scanning an alias expected"),
        ('a: "\\UFFFFFFFF"', "my.yaml:1:7: cannot be read: an escape or a number that stands for no character"),
        ("a: &x 1\nb: *x", "my.yaml:1:4: cannot be read: anchors (&name) and aliases (*name) are not read"),
        ("a: &x [*x]", "my.yaml:1:4: cannot be read: anchors"),
        ("[" * 3000, "my.yaml:1:65: cannot be read: nested deeper than 64 levels"),
        ("a: " + "{a: " * 3000 + "}" * 3000, "my.yaml:1:253: cannot be read: nested deeper than 64 levels"),
        ("a: [" + "1," * 400_000 + "1]", "my.yaml:1:19999: cannot be read: more than 10,000 keys and values"),
        ("a: 1\n" * 150_000, "my.yaml:5000:4: cannot be read: more than 10,000 keys and values"),
    ],
)
def test_a_text_that_is_no_recipe_at_all_is_refused_at_its_place(text: str, expected: str) -> None:
    (line,) = problems(text)
    assert line.startswith(expected)


def test_no_more_than_fifty_problems_are_listed() -> None:
    lines = problems(SMALL + "".join(f"x{i}: 1\n" for i in range(53)))
    assert len(lines) == 51
    assert lines[-1] == "... and 3 more"


def test_what_grew_with_the_square_of_a_recipe_is_refused_at_once(tmp_path: Path) -> None:
    """Each of these took minutes, so a return of it shows."""
    (line,) = problems(SMALL.replace("./a.jsonl", "{domain: " + "x" * 300_000 + "}"))
    assert line.startswith("my.yaml:1:1: data: domain 'general' takes from unknown domain 'xxxx")
    base = tmp_path / "base.yaml"
    base.write_text(SMALL + "".join(f"x{i}: 1\n" for i in range(2000)), "utf-8")
    lines = problems(f"extends: {base}\n" + "".join(f"y{i}: 1\n" for i in range(2000)))
    assert lines[0].startswith("my.yaml:2:1: y0: unknown key 'y0'")
    assert lines[-1] == "... and 3950 more"


def test_an_alias_bomb_is_refused_before_it_expands() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    (line,) = problems(bomb)
    assert line.startswith("my.yaml:1:5: cannot be read: anchors")


def test_a_file_name_that_is_no_run_name_is_said_to_be_the_reason() -> None:
    (line,) = problems(SMALL, file="my recipe.yaml")
    assert line.startswith("my recipe.yaml:1:1: name: expected a name (letters,")


# ---- overrides


def test_overrides_reach_every_kind_of_place_with_values_in_yaml() -> None:
    recipe = parse_recipe(
        SMALL,
        "my.yaml",
        [
            "train.learning_rate=1e-3",
            "train.domains=[math]",
            "data.root=../x",
            "data.domains.law=./law.jsonl",
            "data.domains.general.1.weight=0.25",
            "data.domains.code.max_bytes=2e6",
            "evaluate.tasks.sums.path=sums.jsonl",
            "finetune={tokens: 7}",
            "description=a = b",
            "run=out",
            "name=other",
        ],
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.domains == ["math"]
    assert recipe.data.root == "../x"
    assert recipe.data.domains["law"].sources[0].path == "./law.jsonl"
    assert recipe.data.domains["general"].sources[1].weight == 0.25
    assert recipe.data.domains["code"].sources[0].max_bytes == 2_000_000
    assert recipe.evaluate.tasks["sums"].path == "sums.jsonl"
    assert recipe.finetune.tokens == 7
    assert recipe.description == "a = b"
    assert (recipe.run_folder, recipe.name) == ("out", "other")


def test_the_last_of_two_overrides_of_a_key_counts() -> None:
    assert parse_recipe(SMALL, "my.yaml", ["mix.top_k=1", "mix.top_k=3"]).mix.top_k == 3


def test_null_takes_a_section_away() -> None:
    text = small("{path: ./seed}", "{config: {model_type: llama}, train: {tokens: 1}}")
    overrides = ["seed_model.config=null", "seed_model.train=", "seed_model.path=./seed"]
    assert parse_recipe(text, "my.yaml", overrides).seed_model == parse_recipe(SMALL, "my.yaml").seed_model


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mix.topk=1", "mix.topk: unknown key 'topk'; did you mean 'top_k'? allowed: generalist, router,"),
        ("trian.tokens=1", "trian: unknown key 'trian'; did you mean 'train'?"),
        ("train.compile=maybe", "train.compile: expected true or false or auto, got 'maybe'"),
        ("train.micro_batch_tokens=most", "train.micro_batch_tokens: expected a whole number or auto, got 'most'"),
        ("train.tokens=3 epochs", "train.tokens: expected a whole number, got '3 epochs' (Training tokens)"),
        ("train.tokens=[", "train.tokens: cannot be read: while parsing a flow node"),
        ("train.tokens=!!python/name:os.x", "train.tokens: tag '!!python/name:os.x' is not read"),
        ("train.tokens.x=1", "train.tokens.x: train.tokens is one value: there is no 'x' in it"),
        (
            "data.domains.general.2.weight=1",
            "data.domains.general.2.weight: data.domains.general is a list of 2",
        ),
        ("data.domains.general.x=1", "data.domains.general.x: data.domains.general is a list of 2: there is no 'x'"),
        ("finetune={tokens: 1, lr: 3}", "finetune.lr: unknown key 'lr'; "),
        ("finetune={}", "finetune: missing key 'tokens'"),
        ("mix.top_k=9", "mix.top_k is 9, but there are only 3 experts"),
        ("mix.top_k", "an override is dotted.key=value, such as mix.top_k=1"),
        ("=1", "an override is dotted.key=value"),
        ("mix..top_k=1", "an override is dotted.key=value"),
        (".".join("a" * 3000) + "=1", "an override is dotted.key=value"),
    ],
)
def test_a_wrong_override_is_named_itself_as_the_place(override: str, expected: str) -> None:
    (line,) = problems(SMALL, override)
    assert line.startswith(f"override {override!r}: {expected}")


def test_problems_of_the_file_come_before_those_of_overrides() -> None:
    lines = problems(small("learning_rate", "lr"), "mix.k=1")
    assert [line.split(": ")[0] for line in lines] == ["my.yaml:10:3", "override 'mix.k=1'"]


def test_an_override_that_mends_the_file_makes_it_load() -> None:
    assert parse_recipe(small("1_000_000", "3 epochs"), "my.yaml", ["train.tokens=3"]).train.tokens == 3


# ---- files, folders and packaged recipes


def test_a_run_folder_stands_for_its_recipe_and_is_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run: elsewhere\nname: mine\n" + SMALL, encoding="utf-8")
    assert load_recipe(str(tmp_path)).run_folder == str(tmp_path)
    assert load_recipe(str(tmp_path)).name == "mine"
    assert load_recipe(str(tmp_path), ["run=other"]).run_folder == "other"


def test_the_recipe_in_a_run_folder_means_that_folder_and_not_the_one_it_was_copied_from(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text("run: elsewhere\nname: mine\n" + SMALL, encoding="utf-8")
    assert load_recipe(str(copy)).run_folder == "elsewhere", "a recipe of this name that lies in no run folder"
    (copy.parent / "manifest.json").write_text("{}")
    assert load_recipe(str(copy)) == load_recipe(str(copy.parent))
    assert load_recipe(str(copy)).run_folder == str(copy.parent)
    assert load_recipe(str(copy), ["run=other"]).run_folder == "other"


def test_a_missing_recipe_is_answered_with_the_nearest_name_and_all_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'dmo'; did you mean 'demo'\? packaged recipes: .*demo"):
        load_recipe("dmo")
    (tmp_path / "my.yaml").write_text(SMALL, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"did you mean '.*my\.yaml'\?"):
        load_recipe(str(tmp_path / "my.yml"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not there, so .* is no run folder"):
        load_recipe(str(tmp_path))


def test_bytes_that_are_no_utf8_are_named_with_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(b"name: my\ndescription: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"my\.yaml:2:17: byte 0xe9 is no UTF-8 text"):
        load_recipe(str(file))


def test_a_huge_file_is_not_read_as_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="so it is no recipe"):
        load_recipe(str(file))


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert packaged_recipes()[name] == recipe.description != ""


def test_a_copied_recipe_differs_in_its_name_only(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    copy_recipe("demo", target)
    original = (resources.files("btx.recipes") / "demo.yaml").read_text("utf-8")
    assert target.read_text("utf-8") == original.replace("\nname: demo\n", "\nname: mine\n")
    assert load_recipe(str(target)) == load_recipe("demo", ["name=mine"])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_copy_named_like_a_number_still_loads(tmp_path: Path) -> None:
    copy_recipe("demo", tmp_path / "2024.yaml")
    assert load_recipe(str(tmp_path / "2024.yaml")).name == "2024"


def test_a_copy_goes_into_a_folder_and_never_over_an_existing_file(tmp_path: Path) -> None:
    copy_recipe("demo", tmp_path)
    (tmp_path / "demo.yaml").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        copy_recipe("demo", tmp_path)
    assert (tmp_path / "demo.yaml").read_text("utf-8") == "precious"


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("dmo", "a.yaml", "no packaged recipe 'dmo'; did you mean 'demo'"),
        ("demo", "missing/a.yaml", "cannot be written: there is no folder .*missing"),
        ("demo", "a.txt", "ends in .yaml"),
        ("demo", "my copy.yaml", "name: expected a name"),
    ],
)
def test_a_copy_that_cannot_be_made_leaves_nothing(tmp_path: Path, name: str, target: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        copy_recipe(name, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_reading_recipes_does_not_import_torch_or_transformers() -> None:
    code = "import sys, btx.recipe.loading; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


# ---- extends


def test_a_recipe_takes_what_it_leaves_out_from_the_one_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: demo\ntrain: {tokens: 1000}\nfinetune: {mixture: {math: 1}, learning_rate_factors: {routers: 3}}\n"
        "evaluate: {tasks: {sums: {generate: math}}}\n"
    )
    recipe, demo = load_recipe(str(file)), load_recipe("demo")
    assert (recipe.name, recipe.description, recipe.run_folder) == ("mine", "", "runs/mine")
    assert recipe.train == demo.train.model_copy(update={"tokens": 1000})  # sections key by key
    assert recipe.finetune.mixture == {"math": 1.0}  # a mixture as a whole
    assert recipe.finetune.learning_rate_factors.routers == 3
    assert recipe.finetune.tokens == demo.finetune.tokens
    assert list(recipe.evaluate.tasks) == ["sums"]
    assert recipe.data == demo.data
    assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe  # resolved: nothing is extended any more


WSD = "extends: demo\nfinetune: {schedule: wsd, decay_share: 0.5, decay_shape: linear}\n"


def decay(recipe: Recipe) -> tuple[str, float, str]:
    return recipe.finetune.schedule, recipe.finetune.decay_share, recipe.finetune.decay_shape


def test_who_names_a_schedule_without_a_decay_takes_back_the_decay_of_the_recipe_below(tmp_path: Path) -> None:
    plain = ("cosine", 0.2, "sqrt")
    cosine = ["finetune.schedule=cosine"]
    assert decay(parse_recipe(WSD, "my.yaml")) == ("wsd", 0.5, "linear")
    assert decay(parse_recipe(WSD, "my.yaml", cosine)) == plain
    assert decay(parse_recipe(WSD, "my.yaml", ["finetune.schedule=wsd"])) == ("wsd", 0.5, "linear")
    wsd = ["finetune.schedule=wsd", "finetune.decay_share=0.3"]
    assert decay(parse_recipe("extends: demo\n", "my.yaml", wsd, variant=cosine)) == plain
    (tmp_path / "run").mkdir()
    base, child = tmp_path / "base.yaml", "finetune: {schedule: cosine}\n"
    base.write_text(WSD)
    assert decay(parse_recipe(f"extends: {base}\n{child}", "my.yaml")) == plain
    between = tmp_path / "between.yaml"
    between.write_text(f"extends: {base}\n{child}")
    assert decay(parse_recipe(f"extends: {between}\n", "my.yaml")) == plain
    (tmp_path / "run/recipe.yaml").write_text(dump_recipe(parse_recipe(WSD, "my.yaml")))
    assert decay(load_recipe(str(tmp_path / "run"), cosine)) == plain
    of_baseline = "baselines: [dense_cm]\nbaseline_training: {dense_cm: {schedule: wsd, decay_share: 0.5}}\n"
    named = ["baseline_training.dense_cm.schedule=cosine"]
    assert parse_recipe(WSD + of_baseline, "my.yaml", named).baseline_training["dense_cm"].decay_share is None


@pytest.mark.parametrize(("text", "overrides", "place"), [
    (WSD.replace("wsd", "cosine"), [], "my.yaml:2:30"),
    (WSD, ["finetune.schedule=cosine", "finetune.decay_share=0.3"], "override 'finetune.decay_share=0.3'"),
    (WSD, ["finetune.decay_share=0.3", "finetune.schedule=cosine"], "override 'finetune.decay_share=0.3'"),
    ("extends: demo\ntrain: {}\nfinetune:\n  tokens: 1e6\n", ["finetune.decay_share=0.3"],
     "override 'finetune.decay_share=0.3'"),
])  # fmt: skip
def test_a_decay_beside_a_schedule_without_one_is_refused_where_it_stands(
    text: str, overrides: list[str], place: str
) -> None:
    (line,) = problems(text, *overrides)
    assert line == f"{place}: finetune: decay_share goes with schedule: wsd; here it is cosine"


def test_a_sweep_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("extends: demo\nsweep: {rng_seeds: 5, variants: {a: {mix.top_k: 1}}}\n")
    taken = parse_recipe(f"extends: {base}\n", "my.yaml").sweep
    assert taken is not None
    assert (taken.rng_seeds, list(taken.variants)) == (5, ["a"])
    own = parse_recipe(f"extends: {base}\nsweep: {{vary: {{mix.top_k: [1, 2]}}}}\n", "my.yaml").sweep
    assert own is not None
    assert (own.rng_seeds, own.variants, list(own.vary)) == (3, {}, ["mix.top_k"])


def test_what_is_extended_can_be_chosen_on_the_command_line_and_goes_before_other_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nmix: {top_k: 1}\n")
    recipe = load_recipe(str(file), ["train.tokens=5000", "extends=corpora"])
    assert list(recipe.data.domains) == list(load_recipe("corpora").data.domains)
    assert (recipe.train.tokens, recipe.mix.top_k) == (5000, 1)


def test_a_mistake_in_an_extended_recipe_is_placed_in_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(SMALL + "\nmix:\n  top_q: 1\n")
    second.write_text(f"extends: {first}\n")
    with pytest.raises(RecipeError, match=r"first\.yaml:\d+:3: mix\.top_q: unknown key"):
        load_recipe(str(second))


@pytest.mark.parametrize(("text", "expected"), [
    ("extends: dmo", r"mine\.yaml:1:10: extends: no recipe.*did you mean 'demo'"),
    ("extends: 5", "extends: expected text"),
    ("extends: {here}", "more than 8 recipes in a row"),
])  # fmt: skip
def test_what_cannot_be_extended_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("{here}", str(file)) + "\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(file))


# ---- out again


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_a_dumped_recipe_reads_back_equal_and_dumps_the_same(name: str) -> None:
    config = "config" if load_recipe(name).seed_model.config else "plan_config"
    recipe = load_recipe(name, ["finetune.mixture={math: 1}", f"seed_model.{config}.rope_theta=1e-30"])
    text = dump_recipe(recipe)
    assert parse_recipe(text, "other.yaml") == recipe
    assert dump_recipe(parse_recipe(text, "other.yaml")) == text
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)


def test_shared_values_are_written_out_without_aliases() -> None:
    shared = [1, 2]
    recipe = parse_recipe(SMALL, "my.yaml")
    seed_model = recipe.seed_model.model_copy(update={"config": {"a": shared, "b": shared}})
    text = dump_recipe(recipe.model_copy(update={"seed_model": seed_model}))
    assert "&" not in text


characters = st.text(st.characters(exclude_categories=["Cs"]))
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | characters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(characters, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(description=characters, value=plain_values)
@example(description="1e-4", value=["1e-4", "no", "0o17", ".nan", "1_0", "2024-01-01", "<<", "=", "null", "", "\x85\r"])
def test_any_text_and_any_model_config_survive_the_round_trip(description: str, value: Any) -> None:
    text = small("{path: ./seed}", "{config: {model_type: llama}, train: {tokens: 1}}")
    recipe = parse_recipe(text, "my.yaml")
    assert recipe.seed_model.config is not None
    seed_model = recipe.seed_model.model_copy(update={"config": {**recipe.seed_model.config, "x": value}})
    recipe = recipe.model_copy(update={"description": description, "seed_model": seed_model})
    assert parse_recipe(dump_recipe(recipe), "my.yaml") == recipe


def test_the_schema_for_editors_knows_descriptions_and_short_forms() -> None:
    schema = recipe_schema()
    assert [option["required"] for option in schema["anyOf"]] == [
        ["extends"], ["data", "seed_model", "train", "finetune"]
    ]  # fmt: skip
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["replay"]["description"].startswith("Share of general text")
    text, sources, one_source, full = schema["$defs"]["Domain"]["anyOf"]
    assert (text["type"], sources["type"]) == ("string", "array")
    assert {"path", "generate", "held_out"} <= set(one_source["properties"])
    assert set(full["properties"]) == {"sources", "held_out"}


# ---- nothing else is ever raised

yaml_pieces = [*"[]{}:,-?&*!|>'\"%@`#~\n\t ", ": ", "- ", "\n  ", "data", "train", "tokens", "name", "null", "1e-4"]
yaml_pieces += [
    "!!int",
    "!!python/object:a",
    "---\n",
    "...",
    "%YAML 1.2\n",
    "%TAG ! x\n",
    "<<",
    "\\U",
    "FFFFFFFF",
    "\ufeff",
]
yaml_like = st.lists(st.sampled_from(yaml_pieces) | st.text(max_size=3), max_size=25).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=st.text() | yaml_like)
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^my\.yaml:\d+:\d+: "):
        parse_recipe(text, "my.yaml")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_in_a_file_are_a_recipe_or_a_recipe_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(str(file))


@settings(max_examples=50, deadline=None)
@given(name=st.text())
@example(name="")
@example(name="x" * 5000)
@example(name="/")
@example(name="a/../..")
def test_any_name_is_a_recipe_or_a_user_error(name: str) -> None:
    with pytest.raises(UserError):
        load_recipe(name)


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(["train.tokens", "data.domains.math", "seed_model", "mix", "finetune.mixture", "run", "name"])
    | st.text(),
    value=st.text() | yaml_like | plain_values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)
def test_any_override_gives_a_recipe_or_a_recipe_error(key: str, value: str) -> None:
    try:
        recipe = parse_recipe(SMALL, "my.yaml", [f"{key}={value}"])
    except RecipeError:
        return
    assert parse_recipe(dump_recipe(recipe), "my.yaml") == recipe


def test_paper_true_takes_the_papers_choice_where_the_recipe_is_silent() -> None:
    text = "extends: demo\n"
    ours, papers = parse_recipe(text, "my.yaml"), parse_recipe("paper: true\n" + text, "my.yaml")
    assert (ours.train.trainable, ours.mix.router_init) == ("feed_forward", "ridge")
    assert (papers.train.trainable, papers.mix.router_init) == ("all", "random")
    unlike = papers.model_dump()
    unlike["paper"], unlike["train"]["trainable"], unlike["mix"]["router_init"] = False, "feed_forward", "ridge"
    assert unlike == ours.model_dump()
    said = parse_recipe(text, "my.yaml", ["paper=true", "mix.router_init=zeros"])
    assert (said.train.trainable, said.mix.router_init) == ("all", "zeros")
    assert parse_recipe(dump_recipe(said), "my.yaml") == said


@pytest.mark.parametrize("broken", ["paper: maybe", "paper: true\ntrain: 3", "paper: true\nmix: []", "paper: true"])
def test_paper_true_hides_no_mistake(broken: str) -> None:
    base = "" if broken == "paper: true" else "extends: demo\n"
    with pytest.raises(RecipeError) as raised:
        parse_recipe(base + broken + "\n", "my.yaml")
    assert "my.yaml" in str(raised.value)


def test_paper_on_a_run_folder_is_refused_since_nothing_is_left_to_fill_in(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("demo")), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"train\.trainable=all mix\.router_init=random"):
        load_recipe(str(tmp_path), ["paper=true"])
    assert load_recipe(str(tmp_path), ["mix.router_init=random"]).mix.router_init == "random"


def test_blended_experts_get_random_routers_unless_the_recipe_says_otherwise() -> None:
    assert parse_recipe("extends: demo\nmix: {blend: true}\n", "my.yaml").mix.router_init == "random"
    with pytest.raises(RecipeError, match="needs experts with domains"):
        parse_recipe("extends: demo\nmix: {blend: true, router_init: ridge}\n", "my.yaml")
