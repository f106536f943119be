"""A frozen base divided among processes, so that together they hold what none of them could alone.

Each process keeps a part of every decoder layer's weights. FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a layer before
it computes, in forward and in backward, and lets it go after. Only the base is divided: adapters, DenseLoRA's shared pairs among
them, stay whole on every process. So optimizer, checkpoints and gradients are those of a base that is not divided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qdense.planning.skeleton import decoder_layers


def divide(model: Any, device: torch.device) -> None:
    """Divide the frozen weights of the decoder layers, and move everything to `device`. Every process calls it.

    From now on all processes must call the model equally often, forward and backward.

    Args:
        model: a base with its adapter, loaded to the host by `load_base(..., to_divide=True)`.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A group of its own, because FSDP gathers ahead while the training loop exchanges numbers.
    mesh = DeviceMesh.from_group(torch.distributed.new_group(), device.type)
    for layer in decoder_layers(core):
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # The root, which divides nothing itself: without one, each layer would be a root, and stay gathered after its forward.
    whole = {parameter for parameter in core.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(core, mesh=mesh, ignored_params=whole)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
