"""README and docs: the shell blocks are run as printed, or their commands checked; recipes and Python in them are checked too."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from qdense.cli import build_parser
from qdense.recipe import builtin_recipes, load_recipe, recipe_from_tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<why>^<!-- not run: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    is_run: bool
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start("language")].count("\n") + 1
            yield Block(page, line, found["language"], found["why"] is None, found["text"])


BLOCKS = list(blocks())
SHELL = [block for block in BLOCKS if block.language == "sh"]


def commands(text):
    """The qdense commands of a block, as lists of words, without what a here-document holds."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["qdense"]:
            yield words[1:]


def test_the_readme_is_short_and_blocks_are_found():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    assert sum(block.is_run for block in SHELL) >= 5
    assert {block.language for block in BLOCKS} == {"sh", "toml", "python", "text"}


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_spelt_right(block):
    """Commands, options and recipe keys exist, also where the block cannot run here."""
    for words in commands(block.text):
        arguments = build_parser().parse_args(words)  # exits with what is wrong
        if (name := getattr(arguments, "recipe", None)) in builtin_recipes():
            load_recipe(name, arguments.set)
        elif name is not None:
            assert name.endswith(".toml"), f"{block}: neither a built-in recipe nor a person's own"
            settings = ['data.path="x.jsonl"', *arguments.set]
            load_recipe(own_recipe(name), settings)


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory):
    own_recipe.folder = tmp_path_factory.mktemp("recipes")


def own_recipe(name):
    path = own_recipe.folder / name
    path.write_text('[model]\nname = "smollm2-135m"\n[data]\npath = "x.jsonl"\n')
    return path


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL if block.is_run}), ids=lambda page: page.stem)
def test_what_a_page_says_can_be_typed(page, tmp_path):
    """All its blocks one after the other in one shell and one folder; a person's mistake would end it."""
    script = "set -e\n" + "".join(block.text for block in SHELL if block.page == page and block.is_run)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qdense").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qdense "$@"\n')
    (tmp_path / "bin" / "qdense").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QDENSE_CACHE": os.environ["QDENSE_CACHE"],
    }
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=str)
def test_tables_of_a_recipe_are_valid(block):
    tables = {"model": {"name": "smollm2-135m"}, "data": {"name": "math10k"}} | tomllib.loads(block.text)
    recipe_from_tables(tables, str(block))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_runs(block, tiny_model, tmp_path, monkeypatch):
    from qdense.modeling.load import load_base
    from qdense.recipe import ModelRecipe

    monkeypatch.chdir(tmp_path)
    base = load_base(ModelRecipe(name=str(tiny_model), device="cpu")).model
    exec(compile(block.text, str(block), "exec"), {"base": base})  # `base`: the model that the page speaks of


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "docs" / "mkdocs.yml"]
    built = subprocess.run([*command, "--site-dir", tmp_path], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING  -" not in built.stderr
    pages = {path.name for path in tmp_path.rglob("*.html")}
    assert {"recipe.html", "command-line.html", "quickstart.html"} <= pages
    for path in tmp_path.rglob(
        "*.html"
    ):  # nothing is loaded from a network; links lead there only where a reader follows one
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"(https?://[^\"]+)\"", path.read_text(encoding="utf-8")
        )
        assert not loaded, (path, loaded)
