"""Which device a job runs on, and what memory it has. Nothing else in the package asks, but for `qdense doctor`."""

from __future__ import annotations

import os
import resource
import sys

import psutil
import torch

from qdense.errors import ModelError


def choose_device(wanted: str) -> torch.device:
    """The device that `model.device` ("auto", "cuda", "cpu") stands for on this machine. Raises ModelError."""
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


def memory_total(device: torch.device) -> int:
    """Bytes of the card, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def memory_free(device: torch.device) -> int:
    """Bytes that are free now on the card, or on the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_of_process() -> int:
    """Bytes of host memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def free_cache(device: torch.device) -> None:
    """Give back to the card what torch holds of it without using it, after memory has run out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most GPU memory that was reserved so far, or the most memory of this process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """The card's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_description(device: torch.device) -> str:
    """For a person: the card, or the CPU with the number of threads that torch uses."""
    return device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
