"""Build the documentation into build/docs/site: `make docs`, or `python docs/build.py`.

The pages of the reference are written from the code first, into docs/reference. Then pages are staged into build/docs/source:
those of this folder, and the measurements of tools/. Zensical then builds them in strict mode: a broken
link or anchor fails. Nothing is fetched, and nothing on the built pages is.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BUILD = ROOT / "build" / "docs"

# Files outside docs/ that become pages or pictures of the site, by their place in it.
STAGED = {
    "tools/gpu/RESULTS.md": "results/gpu.md",
    "tools/results/bf16.md": "results/bf16.md",
    "tools/results/demo.md": "results/demo.md",
    "tools/results/display.svg": "results/display.svg",
    "tools/results/faults.md": "results/faults.md",
    "tools/results/generation.md": "results/generation.md",
    "tools/results/kernels.md": "results/kernels.md",
    "tools/results/methods.md": "results/methods.md",
    "tools/results/mutation.md": "results/mutation.md",
    "tools/results/peft.md": "results/peft.md",
    "tools/results/tasks.md": "results/tasks.md",
    "tools/results/training.md": "results/training.md",
    "tools/results/vllm.md": "results/vllm.md",
    "tools/results/wordproblems/report.html": "results/wordproblems-charts.html",
    "tools/results/wordproblems/report.md": "results/wordproblems.md",
    "tools/results/updates/README.md": "results/updates.md",
    "tools/results/updates/heatmaps.png": "results/heatmaps.png",
    "tools/results/updates/histograms.png": "results/histograms.png",
    "tools/results/updates/layers.png": "results/layers.png",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1[ ]*$", re.MULTILINE | re.DOTALL)


def build(folder: Path) -> int:
    """Stage the pages into folder/source and build folder/site; returns Zensical's exit status."""
    stage(folder / "source")
    return build_staged(folder)


def build_staged(folder: Path) -> int:
    """Build folder/site from pages that are staged already."""
    shutil.copy(DOCS / "zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "zensical.toml"]
    return subprocess.run(command, cwd=folder).returncode


def stage(folder: Path) -> None:
    """Write every page of the site as Markdown."""
    shutil.rmtree(folder, ignore_errors=True)
    places = {str(path.relative_to(ROOT)): str(path.relative_to(DOCS)) for path in _pages_and_assets()} | STAGED
    for source, place in places.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            target.write_text(_with_site_links(source, place, places), encoding="utf-8")
        elif source.endswith(".svg"):  # rich names fonts on a network
            text = (ROOT / source).read_text(encoding="utf-8")
            target.write_text(re.sub(r"@font-face \{.*?\}", "", text, flags=re.DOTALL), encoding="utf-8")
        else:
            shutil.copy(ROOT / source, target)


def reference() -> dict[str, str]:
    """The pages that are written from the code, by their place in this folder. They are committed, so that a clone has them."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/experiment.md": experiment_page(),
        "reference/command-line.md": command_line_page(),
        "reference/run-folder.md": run_folder_page(),
        "reference/python.md": python_page(),
    }


def _pages_and_assets() -> Iterator[Path]:
    for path in sorted(DOCS.rglob("*")):
        if path.suffix in {".md", ".css", ".js", ".svg", ".png"}:
            yield path


def _with_site_links(source: str, place: str, places: Mapping[str, str]) -> str:
    """The page with its links to files of the repository as links of the site.

    A file that is no page of the site, such as a module, is named without a link. Raises SystemExit if there is no such file.
    """

    def replaced(match: re.Match[str]) -> str:
        mark, text, address = match.groups()
        path, hash_sign, anchor = address.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if named in places:
            target = posixpath.relpath(places[named], posixpath.dirname(place))
            return f"{mark}[{text}]({target}{hash_sign}{anchor})"
        if not (ROOT / named).exists():
            raise SystemExit(f"{source}: links to {address}, and there is no such file")
        return text

    text = (ROOT / source).read_text(encoding="utf-8")
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(replaced, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, text[end:])])


# --- Markdown -----------------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    """Plain text, with `code` in it, as a cell of a table."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = (part if part.startswith("`") else re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts)
    return "".join(escaped).replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _code(value: str) -> str:
    return f"`{value}`" if value else ""


def _docstring(documented: Any) -> str:
    """A docstring as Markdown: indented blocks become code, and sections such as "Args:" become lists."""
    lines: list[str] = []
    section = False
    for line in (inspect.getdoc(documented) or "").splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            section = True
            lines += ["", f"**{line[:-1]}**", ""]
        elif section and (match := re.match(r" {4}(\w+): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line
            if line.startswith("    ") and lines and lines[-1] and not lines[-1].startswith("    "):
                lines.append("")
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


# --- the recipe ---------------------------------------------------------------------------------------------------------


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or hasattr(type(value), "model_fields") or value == {}:
        return ""
    from qdense.catalogs.families import PAPER_TARGET_MODULES

    return _code(json.dumps("QKVUD" if value == PAPER_TARGET_MODULES else value))


def _fields(table: Any, skipped: Sequence[str] = ()) -> str:
    rows = [
        [_code(name), _default(field), _cell(field.description or "")]
        for name, field in table.model_fields.items()
        if name not in skipped
    ]
    return _table(["Key", "Default", "Accepted"], rows)


def recipe_page() -> str:
    """Every key of a recipe, the methods with their own tables, and the names that a recipe may use."""
    from qdense.catalogs.datasets import TRAINING_SETS
    from qdense.catalogs.families import MODULE_LETTERS
    from qdense.catalogs.models import CATALOG
    from qdense.methods import METHODS
    from qdense.recipe import AdapterRecipe, ColumnsRecipe, DataRecipe, ModelRecipe, OutputRecipe, TrainingRecipe

    own_tables = {name: method.settings for name, method in METHODS.items() if method.settings is not None}
    sections = [
        "# The recipe",
        "A recipe is a TOML file that holds everything that decides a training run. qdense validates the whole file before it "
        "loads anything, and reports all problems together. An unknown key is an error.",
        "A value on the command line (`--set adapter.r=64`) takes precedence over the file, and the file over the defaults "
        "below. The run's folder keeps the resolved recipe, with every default filled in.",
        "A recipe needs `model.name`, and `data.name` or `data.path`. Everything else has a default.",
        "This page is generated from `qdense/recipe.py` and `qdense/methods/`.",
    ]
    tables = [
        ("model", ModelRecipe, "The base model: what is loaded, and in which precision."),
        ("adapter", AdapterRecipe, "The method, and the size and shape of what it trains."),
        ("data", DataRecipe, "The rows to train on."),
        ("data.columns", ColumnsRecipe, "The columns of your data, where their names are not recognised."),
        ("training", TrainingRecipe, "Steps, learning rate, batch, memory and checkpoints."),
        ("output", OutputRecipe, "Where the run is written."),
    ]
    for name, table, meaning in tables:
        sections += [f"## [{name}]", meaning, _fields(table, tuple(own_tables) if name == "adapter" else ())]
    sections += [
        "## Methods",
        "The values of `adapter.method`. A method reads only the keys listed for it. It notes the others and does not refuse "
        "them, so one recipe serves every method. Settings of one method have a table of their own. The learning rate is the "
        "default for a model as wide as SmolLM2-135M (hidden size 576); a wider model gets a lower one.",
    ]
    base = {name: AdapterRecipe(method=name) for name in METHODS}
    sections.append(
        _table(
            ["Method", "What it is", "Keys of [adapter]", "Base", "Learning rate"],
            [
                [
                    _code(name),
                    _cell(method.summary),
                    ", ".join(_code(key) for key in sorted(method.adapter_keys)),
                    ", ".join(method.quantizations),
                    f"{method.default_learning_rate(base[name], 576):g}",
                ]
                for name, method in METHODS.items()
            ],
        )
    )
    for name, settings in own_tables.items():
        sections += [f"### [adapter.{name}]", _fields(settings)]
    sections += [
        "## Models by name",
        "Any other model is named by its hub id (`owner/name`) or by a local folder. Shapes are built in for the models below, "
        "so `qdense plan` and `qdense params` need no download for them.",
        _table(
            ["Name", "On the hub", "Parameters", "Layers", "Hidden size"],
            [
                [
                    _code(model.name),
                    model.hub_id,
                    f"{model.num_parameters / 1e9:.2f} billion",
                    f"{model.num_layers}",
                    f"{model.hidden_size:,}",
                ]
                for model in CATALOG.values()
            ],
        ),
        "## Data sets by name",
        "Any other data set is a hub data set (`owner/name`), or your own file, named by `data.path`.",
        _table(["Name"], [[_code(name)] for name in TRAINING_SETS]),
        "## Module letters",
        '`adapter.target_modules` takes a list of module names, or the paper\'s letters in one string: `"QKVUD"` adapts the '
        "query, key, value, up and down projections of every layer.",
        _table(["Letter", "Module"], [[_code(letter), _code(name)] for letter, name in MODULE_LETTERS.items()]),
    ]
    return "\n\n".join(sections) + "\n"


def experiment_page() -> str:
    """Every key of an experiment, and the experiments that come with qdense."""
    from qdense.experiments.experiment import (
        EvaluateTable,
        ExperimentTables,
        ReportTable,
        SearchTable,
        builtin_experiments,
        load_experiment,
    )

    sections = [
        "# The experiment",
        "An experiment is a TOML file for `qdense sweep` and `qdense report`. [Run an experiment](../how-to/experiments.md) has "
        "an example. qdense validates the whole file, and the recipe of each arm, before anything runs. An unknown key is an "
        "error.",
        "An arm is a variant with one value for each key for which the file gives a list. A run is an arm at one learning rate "
        "with one seed. Later tables take precedence: the recipe, `[set]`, the variant, and `--set` on the command line. Where "
        "`[set]` or a variant gives `adapter.r` without `adapter.alpha`, alpha is 2 r and not the recipe's.",
        "This page is generated from `qdense/experiments/experiment.py`.",
        "## Top level",
        _fields(ExperimentTables),
    ]
    for name, table, meaning in (
        ("search", SearchTable, "How the learning rate of each arm is found. Without this table, recipes say it."),
        (
            "evaluate",
            EvaluateTable,
            "How the final runs are scored. Without this table, validation losses are compared.",
        ),
        ("report", ReportTable, "What stands beside the results."),
    ):
        sections += [f"## [{name}]", meaning, _fields(table)]
    experiments = {name: load_experiment(path) for name, path in builtin_experiments().items()}
    rows = [
        [_code(name), _cell(each.title), f"{len(each.arms)}", f"{len(each.seeds)}"]
        for name, each in experiments.items()
    ]
    sections += ["## Experiments by name", _table(["Name", "What it is", "Arms", "Seeds"], rows)]
    return "\n\n".join(sections) + "\n"


# --- the command line ---------------------------------------------------------------------------------------------------


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser that has no commands below it, with its full name."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for key, inner in action.choices.items():
            yield from _commands(inner, f"{name} {key}")


def _argument(action: argparse.Action) -> str:
    value = action.metavar if action.metavar is not None else None
    if isinstance(value, tuple):
        value = " ".join(value)
    if value is None and action.nargs != 0:
        value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    if not action.option_strings:
        return _code(value or "")
    return ", ".join(
        _code(f"{option} {value}" if value and action.nargs != 0 else option) for option in action.option_strings
    )


def command_line_page() -> str:
    """Every command with its usage, its arguments and its examples."""
    from qdense.cli import build_parser

    os.environ["COLUMNS"] = "80"  # argparse breaks lines of usage there
    parser = build_parser()
    commands = list(_commands(parser, "qdense"))
    sections = [
        "# The command line",
        _cell(parser.description or ""),
        "`qdense COMMAND --help` prints what this page says. `python -m qdense` is the same as `qdense`. This page is generated "
        "from the parser in `qdense/cli/`.",
        _table(
            ["Command", "What it does"],
            [
                [
                    f"[`{name}`](#{name.replace(' ', '-')})",
                    _cell((inner.description or "").split(". ")[0].rstrip(".") + "."),
                ]
                for name, inner in commands
            ],
        ),
        "## Exit status",
        _table(
            ["Status", "Meaning"],
            [
                ["0", "success"],
                ["1", "`qdense doctor` found a problem, or a run of `qdense sweep` failed"],
                ["2", "a mistake in the command, the recipe or a file; the message says what to do"],
                ["3", "training diverged: a loss or gradient is not finite"],
                ["130, 143, 129", "stopped by Ctrl-C, by SIGTERM, or because the terminal closed"],
            ],
        ),
        "Any other status is a bug in qdense.",
    ]
    for name, inner in commands:
        usage = inner.format_usage().removeprefix("usage: ").rstrip().replace("\n       ", "\n")
        sections += [f"## {name}", _cell(inner.description or ""), f"```text\n{usage}\n```"]
        rows = []
        for group in inner._action_groups:
            for action in group._group_actions:
                if action.help != argparse.SUPPRESS and action.dest != "help":
                    help_text = (action.help or "") % {**vars(action), "prog": name}
                    rows.append([_argument(action), _cell(help_text)])
        sections.append(_table(["Argument", "Meaning"], rows))
        if inner.epilog:
            sections.append(f"```text\n{textwrap.dedent(inner.epilog).strip()}\n```")
    sections += ["## Environment variables", _environment_table()]
    return "\n\n".join(sections) + "\n"


def _environment_table() -> str:
    return _table(
        ["Variable", "Meaning"],
        [
            ["`QDENSE_CACHE`", "the folder of downloaded and prepared models; `qdense doctor` shows where it is"],
            ["`QDENSE_DATA`", "a folder of data sets in LLM-Adapters' layout; what is missing there is downloaded"],
            ["`HF_TOKEN`", "a hub token, for gated models such as LLaMA; `hf auth login` stores one"],
            ["`HF_HUB_OFFLINE=1`", "never ask the hub; use only what is cached"],
            ["`OPENAI_API_KEY`", "the key for `qdense evaluate --endpoint`"],
        ],
    )


# --- the run's folder, the Python API -----------------------------------------------------------------------------------


def run_folder_page() -> str:
    """What `qdense/runs.py` says of a run's folder, its trees of names as tables."""
    import qdense.experiments.cells
    import qdense.runs

    sections = [
        "# The run's folder",
        "`qdense train` writes one folder for each run. It is named by `output.dir` in the recipe, or by `--output`. The names "
        "below come from `qdense/runs.py`. [JSON outputs](json.md) lists the keys of the JSON files.",
    ]
    paragraphs = (inspect.getdoc(qdense.runs) or "").split("\n\n")[1:]
    for paragraph in [*paragraphs, *(inspect.getdoc(qdense.experiments.cells) or "").split("\n\n")[1:]]:
        folder, _, tree = paragraph.partition(":\n    ")
        if paragraph.endswith("/:"):
            sections.append(f"## {paragraph.rstrip(':')}")
        elif tree:
            sections += [f"## {folder}", _tree(tree)]
        elif paragraph.endswith(":"):
            sections.append(f"## {_cell(paragraph.rstrip(':'))}")
        elif paragraph.startswith("    "):
            sections.append(_tree(paragraph))
        else:
            sections.append(_cell(paragraph))
    return "\n\n".join(sections) + "\n"


def _tree(text: str) -> str:
    """Lines of a name, spaces and a meaning, which may go on in lines that begin with spaces alone, as a table."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        match = re.match(r" {0,4}(\S.*?) {2,}(\S.*)", line)
        if match and not line.startswith("     "):
            rows.append([", ".join(map(_code, match[1].split(", "))), match[2]])
        else:
            rows[-1][1] += f" {line.strip()}"
    return _table(["Name", "What it holds"], [[name, _cell(meaning)] for name, meaning in rows])


def python_page() -> str:
    """The public names of the package."""
    import qdense
    from qdense.libraries import quiet_libraries

    quiet_libraries()

    sections = [
        "# The Python API",
        "`import qdense` makes DenseLoRA, NoRA and RED known to PEFT. After that, PEFT's own functions work: `get_peft_model`, "
        "`PeftModel.from_pretrained`, `save_pretrained`, `add_adapter`, `set_adapter`, `disable_adapter`.",
        "[Use DenseLoRA with PEFT](../how-to/peft.md) has an example. These are the public names. Everything else in the package "
        "is internal and may change.",
    ]
    for name in qdense.__all__:
        documented = getattr(qdense, name)
        if not inspect.isclass(documented):
            sections += [f"## {name}", f"`{documented!r}`, the installed version."]
            continue
        sections += [f"## {name}", _docstring(documented)]
        if dataclasses.is_dataclass(documented):
            own = [field for field in dataclasses.fields(documented) if field.name in documented.__annotations__]
            rows = [[_code(f.name), _code(_dataclass_default(f)), _cell(f.metadata.get("help", ""))] for f in own]
            sections.append(_table(["Field", "Default", "Meaning"], rows))
    return "\n\n".join(sections) + "\n"


def _dataclass_default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the checkout's own package is the one that is described
    for place, text in reference().items():
        (DOCS / place).write_text(text, encoding="utf-8")
    status = build(BUILD)
    if status == 0:
        print(f"open {BUILD / 'site' / 'index.html'}")
    sys.exit(status)
