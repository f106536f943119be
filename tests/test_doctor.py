"""`qdense doctor`: what is broken becomes a line with its remedy, and no line reveals a secret."""

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from qdense import doctor
from qdense.cli import main
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "cache"))


def check_named(name):
    found = [check for check in doctor.diagnose() if check.name == name]
    assert len(found) == 1, found
    return found[0]


def test_a_sound_machine_has_nothing_bad(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in " ".join(printed.split())
    assert "no problems found" in printed


def test_json_holds_every_check_and_all_versions(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(set(check) == {"name", "state", "detail", "remedy"} for check in report["checks"])
    assert all(check["state"] in ("good", "not here") and not check["remedy"] for check in report["checks"])
    names = {check["name"] for check in report["checks"]}
    assert {"python", "packages", "CUDA", "bitsandbytes", "NF4", "memory", "disk, cache", "cache", "hub token"} <= names
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "platform", "qdense", "commit", "triton", "liger-kernel", "openai", "matplotlib"} <= set(
        report["versions"]
    )


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom qdense.cli import main\n"
        "try: main(['doctor', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'rich', 'packaging', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("requirement", "detail", "remedy"),
    [
        ("no-such-package>=1", "not installed; no-such-package>=1 is needed", 'pip install "no-such-package>=1"'),
        ("torch>=99", f"{torch.__version__}; torch>=99 is needed", 'pip install --upgrade "torch>=99"'),
    ],
)
def test_a_package_missing_or_too_old(monkeypatch, requirement, detail, remedy):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [requirement, 'ruff>=999; extra == "dev"'])
    check = check_named(requirement.partition(">")[0])
    assert (check.state, check.detail, check.remedy) == ("bad", detail, remedy)


@pytest.mark.parametrize(
    ("requirement", "name", "state", "detail", "remedy"),
    [
        ('torch>=2; extra == "plots"', "torch", "good", f"{torch.__version__}, for qdense analyze", ""),
        (
            'no-such-package>=1; extra == "plots"',
            "no-such-package",
            "not here",
            'not installed; qdense analyze needs it: pip install "qdense[plots]"',
            "",
        ),
        (
            'torch>=99; extra == "endpoint"',
            "torch",
            "bad",
            f"{torch.__version__}; torch>=99 is needed",
            'pip install --upgrade "torch>=99"',
        ),
    ],
)
def test_packages_of_extras(monkeypatch, requirement, name, state, detail, remedy):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["packaging", requirement])
    check = check_named(name)
    assert (check.state, check.detail, check.remedy) == (state, detail, remedy)


def test_the_extras_of_pyproject_are_those_that_doctor_and_commands_name():
    """The installed metadata may be older: this is read from the source."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [Requirement(text).name for text in extras["plots"]] == ["matplotlib"]
    assert [Requirement(text).name for text in extras["endpoint"]] == ["openai"]
    assert [Requirement(text).name for text in extras["experiments"]] == ["optuna", "altair", "vl-convert-python"]
    assert [Requirement(text).name for text in extras["serve"]] == ["fastapi", "uvicorn"]
    assert [Requirement(text).name for text in extras["vllm"]] == ["vllm"]
    assert not {"matplotlib", "openai", "optuna", "altair", "fastapi", "uvicorn", "vllm"} & {
        Requirement(text).name for text in project["dependencies"]
    }
    assert "qdense[docs,endpoint,experiments,plots,serve,trackers]" in extras["dev"]


@pytest.mark.parametrize("package", ["torch", "peft", "rich", "packaging"])
def test_a_package_that_cannot_be_imported_is_a_line(package, tmp_path):
    """In a separate process, where nothing is imported yet."""
    (tmp_path / f"{package}.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    outcome = subprocess.run(
        [sys.executable, "-m", "qdense", "doctor"], capture_output=True, text=True, env=environment, check=False
    )
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    printed = " ".join(outcome.stdout.split())
    assert "libfoo.so.1" in printed
    if package != "packaging":  # which only doctor itself uses
        assert f'--force-reinstall "{package}' in printed


def test_a_native_library_that_is_missing(monkeypatch):
    import bitsandbytes.cextension as cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no library"))
    check = check_named("bitsandbytes")
    assert check.state == "bad"
    assert "python -m bitsandbytes" in check.remedy


def test_a_4_bit_layer_that_computes_wrongly_is_bad(monkeypatch):
    from bitsandbytes.nn import Linear4bit

    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x: forward(layer, x) * 1.1)
    assert check_named("NF4").state == "bad"
    # a right output with a wrong gradient
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x: 2 * forward(layer, x) - forward(layer, x).detach())
    assert check_named("NF4").state == "bad"


def test_leftovers_of_interrupted_work(tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for folder in (
        "models/whole",
        "quantized/damaged",
        f"models/.dead.{gone.stdout.strip()}",
        f"models/.at-work.{os.getpid()}",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/whole/config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.json.part").write_text("[")
    checks = {check.name: check for check in doctor.diagnose()}
    assert "2 prepared models" in checks["cache"].detail
    assert "1 unfinished downloads" in checks["cache"].detail
    assert (checks["prepared models"].state, "quantized/damaged" in checks["prepared models"].remedy) == ("bad", True)
    assert ".dead." in checks["leftovers"].remedy
    assert "at-work" not in checks["leftovers"].remedy


def test_a_cache_that_is_not_there_or_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "new"))
    assert check_named("cache").state == "good"
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").write_text("")
    assert check_named("cache").state == "bad"


def test_no_room(monkeypatch):
    scarce, full = psutil.virtual_memory()._replace(available=1000), shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: scarce)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    bad = {check.name: check for check in doctor.diagnose() if check.state == "bad"}
    assert set(bad) == {"memory", "disk, cache", "disk, here"}
    assert "QDENSE_CACHE" in bad["disk, cache"].remedy


def test_neither_token_nor_home_is_shown(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home" / "jane.doe"
    (home / "cache" / "models" / "x").mkdir(parents=True)
    for name, value in {
        "HOME": home,
        "QDENSE_CACHE": home / "cache",
        "HF_TOKEN": "hf_secret",
        "OPENAI_API_KEY": "sk-secret",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)
    assert main(["doctor", "--json"]) == 1  # x is no model
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "scratch" / "jane.doe" / "cache"))
    main(["doctor", "--json"])
    printed = capsys.readouterr().out
    assert "found; not shown here" in printed
    assert "secret" not in printed
    assert "jane.doe" not in printed
    assert "~/cache" in printed
    main(["doctor"])
    assert "jane.doe" not in capsys.readouterr().out


class FakeCuda:
    """What torch.cuda says of a machine with one card."""

    def __init__(self, capability=(9, 0), free_bytes=60 * 2**30, is_available=True):
        self.capability, self.free_bytes, self.is_found = capability, free_bytes, is_available

    def is_available(self):
        return self.is_found

    def device_count(self):
        return 1

    def get_device_capability(self, number):
        return self.capability

    def get_device_name(self, number):
        return "Card"

    def mem_get_info(self, number):
        return self.free_bytes, 80 * 2**30


@pytest.mark.parametrize(
    ("driver", "build", "cuda", "name", "state", "words"),
    [
        (None, None, FakeCuda(is_available=False), "CUDA", "not here", "no NVIDIA driver"),
        ("580.1", None, FakeCuda(is_available=False), "CUDA", "bad", "no CUDA"),
        ("470.1", "13.0", FakeCuda(is_available=False), "CUDA", "bad", "finds no device"),
        ("580.1", "13.0", FakeCuda(), "GPU 0", "good", "capability 9.0, 60.0 GiB of 80.0 GiB free, bfloat16"),
        ("580.1", "13.0", FakeCuda(capability=(7, 5)), "GPU 0", "good", "no bfloat16: model.dtype is float16 there"),
        ("580.1", "13.0", FakeCuda(free_bytes=2**20), "GPU 0", "bad", "0.0 GiB of 80.0 GiB free"),
    ],
)
def test_cuda_by_driver_build_and_card(monkeypatch, tmp_path, driver, build, cuda, name, state, words):
    if driver is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", build)
    check = check_named(name)
    assert check.state == state
    assert words in check.detail
    assert bool(check.remedy) == (state == "bad")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_fused_adapter_is_compared_with_the_plain_one(monkeypatch):
    triton = pytest.importorskip("qdense.ops.denselora_triton")
    assert doctor.check_triton("cpu").state == "good"

    encode = triton.encode
    monkeypatch.setattr(triton, "encode", lambda x, encoders: (x, (encode(x, encoders)[1][0] * 1.1,)))
    assert "off by" in doctor.check_triton("cpu").detail

    def fail(x, encoders):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(triton, "encode", fail)
    check = doctor.check_triton("cpu")
    assert check.state == "bad"
    assert "Failed to find C compiler" in check.detail
    assert "gcc" in check.remedy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_cuda():
    states = {check.name: check.state for check in doctor.diagnose()}
    assert states["Triton"] == states["liger-kernel"] == states["NF4"] == states["GPU 0"] == "good"
