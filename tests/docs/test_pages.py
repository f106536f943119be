"""README.md and docs/: every command, recipe and example that a page prints is run or checked as it is printed.

A fenced block's language says what it is:

    sh        runs under bash, after the blocks above it on its page
    console   "$ command" runs, and the lines below it must be its output; "..." stands for any lines
    python    runs, all blocks of a page in one interpreter
    toml      a recipe or part of one, or an experiment, that must be valid
    text      is only shown

A block with title="Needs ..." cannot run here. Its commands are checked against the parser, and its recipes are loaded. Each page
runs in a copy of the folder that the quickstart leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from qdense.cli import build_parser
from qdense.experiments.experiment import load_experiment
from qdense.recipe import load_recipe, recipe_from_tables

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = "docs/quickstart.md"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?P<language>\w*)(?: (?P<info>[^\n]*))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    needs: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        info = match["info"] or ""
        title = re.fullmatch(r'title="(Needs [^"]+)"', info)
        line = text[: match.start()].count("\n") + 1
        assert not info or title, f'{page}:{line}: a block\'s only option is title="Needs ...", not {info!r}'
        yield Block(page, line, match["language"], title[1] if title else "", match["text"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_PAGES = [
    page
    for page in PAGES
    if page != QUICKSTART
    and any(
        block.page == page and block.language in {"sh", "console", "python"} and not block.needs for block in BLOCKS
    )
]


def test_each_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "console", "python", "toml", "text"}
    assert len(BLOCKS) > 40


# --- blocks that run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_quickstart(tmp_path_factory, worker_id) -> Path:
    """The folder in which the quickstart's commands ran, once for all of pytest's processes."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder, outcome = shared / "quickstart", shared / "quickstart.outcome"
    with FileLock(f"{folder}.lock"):
        if not outcome.exists():
            folder.mkdir()
            try:
                run_page(QUICKSTART, folder)
                outcome.write_text("")
            except AssertionError as error:
                outcome.write_text(str(error))
    if failure := outcome.read_text():
        pytest.fail(failure)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Where `qdense` and `python` are this checkout's, as after an installation."""
    commands = folder.parent / f"{folder.name}.bin"
    commands.mkdir(exist_ok=True)
    for name, arguments in (("qdense", "-m qdense "), ("python", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        script.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "QDENSE_DATA", "TRITON_"))}
    here = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    return kept | here


def run_page(page: str, folder: Path) -> None:
    """Run the page's blocks in order. Raises AssertionError with the output of the one that failed."""
    python = ""
    for block in (block for block in BLOCKS if block.page == page and not block.needs):
        if block.language == "sh":
            run(block, f"set -euo pipefail\n{block.text}", folder)
        elif block.language == "console":
            for command, expected in transcript(block):
                output = run(block, command, folder)
                assert_shown(block, expected, output)
        elif block.language == "python":
            python += block.text
            (folder / "page.py").write_text(python, encoding="utf-8")
    if python:
        run(block, "python page.py", folder)


def run(block: Block, script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{block}: exit status {done.returncode}\n{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def transcript(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(command, lines of its output) of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *expected = part.splitlines()
        yield command, expected


def assert_shown(block: Block, expected: list[str], output: str) -> None:
    pattern = "".join(r"(?:.*\n)*" if line == "..." else rf"{re.escape(line.rstrip())}[ ]*\n" for line in expected)
    assert re.fullmatch(pattern, output), f"{block}: the page does not show this output:\n{output}"


def test_an_output_that_differs_is_found() -> None:
    block = Block("page.md", 1, "console", "", "")
    assert_shown(block, ["one", "...", " four"], "one  \ntwo\nthree\n four\n")
    for expected in (["one"], ["one", "2", "..."], ["...", "five"]):
        with pytest.raises(AssertionError, match=r"page\.md:1: the page does not show"):
            assert_shown(block, expected, "one\ntwo\n")


def test_quickstart(finished_quickstart) -> None:
    assert (finished_quickstart / "runs/my-rows/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("page", RUN_PAGES)
def test_page_runs(page, finished_quickstart, tmp_path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(finished_quickstart, folder)
    run_page(page, folder)


# --- blocks that cannot run ---------------------------------------------------------------------------------------------

_UNRUN = [block for block in BLOCKS if block.language == "sh" and block.needs]


def commands_in(script: str) -> Iterator[list[str]]:
    """The words of each `qdense` command, however it is started."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for start in (["qdense"], ["-m", "qdense"]):
            places = [i for i in range(len(words)) if words[i : i + len(start)] == start]
            places = [i for i in places if not (i and words[i - 1].startswith("--"))]  # an option's value
            if places:
                yield words[places[0] + len(start) :]
                break


@pytest.mark.parametrize("block", _UNRUN, ids=str)
def test_unrun_commands_are_valid(block, capsys) -> None:
    syntax = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert syntax.returncode == 0, syntax.stderr
    for words in commands_in(block.text):
        try:
            arguments = build_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{block}: qdense {shlex.join(words)}\n{capsys.readouterr().err}")
        check_names(arguments)


def check_names(arguments: argparse.Namespace) -> None:
    """Check that a command's recipe, overrides and tasks are known. Files of the reader's own are not here."""
    from qdense.benchmarks.tasks import tasks_named

    recipe = getattr(arguments, "recipe", None)
    if recipe is not None:
        load_recipe("demo" if recipe.endswith(".toml") else recipe, arguments.set)
    for experiment in [getattr(arguments, "experiment", None), *getattr(arguments, "experiments", [])]:
        if experiment is not None:
            load_experiment(experiment, arguments.set)
    tasks = getattr(arguments, "tasks", None)
    if tasks is not None and not tasks.endswith(".jsonl"):
        tasks_named(tasks)


def test_commands_are_found() -> None:
    found = [words[0] for block in _UNRUN for words in commands_in(block.text)]
    assert {"train", "evaluate", "init", "compare", "merge"} <= set(found)
    script = "python -m qdense plan a.toml # qdense\ntorchrun -m qdense train \\\n  b.toml"
    assert list(commands_in(script)) == [["plan", "a.toml"], ["train", "b.toml"]]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=str)
def test_recipes_and_experiments_are_valid(block, tmp_path) -> None:
    tables = tomllib.loads(block.text)
    if "variants" in tables:
        (tmp_path / "experiment.toml").write_text(block.text, encoding="utf-8")
        assert len(load_experiment(tmp_path / "experiment.toml").arms) > 1
        return
    defaults = {"model": {"name": "smollm2-135m"}, "data": {"path": "my-rows.jsonl"}}
    recipe_from_tables({**defaults, **tables}, source=str(block))


# --- README.md ----------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if ":" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


# --- docs/reference/json.md ---------------------------------------------------------------------------------------------

JSON_PAGE = ROOT / "docs/reference/json.md"


class Key(NamedTuple):
    path: tuple[str, ...]
    is_optional: bool


def documented(heading: str) -> list[Key]:
    """The keys of the first table below a heading."""
    text = JSON_PAGE.read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|$", section.split("With `--export")[0], re.MULTILINE)
    return [Key(tuple(key.replace("[]", ".[]").split(".")), meaning.startswith("Only")) for key, meaning in rows]


def paths_in(value: object, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*at, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from paths_in(item, (*at, "[]"))


def assert_documented(heading: str, value: object) -> None:
    """Every key is in the table, or below one whose parts the table does not list; and every key of the table is there."""
    keys = documented(heading)

    def fits(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
        return len(pattern) == len(path) and all(p in ("*", name) for p, name in zip(pattern, path, strict=True))

    found = set(paths_in(value))
    for path in found:
        is_known = any(fits(key.path, path[: len(key.path)]) or fits(key.path[: len(path)], path) for key in keys)
        assert is_known, f"{heading}: {'.'.join(path)} is not documented"
    for key in keys:
        is_there = any(fits(key.path, path) for path in found)
        assert is_there or key.is_optional, f"{heading}: {'.'.join(key.path)} is documented, but not there"


def commands(parser: argparse.ArgumentParser, name: str = "qdense") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for key, inner in action.choices.items():
            yield from commands(inner, f"{name} {key}")


def printed(folder: Path, command: str) -> object:
    block = Block("docs/reference/json.md", 1, "sh", "", command)
    return json.loads(run(block, command, folder))


@pytest.mark.parametrize(
    ("heading", "command"),
    [
        ("qdense plan --json", "qdense plan math10k --memory 24GiB --json"),
        ("qdense sweep --json", "qdense sweep paper/table2 --dry-run --memory 24GiB --json"),
        ("qdense params --json", "qdense params llama3-8b --json"),
        ("qdense tasks --json", "qdense tasks --json"),
        ("qdense models --json", "qdense models --json"),
        ("qdense doctor --json", "qdense doctor --json"),
        ("qdense data show --json", "qdense data show my-rows.toml --json"),
        ("qdense data check --json", "qdense data check my-rows.jsonl wordproblems --json"),
        ("qdense compare --format json", "qdense compare runs/my-rows runs/base-smollm2-135m --format json"),
        ("qdense analyze --json", "qdense analyze runs/my-rows --output analysis --json"),
        (
            "qdense score --json",
            """echo '{"index": 0, "completion": "58"}' > one.jsonl
            qdense score wordproblems one.jsonl --limit 1 --json""",
        ),
    ],
)
def test_json_is_as_documented(heading, command, finished_quickstart, tmp_path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(finished_quickstart, folder)
    assert_documented(heading, printed(folder, command))


def test_json_of_a_run_is_as_documented(finished_quickstart) -> None:
    (summary,) = finished_quickstart.glob("runs/my-rows/eval/*/summary.json")
    assert_documented("qdense evaluate --json", json.loads(summary.read_text()))
    metrics = (finished_quickstart / "runs/my-rows/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    for event in ("step", "validation"):
        assert_documented("metrics.jsonl", next(line for line in lines if line["event"] == event))


def test_json_of_a_merge_is_as_documented() -> None:
    import dataclasses

    from qdense.modeling.merge import MergeReport

    assert_documented("qdense merge --json", {field.name: 0 for field in dataclasses.fields(MergeReport)})


def test_json_of_an_export_is_as_documented() -> None:
    import dataclasses

    from qdense.modeling.export import ExportReport

    assert_documented("qdense export --json", {field.name: 0 for field in dataclasses.fields(ExportReport)})


def test_each_json_output_is_documented() -> None:
    text = JSON_PAGE.read_text(encoding="utf-8")
    with_json = [name for name, parser in commands(build_parser()) if "--json" in parser.format_help()]
    assert len(with_json) >= 9
    assert [name for name in with_json if f"## {name} --json" not in text] == []


def test_a_missing_and_an_unknown_key_are_found() -> None:
    with pytest.raises(AssertionError, match="surprise is not documented"):
        assert_documented("qdense params --json", {"surprise": 1})
    with pytest.raises(AssertionError, match="is documented, but not there"):
        assert_documented("qdense params --json", {"method": "lora"})
