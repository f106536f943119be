"""Families of models: a layer's linear modules, and the model types that each part supports."""

from __future__ import annotations

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

# Modules of a layer that read the same input, in the order in which a layer computes: attention, then the MLP.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MLP_GROUPS = SAME_INPUT[2:]
MLP_MODULES = tuple(kind for group in MLP_GROUPS for kind in group)

# --- model types: which of them each part supports ------------------------------------------------------

# Their decoders' linear layers have LLaMA's names, so an adapter finds its default targets.
LLAMA_NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
# Their attention is plainly causal (no soft cap, no sink; a window only if configured), so packed rows can be attended
# to one by one.
CAUSAL_ONLY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Training on Liger's norms, rotary embeddings and SwiGLU is tested.
LIGER_TESTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
