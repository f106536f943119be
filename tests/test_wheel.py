"""The wheel alone, used from an empty folder: everything that the commands need is in it, the built-in recipes too."""

import os
import subprocess
import sys

import pytest

from qdense.recipe import builtin_recipes


@pytest.fixture(scope="module")
def installed(tmp_path_factory, request):
    """Run the `qdense` of a freshly built wheel. Its dependencies are this environment's."""
    site, wheels = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, request.config.rootpath], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)

    def run(*arguments, cwd):
        environment = {key: value for key, value in os.environ.items() if key != "QDENSE_DATA"} | {
            "PYTHONPATH": str(site)
        }
        command = [sys.executable, "-P", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    where = run("-c", "import qdense; print(qdense.__file__)", cwd=site).stdout
    assert where.startswith(str(site)), where
    return run


def test_recipes_are_found_by_name(installed, tmp_path):
    for name in builtin_recipes():
        planned = installed("-m", "qdense", "plan", name, "--memory", "24GiB", cwd=tmp_path)
        assert "fits: " in planned.stdout, (name, planned.stderr)
    assert len(builtin_recipes()) >= 4
    unknown = installed("-m", "qdense", "plan", "math10", cwd=tmp_path)
    assert unknown.returncode == 2
    assert 'no such file, and no built-in recipe; did you mean "math10k"?' in unknown.stderr


def test_experiments_are_found_by_name_and_reported(installed, tmp_path):
    planned = installed("-m", "qdense", "sweep", "paper/table2", "--dry-run", "--memory", "24GiB", cwd=tmp_path)
    assert "DenseLoRA r64" in planned.stdout, planned.stderr
    reported = installed("-m", "qdense", "report", "paper/table2", "--output", "page", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert "<table>" in (tmp_path / "page" / "report.html").read_text()


def test_the_demo_trains(installed, tmp_path):
    command = ["-m", "qdense", "train", "demo", "--set", "training.max_steps=1", "--set", "data.validation_rows=4"]
    trained = installed(*command, "--output", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert 'git_hash = "unknown"' in (tmp_path / "run" / "recipe.toml").read_text()
