"""Who may import whom around `qdense.ui`."""

import re
import subprocess
import sys

from tests.helpers import ROOT


def test_only_the_command_line_draws():
    importing = re.compile(r"^\s*(from|import) qdense\.ui\b|^\s*from qdense import .*\bui\b", re.MULTILINE)
    files = {path.relative_to(ROOT / "qdense") for path in (ROOT / "qdense").rglob("*.py")}
    found = {path.parts[0] for path in files if importing.search((ROOT / "qdense" / path).read_text())}
    assert found == {"cli", "ui"}


def test_the_display_of_training_knows_no_benchmarks():
    script = (
        "import sys\nimport qdense.ui.training\n"
        "known = {name for name in sys.modules if name.startswith(('qdense.benchmarks', 'qdense.comparison', 'torch'))}\n"
        "assert not known, known"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
