"""RED, representation editing (arXiv:2402.15179), as a PEFT method: a scale and a bias on each adapted layer's output.

    h' = l_scale * h + l_bias        element by element; ones and zeros at first, so training starts from the base model

h is the output of down_proj, before the residual addition. 2 d_out numbers a layer: 2 * 4096 * 32 = 262,144 on LLaMA-3-8B
and on LLaMA-2-7B.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdense.catalogs.families import FAMILIES
from qdense.compat.peft import PeftTypeName, cast_input, register
from qdense.tuners.base import AdaptedLinear, LinearTuner, LinearTunerConfig

RED = PeftTypeName("RED")


@dataclass
class RedConfig(LinearTunerConfig):
    """Configuration of RED (arXiv:2402.15179). `target_modules` defaults to down_proj.

    Give the adapter fp32 (PEFT's autocast does): near 1 the numbers of bf16 are 0.004 apart, so updates of the usual size
    would not change a scale.
    """

    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with ones and zeros, so that the adapter changes nothing; False: random (tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RED


def red_output(h: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The edited representation.

    Args:
        h: (..., d_out), dtype of `scale`: the output of the frozen projection.
        scale: l_scale, (d_out,).
        bias: l_bias, (d_out,).

    Returns:
        (..., d_out), dtype of h.
    """
    return torch.addcmul(bias, h, scale)


class RedLinear(AdaptedLinear):
    """A frozen linear layer whose output each active adapter scales and shifts, one after the other."""

    adapter_layer_names = ("red_scale", "red_bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.red_scale = nn.ParameterDict({})
        self.red_bias = nn.ParameterDict({})

    def update_layer(self, adapter_name: str, config: RedConfig) -> None:
        """Add (or replace) the adapter `adapter_name`: scale and bias, (d_out,) each, in the dtype the base computes in."""
        new = torch.empty(self.out_features, dtype=self.adapter_dtype, device=self.weight.device)
        self.red_scale[adapter_name] = nn.Parameter(torch.ones_like(new))
        self.red_bias[adapter_name] = nn.Parameter(torch.zeros_like(new))
        if not config.init_weights:
            nn.init.normal_(self.red_scale[adapter_name], mean=1.0, std=0.1)
            nn.init.normal_(self.red_bias[adapter_name], std=0.1)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapt(self, adapter: str, taken: Tensor, output: Tensor) -> Tensor:
        scale, bias = self.red_scale[adapter], self.red_bias[adapter]
        return red_output(cast_input(self, output, scale.dtype), scale, bias).to(output.dtype)


class RedModel(LinearTuner):
    """A Transformers decoder adapted by RED (arXiv:2402.15179). Made by `peft.get_peft_model`."""

    prefix = "red_"
    method_name = "RED"
    tuner_layer_cls = RedLinear
    target_module_mapping = {  # noqa: RUF012  (PEFT's own type)
        kind: ["down_proj"] for kind, family in FAMILIES.items() if "down_proj" in family.modules
    }

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        raise ValueError(
            "A RED adapter is not merged: its scale could go into the weight, but its bias could not: LLaMA's linear "
            "layers have none. Keep the adapter beside the base."
        )


register(RED, RedConfig, RedModel)
