"""The models that qdense knows by name: hub id and shapes, without weights or network.

Shapes are those of the published config.json files. Other models are named by their hub id or folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qdense.catalogs.families import FAMILIES, Family


@dataclass(frozen=True)
class CatalogModel:
    """A decoder: its name here, its hub id, its shapes.

    Attributes:
        head_size: of one attention head, if not hidden_size / num_heads.
        model_type: Transformers' name of its architecture.
        linear_modules: of a layer, each with (name, d_in, d_out), where they do not follow from the sizes above.
        other_linears: parameters of the whole model's further linear modules, which cannot be adapted but are quantized.
        other_parameters: the rest of the whole model's, which is not quantized: experts, routers, biases.
        experts_per_token: that each token is sent to; intermediate_size is the width of all of these together.
        unknowns: what a plan for it cannot know, each a sentence without a full stop.
    """

    name: str
    hub_id: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    has_tied_embeddings: bool = False
    head_size: int | None = None
    model_type: str = "llama"
    linear_modules: tuple[tuple[str, int, int], ...] | None = None
    other_linears: int = 0
    other_parameters: int = 0
    experts_per_token: int = 0
    unknowns: tuple[str, ...] = ()

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.model_type)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def q_size(self) -> int:
        """Outputs of q_proj, inputs of o_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj, and of v_proj."""
        return self.num_kv_heads * self.head_dim

    @property
    def has_sliced_loss(self) -> bool:
        """Whether the loss is computed without the logits of all tokens: see qdense/modeling/loss.py."""
        return self.family is not None and not self.family.caps_logits

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Each linear module of a layer that can be adapted, with (d_in, d_out)."""
        if self.linear_modules is not None:
            return {name: (d_in, d_out) for name, d_in, d_out in self.linear_modules}
        hidden, q, kv, wide = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        shapes = {
            "qkv_proj": (hidden, q + 2 * kv),
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_up_proj": (hidden, 2 * wide),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }
        modules = self.family.modules if self.family else ()
        return {kind: shape for kind, shape in shapes.items() if kind in modules}

    @property
    def adapted_parameters(self) -> int:
        """Weights of the linear modules of all layers that can be adapted."""
        return self.num_layers * sum(d_in * d_out for d_in, d_out in self.linear_shapes().values())

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear modules, which are those that are quantized."""
        return self.adapted_parameters + self.other_linears

    @property
    def token_products(self) -> int:
        """Weights of all layers that a token is multiplied by."""
        has_experts = self.family is not None and self.family.has_experts
        experts = 3 * self.num_layers * self.hidden_size * self.intermediate_size if has_experts else 0
        return self.adapted_parameters + experts

    @property
    def num_parameters(self) -> int:
        """All parameters of the base, norms and embeddings included."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.has_tied_embeddings else 2)
        return self.linear_parameters + embeddings + self.norm_parameters + self.other_parameters

    @property
    def norm_parameters(self) -> int:
        """Weights of all norms as wide as the model."""
        return ((self.family.num_norms if self.family else 2) * self.num_layers + 1) * self.hidden_size


def is_hub_id(name: str) -> bool:
    """Whether this is OWNER/NAME, as repositories on the hub are called."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


CATALOG = {
    model.name: model
    for model in (
        CatalogModel("llama2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 32, 32, 11008, 32000),
        CatalogModel("llama2-13b", "meta-llama/Llama-2-13b-hf", 40, 5120, 40, 40, 13824, 32000),
        CatalogModel("llama2-70b", "meta-llama/Llama-2-70b-hf", 80, 8192, 64, 8, 28672, 32000),
        CatalogModel("llama3-8b", "meta-llama/Meta-Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
        CatalogModel("llama3-70b", "meta-llama/Meta-Llama-3-70B", 80, 8192, 64, 8, 28672, 128256),
        CatalogModel("llama3.2-1b", "meta-llama/Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128256, has_tied_embeddings=True),
        CatalogModel("llama3.2-3b", "meta-llama/Llama-3.2-3B", 28, 3072, 24, 8, 8192, 128256, has_tied_embeddings=True),
        CatalogModel(
            "smollm2-135m",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            30, 576, 9, 3, 1536, 49152,
            has_tied_embeddings=True,
        ),
    )
}  # fmt: skip
