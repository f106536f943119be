"""A base of any catalog shape with random NF4 weights, built on the device it is for: no download, and never the bf16 model.

Speed and memory do not depend on the values. LLaMA-3-8B takes 5.3 GiB and some seconds on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdense.catalogs.models import CatalogModel
from qdense.compat.bitsandbytes import never_repack
from qdense.modeling.load import BaseModel


def random_base(shape: CatalogModel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> BaseModel:
    """A frozen model like `load_base`'s, without a tokenizer."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.has_tied_embeddings,
        max_position_embeddings=2**20,
        use_cache=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)

    def values(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=0.02, generator=generator)

    for name, module in list(model.named_modules()):
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight = values(module.out_features, module.in_features)
            packed: Any = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
            )
            linear.weight = packed.to(device)  # quantizes
            never_repack(linear)
            setattr(parent, leaf, linear)
        elif isinstance(module, nn.Embedding) or module is model.lm_head:
            module.weight = nn.Parameter(values(*module.weight.shape), requires_grad=False)
        elif type(module).__name__.endswith("RMSNorm"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
        elif type(module).__name__.endswith("RotaryEmbedding"):  # its buffers are computed, not loaded
            with device:
                setattr(parent, leaf, type(module)(config))
    if shape.has_tied_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what PEFT asks for
    return BaseModel(shape.name, shape.name, model, None, {}, 0, device, "nf4")
