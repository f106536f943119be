"""What LLaMA-like models have in common: the names of a layer's linear modules, and which of them read the same input."""

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
