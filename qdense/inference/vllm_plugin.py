"""DenseLoRA in vLLM: a load format that reads the base as vLLM does, and adds an adapter to its layers.

    vllm serve BASE --load-format qdense --model-loader-extra-config '{"adapter": "runs/math10k"}'

vLLM finds `register` by the entry point in pyproject.toml, in the process of its engine and in each of its workers. It fuses
q, k and v, and gate and up, into one layer each; every slice of such a layer gets its own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from qdense.errors import AdapterError
from qdense.modeling.adapter_files import load_adapter, read_card, weights_digest
from qdense.modeling.load import load_skeleton
from qdense.modeling.locate import locate_adapter
from qdense.ops.denselora import ACTIVATIONS, encode
from qdense.recipe import model_recipe
from qdense.tuners.denselora import DenseLoraConfig
from qdense.tuners.denselora.layer import DenseLoraLinear

LOAD_FORMAT = "qdense"


def register() -> None:
    """Make the load format known to vLLM. It may be called several times."""
    register_model_loader(LOAD_FORMAT)(DenseLoraLoader)


class DenseLoraLoader(DefaultModelLoader):
    """Loads the base in vLLM's default way, then the adapter.

    Raises:
        AdapterError: no adapter is named, it does not belong to this base, or vLLM is asked for several devices.
    """

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        name = extra.pop("adapter", None)
        if not isinstance(name, str) or not name:
            raise AdapterError(
                '--load-format qdense: name the adapter: --model-loader-extra-config \'{"adapter": "runs/math10k"}\', a run, a '
                "folder or a hub id"
            )
        self.adapter = name
        load_config.model_loader_extra_config = extra  # the rest is for vLLM's loader
        load_config.load_format = "auto"
        super().__init__(load_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        parallel = vllm_config.parallel_config
        if (devices := parallel.tensor_parallel_size * parallel.pipeline_parallel_size) > 1:
            raise AdapterError(
                f"{self.adapter}: a DenseLoRA adapter runs on one device in vLLM, and {devices} are asked for. Use "
                "--tensor-parallel-size 1 and --pipeline-parallel-size 1"
            )
        folder = locate_adapter(self.adapter)
        layers = adapted_layers(folder, model_config.model, model_config.revision)
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        attach(model, layers, model_config.dtype, self.adapter)
        # The compiled graph has the adapter in it, and vLLM caches graphs by its configuration.
        assert isinstance(vllm_config.additional_config, dict)
        vllm_config.additional_config["qdense_adapter"] = weights_digest(folder)
        return model


class AdaptedLayer(NamedTuple):
    """What one linear layer of the base has of the adapter. See qdense/ops/denselora.py."""

    encoder: Tensor  # (r, d_in)
    m: Tensor  # (r, r)
    decoder: Tensor  # (d_out, r)
    scaling: float
    activation: str


def adapted_layers(folder: Path, base: str, revision: str | None = None) -> dict[str, AdaptedLayer]:
    """The adapter in `folder`, by the names that Transformers gives the layers of its base.

    Raises:
        AdapterError: it is no DenseLoRA adapter, or was made for another base.
    """
    recipe = model_recipe({"name": base, "revision": revision, "quantization": "none"}, "vLLM's model")
    model = load_adapter(load_skeleton(recipe), folder, read_card(folder))
    config = model.peft_config["default"]
    if not isinstance(config, DenseLoraConfig):
        raise AdapterError(
            f"{folder}: is a {config.peft_type} adapter; the load format qdense is for DenseLoRA. vLLM has --enable-lora for "
            "LoRA; `qdense export` and `qdense merge` turn others into what it can load"
        )
    return {
        name: AdaptedLayer(
            layer.shared["default"].encoder,
            layer.denselora_m["default"],
            layer.shared["default"].decoder,
            layer.scaling["default"],
            layer.activation["default"],
        )
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, DenseLoraLinear)
    }


def attach(model: nn.Module, layers: Mapping[str, AdaptedLayer], dtype: torch.dtype, name: str) -> None:
    """Add the adapted layers to vLLM's model of the base, in its compute dtype. Raises AdapterError if one has no place."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    left = dict(layers)
    placed: dict[tuple[int, ...], Tensor] = {}  # so that what layers share in the adapter is shared here too

    def place(device: torch.device, *tensors: Tensor) -> Tensor:
        """These tensors, one below the other."""
        key = tuple(map(id, tensors))
        if key not in placed:
            placed[key] = torch.cat([tensor.detach().to(device, dtype) for tensor in tensors])
        return placed[key]

    for key, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, kind = key.rpartition(".")
        kinds = packed.get(kind, [kind])
        slices = [left.pop(f"{parent}.{each}", None) for each in kinds]
        if not any(slices):
            continue
        sizes = list(layer.output_partition_sizes) if len(kinds) > 1 else [layer.output_size]
        weight = next(layer.parameters(), None)  # on a CPU, vLLM packs it away
        device = torch.device("cpu") if weight is None else weight.device
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        layer.quant_method = _AdaptedMethod(
            layer.quant_method,
            place(device, *(each.encoder for each in slices if each)),
            [
                _Slice(start, size, place(device, each.m), place(device, each.decoder), each.scaling, each.activation)
                for start, size, each in zip(starts, sizes, slices, strict=True)
                if each
            ],
        )
    if left:
        raise AdapterError(
            f"{name}: vLLM's {type(model).__name__} has no layer for {len(left)} of its {len(layers)} adapted ones: "
            f"{', '.join(sorted(left)[:3])}"
        )


class _Slice(NamedTuple):
    """One of the projections that are fused in a layer of vLLM's: where its output is, and its adapter there."""

    start: int
    size: int
    m: Tensor  # (r, r)
    decoder: Tensor  # (size, r)
    scaling: float
    activation: str


class _AdaptedMethod:
    """Stands before the method by which vLLM computes a linear layer, quantized or not, and adds the adapter to its output.

    Args:
        encoders: those of the slices, one below the other: (sum of r, d_in).
    """

    def __init__(self, method: Any, encoders: Tensor, slices: Sequence[_Slice]) -> None:
        self.method, self.encoders, self.slices = method, encoders, slices
        self.ranks = [len(each.m) for each in slices]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W0 x (..., all slices) plus the adapters."""
        _, (encoded,) = encode(x, [self.encoders], activation=self.slices[0].activation)
        output: Tensor = self.method.apply(layer, x, bias)
        for each, z in zip(self.slices, encoded.split(self.ranks, dim=-1), strict=True):
            delta = ACTIVATIONS[each.activation](F.linear(F.linear(z, each.m), each.decoder))
            output.narrow(-1, each.start, each.size).add_(delta, alpha=each.scaling)
        return output
