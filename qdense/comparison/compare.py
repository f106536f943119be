"""Runs side by side, from the files of their evaluations. Needs no model, no data and no GPU.

Runs of one recipe that differ only in `training.seed` and were evaluated alike form a group; the first group is the reference.
Only items that every evaluation has are compared, so that every difference is paired. Different settings are reported and
not refused: two decodings may be compared, two versions of a test set may not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import GROUPS, TASKS
from qdense.comparison import notes
from qdense.comparison.evaluations import Evaluation
from qdense.comparison.published import published_rows
from qdense.comparison.statistics import OutcomeMatrix, bootstrap_interval, holm, paired_p_value
from qdense.errors import EvaluationError, ModelError
from qdense.methods import METHODS
from qdense.planning.parameters import count_parameters
from qdense.recipe import AdapterRecipe

CONFIDENCE = 0.95
NUM_DRAWS = 10_000


def compare(evaluations: Sequence[Evaluation], *, rule: str = "paper", published: str | None = None) -> dict[str, Any]:
    """Compare groups of evaluations on the items that all of them have; the first evaluation's group is the reference.

    Args:
        rule: "paper" or "strict".
        published: a model whose published rows are added; then `evaluations` may be empty.

    Returns:
        plain data, as `qdense compare --format json` prints it: accuracies and differences as shares, published figures in
        percent, as published.

    Raises:
        EvaluationError: they have nothing in common, or not the same test.
    """
    tasks = _common_tasks(evaluations)
    indices = {task: _common_items(evaluations, task) for task in tasks}
    grouped = _grouped(evaluations, tasks)
    groups = {chr(ord("A") + i % 26) * (i // 26 + 1): group for i, group in enumerate(grouped)}
    outcomes = {label: _outcomes(group, indices, rule) for label, group in groups.items()}
    reference = next(iter(groups), "")
    described: list[dict[str, Any]] = []
    for label, group in groups.items():
        described.append(
            {
                "label": label,
                **_identity(group[0]),
                "runs": [{"run": one.run, "folder": str(one.folder), "seed": one.seed} for one in group],
                "settings": group[0].how(tasks),
                "tasks": {task: _accuracy([one]) for task, one in zip(tasks, outcomes[label], strict=True)},
                "average": _accuracy(outcomes[label]),
                "difference": None
                if label == reference
                else _difference(reference, tasks, outcomes[label], outcomes[reference]),
            }
        )
    rows = [] if published is None else _published(published, tasks)
    return {
        "rule": rule,
        "confidence": CONFIDENCE,
        "num_draws": NUM_DRAWS,
        "tasks": tasks,
        "num_items": {task: len(indices[task]) for task in tasks},
        "groups": described,
        "published_model": published,
        "published": rows,
        "notes": [
            *notes.on_items(evaluations, indices),
            *notes.on_settings(groups, tasks),
            *notes.on_seeds(groups),
            *notes.on_published(rule, published, rows, described),
        ],
    }


def _outcomes(group: Sequence[Evaluation], indices: Mapping[str, Sequence[int]], rule: str) -> list[OutcomeMatrix]:
    """For each task (seeds, items)."""
    return [
        np.array([[one.outcomes[task][rule][i] for i in items] for one in group], dtype=np.int8)
        for task, items in indices.items()
    ]


def _common_tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        return []
    tasks = [task for task in evaluations[0].outcomes if all(task in other.outcomes for other in evaluations)]
    if not tasks:
        lines = [f"  {one.run} ({one.folder}): {', '.join(one.outcomes)}" for one in evaluations]
        raise EvaluationError(
            "\n".join(
                ["no task in common:", *lines, "Evaluate them on the same tasks, or name RUN/eval/DIGEST folders."]
            )
        )
    first = evaluations[0]
    for task in tasks:
        for key, what in (("data_sha256", "test data"), ("task_versions", "version")):
            for other in evaluations[1:]:
                if other.settings[key][task] != first.settings[key][task]:
                    raise EvaluationError(
                        f"{task}: {first.run} and {other.run} were scored on different tests: its {what} differs "
                        f"({first.settings[key][task]} in {first.folder}, {other.settings[key][task]} in {other.folder}). "
                        "Evaluate both again with the same --data-dir and version of qdense."
                    )
    known = list(TASKS)
    return sorted(tasks, key=lambda task: known.index(task) if task in TASKS else len(known))


def _common_items(evaluations: Sequence[Evaluation], task: str) -> list[int]:
    indices = set.intersection(*(set(one.outcomes[task][RULES[0]]) for one in evaluations))
    if not indices:
        raise EvaluationError(f"{task}: {' and '.join(one.run for one in evaluations)} have no item in common")
    return sorted(indices)


def _grouped(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> list[list[Evaluation]]:
    """Group the seeds of one recipe, in the order given. Raises EvaluationError if one would be counted twice."""
    groups: dict[str, list[Evaluation]] = {}
    by_folder: dict[Path, Evaluation] = {}
    for evaluation in evaluations:
        folder = evaluation.folder.resolve()
        earlier = by_folder.setdefault(folder, evaluation)
        if earlier is not evaluation:
            raise EvaluationError(f"{evaluation.run}: named twice ({earlier.run} is the same evaluation, {folder})")
        # Without a recipe, it is not known whose seed this is.
        recipe = evaluation.recipe_without_seed() or str(folder)
        parts = [evaluation.settings["base_fingerprint"], evaluation.how(tasks), recipe]
        group = groups.setdefault(json.dumps(parts, sort_keys=True, default=str), [])
        for other in group:
            if other.settings["adapter_sha256"] == evaluation.settings["adapter_sha256"]:
                raise EvaluationError(
                    f"{evaluation.run}: holds the same adapter as {other.run}, byte for byte; it is not another seed. Name one."
                )
        group.append(evaluation)
    return list(groups.values())


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    """A group's label, and how many parameters its recipe trains, if known."""
    what = "endpoint" if "endpoint" in evaluation.settings else "base"
    identity: dict[str, Any] = {
        "name": f"{what} {Path(evaluation.settings['model']).name}" if evaluation.is_base else "adapter",
        "model": evaluation.settings["model"],
        "method": None,
        "r": None,
        "trainable_parameters": None,
        "trainable_percent": None,
    }
    if evaluation.is_base or evaluation.recipe is None:
        return identity
    adapter = evaluation.recipe["adapter"]
    method = METHODS.get(adapter["method"])
    r = adapter["r"] if method is None or "r" in method.adapter_keys else None
    name = adapter["method"] if r is None else f"{adapter['method']} r{r}"
    identity |= {"name": name, "method": adapter["method"], "r": r}
    try:
        count = count_parameters(evaluation.recipe["model"]["name"], AdapterRecipe.model_validate(adapter))
    except (ModelError, KeyError, ValidationError):
        return identity  # a model whose shapes are not known, or a recipe of another version
    return identity | {"trainable_parameters": count.trainable_parameters, "trainable_percent": count.percent}


def _mean(matrices: Sequence[OutcomeMatrix]) -> float:
    return math.fsum(float(matrix.mean()) for matrix in matrices) / len(matrices)


def _accuracy(matrices: Sequence[OutcomeMatrix]) -> dict[str, Any]:
    """Accuracy on one task, or on average over several: with Wilson's interval for one run on one task, otherwise the
    bootstrap's."""
    num_seeds = len(matrices[0])
    if num_seeds == len(matrices) == 1:
        interval = wilson_interval(int(matrices[0].sum()), matrices[0].shape[1], CONFIDENCE)
    else:
        interval = bootstrap_interval(matrices, confidence=CONFIDENCE, num_draws=NUM_DRAWS)
    return {
        "accuracy": _mean(matrices),
        "interval": list(interval),
        "by_seed": [_mean([matrix[i : i + 1] for matrix in matrices]) for i in range(num_seeds)],
    }


def _difference(
    label: str, tasks: Sequence[str], ours: Sequence[OutcomeMatrix], theirs: Sequence[OutcomeMatrix]
) -> dict[str, Any]:
    def difference(first: Sequence[OutcomeMatrix], second: Sequence[OutcomeMatrix]) -> dict[str, Any]:
        interval = bootstrap_interval(first, second, confidence=CONFIDENCE, num_draws=NUM_DRAWS)
        return {"difference": _mean(first) - _mean(second), "interval": list(interval)}

    p_values = [paired_p_value(second, first) for first, second in zip(ours, theirs, strict=True)]
    is_single = len(ours[0]) == len(theirs[0]) == 1
    return {
        "to": label,
        "test": "McNemar's exact test" if is_single else "exact sign-flip test over items, seeds pooled",
        "tasks": {
            task: difference([first], [second]) | {"p": p, "p_holm": adjusted}
            for task, first, second, p, adjusted in zip(tasks, ours, theirs, p_values, holm(p_values), strict=True)
        },
        "average": difference(ours, theirs),
    }


def _published(model: str, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as plain data: figures of the compared tasks, and the average if it is over exactly these."""
    rows = []
    for row in published_rows(model, tasks or None):
        shown = [task for task in row.percents if not tasks or task in tasks]
        rows.append(
            asdict(row)
            | {
                "name": row.name,
                "percents": {task: row.percents[task] for task in shown},
                "doubts": {task: doubt for task, doubt in row.doubts.items() if task in shown},
                "average": row.average if not tasks or set(GROUPS[row.group]) == set(tasks) else None,
            }
        )
    return rows
