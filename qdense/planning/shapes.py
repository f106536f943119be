"""The shapes of a model, without its weights: built in, or from its config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qdense.catalogs.models import CATALOG, CatalogModel
from qdense.errors import ModelError, did_you_mean


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
        return shape_of_config(name, config)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{path}: not the configuration of a LLaMA-like model: {error!r}") from None


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
    """Shapes from Transformers' config.json. Raises KeyError for a missing one, ValueError for one that is not a size."""
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
    sizes = {key: value for key, value in vars(shape).items() if type(value) is int}
    if wrong := [f"{key} = {value}" for key, value in sizes.items() if value < 1]:
        raise ValueError(", ".join(wrong))
    return shape
