"""Which device a job runs on, and its memory. Only this module and `qdense doctor` ask."""

from __future__ import annotations

import os
import resource
import sys

import psutil
import torch

from qdense.errors import ModelError


def choose_device(wanted: str) -> torch.device:
    """The device that `model.device` ("auto", "cuda", "cpu") means on this machine. Raises ModelError."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if wanted == "cuda":
        built = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ModelError(
            f'model.device = "cuda", but {built}. Check nvidia-smi and the installed torch, or set model.device = "auto".'
        )
    return torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself. CUDA cards do from Ampere (2020) on; torch emulates it on older ones."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def memory_total(device: torch.device) -> int:
    """Total bytes of the card, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def memory_free(device: torch.device) -> int:
    """Free bytes on the card, or on the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_of_process() -> int:
    """Bytes of host memory in use by this process."""
    return int(psutil.Process().memory_info().rss)


def free_cache(device: torch.device) -> None:
    """Release memory that torch has reserved and does not use, after memory has run out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: GPU memory reserved, or without a GPU the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """The card's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_description(device: torch.device) -> str:
    """The card, or the CPU with the number of threads that torch uses, to show."""
    return device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
