"""An adapter that is a matrix, added to its base's weights. The result is an ordinary model, with a rounding error.

W + dW is computed in fp32 and rounded once. The error is measured for each layer against the exact sum, and for the whole
model against the base with a separate adapter.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdense.cache import appearing_folder, require_free_space
from qdense.compat.peft import refuse_unmergeable
from qdense.data.templates import template_named
from qdense.data.wordproblems import test_rows
from qdense.errors import AdapterError
from qdense.methods import METHODS
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card, refuse_used_folder
from qdense.modeling.attach import adapter_tensors
from qdense.modeling.load import BaseModel, load_base, on_device, quantize_folder
from qdense.modeling.locate import Tell, locate_adapter
from qdense.recipe import ModelRecipe, model_recipe
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE

_NUM_PROMPTS = 8


@dataclass(frozen=True)
class MergeReport:
    """The cost of merging.

    Attributes:
        folder: of the merged model.
        onto: the weights that the adapter was added to: "original", or the values of "nf4".
        rounded_to: the format of the sum: "bfloat16" or "nf4".
        lost_median, lost_worst: || rounded - exact || / || dW || over the adapted layers: 0 loses nothing; at 1 the rounding is
            as large as the adapter itself. `worst_layer` names the layer that lost most.
        divergence: mean Kullback-Leibler divergence (nats a token) of the merged model from the base with a separate adapter.
        num_tokens, num_same: tokens it was measured on, and those for which both find the same next token most likely.
    """

    folder: str
    onto: str
    rounded_to: str
    num_layers: int
    lost_median: float
    lost_worst: float
    worst_layer: str
    divergence: float
    num_tokens: int
    num_same: int


def merge(run: Path, output: Path, *, onto: str, into_nf4: bool, notice: Tell) -> MergeReport:
    """Write base and adapter as one model in Transformers' format, with its tokenizer.

    Args:
        run: a run or an adapter's folder.
        onto: "original": the unquantized base; "nf4": the values that the adapter was trained on.
        into_nf4: quantize the sum to NF4 again, which rounds most of a small adapter away.

    Raises:
        AdapterError: the adapter is not a matrix, or does not fit, or `output` is in use.
    """
    refuse_used_folder(output)
    folder = locate_adapter(run, notice)
    card = read_card(folder)
    if (method := METHODS.get(card.method)) is not None and not method.is_adapter:
        raise AdapterError(f"{folder}: is already a whole model; there is nothing to merge")
    _refuse_activation(folder)
    recipe = _base_recipe(folder, card, onto)
    base = load_base(recipe, notice, for_training=False)
    if base.stored_as == "nf4":
        base.model.dequantize(dtype=getattr(torch, recipe.dtype))  # in place
    model = load_adapter(base, folder, card)
    for _, tensor in adapter_tensors(model):
        tensor.data = tensor.data.float()
    separate = _log_probabilities(base, model, card.template)
    try:
        lost = _merge_layers(model, into_nf4)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise AdapterError(f"{folder}: cannot be merged: {error}") from error
    merged = model.unload()
    merged.config.use_cache = True
    together = _log_probabilities(base, merged, card.template)
    report = _report(output, onto, "nf4" if into_nf4 else recipe.dtype, lost, separate, together)
    require_free_space(output, int(1.1 * merged.get_memory_footprint()), "the merged model")
    with appearing_folder(output) as building:
        # Not in the "original format": Transformers 5.23 cannot convert a base that was read in 4 bits back.
        merged.save_pretrained(building, save_original_format=False)
        base.tokenizer.save_pretrained(building)
        if into_nf4:
            quantize_folder(building, recipe.model_copy(update={"quantization": "nf4"}), base.device)
        record = {**asdict(report), "adapter": str(folder), "base": card.model, "fingerprint": base.fingerprint}
        (building / "qdense-merge.json").write_text(json.dumps(record, indent=2) + "\n")
    return report


def _refuse_activation(folder: Path) -> None:
    """AdapterError for DenseLoRA with an activation, before the base is loaded in vain."""
    try:
        config = json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
        is_bent = config["peft_type"] == "DENSELORA" and config["activation"] != "none"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # told of when the adapter is loaded
        return
    if is_bent:
        raise AdapterError(
            f"{folder}: DenseLoRA with an activation is no matrix, so it cannot be merged; qdense export --fit ROWS writes a "
            "LoRA close to it, which can"
        )


def _base_recipe(folder: Path, card: AdapterCard, onto: str) -> ModelRecipe:
    """How to load the base for the adapter in `folder`."""
    model = {**card.model, "quantization": "none" if onto == "original" else "nf4"}
    return on_device(model_recipe(model, source=str(folder / CARD_FILE)))


def _report(
    output: Path, onto: str, rounded_to: str, lost: dict[str, float], separate: Tensor, together: Tensor
) -> MergeReport:
    """From each layer's loss, and the log probabilities (tokens, vocabulary) with a separate adapter and with a merged one."""
    divergence = (separate.exp() * (separate - together)).sum(dim=-1)
    worst = max(lost, key=lambda name: lost[name])
    return MergeReport(
        folder=str(output),
        onto=onto,
        rounded_to=rounded_to,
        num_layers=len(lost),
        lost_median=statistics.median(lost.values()),
        lost_worst=lost[worst],
        worst_layer=worst,
        divergence=float(divergence.mean()),
        num_tokens=divergence.numel(),
        num_same=int((separate.argmax(dim=-1) == together.argmax(dim=-1)).sum()),
    )


def _merge_layers(model: Any, into_nf4: bool) -> dict[str, float]:
    """Merge each adapted layer in fp32 and round; returns the share of each layer's update that rounding lost."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    refuse_unmergeable(model)
    lost = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "merge"):
            continue
        linear = layer.get_base_layer()
        assert isinstance(linear, nn.Linear)
        before, dtype = linear.weight.data, linear.weight.dtype
        linear.weight.data = before.float()
        layer.merge(safe_merge=True)
        exact = linear.weight.data
        rounded = exact.to(dtype)
        stored = _through_nf4(rounded) if into_nf4 else rounded
        update = (exact - before.float()).norm()
        lost[name] = float((stored.float() - exact).norm() / update) if update else 0.0
        linear.weight.data = stored
    return lost


def _through_nf4(weight: Tensor) -> Tensor:
    """The values that a weight (d_out, d_in) takes in NF4 with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).to(weight.dtype)


@torch.no_grad()
def _log_probabilities(base: BaseModel, model: Any, template: str) -> Tensor:
    """Log probabilities of every next token in a few prompts: (tokens, vocabulary), fp32."""
    model.eval()
    rows = []
    for row in test_rows()[:_NUM_PROMPTS]:
        text = template_named(template, base.tokenizer).evaluation_prompt(row) + row.output
        ids = torch.tensor([base.tokenizer(text)["input_ids"]], device=base.device)
        rows.append(torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1))
    return torch.cat(rows)
