"""`qdense chat`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_base, add_sampling
from qdense.errors import QDenseError
from qdense.libraries import quiet_libraries

if TYPE_CHECKING:
    from qdense.inference.loaded import LoadedModel

HELP = "talk with an adapter in the terminal"
DESCRIPTION = (
    "Talk with an adapter, in the template it was trained with. --compare shows the base's answer beside it. "
    "The default is the newest finished run."
)
EXAMPLES = """\
  qdense chat
  qdense chat runs/questions --compare
  qdense chat runs/support --system "You answer in one sentence." --temperature 0.7
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="a run's folder, an adapter in PEFT's format, or OWNER/NAME on the hub"
    )
    add_base(parser, alone="")
    parser.add_argument(
        "--system", metavar="TEXT", default="", help="a system prompt, if the template has conversations"
    )
    parser.add_argument("--compare", action="store_true", help="show the base's answer beside the adapter's")
    add_sampling(parser, temperature=0.0)


def load_run(arguments: argparse.Namespace) -> tuple[LoadedModel, str]:
    """The model that the arguments `run` and those of `add_base` name, and its adapter's name in it."""
    from qdense.events import Notice
    from qdense.inference.loaded import load_model
    from qdense.modeling.locate import locate_adapter
    from qdense.runs import newest_finished_run
    from qdense.text import printable

    def show(event: object) -> None:
        if isinstance(event, Notice):
            print(printable(event.text), file=sys.stderr)

    run = Path(arguments.run) if arguments.run else newest_finished_run(Path("runs")).path
    asked = {"name": arguments.model, "quantization": arguments.quantization, "dtype": arguments.dtype}
    asked = {key: value for key, value in asked.items() if value is not None}
    folder = locate_adapter(run, lambda text: show(Notice(text)))
    return load_model({str(run): folder}, show, model=asked, template=arguments.template), str(run)


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from qdense.data.templates import template_named
    from qdense.inference.engine import Engine
    from qdense.inference.generation import Decoding
    from qdense.ui.chat import Chat

    loaded, name = load_run(arguments)
    adapter = loaded.adapters[name]
    if arguments.compare and not adapter.is_separate:
        raise QDenseError(f"--compare: {name} is a whole model, which is not separate from its base")
    has_turns = template_named(adapter.template, loaded.base.tokenizer).conversation is not None
    if arguments.system and not has_turns:
        raise QDenseError(
            f'--system: {name} was trained on single questions (template "{adapter.template}"), which have no system prompt; '
            "choose a template of conversations with --template"
        )
    engine = Engine(loaded, most_running=2)
    decoding = Decoding(
        "chat", temperature=arguments.temperature, top_p=arguments.top_p or 1.0, seed=arguments.seed or 0
    )
    try:
        Chat(
            engine,
            name,
            decoding,
            max_new_tokens=arguments.max_new_tokens,
            system=arguments.system,
            has_turns=has_turns,
            compares=arguments.compare,
            can_compare=adapter.is_separate,
        ).run()
    finally:
        engine.close()
