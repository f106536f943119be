"""`qdense init`"""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cli.arguments import as_toml, columns, memory_size
from qdense.cli.estimate import predicted_time, rough_token_counts
from qdense.cli.plan import machine_for
from qdense.errors import DataError, RecipeError, counted, did_you_mean
from qdense.text import printable

if TYPE_CHECKING:
    from qdense.data.rows import Rows
    from qdense.planning.plan import Plan
    from qdense.recipe import Recipe

HELP = "write a recipe for your own data and card"
DESCRIPTION = (
    "Write a commented recipe for your own data. It reads the rows, chooses the largest of a few models that fits the card "
    "(or takes --model), and sizes the run to the number of rows."
)
EXAMPLES = """\
  qdense init questions.jsonl
  qdense init calendar.csv --columns instruction=date,output=weekday
  qdense init questions.jsonl --model llama3.2-3b --memory 12GiB --output small.toml
"""

_MODELS = ("llama3-8b", "llama3.2-3b", "llama3.2-1b", "smollm2-135m")  # from the largest down
_EPOCHS = 3
_FEWEST_TO_VALIDATE = 20  # rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        help="a JSON, JSONL, CSV or Parquet file of prompts and completions, conversations or texts",
    )
    parser.add_argument(
        "--columns",
        type=columns,
        metavar="KEY=COLUMN,...",
        help="which columns hold the instruction, input and output, or the messages, or the text (default: recognised by their "
        "names)",
    )
    parser.add_argument("--model", help="a built-in name, a hub id or a folder (default: the largest that fits)")
    parser.add_argument(
        "--method", default="denselora", help="a fine-tuning method: lora, dora, ... (default: denselora)"
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="the card's memory, for instance 24GiB (default: what is free on this machine)",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the recipe to write (default: DATA's name with .toml)"
    )


def run(arguments: argparse.Namespace) -> None:
    name = arguments.data.name.split(".")[0] or "own"
    output = arguments.output or Path(f"{name}.toml")
    if output.exists():
        raise RecipeError(f"{output}: exists, and is left as it is. Name another file with --output.")
    rows = _rows(arguments)
    recipe, plan, body = _fitting(arguments, output.stem, rows)
    text = "\n".join([*_heading(arguments, output, rows, recipe, plan), *body]) + "\n"
    with output.open("x", encoding="utf-8") as stream:
        stream.write(text)
    print(
        f"{output}: {recipe.adapter.method} on {recipe.model.name}, {counted(len(rows.rows), 'row')}. {_prediction(plan)}"
    )
    if arguments.model is None and not plan.machine.kernels.is_cuda:
        print("This machine has no GPU, so that is the smallest model. For a card: --memory 24GiB, for instance.")
    for warning in _warnings(rows):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    print(f"Read it, then: qdense train {output}")


def _rows(arguments: argparse.Namespace) -> Rows:
    from qdense.data.rows import Columns, read_rows

    given = arguments.columns or {}
    rows = read_rows(arguments.data, Columns(**given) if given else None, skip_bad=True)
    if "input" in given and given["input"] not in rows.names:
        known = did_you_mean(given["input"], rows.names)
        raise DataError(f"{arguments.data}: --columns input={given['input']}: no row has such a column{known}")
    return rows


def _warnings(rows: Rows) -> Iterator[str]:
    num_rows, num_bad = len(rows.rows), len(rows.skipped)
    if num_bad:
        yield (
            f"{num_bad:,} of {counted(num_rows + num_bad, 'row')} {'is' if num_bad == 1 else 'are'} blank or broken and will be "
            f'skipped (data.bad_rows = "skip"); the first: {rows.skipped[0]}'
        )
    if num_rows < _FEWEST_TO_VALIDATE:
        yield f"only {counted(num_rows, 'row')}: none is kept for validation, and the result will say little"


def _fitting(arguments: argparse.Namespace, name: str, rows: Rows) -> tuple[Recipe, Plan, list[str]]:
    """The recipe for the given model, or for the largest that fits. Raises RecipeError if none does."""
    from qdense.modeling.locate import fetched_shape
    from qdense.planning.plan import make_plan
    from qdense.recipe import recipe_from_tables

    candidates = (arguments.model,) if arguments.model else _MODELS
    for model in candidates:
        body = list(_tables(arguments, name, rows, model))
        recipe = recipe_from_tables(tomllib.loads("\n".join(body)), source="qdense init")
        shape = fetched_shape(recipe.model.name)
        machine = machine_for(recipe, shape, arguments.memory)
        if not machine.kernels.is_cuda and not arguments.model and model != _MODELS[-1]:
            continue  # without a GPU only the smallest is practical
        plan = make_plan(recipe, shape, machine)
        if plan.fits:
            return recipe, plan, body
    remedies = f" {'; '.join(plan.remedies)}." if plan.remedies else ""
    raise RecipeError(
        f"{candidates[-1]} needs {plan.needed_bytes / 2**30:.1f} GiB for these rows, and {machine.name} has "
        f"{machine.memory_bytes / 2**30:.1f} GiB.{remedies} Name a smaller model with --model, or a larger card with --memory."
    )


def _tables(arguments: argparse.Namespace, name: str, rows: Rows, model: str) -> Iterator[str]:
    """The lines of the recipe. Keys that it omits have suitable defaults."""
    lengths = rough_token_counts(rows.rows)
    num_validation = 0 if len(rows.rows) < _FEWEST_TO_VALIDATE else min(120, len(rows.rows) // 10)
    num_training = len(rows.rows) - num_validation
    batch_size = 16 if num_training >= 800 else 8 if num_training >= 200 else 4
    num_steps = _EPOCHS * math.ceil(num_training / batch_size)
    often = max(1, num_steps // 12)
    max_length = _max_length(lengths)
    num_longer = sum(length > max_length for length in lengths)
    yield from (
        "[model]",
        f"name = {as_toml(model)}",
        'quantization = "nf4"              # the frozen base in 4 bits; "none" for a model that fits in bf16',
        "",
        "[adapter]",
        f"method = {as_toml(arguments.method)}",
        "r = 32                            # larger learns more and costs more memory",
        'target_modules = "QKVUD"          # the paper\'s: q_proj, k_proj, v_proj, up_proj, down_proj',
        "",
        "[data]",
        f"path = {as_toml(str(arguments.data))}",
        _columns_line(rows),
    )
    if rows.skipped:
        total = len(rows.rows) + len(rows.skipped)
        yield f'bad_rows = "skip"                 # {len(rows.skipped):,} of {total:,} rows: blank or broken'
    if (kind := rows.rows[0].kind) != "text":
        yield (
            'train_on = "response"             # the loss counts the answers only; "all" counts the prompts too'
            + (', "last" the last answer' if kind == "conversation" else "")
        )
    yield from (
        f"max_length = {max_length:<21}# tokens of a row; "
        + (
            f"by a rough count {counted(num_longer, 'row is', 'rows are')} cut off"
            if num_longer
            else "enough by a rough count"
        ),
        f"validation_rows = {num_validation:<16}# kept out of training, to see whether it generalises",
        "",
        "[training]",
        f"epochs = {_EPOCHS:<25}# {num_steps:,} steps in all",
        f"batch_size = {batch_size:<21}# rows of one step; the plan divides them as the memory allows",
        f"eval_steps = {often}",
        f"save_steps = {often:<21}# a checkpoint to resume from",
        "# learning_rate, warmup_steps and keep are left to qdense, which chooses by method, model and length of the run.",
        "",
        "[output]",
        f"dir = {as_toml(f'runs/{name}')}",
    )


def _columns_line(rows: Rows) -> str:
    columns = rows.columns
    if columns.messages is not None:
        return (
            f"columns = {{ messages = {as_toml(columns.messages)} }}  # conversations, by the tokenizer's chat template"
        )
    if columns.text is not None:
        return f"columns = {{ text = {as_toml(columns.text)} }}  # whole texts, learnt as they are"
    named = {"instruction": columns.instruction, "input": columns.input, "output": columns.output}
    if columns.input not in rows.names:
        del named["input"]
    return f"columns = {{ {', '.join(f'{key} = {as_toml(column)}' for key, column in named.items())} }}"


def _max_length(lengths: Sequence[int]) -> int:
    """Long enough for 99% of the rows: a multiple of 64, from 128 to 4,096."""
    enough = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
    return min(4096, max(128, math.ceil(enough / 64) * 64))


def _heading(arguments: argparse.Namespace, output: Path, rows: Rows, recipe: Recipe, plan: Plan) -> Iterator[str]:
    num_rows = counted(len(rows.rows), "row")
    yield f"# Written by `qdense init` for {arguments.data.name}: {num_rows}. Every key is explained in docs/reference/recipe.md."
    yield f"# {_prediction(plan)}"
    yield f"# {predicted_time(plan, recipe, rows.rows)}."
    yield f"# What takes the memory, and what would fit: qdense plan {output}. Train: qdense train {output}."
    yield ""


def _prediction(plan: Plan) -> str:
    gib = 2**30
    return (
        f"Predicted to need {plan.needed_bytes / gib:.1f} of {plan.machine.memory_bytes / gib:.1f} GiB on {plan.machine.name}: "
        f"{plan.summary}."
    )
