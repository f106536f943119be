"""AdaLoRA (arXiv:2303.10512), PEFT's own: starts with a higher rank than it ends with, and keeps rank where it matters.

PEFT's schedule is in steps; here it is in shares of the run, so that it fits any length. PEFT expects the training loop to
run it, which `RankSchedule.step` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qdense.compat.peft import rank_averages
from qdense.methods.costs import (
    NO_COPIES,
    AdapterSettings,
    Computation,
    Costs,
    LinearShapes,
    ModuleCosts,
    input_bytes_if_trained,
    low_rank,
    no_frozen_parameters,
)
from qdense.methods.method import Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor


class AdaLoraSettings(MethodSettings):
    """[adapter.adalora]; the defaults of rank and regularisation are PEFT's, the shares those of the paper's GLUE runs."""

    initial_r: float = Field(1.5, ge=1, le=8, description="a number from 1 to 8: the initial rank, as a multiple of r")
    warmup_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="a number from 0 up to, but not including, 1: the share of the steps before ranks are first cut",
    )
    final_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="a number from 0 up to, but not including, 1: the share of the steps after the last cut",
    )
    cut_every: int = Field(10, ge=1, description="a positive whole number: the steps from one cut to the next")
    orthogonality: float = Field(
        0.5, ge=0, description="a number, 0 or more: the weight of the orthogonality term in the loss"
    )


def _initial_r(adapter: AdapterSettings) -> int:
    return int(adapter.method_settings.initial_r * adapter.r)


def _build_config(adapter: AdapterSettings, num_steps: int) -> Any:
    from peft import AdaLoraConfig

    settings: AdaLoraSettings = adapter.method_settings
    first_cut = int(settings.warmup_share * num_steps)
    last_cut = num_steps - int(settings.final_share * num_steps)
    if first_cut >= last_cut:
        raise ValueError(
            f"AdaLoRA has no step in which to cut ranks: warmup_share = {settings.warmup_share} and "
            f"final_share = {settings.final_share} leave none of the {num_steps} steps. Lower one of them."
        )
    return AdaLoraConfig(
        target_r=adapter.r,
        init_r=_initial_r(adapter),
        tinit=first_cut,
        tfinal=num_steps - last_cut,
        deltaT=settings.cut_every,
        total_step=num_steps,
        orth_reg_weight=settings.orthogonality,
        lora_alpha=adapter.scaling_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )


def _count_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out + 1) r_initial for each layer: the initial count; fewer remain at the end."""
    r = _initial_r(adapter)
    return {kind: (d_in + d_out + 1) * r * num_layers for kind, (d_in, d_out) in shapes.items()}


def _module(at: Computation, d_in: int, d_out: int) -> ModuleCosts:
    """LoRA's at the initial rank, and A times the singular values, which is kept."""
    r = _initial_r(at.adapter)
    scaled = dataclasses.replace(NO_COPIES, kept=at.width * r * d_in)
    return dataclasses.replace(low_rank(at, d_in, d_out, r=r), weights=scaled)


class _Schedule:
    """Runs PEFT's rank allocator and saves its state."""

    @contextmanager
    def auxiliary_loss(self, model: Any, share: float) -> Iterator[None]:
        config = model.peft_config["default"]
        weight, config.orth_reg_weight = config.orth_reg_weight, share * config.orth_reg_weight
        try:
            yield
        finally:
            config.orth_reg_weight = weight

    def step(self, model: Any, step: int) -> None:
        config = model.peft_config["default"]
        last_cut = config.total_step - config.tfinal
        # The last cut happens at one step. If that step was skipped, for values that were not finite, it happens at the next.
        is_late = step > last_cut and not self.has_settled(model, step)
        model.base_model.update_and_allocate(last_cut if is_late else step)

    def state(self, model: Any) -> tuple[dict[str, Tensor], Any]:
        averages = {
            f"{name}/{key}": value for name, values in rank_averages(model).items() for key, value in values.items()
        }
        return averages, model.peft_config["default"].rank_pattern

    def restore(self, model: Any, tensors: Mapping[str, Tensor], values: Any) -> None:
        averages = rank_averages(model)
        model.peft_config["default"].rank_pattern = values
        parameters = dict(model.base_model.model.named_parameters())
        for held in averages.values():
            held.clear()
        for place, value in tensors.items():
            name, _, key = place.partition("/")
            averages[name][key] = value.to(parameters[key].device)

    def has_settled(self, model: Any, step: int) -> bool:
        config = model.peft_config["default"]
        # PEFT drops its averages with the last cut.
        return bool(step >= config.total_step - config.tfinal and not rank_averages(model)["ipt"])


def final_ranks(model: Any) -> list[int]:
    """The rank that each layer has now: singular values that are not zero."""
    import torch

    return [int(torch.count_nonzero(p)) for name, p in model.named_parameters() if ".lora_E." in name]


def _comparable_initial(config: Mapping[str, Any], name: str, initial: Any) -> Any:
    """PEFT saves only the remaining ranks."""
    for pattern, kept in (config["rank_pattern"] or {}).items():
        if name.startswith(f"base_model.model.{pattern.rpartition('.lora_E')[0]}."):
            return initial[:, list(map(bool, kept))] if name.endswith("lora_B") else initial[list(map(bool, kept))]
    return initial


def _freeze_counters(model: Any) -> None:
    """PEFT counts each layer's rank, a constant, as trainable."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


METHOD = Method(
    name="adalora",
    summary="AdaLoRA, PEFT's: moves rank to the layers that need it",
    learning_rate=lambda adapter: 1e-2,
    adapter_keys=frozenset({"r", "alpha", "dropout", "target_modules"}),
    build_config=_build_config,
    count_parameters=_count_parameters,
    costs=Costs(
        of_input=input_bytes_if_trained,
        of_module=_module,
        frozen_parameters=no_frozen_parameters,
        has_weight_penalty=True,
    ),
    quantizations=("nf4", "none"),
    why_not_quantized="PEFT's AdaLoRA multiplies fp32 inputs by bf16 factors on an 8-bit base (peft 0.21)",
    peft_type="ADALORA",
    size_keys=("init_r",),
    reads_base_weights=False,
    factors={"lora_A": "A", "lora_B": "B", "lora_E": "E"},
    # The orthogonality term moves A and B from the start too, unless it is switched off.
    has_gradient_at_start=lambda name: ".lora_E." in name,
    settings=AdaLoraSettings,
    prepare=_freeze_counters,
    schedule=_Schedule(),
    comparable_initial=_comparable_initial,
)
