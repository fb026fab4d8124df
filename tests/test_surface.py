"""The surface and the inner order of the package: what it exports, which way its imports point, what it never does."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import btx
from btx import errors

SOURCE = Path(btx.__file__).parent

# Every module of src/btx by package, in the layers of docs/decisions.md; a package in a package (`domains`) stands for
# all modules in it. A module imports from its own layer and from those its layer lists in MAY_IMPORT, never upwards.
# A new module: add its name to the layer that fits. Without torch and without anything that needs it: plain.
LAYERS = {
    "": {
        "cli": "__main__",
        "plain": "errors recipes",
    },
    "cli": {
        "cli": "evaluate main mix sweep tables terminal",
        "pipeline": "catalogue",
        "stages": "chat",
    },
    "running": {
        "pipeline": "jobs models_of_run pipeline progress",
        "launchers": "launchers",
        "plain": "graph interrupts log_tail preflight rundir status threads",
    },
    "sweeps": {
        "pipeline": "sharing sweep variants",
        "pieces": "figure table",
    },
    "planning": {
        "stages": "plan",
        "pieces": "cost models speed",
    },
    "reporting": {
        "stages": "report",
        "pieces": "charts costs results token_texts tokens",
    },
    "evaluation": {
        "stages": "analyze compare evaluate",
        "pieces": "harness harness_model held_out mixed_set model_outputs tasks",
        "plain": "aggregate code_execution code_jail harness_checks harness_files",
    },
    "baselines": {
        "stages": "stage",
        "pieces": "btm btm_calls btm_model matching text_similarity",
        "plain": "kinds settings",
    },
    "training": {
        "stages": "finetune train",
        "pieces": "branch loop losses peak_memory schedule state trainable",
    },
    "mixing": {
        "stages": "drop extend mix",
        "pieces": "checks drift expert_parts extend_checks inputs merge merge_methods moe_folder moe_layout report",
        "plain": "merge_kinds",
    },
    "moe": {
        "pieces": "balancing dispatch expert_text layer router_fit router_init routers routing_metrics",
        "plain": "btx_folder router_kinds router_notes",
    },
    "data": {
        "stages": "prepare",
        "pieces": "mixture switching token_files tokenizer",
        "plain": "document_files domains json_lines sources",
    },
    "model_files": {
        "pieces": (
            "beside_weights checkpoints direct_file kv_cache lazy_tensors models output_types seed_config "
            "shard_writer vocabularies"
        ),
        "plain": "families folders model_card model_folder provenance",
    },
    "recipe": {
        "plain": (
            "data docs evaluate extends loading mix overrides problems schema section sizes training "
            "yaml_positions"
        ),
    },
}
LAYER_OF = {
    f"{package}.{name}".removeprefix("."): layer
    for package, layers in LAYERS.items() for layer, names in layers.items() for name in names.split()
}  # fmt: skip
MAY_IMPORT = {
    "cli": {"cli", "pipeline", "launchers", "stages", "pieces", "plain"},
    "pipeline": {"pipeline", "launchers", "stages", "pieces", "plain"},
    "launchers": {"launchers", "pieces", "plain"},
    "stages": {"pieces", "plain"},
    "pieces": {"pieces", "plain"},
    "plain": {"plain"},
}
# Stages do not import stages, but for these: one training path serves branches, the mixed model and the baselines.
STAGES_THAT_USE_STAGES = {
    ("training.finetune", "training.train"), ("baselines.stage", "training.train"), ("baselines.stage", "mixing.mix"),
}  # fmt: skip
HEAVY = ("torch", "transformers")


def layer_of(module: str) -> str | None:
    """Layer of a module by its dotted path, such as `data.domains.document`, or that of the package it is in."""
    parts = module.split(".")
    return next((layer for n in range(len(parts), 0, -1) if (layer := LAYER_OF.get(".".join(parts[:n])))), None)


@cache
def modules() -> dict[str, Path]:
    """Dotted path below btx → file; packages that hold nothing but their description are left out."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        described_only = file.stem == "__init__" and len(ast.parse(file.read_text("utf-8")).body) == 1
        if dotted and not described_only:
            found[dotted] = file
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text("utf-8"))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere: at the top, in functions, for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> Iterator[tuple[str, str]]:
    """(module, module it imports), both of btx."""
    known = modules()
    for module in known:
        wanted = {name.removeprefix("btx.") for name in imports_of(tree_of(module))}
        yield from ((module, target) for target in sorted(wanted & known.keys()) if target != module)


def in_a_new_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The surface


def test_the_public_names_are_these() -> None:
    assert sorted(btx.__all__) == btx.__all__
    assert {"load_recipe", "run", "plan", "mix", "soup", "load_model", "load_tokenizer", "write_report",
            "BtxError", "UserError", "Recipe", "RunFolder"} <= set(btx.__all__)  # fmt: skip
    assert 10 <= len(btx.__all__) <= 20, "about 15 names: what is not for users stays in its module"
    assert dir(btx) == btx.__all__


@pytest.mark.parametrize("name", btx.__all__)
def test_every_public_name_is_there_and_says_what_it_does(name: str) -> None:
    value = getattr(btx, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("btx.")
    assert value.__name__ == name


def test_no_package_takes_the_name_of_a_function() -> None:
    packages = {module.split(".")[0] for module in modules()}
    assert not packages & set(btx.__all__), "importing the package would hide the function"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        btx.trian  # noqa: B018 - the access is the test


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text("utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"
             for alias in node.names if (node.module or "").startswith("btx")}  # fmt: skip
    assert typed == set(btx.__all__)


@pytest.mark.parametrize("program", [
    "import btx; dir(btx); btx.load_recipe('demo')",
    "import sys; sys.argv = ['btx', '--help']\nfrom btx.cli.main import app\napp(standalone_mode=False)",
    "from btx.cli.main import app\napp(['ls', 'families'], standalone_mode=False)",
])  # fmt: skip
def test_neither_importing_btx_nor_its_help_imports_torch_or_transformers(program: str) -> None:
    check = f"\nimport sys; print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    assert in_a_new_process(program + check).endswith("loaded: []")


# The direction of imports


def test_every_module_has_its_layer() -> None:
    missing = [module for module in modules() if layer_of(module) is None]
    assert not missing, (
        f"new modules without a layer: {', '.join(missing)}. Add each to LAYERS in tests/test_surface.py: a stage (a "
        f"verb that a run or a command does) to 'stages', something that needs torch to 'pieces', all else to 'plain'"
    )
    known = {module.rsplit(".", cut)[0] for module in modules() for cut in (0, 1)}
    gone = [name for name in LAYER_OF if name not in known]
    assert not gone, f"no longer there, remove from LAYERS in tests/test_surface.py: {', '.join(gone)}"


def test_imports_point_downwards() -> None:
    upward = [
        f"{module} ({source}) imports {target} ({wanted})"
        for module, target in edges()
        if (source := layer_of(module)) and (wanted := layer_of(target))
        and wanted not in MAY_IMPORT[source]
        and not (source == wanted == "stages" and (module, target) in STAGES_THAT_USE_STAGES)
    ]  # fmt: skip
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_through_others() -> None:
    needs: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target in edges():
        if not module.startswith(f"{target}."):  # a module may import from its own package
            needs[module].add(target)
    done: set[str] = set()
    while ready := {module for module in needs.keys() - done if needs[module] <= done}:
        done |= ready
    circular = {module for module in needs.keys() - done if needs[module] - done}
    assert not circular, f"in or behind a circle: {sorted(circular)}"


def test_plain_modules_load_neither_torch_nor_transformers() -> None:
    plain = [module for module in modules() if layer_of(module) == "plain"]
    assert len(plain) > 20
    named = [f"{module} imports {name}" for module in plain
             for name in imports_of(tree_of(module))
             if name.split(".")[0] in HEAVY]  # fmt: skip
    assert not named, named
    program = f"import sys\nimport {', '.join(f'btx.{module}' for module in plain)}\n"
    assert in_a_new_process(program + f"print([name for name in {HEAVY} if name in sys.modules])") == "[]"


# Errors


def test_the_exception_tree_is_as_drawn() -> None:
    drawn: dict[str, tuple[str, int]] = {}
    above = {-1: "Exception"}
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"    ([│├└─ ]*)([A-Z]\w+) {2,}(?:\((btx\.[\w.]+)\) +)?.*", line)
        if found:
            depth = len(found[1]) // 4
            above[depth] = found[2]
            drawn[found[2]] = (above[depth - 1], getattr(import_module(found[3] or "btx.errors"), found[2]).exit_code)
    classes = {
        node.name: ast.unparse(node.bases[0])
        for module in modules() for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and node.bases and ast.unparse(node.bases[0]) in {"Exception", *drawn}
        and node.name != "YamlSyntaxError"  # never leaves the recipe reader
    }  # fmt: skip
    assert {name: parent for name, (parent, _) in drawn.items()} == classes
    assert drawn["BtxError"] == ("Exception", 1)
    assert drawn["RecipeError"] == ("UserError", 2)


# What the source never does


def test_no_file_is_called_after_nothing() -> None:
    names = {file.stem for file in SOURCE.rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}


def dangers_of(tree: ast.Module) -> Iterator[str]:
    """Whatever runs code from a file, or hides what is run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imports_of(ast.Module([node], [])):
                if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}:
                    yield f"line {node.lineno}: import {name}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "compile", "torch.load", "os.system",
                          "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}:  # fmt: skip
                yield f"line {node.lineno}: {called}()"
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg in {"trust_remote_code", "allow_pickle", "shell"} and value != "False":
                    yield f"line {node.lineno}: {keyword.arg}={value}"


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "torch.load('x.bin')", "eval('1')", "yaml.load(text)",
    "np.load(path, allow_pickle=True)", "model(trust_remote_code=True)", "model(trust_remote_code=flag)",
    "run('ls', shell=True)",
])  # fmt: skip
def test_dangers_are_recognised(line: str) -> None:
    assert list(dangers_of(ast.parse(line)))


@pytest.mark.parametrize("line", [
    "model.eval()", "yaml.safe_load(text)", "f(trust_remote_code=False)", "re.compile(x)", "np.load(path)",
])  # fmt: skip
def test_harmless_lines_are_no_dangers(line: str) -> None:
    assert not list(dangers_of(ast.parse(line)))


def test_nothing_unpickles_evaluates_or_trusts_remote_code() -> None:
    found = [f"{module}, {danger}" for module in modules() for danger in dangers_of(tree_of(module))]
    assert not found, "\n".join(found)
