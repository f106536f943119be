"""The adapter on a base: attached by a recipe, saved in PEFT's format, loaded again, refused where it does not belong.

Beside PEFT's adapter_config.json and adapter_model.safetensors lies qdense.json: the base's fingerprint, the prompt
template, and what made the adapter. Adapters that PEFT alone has made load too; nothing then vouches for their base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import qdense.tuners  # noqa: F401  (registers our methods, so that PEFT can load them)
from qdense.cache import write_atomically
from qdense.errors import AdapterError
from qdense.methods import METHODS
from qdense.modeling.base import BaseModel, Fingerprint
from qdense.recipe import AdapterRecipe

CARD_FILE = "qdense.json"


@dataclass(frozen=True)
class AdapterCard:
    """What qdense notes beside an adapter.

    Attributes:
        model: the recipe's model table, as `model.name` etc.: how to load the base.
        fingerprint: the base's; None for an adapter made without qdense.
        template: name of the prompt template it was trained with.
        method: its method's name.
    """

    model: dict[str, Any]
    fingerprint: Fingerprint | None
    template: str
    method: str


def attach_adapter(base: BaseModel, recipe: AdapterRecipe) -> Any:
    """Put a fresh adapter on the base. Its initial values come from torch's generator: seed it first.

    Returns:
        A PeftModel whose trainable parameters have `recipe.dtype`.

    Raises:
        AdapterError: no module of the base has one of the target names, or PEFT refuses them.
    """
    from peft import get_peft_model

    names = {name.rpartition(".")[2] for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in recipe.target_modules if target.rpartition(".")[2] not in names]
    if missing:
        raise AdapterError(
            f"adapter.target_modules: {base.name} has no linear module {', '.join(missing)}. It has: {', '.join(sorted(names))}"
        )
    try:
        # PEFT's autocast would make bf16 adapters fp32.
        model = get_peft_model(base.model, METHODS[recipe.method].build_config(recipe), autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"adapter: {error}") from error
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.to(getattr(torch, recipe.dtype))
    return model


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and tensor of each trainable parameter, shared ones once, in a fixed order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def save_adapter(model: Any, folder: Path, card: AdapterCard | None) -> None:
    """Write the adapter (PEFT's format, safetensors) and, if given, its card."""
    # "auto" would ask the hub for the base's vocabulary size; the embeddings are never touched here.
    model.save_pretrained(folder, save_embedding_layers=False)
    if card is not None:
        write_atomically(folder / CARD_FILE, json.dumps(asdict(card), indent=2) + "\n")


def restore_weights(model: Any, folder: Path) -> None:
    """Copy saved weights into the adapter that the model has, bit by bit, keeping dtype and identity of its tensors."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, _read_weights(model, folder))


def _read_weights(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors saved in `folder`; AdapterError unless they are exactly those of the model's adapter. (PEFT only warns.)"""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the adapter's weights cannot be read: {error}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        raise AdapterError(
            f"{folder}: its weights are not those its configuration describes: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}"
        )
    return weights


def find_adapter(path: Path) -> Path:
    """The adapter's folder, given itself or the run that holds it. Raises AdapterError."""
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            return folder
    if not path.exists():
        raise AdapterError(f"{path}: no such run or adapter")
    hint = (
        " The run is not finished: `qdense train RECIPE --resume` goes on with it."
        if (path / "checkpoints").exists()
        else ""
    )
    raise AdapterError(f"{path}: holds no adapter (adapter/adapter_config.json or adapter_config.json).{hint}")


def read_card(folder: Path) -> AdapterCard:
    """The adapter's card; for one without, what PEFT's configuration tells. Raises AdapterError."""
    path = folder / CARD_FILE
    if path.is_file():
        try:
            return AdapterCard(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise AdapterError(f"{path}: not a readable adapter card: {error}") from None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        name = config["base_model_name_or_path"]
        method = str(config["peft_type"]).lower()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / 'adapter_config.json'}: not a readable adapter configuration: {error!r}"
        ) from None
    return AdapterCard(model={"name": name}, fingerprint=None, template="alpaca", method=method)


def load_adapter(base: BaseModel, folder: Path, card: AdapterCard) -> Any:
    """Put a saved adapter on the base, for inference, in the dtype it was saved in.

    Raises:
        AdapterError: it was made for another base, or its files do not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    if card.fingerprint is not None and card.fingerprint != base.fingerprint:
        differing = ", ".join(part for part, value in base.fingerprint.items() if card.fingerprint.get(part) != value)
        raise AdapterError(
            f"{folder}: this adapter was made for another base ({card.model.get('name')}); {base.name} differs from it in: "
            f"{differing}. Give the right base by --model."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        # PEFT would take the folder's name for a hub id and ask there
        raise AdapterError(f"{folder}: has no adapter_model.safetensors")
    try:
        model = PeftModel.from_pretrained(base.model, folder, autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the adapter does not fit {base.name}: {error}") from error
    weights = _read_weights(model, folder)
    # PEFT makes the tensors in the base's dtype; take the saved one, and the saved values again, which were rounded.
    own = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    dtype = next(iter(weights.values())).dtype
    for parameter in model.parameters():
        if parameter.data_ptr() in own:
            parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, weights)
    return model
