"""Tiny and weightless models, and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch


def make_tokenizer():
    """A byte-level tokenizer without merges: 256 bytes, then special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def tiny_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped queries: k and v are narrower than q
        "vocab_size": 258,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
        "bos_token_id": None,
        "pad_token_id": 257,
    }
    return LlamaConfig(**(settings | changes))


def meta_model(name: str):
    """A LLaMA of the catalog in its full shape, without memory for its weights."""
    from transformers import LlamaForCausalLM

    from qdense.catalogs.models import CATALOG

    model = CATALOG[name]
    shape = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config(**shape))


def make_tiny_model(folder: Path, seed: int = 0, **config) -> Path:
    """Save a random LLaMA of 100,000 parameters that qdense can load by its folder; `config` changes its `tiny_config`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**config)).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}


def family_config(model_type: str, **changes):
    """The configuration of a tiny model of any family. Rows of more than 24 tokens outgrow its sliding window, if it has one."""
    from transformers import AutoConfig

    from qdense.catalogs.families import FAMILIES

    family = FAMILIES.get(model_type)
    settings = tiny_config().to_diff_dict() | {"head_dim": 16, "num_key_value_heads": 2}
    settings = {key: value for key, value in settings.items() if key not in ("model_type", "rope_parameters")}
    if family is not None and family.has_experts:
        settings |= _EXPERTS
    if model_type == "qwen2":
        settings["use_sliding_window"] = True
    if model_type == "granite":
        settings["logits_scaling"] = 4.0
    if hasattr(
        AutoConfig.for_model(model_type), "sliding_window"
    ):  # a LLaMA with one would be cut short by Transformers' cache
        settings |= {"sliding_window": 24, "max_window_layers": 1}
    return AutoConfig.for_model(model_type, **(settings | changes))


def make_family_model(model_type: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Save a random tiny model of a family that qdense can load by its folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(family_config(model_type, **changes)).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
