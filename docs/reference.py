"""MkDocs hook: the reference pages, written from the code at build time, so that they cannot disagree with it."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import qdense
from qdense import cli, runs
from qdense.libraries import quiet_libraries
from qdense.methods import METHODS
from qdense.planning.parameters import count_parameters
from qdense.recipe import AdapterRecipe, Recipe


def on_files(files: Files, config: MkDocsConfig) -> Files:
    quiet_libraries()
    for name, page in (
        ("recipe", recipe_page()),
        ("command-line", command_line_page()),
        ("run-folder", run_folder_page()),
        ("python", python_page()),
        ("methods", methods_page()),
    ):
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


# --- the recipe -----------------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe, with its default and what is accepted, from the pydantic models."""
    lines = [
        "# The recipe",
        "",
        "A recipe is a TOML file with the tables below. It is checked in full before anything loads; unknown keys are errors.",
        "Values on the command line (`--set table.key=value`) come before the file's, and the file's before the defaults.",
        "",
    ]
    for name, field in Recipe.model_fields.items():
        lines += _table(name, _model_of(field.annotation), level=2)
    return "\n".join(lines)


def _table(name: str, model: type[BaseModel], level: int) -> list[str]:
    lines, inner = [f"{'#' * level} [{name}]", "", "| key | default | accepted |", "|---|---|---|"], []
    for key, field in model.model_fields.items():
        table = _model_of(field.annotation)
        if table is not None:
            inner.append((f"{name}.{key}", table))
            continue
        lines.append(f"| `{key}` | {_default(field)} | {_cell(field.description)} |")
    lines.append("")
    for inner_name, table in inner:
        lines += _table(inner_name, table, level + 1)
    return lines


def _model_of(annotation: Any) -> Any:
    """The table that an annotation stands for, or None; `X | None` stands for X."""
    candidates = [annotation, *get_args(annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "omitted"
    if value == {}:
        return "none"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


# --- the command line -----------------------------------------------------------------------------------------------------


def command_line_page() -> str:
    """Every command with its arguments and examples, from argparse."""
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# The command line", "", "`qdense --help` and `qdense COMMAND --help` print the same.", ""]
    for name, command in commands.choices.items():
        lines += [f"## qdense {name}", "", str(command.description), ""]
        inner = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
        for subcommand, subparser in inner[0].choices.items() if inner else ():
            lines += [f"### qdense {name} {subcommand}", "", str(subparser.description), "", *_arguments(subparser)]
        if not inner:
            lines += _arguments(command)
        lines += ["```text", importlib.import_module(f"qdense.cli.{name}").EXAMPLES.rstrip(), "```", ""]
    lines += [
        "## Exit status",
        "",
        "0: success. 1: `qdense doctor` found a problem. 2: a mistake that one message explains. 130: stopped by Ctrl-C; 143: by "
        "SIGTERM; 129: by a closed terminal. Anything else is a bug in qdense.",
        "",
    ]
    return "\n".join(lines)


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    lines = ["| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if "--help" in action.option_strings or isinstance(action, argparse._SubParsersAction):
            continue
        metavar = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        )
        values = " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
        takes_value = action.nargs != 0
        shown = f"{action.option_strings[0]}{f' {values}' if takes_value else ''}" if action.option_strings else values
        lines.append(f"| `{_cell(shown)}` | {_cell(action.help)} |")
    return [*lines, ""]


# --- the rest ---------------------------------------------------------------------------------------------------------------


def run_folder_page() -> str:
    text = inspect.getdoc(runs) or ""
    return f"# A run's folder\n\n```text\n{text}\n```\n"


def python_page() -> str:
    """The public names of the package, with their signatures and docstrings."""
    lines = [
        "# Python",
        "",
        "Importing `qdense` makes its methods known to PEFT; after that, PEFT's own functions do everything. See",
        "[the method](../explanation/method.md#with-peft) for an example.",
        "",
    ]
    for name in qdense.__all__:
        value = getattr(qdense, name)
        if not inspect.isclass(value):
            continue
        doc = (inspect.getdoc(value) or "").partition("\n\nArgs:")[0]
        lines += [f"## {name}", "", doc.split("\n\n")[0], ""]
        fields = {
            key: field for key, field in getattr(value, "__dataclass_fields__", {}).items() if "help" in field.metadata
        }
        if fields:
            lines += ["| field | default | meaning |", "|---|---|---|"]
            lines += [
                f"| `{key}` | `{field.default!r}` | {_cell(field.metadata['help'])} |" for key, field in fields.items()
            ]
            lines.append("")
    return "\n".join(lines)


def methods_page() -> str:
    """Every method with its trained parameters on LLaMA-3-8B and the keys that it reads."""
    lines = [
        "# Methods",
        "",
        "One recipe serves all methods: `adapter.method` chooses. A run tells which keys its method does not read. The table",
        "counts trained parameters on LLaMA-3-8B at r 32 for the modules q, k, v, up and down.",
        "",
        "| `adapter.method` | trained | what it is | base |",
        "|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        count = count_parameters("llama3-8b", AdapterRecipe(method=name, r=32))
        bases = ", ".join(method.quantizations)
        lines.append(f"| `{name}` | {count.trainable_parameters:,} | {_cell(method.summary)} | {bases} |")
    lines += ["", "## What each reads", "", "| method | keys of `[adapter]` | default learning rate |", "|---|---|---|"]
    for name, method in METHODS.items():
        keys = ", ".join(f"`{key}`" for key in sorted(method.adapter_keys))
        adapter = AdapterRecipe(method=name)
        rates = [method.default_learning_rate(adapter, size) for size in (576, 4096)]
        lines.append(f"| `{name}` | {keys or 'none'} | {f'{rates[0]:g}; {rates[1]:g}' if name != 'none' else ''} |")
    lines += [
        "",
        "The two rates are for models of hidden size 576, where they were [measured](../results.md#default-learning-rates),",
        "and 4,096 (LLaMA-3-8B), where they are scaled and not measured.",
        "",
    ]
    return "\n".join(lines)
