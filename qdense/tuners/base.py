"""What our PEFT tuners share: which layers they adapt, a linear layer with adapters, and the tuner that inserts it.

Which of PEFT's methods it overrides, and what breaks without that: qdense/compat/peft.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from qdense.catalogs.families import FAMILIES
from qdense.compat.peft import adapters_to_merge, holds_tensors_by_adapter, quantization_backend

# Settings of PEFT's LoRA that people try here, and why a configuration of ours has none of them. (`bias` is a TypeError, by which
# PEFT tells the methods without one.)
_REFUSED = {
    "rank_pattern": "layers that share factors have one rank. For another rank in some modules, add a second adapter for them",
    "alpha_pattern": "layers that share factors have one scale. For another alpha in some modules, add a second adapter for them",
    "trainable_token_indices": "embeddings are not adapted. To train them in full, name them in modules_to_save",
    "layer_replication": "layers are not replicated",
    "use_dora": "that is LoRA's own variant; peft.LoraConfig has it",
}


@dataclass
class LinearTunerConfig(PeftConfig):
    """Which linear layers are adapted.

    Raises ValueError, with the field and the accepted values, when a setting is out of range.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the linear modules to adapt, or a regular expression for them."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names to leave unadapted."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Adapt these layers only."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, if it is not the first numbered one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules that are trained in full and saved with the adapter."}
    )

    def __new__(cls, *_: Any, **settings: Any) -> LinearTunerConfig:
        # Before the __init__ of a dataclass, whose TypeError gives no reason.
        for name, reason in _REFUSED.items():
            if name in settings:
                raise ValueError(f"{cls.__name__} has no {name}: {reason}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT keeps them as a set
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"{type(self).__name__}.layers_to_transform: needs target_modules as a list of names; with "
                f"{self.target_modules!r} PEFT does not look at it."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"{type(self).__name__}.layers_pattern needs layers_to_transform.")

    def _require(self, is_accepted: bool, name: str, accepted: str) -> None:
        if not is_accepted:
            raise ValueError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}: must be {accepted}.")

    def _require_positive_integer(self, name: str) -> None:
        value = getattr(self, name)
        self._require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, "a positive integer")


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer (float, 4-bit or 8-bit) with adapters. A subclass defines what an adapter does to the output."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self.get_base_layer()
        self.quantization_backend = quantization_backend(linear)
        assert isinstance(linear, nn.Linear)  # bitsandbytes' 4-bit and 8-bit layers are subclasses of it
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.merged_adapters: list[str] = []

    def read(self, adapter: str, x: Tensor) -> tuple[Tensor, Any]:
        """The input for the frozen layer, and what `adapter` takes of the layer's input `x` (..., d_in).

        What can be computed here should be, not in `adapt`: see `decode` in qdense/ops/denselora.py.
        """
        return x, x

    def adapt(self, adapter: str, taken: Any, output: Tensor) -> Tensor:
        """`output` (..., d_out) changed by `adapter`, in the same dtype, given what it has taken of the input."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight: (d_out, d_in), fp32."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `adapter_name` is a matrix of low rank, so that PEFT's `convert_to_lora` and `lora_factors` can write it."""
        return False

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """LoRA's A (rank, d_in) and B (d_out, rank), fp32, with B A = `get_delta_weight(adapter)`."""
        raise NotImplementedError

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The dtype of a new adapter: the base's compute dtype."""
        dtype: torch.dtype = getattr(self.get_base_layer(), "compute_dtype", None) or self.weight.dtype
        return dtype if dtype.is_floating_point else torch.get_default_dtype()  # 8-bit layers have no compute dtype

    def has_adapter(self, adapter: str) -> bool:
        return adapter in getattr(self, self.adapter_layer_names[0])

    def adapter_tensors(self, adapter: str) -> Iterator[Tensor]:
        """Parameters and buffers of `adapter` in this layer."""
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if holds_tensors_by_adapter(container) and adapter in container:
                yield container[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Not super()'s: it rebuilds ParameterDict entries in the base's dtype, which makes frozen ones trainable.
        for tensor in self.adapter_tensors(adapter_name):
            if not tensor.is_meta and not self.weight.is_meta:  # of a base without weights, the adapter is still real
                tensor.data = tensor.data.to(device or self.weight.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else list(filter(self.has_adapter, self.active_adapters))
        taken: dict[str, Any] = {}
        for adapter in adapters:
            x, taken[adapter] = self.read(adapter, x)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            output = self.adapt(adapter, taken.pop(adapter), output)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight, in fp32 and rounded once. The tuner has checked that they can be."""
        for adapter in adapters_to_merge(self, adapter_names):
            if self.has_adapter(adapter):
                merged = self.merged_weight(adapter)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError("safe_merge: the merged weight holds NaN or infinity; the layer is unchanged.")
                self.set_base_weight(merged)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Remove the merged adapters; in bf16 the weight is restored up to rounding, not bit by bit."""
        while self.merged_adapters:
            self.set_base_weight(self.merged_weight(self.merged_adapters.pop(), sign=-1))

    def merged_weight(self, adapter: str, *, sign: int = 1) -> Tensor:
        """The weight (d_out, d_in) with `adapter` added (or, with sign -1, subtracted) in fp32, rounded once."""
        weight = self.get_base_weight()
        return (weight.float() + sign * self.get_delta_weight(adapter).to(weight.device)).to(weight.dtype)

    def __repr__(self) -> str:
        return "qdense." + super().__repr__()


class LinearTuner(BaseTuner):
    """A Transformers decoder whose linear layers are adapted. Made by `peft.get_peft_model`."""

    method_name: str
    tuner_layer_cls: type[AdaptedLinear]
    # The paper's modules where a model has them, else those that PEFT's LoRA adapts. (The name and type are PEFT's.)
    target_module_mapping: dict[str, list[str]] = {  # noqa: RUF012
        **{kind: list(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()},
        **{kind: list(family.paper_modules) for kind, family in FAMILIES.items()},
    }

    def update_layer(self, layer: Any, adapter_name: str, config: Any, kind: str, key: str) -> None:
        """Give `layer` the adapter. `kind` is the module's own name ("q_proj"), `key` its full name in the base."""
        layer.update_layer(adapter_name, config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self.update_layer(target, adapter_name, peft_config, target_name, current_key)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):  # bitsandbytes' 4-bit and 8-bit layers are subclasses of it
            raise ValueError(
                f"{self.method_name} adapts linear layers; {current_key} is a {type(base).__name__}. Take it out of "
                f"target_modules ({peft_config.target_modules})."
            )
        layer = self.tuner_layer_cls(target)
        layer.set_adapter(adapter_name)
        self.update_layer(layer, adapter_name, peft_config, target_name, current_key)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Not super()'s: adapters are created on the device of the base's weight, and moving an 8-bit or 4-bit layer fails
        # while they are on the meta device (low_cpu_mem_usage).
        setattr(parent, child_name, new_module)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The adapter's parameters in all layers, without frozen factors in buffers."""
        for module in self.model.modules():
            if isinstance(module, AdaptedLinear):
                yield from (t for t in module.adapter_tensors(adapter_name) if isinstance(t, nn.Parameter))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Not super()'s: it rebuilds the entries of a ParameterDict, which makes frozen ones trainable.
        if not autocast_adapter_dtype:
            return
        for parameter in self.adapter_parameters(adapter_name):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names: {self.method_name} does not mix adapters in one batch. Call the model once for each adapter, "
                "after set_adapter."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT asks the tuner for it. Raises ValueError: a weighted sum of these adapters is in general none of them."""
        raise ValueError(
            f"add_weighted_adapter: a weighted sum of {self.method_name} adapters is no {self.method_name} adapter. Where they "
            "are matrices, `qdense export` writes each as a LoRA, which PEFT can combine"
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_unmergeable(adapter_names)
        if safe_merge:
            self._refuse_not_finite(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_unmergeable(adapter_names)
            if safe_merge:
                self._refuse_not_finite(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _refuse_not_finite(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError before any layer is merged, if one of them would get a weight that is not finite."""
        for key, module in self.model.named_modules():
            if isinstance(module, AdaptedLinear):
                for adapter in adapters_to_merge(module, adapter_names):
                    if module.has_adapter(adapter) and not torch.isfinite(module.merged_weight(adapter)).all():
                        raise ValueError(
                            # The words that PEFT says of its own methods come first.
                            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: the weight of "
                            f"{key} would hold NaN or infinity; no layer has been merged."
                        )

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError unless each adapter that is to be merged (None: the active ones) can be, on a float base."""
        for key, module in self.model.named_modules():
            if isinstance(module, AdaptedLinear) and module.quantization_backend is not None:
                raise ValueError(
                    f"Merging into a quantized base would round the adapter away: {key} is "
                    f"{module.quantization_backend.backend_name}. "
                    'Load the base unquantized (quantization = "none"), load the adapter there, and merge.'
                )
