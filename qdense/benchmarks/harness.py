"""Our tasks as task files for EleutherAI's lm-evaluation-harness: a second opinion on every score.

The exported folder does not import qdense. The harness renders the prompt (Jinja), generates, reads the answer (its own
filters) and compares it (its own exact_match), all by the authors' rule, `paper`. It shares with qdense the
test files, the texts of the prompts, and the regular expressions, which are the authors'.

Greedy decoding gives the same completions. With beams the harness (0.4.13) stops early: its stopping criterion
applies to a whole batch, and ends it once a first candidate has ended (5 of 24 completions of SmolLM2 differed).

A group's score is the plain mean of its tasks' scores, as the paper averages.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdense.benchmarks.scoring import AnswerKind
from qdense.benchmarks.tasks import GROUPS, Task, load_items
from qdense.cache import write_atomically
from qdense.catalogs.datasets import UpstreamFile
from qdense.data.rows import Row
from qdense.data.sources import locate
from qdense.data.templates import Template
from qdense.errors import EvaluationError
from qdense.events import Emit, ignore
from qdense.inference.generation import Decoding
from qdense.version import __version__

PREFIX = "qdense_"
_RULES = Path(__file__).with_name("qdense_rules.py")


def export(
    tasks: Sequence[Task],
    folder: Path,
    data_dir: Path | None,
    template: Template,
    decoding: Decoding,
    emit: Emit = ignore,
) -> list[str]:
    """Write the tasks, and each group that is complete, into `folder`.

    Returns:
        the fewest names with which the harness runs all of them, groups before single tasks.

    Raises:
        QDenseError: a test file is missing or faulty, or `folder` is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder}: is a file; name a folder to export into")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    for task in tasks:
        data = load_items(task, data_dir, emit)  # find faults in rows here, before the harness does
        if isinstance(task.file, UpstreamFile):
            path = locate(task.file, data_dir, emit).resolve()
        else:
            path = folder / f"{PREFIX}{task.name}.json"
            write_atomically(path, json.dumps([row._asdict() for row in data.rows], indent=1, ensure_ascii=False))
        _write(folder, _task_file(task, path, template, decoding))
    shutil.copyfile(_RULES, folder / _RULES.name)

    exported = {task.name for task in tasks}
    complete = [(name, members) for name, members in GROUPS.items() if exported.issuperset(members)]
    names: list[str] = []
    covered: set[str] = set()
    for group, members in sorted(complete, key=lambda item: -len(item[1])):
        _write(folder, _group_file(group, members))
        if covered.isdisjoint(members):  # the harness refuses a task that appears twice
            names.append(PREFIX + group)
            covered.update(members)
    return names + [PREFIX + task.name for task in tasks if task.name not in covered]


def _write(folder: Path, content: dict[str, Any]) -> None:
    """Write one YAML file: one line for each key, with its value as JSON, a subset of YAML."""
    lines = [f"# Written by qdense {__version__}: qdense tasks --export lm-eval"]
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{key}: " + re.sub(r'"(!function [\w.]+)"', r"\1", text))
    name = content.get("group") or content["task"]
    write_atomically(folder / f"{name}.yaml", "\n".join(lines) + "\n")


def _task_file(task: Task, path: Path, template: Template, decoding: Decoding) -> dict[str, Any]:
    return {
        "task": PREFIX + task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": _prompt(template),
        "doc_to_target": "answer",  # the column
        # Set everything that matters: transformers fills unset fields from the checkpoint's generation_config.
        "generation_kwargs": {
            "until": list(template.stop),
            "max_gen_toks": task.max_new_tokens,
            "do_sample": False,
            "num_beams": decoding.num_beams,
            **({"length_penalty": 1.0, "early_stopping": False} if decoding.num_beams > 1 else {}),
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        },
        "filter_list": [{"name": "paper", "filter": _filters(task.answers)}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": task.version, "template": template.name, "source": task.source},
    }


def _group_file(name: str, members: Sequence[str]) -> dict[str, Any]:
    return {
        "group": PREFIX + name,
        "task": [PREFIX + member for member in members],
        "aggregate_metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "weight_by_size": False, "filter_list": ["paper"]}
        ],
        "metadata": {"version": 1},
    }


def _prompt(template: Template) -> str:
    """The evaluation prompt as a Jinja template, made from the prompt of a row of placeholders."""
    prompt = template.evaluation_prompt
    strip = ".strip()" if prompt(Row(" x ", "", "")) == prompt(Row("x", "", "")) else ""
    instruction = f"{{{{ instruction{strip} }}}}"
    with_input, without = prompt(Row(instruction, "{{ context }}", "")), prompt(Row(instruction, "", ""))
    # A file may lack the column, or have null in it.
    context = f"{{% set context = (input | default('', true)){strip} %}}"
    return f"{context}{{% if context %}}{with_input}{{% else %}}{without}{{% endif %}}"


def _filters(answers: AnswerKind) -> list[dict[str, Any]]:
    """`AnswerKind.paper` as filters of the harness."""
    heading = "### Response:"
    response = rf"(?s)\A(?:.*{heading})?(.*)\Z" if answers.reads_last_response else rf"(?s)\A.*?(?={heading}|\Z)"
    find = {"function": "regex", "regex_pattern": answers.pattern, "group_select": -1 if answers.takes_last else 0}
    filters: list[dict[str, Any]] = [{"function": "regex", "regex_pattern": response, "group_select": 0}]
    if answers.name == "number":
        filters += [_custom("delete_commas"), find, _custom("to_label")]
    else:
        filters.append(find)
    return [*filters, {"function": "take_first"}]


def _custom(function: str) -> dict[str, Any]:
    return {"function": "custom", "filter_fn": f"!function {_RULES.stem}.{function}"}
