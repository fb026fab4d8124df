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

# The floors of src/btx, from the ground up (docs/decisions.md): a package, or a module beside them, imports from the
# floors below its own and from nowhere else. A new package: one name in one of these lines.
FLOORS = """
errors number_texts markdown_text hub_names recipes
system_errors
files process metrics_file
outputs
choices
recipe model_files reporting
data moe
models
training
mixing baselines
run_folder
evaluation planning serving publishing
running stages
sweeps
python
cli
__main__
""".strip().splitlines()
FLOOR_OF = {package: number for number, floor in enumerate(FLOORS) for package in floor.split()}
WITHOUT_TORCH = (
    "errors number_texts markdown_text hub_names recipes system_errors files process metrics_file outputs choices "
    "recipe reporting run_folder running "
    "mixing.settings evaluation.aggregate evaluation.code_execution evaluation.code_jail evaluation.harness_checks "
    "evaluation.harness_files evaluation.compare serving.sampling publishing sweeps python"
).split()
"""Packages and modules that load neither torch nor transformers, not even through others."""
HEAVY = ("torch", "transformers")


def package_of(module: str) -> str:
    """First part of a module's dotted path below btx."""
    return module.split(".")[0]


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
    assert 10 <= len(btx.__all__) <= 25, "about 20 names: what is not for users stays in its module"
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


def test_every_package_has_its_floor() -> None:
    packages = {package_of(module) for module in modules()} | {"recipes"}
    assert packages == FLOOR_OF.keys(), "each package stands in one line of FLOORS in tests/test_surface.py"


def test_a_package_imports_only_from_floors_below_it() -> None:
    wrong = [
        f"{module} (floor {FLOOR_OF[source]}) imports {target} (floor {FLOOR_OF[wanted]})"
        for module, target in edges()
        if (source := package_of(module)) != (wanted := package_of(target)) and FLOOR_OF[source] <= FLOOR_OF[wanted]
    ]
    assert not wrong, "\n".join(wrong)


def in_circles(needs: dict[str, set[str]]) -> set[str]:
    """What lies in a circle or behind one."""
    done: set[str] = set()
    while ready := {name for name in needs.keys() - done if needs[name] <= done}:
        done |= ready
    return needs.keys() - done


def test_a_circle_is_recognised() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert in_circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_there_is_no_circle_between_packages_or_modules() -> None:
    between_packages: dict[str, set[str]] = {package_of(module): set() for module in modules()}
    between_modules: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target in edges():
        if package_of(module) != package_of(target):
            between_packages[package_of(module)].add(package_of(target))
        if not module.startswith(f"{target}."):  # a module may import from its own package
            between_modules[module].add(target)
    assert not in_circles(between_packages)
    assert not in_circles(between_modules)


def test_a_stage_imports_no_other_stage_but_the_training_they_share() -> None:
    no_stages = {"__init__", "training", "work", "one_task", "conversations"}
    stages = {f"stages.{file.stem}" for file in (SOURCE / "stages").glob("*.py") if file.stem not in no_stages}
    assert {"stages.seed", "stages.train", "stages.mix", "stages.finetune"} < stages
    between = [(module, target) for module, target in edges() if module in stages and target in stages]
    assert not between, between


def test_what_needs_no_torch_loads_neither_torch_nor_transformers() -> None:
    plain = [module for module in modules() if any(f"{module}.".startswith(f"{name}.") for name in WITHOUT_TORCH)]
    assert len(plain) > 40
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
