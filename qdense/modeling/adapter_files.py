"""An adapter's files: saved in PEFT's format, loaded again, and refused on another base.

Full fine-tuning is handled alike; it saves a whole model in Transformers' format. Beside the files of either is
qdense.json: the base's fingerprint, the prompt template, and the method. Adapters made by PEFT alone load
too, but their base cannot be verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import qdense.tuners  # noqa: F401  (registers our methods, so that PEFT can load them)
from qdense.cache import write_atomically
from qdense.compat.bitsandbytes import never_repack
from qdense.errors import AdapterError
from qdense.methods import METHODS, method_of
from qdense.modeling.adapter_config import checked_configuration
from qdense.modeling.attach import adapter_tensors, trainable_parameters
from qdense.modeling.fingerprint import Fingerprint, WeightSample
from qdense.modeling.load import BaseModel
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE

_LARGEST = 1e6  # value of a trained tensor; a flipped bit can give 1e38, whose products overflow
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdapterCard:
    """What qdense records beside an adapter.

    Attributes:
        model: the recipe's model table, as `model.name` etc.: how to load the base.
        fingerprint: of the base; None for an adapter made without qdense.
        template: the prompt template it was trained with.
        method: its method's name.
    """

    model: dict[str, Any]
    fingerprint: Fingerprint | None
    template: str
    method: str


def save_adapter(model: Any, folder: Path, card: AdapterCard | None) -> None:
    """Write the adapter (PEFT's format, safetensors), or the whole model if there is none, and its card if given."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        # "auto" would ask the hub for the base's vocabulary size; embeddings are never trained here.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; `qdense push` writes one from the run
    else:
        model.save_pretrained(folder, save_original_format=False)
    if card is not None:
        write_atomically(folder / CARD_FILE, json.dumps(asdict(card), indent=2) + "\n")


def weights_digest(folder: Path) -> str:
    """SHA-256 of what decides an adapter's output: its weights and its configuration. Raises AdapterError if it has none."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder}: has no {PEFT_WEIGHTS_FILE}")
    for path in (*folder.glob(PEFT_CONFIG_FILE), *files):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def refuse_used_folder(output: Path) -> None:
    """Raise AdapterError unless a result can be written to this folder: a new or an empty one."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"{output}: already exists and is not an empty folder; name another folder")


def save_trainable(model: Any, path: Path) -> None:
    """Write the current trainable tensors, by their names in the model."""
    temporary = path.with_name(f".{path.name}")
    save_file({name: parameter.detach().contiguous() for name, parameter in trainable_parameters(model)}, temporary)
    temporary.replace(path)


def _read_weights(model: Any, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors saved in `folder`; AdapterError unless they are exactly those of the model's adapter (PEFT only warns)."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the adapter's weights cannot be read: {error}") from error
    _refuse_odd_values(folder, weights)
    if len(dtypes := {tensor.dtype for tensor in weights.values()}) > 1:
        raise AdapterError(f"{folder}: its tensors are of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        raise AdapterError(
            f"{folder}: its weights are not those its configuration describes: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}"
        )
    return weights


def _refuse_odd_values(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """AdapterError for values that training does not produce: not floating point, NaN, infinite or nearly so."""
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{folder}: {name} holds {tensor.dtype}; trained tensors are float32, bfloat16 or float16"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} holds NaN or infinite values: its training went wrong")
        if tensor.numel() and (largest := float(tensor.abs().max())) > _LARGEST:
            raise AdapterError(
                f"{folder}: {name} holds values up to {largest:.3g}, larger than training produces: it is damaged"
            )


def read_card(folder: Path) -> AdapterCard:
    """The adapter's card; without one, what PEFT's configuration says. Raises AdapterError."""
    path = folder / CARD_FILE
    if path.is_file():
        try:
            card = AdapterCard(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise AdapterError(f"{path}: not a readable adapter card: {error}") from None
        wrong = [
            f"{key} must be {what}"
            for key, kind, what in (
                ("model", dict, "an object"),
                ("fingerprint", dict | None, "an object, or null"),
                ("template", str, "a name"),
                ("method", str, "a name"),
            )
            if not isinstance(getattr(card, key), kind)
        ]
        if wrong:
            raise AdapterError(f"{path}: not a readable adapter card: {'; '.join(wrong)}")
        return card
    path = folder / PEFT_CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name, method = config["base_model_name_or_path"], config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: not a readable adapter configuration: {error!r}") from None
    if not isinstance(name, str) or not isinstance(method, str):
        raise AdapterError(f"{path}: base_model_name_or_path and peft_type must be text")
    known = method_of(config)
    called = method.lower() if known is None else known.name
    return AdapterCard(model={"name": name}, fingerprint=None, template="alpaca", method=called)


def load_adapter(
    base: BaseModel, folder: Path, card: AdapterCard, *, name: str = "default", beside: Any | None = None
) -> Any:
    """Add a saved adapter to the base for inference, in the dtype it was saved in.

    Args:
        name: what PEFT is to call it.
        beside: the PeftModel of this base to which it is added, if there is one.

    Returns:
        A PeftModel; for a fully fine-tuned model the base's own, with the saved weights.

    Raises:
        AdapterError: it was made for another base, or its files do not fit.
    """
    from peft import PeftModel

    if card.fingerprint is not None and card.fingerprint != base.fingerprint:
        differing = ", ".join(part for part, value in base.fingerprint.items() if card.fingerprint.get(part) != value)
        raise AdapterError(
            f"{folder}: this adapter was made for another base ({card.model.get('name')}); {base.name} differs from it in: "
            f"{differing}. Name the right base with --model."
        )
    method = METHODS.get(card.method)
    if method is not None and not method.is_adapter:
        if beside is not None:
            raise AdapterError(f"{folder}: is a whole model ({method.name}), which shares no base with adapters")
        return _load_whole_model(base, folder)
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        # PEFT would treat the folder's name as a hub id
        raise AdapterError(f"{folder}: has no {PEFT_WEIGHTS_FILE}")
    # What mends PEFT depends on what is loaded, not on the name in the card.
    names = [name for name, _ in base.model.named_modules()]
    configuration = checked_configuration(folder, base.name, names)
    loaded = method_of(configuration)
    if beside is not None and configuration["peft_type"] != beside.peft_config[beside.active_adapter].peft_type:
        raise AdapterError(
            f"{folder}: is a {configuration['peft_type']} adapter, and those that are loaded already are "
            f"{beside.peft_config[beside.active_adapter].peft_type.value}. Adapters on one base must be of one type."
        )
    before = WeightSample(base.model)
    if loaded is None or loaded.reads_base_weights:
        never_repack(base.model)
    try:
        if beside is None:
            # Of a base without weights, the adapter's own tensors are still real.
            has_no_weights = base.device.type == "meta"
            model = PeftModel.from_pretrained(
                base.model, folder, name, autocast_adapter_dtype=False, low_cpu_mem_usage=has_no_weights
            )
        else:
            model = beside
            model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT raises anything for a wrong value in its configuration
        raise AdapterError(f"{folder}: the adapter does not fit {base.name}: {error}") from error
    if changed := before.changed(model):
        raise AdapterError(
            f"{folder}: loading it changed the weights of {base.name} ({changed}), so neither would be what its name says. "
            "The base in memory must no longer be used."
        )
    weights = _read_weights(model, folder, name)
    config = model.peft_config[name]
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise AdapterError(f"{folder}: an activated LoRA (alora_invocation_tokens), which qdense does not run")
    # PEFT creates the tensors in the base's dtype, which rounds them; restore the saved dtype and values.
    for key, tensor in adapter_tensors(model, name):
        tensor.data = weights[key].to(tensor.device)
    if loaded is not None:
        loaded.prepare(model)
    return model


def _load_whole_model(base: BaseModel, folder: Path) -> Any:
    """The base's own model with the weights that are saved in `folder`."""
    parameters = dict(base.model.named_parameters())
    try:
        saved = {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the model's weights cannot be read: {error}") from error
    _refuse_odd_values(folder, saved)
    unfit = [name for name, tensor in saved.items() if name not in parameters or parameters[name].shape != tensor.shape]
    missing = [name for name in parameters if name not in saved]
    if unfit or missing:
        raise AdapterError(
            f"{folder}: does not hold the weights of {base.name}: "
            f"{len(missing)} missing {missing[:2]}, {len(unfit)} unfit {unfit[:2]}"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
    return base.model
