"""An adapter as a plain LoRA, which every program that reads LoRA can load: exactly where the adapter is a matrix, else fitted.

Fitted, because DenseLoRA with activations is no matrix: LoRA's A is the encoder E, which reads all that the adapter sees of
its input, and B the least-squares fit of the adapter's output y(x) to E x over the tokens of rows:

    B = argmin sum |y(x) - B E x|^2 = (sum y (E x)^T) (sum (E x) (E x)^T)^-1

Both sums are small, (d_out, r) and (r, r), so one pass over the rows serves all layers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from qdense.cache import appearing_folder, write_atomically
from qdense.data.examples import Example, encode_rows
from qdense.data.sources import load_training_set
from qdense.errors import AdapterError, DataError
from qdense.methods import METHODS, method_of
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card, refuse_used_folder
from qdense.modeling.load import BaseModel, load_base
from qdense.modeling.locate import Tell, locate_adapter
from qdense.ops.denselora import denselora_delta
from qdense.recipe import DataRecipe, load_recipe, model_recipe
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, RunFolder
from qdense.tuners.base import AdaptedLinear
from qdense.tuners.denselora.layer import DenseLoraLinear

_MOST_HELD_OUT = 200
_DAMPING = 1e-6  # of the mean eigenvalue, for directions that no token has


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what it lost.

    Attributes:
        folder: of the LoRA, in PEFT's format.
        is_exact: whether the adapter is a matrix, of which at most a part was cut off by a lower rank.
        lost_median, lost_worst: over the layers, |y - y'|^2 / |y|^2 of the adapter's output y and LoRA's y': of a fit, on the
            tokens it was fitted to; else of the matrices. `worst_layer` names the layer that lost most.
        losses, accuracies: of a fit, those of "base", "adapter" and the "fitted" LoRA on `num_held_out` rows that the fit did not
            see: the loss on the tokens that counted in training, and the share of them that were the likeliest.
    """

    folder: str
    rank: int
    is_exact: bool
    num_layers: int
    lost_median: float
    lost_worst: float
    worst_layer: str
    losses: dict[str, float] = field(default_factory=dict)
    accuracies: dict[str, float] = field(default_factory=dict)
    num_held_out: int = 0


class Factors(NamedTuple):
    """LoRA's factors of one layer, fp32: a (rank, d_in), b (d_out, rank); and what they lost."""

    a: Tensor
    b: Tensor
    lost: float


def export_lora(
    run: Path,
    output: Path,
    *,
    rank: int | None = None,
    fit: Path | None = None,
    num_rows: int = 512,
    max_length: int = 512,
    notice: Tell = lambda text: None,
) -> ExportReport:
    """Write the adapter of a run, or in an adapter's folder, as a LoRA.

    Args:
        rank: LoRA's; None is that of the adapter.
        fit: rows, like those of training, to which an adapter that cannot be written as a matrix is fitted.
        num_rows: how many of them are used, besides those held out.
        max_length: tokens at which they are cut.

    Raises:
        QDenseError: the adapter is a LoRA already, or no matrix and `fit` is None; or a file is missing or wrong.
    """
    refuse_used_folder(output)
    folder = locate_adapter(run, notice)
    card = read_card(folder)
    if (method := METHODS.get(card.method)) is not None and not method.is_adapter:
        raise AdapterError(f"{folder}: is a whole model; there is no adapter to export")
    base = load_base(model_recipe(card.model, source=str(folder / CARD_FILE)), notice, for_training=False)
    model = load_adapter(base, folder, card)
    layers = _exportable(model, folder)
    if all(layer.supports_lora_conversion("default") for layer in layers.values()):
        if fit is not None:
            raise AdapterError(f"--fit: {folder} is a matrix, which LoRA equals without a fit; omit it")
        factors = {name: _exact(layer, rank) for name, layer in layers.items()}
        return _write(model, card, output, factors, is_exact=True)
    training, held_out = _examples(folder, layers, fit, base, card, rank, num_rows, max_length)
    notice(f"fitting on {len(training)} rows; {len(held_out)} are held out")
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    with _hooked({name: each.observe for name, each in sums.items()}, layers):
        for example in training:
            _measured(base, model, [example])
    factors = {name: each.fit(rank) for name, each in sums.items()}
    measured = {"adapter": _measured(base, model, held_out)}
    with model.disable_adapter():
        measured["base"] = _measured(base, model, held_out)
        with _hooked({name: _lora_output(each) for name, each in factors.items()}, layers):
            measured["fitted"] = _measured(base, model, held_out)
    losses, accuracies = ({name: each[i] for name, each in measured.items()} for i in (0, 1))
    return _write(
        model,
        card,
        output,
        factors,
        is_exact=False,
        losses=losses,
        accuracies=accuracies,
        num_held_out=len(held_out),
    )


def _exportable(model: Any, folder: Path) -> dict[str, Any]:
    """The adapted layers, by name. Raises AdapterError unless they are of a tuner of ours that LoRA can stand for."""
    kind = model.peft_config["default"].peft_type
    if kind == "LORA":
        raise AdapterError(f"{folder}: is a LoRA already; take {PEFT_CONFIG_FILE} and {PEFT_WEIGHTS_FILE} from there")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    if not layers:
        raise AdapterError(
            f"{folder}: is of PEFT's own type {kind.value}; what PEFT can convert of these, peft.save_as_lora does"
        )
    for layer in layers.values():
        if not (isinstance(layer, DenseLoraLinear) or layer.supports_lora_conversion("default")):
            raise AdapterError(f"{folder}: {kind.value} scales and shifts a layer's output, which no LoRA does")
    return layers


def _exact(layer: AdaptedLinear, rank: int | None) -> Factors:
    a, b = layer.lora_factors("default")
    return _truncated(a, b, a @ a.T, rank)


def _truncated(a: Tensor, b: Tensor, gram: Tensor, rank: int | None, total: float | None = None) -> Factors:
    """The factors cut to `rank` where that loses least, for encodings a x whose squares sum to `gram` (r, r).

    Args:
        total: the sum of squares of what b a x stands for; None is that of b a x itself.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    root = vectors * values.clamp(min=0).sqrt()
    left, singular, _ = torch.linalg.svd(b.double() @ root, full_matrices=False)
    squares = singular.square()
    total = float(squares.sum()) if total is None else total
    if rank is not None and rank < len(a):
        kept = left[:, :rank].float()
        a, b, squares = kept.T @ b @ a, kept, squares[:rank]
    elif rank is not None and rank > len(a):
        raise AdapterError(f"--rank {rank}: the adapter has rank {len(a)}, which a LoRA of this rank stands for")
    return Factors(a, b, max(0.0, 1 - float(squares.sum()) / total) if total else 0.0)


# --- the fit -----------------------------------------------------------------------------------------------------------------


class _Sums:
    """Sums over the tokens that a DenseLoRA layer has seen: y z^T, z z^T and |y|^2, with z = E x and its output y, in fp32."""

    def __init__(self, layer: DenseLoraLinear) -> None:
        pair = layer.shared["default"]
        self.encoder, self.decoder = pair.encoder.detach().float(), pair.decoder.detach().float()
        self.m, self.scaling = layer.denselora_m["default"].detach().float(), layer.scaling["default"]
        self.activation = layer.activation["default"]
        rank = len(self.encoder)
        self.yz = self.encoder.new_zeros(len(self.decoder), rank)
        self.zz = self.encoder.new_zeros(rank, rank)
        self.yy = 0.0

    def observe(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        y = denselora_delta(x, self.encoder, self.m, self.decoder, scaling=self.scaling, activation=self.activation)
        z = F.linear(x, self.encoder)
        self.yz += y.T @ z
        self.zz += z.T @ z
        self.yy += float(y.square().sum())

    def fit(self, rank: int | None) -> Factors:
        damped = self.zz + _DAMPING * self.zz.trace() / len(self.zz) * torch.eye(len(self.zz), device=self.zz.device)
        b = torch.linalg.solve(damped.double(), self.yz.T.double()).T.float()
        return _truncated(self.encoder, b, self.zz, rank, total=self.yy)


def _lora_output(factors: Factors) -> Callable[..., Tensor]:
    """A hook that adds LoRA's output to a layer whose adapter is off."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0].float(), factors.a), factors.b).to(output.dtype)

    return add


@contextmanager
def _hooked(hooks: Mapping[str, Callable[..., Any]], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    handles = [layers[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _examples(
    folder: Path,
    layers: Mapping[str, DenseLoraLinear],
    fit: Path | None,
    base: BaseModel,
    card: AdapterCard,
    rank: int | None,
    num_rows: int,
    max_length: int,
) -> tuple[list[Example], list[Example]]:
    """Rows to fit to, and rows held out: a fifth of the file, at most 200, taken evenly. Raises QDenseError."""
    layer = next(iter(layers.values()))
    if fit is None:
        raise AdapterError(
            f"{folder}: this adapter cannot be written as a matrix, because of the activation ({layer.activation['default']}) "
            "between its factors, so no LoRA equals it. --fit ROWS fits one, to rows like those it was trained on, and says what "
            "is lost"
        )
    if rank is not None and rank > layer.r["default"]:
        raise AdapterError(f"--rank {rank}: a LoRA that is fitted has at most the adapter's rank, {layer.r['default']}")
    tables = {"path": str(fit), "template": card.template, "max_length": max_length, "bad_rows": "skip"}
    recipe = RunFolder.of_adapter(folder).recipe
    if recipe.is_file():  # what counted in the run's loss counts here
        tables["train_on"] = load_recipe(recipe).data.train_on
    data = DataRecipe.model_validate(tables)
    rows = load_training_set(data, None).rows
    if len(rows) < 10:
        raise DataError(f"{fit}: has {len(rows)} rows; a fit needs at least 10")
    every = max(5, math.ceil(len(rows) / _MOST_HELD_OUT))
    held_out = list(range(0, len(rows), every))
    training = [number for number in range(len(rows)) if number % every][:num_rows]
    encoded = (encode_rows(rows, numbers, base.tokenizer, data).examples for numbers in (training, held_out))
    return next(encoded), next(encoded)


@torch.no_grad()
def _measured(base: BaseModel, model: Any, examples: Sequence[Example]) -> tuple[float, float]:
    """The mean loss over all tokens that count, row by row, and the share of them that were the likeliest."""
    model.eval()
    total, num_likeliest, count = 0.0, 0, 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None].to(base.device)
        labels = torch.from_numpy(example.labels).long()[None].to(base.device)
        output = model(input_ids=ids, labels=labels, use_cache=False)
        total += float(output.loss) * example.num_labels
        num_likeliest += int((output.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
        count += example.num_labels
    return total / max(1, count), num_likeliest / max(1, count)


# --- writing -----------------------------------------------------------------------------------------------------------------


def _write(
    model: Any, card: AdapterCard, output: Path, factors: Mapping[str, Factors], *, is_exact: bool, **measured: Any
) -> ExportReport:
    """Write the LoRA, in fp32, with a card, so that qdense loads it too."""
    from peft import LoraConfig

    source = model.peft_config["default"]
    worst = max(factors, key=lambda name: factors[name].lost)
    rank = len(factors[worst].a)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the adapter's scale is in B
        target_modules=source.target_modules,
        exclude_modules=source.exclude_modules,
        layers_to_transform=source.layers_to_transform,
        layers_pattern=source.layers_pattern,
        base_model_name_or_path=source.base_model_name_or_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    tensors = {}
    for name, each in factors.items():
        tensors[f"{name}.lora_A.weight"] = each.a.cpu().clone()  # safetensors refuses tensors that share memory
        tensors[f"{name}.lora_B.weight"] = each.b.cpu().contiguous()
    with appearing_folder(output) as building:
        config.save_pretrained(str(building))
        save_file(tensors, building / PEFT_WEIGHTS_FILE)
        method = method_of(json.loads((building / PEFT_CONFIG_FILE).read_text(encoding="utf-8")))
        assert method is not None
        record = asdict(replace(card, method=method.name))
        write_atomically(building / CARD_FILE, json.dumps(record, indent=2) + "\n")
    lost = [each.lost for each in factors.values()]
    return ExportReport(
        folder=str(output),
        rank=rank,
        is_exact=is_exact,
        num_layers=len(factors),
        lost_median=statistics.median(lost),
        lost_worst=factors[worst].lost,
        worst_layer=worst,
        **measured,
    )
