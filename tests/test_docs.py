"""What the documentation says exists: links and their anchors, commands, recipes, Python; and the Chinese README says
what the English one does."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import btx
from btx.cli.main import app
from btx.recipe.loading import parse_recipe, recipe_schema

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\)[^()\s]*)*)\)")
RECIPE = """
name: my
seed_model: {path: /models/seed}
data:
  general: general
  sequence_length: 2048
  domains: {law: ./law, general: ./general}
train: {domains: [law], tokens: 100e6}
finetune: {tokens: 50e6}
"""
"""What a block of a recipe is laid over."""


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, its language, its text."""

    where: str
    language: str
    text: str


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", match[3].strip(), match[4])
        for match in FENCE.finditer(text)
    ]


def blocks_of(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text("utf-8"))


# Links


def anchor(heading: str) -> str:
    """What GitHub makes of a heading (github-slugger's rules)."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return "".join(sign for sign in plain.strip().lower() if sign.isalnum() or sign in "-_ ").replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), re.MULTILINE)
    return {anchor(heading) for heading in headings} | set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_its_anchor_exist(page: Path) -> None:
    dead = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "`code`", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, wanted = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists():
            dead.append(f"{target}: there is no such file")
        elif wanted and wanted not in anchors(linked):
            dead.append(f"{target}: there is no such heading")
    assert not dead, "\n".join(dead)


def test_anchors_are_githubs() -> None:
    assert anchor("The run folder travels") == "the-run-folder-travels"
    assert anchor("Branch-Train-Merge: `btm_top1`, `btm_top2`") == "branch-train-merge-btm_top1-btm_top2"
    assert anchor("8. *Mixing* alone?") == "8-mixing-alone"
    assert anchor("从笔记本到集群") == "从笔记本到集群"


# Commands


def commands(text: str) -> Iterator[str]:
    """Every `btx ...` of a block for a shell, as words are written: continued lines joined, one command each."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"\s{3,}(?=btx )|&&|;(?= )", line):
            match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?btx (.*)", part)
            if match:  # a quotation that ends there began before btx: ssh there '... && btx ...'
                yield match[1].rstrip("'\"") if match[1].count("'") % 2 else match[1]


@cache
def all_commands() -> Any:
    """The group of all commands: of the click that typer brings, or of the installed one."""
    return get_command(app)


@cache
def schema() -> dict[str, Any]:
    return recipe_schema()


class NoCommand(Exception):
    """A command line that btx does not take."""


def parsed(command: str) -> dict[str, Any]:
    """The values of a command line as btx itself reads it.

    Raises:
        NoCommand: it takes no such command, option or value.
    """
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    words = words[: next((place for place, word in enumerate(words) if re.fullmatch(r"\||>>?|2>|&", word)), None)]
    if words in (["--install-completion"], ["--show-completion"]):  # they act when they are parsed
        return {}
    group = all_commands()
    root = group.context_class(group, info_name="btx")
    if words[0] in {name for option in group.params for name in option.opts}:  # btx --install-completion
        return {}
    try:
        name, found, rest = group.resolve_command(root, words)
        values: dict[str, Any] = found.make_context(name, rest, parent=root).params
    except Exception as error:
        if getattr(error, "exit_code", None) == 0:  # --help
            return {}
        if not hasattr(error, "format_message"):
            raise
        raise NoCommand(error.format_message()) from error
    return values


def unknown_key(override: str) -> str | None:
    """The first part of a dotted key that no recipe has."""
    node = schema()
    for part in override.partition("=")[0].split("."):
        choices = [node, *node.get("anyOf", []), *node.get("oneOf", [])]
        refs = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
        choices += [schema()["$defs"][ref] for ref in refs]
        following = [choice["properties"][part] for choice in choices if part in choice.get("properties", {})]
        open_ended = [choice["additionalProperties"] for choice in choices if choice.get("additionalProperties")]
        if not following and not open_ended:
            return part
        node = (following or open_ended)[0]
        if not isinstance(node, dict):
            return None
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_block_is_one_of_btx(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        for command in commands(block.text) if block.language in ("", "bash", "sh", "console") else ():
            try:
                values = parsed(command)
            except (NoCommand, ValueError) as error:
                wrong.append(f"{block.where}: btx {command}\n  {error}")
                continue
            for override in values.get("overrides") or ():
                if (part := unknown_key(override)) is not None:
                    wrong.append(f"{block.where}: btx {command}\n  a recipe has no {part!r} in {override}")
    assert not wrong, "\n".join(wrong)


def test_wrong_commands_are_noticed() -> None:
    text = "btx run my.yaml \\\n   mix.top_k=1    btx chat x --hot   # warm\nPATH=x btx ls | head"
    assert list(commands(text)) == ["run my.yaml  mix.top_k=1", "chat x --hot   # warm", "ls | head"]
    assert parsed("ls recipes | head")["what"] == "recipes"
    for wrong in ("rum my.yaml", "chat x --hot", "chat", "serve x --port many"):
        with pytest.raises(NoCommand):
            parsed(wrong)
    assert unknown_key("mix.topk=1") == "topk"
    assert unknown_key("mix.top_k=1") is None


# Recipes and Python


@pytest.mark.parametrize("block", blocks_of("yaml", "yml"), ids=lambda block: block.where)
def test_every_yaml_block_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    whole: dict[str, Any] = yaml.safe_load(RECIPE)
    for key, value in yaml.safe_load(block.text).items():
        whole[key] = whole[key] | value if isinstance(whole.get(key), dict) else value
    parse_recipe(yaml.safe_dump(whole, sort_keys=False), "my.yaml")


def missing_names(tree: ast.Module) -> Iterator[str]:
    """What a program takes from btx and btx has not: public names as `btx.name`, modules by import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "btx":
            if node.attr not in btx.__all__:
                yield f"btx.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "btx":
            for alias in node.names:
                if node.module == "btx" and alias.name not in btx.__all__:
                    yield f"from btx import {alias.name}"
                elif node.module != "btx" and not hasattr(importlib.import_module(node.module or ""), alias.name):
                    yield f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Import):
            yield from (
                f"import {alias.name}" for alias in node.names
                if alias.name.startswith("btx.") and importlib.util.find_spec(alias.name) is None
            )  # fmt: skip


@pytest.mark.parametrize("block", blocks_of("python", "py"), ids=lambda block: block.where)
def test_every_python_block_compiles_and_takes_from_btx_what_is_there(block: Block) -> None:
    assert not list(missing_names(ast.parse(block.text, block.where)))


def test_missing_names_are_noticed() -> None:
    program = "import btx, btx.nothing\nfrom btx import trian\nfrom btx.errors import Nothing\nbtx.rum(btx.run)"
    assert set(missing_names(ast.parse(program))) == {
        "import btx.nothing", "from btx import trian", "from btx.errors import Nothing", "btx.rum"
    }  # fmt: skip


# The site


def test_the_site_has_every_page_in_its_order_of_reading() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = re.findall(r"[\w.-]+\.md", str(settings["nav"]))
    beside = {"index.md", "index.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"}
    assert sorted(listed) == sorted(beside | {page.name for page in (ROOT / "docs").glob("*.md")})


# The Chinese README


def headings(page: Path) -> list[int]:
    return [len(level) for level in re.findall(r"^(#{1,6}) ", prose(page), re.MULTILINE)]


def figures(text: str) -> list[str]:
    """Numbers in a text, in its order sorted: translations may order a sentence's otherwise."""
    return sorted(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", re.sub(r"\]\([^)]*\)", "]", text)))


def sections(page: Path) -> list[str]:
    return re.split(r"^#{1,6} .*$", prose(page), flags=re.MULTILINE)


def code(text: str) -> str:
    """A block without its comments, which are translated."""
    return "\n".join(re.sub(r"\s*(?:^|\s)#\s.*$", "", line).rstrip() for line in text.splitlines())


def table_rows(page: Path) -> list[int]:
    return [line.count("|") for line in prose(page).splitlines() if line.startswith("|")]


def test_the_chinese_readme_has_the_headings_of_the_english_one() -> None:
    assert headings(CHINESE) == headings(ENGLISH)


def test_the_chinese_readme_has_the_code_of_the_english_one() -> None:
    english, chinese = blocks(ENGLISH), blocks(CHINESE)
    assert [block.language for block in chinese] == [block.language for block in english]
    for theirs, ours in zip(english, chinese, strict=True):
        assert code(ours.text) == code(theirs.text), f"{ours.where} is not {theirs.where}"


def test_the_chinese_readme_has_the_figures_tables_and_links_of_the_english_one() -> None:
    english, chinese = sections(ENGLISH), sections(CHINESE)
    for number, (theirs, ours) in enumerate(zip(english, chinese, strict=True)):
        assert figures(ours) == figures(theirs), f"figures of section {number}: {theirs.strip()[:60]!r}"
    assert table_rows(CHINESE) == table_rows(ENGLISH)
    linked = [sorted(set(LINK.findall(prose(page))) - {"README.md", "README.zh-CN.md"}) for page in (ENGLISH, CHINESE)]
    assert linked[1] == linked[0]


def test_every_extra_that_is_named_exists_and_no_two_are_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py")]
    named = re.findall(rf"{project['name']}\[([a-z0-9,]+)\]", "".join(path.read_text("utf-8") for path in sources))
    assert {extra for group in named for extra in group.split(",")} <= extras.keys()
    assert len({tuple(sorted(packages)) for packages in extras.values()}) == len(extras)
