"""Published results, shown beside ours and never mixed with them.

Accuracies in percent by the authors' rule and decoding, unquantized bases. Rows from third-party notes on a paper instead
of the paper itself are marked, and so are independent runs, which no paper reports, and uncertain figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qdense.benchmarks.tasks import GROUPS

_TABLE_1 = "arXiv:2505.23808, Table 1"
_TABLE_2 = "arXiv:2505.23808, Table 2"
_DORA = "arXiv:2402.09353 (DoRA), which DenseLoRA is compared with"
_LLM_ADAPTERS = "arXiv:2304.01933 (LLM-Adapters)"
_RANDLORA = "RandLoRA (ICLR 2025), Table 1: the same model and data, other settings"
_INDEPENDENT = "bscny/NLP_Final_Project on GitHub"
_INDEPENDENT_RUN = "one seed, own prompt, bf16 base, cutoff 512, alpha 32, 2 epochs"
# The kinds of rows, in the order in which they are shown.
PAPER, THIRD_PARTY, INDEPENDENT = "published", "published (third-party notes)", "independent"
KINDS = ("ours", PAPER, THIRD_PARTY, INDEPENDENT)
# Why a figure is not certain.
WORKED_BACK = "worked back from the average, +-0.5"
UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        model: a built-in name; None for a row shown beside every model.
        group: the tasks that `average` is over, a name of `GROUPS`.
        trainable_percent: of the base's parameters, if published.
        percents: task -> accuracy in percent; empty if only the average is known.
        doubts: task -> why its figure is not certain.
        source: where the figures were published.
        kind: PAPER; THIRD_PARTY if they come from notes on the paper; INDEPENDENT if no paper reports them.
        variant: what distinguishes it from another row of the same method and rank.
        note: anything else to know.
    """

    model: str | None
    method: str
    r: int | None
    group: str
    average: float
    percents: Mapping[str, float] = field(default_factory=dict)
    trainable_percent: float | None = None
    source: str = _TABLE_1
    kind: str = PAPER
    doubts: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """ "DenseLoRA r32" """
        return " ".join(
            part for part in (self.method, f"r{self.r}" if self.r is not None else "", self.variant) if part
        )


def _row(
    model: str | None,
    method: str,
    r: int | None,
    trainable_percent: float | None,
    figures: str,
    *,
    group: str = "commonsense",
    **more: Any,
) -> Published:
    """A row as a table prints it; `more` are further fields of `Published`.

    `figures` are those of the group's tasks in order, then the average; "(80)" was worked back, "61.8?" is uncertain.
    """
    *shown, average = figures.split()
    percents, doubts = {}, {}
    for task, text in zip(GROUPS[group], shown, strict=bool(shown)):
        percents[task] = float(text.strip("()?"))
        if not text.replace(".", "").isdigit():
            doubts[task] = WORKED_BACK if text.startswith("(") else UNCERTAIN
    return Published(
        model=model,
        method=method,
        r=r,
        group=group,
        average=float(average),
        percents=percents,
        trainable_percent=trainable_percent,
        doubts=doubts,
        **more,
    )


PUBLISHED: tuple[Published, ...] = (
    # boolq, piqa, siqa, hellaswag, winogrande, arc-e, arc-c, obqa, average
    _row(None, "ChatGPT", None, None, "73.1 85.4 68.5 78.5 66.1 89.8 79.9 74.8 77.0",
         source=_LLM_ADAPTERS, note="gpt-3.5-turbo, zero-shot CoT"),
    _row("llama3-8b", "LoRA", 32, 0.70, "70.8 85.2 79.9 91.7 84.3 84.2 71.2 79.0 80.8", source=_DORA),
    _row("llama3-8b", "DoRA", 16, None, "74.5 88.8 80.3 95.5 84.7 90.1 79.1 87.2 85.0", source=_DORA),
    _row("llama3-8b", "DoRA", 32, 0.71, "74.6 89.3 79.9 95.5 85.6 90.5 80.4 85.8 85.2", source=_DORA),
    _row("llama3-8b", "VeRA", None, 0.01, "62.2 81.6 (65) 54.5 61.8? 84.4 67.2 64.6 67.7", kind=THIRD_PARTY),
    _row("llama3-8b", "LoKr", None, 0.01, "65.1 81.6 (80) 92.0 82.1 89.2 76.7 80.9 80.9", kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 16, 0.01, "72.3 87.5 (80) 93.5 85.2 89.8 78.2 84.0 83.8", kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 32, 0.02, "74.3 88.0 (80) 94.5 86.0 89.7 78.7 85.6 84.6", kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 64, 0.06, "74.1 88.9 (80) 95.0 87.0 90.0 79.2 85.6 85.0", kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 32, None, "82.3", source="arXiv:2505.23808, Table 3", variant="QKV"),
    _row("llama3-8b", "DenseLoRA", 32, None, "83.8", source="arXiv:2505.23808, Table 3", variant="UD"),
    _row("llama3-8b", "DenseLoRA", 256, 0.31, "85.5", source="arXiv:2505.23808, Fig. 4"),
    _row("llama3-8b", "LoRA", 16, None, "84.4", source=_RANDLORA),
    _row("llama3-8b", "LoRA", 32, None, "85.2", source=_RANDLORA, variant="(RandLoRA's)"),
    _row("llama3-8b", "RandLoRA", None, None, "85.6", source=_RANDLORA),
    _row("llama3-8b", "VeRA", None, None, "81.7", source=_RANDLORA, variant="(RandLoRA's)"),
    _row("llama3-8b", "LoRA", 32, 0.70, "71.65 84.71 79.53 93.10 83.74 86.45 75.09 80.80 81.88", kind=INDEPENDENT,
         source=_INDEPENDENT, variant="(bscny)", note=f"{_INDEPENDENT_RUN}, all methods at one learning rate"),
    _row("llama3-8b", "DenseLoRA", 32, 0.022, "74.80 90.75 82.55 96.52 88.79 93.43 82.85 90.40 87.51", kind=INDEPENDENT,
         source=_INDEPENDENT, variant="(bscny)", note=f"{_INDEPENDENT_RUN}, pairs shared by shape: 1,769,472 trained"),
    _row("llama3-8b", "DenseLoRA", 32, None, "81.1", source="arXiv:2505.23808, Fig. 3", variant="10%",
         note="trained on 10% of Commonsense170K; that it is on LLaMA-3-8B is inferred"),
    _row("llama2-7b", "LoRA", 32, None, "69.8 79.9 79.5 83.6 82.6 79.8 64.7 81.0 77.6", source=_DORA),
    _row("llama2-7b", "DoRA", 16, None, "72.0 83.1 79.9 89.1 83.0 84.5 71.0 81.2 80.5", source=_DORA),
    _row("llama2-7b", "DoRA", 32, None, "71.8 83.7 76.0 89.1 82.6 83.7 68.2 82.4 79.7", source=_DORA),
    # gsm8k, aqua, addsub, svamp, average
    _row("llama3-8b", "LoRA", None, None, "47.1 18.1 90.6 71.9 56.9", group="math", source=_TABLE_2, kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 32, None, "57.5", group="math", source=_TABLE_2, kind=THIRD_PARTY),
    _row("llama3-8b", "DenseLoRA", 64, None, "47.2 19.7 92.4 74.5 58.5", group="math", source=_TABLE_2, kind=THIRD_PARTY),
)  # fmt: skip


def published_models() -> tuple[str, ...]:
    """The models that have published rows."""
    return tuple(dict.fromkeys(row.model for row in PUBLISHED if row.model is not None))


def published_rows(model: str, tasks: Collection[str] | None = None) -> list[Published]:
    """The rows to show beside results of `model`.

    Args:
        tasks: the tasks to show. Rows without a figure for any of them are omitted, unless their average is over exactly
            these tasks. None for all rows.
    """
    rows = [row for row in PUBLISHED if row.model in (None, model)]
    if tasks is None:
        return rows
    return [row for row in rows if set(row.percents) & set(tasks) or set(GROUPS[row.group]) == set(tasks)]
