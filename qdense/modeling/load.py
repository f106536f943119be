"""The base model: loaded in NF4 (or 8-bit, or unquantized) and frozen."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from qdense.cache import appearing_folder, cache_dir, require_free_space
from qdense.catalogs.families import FAMILIES
from qdense.compat.bitsandbytes import never_repack
from qdense.device import choose_device, has_bfloat16, memory_free
from qdense.errors import ModelError, counted, listed
from qdense.modeling.fingerprint import Fingerprint, fingerprint_of
from qdense.modeling.locate import Tell, folder_name_for_peft, locate_model, locate_tokenizer, require_data_only
from qdense.planning.skeleton import reason_of, skeleton, text_config

if TYPE_CHECKING:
    from qdense.recipe import ModelRecipe


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model with its tokenizer.

    Attributes:
        name: as the recipe has it.
        reference: a name that is valid from any working directory; a folder's is absolute.
        fingerprint: of the unquantized model, so it is equal for every quantization and location.
        pad_token_id: fills padding; EOS if the tokenizer has no padding token.
        stored_as: how the weights of the linear layers are stored in memory: "nf4", "int8", or a dtype.
    """

    name: str
    reference: str
    model: Any
    tokenizer: Any
    fingerprint: Fingerprint
    pad_token_id: int
    device: torch.device
    stored_as: str


def on_device(recipe: ModelRecipe) -> ModelRecipe:
    """With the dtype that "auto" stands for on the recipe's device. Raises ModelError if that does not exist."""
    return recipe.settled(has_bfloat16=has_bfloat16(choose_device(recipe.device)))


def load_base(
    recipe: ModelRecipe, notice: Tell = lambda text: None, *, for_training: bool = True, to_divide: bool = False
) -> BaseModel:
    """Load the base model, frozen.

    NF4 uses double quantization. Everything else (norms, embeddings, head) stays in `model.dtype`; nothing is cast to
    fp32. A quantized base is cached after its first load.

    Args:
        notice: receives a text before anything that takes long.
        to_divide: whether it is loaded to the host, to be divided among processes (qdense/modeling/shard.py). FSDP divides no
            integers, so 4-bit weights are then stored as `model.dtype`, bit for bit the same.
        for_training: False, on a CPU with enough memory, unpacks NF4 weights once instead of in every forward pass.

    Raises:
        ModelError: the model cannot be found, reached or read, or the device does not exist.
    """
    device, recipe = choose_device(recipe.device), on_device(recipe)
    place = torch.device("cpu") if to_divide else device
    folder, identity, tokenizer = _located(recipe, notice)
    try:
        fingerprint = fingerprint_of(folder, tokenizer)
        if recipe.quantization == "none":
            notice(f"loading {recipe.name} in {recipe.dtype}")
            model = _from_pretrained(folder, recipe, place, quantization=None)
        else:
            model = _load_quantized(folder, identity, fingerprint, recipe, place, notice, to_divide=to_divide)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{recipe.name}: the model in {folder} cannot be loaded: {reason_of(error)}") from error
    model.config.use_cache = False
    stored_as: str = recipe.quantization if recipe.quantization != "none" else recipe.dtype
    if for_training:
        never_repack(model)
    elif recipe.quantization == "nf4" and device.type == "cpu" and _has_memory_to_unpack(model, recipe, notice):
        # The logits are bit for bit those of NF4 weights unpacked at each use; reading a prompt takes 0.4 times as long.
        model = model.dequantize(dtype=getattr(torch, recipe.dtype))
        stored_as = f"{recipe.dtype}, with NF4's values"
    return _frozen(model, folder, recipe, tokenizer, fingerprint, device, stored_as)


def load_skeleton(recipe: ModelRecipe, notice: Tell = lambda text: None) -> BaseModel:
    """The base without its weights, its modules on the meta device: for a program that has the weights itself.

    Raises:
        ModelError: as `load_base`.
    """
    from transformers import GenerationConfig

    folder, _, tokenizer = _located(recipe, notice)
    device = torch.device("meta")
    try:
        fingerprint = fingerprint_of(folder, tokenizer)
        model = skeleton(text_config(folder)[0])
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{recipe.name}: the model in {folder} cannot be loaded: {reason_of(error)}") from error
    return _frozen(model, folder, recipe, tokenizer, fingerprint, device, "nothing")


def _located(recipe: ModelRecipe, notice: Tell) -> tuple[Path, str, Any]:
    """The base's folder, a text that changes when its files do, and its tokenizer."""
    folder, identity = locate_model(recipe.name, recipe.revision, notice)
    require_data_only(recipe.name, folder)
    try:
        _, is_part = text_config(folder)
    except ValueError as error:
        raise ModelError(f"{recipe.name}: config.json in {folder} cannot be read: {error}") from error
    if is_part:
        notice(
            f"{recipe.name} reads more than text: only its decoder is loaded, and an adapter fits that decoder alone"
        )
    return folder, identity, _tokenizer(recipe, folder)


def _frozen(
    model: Any,
    folder: Path,
    recipe: ModelRecipe,
    tokenizer: Any,
    fingerprint: Fingerprint,
    device: torch.device,
    stored_as: str,
) -> BaseModel:
    model.name_or_path = folder_name_for_peft(recipe.name, folder)
    model.requires_grad_(False)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    reference = os.path.abspath(recipe.name) if os.path.isdir(recipe.name) else recipe.name
    return BaseModel(recipe.name, reference, model, tokenizer, fingerprint, pad_token_id, device, stored_as)


def load_tokenizer(recipe: ModelRecipe, notice: Tell) -> Any:
    """The tokenizer alone. Raises ModelError."""
    return _tokenizer(recipe, locate_tokenizer(recipe.name, recipe.revision, notice))


def _tokenizer(recipe: ModelRecipe, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions, missing converters ImportErrors
        raise ModelError(f"{recipe.name}: the tokenizer in {folder} cannot be loaded: {reason_of(error)}") from error


# --- quantizing -----------------------------------------------------------------------------------------------------------


def _load_quantized(
    folder: Path,
    identity: str,
    fingerprint: Fingerprint,
    recipe: ModelRecipe,
    device: torch.device,
    notice: Tell,
    *,
    to_divide: bool,
) -> Any:
    if (json.loads((folder / "config.json").read_text())).get("quantization_config"):
        notice(f"loading {recipe.name}, which is already quantized")
        return _from_pretrained(folder, recipe, device, quantization=None)
    family = FAMILIES.get(text_config(folder)[0].model_type)
    if family is not None and family.has_experts:
        # Not cached: experts are not quantized, so it would save little, and Transformers cannot read all of them back.
        notice(f"quantizing {recipe.name} to {recipe.quantization}: its attention; experts stay in {recipe.dtype}")
        config = _quantization_config(recipe, to_divide=to_divide)
        return _from_pretrained(folder, recipe, device, quantization=config)
    facts = [identity, fingerprint, recipe.quantization, recipe.dtype, *(["to divide"] if to_divide else [])]
    key = json.dumps(facts, sort_keys=True)
    cached = cache_dir("quantized", f"{Path(recipe.name).name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
    if (cached / "config.json").is_file():
        notice(f"loading {recipe.name} ({recipe.quantization}, cached)")
        try:
            return _from_pretrained(cached, recipe, device, quantization=None)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"the quantized {recipe.name} in {cached} is damaged: {error}. Delete that folder."
            ) from error
    notice(f"quantizing {recipe.name} to {recipe.quantization} (once; then it is cached)")
    model = _from_pretrained(folder, recipe, device, quantization=_quantization_config(recipe, to_divide=to_divide))
    size_bytes = model.get_memory_footprint()
    require_free_space(cached, int(1.1 * size_bytes), f"the quantized {recipe.name}")
    # Save before any forward pass: after one, a CPU with AVX512-BF16 has repacked the weights, and saving would lose bits.
    with appearing_folder(cached) as building:
        model.save_pretrained(building, save_original_format=False)
    return model


def quantize_folder(folder: Path, recipe: ModelRecipe, device: torch.device) -> None:
    """Quantize the model in a folder as `recipe` says, in place."""
    model = _from_pretrained(folder, recipe, device, quantization=_quantization_config(recipe))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, save_original_format=False)


def _quantization_config(recipe: ModelRecipe, *, to_divide: bool = False) -> Any:
    from transformers import BitsAndBytesConfig

    if recipe.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
        bnb_4bit_quant_storage=getattr(torch, recipe.dtype) if to_divide else torch.uint8,
    )


def _from_pretrained(folder: Path, recipe: ModelRecipe, device: torch.device, quantization: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    config, is_part = text_config(folder)
    if is_part:  # Transformers would load the whole model; its decoder's weights have longer names there
        options |= {"config": config, "key_mapping": _TEXT_PART}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, recipe.dtype),
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    model, found = loaded
    if missing := found["missing_keys"]:  # Transformers would go on with random values
        raise ValueError(
            f"its files lack {counted(len(missing), 'weight')} of {type(model).__name__}: {listed(missing)}"
        )
    return model


# Names of a decoder's weights in a model of images and text, and in the decoder alone.
_TEXT_PART = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}


def _has_memory_to_unpack(model: Any, recipe: ModelRecipe, notice: Tell) -> bool:
    needed_bytes = int(1.2 * model.num_parameters() * getattr(torch, recipe.dtype).itemsize)
    free_bytes = memory_free(torch.device("cpu"))
    if free_bytes >= needed_bytes:
        return True
    notice(
        f"too little memory to unpack the 4-bit weights ({free_bytes / 2**30:.1f} GiB free, {needed_bytes / 2**30:.1f} GiB "
        "needed): they are unpacked in every step, which is slower"
    )
    return False
