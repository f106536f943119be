"""The page of `qdense report`: its numbers, and how it behaves in a real browser."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qdense.cli import main
from qdense.comparison.evaluations import load_evaluation
from qdense.experiments.blocks import Chart, Part, Section, Table, Text
from qdense.experiments.cells import SweepFolder
from qdense.experiments.experiment import load_experiment
from qdense.experiments.page import as_html, as_markdown, number_columns
from qdense.experiments.standing import standing
from tests.helpers import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def sections_of(markdown):
    """{title: text} of a report's Markdown."""
    parts = re.split(r"^#{1,3} (.+)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows_of(text, first):
    """The cells of the row that begins so."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
    ]


@pytest.fixture(scope="session")
def reported(swept, tmp_path_factory):
    """(the finished experiment, its folder of runs, the report's folder)"""
    file, folder, _ = swept
    output = tmp_path_factory.mktemp("report")
    runs = folder / "runs" / "sweeps"
    assert main(["report", str(file), "--runs", str(runs), "--output", str(output), "--price", "RTX 4090=0.5"]) == 0
    return load_experiment(file), SweepFolder(runs), output


def test_its_numbers_are_those_of_the_runs(reported):
    experiment, folder, output = reported
    sections = sections_of((output / "report.md").read_text())
    lora, dense = standing(experiment, folder)
    (row,) = rows_of(sections["Results"], "LoRA")[:1]
    losses = [outcome.loss for outcome in lora.finals.values()]
    assert row[1:5] == ["ours", "5,632", "5.85", f"{lora.learning_rate:g}"]
    assert row[5] == f"{sum(losses) / 2:.4f} ({losses[0]:.4f}, {losses[1]:.4f})"
    hits = [
        one
        for path in lora.evaluations.values()
        for one in load_evaluation(path).outcomes["wordproblems"]["paper"].values()
    ]
    assert row[7].startswith(f"{100 * sum(hits) / len(hits):.1f} ")
    rates = rows_of(sections["How each learning rate was found"], "LoRA")[0]
    assert rates[1:3] == [f"{lora.learning_rate:g}", "between two worse"]
    assert [float(cell) for cell in rates[3:]] == pytest.approx(list(lora.losses.values()), abs=1e-4)
    difference = rows_of(sections["Paired tests"], "DenseLoRA")
    assert difference[0][1] == "wordproblems"
    assert float(difference[1][1]) == pytest.approx(
        sum(dense.finals[seed].loss - lora.finals[seed].loss for seed in (1, 2)) / 2, abs=1e-4
    )
    curves = rows_of(sections["Loss curves"], "DenseLoRA")
    assert [row[1] for row in curves] == ["1", "2"]
    assert curves[0][2].endswith(f"4: {dense.finals[1].loss:.4f}")
    assert "base tiny" in sections["Results"]
    assert "qdense sweep" in sections["How to repeat it"]
    assert "torch" in sections["How to repeat it"]
    assert "at 0.5 an hour" in sections["Cost"]
    assert "effective rank" in sections["What training changed"]
    assert rows_of(sections["What training changed"], "LoRA")[0][1] == "A"
    assert "evaluate.clean is false" in sections["Test items in the training data"]


def test_nothing_has_run_yet(tmp_path, monkeypatch, capsys):
    """The published rows are there, marked, and what is left."""
    monkeypatch.chdir(tmp_path)
    assert main(["report", "paper/table1-llama3-8b", "paper/figure1-5"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in paths] == ["report.html", "report.md"]
    text = paths[1].read_text()
    assert "Unfinished: 31 runs or evaluations are left. `qdense sweep paper/table1-llama3-8b` continues." in text
    sections = sections_of(text)
    assert rows_of(text, "DenseLoRA r32 (bscny)")[0][1] == "independent"
    assert rows_of(text, "LoKr")[0][1:6] == ["published (third-party notes)", "0.01", "65.1", "81.6", "(80)"]
    kinds = [row.split(" | ")[1].strip() for row in text.splitlines() if row.startswith("|") and "published" in row]
    assert kinds == sorted(kinds)
    assert "Paired tests" not in sections


def test_a_failed_run_is_reported(copied, capsys):
    experiment = load_experiment(copied)
    folder = SweepFolder(Path("runs/sweeps"))
    lora, _ = standing(experiment, folder)
    folder.of(lora.final(2)).settle("failed", "it rained in")
    assert main(["report", str(copied), "--output", "out"]) == 0
    text = Path("out/report.md").read_text()
    assert "**A run of LoRA failed: it rained in**" in text
    assert rows_of(text, "LoRA")[0][5].count(",") == 0  # one seed is left


def test_the_committed_page_is_what_the_committed_runs_say(tmp_path):
    """tools/results/wordproblems: made again from the records of its runs, every number is the same. The weights are not in the
    repository, so maps of the updates are missing; and the planner's hours may change with the planner."""
    results = ROOT / "tools" / "results"
    assert main(["report", "small/wordproblems", "--runs", str(results / "sweeps"), "--output", str(tmp_path)]) == 0
    again = sections_of((tmp_path / "report.md").read_text())
    committed = sections_of((results / "wordproblems" / "report.md").read_text())
    assert again.keys() == committed.keys()
    for title in committed.keys() - {"What training changed", "Cost", "How to repeat it"}:
        assert again[title] == committed[title], title
    assert "Unfinished" not in committed["Set-up"]
    page = (results / "wordproblems" / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>([^<]+)</td>", page)
    assert len(rows_of(committed["Results"], "DenseLoRA")[0]) > 5
    for cell in rows_of(committed["Results"], "DenseLoRA")[0][:6]:
        assert cell in cells, cell  # the page and its twin say the same


def test_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "paper/tabel2"]) == 2
    assert 'did you mean "paper/table2"?' in capsys.readouterr().err
    Path("file").touch()
    assert main(["report", "paper/table2", "--output", "file"]) == 2
    assert "file" in capsys.readouterr().err


class _Scripts(HTMLParser):
    """Addresses and attributes that would run or load something."""

    def __init__(self):
        super().__init__()
        self.loads = []

    def handle_starttag(self, tag, attributes):
        self.loads += [
            (tag, key, value) for key, value in attributes if key in ("src", "srcset", "data", "onload", "onerror")
        ]
        self.loads += [(tag, key, value) for key, value in attributes if key == "href" and not value.startswith("#")]


NASTY = '</script><img src=x onerror=alert(1)> | `code` "quoted" <b>'


def nasty_page():
    chart = Chart(NASTY, NASTY, {"data": {"values": [{"x": NASTY}]}, "mark": "point", "encoding": {}}, None)
    table = Table(NASTY, ["a", NASTY], [[NASTY, "1"]], ["ours"], NASTY)
    return [Part(NASTY, NASTY, [Section("Results", [Text(NASTY, is_warning=True), table, chart])])]


def test_names_are_text_and_nothing_is_loaded(reported):
    for page in ((reported[2] / "report.html").read_text(), as_html(NASTY, nasty_page(), NASTY)):
        scripts = _Scripts()
        scripts.feed(page)
        assert scripts.loads == []
    assert "alert(1)</" not in as_html(NASTY, nasty_page(), NASTY)
    markdown = as_markdown(NASTY, nasty_page(), "made")
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 3  # header, rule and one row


def test_which_columns_are_numbers():
    table = Table(
        "", ["name", "a", "b", "c", "d"], [["x", "1,234", "0.5 [0.1, 0.9]", "", "LoRA"], ["y", ">= 3", "", "", "2"]]
    )
    assert number_columns(table) == {1, 2}


# --- in a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None and os.environ.get("QDENSE_REQUIRE_CHROMIUM") != "1":
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    # Without these, it asks its makers' hosts for updates.
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


def opened(browser, file, **options):
    """The drawn page, what its console said, and what it asked for."""
    page = browser.new_context(**options).new_page()
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined", timeout=60_000)
    return page, messages, requests


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_draws(browser, reported, width, scheme):
    file = reported[2] / "report.html"
    page, messages, requests = opened(browser, file, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert messages == []
    assert requests == [file.as_uri()]
    charts = page.locator(".chart")
    assert charts.count() >= 6  # sizes, losses, rates, and maps of A, B and M
    assert page.evaluate("document.documentElement.dataset.drawn") == str(charts.count())
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing makes the page scroll sideways
    for i in range(charts.count()):
        drawing = charts.nth(i).locator("svg[role=img]")
        assert drawing.get_attribute("aria-label") == charts.nth(i).get_attribute("data-about")
        box = drawing.bounding_box()
        assert 100 < box["width"] <= width
        assert drawing.locator("path, line, text").count() > 3
    # Axes can be read in both schemes: their texts have the page's own colour.
    ink = page.evaluate("getComputedStyle(document.body).color")
    texts = "[...document.querySelectorAll('.chart svg[role=img] .role-axis text')]"
    fills = page.evaluate(f"{texts}.map((text) => getComputedStyle(text).fill)")
    assert fills
    assert set(fills) == {ink}
    page.context.close()


def test_tables_sort_by_mouse_and_by_key(browser, reported):
    page, *_ = opened(browser, reported[2] / "report.html")
    table = page.locator("table").filter(has_text="All methods side by side")
    heading = table.locator("thead button").filter(has_text="trained").first

    def trained():
        return [text for text in table.locator("tbody tr td:nth-child(3)").all_text_contents()]

    heading.click()
    assert trained() == ["0", "5,632", "6,272"]
    assert table.locator("th[aria-sort=ascending]").count() == 1
    heading.focus()
    page.keyboard.press("Enter")
    assert trained() == ["6,272", "5,632", "0"]
    assert table.locator("th[aria-sort=descending]").count() == 1
    page.context.close()


def test_a_reader_chooses_tokens_and_sees_numbers(browser, reported):
    page, messages, _ = opened(browser, reported[2] / "report.html")
    curves = page.locator("figure").filter(has_text="Loss curves").first
    figure = "[...document.querySelectorAll('figure')].find((each) => each.textContent.includes('Loss curves'))"
    ticks = f"{figure}.querySelector('svg').textContent"
    before = page.evaluate(ticks)
    curves.get_by_label("tokens", exact=True).check()
    page.wait_for_function(f"{ticks} !== {json.dumps(before)}")
    curves.locator("summary").filter(has_text="The numbers").click()
    assert curves.locator("details table").is_visible()
    assert messages == []
    page.locator("#theme").click()
    dark = page.evaluate("document.documentElement.dataset.theme")
    page.locator("#theme").click()
    assert {dark, page.evaluate("document.documentElement.dataset.theme")} == {"dark", "light"}
    page.context.close()


def test_nasty_names_are_harmless(browser, tmp_path):
    file = tmp_path / "nasty.html"
    file.write_text(as_html(NASTY, nasty_page(), NASTY), encoding="utf-8")
    page, messages, requests = opened(browser, file)
    assert requests == [file.as_uri()]
    assert page.locator("img").count() == 0
    assert NASTY in page.locator("p.warning").inner_text().replace("code", "`code`")
    assert not [message for message in messages if "alert" in message]
    page.context.close()
