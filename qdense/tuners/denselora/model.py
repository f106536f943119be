"""DenseLoRA's tuner: adapts the layers, owns the shared pairs, and makes PEFT's operations work for both.

PEFT walks tuner LAYERS when it freezes, casts, switches or deletes adapters; the shared pairs live on the tuner itself, so
that each is one object and is saved once (PEFT's Lily registers them in every layer and saves them once per layer). Each
override below does for the pairs what PEFT does for the layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from qdense.catalogs.families import SAME_INPUT
from qdense.tuners.base import LinearTuner
from qdense.tuners.denselora.config import DenseLoraConfig
from qdense.tuners.denselora.layer import DenseLoraLinear, SharedPair

_CONTAINER = "denselora_shared"


class DenseLoraModel(LinearTuner):
    """A Transformers decoder adapted by DenseLoRA (arXiv:2505.23808). Made by `peft.get_peft_model`."""

    prefix = "denselora_"
    method_name = "DenseLoRA"
    tuner_layer_cls = DenseLoraLinear
    # transformers' `model.load_adapter` injects layers without this class, so without the pairs.
    uses_shared_state = True

    denselora_shared: nn.ModuleDict  # adapter name -> module kind -> SharedPair

    # --- creation -----------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if _CONTAINER not in self._modules:
            self.denselora_shared = nn.ModuleDict()
        before = [(parameter, parameter.requires_grad) for parameter in self.denselora_shared.parameters()]
        self.denselora_shared[adapter_name] = nn.ModuleDict()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._is_frozen(adapter_name):
            self.denselora_shared[adapter_name].requires_grad_(False)
        for parameter, requires_grad in before:  # a further adapter does not change whether the others are trainable
            parameter.requires_grad = requires_grad

    def update_layer(self, layer: Any, adapter_name: str, config: Any, kind: str, key: str) -> None:
        layer.update_layer(adapter_name, config, self._shared_pair(config, adapter_name, kind, key, layer))
        block = self.model.get_submodule(key.rpartition(".")[0])
        for kinds in SAME_INPUT:
            if kind in kinds and layer.shared_input.layers == [layer]:
                siblings = (getattr(block, name, None) for name in kinds if name != kind)
                first = next((sibling for sibling in siblings if isinstance(sibling, DenseLoraLinear)), None)
                if first is not None:
                    layer.join(first.shared_input)

    def _shared_pair(
        self, config: DenseLoraConfig, adapter_name: str, kind: str, key: str, base: DenseLoraLinear
    ) -> SharedPair:
        """The pair that this layer shares, created for its first layer; later layers must have the same shape."""
        pairs = self.denselora_shared[adapter_name]
        assert isinstance(pairs, nn.ModuleDict)
        if config.sharing == "shape":
            kind = f"{base.in_features}_to_{base.out_features}"
        elif config.sharing == "none":
            kind = key.replace(".", "__")  # names of submodules contain no dot
        if config.layer_groups > 1:
            kind = f"{kind}_group{self._layer_group(config, key)}"
        if kind not in pairs:
            dtype, device = base.adapter_dtype, base.weight.device
            new = SharedPair(config.r, base.in_features, base.out_features, dtype=dtype, device=device)
            new.reset_parameters(config.zero_init)
            pairs[kind] = new
        pair = pairs[kind]
        assert isinstance(pair, SharedPair)
        d_in, d_out = pair.encoder.shape[1], pair.decoder.shape[0]
        if (d_in, d_out) != (base.in_features, base.out_features):
            raise ValueError(
                f"DenseLoRA shares one encoder and decoder among all {kind} layers, so these must be of one shape: the "
                f"first maps {d_in} -> {d_out}, {key} maps {base.in_features} -> {base.out_features}. Leave {kind} out "
                'of target_modules, choose equal layers by layers_to_transform, or set sharing = "shape".'
            )
        return pair

    def _layer_group(self, config: DenseLoraConfig, key: str) -> int:
        """The group (0, 1, ...) of neighbouring layers to which the module `key` ("...layers.12.mlp.up_proj") belongs.
        Groups differ in size by at most one layer."""
        num_layers = int(self.model.config.num_hidden_layers)
        if config.layer_groups > num_layers:
            raise ValueError(
                f"DenseLoraConfig.layer_groups = {config.layer_groups}: must be at most the number of layers, {num_layers}."
            )
        index = re.search(r"\.layers\.(\d+)\.", f".{key}")
        if index is None:
            raise ValueError(
                f"DenseLoraConfig.layer_groups = {config.layer_groups}: {key} is in no numbered layer. Use layer_groups = 1."
            )
        return int(index[1]) * config.layer_groups // num_layers

    # --- what PEFT does to layers, done to the pairs --------------------------------------------------------------------

    def _train_pairs_of(self, adapter_names: str | Sequence[str]) -> None:
        """Make encoders and decoders of these adapters trainable (unless they stay frozen), and freeze all others."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, pairs in self.denselora_shared.items():
            pairs.requires_grad_(name in names and not self._is_frozen(name))

    def _is_frozen(self, adapter_name: str) -> bool:
        configs: dict[str, Any] = self.peft_config
        return bool(configs[adapter_name].freeze_shared)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_pairs_of([] if inference_mode else adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.denselora_shared:
                self.denselora_shared[name].requires_grad_(requires_grad and not self._is_frozen(name))

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_pairs_of(self.active_adapters if enabled else [])

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        del self.denselora_shared[adapter_name]
        if was_active:  # another adapter is active now, and PEFT has made its layers trainable
            self._train_pairs_of(self.active_adapters)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        yield from super().adapter_parameters(adapter_name)
        yield from self.denselora_shared[adapter_name].parameters()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f"{_CONTAINER}.{adapter_name}."
        if container in key:
            return key.replace(container, f"{_CONTAINER}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    # --- merging --------------------------------------------------------------------------------------------------------

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError unless each adapter that is to be merged (None: the active ones) is a matrix, on a float base."""
        configs: dict[str, Any] = self.peft_config
        names = self.active_adapters if adapter_names is None else adapter_names
        bent = {
            name: configs[name].activation for name in names if name in configs and configs[name].activation != "none"
        }
        if bent:
            listed = ", ".join(f'"{name}" ({activation})' for name, activation in bent.items())
            raise ValueError(
                f"A DenseLoRA adapter with activations cannot be merged: {listed}. GELU(D(M GELU(E x))) is not a matrix, so no "
                "weight W0 + dW gives the same output. Keep the adapter beside the base, or train the 'only matrix' "
                'variant (activation = "none"), which merges.'
            )
        super()._refuse_unmergeable(adapter_names)
