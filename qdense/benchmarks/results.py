"""From completions to a task's result: counts, accuracies by both rules, intervals. Needs no model."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdense.benchmarks.accuracy import pass_at, wilson_interval
from qdense.benchmarks.scoring import RULES, Answer
from qdense.benchmarks.tasks import Task
from qdense.errors import EvaluationError

# Completions by item: one text each, or as many as were sampled.
Completions = Mapping[int, Sequence[str]]
# Whether each item is right by each rule: rule -> index -> is_correct. `qdense compare` pairs runs by it.
Outcomes = dict[str, dict[int, bool]]


def score_task(
    task: Task, labels: Sequence[str], completions: Completions, *, clean: Collection[int] | None = None
) -> tuple[dict[str, Any], Outcomes]:
    """Accuracy by each rule, with its 95% Wilson interval.

    With several samples an item's answer is the majority's, and `pass_at` is added: the probability that one of k
    samples is right.

    Args:
        labels: of the test set, or of the requested part.
        completions: by index into `labels`.
        clean: indices of items that are not in the training set; they are also scored separately.

    Returns:
        the result as in summary.json, and each item's outcome.
    """
    num_samples = max((len(samples) for samples in completions.values()), default=1)
    right: dict[str, dict[int, list[bool]]] = {rule: {} for rule in RULES}  # of each sample
    majority: dict[str, dict[int, Answer | None]] = {rule: {} for rule in RULES}
    for index, samples in completions.items():
        answers = [task.answers.answers(text) for text in samples]
        for rule in RULES:
            given = [answer[rule] for answer in answers]
            right[rule][index] = [task.answers.is_correct(labels[index], answer) for answer in given]
            majority[rule][index] = task.answers.majority(given)
    outcomes: Outcomes = {
        rule: {
            index: task.answers.is_correct(labels[index], answer) for index, answer in sorted(majority[rule].items())
        }
        for rule in RULES
    }
    result: dict[str, Any] = {
        "task": task.name,
        "version": task.version,
        "source": task.source,
        "num_items": len(labels),
        "num_scored": len(completions),
    }
    if num_samples > 1:
        result["num_samples"] = num_samples
    for rule in RULES:
        result[rule] = _accuracy(outcomes[rule].values())
        result[rule]["num_without_answer"] = sum(answer is None for answer in majority[rule].values())
        if num_samples > 1:
            ks = sorted({1, num_samples, *(2**i for i in range(1, num_samples.bit_length()))})
            result[rule]["pass_at"] = {str(k): pass_at(k, list(right[rule].values())) for k in ks if k <= num_samples}
    if clean is not None:
        kept = set(clean)
        result["clean"] = {"num_items": len(kept & set(completions))} | {
            rule: _accuracy(is_correct for index, is_correct in outcomes[rule].items() if index in kept)
            for rule in RULES
        }
    return result, outcomes


def _accuracy(outcomes: Any) -> dict[str, Any]:
    listed = list(outcomes)
    num_correct = sum(listed)
    return {
        "accuracy": num_correct / len(listed) if listed else 0.0,
        "num_correct": num_correct,
        "interval": list(wilson_interval(num_correct, len(listed))),
    }


def average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The unweighted mean of the tasks' accuracies by each rule: the paper's "avg"."""
    return {rule: math.fsum(result[rule]["accuracy"] for result in results.values()) / len(results) for rule in RULES}


def read_completions(path: Path, num_items: int) -> dict[int, list[str]]:
    """The completions of a JSONL file, `{"index": i, "completion": "..."}` a line, for exactly the items 0 to num_items - 1.

    Lines with the same index are samples if each has its own "sample" number.

    Raises:
        EvaluationError: naming the line of an entry that is not a completion, appears twice or is out of range; or missing ones.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file of completions") from None
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    found: dict[int, dict[int, str]] = {}
    first_line: dict[tuple[int, int], int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        index, sample, completion = parse_completion(f"{path}, line {number}", line)
        if not 0 <= index < num_items:
            raise EvaluationError(
                f"{path}, line {number}: index {index} is out of range; the items are 0 to {num_items - 1}"
            )
        earlier = first_line.setdefault((index, sample), number)
        if earlier != number:
            raise EvaluationError(
                f"{path}, line {number}: index {index} is already in line {earlier}. "
                'Several samples of an item each need a "sample" number.'
            )
        found.setdefault(index, {})[sample] = completion
    missing = [index for index in range(num_items) if index not in found]
    if missing:
        raise EvaluationError(
            f"{path}: {len(missing):,} of {num_items:,} items have no completion: index {_some(missing)}. "
            "For a partial file, --limit N scores the first N items."
        )
    num_samples = {len(samples) for samples in found.values()}
    if len(num_samples) > 1:
        few = [index for index, samples in found.items() if len(samples) < max(num_samples)]
        raise EvaluationError(
            f"{path}: all items need the same number of samples; fewer than {max(num_samples)} of index {_some(few)}"
        )
    return {index: [found[index][sample] for sample in sorted(found[index])] for index in range(num_items)}


def parse_completion(place: str, line: str) -> tuple[int, int, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also for a whole number with thousands of digits
        raise EvaluationError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise EvaluationError(f'{place}: must be an object {{"index": i, "completion": "..."}}')
    for key, kind, needed in (("index", int, True), ("completion", str, True), ("sample", int, False)):
        if key not in record:
            if needed:
                raise EvaluationError(f'{place}: has no "{key}"')
        elif not isinstance(record[key], kind) or isinstance(record[key], bool):
            wanted = "a whole number" if kind is int else "text"
            raise EvaluationError(f'{place}: "{key}" must be {wanted}, not {json.dumps(record[key])[:60]}')
    return record["index"], record.get("sample", 0), record["completion"]


def _some(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:5]))
    return f"{shown}, ..." if len(indices) > 5 else shown
