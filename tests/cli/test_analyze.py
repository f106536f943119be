"""`qdense analyze` as a user types it; what it computes is tested in tests/analysis."""

import sys

from qdense.cli import main


def test_a_missing_plotting_library_is_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", "nowhere"]) == 2
    message = 'error: qdense analyze needs matplotlib, which is not installed: pip install "qdense[plots]"\n'
    assert capsys.readouterr().err == message
