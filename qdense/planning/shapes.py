"""The shapes of a model, without its weights: built in, or from its config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdense.catalogs.families import FAMILIES
from qdense.catalogs.models import CATALOG, CatalogModel
from qdense.errors import ModelError, did_you_mean

_SIZES = {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}
_HEADS_SHARE_WIDTH = ("llama", "mistral", "qwen2")  # heads are as wide as hidden_size / num_attention_heads


def model_shape(name: str) -> CatalogModel:
    """The shapes of a model by its built-in name, hub id or folder. Raises ModelError.

    A hub id that is not built in is looked up in the hub's cache; nothing is downloaded.
    """
    by_hub_id = {entry.hub_id: entry for entry in CATALOG.values()}
    entry = CATALOG.get(name) or by_hub_id.get(name)
    if entry is not None:
        return entry
    path = Path(name) / "config.json" if os.path.isdir(name) else _cached_config(name)
    if path is None:
        raise ModelError(
            f'"{name}": qdense does not know the sizes of this model{did_you_mean(name, CATALOG)}; or a local folder with '
            "config.json, or a hub id whose config.json is in the hub's cache (`hf download ID config.json`)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if _is_complete(config):
            return shape_of_config(name, config)
        from qdense.planning.skeleton import text_config  # takes seconds: it imports Transformers

        return shape_of_decoder(name, text_config(path.parent)[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path}: not the configuration of a decoder that Transformers can build: {error!r}") from None


def shape_of_decoder(name: str, config: Any) -> CatalogModel:
    """Shapes from Transformers' configuration of a decoder of any family. Raises KeyError, ValueError."""
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.has_experts:
        return shape_of_config(name, config.to_dict())
    from qdense.planning.skeleton import skeleton_shape

    shape = skeleton_shape(name, config)
    return replace(shape, unknowns=tuple(_unknowns(shape)))


def _is_complete(config: dict[str, Any]) -> bool:
    """Whether config.json alone gives the shapes of its family; defaults that it leaves out are known to Transformers."""
    family = FAMILIES.get(config["model_type"])
    if family is None or family.has_experts:
        return False
    has_heads = "head_dim" in config or config["model_type"] in _HEADS_SHARE_WIDTH
    return has_heads and config.keys() >= _SIZES | {"tie_word_embeddings"}


def _unknowns(shape: CatalogModel) -> Iterator[str]:
    if shape.family is None:
        yield (
            f'"{shape.model_type}" is not among the families that qdense knows (`qdense models`): what a step keeps between its '
            "linear modules is counted as LLaMA's, and may be more"
        )
    elif shape.family.has_experts:
        yield (
            "its experts stay unquantized, because bitsandbytes quantizes linear modules only; what a step keeps of them is an "
            "estimate, which was up to 42% too low"
        )


def _cached_config(hub_id: str) -> Path | None:
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def shape_of_config(name: str, config: dict[str, Any]) -> CatalogModel:
    """Shapes of a known family without experts from its config.json.

    Raises KeyError for a missing one, ValueError for one that is not a size.
    """
    num_heads = int(config["num_attention_heads"])
    head_size = config.get("head_dim")
    shape = CatalogModel(
        name=name,
        hub_id=name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        intermediate_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        has_tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        head_size=None if head_size is None else int(head_size),
        model_type=str(config["model_type"]),
    )
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
    if wrong := [f"{key} = {getattr(shape, key)}" for key in sizes if getattr(shape, key) < 1]:
        raise ValueError(", ".join(wrong))
    return shape
