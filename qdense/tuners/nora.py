"""NoRA, nested low-rank adaptation (arXiv:2408.10280), as a PEFT method: a small trained pair inside a frozen one.

    dW = (alpha / r_inner) * B_out B_in A_in A_out

The outer pair, A_out (r, d_in) and B_out (d_out, r), is the rank-r SVD of the frozen weight W0 (dequantized, if the base is
quantized) and stays frozen. The inner pair, A_in (r_inner, r) and B_in (r, r_inner), is trained: 2 r r_inner numbers a layer.

The SVD is activation-aware where calibration statistics are given: W0 S = U Sigma V^T with S = diag(mean |x|^exponent), and
S^-1 goes into the input side. Three ways of splitting, U Sigma V^T S^-1 = B_out A_out:

    both     B_out = U Sigma^1/2     A_out = Sigma^1/2 V^T S^-1
    left     B_out = U Sigma         A_out = V^T S^-1
    right    B_out = U               A_out = Sigma V^T S^-1

Departures: B_in starts at zero, so training starts from the base model (the released CLIP code draws it with randn);
alpha / r_inner is LoRA's scaling.

    config = NoraConfig(r=64, r_inner=32, target_modules=["q_proj", "v_proj"])
    config.statistics = calibrate(base, batches, config)      # optional: without it, a plain SVD
    model = get_peft_model(base, config)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdense.compat.peft import PeftTypeName, buffers_by_adapter, cast_input, is_targeted, register
from qdense.tuners.base import AdaptedLinear, LinearTuner, LinearTunerConfig

NORA = PeftTypeName("NORA")
SPLITS = ("both", "left", "right")


@dataclass
class NoraConfig(LinearTunerConfig):
    """Configuration of NoRA (arXiv:2408.10280).

    Attributes:
        statistics: the result of `calibrate`, or None for a plain SVD. Read once, when the adapter is created. Not a field,
            so it is not saved.

    Raises ValueError, with the field and the accepted values, when a setting is out of range.
    """

    r: int = field(default=64, metadata={"help": "Rank of the frozen outer pair: (r, d_in) and (d_out, r)."})
    r_inner: int = field(
        default=32, metadata={"help": "Rank of the trained inner pair: (r_inner, r) and (r, r_inner)."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "The adapter's output is scaled by alpha / r_inner. Default: 2 * r_inner."}
    )
    dropout: float = field(default=0.0, metadata={"help": "On the input, in training."})
    split: str = field(
        default="both", metadata={"help": "Which outer factor holds the singular values: both, left, right."}
    )
    exponent: float = field(
        default=0.5,
        metadata={"help": "Exponent of |x| in the calibration statistics; 0.5 as in ASVD (arXiv:2312.05821)."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with B_in = 0, so that the adapter adds nothing; False: random (tests)."}
    )
    init_outer: bool = field(
        default=True,
        metadata={"help": "Compute the outer pair. Saved configurations say False: the saved weights hold it."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NORA
        self.statistics: dict[str, Tensor] | None = None
        self._require_positive_integer("r")
        self._require_positive_integer("r_inner")
        self._require(self.r_inner <= self.r, "r_inner", f"at most r = {self.r}: a wider inner pair has no higher rank")
        if self.alpha is None:
            self.alpha = float(2 * self.r_inner)
        self._require(self.alpha > 0, "alpha", "positive")
        self._require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self._require(self.split in SPLITS, "split", f"one of {', '.join(SPLITS)}")
        self._require(self.exponent > 0, "exponent", "positive")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with init_outer = false: the weights beside it hold the outer pair."""
        saved = copy.copy(self)
        saved.init_outer = False
        super(NoraConfig, saved).save_pretrained(save_directory, **kwargs)


def nora_delta(
    x: Tensor, outer_a: Tensor, inner_a: Tensor, inner_b: Tensor, outer_b: Tensor, *, scaling: float
) -> Tensor:
    """Adapter output that is added to the frozen projection: scaling * B_out (B_in (A_in (A_out x))).

    The inner pair computes in its own dtype; fp32 beside a bf16 base costs almost nothing.

    Args:
        x: (..., d_in), dtype of the outer pair.
        outer_a: A_out, (r, d_in).
        inner_a: A_in, (r_inner, r).
        inner_b: B_in, (r, r_inner), dtype of A_in.
        outer_b: B_out, (d_out, r), dtype of A_out.
        scaling: alpha / r_inner.

    Returns:
        (..., d_out), dtype of x.
    """
    inner = F.linear(F.linear(F.linear(x, outer_a).to(inner_a.dtype), inner_a), inner_b)
    return F.linear((scaling * inner).to(outer_b.dtype), outer_b)


def outer_pair(
    weight: Tensor, r: int, *, split: str = "both", activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A_out and B_out of a weight: its best rank-r approximation under S, as two factors.

    One full SVD in fp32 on the weight's device, since randomized ones are not exact: O(d_out d_in min(d_out, d_in)). One CPU
    core took 0.12 s for 576 x 1536 and 1.9 s for 2048 x 2048; LLaMA-3-8B's 160 should take it an hour or two, so load the
    model on a GPU (not timed).

    Args:
        weight: W0, (d_out, d_in), any float dtype.
        r: at most min(d_out, d_in).
        split: which factor holds the singular values, one of `SPLITS`.
        activation_scale: the diagonal of S, (d_in,), not negative; None for S = I.

    Returns:
        A_out (r, d_in) and B_out (d_out, r), fp32, on the weight's device.
    """
    weight = weight.detach().float()
    if activation_scale is None:
        u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        scale = activation_scale.to(weight)
        # An input that was always zero has no inverse; a value far below the largest makes its share of W0 S negligible.
        scale = scale.clamp_min(1e-6 * scale.max().item())
        u, sigma, v = torch.linalg.svd(weight * scale, full_matrices=False)
        v = v / scale
    u, sigma, v = u[:, :r], sigma[:r], v[:r]
    left = {"both": sigma.sqrt(), "left": sigma, "right": torch.ones_like(sigma)}[split]
    right = {"both": sigma.sqrt(), "left": torch.ones_like(sigma), "right": sigma}[split]
    return (right[:, None] * v).contiguous(), (u * left).contiguous()


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[Mapping[str, Tensor]], config: NoraConfig) -> dict[str, Tensor]:
    """Mean |x|^exponent of each input feature, of the linear layers that `config` targets.

    Args:
        model: the base, before it is adapted.
        batches: `input_ids` (batch, length) and, with padding, `attention_mask`; padded tokens do not count.
        config: its targets and its exponent are read.

    Returns:
        Name of the module in the model -> (d_in,), fp32: `config.statistics`.
    """
    targets = NoraModel.targets_of(config, model)
    sums: dict[str, Tensor] = {}
    num_tokens = 0
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            powers = args[0].float().abs().pow(config.exponent)
            total = torch.einsum("bti,bt->i", powers, mask.to(powers))
            sums[name] = sums[name] + total if name in sums else total

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in targets.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            input_ids = batch["input_ids"].to(model.device)
            attention_mask = batch.get("attention_mask")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(model.device)
            num_tokens += int(mask.sum())
            model(input_ids=input_ids, attention_mask=attention_mask if attention_mask is None else mask)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if num_tokens == 0:
        raise ValueError("NoRA's calibration was given no tokens.")
    return {name: total / num_tokens for name, total in sums.items()}


class NoraLinear(AdaptedLinear):
    """A frozen linear layer (float, 4-bit or 8-bit) plus NoRA's output for each active adapter.

    The outer pair is in buffers and not in parameters, which PEFT could make trainable.
    """

    adapter_layer_names = ("nora_inner_a", "nora_inner_b")
    other_param_names = ("nora_outer_a", "nora_outer_b", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.nora_inner_a = nn.ParameterDict({})
        self.nora_inner_b = nn.ParameterDict({})
        self.nora_outer_a = buffers_by_adapter()
        self.nora_outer_b = buffers_by_adapter()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: NoraConfig, activation_scale: Tensor | None) -> None:
        """Add (or replace) the adapter `adapter_name`, in the dtype the base computes in.

        A_in is Kaiming uniform, B_in zero. With `init_outer` False the outer pair is NaN, to be loaded.
        """
        if config.r > min(self.in_features, self.out_features):
            raise ValueError(
                f"NoraConfig.r = {config.r}: must be at most {min(self.in_features, self.out_features)}, the rank of a weight "
                f"that maps {self.in_features} -> {self.out_features}."
            )
        assert config.alpha is not None
        self.scaling[adapter_name] = config.alpha / config.r_inner
        self.dropout[adapter_name] = config.dropout
        dtype, device = self.adapter_dtype, self.weight.device
        if config.init_outer:
            outer_a, outer_b = outer_pair(
                self.get_base_weight(), config.r, split=config.split, activation_scale=activation_scale
            )
        else:
            outer_a = torch.full((config.r, self.in_features), math.nan, device=device)
            outer_b = torch.full((self.out_features, config.r), math.nan, device=device)
        self.nora_outer_a[adapter_name] = outer_a.to(device, dtype)
        self.nora_outer_b[adapter_name] = outer_b.to(device, dtype)
        for pair, shape in (
            (self.nora_inner_a, (config.r_inner, config.r)),
            (self.nora_inner_b, (config.r, config.r_inner)),
        ):
            pair[adapter_name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            if config.init_weights and pair is self.nora_inner_b:
                nn.init.zeros_(pair[adapter_name])
            else:
                nn.init.kaiming_uniform_(pair[adapter_name], a=math.sqrt(5))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapt(self, adapter: str, taken: Tensor, output: Tensor) -> Tensor:
        outer_a = self.nora_outer_a[adapter]
        delta = nora_delta(
            F.dropout(cast_input(self, taken, outer_a.dtype), self.dropout[adapter], self.training),
            outer_a,
            self.nora_inner_a[adapter],
            self.nora_inner_b[adapter],
            self.nora_outer_b[adapter],
            scaling=self.scaling[adapter],
        )
        return output + delta.to(output.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        outer_a, outer_b = self.nora_outer_a[adapter].float(), self.nora_outer_b[adapter].float()
        inner = self.nora_inner_b[adapter].float() @ self.nora_inner_a[adapter].float()
        return self.scaling[adapter] * (outer_b @ inner @ outer_a)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        outer_a, outer_b = self.nora_outer_a[adapter].float(), self.nora_outer_b[adapter].float()
        inner_a, inner_b = (pair[adapter].detach().float() for pair in (self.nora_inner_a, self.nora_inner_b))
        return inner_a @ outer_a, self.scaling[adapter] * (outer_b @ inner_b)


class NoraModel(LinearTuner):
    """A Transformers decoder adapted by NoRA (arXiv:2408.10280). Made by `peft.get_peft_model`."""

    prefix = "nora_"
    method_name = "NoRA"
    tuner_layer_cls = NoraLinear

    @classmethod
    def targets_of(cls, config: NoraConfig, model: Any) -> dict[str, nn.Linear]:
        """The linear layers of `model` that `config` targets, by name."""
        if config.target_modules is None:
            config = copy.copy(config)
            config.target_modules = cls.target_module_mapping.get(model.config.model_type, [])
        targets = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and is_targeted(config, name)
        }
        if not targets:
            raise ValueError(
                f"NoraConfig.target_modules = {config.target_modules!r}: the model has no such linear layer."
            )
        return targets

    def update_layer(self, layer: Any, adapter_name: str, config: Any, kind: str, key: str) -> None:
        statistics = config.statistics
        if statistics is not None and key not in statistics:
            raise ValueError(
                f"NoraConfig.statistics does not include {key}. Measure it on the same base, with the same target_modules: "
                "calibrate(model, batches, config)."
            )
        layer.update_layer(adapter_name, config, None if statistics is None else statistics[key])


register(NORA, NoraConfig, NoraModel)
