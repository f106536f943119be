"""The updates of a run's trained tensors, W_end - W_init, and statistics that compare them fairly.

DenseLoRA's M is r x r, LoRA's A is r x d_in: statistics of whole tensors would compare sizes. So each tensor is
represented by a square slice of equal side, with rows and columns drawn at random.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qdense.errors import AdapterError
from qdense.methods import METHODS, Method
from qdense.modeling.adapter_files import read_card
from qdense.runs import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, RunFolder, find_adapter

NEAR_ZERO = 0.1  # of the slice's root mean square; it contains 8.0% of a normal distribution


@dataclass(frozen=True)
class Update:
    """One trained tensor before and after.

    Attributes:
        layer: its decoder layer; None for a shared tensor.
        module: the module kind, for instance q_proj.
        factor: which of the method's tensors it is: M, encoder, decoder, lora_A, lora_B, ...
        initial, final: (rows, columns) or (n,), fp32.
    """

    layer: int | None
    module: str
    factor: str
    initial: Tensor
    final: Tensor

    @property
    def side(self) -> int:
        """Side of the largest square in it."""
        return min(self.final.shape)

    def slice(self, side: int, seed: int) -> Slice:
        """A square of `side` random rows and columns; for a vector, `side` elements."""
        generator = torch.Generator().manual_seed(seed)
        initial, final = self.initial, self.final
        for dim, size in enumerate(final.shape):
            chosen = torch.randperm(size, generator=generator)[:side].sort().values
            initial, final = initial.index_select(dim, chosen), final.index_select(dim, chosen)
        return Slice(initial, final)


@dataclass(frozen=True)
class Slice:
    """Part of a tensor before and after, and statistics of its update."""

    initial: Tensor
    final: Tensor

    @cached_property
    def change(self) -> Tensor:
        return self.final - self.initial

    @cached_property
    def rms(self) -> float:
        return float(self.change.square().mean().sqrt())

    @property
    def relative(self) -> Tensor:
        """|change| of each element over the root mean square of the initial slice, or of the final one if that is zero."""
        initial = float(self.initial.square().mean().sqrt())
        return self.change.abs() / (initial or float(self.final.square().mean().sqrt()) or 1.0)

    @property
    def near_zero(self) -> float:
        """Share of elements whose change is below NEAR_ZERO times the root mean square of the slice's change."""
        return float((self.change.abs() <= NEAR_ZERO * self.rms).float().mean())

    @property
    def unmoved(self) -> float:
        """Share of saved elements that are bit by bit unchanged."""
        return float((self.change == 0).float().mean())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalized singular values (Roy and Vetterli 2007); 0 without change, NaN for a vector."""
        if self.change.dim() != 2:
            return math.nan
        values = torch.linalg.svdvals(self.change.double())
        if not float(values.sum()):
            return 0.0
        share = values / values.sum()
        return float(torch.exp(-torch.special.xlogy(share, share).sum()))


@dataclass(frozen=True)
class RunUpdates:
    """A run's updates.

    Attributes:
        label: the run's folder name.
        method: of its adapter.
        updates: of all trained tensors, layer by layer.
    """

    label: str
    method: str
    updates: list[Update]

    def factors(self) -> list[str]:
        """The kinds of its tensors, per-layer ones first."""
        ordered = sorted(self.updates, key=lambda update: (update.layer is None, update.final.dim() < 2))
        return list(dict.fromkeys(update.factor for update in ordered))

    def of(self, factor: str) -> list[Update]:
        return [update for update in self.updates if update.factor == factor]


def load_updates(run: Path) -> RunUpdates:
    """What training changed in a finished run, from its saved initial and final values. Raises AdapterError."""
    adapter = find_adapter(run)
    folder, card = RunFolder.of_adapter(adapter), read_card(adapter)
    method = METHODS.get(card.method)
    config: dict[str, Any] = {}
    if method is not None and not method.is_adapter:
        initial, final = _whole_model(adapter, card.model)
    else:
        if not folder.initial.is_file():
            raise AdapterError(
                f"{run}: has no {folder.initial.name}, from which updates are measured. `qdense train` writes it when a run "
                "begins; an adapter alone, or a run of an older version of qdense, has none: train again with its own "
                f"{folder.recipe.name}."
            )
        initial, final = _named_alike(_read(folder.initial)), _named_alike(_read(adapter / PEFT_WEIGHTS_FILE))
        config = json.loads((adapter / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
    found = _changes(run, initial, final, method, config)
    if not found:
        raise AdapterError(
            f"{run}: none of the adapter's tensors is in {folder.initial.name}, so the two belong to different runs"
        )
    return RunUpdates(folder.path.resolve().name, card.method, found)


def _changes(
    run: Path,
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    method: Method | None,
    config: Mapping[str, Any],
) -> list[Update]:
    """The update of each tensor in `final` that was trained, layer by layer; `config` is PEFT's of the adapter."""
    found = []
    for name, end in final.items():
        if (start := initial.get(name)) is None:
            continue  # saved, not trained: a frozen part
        if not end.numel():
            continue  # the layer's rank was cut to 0
        if method is not None:
            start = method.comparable_initial(config, name, start)
        if start.shape != end.shape:
            raise AdapterError(
                f"{run}: {name} has shape {list(start.shape)} at the start and {list(end.shape)} at the end"
            )
        layer, module, factor = _place(name)
        if method is not None:
            factor = method.factors.get(factor, factor)
        found.append(Update(layer, module, factor, start.float().squeeze(), end.float().squeeze()))
    return sorted(found, key=lambda update: (update.layer is None, update.layer or 0))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error


def _named_alike(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names in a saved file, from which PEFT omits the adapter's name and some ".weight"."""
    return {name.replace(".default", "").removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def _whole_model(folder: Path, model: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the linear layers that full fine-tuning changed, before (from the base) and after."""
    from qdense.modeling.load import load_base
    from qdense.recipe import ModelRecipe

    base = dict(load_base(ModelRecipe(**model)).model.named_parameters())
    final = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in _read(path).items()}
    changed = {
        name: tensor for name, tensor in final.items() if tensor.dim() == 2 and not torch.equal(tensor, base[name])
    }
    return {name: base[name].detach() for name in changed}, changed


def _place(name: str) -> tuple[int | None, str, str]:
    """Layer, module kind and last part of a tensor's name "...layers.3.mlp.up_proj.PART"."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    *_, module, factor = name.split(".")
    return (int(layer[1]) if layer else None), module, factor


@dataclass(frozen=True)
class FactorSummary:
    """One kind of a run's tensors: medians over slices.

    Attributes:
        num_tensors, num_elements: of whole tensors.
        num_slices: one for each tensor that is large enough.
        relative_change: root mean square of the relative changes.
        near_zero, unmoved, effective_rank: as in `Slice`; the last is None for vectors.
    """

    run: str
    factor: str
    num_tensors: int
    num_elements: int
    num_slices: int
    relative_change: float
    near_zero: float
    unmoved: float
    effective_rank: float | None


def summarize(runs: Sequence[RunUpdates], side: int, seed: int) -> list[FactorSummary]:
    """A line for each run and factor; last, for comparison, an update of independent normal numbers."""
    summaries = []
    for run in runs:
        for factor in run.factors():
            updates = run.of(factor)
            slices = [update.slice(side, seed) for update in updates if update.side >= side or update.final.dim() < 2]
            summaries.append(_summary(run.label, factor, [update.final.numel() for update in updates], slices))
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(side, side, generator=generator) for _ in range(32)]
    return [*summaries, _summary("independent normal numbers", "", [], [Slice(torch.zeros_like(x), x) for x in noise])]


def _summary(run: str, factor: str, num_elements: Sequence[int], slices: Sequence[Slice]) -> FactorSummary:
    def median(values: Iterator[float]) -> float:
        return float(torch.tensor(list(values), dtype=torch.float64).nanmedian())

    rank = median(part.effective_rank for part in slices)
    return FactorSummary(
        run=run,
        factor=factor,
        num_tensors=len(num_elements),
        num_elements=sum(num_elements),
        num_slices=len(slices),
        relative_change=median(float(part.relative.square().mean().sqrt()) for part in slices),
        near_zero=median(part.near_zero for part in slices),
        unmoved=median(part.unmoved for part in slices),
        effective_rank=None if math.isnan(rank) else rank,
    )


def common_side(runs: Sequence[RunUpdates]) -> int:
    """The largest side that half of the matrices of each kind have; for runs that only trained vectors, the length of the

    shortest. Half, because a method that cuts ranks leaves some with a rank or two.
    """
    matrices = [[u.side for u in run.of(factor) if u.final.dim() == 2] for run in runs for factor in run.factors()]
    sides = [statistics.median_high(sides) for sides in matrices if sides]
    return min(sides or [u.side for run in runs for u in run.updates])
