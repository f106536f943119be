"""Runs side by side, from what their evaluations left on disk: no model, no data and no GPU is needed.

Runs of one recipe that differ in `training.seed` alone, evaluated alike, are one group; the first group is the reference.
Only items that every evaluation holds are compared, so that every difference is paired. Settings that differ are told,
not refused: comparing two decodings is a fair question, comparing two versions of a test set is none.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from qdense.benchmarks.accuracy import wilson_interval
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import GROUPS, TASKS
from qdense.catalogs.models import CATALOG
from qdense.comparison.published import published_rows
from qdense.comparison.statistics import OutcomeMatrix, bootstrap_interval, holm, paired_p_value
from qdense.errors import EvaluationError, ModelError
from qdense.methods import METHODS
from qdense.planning.parameters import count_parameters
from qdense.recipe import AdapterRecipe

CONFIDENCE = 0.95
NUM_DRAWS = 10_000
# Settings that say which model and which items were scored; the others say how, and how must be the same within a group.
_NOT_HOW = {"model", "base_fingerprint", "adapter_sha256", "limit", "data_sha256", "task_versions", "versions"}
_BY_TASK = ("max_new_tokens", "data_sha256", "task_versions")
# The files of an evaluation, and what it means that one is not there.
_NEEDED = {
    "settings.json": "has no settings.json, so nothing tells what was scored",
    "summary.json": "was not finished",
    "items.json": "was made by an older version of qdense and has no items.json",
}


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation, as it lies on disk.

    Attributes:
        run: the folder as it was named.
        folder: that of settings.json, summary.json and items.json.
        recipe: the run's recipe.toml; None for a bare base, or an adapter that was not made here.
        outcomes: task -> rule -> index of an item -> 1 if it was right, else 0.
    """

    run: str
    folder: Path
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    outcomes: Mapping[str, Mapping[str, Mapping[int, int]]]

    @property
    def seed(self) -> int | None:
        return self.recipe["training"]["seed"] if self.recipe is not None else None

    @property
    def is_base(self) -> bool:
        return self.settings["adapter_sha256"] is None

    def how(self, tasks: Sequence[str]) -> dict[str, Any]:
        """What decides the completions on `tasks`, apart from base, adapter and data."""
        how = {key: value for key, value in self.settings.items() if key not in _NOT_HOW}
        return how | {"max_new_tokens": {task: self.settings["max_new_tokens"][task] for task in tasks}}


# --- what lies on disk ------------------------------------------------------------------------------------------------


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.

    Args:
        path: a run (its newest finished evaluation is taken), an adapter's folder, runs/base-MODEL, or the evaluation's own
            folder, RUN/eval/DIGEST.

    Raises:
        EvaluationError: there is none, it was never finished, is of an older version of qdense, or is damaged.
    """
    folder = _evaluation_folder(path)
    for name, why in _NEEDED.items():
        if not (folder / name).is_file():
            raise EvaluationError(f"{folder}: this evaluation {why}. {_again(folder)}")
    settings = _read(folder / "settings.json", _checked_settings)
    outcomes = _read(folder / "items.json", _checked_items)
    missing = [task for task in outcomes if any(task not in settings[key] for key in _BY_TASK)]
    if missing:
        raise EvaluationError(f"{folder}: settings.json does not know {missing[0]} of items.json. {_again(folder)}")
    run = folder.parent.parent if folder.parent.name == "eval" else folder
    return Evaluation(str(path), folder, settings, _read_recipe(run / "recipe.toml"), outcomes)


def _evaluation_folder(path: Path) -> Path:
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such folder. Name a run, its RUN/eval/DIGEST, or runs/base-MODEL.")
    if path.name in ("adapter", "eval"):
        path = path.parent  # where evaluate puts the results of RUN/adapter
    if (path / "settings.json").is_file() or path.parent.name == "eval":
        return path
    found = [folder for folder in (path / "eval").glob("*") if folder.is_dir()]
    if not found:
        raise EvaluationError(
            f"{path}: not evaluated yet; run `qdense evaluate TASKS --adapter {path}`, or with --model NAME for a bare base"
        )

    def rank(folder: Path) -> tuple[bool, int]:
        summary = folder / "summary.json"
        is_finished = summary.is_file()
        return is_finished and (folder / "items.json").is_file(), summary.stat().st_mtime_ns if is_finished else -1

    return max(found, key=rank)


def _again(folder: Path) -> str:
    """What makes the evaluation in this folder anew."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        subject = f"--model {settings['model']}"
        if "endpoint" in settings:
            subject = f"--endpoint {settings['endpoint']} {subject}"
        is_adapter = settings["adapter_sha256"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        is_adapter, subject = True, ""
    if is_adapter:
        subject = f"--adapter {folder.parent.parent if folder.parent.name == 'eval' else 'RUN'}"
    return f"Run `qdense evaluate TASKS {subject}` again, with the options it had; completions that are there are kept."


def _read(path: Path, checked: Callable[[Any], Any]) -> Any:
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{path}: damaged ({error!r}). {_again(path.parent)}") from None


def _checked_settings(settings: Any) -> Any:
    for key in ("model", "base_fingerprint", "adapter_sha256", *_BY_TASK):
        settings[key]
    for key in _BY_TASK:
        settings[key].items()
    return settings


def _checked_items(items: Any) -> dict[str, dict[str, dict[int, int]]]:
    if not items:
        raise ValueError("no task")
    outcomes: dict[str, dict[str, dict[int, int]]] = {}
    for task, columns in items.items():
        indices = columns["index"]
        if len(set(indices)) < len(indices) or not all(type(index) is int for index in indices):
            raise ValueError(f"{task}: an index stands twice, or is no whole number")
        outcomes[task] = {rule: dict(zip(indices, columns[rule], strict=True)) for rule in RULES}
        if not all(set(by_index.values()) <= {0, 1} for by_index in outcomes[task].values()):
            raise ValueError(f"{task}: an outcome is neither 0 nor 1")
    return outcomes


def _read_recipe(path: Path) -> dict[str, Any] | None:
    # Not load_recipe: what it names (a model's folder, a method of another version) need not exist here any more.
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe["adapter"]["method"], recipe["adapter"]["r"], recipe["training"]["seed"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not the recipe of a run ({error!r}). Restore it, or remove it.") from None
    return recipe


# --- groups -----------------------------------------------------------------------------------------------------------


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tables.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _flat_recipe(evaluation: Evaluation) -> dict[str, Any]:
    """All that makes a run what it is but for its seed, the rows it was trained on included."""
    assert evaluation.recipe is not None
    tables = {key: value for key, value in evaluation.recipe.items() if key not in ("output", "provenance")}
    flat = {key: value for key, value in _flat(tables).items() if key != "training.seed"}
    rows = evaluation.recipe.get("provenance", {}).get("data", {}).get("sha256")
    return flat | {"data.sha256": rows}


def _grouped(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> list[list[Evaluation]]:
    """Seeds of one recipe together, in the order given. Raises EvaluationError for what would be counted twice."""
    groups: dict[str, list[Evaluation]] = {}
    by_folder: dict[Path, Evaluation] = {}
    for evaluation in evaluations:
        folder = evaluation.folder.resolve()
        earlier = by_folder.setdefault(folder, evaluation)
        if earlier is not evaluation:
            raise EvaluationError(f"{evaluation.run}: named twice ({earlier.run} is the same evaluation, {folder})")
        parts: list[Any] = [evaluation.settings["base_fingerprint"], evaluation.how(tasks)]
        if evaluation.recipe is None or evaluation.is_base:
            parts.append(str(folder))  # nothing tells whose seed it would be
        else:
            parts.append(_flat_recipe(evaluation))
        group = groups.setdefault(json.dumps(parts, sort_keys=True, default=str), [])
        for other in group:
            if other.settings["adapter_sha256"] == evaluation.settings["adapter_sha256"]:
                raise EvaluationError(
                    f"{evaluation.run}: holds the same adapter as {other.run}, to the byte; it is no other seed. Name one."
                )
        group.append(evaluation)
    return list(groups.values())


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(evaluations: Sequence[Evaluation], *, rule: str = "paper", published: str | None = None) -> dict[str, Any]:
    """Compare groups of evaluations on the items that all of them hold; the first evaluation's group is the reference.

    Args:
        rule: "paper" or "strict".
        published: a model whose published rows are added; `evaluations` may be empty then.

    Returns:
        plain data, as `qdense compare --format json` prints it: accuracies and differences as shares, published figures in
        percent, as they were published.

    Raises:
        EvaluationError: there is nothing in common to compare, or what is in common is not the same test.
    """
    tasks = _common_tasks(evaluations)
    indices = {task: _common_items(evaluations, task) for task in tasks}
    groups = _grouped(evaluations, tasks)
    labels = [chr(ord("A") + i % 26) * (i // 26 + 1) for i in range(len(groups))]

    def matrices(group: Sequence[Evaluation]) -> list[OutcomeMatrix]:
        """For each task (seeds, items)."""
        return [
            np.array([[one.outcomes[task][rule][i] for i in indices[task]] for one in group], dtype=np.int8)
            for task in tasks
        ]

    outcomes = [matrices(group) for group in groups]
    described = []
    for label, group, ours in zip(labels, groups, outcomes, strict=True):
        is_reference = label == labels[0]
        described.append(
            {
                "label": label,
                **_identity(group[0]),
                "runs": [{"run": one.run, "folder": str(one.folder), "seed": one.seed} for one in group],
                "settings": group[0].how(tasks),
                "tasks": {task: _accuracy([one]) for task, one in zip(tasks, ours, strict=True)},
                "average": _accuracy(ours, is_average=True),
                "difference": None if is_reference else _difference(labels[0], tasks, ours, outcomes[0]),
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
            *_notes_on_items(evaluations, indices),
            *_notes_on_settings(dict(zip(labels, groups, strict=True)), tasks),
            *_notes_on_seeds(dict(zip(labels, groups, strict=True))),
            *_notes_on_published(rule, published, rows, described),
        ],
    }


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
                        f"{task}: {first.run} and {other.run} were scored on different tests, for its {what} differs "
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


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    """What a group is called, and how many parameters its recipe trains, where that can be known."""
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
    r = adapter["r"] if method is None or "r" in method.uses else None
    name = adapter["method"] if r is None else f"{adapter['method']} r{r}"
    identity |= {"name": name, "method": adapter["method"], "r": r}
    try:
        count = count_parameters(evaluation.recipe["model"]["name"], AdapterRecipe.model_validate(adapter))
    except (ModelError, KeyError, ValidationError):
        return identity  # a model whose shapes are not built in, or a recipe of another version
    return identity | {"trainable_parameters": count.trainable_parameters, "trainable_percent": count.percent}


def _mean(matrices: Sequence[OutcomeMatrix]) -> float:
    return math.fsum(float(matrix.mean()) for matrix in matrices) / len(matrices)


def _accuracy(matrices: Sequence[OutcomeMatrix], *, is_average: bool = False) -> dict[str, Any]:
    """Of one task, or the average of several: Wilson's interval for a run on a task, else the bootstrap's."""
    num_seeds = len(matrices[0])
    if num_seeds == 1 and not is_average:
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
    """The rows as plain data: figures of the tasks that are compared, and the average where it is over just these."""
    rows = []
    for row in published_rows(model, tasks or None):
        shown = [task for task in row.percents if not tasks or task in tasks]
        fields = asdict(row)
        fields.pop("is_third_party")
        rows.append(
            fields
            | {
                "kind": row.kind,
                "name": row.name,
                "percents": {task: row.percents[task] for task in shown},
                "doubts": {task: doubt for task, doubt in row.doubts.items() if task in shown},
                "average": row.average if not tasks or set(GROUPS[row.group]) == set(tasks) else None,
            }
        )
    return rows


# --- what must be told beside the numbers -----------------------------------------------------------------------------


def _notes_on_items(evaluations: Sequence[Evaluation], indices: Mapping[str, Sequence[int]]) -> Iterable[str]:
    left_out = dict.fromkeys(task for one in evaluations for task in one.outcomes if task not in indices)
    if left_out:
        yield f"not in every run, so left out: {', '.join(left_out)}"
    uneven = [
        task
        for task, common in indices.items()
        if any(len(one.outcomes[task][RULES[0]]) > len(common) for one in evaluations)
    ]
    if uneven:
        yield f"runs hold different items of {', '.join(uneven)}; only those that every run holds are compared"
    partial = [
        f"{task} {len(common):,} of {TASKS[task].num_items:,}"
        for task, common in indices.items()
        if task in TASKS and len(common) < TASKS[task].num_items
    ]
    if partial:
        yield f"not the whole test set: {', '.join(partial)} items"


def _differing(values: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """ "decoding.name: beam4 (A), greedy (B, C)" for each key whose value is not the same under all labels."""
    for key in dict.fromkeys(key for flat in values.values() for key in flat):
        labels: dict[str, list[str]] = {}
        for label, flat in values.items():
            value = flat.get(key)
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            labels.setdefault(shown, []).append(label)
        if len(labels) > 1:
            yield f"{key}: " + "; ".join(f"{shown} ({', '.join(who)})" for shown, who in labels.items())


def _notes_on_settings(groups: Mapping[str, Sequence[Evaluation]], tasks: Sequence[str]) -> Iterable[str]:
    def base(evaluation: Evaluation) -> str:
        fingerprint = json.dumps(evaluation.settings["base_fingerprint"], sort_keys=True)
        return hashlib.sha256(fingerprint.encode()).hexdigest()[:8]

    first = {label: group[0] for label, group in groups.items()}
    if len({base(one) for one in first.values()}) > 1:
        named = "; ".join(f"{one.settings['model']} [{base(one)}] ({label})" for label, one in first.items())
        yield f"other bases: {named}"
    how = {label: _flat(one.how(tasks)) for label, one in first.items()}
    yield from (f"evaluated differently, {text}" for text in _differing(how))
    versions = {
        label if len(group) == 1 else one.run: one.settings.get("versions", {})
        for label, group in groups.items()
        for one in group
    }
    yield from (f"evaluated by other versions, {text}" for text in _differing(versions))
    recipes = {label: _flat_recipe(one) for label, one in first.items() if one.recipe is not None and not one.is_base}
    yield from (f"other recipe, {text}" for text in _differing(recipes))


def _notes_on_seeds(groups: Mapping[str, Sequence[Evaluation]]) -> Iterable[str]:
    for label, group in groups.items():
        seeds = [one.seed for one in group]
        if len(set(seeds)) < len(seeds):
            yield f"{label}: some of its runs have the same training.seed ({', '.join(map(str, seeds))})"
    single = [label for label, group in groups.items() if len(group) == 1 and not group[0].is_base]
    if single:
        yield (
            f"{', '.join(single)}: one seed{' each' if len(single) > 1 else ''}. Intervals and p values speak of "
            f"{'these runs' if len(single) > 1 else 'this run'}, not of the recipe: seed-to-seed variance is not in them."
        )
    pooled = [f"{label} ({len(group)} seeds)" for label, group in groups.items() if len(group) > 1]
    if pooled:
        yield (
            f"{', '.join(pooled)}: pooled. The bootstrap draws seeds as well as items, but few seeds say little: of n seeds "
            "it counts (n - 1)/n of their variance. The p values take the seeds as they are, so one can be small where the "
            "interval of the same difference holds 0."
        )


def _notes_on_published(
    rule: str, model: str | None, rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    if model is None:
        return
    if not rows:
        yield f"nothing is published on these tasks for {model}"
        return
    yield (
        f"published rows: on {model} as printed elsewhere, by the authors' rule and decoding, from unquantized bases; "
        "no test pairs them with ours"
    )
    others = dict.fromkeys(group["model"] for group in groups if group["model"] not in (model, CATALOG[model].hub_id))
    if others:
        yield f"ours are on another base: {', '.join(others)}"
    if groups and rule != "paper":
        yield f"ours are by the {rule} rule, published rows by the paper's"
    if any(row["kind"] != "published" for row in rows):
        yield "published (third-party notes): not taken from the paper itself"
    if any(row["doubts"] for row in rows):
        yield "in parentheses: worked back from the published average, +-0.5; with a question mark: uncertain"
    if groups and any(row["average"] is None for row in rows):
        yield "published averages are over other tasks than these, and are left out"
    yield from (f"{row['name']}, {row['kind']}: {row['note']}" for row in rows if row["note"])
