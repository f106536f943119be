"""The machine that a plan is for: this one."""

from __future__ import annotations

from collections.abc import Iterator

from qdense.catalogs.models import CatalogModel
from qdense.device import choose_device, device_name, has_bfloat16, memory_free, memory_of_process
from qdense.ops.kernels import has_triton, why_no_liger, why_not_triton
from qdense.planning.memory import Kernels
from qdense.planning.plan import Machine
from qdense.planning.speed import card_named
from qdense.recipe import Recipe

_CPU_SHARE = 0.9  # of the free memory; other programs need some
_WORKSPACE_BYTES = 200 * 2**20  # cuBLAS, kernels; the free memory already excludes the context


def this_machine(recipe: Recipe, shape: CatalogModel) -> Machine:
    """The device that `recipe` will train on, with the memory that is free on it now. Raises ModelError."""
    device = choose_device(recipe.model.device)
    wants, is_cuda = recipe.training.kernels, device.type == "cuda"
    is_fused = has_triton() and (wants == "triton" or (wants == "auto" and is_cuda))
    kernels = Kernels(is_cuda, is_fused, has_liger=is_fused and why_no_liger(shape.model_type) is None)
    if is_cuda:
        name = device_name(device)
        return Machine(
            name, kernels, memory_free(device), _WORKSPACE_BYTES, card_named(name), has_bfloat16=has_bfloat16(device)
        )
    process_bytes = memory_of_process()
    memory_bytes = process_bytes + int(_CPU_SHARE * memory_free(device))
    return Machine("this machine", kernels, memory_bytes, process_bytes)


def slow_kernels(recipe: Recipe, shape: CatalogModel, machine: Machine) -> Iterator[str]:
    """Why a run on CUDA lacks faster kernels, unless the recipe asks for that."""
    if not machine.kernels.is_cuda or recipe.training.kernels == "torch":
        return
    if fault := why_not_triton("cuda"):
        yield fault
    elif reason := why_no_liger(shape.model_type):
        yield reason
