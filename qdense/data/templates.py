"""Prompt templates: what the model reads before its response.

`alpaca`: the plain text of Stanford Alpaca, the same in training and evaluation; surrounding white space of a row is
removed. `plain`: prompt and completion as they are, and whole texts. `chat`: the tokenizer's own chat template; `chatml` and
`llama3` are for tokenizers that have none. `llm-adapters`: exactly what the authors' code sends. There training and evaluation
differ (an indented f-string, trailing spaces, an indented or an empty separator line), and rows are not stripped. The sources
are finetune.py and commonsense_evaluate.py of mulin-ahu/DenseLoRA@864e39b, as in LLM-Adapters@8166572.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qdense.data.render import RenderError, render
from qdense.data.rows import Message, Row
from qdense.errors import DataError

_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = f"{_TASK}, paired with an input that provides further context"
_REQUEST = "Write a response that appropriately completes the request."
_INDENT = 16 * " "


class Piece(NamedTuple):
    """Part of a training text; the model is to learn to write the responses."""

    text: str
    is_response: bool


@dataclass(frozen=True)
class Template:
    """How a row becomes text.

    Attributes:
        training_prompt, evaluation_prompt: Row -> the text that ends where the response begins.
        response: Row -> the text that a training example adds to its prompt.
        stop: headings of the prompt; a model that writes one has ended its response.
        adds_special_tokens: whether the tokenizer adds BOS and training EOS. A chat template writes them itself.
        end_token: the special token by which a chat template ends an answer; the tokenizer's EOS may be another.
        split: Row -> the training text in pieces, if it is not one prompt and one response.
        conversation: messages -> the text that ends where the next answer begins; None if the template has single questions.
    """

    name: str
    training_prompt: Callable[[Row], str]
    evaluation_prompt: Callable[[Row], str]
    response: Callable[[Row], str]
    stop: tuple[str, ...] = ("### Instruction:", "### Input:", "### Response:")
    adds_special_tokens: bool = True
    end_token: str | None = None
    split: Callable[[Row], list[Piece]] | None = None
    conversation: Callable[[Sequence[Message]], str] | None = None

    def conversation_prompt(self, messages: Sequence[Message]) -> str:
        """The text that ends where the next answer begins. Raises DataError if this template cannot express it."""
        if not messages or messages[-1].role != "user":
            raise DataError("the last message must be the user's: it is what the model answers")
        if self.conversation is not None:
            return self.conversation(messages)
        if len(messages) > 1:
            raise DataError(
                f'the template "{self.name}" has single questions: no system prompt and no earlier turns. Send one message of '
                "the user, or choose a template of conversations: chat, chatml, llama3"
            )
        return self.evaluation_prompt(Row(messages[0].content, "", ""))

    def pieces(self, row: Row) -> list[Piece]:
        """A training text. Raises DataError for a conversation that a chat template refuses."""
        if self.split is not None:
            return self.split(row)
        if [message.role for message in row.messages] not in ([], ["user", "assistant"]):
            raise DataError(
                f'data.template = "{self.name}" has single questions: no system prompt and no earlier turns, as these '
                "conversations have. Use a template of conversations: chat, chatml, llama3"
            )
        return [Piece(self.training_prompt(row), False), Piece(self.response(row), True)]


def _chat_template(name: str, tokenizer: Any) -> Template:
    render = _Renderer(name, tokenizer)

    def prompt(row: Row) -> str:
        messages = _messages_of(row)
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
        return render(messages[:last], is_open=True)

    return Template(
        name,
        prompt,
        prompt,
        lambda row: row.output,
        stop=(),
        adds_special_tokens=False,
        end_token=_end_token(render, tokenizer),
        split=lambda row: _turns(render, _messages_of(row), row.num_given),
        conversation=lambda messages: render(messages, is_open=True),
    )


def _turns(render: _Renderer, messages: Sequence[Message], num_given: int) -> list[Piece]:
    """The text of a conversation, divided at the beginning and end of each answer that is not among the given messages."""
    pieces: list[Piece] = []
    whole, start = render(messages), 0
    for number, message in enumerate(messages):
        if message.role != "assistant" or number < num_given:
            continue
        prompt = render(messages[:number], is_open=True)
        turn = render(messages[: number + 1])
        end = len(turn.rstrip())  # after the token that ends the turn
        if not (turn.startswith(prompt) and whole.startswith(turn[:end])):
            raise DataError(
                f'the chat template "{render.name}" rewrites earlier turns when later ones follow, so it is unclear which '
                'tokens are the assistant\'s. Use data.template = "chatml", or rows of one question and one answer'
            )
        pieces += [Piece(whole[start : len(prompt)], False), Piece(whole[len(prompt) : end], True)]
        start = end
    return [*pieces, Piece(whole[start:], False)]


def _end_token(render: _Renderer, tokenizer: Any) -> str | None:
    """The special token that ends an answer."""
    tail = render([Message("user", "1"), Message("assistant", "2")]).rpartition("2")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = [i for i in ids if i in tokenizer.all_special_ids]
    return str(tokenizer.convert_ids_to_tokens(special[0])) if special else None


class _Renderer:
    """Messages -> text, by the template of this name."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._source: str = CHAT_TEMPLATES.get(name) or tokenizer.get_chat_template()
        self._special_tokens = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}

    def __call__(self, messages: Sequence[Message], *, is_open: bool = False) -> str:
        try:
            turns = [message._asdict() for message in messages]
            return render(self._source, turns, self._special_tokens, is_open=is_open)
        except RenderError as error:
            roles = ", ".join(message.role for message in messages[:10])
            raise DataError(f'the chat template "{self.name}" refuses a conversation of {roles}: {error}') from None


def _messages_of(row: Row) -> tuple[Message, ...]:
    """The turns of a conversation, or of a question and its answer."""
    if row.messages:
        return row.messages
    question = "\n\n".join(part.strip() for part in (row.instruction, row.input) if part.strip())
    answer = (Message("assistant", row.output.strip()),) if row.output.strip() else ()
    return (Message("user", question), *answer)


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


def _plain_prompt(row: Row) -> str:
    return f"{row.instruction}\n{row.input}" if row.input else row.instruction


TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", _alpaca_prompt, _alpaca_prompt, lambda row: row.output.strip()),
        Template(
            "llm-adapters", _llm_adapters_training_prompt, _llm_adapters_evaluation_prompt, lambda row: row.output
        ),
        Template("plain", _plain_prompt, _plain_prompt, lambda row: row.output, stop=()),
    )
}


# For tokenizers without one: ChatML, as Qwen and SmolLM2 write it, and LLaMA-3's.
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
TEMPLATE_NAMES = (*TEMPLATES, "chat", *CHAT_TEMPLATES)


def check_template(name: str) -> None:
    """Raises DataError for an unknown name."""
    if name not in TEMPLATE_NAMES:
        raise DataError(f'unknown template "{name}"; known: {", ".join(TEMPLATE_NAMES)}')


def template_named(name: str, tokenizer: Any = None) -> Template:
    """The template of this name; those of conversations need the tokenizer. Raises DataError."""
    check_template(name)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if tokenizer is None:
        raise DataError(f'template "{name}" needs a tokenizer, and there is none here; known: {", ".join(TEMPLATES)}')
    if name == "chat" and not tokenizer.chat_template:
        raise DataError(f'template "chat": the tokenizer has none. Use one of {", ".join(CHAT_TEMPLATES)}')
    return _chat_template(name, tokenizer)


def chat_template_for(tokenizer: Any) -> str:
    """The name of the template for conversations with this tokenizer: its own, or the one whose tokens it has."""
    if tokenizer.chat_template:
        return "chat"
    return "llama3" if "<|start_header_id|>" in tokenizer.get_vocab() else "chatml"


def num_doubled(template: Template, ids: Sequence[int], tokenizer: Any) -> int:
    """How many tokens at the beginning are one too many: 1 if a text brings the BOS that the tokenizer adds too."""
    return int(template.adds_special_tokens and list(ids[:2]) == [tokenizer.bos_token_id] * 2)


def prompt_ids(template: Template, prompt: Row | Sequence[Message], tokenizer: Any) -> list[int]:
    """The tokens of a row's prompt, or of a conversation, ready for the answer."""
    text = template.evaluation_prompt(prompt) if isinstance(prompt, Row) else template.conversation_prompt(prompt)
    ids = list(tokenizer(text, add_special_tokens=template.adds_special_tokens)["input_ids"])
    return ids[num_doubled(template, ids, tokenizer) :]
