"""Arguments that several commands have, and the types of arguments."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdense.errors import QDenseError, counted, did_you_mean
from qdense.events import Notice
from qdense.processes import is_launched, launch
from qdense.text import printable

if TYPE_CHECKING:
    from qdense.inference.generation import Decoding


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a TOML file, or the name of a built-in recipe: demo, math10k, ..."
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a value of the recipe; repeatable"
    )


def add_experiment(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    parser.add_argument(
        "experiments" if several else "experiment",
        metavar="FILE",
        nargs="+" if several else None,
        help="an experiment: a TOML file, or the name of a built-in one: paper/table2, small/wordproblems, ...",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a value of the experiment (seeds, search.learning_rate) or of the recipes of all its runs "
        "(training.max_steps); repeatable",
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path("runs/sweeps"),
        help="where the runs of all experiments are kept (default: runs/sweeps)",
    )


def add_price(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--price",
        metavar="CARD=PRICE",
        type=price,
        action="append",
        default=[],
        help='what an hour of a card costs, for instance "RTX 4090=0.35"; repeatable',
    )


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path(os.environ["QDENSE_DATA"]) if os.environ.get("QDENSE_DATA") else None,
        help="a folder with data in LLM-Adapters' layout (default: the variable QDENSE_DATA, if it is set); what is not found "
        "there is downloaded",
    )


def add_base(parser: Any, *, alone: str) -> None:
    """How the base is loaded, and the template, where they should differ from what the adapter recorded.

    Args:
        parser: or one of its groups of arguments.
        alone: what `--model` does without an adapter, if that is possible.
    """
    parser.add_argument(
        "--model", metavar="NAME", help=f"the base model (default: the one recorded with the adapter){alone}"
    )
    parser.add_argument(
        "--quantization",
        choices=("nf4", "int8", "none"),
        help="how to load the base model (default: as recorded with the adapter, else nf4)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="the base model's compute dtype (default: as recorded with the adapter, else bfloat16 where the device has it)",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="prompt template: alpaca, llm-adapters, plain, chat, chatml, llama3 (default: the adapter's, else the task's)",
    )


def asked_base(arguments: argparse.Namespace) -> dict[str, str]:
    """What the arguments of `add_base` say of the base, as keys of a recipe's [model]."""
    asked = {"name": arguments.model, "quantization": arguments.quantization, "dtype": arguments.dtype}
    return {key: value for key, value in asked.items() if value is not None}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen, and how many there may be."""
    parser.add_argument(
        "--temperature",
        type=temperature_or_zero,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token; above it, tokens are drawn (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the random seed (default: 0)")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", default=512, help="longest answer, in tokens (default: 512)"
    )


def asked_decoding(arguments: argparse.Namespace) -> Decoding:
    """What the arguments of `add_sampling` say."""
    from qdense.inference.generation import Decoding

    name = "sample" if arguments.temperature else "greedy"
    return Decoding(name, temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)


def tell(text: str) -> None:
    """Print what a command that prints its result on stdout has to say on the way."""
    print(printable(text), file=sys.stderr)


def tell_notice(event: object) -> None:
    """`tell`, as an Emit."""
    if isinstance(event, Notice):
        tell(event.text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show only warnings and errors")


def add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=positive,
        default=1,
        metavar="N",
        help="processes on this machine, each with a GPU of its own (default: 1); `accelerate launch` and `torchrun` work too",
    )


def add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard",
        action="store_true",
        help="divide the base among the GPUs, so that each holds a part (training.shard; default: the recipe's, false)",
    )


def must_launch(arguments: argparse.Namespace, device: str) -> bool:
    """Whether the command is to run in several processes that do not run yet. Raises QDenseError for more than there are GPUs."""
    if arguments.gpus == 1:
        return False
    if is_launched():
        raise QDenseError(
            f"--gpus {arguments.gpus}: this process was started by a launcher, which gives their number; omit it"
        )
    if device != "cpu":
        import torch

        has = torch.cuda.device_count()
        if not has:
            raise QDenseError(
                f"--gpus {arguments.gpus}: torch finds no GPU on this machine (`qdense doctor` says why). Omit it"
            )
        if arguments.gpus > has:
            raise QDenseError(f"--gpus {arguments.gpus}: this machine has {counted(has, 'GPU')}. Give at most {has}")
    return True


def launched(arguments: argparse.Namespace) -> int:
    """Run the command again in `--gpus` processes; returns its exit status."""
    rest, given = [], iter(arguments.argv)
    for word in given:
        if word == "--gpus":
            next(given)
        elif not word.startswith("--gpus="):
            rest.append(word)
    return launch(arguments.gpus, rest)


def as_toml(value: str | int) -> str:
    """A value as TOML: JSON, without escapes for characters outside ASCII."""
    return json.dumps(value, ensure_ascii=False)


# --- types --------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def memory_size(text: str) -> int:
    """Bytes of memory, from "24GiB", "512 MiB", "24G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)", text.strip(), re.IGNORECASE)
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a memory size: a number and GiB or MiB, for instance 24GiB")
    # The 24 GB of a card's box are 24 GiB in its driver.
    return int(number * (2**30 if match[2][0] in "gG" else 2**20))


def duration(text: str) -> float:
    """Seconds, from "3h", "45m", "90s", "1.5 h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hms])", text.strip(), re.IGNORECASE)
    seconds = float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2].lower()] if match else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: a number and h, m or s, for instance 3h")
    return seconds


def columns(text: str) -> dict[str, str]:
    """Columns of a file by what they hold, from "instruction=question,output=answer"."""
    from qdense.data.rows import Columns

    found: dict[str, str] = {}
    for part in text.split(","):
        key, _, column = (each.strip() for each in part.partition("="))
        key = {"prompt": "instruction", "completion": "output"}.get(key, key)
        if not key or not column:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not KEY=COLUMN, for instance instruction=question,output=answer"
            )
        if key not in Columns._fields:
            raise argparse.ArgumentTypeError(f'unknown key "{key}"{did_you_mean(key, Columns._fields)}')
        if key in found:
            raise argparse.ArgumentTypeError(f'"{key}" is given twice')
        found[key] = column
    for key, what in (("messages", "conversations"), ("text", "texts")):
        if key in found and len(found) > 1:
            raise argparse.ArgumentTypeError(f"{key} holds whole {what}: give it alone")
    return found


def price(text: str) -> tuple[str, float]:
    """A card and what an hour of it costs, from "RTX 4090=0.35"."""
    from qdense.planning.speed import CARDS

    card, _, number = text.partition("=")
    known = {name.lower(): name for name in CARDS}.get(card.strip().lower())
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if known is None or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not CARD=PRICE, for instance "RTX 4090=0.35"; cards: {", ".join(CARDS)}'
        )
    return known, value


def layer_numbers(text: str) -> list[int]:
    """Numbers of layers, from "0,15,31"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer numbers, for instance 0,15,31") from None


def temperature(text: str) -> float:
    """A sampling temperature, above 0."""
    return _number(text, lambda number: 0 < number <= 100, "a temperature: above 0 (for 0, use --decoding greedy)")


def temperature_or_zero(text: str) -> float:
    """A sampling temperature, or 0 for the likeliest token."""
    return _number(text, lambda number: 0 <= number <= 100, "a temperature: 0 or above")


def probability(text: str) -> float:
    """A probability above 0."""
    return _number(text, lambda number: 0 < number <= 1, "a probability above 0 and at most 1")


def _number(text: str, is_good: Callable[[float], bool], wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not is_good(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number
