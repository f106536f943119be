"""The checks of `qdense doctor`: this machine and this installation, for troubleshooting and bug reports.

Only the standard library is imported at the top: a broken package must become a line with its remedy, never a
traceback. The required versions are those of pyproject.toml, read from the installed package's own metadata.
"""

from __future__ import annotations

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
LOW_MEMORY_BYTES = 2 * 2**30  # SmolLM2's demo takes 1.2 GiB
LOW_DISK_BYTES = 2 * 2**30
# What each extra is for, except `cuda`, which is checked with the kernels.
_EXTRAS = {
    "endpoint": "qdense evaluate --endpoint",
    "experiments": "qdense sweep or report",
    "plots": "qdense analyze",
    "serve": "qdense serve",
}
_IMPORTED_AS = {"vl-convert-python": "vl_convert"}
_TOLERANCE = 2e-2  # relative error of a bf16 product, which keeps 8 bits
_BUILDING = re.compile(r"\..+\.(\d+)")  # a hidden name that ends in the id of the process that uses it


@dataclass(frozen=True)
class Check:
    """One line. `state` is good, bad, or not here, which is not a fault. A bad one has a remedy."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """All checks, in the order shown. They contain no secret and no home folder's name."""
    checks: list[Check] = []
    with _quiet():
        for name, look in CHECKS.items():
            try:
                checks += look()
            except Exception as error:  # broken packages raise anything
                is_first = all(check.state != BAD for check in checks)
                remedy = _remedy_for(error) if is_first else "Fix what is bad above, then run this again."
                checks.append(Check(name, BAD, _one_line(error), remedy))
    return [replace(c, detail=_without_home(c.detail), remedy=_without_home(c.remedy)) for c in checks]


def _remedy_for(error: Exception) -> str:
    if isinstance(error, importlib.metadata.PackageNotFoundError):
        return "Install qdense itself, not only its source: pip install -e . in its folder."
    if isinstance(error, ImportError):
        return f"{_REINSTALL} {error.name or 'torch'}"
    return "This is unexpected: please report it, with this whole output."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the output of libraries during import out of the report: stdout may be JSON."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def versions() -> dict[str, str | None]:
    """Python, platform, commit, and package -> installed version, or None."""
    requirements = [*_required(), *(added for extra in ("cuda", *_EXTRAS) for added in _added_by(extra))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "qdense": _installed("qdense"),
        "commit": git_hash(),
        **{requirement.name: _installed(requirement.name) for requirement in requirements},
        "triton": _installed("triton"),
    }


# --- Python and packages ----------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("qdense")["Requires-Python"]
    found = platform.python_version()
    detail = f"{found} ({sys.executable}), {platform.platform()}"
    is_good = SpecifierSet(wanted).contains(found, prereleases=True)
    remedy = "" if is_good else f"Create an environment with Python {wanted}: python3.11 -m venv .venv"
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


def _optional_packages() -> Iterator[Check]:
    for extra, purpose in _EXTRAS.items():
        for requirement in _added_by(extra):
            name, found = requirement.name, _installed(requirement.name)
            if found is None:
                yield Check(name, NOT_HERE, f'not installed; {purpose} needs it: pip install "qdense[{extra}]"')
            else:
                yield _fault_of_package(requirement) or Check(name, GOOD, f"{found}, for {purpose}")


def _fault_of_package(requirement: Any) -> Check | None:
    """What is wrong with a required package: missing, too old, or impossible to import; else None."""
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    found = _installed(name)
    if found is None:
        return Check(name, BAD, f"not installed; {wanted} is needed", f'pip install "{wanted}"')
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, BAD, f"{found}; {wanted} is needed", f'pip install --upgrade "{wanted}"')
    try:
        importlib.import_module(_IMPORTED_AS.get(name) or name.replace("-", "_"))
    except Exception as error:  # broken packages raise anything
        return Check(name, BAD, f"{found} cannot be imported: {_one_line(error)}", f'{_REINSTALL} "{wanted}"')
    return None


def _required(extra: str = "") -> list[Any]:
    """What qdense requires on this machine, from its metadata; with an extra, also the extra's requirements."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("qdense") or [])
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def _added_by(extra: str) -> list[Any]:
    """What an extra requires in addition."""
    always = {requirement.name for requirement in _required()}
    return [requirement for requirement in _required(extra) if requirement.name not in always]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- devices ----------------------------------------------------------------------------------------------------------------


def _cuda() -> Iterator[Check]:
    import torch

    driver = driver_version()
    build = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if not torch.cuda.is_available():
        if driver is None:
            yield Check("CUDA", NOT_HERE, f"no NVIDIA driver; {build}; everything runs on the CPU, which is slow")
        elif torch.version.cuda is None:
            remedy = "pip install --force-reinstall torch, from PyPI rather than an index of CPU builds"
            yield Check("CUDA", BAD, f"driver {driver} is installed, but {build}", remedy)
        else:
            remedy = (
                f"Update the driver to one for CUDA {torch.version.cuda}; check nvidia-smi and CUDA_VISIBLE_DEVICES."
            )
            yield Check("CUDA", BAD, f"driver {driver} is installed, but torch finds no device; {build}", remedy)
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
    if capability < (8, 0):  # from Ampere on; torch emulates it on older cards
        detail += ", no bfloat16: model.dtype is float16 there, with a loss scale; untested on such a card"
    else:
        detail += ", bfloat16"
    if free_bytes < LOW_MEMORY_BYTES:
        return Check(name, BAD, detail, "Stop the other programs that use the card (nvidia-smi lists them).")
    return Check(name, GOOD, detail)


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return outcome.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _native_library() -> Iterator[Check]:
    """bitsandbytes has a library for each CUDA version, and one for CPUs. If none fits, it fails only when called."""
    import torch
    from bitsandbytes import functional

    from qdense.compat.bitsandbytes import native_library

    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = f"bitsandbytes {_installed('bitsandbytes')}"
    remedy = f"{_REINSTALL} bitsandbytes; python -m bitsandbytes shows which library it looks for"
    path = native_library()
    if path is None:
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
    detail = f"{version}, {Path(path).name} on {device}: values rounded to 8 bits are off by at most {error:.1g}"
    yield Check("bitsandbytes", GOOD if is_good else BAD, detail, "" if is_good else remedy)


def _kernels() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("kernels", NOT_HERE, "Triton's and Liger's kernels need CUDA; plain PyTorch is used instead")
        return
    for requirement in _added_by("cuda"):
        fault = _fault_of_package(requirement)
        found = f"{_installed(requirement.name)}: norms, rotary embeddings, SwiGLU"
        yield replace(fault, remedy='pip install "qdense[cuda]"') if fault else Check(requirement.name, GOOD, found)
    yield check_triton("cuda")


def check_triton(device: str) -> Check:
    """Compile and run the fused adapter. This also needs a C compiler, which no Python package installs."""
    import torch

    version = _installed("triton")
    if version is None:
        remedy = "pip install triton (on Windows: triton-windows); without it, the adapter runs in plain PyTorch"
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
        return Check(
            "Triton", BAD, f"{version}: off by {error:.1g}", 'Set training.kernels = "torch", and please report it.'
        )
    return Check("Triton", GOOD, f"{version}: the fused adapter agrees with plain PyTorch")


def _nf4() -> Iterator[Check]:
    """Compare a 4-bit layer, forward and backward, with the product of its unpacked weight."""
    import torch
    from bitsandbytes.nn import Linear4bit

    from qdense.compat.bitsandbytes import never_repack, unpacked_weight

    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    with torch.random.fork_rng([0] if device == "cuda" else []):
        torch.manual_seed(0)
        layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(device)
        x = torch.randn(32, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(32, 128, device=device, dtype=torch.bfloat16)
    never_repack(layer)  # as in a run
    output = layer(x)
    output.backward(gradient)
    weight = unpacked_weight(layer).float()
    errors = (
        _relative(output, x.float() @ weight.T),
        _relative(x.grad, gradient.float() @ weight),
    )
    took = time.monotonic() - started
    is_good = max(errors) < _TOLERANCE
    detail = f"on {device}: forward off by {errors[0]:.1g}, gradient by {errors[1]:.1g}, {took:.1f} s"
    yield Check("NF4", GOOD if is_good else BAD, detail, "" if is_good else f"{_REINSTALL} bitsandbytes torch")


def _relative(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expected value; infinite if a value is missing or not finite."""
    if found is None:
        return float("inf")
    expected = expected.detach().float()
    error = float((found.detach().float() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


# --- space ------------------------------------------------------------------------------------------------------------------


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    is_low = memory.available < LOW_MEMORY_BYTES
    detail = f"{_gib(memory.available)} of {_gib(memory.total)} free, {os.cpu_count()} CPUs"
    remedy = f"Close other programs: even the demo needs {_gib(LOW_MEMORY_BYTES)}." if is_low else ""
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
        is_low = usage.free < LOW_DISK_BYTES
        detail = f"{_gib(usage.free)} of {_gib(usage.total)} free under {folder}"
        yield Check(f"disk, {what}", BAD if is_low else GOOD, detail, remedy if is_low else "")


def _cache() -> Iterator[Check]:
    root = cache_dir()
    if not root.exists():
        yield Check("cache", GOOD, f"{root}: does not exist yet; it is created when it is first needed")
        return
    if not (root.is_dir() and os.access(root, os.R_OK | os.W_OK | os.X_OK)):
        remedy = f"Check who owns it (ls -ld {root}), or point QDENSE_CACHE to another folder."
        yield Check("cache", BAD, f"{root}: is not a folder that can be written to", remedy)
        return
    files = [path for path in root.rglob("*") if path.is_file()]
    prepared = [path for kind in ("models", "quantized") for path in _visible(root / kind)]
    num_bytes = sum(path.lstat().st_size for path in files)
    detail = f"{root}: {_gib(num_bytes)} in {len(files):,} files, {len(prepared)} prepared models"
    if prepared:
        detail += f" ({', '.join(path.name for path in prepared[:8])}{', ...' if len(prepared) > 8 else ''})"
    partial = [path for path in files if path.suffix == ".part"]
    if partial:
        detail += f"; {len(partial)} unfinished downloads, which will be resumed"
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
    """Whether it is an unfinished file or folder (see qdense/cache.py) whose process is gone."""
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
        yield Check("hub token", GOOD, "found; not shown here")
    else:
        detail = "none; gated models such as LLaMA need one: `hf auth login`, or set HF_TOKEN"
        yield Check("hub token", NOT_HERE, detail)


# --- words ------------------------------------------------------------------------------------------------------------------


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _without_home(text: str) -> str:
    """The home folder is often named after a person, and so may be folders elsewhere."""
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)} - {"/"}:
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    person = os.path.basename(home)
    if person not in ("", "root"):
        text = re.sub(rf"(?<=[/\\]){re.escape(person)}(?![\w.-])", "USER", text)
    return text


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python,
    "packages": _packages,
    "optional packages": _optional_packages,
    "CUDA": _cuda,
    "bitsandbytes": _native_library,
    "kernels": _kernels,
    "NF4": _nf4,
    "memory": _memory,
    "disk": _disk,
    "cache": _cache,
    "hub token": _hub_token,
}
