"""A model without memory for its weights, built by Transformers from config.json: the sizes of a family that is not in
`qdense.catalogs.families`, or of one whose sizes do not follow from a few numbers (experts)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdense.catalogs.families import FAMILIES
from qdense.catalogs.models import CatalogModel


def text_config(folder: Path) -> tuple[Any, bool]:
    """The configuration of a model's decoder, and whether that is a part of a larger model (of images and text, say).

    Raises ValueError for a configuration that Transformers cannot read.
    """
    from transformers import AutoConfig

    with _readable():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
    return text, text is not config


def skeleton(config: Any) -> Any:
    """A decoder on the meta device. Raises ValueError for a configuration that makes none."""
    from transformers import AutoModelForCausalLM

    with _readable(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever a wrong value causes in one of some hundred configurations and models, as a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Why Transformers could not read or load a model. Its advice to allow the model's own code does not apply here."""
    if "trust_remote_code" in str(error):
        return "it needs custom code, which qdense does not run. Use a model whose architecture Transformers has"
    return str(error)


def skeleton_shape(name: str, config: Any) -> CatalogModel:
    """Shapes as a skeleton has them. Raises as `skeleton`, and for a model without linear layers."""
    model = skeleton(config)
    layers = decoder_layers(model)
    linears = {
        path.rpartition(".")[2]: (module.in_features, module.out_features)
        for layer in reversed(layers)  # of layers that differ, the first decides
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    family = FAMILIES.get(config.model_type)
    if family is not None:
        linears = {kind: shape for kind, shape in linears.items() if kind in family.modules}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no list of layers with linear modules")
    shape = CatalogModel(
        name=name,
        hub_id=name,
        num_layers=len(layers),
        hidden_size=int(config.hidden_size),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(_given(config, "num_key_value_heads") or config.num_attention_heads),
        intermediate_size=_mlp_width(config),
        vocab_size=int(config.vocab_size),
        has_tied_embeddings=bool(config.tie_word_embeddings),
        head_size=_given(config, "head_dim"),
        model_type=config.model_type,
        experts_per_token=_experts_per_token(config),
        linear_modules=tuple((kind, *sizes) for kind, sizes in linears.items()),
    )
    head = model.get_output_embeddings()
    modules = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    num_linear = sum(module.weight.numel() for module in modules)
    shape = replace(shape, other_linears=num_linear - shape.adapted_parameters)
    return replace(shape, other_parameters=model.num_parameters() - shape.num_parameters)


def _mlp_width(config: Any) -> int:
    """The width of the MLP that a token passes through: of experts, those that it is sent to."""
    width = _given(config, "moe_intermediate_size") or _given(config, "intermediate_size")
    return int(width or 4 * config.hidden_size) * max(1, _experts_per_token(config))


def _experts_per_token(config: Any) -> int:
    return int(_given(config, "num_experts_per_tok") or 0)


def _given(config: Any, name: str) -> Any:
    """A value of the configuration; None if it has none, or a different one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules that contain linear ones; empty if there is none."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [layers for layers in lists if any(isinstance(module, nn.Linear) for module in layers[0].modules())]
    return max(found, key=len, default=[])
