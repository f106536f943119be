"""One finished sweep of a tiny experiment, for all tests that only read it."""

import shutil

import pytest
from filelock import FileLock

from tests.helpers.experiments import start_sweep, write_experiment
from tests.helpers.models import make_tiny_model


@pytest.fixture(scope="session")
def swept(tmp_path_factory, worker_id):
    """(the experiment's file, the folder in which `qdense sweep` has run, what it printed). To be copied, not changed."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "swept"  # one for all workers of pytest
    file, printed = folder / "tiny.toml", folder / "printed.txt"
    with FileLock(folder.with_suffix(".lock")):
        if not printed.is_file():
            folder.mkdir(exist_ok=True)
            write_experiment(folder, make_tiny_model(folder / "tiny"))
            worker = start_sweep(file, "--jobs", "2", cwd=folder)
            text, _ = worker.communicate(timeout=600)
            assert worker.returncode == 0, text
            printed.write_text(text)
    return file, folder, printed.read_text()


@pytest.fixture
def copied(swept, tmp_path, monkeypatch):
    """The same, to be changed; it is the working directory."""
    file, folder, _ = swept
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.chdir(copy)
    return copy / file.name
