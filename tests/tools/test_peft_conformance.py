"""A few of PEFT's own tests with our tuners; tools/results/peft.md has all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW = "MLP and (save_pretrained or disable or delete or adapter_name)"


@pytest.mark.slow
def test_some_of_pefts_own_tests_pass_with_our_tuners(tmp_path):
    table = tmp_path / "peft.md"
    command = [
        sys.executable,
        str(ROOT / "tools/peft_conformance.py"),
        "--only",
        FEW,
        "--workers",
        "1",
        "--output",
        str(table),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in table.read_text().splitlines() if line.startswith("| test_custom_models"))
    num_passed, num_failed = (int(cell) for cell in row.split("|")[2:4])
    assert num_passed >= 100
    assert num_failed == 0
