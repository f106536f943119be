"""Families of decoders, found by Transformers' `model_type`: a layer's linear modules, and what qdense does on each.

A new family is one entry in `FAMILIES`; tests/modeling/test_families.py then trains, packs and plans a tiny model of it.
A model of a type without an entry can be trained too, padded, if its layers have linear modules; what its plan cannot
know is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The paper's letters for the module kinds of a decoder layer (Table 3: QKV, UD, QKVUD).
MODULE_LETTERS = {
    "Q": "q_proj",
    "K": "k_proj",
    "V": "v_proj",
    "O": "o_proj",
    "G": "gate_proj",
    "U": "up_proj",
    "D": "down_proj",
}
PAPER_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

# Modules that hold several of these as one matrix.
FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Modules of a layer that read the same input, in the order in which a layer computes: attention, then the MLP.
SAME_INPUT = (
    ("qkv_proj", "q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_up_proj", "gate_proj", "up_proj"),
    ("down_proj",),
)
MLP_GROUPS = SAME_INPUT[2:]
MLP_MODULES = tuple(kind for group in MLP_GROUPS for kind in group)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SEPARATE = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one architecture.

    Attributes:
        model_type: Transformers' name of it, in config.json.
        models: what people know it as.
        tried_on: the real weights that it was trained on; "" for random ones only.
        modules: the linear modules of a layer that can be adapted.
        why_not_packed: why rows are padded; "" if they are packed.
        has_liger: whether training on Liger's norms, rotary embeddings and SwiGLU is tested.
        num_norms: of a layer, as wide as the model.
        norms_queries: whether queries and keys are normalised: each head, or all heads at once.
        keeps_scores: whether attention's scores exist as a matrix, because no fused kernel computes them.
        caps_logits: whether its logits are soft-capped, so that the loss needs all of them.
        has_experts: whether the MLP is a mixture of experts. Their weights are one tensor for all experts, which
            bitsandbytes does not quantize and no linear adapter reaches.
    """

    model_type: str
    models: str
    tried_on: str = ""
    modules: tuple[str, ...] = _SEPARATE
    why_not_packed: str = ""
    has_liger: bool = False
    num_norms: int = 2
    norms_queries: bool = False
    keeps_scores: bool = False
    caps_logits: bool = False
    has_experts: bool = False

    def module_of(self, kind: str) -> str:
        """The module of a layer that holds `kind`: itself, or a fused one. Any other name is returned as it is."""
        if kind in self.modules:
            return kind
        return next((fused for fused, parts in FUSED_MODULES.items() if kind in parts and fused in self.modules), kind)

    @property
    def is_planned(self) -> bool:
        """Whether memory was compared with real steps of its own: within 10%."""
        return not self.has_experts

    def as_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "models": self.models,
            "modules": list(self.modules),
            "packed": not self.why_not_packed,
            "why_not_packed": self.why_not_packed,
            "planned": self.is_planned,
            "liger": self.has_liger,
            "tried_on": self.tried_on,
        }

    @property
    def paper_modules(self) -> tuple[str, ...]:
        """The paper's modules (QKVUD), as far as its layers have them."""
        return tuple(dict.fromkeys(name for name in map(self.module_of, PAPER_TARGET_MODULES) if name in self.modules))


FAMILIES = {
    family.model_type: family
    for family in (
        Family(model_type="llama", models="LLaMA 2, 3 to 3.3; SmolLM2; TinyLlama; Yi", tried_on="SmolLM2-135M", has_liger=True),
        Family(model_type="llama4_text", models="Llama 4, text only", modules=_ATTENTION, has_experts=True,
               why_not_packed="its attention is chunked"),
        Family(model_type="mistral", models="Mistral 7B, Nemo, Small", has_liger=True),
        Family(model_type="ministral", models="Ministral"),
        Family(model_type="mixtral", models="Mixtral", modules=_ATTENTION, has_experts=True),
        Family(model_type="qwen2", models="Qwen 2, 2.5; QwQ", tried_on="Qwen2.5-Coder-0.5B", has_liger=True),
        Family(model_type="qwen3", models="Qwen 3", has_liger=True, norms_queries=True),
        Family(model_type="qwen3_moe", models="Qwen 3 with experts (30B-A3B)", modules=_ATTENTION, norms_queries=True,
               has_experts=True),
        Family(model_type="gemma", models="Gemma 1"),
        Family(model_type="gemma2", models="Gemma 2", num_norms=4, why_not_packed="its attention soft-caps its scores",
               keeps_scores=True, caps_logits=True),
        Family(model_type="gemma3_text", models="Gemma 3, text only", tried_on="Gemma-3-270M", num_norms=4, norms_queries=True),
        Family(model_type="phi3", models="Phi 3, 3.5, 4, 4-mini", modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Family(model_type="smollm3", models="SmolLM3", has_liger=True),
        Family(model_type="olmo2", models="OLMo 2", norms_queries=True),
        Family(model_type="olmo3", models="OLMo 3", norms_queries=True),
        Family(model_type="glm4", models="GLM 4", modules=(*_ATTENTION, "gate_up_proj", "down_proj"), num_norms=4),
        Family(model_type="granite", models="Granite 3"),
        Family(model_type="gpt_oss", models="gpt-oss", modules=_ATTENTION, has_experts=True, keeps_scores=True,
               why_not_packed="its attention has sinks"),
    )
}  # fmt: skip


def why_not_packed(model_type: str) -> str | None:
    """Why rows for models of this type are padded; None if they are packed."""
    family = FAMILIES.get(model_type)
    if family is None:
        return f"packing is not tested for {model_type} (`qdense models` lists the families for which it is)"
    return family.why_not_packed or None
