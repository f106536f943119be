"""Adapters with random weights, as a run would save them."""

from __future__ import annotations

from pathlib import Path

import torch

from qdense.inference.generation import DECODINGS, Prompt, generate
from qdense.modeling.adapter_files import AdapterCard, save_adapter
from qdense.modeling.attach import adapter_tensors, attach_adapter
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe
from qdense.runs import RunFolder


def make_run(
    model_folder: Path, run: Path, *, seed: int, method="denselora", template="alpaca", std=0.3, **model
) -> Path:
    """A run whose adapter changes what a tiny model says; returns its folder."""
    settings = {"name": str(model_folder), "quantization": "none", "dtype": "float32", "device": "cpu"} | model
    base = load_base(ModelRecipe(**settings))
    adapted = attach_adapter(base, AdapterRecipe(method=method, r=4, dropout=0.0, dtype="float32"), 1)
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in adapter_tensors(adapted):
        tensor.data = std * torch.randn(tensor.shape, generator=generator)
    folder = RunFolder(run).adapter
    folder.mkdir(parents=True)
    save_adapter(adapted, folder, AdapterCard(settings, base.fingerprint, template, method))
    return run


def alone(loaded, text: str, model: str | None, decoding=DECODINGS["greedy"], **settings):
    """What the search makes of one text by itself, with the adapter of this name or the bare base."""
    prompt = Prompt(0, 0, loaded.base.tokenizer(text)["input_ids"])
    settings = {"max_new_tokens": 12, "stop": (), "batch_size": 1} | settings
    with loaded.answering(model):
        return next(iter(generate(loaded.base, loaded.model, [prompt], decoding, **settings)))
