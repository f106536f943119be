"""`qdense generate`"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_base, add_sampling, asked_decoding, positive
from qdense.errors import QDenseError
from qdense.libraries import quiet_libraries
from qdense.text import printable

if TYPE_CHECKING:
    from qdense.inference.generation import Completion

HELP = "complete a prompt with an adapter"
DESCRIPTION = "Answer prompts with an adapter, in the template it was trained with, and print the answers: for scripts."
EXAMPLES = """\
  qdense generate runs/questions "What is the capital of Peru?"
  qdense generate runs/questions --json - < prompts.txt
  qdense generate runs/questions "What is the capital of Peru?" --base
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, an adapter in PEFT's format, or OWNER/NAME on the hub"
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="a prompt; - reads prompts from stdin, one a line")
    add_base(parser, alone="")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, if the template has conversations")
    parser.add_argument("--base", action="store_true", help="answer without the adapter, in the adapter's template")
    add_sampling(parser)
    parser.add_argument("--batch-size", type=positive, metavar="N", default=16, help="prompts at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each prompt")


def run(arguments: argparse.Namespace) -> None:
    prompts = [line for prompt in arguments.prompts for line in (_lines() if prompt == "-" else [prompt])]
    if not prompts:
        raise QDenseError("no prompt: stdin has no line with text")
    quiet_libraries()
    from qdense.cli.chat import load_run
    from qdense.data.rows import Message
    from qdense.data.templates import prompt_ids, template_named
    from qdense.inference.generation import Prompt, generate

    loaded, name = load_run(arguments)
    if arguments.base and not loaded.adapters[name].is_separate:
        raise QDenseError(f"--base: {name} is a whole model, which is not separate from its base")
    template = template_named(loaded.adapters[name].template, loaded.base.tokenizer)
    system = [Message("system", arguments.system)] if arguments.system else []
    wanted = [
        Prompt(index, 0, prompt_ids(template, [*system, Message("user", text)], loaded.base.tokenizer))
        for index, text in enumerate(prompts)
    ]
    done: dict[int, Completion] = {}
    shown = 0
    with loaded.answering(None if arguments.base else name):
        for completion in generate(
            loaded.base,
            loaded.model,
            wanted,
            asked_decoding(arguments),
            max_new_tokens=arguments.max_new_tokens,
            stop=template.stop,
            end_token=template.end_token,
            batch_size=arguments.batch_size,
        ):
            done[completion.index] = completion
            while shown in done:  # in the order of the prompts
                _print(prompts[shown], done.pop(shown), as_json=arguments.json)
                shown += 1


def _lines() -> list[str]:
    return [line for line in sys.stdin.read().splitlines() if line.strip()]


def _print(prompt: str, completion: Completion, *, as_json: bool) -> None:
    text = completion.completion.strip()
    if as_json:
        record = {
            "prompt": prompt,
            "completion": text,
            "finish": completion.finish,
            "num_tokens": completion.num_tokens,
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        # A pipe gets the bytes; a terminal must not be controlled by what a model writes.
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
