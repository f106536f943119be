"""Recognise a base model by its content, not by its location."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qdense.errors import ModelError

_SAMPLED_ELEMENTS = 64  # of each parameter

Fingerprint = dict[str, str]  # "config", "tokenizer", "weights" -> SHA-256


# The keys of config.json that decide the computation, with names that every version of transformers writes.
_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "tie_word_embeddings",
)  # fmt: skip


class WeightSample:
    """A few elements of each of a model's parameters, to tell later whether anything has written into them."""

    def __init__(self, model: nn.Module) -> None:
        self._sampled = [
            (name, parameter, _sample(parameter))
            for name, parameter in model.named_parameters()
            if not parameter.is_meta
        ]

    def changed(self, model: nn.Module) -> str | None:
        """The first parameter that was changed, or that `model` (the same one, possibly inside another) no longer has."""
        present = {id(parameter) for parameter in model.parameters()}
        for name, parameter, sample in self._sampled:
            if id(parameter) not in present or not torch.equal(_sample(parameter), sample):
                return name
        return None


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)].clone()


def fingerprint_of(folder: Path, tokenizer: Any) -> Fingerprint:
    """Compute a model's fingerprint from its content.

    The weights are sampled: first, middle and last row of every tensor, in bf16, with its name and shape: about 7 MB of
    LLaMA-3-8B, read in a second. Raises ModelError if there are no safetensors files (pickles are not read).
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
