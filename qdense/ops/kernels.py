"""Which kernels compute the adapter, plain PyTorch or the fused ones, and which the base can use."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor

from qdense.catalogs.families import FAMILIES
from qdense.ops import denselora
from qdense.ops.interpreter import is_interpreted

KERNELS = ("auto", "torch", "triton")
_choice = "auto"
_MAX_STEP_TOKENS = 256


def use_kernels(choice: str) -> None:
    """Set which kernels adapters use from now on in this process.

    Args:
        choice: "auto" uses the fused kernels on CUDA and plain PyTorch elsewhere; "torch" and "triton" force either.

    Raises:
        ValueError: unknown, or "triton" if Triton is not installed.
    """
    global _choice
    if choice not in KERNELS:
        raise ValueError(f"kernels = {choice!r}: must be one of {', '.join(KERNELS)}")
    if choice == "triton" and not has_triton():
        raise ValueError(f'kernels = "triton": {why_not_triton("cuda")}; or use "auto"')
    _choice = choice


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device_type: str) -> str | None:
    """Why the fused kernels cannot run on a device of this type ("cuda", "cpu"); None if they can."""
    if not has_triton():
        return "Triton is not installed (pip install triton; on Windows: triton-windows)"
    if device_type != "cuda" and not is_interpreted():
        return "it needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    return None


def why_no_liger(model_type: str) -> str | None:
    """Why a base of this type cannot use Liger's kernels; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return 'liger-kernel is not installed (pip install "qdense[cuda]")'
    tested = [family.model_type for family in FAMILIES.values() if family.has_liger]
    if model_type not in tested:
        return f"Liger's kernels are tested for {', '.join(tested)}, not for {model_type}"
    return None


def is_fused(x: Tensor) -> bool:
    """Whether operations on `x` are the fused ones. Raises ValueError if they are forced and cannot run."""
    if not (_choice == "triton" or (_choice == "auto" and x.device.type == "cuda" and has_triton())):
        return False
    if fault := why_not_triton(x.device.type):
        raise ValueError(f'kernels = "triton": {fault}; use "auto"')
    return True


def adapter_ops(x: Tensor) -> ModuleType:
    """The module whose `encode`, `decode` and `add` to use for `x`."""
    return importlib.import_module("qdense.ops.denselora_triton") if is_fused(x) else denselora  # imports Triton


def encoding_ops(x: Tensor, *, is_training: bool) -> ModuleType:
    """As `adapter_ops`, for `encode` alone.

    In a step of generation x has too few tokens to fill a card with programs that each read all of their width; cuBLAS splits it.
    """
    is_step = not is_training and x.numel() <= _MAX_STEP_TOKENS * x.shape[-1]
    return denselora if is_step else adapter_ops(x)
