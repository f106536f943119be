"""Prompt templates: what the model reads before its response.

`alpaca`: the plain text of Stanford Alpaca, the same in training and evaluation; surrounding white space of a row is
removed. `llm-adapters`: exactly what the authors' code sends. There training and evaluation differ (an indented
f-string, trailing spaces, an indented or an empty separator line), and rows are not stripped. The sources are
finetune.py and commonsense_evaluate.py of mulin-ahu/DenseLoRA@864e39b, as in LLM-Adapters@8166572.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qdense.data.rows import Row
from qdense.errors import DataError

_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = f"{_TASK}, paired with an input that provides further context"
_REQUEST = "Write a response that appropriately completes the request."
_INDENT = 16 * " "


@dataclass(frozen=True)
class Template:
    """How a row becomes text.

    Attributes:
        training_prompt, evaluation_prompt: Row -> the text that ends where the response begins.
        response: Row -> the text that a training example adds to its prompt.
        stop: headings of the prompt; a model that writes one has ended its response.
    """

    name: str
    training_prompt: Callable[[Row], str]
    evaluation_prompt: Callable[[Row], str]
    response: Callable[[Row], str]
    stop: tuple[str, ...] = ("### Instruction:", "### Input:", "### Response:")


def _alpaca_prompt(row: Row) -> str:
    instruction, context = row.instruction.strip(), row.input.strip()
    if context:
        return (
            f"{_WITH_INPUT}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def _indented(header: str, separator: str, sections: list[tuple[str, str]]) -> str:
    parts = [f"{_INDENT}### {title}:\n{_INDENT}{text}" for title, text in sections]
    return f"{header}\n\n" + f"\n{separator}\n".join(parts)


def _llm_adapters_training_prompt(row: Row) -> str:
    if row.input:
        sections = [("Instruction", row.instruction), ("Input", row.input), ("Response", "")]
        return _indented(f"{_WITH_INPUT}. {_REQUEST} ", _INDENT, sections)
    return _indented(f"{_TASK}. {_REQUEST}  ", _INDENT, [("Instruction", row.instruction), ("Response", "")])


def _llm_adapters_evaluation_prompt(row: Row) -> str:
    if row.input:
        sections = [("Instruction", row.instruction), ("Input", row.input), ("Response", "")]
        return _indented(f"{_WITH_INPUT}. {_REQUEST}", "", sections)
    return _indented(f"{_TASK}. {_REQUEST} ", "", [("Instruction", row.instruction), ("Response", "")])


TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", _alpaca_prompt, _alpaca_prompt, lambda row: row.output.strip()),
        Template(
            "llm-adapters", _llm_adapters_training_prompt, _llm_adapters_evaluation_prompt, lambda row: row.output
        ),
    )
}


def template_named(name: str) -> Template:
    """The template of this name. Raises DataError for an unknown one."""
    if name not in TEMPLATES:
        raise DataError(f'unknown template "{name}"; known: {", ".join(TEMPLATES)}')
    return TEMPLATES[name]
