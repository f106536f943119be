"""DenseLoRA's tuner: it adapts the layers, owns the shared pairs, and keeps PEFT's operations true for both.

PEFT walks tuner LAYERS when it freezes, casts, switches or deletes adapters; the shared pairs live on the tuner itself, so
that they are one object each and are saved once (PEFT's Lily, which registers them in every layer, saves them once per
layer). Hence the overrides below: each does for the pairs what PEFT does for the layers. Written against peft 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qdense.catalog import PAPER_TARGET_MODULES
from qdense.tuners.denselora.config import DenseLoraConfig
from qdense.tuners.denselora.layer import DenseLoraLinear, SharedPair

_CONTAINER = "denselora_shared"


class DenseLoraModel(BaseTuner):
    """A Transformers decoder adapted by DenseLoRA (arXiv:2505.23808). Made by `peft.get_peft_model`."""

    prefix = "denselora_"
    tuner_layer_cls = DenseLoraLinear
    # transformers' own `model.load_adapter` injects layers without this class, and so without the pairs.
    uses_shared_state = True
    # The paper's modules, for the decoders of Transformers whose linears have LLaMA's names.
    target_module_mapping = {  # noqa: RUF012  (PEFT's own name and type)
        model_type: list(PAPER_TARGET_MODULES)
        for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
    }

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
        for parameter, requires_grad in before:  # a further adapter leaves the trainability of the others alone
            parameter.requires_grad = requires_grad

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
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):  # bitsandbytes' 4-bit and 8-bit layers are subclasses of it
            raise ValueError(
                f"DenseLoRA adapts linear layers; {current_key} is a {type(base).__name__}. Take it out of "
                f"target_modules ({peft_config.target_modules})."
            )
        pair = self._shared_pair(peft_config, adapter_name, target_name, current_key, base)
        if isinstance(target, DenseLoraLinear):
            target.update_layer(adapter_name, peft_config, pair)
            return
        layer = DenseLoraLinear(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, pair)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Not super()'s: M is made where the base's weight lies, and moving an 8-bit or 4-bit layer fails while M is on the
        # meta device (low_cpu_mem_usage).
        setattr(parent, child_name, new_module)

    def _shared_pair(
        self, config: DenseLoraConfig, adapter_name: str, kind: str, key: str, base: nn.Linear
    ) -> SharedPair:
        """The pair that this layer shares, made when its first layer is met; later layers must have the same shape."""
        pairs = self.denselora_shared[adapter_name]
        assert isinstance(pairs, nn.ModuleDict)
        if config.sharing == "shape":
            kind = f"{base.in_features}_to_{base.out_features}"
        elif config.sharing == "none":
            kind = key.replace(".", "__")  # names of submodules hold no dot
        if kind not in pairs:
            dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
            if not dtype.is_floating_point:  # 8-bit layers have no compute dtype of their own
                dtype = torch.get_default_dtype()
            new = SharedPair(config.r, base.in_features, base.out_features, dtype=dtype, device=base.weight.device)
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

    # --- what PEFT does to layers, done to the pairs --------------------------------------------------------------------

    def _train_pairs_of(self, adapter_names: str | Sequence[str]) -> None:
        """Make encoders and decoders of these adapters trainable (unless they are to stay frozen), and freeze all others'."""
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
        if was_active:  # another adapter has taken its place, and PEFT has made its layers trainable
            self._train_pairs_of(self.active_adapters)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Not super()'s: it rebuilds the entries of a ParameterDict, which makes frozen ones trainable.
        if not autocast_adapter_dtype:
            return
        own = (
            module.denselora_m[adapter_name]
            for module in self.model.modules()
            if isinstance(module, DenseLoraLinear) and adapter_name in module.denselora_m
        )
        for parameter in (*own, *self.denselora_shared[adapter_name].parameters()):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f"{_CONTAINER}.{adapter_name}."
        if container in key:
            return key.replace(container, f"{_CONTAINER}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    # --- merging --------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_unmergeable(adapter_names)
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
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

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
                f"A DenseLoRA adapter with activations cannot be merged: {listed}. GELU(D(M GELU(E x))) is no matrix, so no "
                "weight W0 + dW gives the same output. Keep the adapter beside the base, or train the 'only matrix' "
                'variant (activation = "none"), which merges.'
            )
        for key, module in self.model.named_modules():
            if isinstance(module, DenseLoraLinear) and module.quantization_backend is not None:
                raise ValueError(
                    f"Merging into a quantized base would round the adapter away: {key} is "
                    f"{module.quantization_backend.backend_name}. "
                    'Load the base unquantized (quantization = "none"), load the adapter there, and merge.'
                )
