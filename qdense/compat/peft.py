"""What qdense uses of PEFT beyond its documented interface. Written for 0.21.

Used elsewhere, without a private name, and tested by tests/compat/test_peft.py: `TUNER_OVERRIDES` and `LAYER_OVERRIDES`
below, and that PEFT's LoKr layers keep their factors in `lokr_w1`, `lokr_w2` or their low-rank `_a` and `_b`
(qdense/methods/lokr.py, or LoKr fails on a 4-bit base).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

# What our tuners (qdense/tuners) override of PEFT's BaseTuner, and what breaks if PEFT no longer calls it.
TUNER_OVERRIDES = {
    "prefix": "no tensor of an adapter is recognised, saved or loaded",
    "tuner_layer_cls": "adapters cannot be switched or deleted",
    "target_module_mapping": "a configuration without target_modules is refused",
    "uses_shared_state": "transformers' own load_adapter makes DenseLoRA layers without encoders and decoders",
    "_create_and_replace": "no layer is adapted",
    "_replace_module": "PEFT moves 4-bit and 8-bit layers whose adapters are on the meta device, which fails",
    "_cast_adapter_dtype": "PEFT rebuilds the parameters when it casts, and frozen factors become trainable",
    "merge_adapter": "an adapter that is not a matrix, or one on a 4-bit base, is merged into nonsense",
    "_unload_and_optionally_merge": "the same, by merge_and_unload",
    "_enable_peft_forward_hooks": "a batch with adapter_names is answered by the active adapter alone",
    "inject_adapter": "DenseLoRA has no place for encoders and decoders",
    "set_adapter": "encoders and decoders stay trainable, or frozen, when the adapter is switched",
    "set_requires_grad": "encoders and decoders do not follow their layers",
    "_enable_adapter_layers": "encoders and decoders train while the adapter is off",
    "delete_adapter": "encoders and decoders outlive their adapter",
    "_remove_adapter_name_from_key": "encoders and decoders are saved under names that do not load",
}
# The same of BaseTunerLayer.
LAYER_OVERRIDES = {
    "adapter_layer_names": "an adapter's tensors in a layer are not frozen, switched or deleted",
    "other_param_names": "other things that a layer keeps of an adapter outlive it",
    "_move_adapter_to_device_of_base_layer": "PEFT rebuilds the parameters when it moves them, and frozen ones become trainable",
    "merge": "the adapter is not merged",
    "unmerge": "the adapter is not removed again",
    "supports_lora_conversion": "PEFT's convert_to_lora refuses adapters that are matrices",
}


class PeftTypeName(str):
    """A PEFT type that is not in PEFT's own enum. PEFT reads `.value`, hashes and compares it as a string, and in
    `get_model_status` takes what follows the dot of its `str`."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return f"PeftType.{super().__str__()}"


def register(peft_type: PeftTypeName, config: type[PeftConfig], tuner: Any) -> None:
    """Let PEFT create, save and load adapters of this type. Safe to call twice.

    `peft.utils.register_peft_method` refuses names that are missing from PEFT's own enum. The rest of PEFT only needs a
    str with `.value` in the same dictionaries. Without them, PEFT does not know our methods.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    registries: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for registry, entry in registries:
        registry[peft_type] = entry


def buffers_by_adapter() -> Any:
    """An empty dictionary of buffers, a module, that PEFT saves and loads like its parameters.

    torch has no such class, and PEFT's is private. Without it, frozen factors would have to be parameters, which PEFT makes
    trainable in several places.
    """
    from peft.tuners._buffer_dict import BufferDict

    return BufferDict({}, persistent=True)


def holds_tensors_by_adapter(container: Any) -> bool:
    """Whether this is one of a layer's dictionaries from an adapter's name to a tensor: of parameters or of buffers."""
    from peft.tuners._buffer_dict import BufferDict
    from torch.nn import ParameterDict

    return isinstance(container, ParameterDict | BufferDict)


def quantization_backend(linear: Any) -> Any:
    """The object with which PEFT's layers read and write a quantized weight; None for a float one. `backend_name` is for
    messages.

    Without it, `get_base_weight` would give the packed bytes, and a quantized base could not be told from a float one.
    """
    from peft.utils.quantization_utils import resolve_quantization_backend

    return resolve_quantization_backend(linear)


def cast_input(layer: Any, x: Tensor, dtype: Any) -> Tensor:
    """`x` in `dtype`, unless PEFT's `disable_input_dtype_casting` is active around the layer; then unchanged.

    Every layer of PEFT calls this. Without it, ours would not obey that documented context manager.
    """
    cast: Tensor = layer._cast_input_dtype(x, dtype)
    return cast


def adapters_to_merge(layer: Any, names: list[str] | None) -> list[str]:
    """Those of the adapters `names` (None: the active ones) that the layer has not merged yet; PEFT warns about the others."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    return check_adapters_to_merge(layer, names)


def is_targeted(config: PeftConfig, name: str) -> bool:
    """Whether PEFT adapts the module `name` by this configuration: target_modules, exclude_modules, layers_to_transform.

    Without it, NoRA would have to guess which layers' inputs to measure before PEFT has adapted any.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))


def refuse_unmergeable(model: Any) -> None:
    """PEFT's check before a merge: ValueError, or a warning where tied embeddings are adapted.

    Without it, our merge, which measures rounding layer by layer, would accept what PEFT's own merge refuses.
    """
    model.base_model._check_merge_allowed()


def rank_averages(model: Any) -> dict[str, dict[str, Tensor]]:
    """The averages of AdaLoRA's rank allocator so far: the live dictionaries, by their names there.

    PEFT does not save them. Without them, a resumed AdaLoRA run would cut other ranks than an uninterrupted one.
    """
    allocator = model.base_model.rankallocator
    return {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
