"""An experiment: a TOML file that names a base recipe, what varies, how learning rates are found, what is evaluated and which
published rows belong beside it.

    recipe = "math10k"
    seeds = [1, 2, 3]

    [set.training]                  # over the recipe, for every run
    max_steps = 240

    [variants."LoRA".adapter]       # over that, for this variant; a list stands for one arm for each of its values
    method = "lora"
    r = [2, 8, 32]

    [search]                        # the learning rate of each arm, by validation loss, with seeds of its own
    learning_rate = [1e-3, 3e-3, 1e-2]

    [evaluate]
    tasks = ["addsub", "svamp"]

An arm is a variant with one value for each key that varies. An arm at one learning rate with one seed is a cell: one run.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qdense.benchmarks.tasks import tasks_named
from qdense.errors import QDenseError, RecipeError, did_you_mean, shortened
from qdense.recipe import NamedTemplate, Recipe, find_recipe, named_file, recipe_from_tables, recipes_folder
from qdense.schema import AS_TUPLE, Problem, Table, apply_override, flattened, put, read_toml, refusal, validated

_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_RATE_LIMITS = (1e-12, 1.0)  # those of training.learning_rate
SEARCH_SEEDS = (101,)
_MOST_ARMS = 1000


class SearchTable(Table):
    learning_rate: Annotated[tuple[Annotated[float, Field(ge=_RATE_LIMITS[0], lt=_RATE_LIMITS[1])], ...], AS_TUPLE] = (
        Field(min_length=2, description="a list of at least two rates from 1e-12 to below 1, in rising order")
    )
    seeds: Annotated[tuple[_Seed, ...], AS_TUPLE] = Field(
        SEARCH_SEEDS, min_length=1, description="a list of seeds, none of which is in `seeds`"
    )
    halving: bool = Field(
        False,
        description="true or false: whether a run in the worse half at its 1st, 2nd, 4th, ... validation is stopped there",
    )


class EvaluateTable(Table):
    tasks: Annotated[tuple[str, ...], AS_TUPLE] = Field(
        min_length=1, description="a list of tasks, groups of tasks, or files of your own"
    )
    decoding: Literal["beam4", "greedy"] = Field("beam4", description="beam4 (the authors') or greedy")
    template: NamedTemplate | None = Field(
        None, description="alpaca, llm-adapters, plain, chat, chatml or llama3; omitted, the run's own"
    )
    limit: int | None = Field(None, ge=1, description="a positive whole number: only the first items of each task")
    max_new_tokens: int | None = Field(None, ge=1, description="a positive whole number; omitted, the task's own")
    batch_size: int | None = Field(None, ge=1, description="a positive whole number of sequences at a time")
    clean: bool = Field(
        False, description="true or false: whether to score also without the items that the training set contains"
    )
    base: bool = Field(True, description="true or false: whether the bare model is scored too")


class ReportTable(Table):
    reference: str | None = Field(
        None, description="the name of the variant that others are compared with; omitted, the first"
    )
    published: Literal["llama3-8b", "llama2-7b"] | None = Field(
        None, description="llama3-8b or llama2-7b: the model whose published rows are shown"
    )
    updates: bool = Field(False, description="true or false: whether maps of what training changed are shown")


class ExperimentTables(Table):
    title: str = Field(min_length=1, description="a line")
    question: str = Field("", description="a paragraph: what the experiment is to decide")
    recipe: str | None = Field(
        None, description="a built-in recipe's name or a file beside this one; omitted, [set] is the whole recipe"
    )
    seeds: Annotated[tuple[_Seed, ...], AS_TUPLE] = Field(
        (42,), min_length=1, description="a list of seeds (training.seed), each once"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="tables of a recipe, for every run")
    variants: dict[str, dict[str, Any]] = Field(
        min_length=1, description="a table for each variant, with tables of a recipe in it"
    )
    search: SearchTable | None = Field(None, description="a table")
    evaluate: EvaluateTable | None = Field(None, description="a table")
    report: ReportTable = Field(default_factory=ReportTable, description="a table")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        arm: the name of its arm.
        stage: "search", for a learning rate, or "final".
    """

    arm: str
    stage: Literal["search", "final"]
    recipe: Recipe

    @property
    def seed(self) -> int:
        return self.recipe.training.seed

    @property
    def learning_rate(self) -> float | str:
        return self.recipe.training.learning_rate

    @cached_property
    def digest(self) -> str:
        """Checksum of everything that decides the run: equal cells of two experiments are one."""
        tables = self.recipe.choices()
        tables.pop("output", None)
        return hashlib.sha256(
            json.dumps([tables, _checksum(self.recipe.data.path)], sort_keys=True).encode()
        ).hexdigest()[:16]


@dataclass(frozen=True)
class Arm:
    """A variant with one value for each key that varies.

    Attributes:
        varied: the keys for which the file gives a list, with this arm's value.
        tables: its recipe, without output and seed.
        is_searched: whether its learning rate is found by the experiment.
    """

    name: str
    variant: str
    varied: Mapping[str, Any]
    tables: Mapping[str, Any] = field(repr=False)
    is_searched: bool

    def cell(self, stage: Literal["search", "final"], seed: int, learning_rate: float | None = None) -> Cell:
        """A run of this arm. Raises RecipeError."""
        tables = copy.deepcopy(dict(self.tables))
        training = tables.setdefault("training", {})
        training["seed"] = seed
        if learning_rate is not None:
            training["learning_rate"] = learning_rate
        return Cell(self.name, stage, recipe_from_tables(tables, source=f'arm "{self.name}"'))

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe, whatever the learning rate and seed."""
        return recipe_from_tables(self.tables, source=f'arm "{self.name}"')

    @cached_property
    def digest(self) -> str:
        """Checksum of what its runs have in common apart from learning rate and seed."""
        return self.cell("search", 0, _RATE_LIMITS[0]).digest[:8]


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
        name: a built-in one's name ("small/rates"), or the file's without its suffix.
    """

    name: str
    path: Path
    title: str
    question: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    search: SearchTable | None
    evaluate: EvaluateTable | None
    report: ReportTable
    overrides: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The variant that others are compared with."""
        return self.report.reference or self.arms[0].variant


def builtin_experiments() -> dict[str, Path]:
    """The experiments that come with qdense, by name ("paper/table1-llama3-8b")."""
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.toml"))}


def find_experiment(name: str | Path) -> Path:
    """The file of an experiment, given by its path or the name of a built-in one. Raises RecipeError."""
    path, known = Path(name), builtin_experiments()
    found = named_file(name, known)
    if found is None:
        raise RecipeError(f"{path}: no such file, and no built-in experiment{did_you_mean(str(name), known)}")
    return found


def load_experiment(name: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment with all its arms.

    Args:
        name: a TOML file, or the name of a built-in experiment.
        overrides: `key=value` texts of `--set`. Keys of a recipe ("training.max_steps") are set in every arm, after everything
            else; other keys ("seeds", "search.learning_rate") are the file's own.

    Raises:
        RecipeError: the file cannot be read or has problems; the message lists them all.
    """
    path = find_experiment(name)
    tables = read_toml(path, "experiment")
    of_recipe = [each for each in overrides if each.partition("=")[0].strip().partition(".")[0] in Recipe.model_fields]
    for override in overrides:
        if override not in of_recipe:
            apply_override(tables, override, least_parts=1)
    if "variants" not in tables and "model" in tables:
        raise RecipeError(f"{path}: is a recipe, not an experiment. Train it: qdense train {path}")
    parsed, problems = validated(ExperimentTables, tables)
    if parsed is None:
        raise refusal(str(path), problems.values())
    found = list(_own_problems(parsed))
    if found:
        raise refusal(str(path), found)
    experiment = Experiment(
        name=next((known for known, file in builtin_experiments().items() if file.samefile(path)), path.stem),
        path=path,
        title=parsed.title,
        question=parsed.question,
        seeds=parsed.seeds,
        arms=tuple(_arms(path, parsed, of_recipe)),
        search=parsed.search,
        evaluate=parsed.evaluate,
        report=parsed.report,
        overrides=tuple(overrides),
    )
    _refuse_bad_arms(experiment)
    return experiment


def _own_problems(tables: ExperimentTables) -> Iterator[Problem]:
    """What is wrong in a file whose values are valid one by one."""
    if len(set(tables.seeds)) < len(tables.seeds):
        yield f"seeds = {list(tables.seeds)}", "must name each seed once"
    search = tables.search
    if search is not None:
        rates = list(search.learning_rate)
        if rates != sorted(set(rates)):
            yield f"search.learning_rate = {rates}", "must rise, each rate once"
        if shared := sorted(set(search.seeds) & set(tables.seeds)):
            yield (
                f"search.seeds = {list(search.seeds)}",
                f"must be other seeds than `seeds`: {', '.join(map(str, shared))} would both choose the rate and test it",
            )
    reference = tables.report.reference
    if reference is not None and reference not in tables.variants:
        yield (
            f'report.reference = "{shortened(reference)}"',
            f"no such variant{did_you_mean(reference, tables.variants)}",
        )
    if tables.evaluate is not None:
        try:
            tasks_named(",".join(tables.evaluate.tasks), None)
        except QDenseError as error:
            yield f"evaluate.tasks = {list(tables.evaluate.tasks)}", str(error)
    for where, given in (
        ("set", tables.set),
        *((f"variants.{shortened(name)}", v) for name, v in tables.variants.items()),
    ):
        for table in given.keys() - Recipe.model_fields.keys():
            yield f"{where}.{shortened(table)}", f"unknown table{did_you_mean(table, Recipe.model_fields)}"
        flat = flattened(given)
        if "training.seed" in flat:
            yield f"{where}.training.seed", "is set by `seeds`"
        if any(key == "output" or key.startswith("output.") for key in flat):
            yield f"{where}.output", "is chosen by the sweep"
        for key in given:
            if not isinstance(given[key], Mapping):
                yield f"{where}.{shortened(key)}", "must be a table, as in a recipe"
        for key, value in flat.items():
            if value == []:
                yield f"{where}.{key} = []", "must name at least one value: a list makes an arm of each"
    num_arms = 0
    for variant in tables.variants.values():
        lists = [value for value in flattened(_merged(tables.set, variant)).values() if isinstance(value, list)]
        num_arms += math.prod(map(len, lists))
    if num_arms > _MOST_ARMS:
        yield "variants", f"make {num_arms:,} arms, and at most {_MOST_ARMS:,} are accepted: split the experiment"


def _arms(path: Path, tables: ExperimentTables, overrides: Sequence[str]) -> Iterator[Arm]:
    base: dict[str, Any] = {}
    if tables.recipe is not None:
        beside = path.parent / tables.recipe
        try:
            base = read_toml(beside if os.path.isfile(beside) else find_recipe(tables.recipe), "recipe")
        except RecipeError as error:
            raise RecipeError(f'{path}: recipe = "{shortened(tables.recipe)}": {error}') from None
        base.pop("provenance", None)
        base.pop("output", None)
    for variant, own in tables.variants.items():
        given = _merged(tables.set, own)
        changes = flattened(given)
        lists = {key: value for key, value in changes.items() if isinstance(value, list)}
        common = _merged(base, {})
        # An alpha of the base recipe belongs to its rank.
        if "adapter.r" in changes and "adapter.alpha" not in changes and isinstance(common.get("adapter"), dict):
            common["adapter"].pop("alpha", None)
        common = _merged(common, given)
        is_fixed = "training.learning_rate" in changes or any(
            override.startswith("training.learning_rate") for override in overrides
        )
        for values in itertools.product(*lists.values()):
            varied = dict(zip(lists, values, strict=True))
            merged = copy.deepcopy(common)
            for key, value in varied.items():
                put(merged, key.split("."), value)
            for override in overrides:
                apply_override(merged, override)
            rate = merged.get("training", {}).get("learning_rate") if isinstance(merged.get("training"), dict) else None
            yield Arm(
                name=" ".join([variant, *(_shown(key, value) for key, value in varied.items())]),
                variant=variant,
                varied=varied,
                tables=merged,
                is_searched=tables.search is not None and not (is_fixed and rate != "auto"),
            )


def _refuse_bad_arms(experiment: Experiment) -> None:
    """Raise RecipeError for arms whose recipes are invalid, and for two that are the same."""
    faults: list[str] = []
    by_digest: dict[str, str] = {}
    for arm in experiment.arms:
        try:
            twin = by_digest.setdefault(arm.cell("final", experiment.seeds[0]).digest, arm.name)
        except RecipeError as error:
            faults.append(str(error))
            continue
        if twin != arm.name or [each.name for each in experiment.arms].count(arm.name) > 1:
            faults.append(f'arm "{arm.name}": trains the same as "{twin}"; an arm must differ in something')
    if faults:
        raise RecipeError(f"{experiment.path}: " + "\n".join(faults))


def _merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(tables))
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(before, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _shown(key: str, value: Any) -> str:
    """A varied value in an arm's name: "r8", "10%", "QKV", "init balanced"."""
    if key == "adapter.r":
        return f"r{value}"
    if key == "data.fraction" and isinstance(value, int | float) and 0 < value <= 1:
        return f"{100 * value:g}%"
    if key == "adapter.target_modules" and isinstance(value, str | list):
        return value if isinstance(value, str) else "+".join(map(str, value))
    return f"{key.rpartition('.')[2]} {value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"


def _checksum(path: str | None) -> str:
    """Of a user's data file, whose contents may change; empty if there is none (yet)."""
    if path is None or not Path(path).is_file():
        return ""
    status = os.stat(path)
    return _checksum_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _checksum_of(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
