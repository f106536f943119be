"""One adapted linear layer, the encoder and decoder that the layers of its kind share, and the input that layers share."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdense.compat.peft import cast_input
from qdense.ops.denselora import denselora_delta_weight
from qdense.ops.kernels import adapter_ops, encoding_ops
from qdense.tuners.base import AdaptedLinear
from qdense.tuners.denselora.config import DenseLoraConfig

# An activation's slope at 0, by which it scales a small signal.
_SLOPES = {"gelu": 0.5, "silu": 0.5, "tanh": 1.0, "none": 1.0}


def reset_m(m: Tensor, config: DenseLoraConfig) -> None:
    """Draw M (r, r) in place.

    "paper": Kaiming uniform with a = sqrt 5, so between -1 / sqrt r and 1 / sqrt r. M then passes on 1 / sqrt 3 of the size of
    the encoding, and each of the two activations its slope s at 0. So the decoder's first gradient is s^2 / sqrt 3 times that
    of LoRA's B: 1 / 6.9 for GELU.
    "balanced": sqrt 3 / s^2 times wider, which makes the two gradients equal. The adapter's equation stays the same.
    """
    if config.zero_init == "m":
        nn.init.zeros_(m)
    elif config.init == "balanced":
        bound = math.sqrt(3 / config.r) / _SLOPES[config.activation] ** 2
        nn.init.uniform_(m, -bound, bound)
    else:
        nn.init.kaiming_uniform_(m, a=math.sqrt(5))


class SharedPair(nn.Module):
    """Encoder (r, d_in) and decoder (d_out, r) of one module kind.

    No parameter is called `weight`, because PEFT's FSDP wrap policy treats modules with one as linear layers.
    """

    def __init__(self, r: int, d_in: int, d_out: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.empty(r, d_in, dtype=dtype, device=device))
        self.decoder = nn.Parameter(torch.empty(d_out, r, dtype=dtype, device=device))

    def reset_parameters(self, zero_init: str) -> None:
        """Draw the encoder Kaiming uniform (a = sqrt 5). As in the authors' code the decoder is zero: the adapter
        adds nothing, and since GELU'(0) = 0.5 it can learn. With another `zero_init` the decoder is drawn like the
        encoder."""
        nn.init.kaiming_uniform_(self.encoder, a=math.sqrt(5))
        if zero_init == "decoder":
            nn.init.zeros_(self.decoder)
        else:
            nn.init.kaiming_uniform_(self.decoder, a=math.sqrt(5))


class _EncodedInput(NamedTuple):
    """One input, and its encodings for the layers that have not fetched theirs yet."""

    source: weakref.ref[Tensor]  # the input that the layers receive
    x: Tensor | None  # what the frozen layers read in its place; None is the input itself, which must not be kept here
    waiting: dict[int, Tensor]  # encodings by the id of their layer's place


class SharedInput:
    """The adapted layers of one block that share an input: whichever runs first encodes it for all of them.

    So x is read once and its dropout mask is drawn once. Nothing is kept once the last layer has its encoding.
    """

    def __init__(self) -> None:
        self.layers: list[DenseLoraLinear] = []
        # By adapter, and by device: torch's DataParallel runs copies of the layers side by side, a thread for each device.
        self._encoded: dict[tuple[str, torch.device], _EncodedInput] = {}

    def encode(self, layer: DenseLoraLinear, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input for the frozen layer, and its encoding (..., r) for `layer`."""
        key, place = (adapter, x.device), id(layer.place)
        found = self._encoded.get(key)
        is_new = found is None or found.source() is not x or place not in found.waiting
        if found is None or is_new:
            found = self._encoded[key] = self._read(layer, adapter, x)
        encoding = found.waiting.pop(place)
        if not found.waiting:
            del self._encoded[key]
        elif is_new and encoding.requires_grad:
            # If another layer never reads x, as in cross-attention, its encoding goes with the backward pass.
            encoding.register_hook(lambda gradient, source=found.source: self._forget(key, source))
        return x if found.x is None else found.x, encoding

    def _forget(self, key: tuple[str, torch.device], source: weakref.ref[Tensor]) -> None:
        """Drop the encodings of this input, which no layer can want any more."""
        if (found := self._encoded.get(key)) is not None and found.source is source:
            del self._encoded[key]

    def _read(self, layer: DenseLoraLinear, adapter: str, x: Tensor) -> _EncodedInput:
        layers = [other for other in self.layers if other.place is layer.place or other.is_adapted_by(adapter)]
        encoders = [other.shared[adapter].encoder.to(x.device) for other in layers]
        cast = cast_input(layer, x, encoders[0].dtype)
        dropout = layer.dropout[adapter] if layer.training else 0.0
        ops = encoding_ops(x, is_training=layer.training)
        read, encoded = ops.encode(cast, encoders, activation=layer.activation[adapter], dropout=dropout)
        waiting = {id(other.place): encoding for other, encoding in zip(layers, encoded, strict=True)}
        source = weakref.ref(x, partial(self._forget, (adapter, x.device)))
        return _EncodedInput(source, read if cast is x and read is not x else None, waiting)


class DenseLoraLinear(AdaptedLinear):
    """A frozen linear layer (float, 4-bit or 8-bit) plus DenseLoRA's output for each active adapter.

    M is this layer's own parameter. The shared pair is registered once, on `DenseLoraModel`. Here an unregistered
    dictionary refers to it as a MODULE, because a cached Parameter would become stale when PEFT replaces it on
    loading.
    """

    adapter_layer_names = ("denselora_m",)
    other_param_names = ("r", "scaling", "dropout", "activation", "shared")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.denselora_m = nn.ParameterDict({})
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.activation: dict[str, str] = {}
        self.shared: dict[str, SharedPair] = {}
        self.place = object()  # a shallow copy of the layer stands in the same one
        self.join(SharedInput())

    def join(self, shared_input: SharedInput) -> None:
        """Share the input with the layers of `shared_input`."""
        self.shared_input = shared_input
        shared_input.layers.append(self)

    def update_layer(self, adapter_name: str, config: DenseLoraConfig, pair: SharedPair) -> None:
        """Add (or replace) the adapter `adapter_name`: a new M (r, r), in the pair's dtype."""
        assert config.alpha is not None
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout[adapter_name] = config.dropout
        self.activation[adapter_name] = config.activation
        self.shared[adapter_name] = pair
        m = torch.empty(config.r, config.r, dtype=pair.encoder.dtype, device=self.weight.device)
        self.denselora_m[adapter_name] = nn.Parameter(m)
        reset_m(self.denselora_m[adapter_name].data, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def is_adapted_by(self, adapter: str) -> bool:
        is_on = not (self.disable_adapters or self.merged)
        return is_on and self.has_adapter(adapter) and adapter in self.active_adapters

    def read(self, adapter: str, x: Tensor) -> tuple[Tensor, Any]:
        x, encoding = self.shared_input.encode(self, adapter, x)
        delta = adapter_ops(x).decode(
            F.linear(encoding, self.denselora_m[adapter]),
            # layers of one kind may be on several devices; on one device this does not copy
            self.shared[adapter].decoder.to(x.device),
            scaling=self.scaling[adapter],
            activation=self.activation[adapter],
            dropout=self.dropout[adapter] if self.training else 0.0,
        )
        return x, delta

    def adapt(self, adapter: str, taken: Any, output: Tensor) -> Tensor:
        return adapter_ops(output).add(output, taken)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight: (d_out, d_in), fp32. Such a matrix exists only with activation "none"."""
        if self.activation[adapter] != "none":
            raise ValueError(f"A DenseLoRA adapter with activations cannot be merged ({adapter}): it is not a matrix.")
        pair = self.shared[adapter]
        device = self.denselora_m[adapter].device
        return denselora_delta_weight(
            pair.encoder.to(device),
            self.denselora_m[adapter],
            pair.decoder.to(device),
            scaling=self.scaling[adapter],
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.activation[adapter_name] == "none"

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        pair, m = self.shared[adapter], self.denselora_m[adapter].detach().float()
        encoder, decoder = (tensor.detach().float().to(m.device) for tensor in (pair.encoder, pair.decoder))
        return encoder, self.scaling[adapter] * (decoder @ m)
