"""The pictures of `qdense analyze`, by matplotlib: PNG files, in colours that colour-blind people can tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qdense.analysis.updates import NEAR_ZERO, RunUpdates, Slice, Update
from qdense.cache import write_atomically
from qdense.catalogs.families import MODULE_LETTERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAP = "cividis"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")  # Okabe and Ito
_LINES = ("-", "--", ":", "-.")
_LARGEST = 3.0  # of heat maps: root mean squares
_DECADES = 4  # of histograms
_DPI = 150


class Series(NamedTuple):
    """The matrices of one factor of one run: a slice for each layer and module."""

    run: str
    factor: str
    slices: dict[tuple[int, str], Slice]

    @property
    def label(self) -> str:
        return f"{self.run}: {self.factor}"

    @property
    def wrapped(self) -> str:
        """A short label."""
        return f"{self.run[:20] + '...' if len(self.run) > 23 else self.run}\n{self.factor}"


def series_of(runs: Sequence[RunUpdates], side: int, seed: int) -> list[Series]:
    """The series for heat maps: matrices that each layer has separately."""

    def is_drawn(update: Update) -> bool:
        return update.layer is not None and update.final.dim() == 2 and update.side >= side

    found = []
    for run in runs:
        for factor in run.factors():
            slices = {
                (u.layer, u.module): u.slice(side, seed) for u in run.of(factor) if u.layer is not None and is_drawn(u)
            }
            if slices:
                found.append(Series(run.label, factor, slices))
    return found


def draw_heat_maps(series: Sequence[Series], layers: Sequence[int], path: Path) -> None:
    """|change| of each element of each slice: a row for each series and layer, a column for each module kind."""
    plt = _pyplot()
    modules, rows = _modules(series), [(s, layer) for s in series for layer in layers]
    figure, axes = plt.subplots(
        len(rows),
        len(modules),
        figsize=(1.6 * len(modules) + 1.8, 1.5 * len(rows) + 1.2),
        squeeze=False,
        layout="constrained",
    )
    image: Any = None
    for row, (one, layer) in enumerate(rows):
        for column, module in enumerate(modules):
            axis = axes[row][column]
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(module, fontsize=9)
            if column == 0:
                axis.set_ylabel(f"{one.wrapped}\nlayer {layer}", fontsize=8)
            part = one.slices.get((layer, module))
            if part is None:
                axis.axis("off")
                continue
            change = part.change.abs() / (part.rms or 1.0)
            image = axis.imshow(change.numpy(), cmap=_MAP, vmin=0, vmax=_LARGEST, interpolation="nearest")
    side = next(iter(series[0].slices.values())).change.shape[0]
    figure.suptitle(
        f"Updates |W_end - W_init|, slices of {side} x {side}, each over its own root mean square", fontsize=10
    )
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / len(rows)), extend="max", pad=0.01)
    bar.set_label("|update| / RMS", fontsize=8)
    _save(figure, path)


def draw_layers(series: Sequence[Series], path: Path) -> None:
    """Three figures for each slice, by layer and module: size of the change, near-zero share, effective rank."""
    plt = _pyplot()
    from matplotlib.colors import LogNorm, Normalize

    modules = _modules(series)
    layers = sorted({layer for one in series for layer, _ in one.slices})
    measures: list[tuple[str, Callable[[Slice], float]]] = [
        ("RMS of the change", lambda part: part.rms or math.nan),
        (f"share below {NEAR_ZERO:g} RMS", lambda part: part.near_zero),
        ("effective rank", lambda part: part.effective_rank),
    ]
    figure, axes = plt.subplots(
        len(series),
        3,
        figsize=(13, (0.26 * len(modules) + 0.75) * len(series) + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for column, (name, measure) in enumerate(measures):
        tables = [
            torch.tensor(
                [[_measured(measure, one.slices.get((layer, module))) for layer in layers] for module in modules]
            )
            for one in series
        ]
        known = torch.cat([table[~table.isnan()] for table in tables])
        if not len(known):  # nothing has changed
            known = torch.ones(1)
        for row, (one, table) in enumerate(zip(series, tables, strict=True)):
            axis = axes[row][column]
            low, high = float(known.min()), float(known.max()) * 1.000001
            scale = LogNorm(low, high) if column == 0 else Normalize(low, high)
            image = axis.imshow(table.numpy(), cmap=_MAP, aspect="auto", norm=scale)
            step = max(1, len(layers) // 8)
            axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
            axis.set_yticks(range(len(modules)), modules if column == 0 else [], fontsize=7)
            axis.set_title(f"{one.label}: {name}" if column == 0 else name, fontsize=8)
            if row == len(series) - 1:
                axis.set_xlabel("layer", fontsize=8)
        figure.colorbar(image, ax=list(axes[:, column]), location="bottom", aspect=40, pad=0.02).ax.tick_params(
            which="both", labelsize=6
        )
    figure.suptitle("Updates by layer and module; one colour scale for each column", fontsize=10)
    _save(figure, path)


def draw_histograms(series: Sequence[Series], path: Path) -> None:
    """Histograms of the relative changes of all slices' elements, on a logarithmic axis."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    changes = [torch.cat([part.relative.flatten() for part in one.slices.values()]) for one in series]
    highest = max(float(change.max()) for change in changes) or 1.0
    edges = torch.logspace(math.log10(highest) - _DECADES, math.log10(highest), 81)
    for number, (one, change) in enumerate(zip(series, changes, strict=True)):
        below = 100 * float((change < edges[0]).float().mean())
        axis.hist(
            change.numpy(),
            bins=edges.tolist(),
            weights=[100 / len(change)] * len(change),
            histtype="step",
            linewidth=1.6,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            label=one.label + (f" ({below:.1f}% further left)" if below >= 0.05 else ""),
        )
    axis.set_xscale("log")
    axis.set_xlabel("relative change |W_end - W_init| / RMS(W_init); of tensors that start at zero, / RMS(W_end)")
    axis.set_ylabel("% of elements, in each of 80 bins")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _measured(measure: Callable[[Slice], float], part: Slice | None) -> float:
    return math.nan if part is None else measure(part)


def _modules(series: Sequence[Series]) -> list[str]:
    """Modules in the order of computation; names that are not LLaMA's last."""
    order = list(MODULE_LETTERS.values())
    names = dict.fromkeys(module for one in series for _, module in one.slices)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # never open a window
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
