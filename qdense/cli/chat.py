"""`qdense chat`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_base, add_sampling, asked_base, asked_decoding, tell, tell_notice
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
        "run",
        metavar="RUN",
        nargs="?",
        help="a run's folder, an adapter in PEFT's format, or OWNER/NAME on the hub (default: the newest finished run)",
    )
    add_base(parser, alone="")
    parser.add_argument(
        "--system", metavar="TEXT", default="", help="a system prompt, if the template has conversations"
    )
    parser.add_argument("--compare", action="store_true", help="show the base model's answer beside the adapter's")
    add_sampling(parser)


def load_run(arguments: argparse.Namespace) -> tuple[LoadedModel, str]:
    """The model that the arguments `run` and those of `add_base` name, and its adapter's name in it."""
    from qdense.inference.loaded import load_model
    from qdense.modeling.locate import locate_adapter
    from qdense.runs import newest_finished_run

    run = arguments.run or str(newest_finished_run(Path("runs")).path)
    folder = locate_adapter(run, tell)
    return load_model({run: folder}, tell_notice, model=asked_base(arguments), template=arguments.template), run


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from qdense.inference.engine import Engine
    from qdense.ui.chat import Chat

    loaded, name = load_run(arguments)
    adapter = loaded.adapters[name]
    if arguments.compare and not adapter.is_separate:
        raise QDenseError(f"--compare: {name} is a whole model, which is not separate from its base")
    engine = Engine(loaded, most_running=2)
    try:
        chat = Chat(
            engine,
            name,
            asked_decoding(arguments),
            max_new_tokens=arguments.max_new_tokens,
            system=arguments.system,
            compares=arguments.compare,
        )
        if arguments.system and not chat.has_turns:
            raise QDenseError(
                f'--system: {name} was trained on single questions (template "{adapter.template}"), which have no system '
                "prompt; choose a template of conversations with --template"
            )
        chat.run()
    finally:
        engine.close()
