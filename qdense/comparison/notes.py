"""Notes beside the numbers of a comparison, one sentence each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import TASKS
from qdense.catalogs.models import CATALOG
from qdense.comparison.evaluations import Evaluation
from qdense.comparison.published import INDEPENDENT, THIRD_PARTY
from qdense.schema import flattened


def on_items(evaluations: Sequence[Evaluation], indices: Mapping[str, Sequence[int]]) -> Iterable[str]:
    """Tasks and items that are omitted; `indices` are the compared ones of each task."""
    left_out = dict.fromkeys(task for one in evaluations for task in one.outcomes if task not in indices)
    if left_out:
        yield f"not in every run, so omitted: {', '.join(left_out)}"
    uneven = [
        task
        for task, common in indices.items()
        if any(len(one.outcomes[task][RULES[0]]) > len(common) for one in evaluations)
    ]
    if uneven:
        yield f"runs have different items of {', '.join(uneven)}; only those that every run has are compared"
    partial = [
        f"{task} {len(common):,} of {TASKS[task].num_items:,}"
        for task, common in indices.items()
        if task in TASKS and len(common) < TASKS[task].num_items
    ]
    if partial:
        yield f"not the whole test set: {', '.join(partial)} items"


def on_settings(groups: Mapping[str, Sequence[Evaluation]], tasks: Sequence[str]) -> Iterable[str]:
    """Bases, ways of evaluating, versions and recipes in which the groups differ."""

    def base(evaluation: Evaluation) -> str:
        fingerprint = json.dumps(evaluation.settings["base_fingerprint"], sort_keys=True)
        return hashlib.sha256(fingerprint.encode()).hexdigest()[:8]

    first = {label: group[0] for label, group in groups.items()}
    if len({base(one) for one in first.values()}) > 1:
        named = "; ".join(f"{one.settings['model']} [{base(one)}] ({label})" for label, one in first.items())
        yield f"different bases: {named}"
    how = {label: flattened(one.how(tasks)) for label, one in first.items()}
    yield from (f"evaluated differently, {text}" for text in _differing(how))
    versions = {
        label if len(group) == 1 else one.run: one.settings.get("versions", {})
        for label, group in groups.items()
        for one in group
    }
    yield from (f"evaluated by different versions, {text}" for text in _differing(versions))
    recipes = {label: recipe for label, one in first.items() if (recipe := one.recipe_without_seed()) is not None}
    yield from (f"different recipes, {text}" for text in _differing(recipes))


def on_seeds(groups: Mapping[str, Sequence[Evaluation]]) -> Iterable[str]:
    """What can be concluded from the groups' numbers of seeds."""
    for label, group in groups.items():
        seeds = [one.seed for one in group]
        if len(set(seeds)) < len(seeds):
            yield f"{label}: some of its runs have the same training.seed ({', '.join(map(str, seeds))})"
    single = [label for label, group in groups.items() if len(group) == 1 and not group[0].is_base]
    if single:
        yield (
            f"{', '.join(single)}: one seed{' each' if len(single) > 1 else ''}. Intervals and p values are about "
            f"{'these runs' if len(single) > 1 else 'this run'}, not the recipe: seed-to-seed variance is not in them."
        )
    pooled = [f"{label} ({len(group)} seeds)" for label, group in groups.items() if len(group) > 1]
    if pooled:
        yield (
            f"{', '.join(pooled)}: pooled. The bootstrap draws seeds as well as items, but few seeds say little: with n seeds "
            "it includes (n - 1)/n of their variance. The p values treat the seeds as fixed, so one can be small where the "
            "interval of the same difference contains 0."
        )


def on_published(
    rule: str, model: str | None, rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    """How to read the published rows beside ours."""
    if model is None:
        return
    if not rows:
        yield f"no published rows on these tasks for {model}"
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
    kinds = {row["kind"] for row in rows}
    if THIRD_PARTY in kinds:
        yield f"{THIRD_PARTY}: not taken from the paper itself"
    if INDEPENDENT in kinds:
        yield f"{INDEPENDENT}: run by others and reported in no paper"
    if any(row["doubts"] for row in rows):
        yield "in parentheses: worked back from the published average, +-0.5; with a question mark: uncertain"
    if groups and any(row["average"] is None for row in rows):
        yield "published averages are over other tasks, and are omitted"
    yield from (f"{row['name']}, {row['kind']}: {row['note']}" for row in rows if row["note"])


def _differing(values: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """ "decoding.name: beam4 (A), greedy (B, C)" for each key whose value differs between labels."""
    for key in dict.fromkeys(key for ours in values.values() for key in ours):
        labels: dict[str, list[str]] = {}
        for label, ours in values.items():
            value = ours.get(key)
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            labels.setdefault(shown, []).append(label)
        if len(labels) > 1:
            yield f"{key}: " + "; ".join(f"{shown} ({', '.join(who)})" for shown, who in labels.items())
