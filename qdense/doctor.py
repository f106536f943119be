"""What `qdense doctor` looks at: this machine and this installation, for whom qdense does not work, and for bug reports.

Nothing here is imported at the top but the standard library: what is broken must become a line with its remedy, never a
traceback. The versions that are wanted are those of pyproject.toml, read from the installed package's own metadata.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdense.cache import cache_dir
from qdense.provenance import git_hash

GOOD, BAD, NOT_HERE = "good", "bad", "not here"

_REINSTALL = "pip install --upgrade --force-reinstall"
_LOW_MEMORY_BYTES = 2 * 2**30  # SmolLM2's demo takes 1.2 GiB
_LOW_DISK_BYTES = 2 * 2**30
_TOLERANCE = 2e-2  # of a bf16 product, relative: 8 bits are kept
_BUILDING = re.compile(r"\..+\.(\d+)")  # a hidden name that ends in the number of the process that works on it


@dataclass(frozen=True)
class Check:
    """One line. `state` is good, bad, or not here, which is no fault; a bad one has a remedy."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """All checks, in the order in which they are shown. No secret and no name of a home folder is in them."""
    checks: list[Check] = []
    with _quiet():
        for name, look in _CHECKS.items():
            try:
                checks += look()
            except Exception as error:  # what is broken raises whatever it likes
                is_first = all(check.state != BAD for check in checks)
                remedy = _remedy_for(error) if is_first else "Mend what is bad above, then look again."
                checks.append(Check(name, BAD, _one_line(error), remedy))
    return [replace(c, detail=_without_home(c.detail), remedy=_without_home(c.remedy)) for c in checks]


def _remedy_for(error: Exception) -> str:
    if isinstance(error, importlib.metadata.PackageNotFoundError):
        return "Install qdense, and not only its source: pip install -e . in its folder."
    if isinstance(error, ImportError):
        return f"{_REINSTALL} {error.name or 'torch'}"
    return "This is not foreseen: report it with all these lines."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say while they are imported out of the report: stdout may be JSON."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def versions() -> dict[str, str | None]:
    """Python, platform, commit, and package -> installed version; None where there is none."""
    named = {requirement.name: _installed(requirement.name) for requirement in _required("cuda")}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "qdense": _installed("qdense"),
        "commit": git_hash(),
        **named,
        "triton": _installed("triton"),
    }


# --- Python and packages ----------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("qdense")["Requires-Python"]
    found = platform.python_version()
    detail = f"{found} ({sys.executable}), {platform.platform()}"
    is_good = SpecifierSet(wanted).contains(found, prereleases=True)
    remedy = "" if is_good else f"Make an environment with Python {wanted}: python3.11 -m venv .venv"
    yield Check("python", GOOD if is_good else BAD, detail, remedy)


def _packages() -> Iterator[Check]:
    good = []
    for requirement in _required():
        fault = _fault_of_package(requirement)
        if fault is None:
            good.append(f"{requirement.name} {_installed(requirement.name)}")
        else:
            yield fault
    yield Check("packages", GOOD, ", ".join(good))


def _fault_of_package(requirement: Any) -> Check | None:
    """What is wrong with a package that is required: missing, too old, or not to be imported; None if nothing is."""
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    found = _installed(name)
    if found is None:
        return Check(name, BAD, f"not installed; {wanted} is needed", f'pip install "{wanted}"')
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, BAD, f"{found}; {wanted} is needed", f'pip install --upgrade "{wanted}"')
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # a package that is broken raises whatever it likes
        return Check(name, BAD, f"{found} cannot be imported: {_one_line(error)}", f'{_REINSTALL} "{wanted}"')
    return None


def _required(extra: str = "") -> list[Any]:
    """What qdense requires on this machine, of its own metadata; with an extra, what that one adds too."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("qdense") or [])
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- devices ----------------------------------------------------------------------------------------------------------------


def _cuda() -> Iterator[Check]:
    import torch

    driver = _driver()
    build = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if not torch.cuda.is_available():
        if driver is None:
            yield Check("CUDA", NOT_HERE, f"no NVIDIA driver; {build}; everything runs on the CPU, slowly")
        elif torch.version.cuda is None:
            remedy = "pip install --force-reinstall torch, from PyPI and not from an index of CPU builds"
            yield Check("CUDA", BAD, f"driver {driver} is here, but {build}", remedy)
        else:
            remedy = (
                f"Update the driver to one for CUDA {torch.version.cuda}; check nvidia-smi and CUDA_VISIBLE_DEVICES."
            )
            yield Check("CUDA", BAD, f"driver {driver} is here, but torch finds no device; {build}", remedy)
        return
    yield Check("CUDA", GOOD, f"{build}, driver {driver or 'unknown'}")
    for number in range(torch.cuda.device_count()):
        yield _device(torch, number)


def _device(torch: Any, number: int) -> Check:
    name, capability = f"GPU {number}", torch.cuda.get_device_capability(number)
    free_bytes, total_bytes = torch.cuda.mem_get_info(number)
    detail = (
        f"{torch.cuda.get_device_name(number)}, capability {'.'.join(map(str, capability))}, "
        f"{_gib(free_bytes)} of {_gib(total_bytes)} free"
    )
    if capability < (8, 0):  # Ampere brought it; before, torch emulates it
        remedy = 'Set model.dtype = "float32" and adapter.dtype = "float32", or use a card from 2020 or later.'
        return Check(name, BAD, f"{detail}, no bfloat16", remedy)
    if free_bytes < _LOW_MEMORY_BYTES:
        return Check(name, BAD, detail, "End what else uses the card (nvidia-smi lists it).")
    return Check(name, GOOD, f"{detail}, bfloat16")


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return outcome.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _native_library() -> Iterator[Check]:
    """bitsandbytes brings a library for each CUDA version, and one for CPUs; where none fits, it fails when it is called."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.cextension import lib

    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = f"bitsandbytes {_installed('bitsandbytes')}"
    remedy = f"{_REINSTALL} bitsandbytes; python -m bitsandbytes tells which library it looks for"
    path = getattr(getattr(lib, "_lib", None), "_name", None)
    if not isinstance(getattr(lib, "_lib", None), ctypes.CDLL):
        yield Check("bitsandbytes", BAD, f"{version} has no native library for this machine", remedy)
        return
    values = torch.linspace(-1, 1, 4096, device=device)
    try:
        packed, state = functional.quantize_blockwise(values)
        error = float((functional.dequantize_blockwise(packed, state) - values).abs().max())
    except Exception as failure:
        yield Check("bitsandbytes", BAD, f"{version}: {_one_line(failure)}", remedy)
        return
    is_good = error < 0.02
    detail = f"{version}, {Path(path or '').name} on {device}: values through 8 bits are off by {error:.1g} at most"
    yield Check("bitsandbytes", GOOD if is_good else BAD, detail, "" if is_good else remedy)


def _kernels() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("kernels", NOT_HERE, "Triton's and Liger's kernels are for CUDA; here plain PyTorch computes")
        return
    always = {requirement.name for requirement in _required()}
    for requirement in _required("cuda"):
        if requirement.name not in always:
            fault = _fault_of_package(requirement)
            found = f"{_installed(requirement.name)}: norms, rotary embeddings, SwiGLU"
            yield replace(fault, remedy='pip install "qdense[cuda]"') if fault else Check(requirement.name, GOOD, found)
    yield check_triton("cuda")


def check_triton(device: str) -> Check:
    """The fused adapter compiled and run: that needs a C compiler too, which no Python package brings."""
    import torch

    version = _installed("triton")
    if version is None:
        remedy = "pip install triton (on Windows: triton-windows); without it, plain PyTorch computes the adapter"
        return Check("Triton", BAD, "not installed", remedy)
    from qdense.ops import denselora

    generator = torch.Generator(device).manual_seed(0)
    x, encoder = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in ((64, 128), (16, 128))
    )
    encoder /= 128**0.5
    try:
        from qdense.ops import denselora_triton

        fused = denselora_triton.encode(x, [encoder])[1][0]
    except Exception as failure:
        remedy = 'Install a C compiler (apt install gcc), or set training.kernels = "torch".'
        return Check("Triton", BAD, f"{version}: {_one_line(failure)}", remedy)
    error = _relative(fused, denselora.encode(x, [encoder])[1][0])
    if error > _TOLERANCE:
        return Check("Triton", BAD, f"{version}: off by {error:.1g}", 'Set training.kernels = "torch", and report it.')
    return Check("Triton", GOOD, f"{version}: the fused adapter agrees with plain PyTorch")


def _nf4() -> Iterator[Check]:
    """A 4-bit layer forward and backward, against the product with its own unpacked weight."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    with torch.random.fork_rng([0] if device == "cuda" else []):
        torch.manual_seed(0)
        layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(device)
        x = torch.randn(32, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(32, 128, device=device, dtype=torch.bfloat16)
    layer.support_avx512bf16_for_cpu = False  # as in a run: see qdense/modeling/load.py
    output = layer(x)
    output.backward(gradient)
    packed: Any = layer.weight
    weight = dequantize_4bit(packed.data, packed.quant_state).float()
    errors = (
        _relative(output, x.float() @ weight.T),
        _relative(x.grad, gradient.float() @ weight),
    )
    took = time.monotonic() - started
    is_good = max(errors) < _TOLERANCE
    detail = f"on {device}: forward off by {errors[0]:.1g}, gradient by {errors[1]:.1g}, {took:.1f} s"
    yield Check("NF4", GOOD if is_good else BAD, detail, "" if is_good else f"{_REINSTALL} bitsandbytes torch")


def _relative(found: Any, expected: Any) -> float:
    """Size of the difference over the size of what is expected; infinite where a value is missing or not finite."""
    if found is None:
        return float("inf")
    expected = expected.detach().float()
    error = float((found.detach().float() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


# --- room -------------------------------------------------------------------------------------------------------------------


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    is_low = memory.available < _LOW_MEMORY_BYTES
    detail = f"{_gib(memory.available)} of {_gib(memory.total)} free, {os.cpu_count()} CPUs"
    remedy = f"Close other programs: even the demo wants {_gib(_LOW_MEMORY_BYTES)}." if is_low else ""
    yield Check("memory", BAD if is_low else GOOD, detail, remedy)


def _disk() -> Iterator[Check]:
    for what, folder, remedy in (
        ("cache", cache_dir(), "Free some space, or point QDENSE_CACHE to another disk."),
        ("here", Path.cwd(), "Free some space, or give runs another --output."),
    ):
        existing = folder
        while not existing.exists():
            existing = existing.parent
        usage = shutil.disk_usage(existing)
        is_low = usage.free < _LOW_DISK_BYTES
        detail = f"{_gib(usage.free)} of {_gib(usage.total)} free under {folder}"
        yield Check(f"disk, {what}", BAD if is_low else GOOD, detail, remedy if is_low else "")


def _cache() -> Iterator[Check]:
    root = cache_dir()
    if not root.exists():
        yield Check("cache", GOOD, f"{root}: not there yet; it is made when something is prepared")
        return
    if not (root.is_dir() and os.access(root, os.R_OK | os.W_OK | os.X_OK)):
        remedy = f"Check who owns it (ls -ld {root}), or point QDENSE_CACHE to another folder."
        yield Check("cache", BAD, f"{root}: is no folder that can be written", remedy)
        return
    files = [path for path in root.rglob("*") if path.is_file()]
    prepared = [path for kind in ("models", "quantized") for path in _visible(root / kind)]
    num_bytes = sum(path.lstat().st_size for path in files)
    detail = f"{root}: {_gib(num_bytes)} in {len(files):,} files, {len(prepared)} prepared models"
    if prepared:
        detail += f" ({', '.join(path.name for path in prepared[:8])}{', ...' if len(prepared) > 8 else ''})"
    partial = [path for path in files if path.suffix == ".part"]
    if partial:
        detail += f"; {len(partial)} downloads begun, which go on from there"
    yield Check("cache", GOOD, detail)
    if damaged := [path for path in prepared if not (path / "config.json").is_file()]:
        yield Check(
            "prepared models", BAD, f"without a config.json: {_names(root, damaged)}", f"rm -r {_paths(damaged)}"
        )
    if left := [path for path in root.rglob(".*") if _is_left_over(path)]:
        yield Check("leftovers", BAD, f"left by interrupted work: {_names(root, left)}", f"rm -r {_paths(left)}")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _is_left_over(path: Path) -> bool:
    """Whether it is a file or folder in the making (see qdense/cache.py) whose process is gone."""
    import psutil

    found = _BUILDING.fullmatch(path.name)
    return found is not None and not psutil.pid_exists(int(found[1]))


def _names(root: Path, paths: list[Path]) -> str:
    return ", ".join(str(path.relative_to(root)) for path in paths)


def _paths(paths: list[Path]) -> str:
    import shlex

    return " ".join(shlex.quote(str(path)) for path in paths)


def _hub_token() -> Iterator[Check]:
    from huggingface_hub import get_token

    if get_token():
        yield Check("hub token", GOOD, "there is one; it is not shown")
    else:
        detail = "none; models that are gated, as LLaMA is, need one: `hf auth login`, or HF_TOKEN"
        yield Check("hub token", NOT_HERE, detail)


# --- words ------------------------------------------------------------------------------------------------------------------


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _without_home(text: str) -> str:
    """The home folder's name is often a person's, and so is that of a folder elsewhere."""
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)} - {"/"}:
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    person = os.path.basename(home)
    if person not in ("", "root"):
        text = re.sub(rf"(?<=[/\\]){re.escape(person)}(?![\w.-])", "USER", text)
    return text


_CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python,
    "packages": _packages,
    "CUDA": _cuda,
    "bitsandbytes": _native_library,
    "kernels": _kernels,
    "NF4": _nf4,
    "memory": _memory,
    "disk": _disk,
    "cache": _cache,
    "hub token": _hub_token,
}
