"""A report on experiments: from the files of their runs to sections of texts, tables and charts. Nothing is trained or scored."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qdense.analysis.updates import RunUpdates, common_side, load_updates, summarize
from qdense.benchmarks.tasks import GROUPS, tasks_named
from qdense.comparison.compare import compare
from qdense.comparison.evaluations import load_evaluation
from qdense.comparison.published import KINDS
from qdense.comparison.tables import AVERAGE, interval, p_value, parts_of, percent, published_figures, trainable
from qdense.errors import AdapterError
from qdense.experiments import charts
from qdense.experiments.blocks import Block, Chart, Code, Part, Section, Table, Text
from qdense.experiments.cells import CellFolder, SweepFolder
from qdense.experiments.costs import ArmCost, costs_of
from qdense.experiments.experiment import Experiment
from qdense.experiments.search import best_rate, is_at_edge
from qdense.experiments.standing import (
    ArmStanding,
    base_key,
    base_settings,
    jobs_of,
    num_unknown,
    reference_arm,
    standing,
)
from qdense.planning.plan import Machine
from qdense.runs import EvaluationFolder
from qdense.training.metrics import read_metrics

_CARDS = ("RTX 3090", "RTX 4090", "H100")
_CARD_BYTES = 24 * 2**30
_MOST_POINTS = 120  # of a training loss
_MAP_SIDE, _LARGEST_CHANGE, _MOST_MAPS = 24, 3.0, 12
_LOSS_ON = {
    "all": "prompt and response",
    "response": "response",
    "last": "the last answer",
    "auto": "responses of conversations, else prompt and response",
}
_SEED = 0  # of the slices of the update maps


@dataclass(frozen=True)
class _Run:
    """A final run.

    Attributes:
        losses: its validation losses, as dicts of step, tokens and loss.
        steps: its training losses likewise, thinned out.
    """

    seed: int
    folder: CellFolder
    losses: list[dict[str, float]]
    steps: list[dict[str, float]]
    seconds: float
    num_tokens: int

    @property
    def provenance(self) -> dict[str, Any]:
        return self.folder.run.provenance()


@dataclass(frozen=True)
class _Arm:
    standing: ArmStanding
    runs: list[_Run]
    cost: ArmCost
    group: Mapping[str, Any] | None  # of the comparison

    @property
    def name(self) -> str:
        return self.standing.arm.name

    @property
    def last_losses(self) -> list[float]:
        return [run.losses[-1]["loss"] for run in self.runs if run.losses]

    @property
    def best_losses(self) -> list[float]:
        return [min(each["loss"] for each in run.losses) for run in self.runs if run.losses]


@dataclass(frozen=True)
class _Results:
    """Everything that is saved of an experiment."""

    experiment: Experiment
    arms: list[_Arm]
    comparison: Mapping[str, Any] | None
    num_left: int

    @property
    def trained(self) -> list[_Arm]:
        return [arm for arm in self.arms if arm.runs]

    @cached_property
    def reference(self) -> _Arm | None:
        return next((arm for arm in self.trained if arm.standing.arm.variant == self.experiment.reference), None)

    @property
    def tasks(self) -> list[str]:
        """Those that every evaluation has; before there is one, those that the experiment names."""
        if self.comparison and self.comparison["tasks"]:
            return list(self.comparison["tasks"])
        how = self.experiment.evaluate
        return [task.name for task in tasks_named(",".join(how.tasks))] if how is not None else []

    @property
    def is_evaluated(self) -> bool:
        return self.comparison is not None and bool(self.comparison["groups"])

    @property
    def published(self) -> list[Mapping[str, Any]]:
        """The published rows with a figure for one of the tasks, or with an average over all of them."""
        rows = self.comparison["published"] if self.comparison else []
        found = [
            row
            for row in rows
            if row["percents"].keys() & set(self.tasks) or set(GROUPS[row["group"]]) == set(self.tasks)
        ]
        return sorted(found, key=lambda row: KINDS.index(row["kind"]))

    @property
    def base(self) -> Mapping[str, Any] | None:
        """The bare model's group."""
        groups = self.comparison["groups"] if self.comparison else []
        return next((group for group in groups if group["method"] is None), None)


def report_on(experiments: Sequence[Experiment], folder: SweepFolder, prices: Mapping[str, float]) -> list[Part]:
    """A part for each experiment.

    Args:
        prices: card -> what an hour of it costs.

    Raises:
        QDenseError: a file is damaged.
    """
    return [
        Part(results.experiment.title, results.experiment.question, [s for s in _sections(results, prices) if s.blocks])
        for results in (_results(experiment, folder) for experiment in experiments)
    ]


# --- gathering ----------------------------------------------------------------------------------------------------------


def _results(experiment: Experiment, folder: SweepFolder) -> _Results:
    stands = standing(experiment, folder)
    costs = costs_of(experiment, stands, Machine.card_of(_CARD_BYTES, "a 24 GiB card"), folder)
    comparison = _comparison(experiment, stands, folder)
    groups = {
        Path(run["folder"]).resolve(): group
        for group in (comparison or {"groups": []})["groups"]
        for run in group["runs"]
    }
    arms = []
    for each, cost in zip(stands, costs, strict=True):
        runs = [
            _read_run(seed, folder.of(each.final(seed)))
            for seed, outcome in each.finals.items()
            if outcome.state == "trained"
        ]
        found = [groups[path.resolve()] for path in each.evaluations.values() if path.resolve() in groups]
        arms.append(_Arm(each, runs, cost, found[0] if found else None))
    num_left = len(list(jobs_of(experiment, folder, stands))) + num_unknown(experiment, stands)
    return _Results(experiment, arms, comparison, num_left)


def _comparison(experiment: Experiment, stands: Sequence[ArmStanding], folder: SweepFolder) -> dict[str, Any] | None:
    """All evaluations side by side, the reference first; None without any."""
    how, published = experiment.evaluate, experiment.report.published
    ordered = sorted(stands, key=lambda each: each.arm.variant != experiment.reference)
    paths = [path for each in ordered for path in each.evaluations.values()]
    if how is not None and how.base:
        arm = reference_arm(experiment)
        base = folder.base_evaluation(base_key(arm.recipe.model), base_settings(arm, how))
        paths += [base] if base is not None else []
    if not paths and published is None:
        return None
    return compare([load_evaluation(path) for path in paths], rule="paper", published=published)


def _read_run(seed: int, folder: CellFolder) -> _Run:
    lines = read_metrics(folder.run.metrics) if folder.run.metrics.is_file() else []
    tokens, seconds, steps, losses = 0, 0.0, [], []
    for line in lines:
        if line["event"] == "step":
            tokens += line["num_tokens"]
            seconds = max(seconds, line["seconds"])
            if line["loss"] is not None:
                steps.append({"step": line["step"], "tokens": tokens, "loss": line["loss"]})
        elif line["event"] == "validation" and line["loss"] is not None:
            losses.append({"step": line["step"], "tokens": tokens, "loss": line["loss"]})
    return _Run(seed, folder, losses, _thinned(steps), seconds, tokens)


def _thinned(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most _MOST_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(steps) / _MOST_POINTS) or 1
    return [
        steps[i] | {"loss": round(statistics.fmean(each["loss"] for each in steps[i : i + size]), 5)}
        for i in range(0, len(steps), size)
    ]


# --- sections -----------------------------------------------------------------------------------------------------------


def _sections(results: _Results, prices: Mapping[str, float]) -> Iterator[Section]:
    yield Section("Set-up", [*_state(results), _setup(results)])
    yield Section("Results", list(_main_results(results)))
    yield Section("By what varies", list(_varied(results)))
    yield Section("Paired tests", list(_tests(results)))
    yield Section("Loss curves", list(_loss_curves(results)))
    yield Section("How each learning rate was found", list(_rates(results)))
    yield Section("What training changed", list(_updates(results)))
    yield Section("Test items in the training data", list(_leaks(results)))
    yield Section("Cost", list(_cost(results, prices)))
    yield Section("How to repeat it", list(_repeat(results)))


def _state(results: _Results) -> Iterator[Block]:
    experiment = results.experiment
    if results.num_left:
        yield Text(
            f"Unfinished: {results.num_left} runs or evaluations are left. `qdense sweep {_command(experiment)}` continues.",
            is_warning=True,
        )
    for arm in results.arms:
        for problem in arm.standing.problems:
            yield Text(f"A run of {arm.name} failed: {problem}", is_warning=True)


def _setup(results: _Results) -> Table:
    experiment = results.experiment
    recipes = [arm.standing.arm.recipe for arm in results.arms]

    def joined(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    rows = [
        [
            "base model",
            joined(
                [
                    f"{r.model.name} ({r.model.quantization}, computing in {r.model.settled(has_bfloat16=True).dtype})"
                    for r in recipes
                ]
            ),
        ],
        ["training data", joined([_data_of(arm) for arm in results.arms])],
        ["adapted modules", joined(["+".join(r.adapter.target_modules) for r in recipes])],
        ["steps", "; ".join(dict.fromkeys(_count(arm.cost.num_steps) for arm in results.arms))],
        ["examples a step", joined([r.training.batch_size for r in recipes])],
        ["loss on", joined([_LOSS_ON[r.data.train_on] for r in recipes])],
        ["weights kept", joined([r.training.keep for r in recipes])],
        ["seeds of the final runs", joined(experiment.seeds)],
    ]
    if experiment.search is not None:
        rows.append(["seeds of the search", joined(experiment.search.seeds)])
    if experiment.evaluate is not None:
        how = experiment.evaluate
        limit = f", first {how.limit} items of each task" if how.limit else ", all items"
        rows.append(["evaluation", f"{', '.join(how.tasks)}; {how.decoding}{limit}"])
    devices = joined([run.provenance.get("device", "?") for arm in results.trained for run in arm.runs])
    rows.append(["device", devices or "nothing has run yet"])
    return Table("What all runs have in common; where arms differ, each value", ["", ""], rows)


def _data_of(arm: _Arm) -> str:
    data = arm.standing.arm.recipe.data
    name = data.name if data.path is None else Path(data.path).name
    rows = ""
    if arm.runs:
        num_rows = arm.runs[0].provenance.get("num_training_rows")
        rows = f", {num_rows:,} rows" if isinstance(num_rows, int) else ""
    return f"{name}{rows}"


def _main_results(results: _Results) -> Iterator[Block]:
    tasks = results.tasks
    if not results.trained and not results.published:
        return
    shown = [*tasks, AVERAGE] if len(tasks) > 1 else list(tasks)
    columns = ["method", "kind", "trained", "trained %", "rate", "validation loss, last", "best", *shown]
    rows, kinds = [], []
    if results.base is not None:
        rows.append([results.base["name"], "ours", "0", "", "", "", "", *_accuracies(results.base, shown)])
        kinds.append("ours")
    for arm in results.trained:
        count = arm.cost.trainable_parameters
        share = arm.group["trainable_percent"] if arm.group else None
        rows.append(
            [
                arm.name,
                "ours",
                f"{count:,}" if count is not None else "",
                trainable(share),
                _rate(arm.standing.learning_rate),
                _by_seed(arm.last_losses),
                _by_seed(arm.best_losses),
                *(_accuracies(arm.group, shown) if arm.group else [""] * len(shown)),
            ]
        )
        kinds.append("ours")
    for row in results.published:
        cells = published_figures(row, tasks)[: len(shown)]
        rows.append([row["name"], row["kind"], "", trainable(row["trainable_percent"]), "", "", "", *cells])
        kinds.append(row["kind"])
    note = (
        "Loss: the mean over the seeds, and each seed's; last is after the last step, best at the best validation. "
        "Accuracy in percent with its 95% interval (items and seeds resampled), by the paper's rule. trained %: of base and "
        "adapter together."
    )
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    yield Table(
        "All methods side by side",
        [columns[i] for i in filled],
        [[row[i] for i in filled] for row in rows],
        kinds,
        note,
    )
    if results.comparison and results.comparison["notes"]:
        named = "; ".join(f"{group['label']} is {name}" for name, group in _named_groups(results))
        yield Text(f"Notes{f' ({named})' if named else ''}:")
        for each in results.comparison["notes"]:
            yield Text(f"{each[:1].upper()}{each[1:].rstrip('.')}.")
    yield from _sizes(results)


def _accuracies(group: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    cells = []
    for column in shown:
        part = group["average"] if column == AVERAGE else group["tasks"][column]
        cells.append(f"{percent(part['accuracy'])} {interval(*part['interval'])}")
    return cells


def _sizes(results: _Results) -> Iterator[Block]:
    rows, is_evaluated, has_published = [], results.is_evaluated, bool(results.published)
    for arm in results.trained:
        count = arm.cost.trainable_parameters
        if count is None:
            continue
        share = arm.group["trainable_percent"] if arm.group else None
        x = share if has_published else count
        outcome = _outcome(arm, is_evaluated=is_evaluated)
        if x is not None and outcome is not None:
            y, low, high = outcome
            rows.append({"name": arm.name, "kind": "ours", "x": x, "y": y, "low": low, "high": high})
    for row in results.published if is_evaluated else []:
        if row["trainable_percent"] and row["average"] is not None:
            named = {"name": row["name"], "kind": row["kind"], "x": row["trainable_percent"], "y": row["average"]}
            rows.append(named | {"low": row["average"], "high": row["average"]})
    if len(rows) < 2:
        return
    y_title = _y_title(results, is_evaluated=is_evaluated)
    x_title = "trained parameters, % of the base" if has_published else "trained parameters"
    yield Chart(
        f"Trained parameters against {'accuracy' if is_evaluated else 'validation loss'}",
        f"A point for each method: {x_title} on a logarithmic axis, {y_title} upward, with intervals.",
        charts.sizes(rows, x_title=x_title, y_title=y_title),
        _numbers(rows, {"name": "method", "kind": "kind", "x": x_title, "y": y_title, "low": "low", "high": "high"}),
    )


def _y_title(results: _Results, *, is_evaluated: bool) -> str:
    if not is_evaluated:
        return "validation loss (mean, and range over seeds)"
    what = "mean accuracy" if len(results.tasks) > 1 else f"accuracy on {results.tasks[0]}"
    return f"{what}, % (95% interval)"


def _outcome(arm: _Arm, *, is_evaluated: bool) -> tuple[float, float, float] | None:
    """Average accuracy in percent with its interval, or the mean loss with the range over the seeds."""
    if is_evaluated:
        if arm.group is None:
            return None
        average = arm.group["average"]
        return (
            round(100 * average["accuracy"], 3),
            round(100 * average["interval"][0], 3),
            round(100 * average["interval"][1], 3),
        )
    losses = arm.last_losses
    return (statistics.fmean(losses), min(losses), max(losses)) if losses else None


def _varied(results: _Results) -> Iterator[Block]:
    """A chart for each key that takes several values within one variant."""
    keys = dict.fromkeys(key for arm in results.trained for key in arm.standing.arm.varied)
    for key in keys:
        for is_evaluated in (True, False):
            rows = []
            for arm in results.trained:
                varied = dict(arm.standing.arm.varied)
                if key not in varied:
                    continue
                value = varied.pop(key)
                outcome = _outcome(arm, is_evaluated=is_evaluated)
                if outcome is None:
                    continue
                y, low, high = outcome
                series = " ".join(
                    [arm.standing.arm.variant, *(f"{k.rpartition('.')[2]} {v}" for k, v in varied.items())]
                )
                shown = value if isinstance(value, int | float) and not isinstance(value, bool) else _module_text(value)
                rows.append({"series": series, "value": shown, "y": y, "low": low, "high": high})
            if len({row["value"] for row in rows}) < 2:
                continue
            is_number = all(isinstance(row["value"], int | float) for row in rows)
            rows.sort(key=lambda row: (row["series"], row["value"] if is_number else ""))
            y_title = _y_title(results, is_evaluated=is_evaluated)
            yield Chart(
                f"{'Accuracy' if is_evaluated else 'Validation loss'} by {key}",
                f"{y_title} for each value of {key}, a line for each method.",
                charts.by_value(rows, x_title=key, y_title=y_title, is_number=is_number),
                _numbers(rows, {"series": "method", "value": key, "y": y_title, "low": "low", "high": "high"}),
            )


def _module_text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _tests(results: _Results) -> Iterator[Block]:
    comparison = results.comparison
    if comparison is not None and comparison["groups"]:
        rows = []
        for name, group in _named_groups(results):
            if group["difference"] is None:
                continue
            for task, accuracy, difference in parts_of(group):
                if task == "average" and len(comparison["tasks"]) == 1:
                    continue
                is_tested = "p" in difference
                rows.append(
                    [
                        name,
                        task,
                        f"{percent(accuracy['accuracy'])}",
                        f"{100 * difference['difference']:+.1f}",
                        interval(*difference["interval"], is_signed=True),
                        p_value(difference["p"]) if is_tested else "",
                        p_value(difference["p_holm"]) if is_tested else "",
                    ]
                )
        if rows:
            first = next(name for name, group in _named_groups(results) if group["difference"] is None)
            tests = ", ".join(dict.fromkeys(g["difference"]["test"] for g in comparison["groups"] if g["difference"]))
            columns = ["method", "task", "accuracy, %", f"minus {first}", "95%", "p", "p (Holm)"]
            yield Table(
                f"Accuracy against {first}",
                columns,
                rows,
                note=f"{tests}, paired by item; Holm's p: for all tasks of an arm.",
            )
    reference = results.reference
    if reference is None or len(results.trained) < 2:
        return
    rows = []
    theirs = {run.seed: run.losses[-1]["loss"] for run in reference.runs if run.losses}
    for arm in results.trained:
        ours = {run.seed: run.losses[-1]["loss"] for run in arm.runs if run.losses}
        common = sorted(ours.keys() & theirs.keys())
        if arm is reference or not common:
            continue
        differences = [ours[seed] - theirs[seed] for seed in common]
        rows.append(
            [arm.name, f"{statistics.fmean(differences):+.4f}", ", ".join(f"{each:+.4f}" for each in differences)]
        )
    if rows:
        yield Table(
            f"Validation loss (last) against {reference.name}",
            ["method", f"minus {reference.name}", "by seed"],
            rows,
            note="Negative is better. There are too few seeds for a test. Where seeds differ in sign, neither is better.",
        )


def _named_groups(results: _Results) -> list[tuple[str, Mapping[str, Any]]]:
    """(the arm's name, its group) of each group of the comparison."""
    assert results.comparison is not None
    names = {arm.group["label"]: arm.name for arm in results.arms if arm.group}
    return [(names.get(group["label"], group["name"]), group) for group in results.comparison["groups"]]


def _loss_curves(results: _Results) -> Iterator[Block]:
    def rows(series: str) -> list[dict[str, Any]]:
        return [
            {"arm": arm.name, "seed": run.seed, **point}
            for arm in results.trained
            for run in arm.runs
            for point in getattr(run, series)
        ]

    validations = rows("losses")
    if not validations:
        return
    numbers = [
        [arm.name, str(run.seed), ", ".join(f"{point['step']}: {point['loss']:.4f}" for point in run.losses)]
        for arm in results.trained
        for run in arm.runs
    ]
    yield Chart(
        "Loss curves",
        "Validation loss of each final run as a line with points, its training loss as a faint line, by steps or by tokens.",
        charts.losses(validations, rows("steps")),
        Table("Validation losses by step", ["method", "seed", "step: loss"], numbers),
    )


def _rates(results: _Results) -> Iterator[Block]:
    search = results.experiment.search
    arms = [arm for arm in results.arms if arm.standing.search]
    if search is None or not arms:
        fixed = {arm.name: _rate(arm.standing.learning_rate) for arm in results.arms}
        yield Text(
            "Not searched. The experiment's file or recipe sets: "
            + "; ".join(f"{k} {v}" for k, v in fixed.items())
            + "."
        )
        return
    steps = " or ".join(dict.fromkeys(_count(arm.cost.num_steps) for arm in arms))
    stopping = (
        " Runs in the worse half at their 1st, 2nd, 4th, ... validation were stopped there (successive halving)."
        if search.halving
        else ""
    )
    yield Text(
        f"Each rate was tried in a run of the final length ({steps} steps), with other seeds "
        f"({', '.join(map(str, search.seeds))}) than the final runs. The rate with the lowest validation loss was chosen. While "
        f"it was at an edge of the grid, the grid was extended.{stopping}"
    )
    rates = sorted({rate for arm in arms for rate in arm.standing.losses})
    rows, points = [], []
    for arm in arms:
        losses = arm.standing.losses
        best = best_rate(losses)
        for rate, loss in losses.items():
            if math.isfinite(loss):
                points.append({"arm": arm.name, "rate": rate, "loss": round(loss, 5), "is_best": rate == best})
        where = "at an edge" if is_at_edge(losses) else "between two worse"
        if arm.standing.learning_rate is None:
            where = "search unfinished" if best is not None or not losses else "every rate diverged"
        tried = [_tried(arm, rate, losses[rate]) if rate in losses else "" for rate in rates]
        rows.append([arm.name, _rate(arm.standing.learning_rate), where, *tried])
    if points:
        yield Chart(
            "Validation loss by learning rate",
            "A line for each arm over the learning rates that were tried; a ring marks the best.",
            charts.rates(points),
        )
    yield Table(
        "Validation loss at every rate that was tried",
        ["method", "chosen", "its place", *(f"{rate:g}" for rate in rates)],
        rows,
        note="Empty: not tried, since the search goes from the file's grid toward lower loss only.",
    )


def _tried(arm: _Arm, rate: float, loss: float) -> str:
    if math.isfinite(loss):
        return f"{loss:.4f}"
    return " and ".join(
        dict.fromkeys(outcome.state for outcome in arm.standing.search[rate].values() if outcome.state != "trained")
    )


def _updates(results: _Results) -> Iterator[Block]:
    if not results.experiment.report.updates:
        return
    runs: list[RunUpdates] = []
    for arm in results.trained:
        try:
            found = load_updates(arm.runs[0].folder.run.path)
        except AdapterError as error:
            yield Text(f"{arm.name}: {error}", is_warning=True)
            continue
        runs.append(RunUpdates(arm.name, found.method, found.updates))
    if not runs:
        return
    side = common_side(runs)
    yield Text(
        f"The updates (end minus start) of the first seed's tensors, in random square slices of equal side ({side} for the "
        f"figures, at most {_MAP_SIDE} for the maps), because tensors of different methods differ in size. The maps show the "
        "size of each element's change, in units of the slice's root mean square, in the middle layer."
    )
    lines = [
        [
            each.run,
            each.factor,
            f"{each.num_elements:,}" if each.num_elements else "",
            f"{each.relative_change:.3g}",
            f"{100 * each.near_zero:.1f}",
            f"{each.effective_rank:.1f}" if each.effective_rank is not None else "",
        ]
        for each in summarize(runs, side, _SEED)
    ]
    columns = ["method", "tensor", "elements", "relative change", "near zero, %", f"effective rank of {side}"]
    yield Table(
        "Updates", columns, lines, note="Medians over layers and modules. Near zero: below a tenth of the slice's RMS."
    )
    yield from _maps(runs)


def _maps(runs: Sequence[RunUpdates]) -> Iterator[Block]:
    num_maps = 0
    for run in runs:
        for factor in run.factors():
            updates = [u for u in run.of(factor) if u.layer is not None and u.final.dim() == 2 and u.side >= 2]
            if not updates or num_maps >= _MOST_MAPS:
                continue
            layers = sorted({u.layer for u in updates if u.layer is not None})
            update = next(u for u in updates if u.layer == layers[len(layers) // 2])
            part = update.slice(min(_MAP_SIDE, update.side), _SEED)
            shares = (part.change.abs() / (part.rms or 1.0)).tolist()
            where = f"{run.label}: {factor} of {update.module}, layer {update.layer}"
            yield Chart(
                where,
                f"A map of the change of {factor} in {update.module} of layer {update.layer} by {run.label}: "
                f"{100 * part.near_zero:.0f} percent of it are near zero.",
                charts.update_map(shares, _LARGEST_CHANGE),
                is_small=True,
            )
            num_maps += 1


def _leaks(results: _Results) -> Iterator[Block]:
    how = results.experiment.evaluate
    if how is None:
        return
    if not how.clean:
        yield Text(
            "The training set was not searched for test items, because evaluate.clean is false. Set it to true for accuracies "
            "without the items that the training set contains; `qdense data check` lists them."
        )
        return
    rows = []
    for arm in results.trained:
        for seed, path in arm.standing.evaluations.items():
            tasks = json.loads(EvaluationFolder(path).summary.read_text(encoding="utf-8"))["tasks"]
            for task, result in tasks.items():
                if "clean" not in result:
                    continue
                num_clean, num_items = result["clean"]["num_items"], result["num_scored"]
                clean = result["clean"]["paper"]
                rows.append(
                    [
                        arm.name,
                        str(seed),
                        task,
                        f"{num_items - num_clean:,} of {num_items:,}",
                        percent(result["paper"]["accuracy"]),
                        f"{percent(clean['accuracy'])} {interval(*clean['interval'])}",
                    ]
                )
    if any(not row[3].startswith("0 ") for row in rows):
        yield Text(
            "The training set contains items of the tests; accuracies without them are shown too.", is_warning=True
        )
    if rows:
        yield Table(
            "Accuracy without the items in the training set",
            ["method", "seed", "task", "contained", "all, %", "clean, %"],
            rows,
        )


def _cost(results: _Results, prices: Mapping[str, float]) -> Iterator[Block]:
    cards = [card for card in _CARDS if any(card in arm.cost.speeds for arm in results.arms)]
    columns = ["method", "runs done", "hours here", "tokens a run", "tokens/s here"]
    columns += [f"h a run, {card}" for card in cards]
    columns += [f"all runs, {card}, at {prices[card]:g} an hour" for card in cards if card in prices]
    rows = []
    totals = dict.fromkeys(cards, 0.0)
    for arm in results.arms:
        num_runs = arm.cost.num_done + arm.cost.num_left
        tokens = statistics.fmean(run.num_tokens for run in arm.runs) if arm.runs else None
        seconds = statistics.fmean(run.seconds for run in arm.runs) if arm.runs else None
        hours = {card: arm.cost.hours(card) for card in cards}
        for card in cards:
            totals[card] += (hours[card] or 0.0) * num_runs
        rows.append(
            [
                arm.name,
                f"{arm.cost.num_done} of {num_runs}",
                f"{sum(outcome.seconds for outcome in arm.standing.outcomes) / 3600:.2f}",
                f"{tokens:,.0f}" if tokens else "",
                f"{tokens / seconds:,.0f}" if tokens and seconds else "",
                *(f"{value:.3g}" if value is not None else "" for value in hours.values()),
                *(f"{(hours[card] or 0) * num_runs * prices[card]:,.2f}" for card in cards if card in prices),
            ]
        )
    note = "Training alone. Hours on cards are predicted by the planner for a 24 GiB card, not measured."
    if totals and any(totals.values()):
        note += " All runs: " + ", ".join(f"{hours:,.1f} h on {card}" for card, hours in totals.items()) + "."
    if not prices:
        note += " With --price CARD=PRICE, the money too."
    yield Table("Cost", columns, rows, note=note)


def _repeat(results: _Results) -> Iterator[Block]:
    command = _command(results.experiment)
    yield Code(f"qdense sweep {command}\nqdense report {command}")
    found: dict[str, dict[str, None]] = {}
    for arm in results.trained:
        for run in arm.runs:
            provenance = run.provenance
            versions = provenance.get("versions", {})
            for name, value in {
                **versions,
                "python": provenance.get("python"),
                "commit of qdense": provenance.get("git_hash"),
            }.items():
                found.setdefault(str(name), {})[str(value)] = None
    if found:
        yield Table("Versions of the runs", ["", ""], [[name, ", ".join(values)] for name, values in found.items()])


# --- texts --------------------------------------------------------------------------------------------------------------


def _command(experiment: Experiment) -> str:
    """The experiment as it is named on the command line."""
    name = experiment.name if "/" in experiment.name else str(experiment.path)
    return " ".join(
        [name, *(f"--set '{each}'" if "'" not in each else f'--set "{each}"' for each in experiment.overrides)]
    )


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _rate(rate: float | str | None) -> str:
    return "" if rate is None else f"{rate:g}" if isinstance(rate, float) else rate


def _by_seed(losses: Sequence[float]) -> str:
    """ ".5134 (.5128, .5140)" """
    if not losses:
        return ""
    each = f" ({', '.join(f'{loss:.4f}' for loss in losses)})" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{each}"


def _numbers(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    """The rows of a chart as a table."""

    def text(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    return Table("The numbers", list(columns.values()), [[text(row[key]) for key in columns] for row in rows])
