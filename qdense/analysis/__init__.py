"""What training changed in adapters, as numbers (`updates`) and as pictures (`figures`); the paper's Fig. 1 and 5."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qdense.analysis.updates import NEAR_ZERO, FactorSummary, common_side, load_updates, summarize
from qdense.cache import write_atomically
from qdense.errors import QDenseError
from qdense.runs import AnalysisFolder, RunFolder, find_adapter

_LARGEST_SIDE = 64  # by default: larger ones show no more


@dataclass(frozen=True)
class Analysis:
    """The result of `qdense analyze`.

    Attributes:
        folder, files: where everything was written.
        side, seed: of the slices.
        near_zero: the bound for changes counted in `FactorSummary.near_zero`, in root mean squares.
        summaries: a line for each run and kind of tensor, and one for independent normal numbers, for comparison.
    """

    folder: str
    files: list[str]
    side: int
    seed: int
    near_zero: float
    summaries: list[FactorSummary]


def analyze(
    runs: Sequence[Path], output: Path | None, *, layers: Sequence[int] | None, side: int | None, seed: int
) -> Analysis:
    """Compare the updates of finished runs; write a summary and, if there are matrices, three pictures.

    Args:
        output: the folder to write into; None for analysis/ in the first run.
        layers: those in the heat maps; None for the first, a middle one and the last.
        side: of the slices; None for `common_side`, up to 64; smaller matrices are omitted.

    Raises:
        QDenseError: a run has no initial values, lacks a requested layer, or has smaller matrices.
    """
    from qdense.analysis import figures

    loaded = [load_updates(run) for run in runs]
    if len({one.label for one in loaded}) < len(loaded):
        loaded = [replace(one, label=str(run)) for one, run in zip(loaded, runs, strict=True)]
    possible = common_side(loaded)
    if side is not None and side > possible:
        raise QDenseError(f"--side {side}: matrices of these runs have {possible} rows or columns; give at most that")
    side = side or min(possible, _LARGEST_SIDE)
    series = figures.series_of(loaded, side, seed)
    pictures = []
    folder = AnalysisFolder(output) if output is not None else RunFolder.of_adapter(find_adapter(runs[0])).analysis
    if series:
        known = sorted({layer for one in series for layer, _ in one.slices})
        unknown = [layer for layer in layers or () if layer not in known]
        if unknown:
            raise QDenseError(f"--layers {unknown[0]}: these runs have the layers {known[0]} to {known[-1]}")
        layers = layers or list(dict.fromkeys((known[0], known[len(known) // 2], known[-1])))
        figures.draw_heat_maps(series, layers, folder.heat_maps)
        figures.draw_layers(series, folder.layers)
        figures.draw_histograms(series, folder.histograms)
        pictures = [folder.heat_maps, folder.layers, folder.histograms]
    files = [path.name for path in (*pictures, folder.summary)]
    analysis = Analysis(str(folder.path), files, side, seed, NEAR_ZERO, summarize(loaded, side, seed))
    write_atomically(folder.summary, json.dumps(asdict(analysis), indent=2) + "\n")
    return analysis
