"""How sizes, durations and numbers are written, and streams whose reader goes away."""

import io
import os
import subprocess
import sys

import pytest

from qdense.text import clean
from qdense.ui.console import accuracy_text, duration, make_console, plain_decimals, size, sparkline


def test_control_characters_become_visible():
    assert clean("a\x1b[2Jb\x07\nc") == "a\\x1b[2Jb\\x07\\x0ac"
    assert clean("Grüße 数") == "Grüße 数"


def test_small_pieces():
    assert sparkline([], 5) == sparkline([1.0], 0) == ""
    assert sparkline([1.0, 1.0], 5) == "▁▁"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert [duration(x) for x in (0, 65, 3723, 260_000)] == ["0:00", "1:05", "1:02:03", "3d 00:13"]
    assert [size(x) for x in (5 * 2**20, 3 * 2**30)] == ["5 MiB", "3.0 GiB"]


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (100.0, 2, "100"),
        (99.96, 2, "100"),
        (243.4, 2, "243"),
        (4.0, 2, "4"),
        (4.14, 2, "4.1"),
        (0.0338, 2, "0.034"),
        (0.000012, 2, "0.000012"),
        (-0.0338, 2, "-0.034"),
        (0.0, 2, "0"),
        (float("nan"), 2, "nan"),
        (float("inf"), 2, "inf"),
        (0.023832, 4, "0.02383"),
        (1234.0, 3, "1234"),
    ],
)
def test_plain_decimals(number, digits, text):
    assert plain_decimals(number, digits) == text


def test_an_accuracy_with_its_interval():
    scored = {"accuracy": 0.531, "interval": (0.411, 0.648)}
    assert accuracy_text(scored) == "53.1 [41.1, 64.8]"
    assert accuracy_text(scored, digits=0) == "53.1 [41,65]"


def test_markup_in_names_is_text():
    stream = io.StringIO()
    make_console(stream).print("[bold]x[/bold] :skull:")
    assert stream.getvalue() == "[bold]x[/bold] :skull:\n"


def test_a_display_outlives_its_reader():
    """`| head`: the job runs to its end, and the interpreter's own last flush does not fail either."""
    script = (
        "import os, sys\nfrom qdense.events import Notice\nfrom qdense.ui.console import make_console\n"
        "from qdense.ui.training import TrainingDisplay\n"
        "with TrainingDisplay(make_console()) as show:\n    for _ in range(3): show(Notice('x' * 100_000))\n"
        "print('to its end', file=sys.stderr)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    outcome = subprocess.run(
        [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (outcome.returncode, outcome.stderr) == (0, "to its end\n")
