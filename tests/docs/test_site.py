"""The documentation as a site: it builds without a warning, its reference names everything, and it needs no network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from qdense.runs import EvaluationFolder, RunFolder

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("zensical", reason="the site needs the extra docs")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(builder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    assert builder.build(folder) == 0
    return folder


@pytest.fixture(scope="module")
def pages(built) -> dict[str, str]:
    """The pages of the reference, as Markdown."""
    return {path.stem: path.read_text(encoding="utf-8") for path in (built / "source/reference").glob("*.md")}


def test_the_committed_reference_is_what_the_code_says(builder) -> None:
    stale = [
        place
        for place, text in builder.reference().items()
        if (ROOT / "docs" / place).read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `make docs`, and commit these"


def test_every_page_is_in_the_menu(built) -> None:
    menu = (ROOT / "docs/zensical.toml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(built / "source")) for path in (built / "source").rglob("*.md")}
    assert pages == set(re.findall(r'= "([\w/-]+\.md)"', menu))


@pytest.mark.parametrize("link", ["no-such-page.md", "quickstart.md#no-such-heading"])
def test_a_broken_link_fails(builder, tmp_path, link) -> None:
    builder.stage(tmp_path / "source")
    page = tmp_path / "source/index.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n[a link]({link})\n", encoding="utf-8")
    assert builder.build_staged(tmp_path) != 0


def test_a_link_to_a_missing_file_of_the_repository_fails(builder, monkeypatch, tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("[a module](../qdense/gone.py)", encoding="utf-8")
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"docs/page\.md: links to \.\./qdense/gone\.py"):
        builder._with_site_links("docs/page.md", "page.md", {})


def test_pages_need_no_network(built) -> None:
    """Whatever a browser loads by itself is in the site; links that a reader follows may lead anywhere."""
    files = [path for path in (built / "site").rglob("*") if path.suffix in {".html", ".css", ".svg"}]
    assert len(files) > 30
    loaded = r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\shref=["']?(?:https?:)?//"""
    fetched = r"""url\(["']?(?:https?:)?//|@import ["'](?:https?:)?//"""
    text = {path: path.read_text(encoding="utf-8") for path in files}
    assert [str(path) for path in files if re.search(f"{loaded}|{fetched}", text[path])] == []
    assert re.search(loaded, '<script type="x" src="https://unpkg.com/x">')
    assert re.search(fetched, 'src: url("https://cdnjs.com/font")')


def test_each_option_of_the_command_line_is_in_the_reference(pages) -> None:
    from qdense.cli import COMMANDS, build_parser

    sections = dict(part.split("\n", 1) for part in pages["command-line"].split("\n## ")[1:])
    for name in COMMANDS:
        arguments = [name, "check", "--help"] if name == "data" else [name, "--help"]
        shown = re.sub(r"`qdense [^`]*`", "", _help(build_parser(), arguments))  # of other commands
        section = sections["qdense " + " ".join(arguments[:-1])]
        options = set(re.findall(r"--[a-z][a-z0-9-]+", shown.split("examples")[0])) - {"--help"}
        assert [option for option in options if f"`{option}" not in section] == []


def _help(parser, arguments) -> str:
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        parser.parse_args(arguments)
    return shown.getvalue()


def test_each_key_of_a_recipe_is_in_the_reference(pages) -> None:
    """Against the resolved recipe of each method, which is written without these descriptions."""
    from qdense.methods import METHODS
    from qdense.recipe import flattened, recipe_from_tables

    sections = dict(re.findall(r"^##+ \[([\w.]+)\]\n(.*?)(?=^##)", pages["recipe"], re.MULTILINE | re.DOTALL))
    keys = set()
    for method in METHODS:
        base = {"name": "smollm2-135m", "quantization": "none"}
        tables = {"model": base, "data": {"name": "wordproblems"}, "adapter": {"method": method}}
        keys |= flattened(recipe_from_tables(tables, source="test").resolved()).keys()
        assert f"| `{method}` |" in pages["recipe"]
    assert len(keys) > 50
    for key in keys:
        table, _, name = key.rpartition(".")
        assert f"| `{name}` |" in sections[table], key


def test_each_name_in_a_run_folder_is_in_the_reference(pages) -> None:
    run = RunFolder(Path("RUN"))
    evaluation = EvaluationFolder(Path("RUN/eval/DIGEST"))
    paths = [run.recipe, run.metrics, run.skipped_rows, run.initial, run.adapter, run.checkpoints, run.logs, run.card]
    paths += [evaluation.settings, evaluation.sessions, evaluation.items, evaluation.summary]
    assert [path.name for path in paths if path.name not in pages["run-folder"]] == []


def test_each_public_name_is_in_the_reference(pages) -> None:
    import qdense

    assert [name for name in qdense.__all__ if f"\n## {name}\n" not in pages["python"]] == []
    assert "| `layer_groups` | `1` |" in pages["python"]
