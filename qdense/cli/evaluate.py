"""`qdense evaluate`"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cli.arguments import (
    add_base,
    add_data_dir,
    add_gpus,
    add_quiet,
    asked_base,
    launched,
    must_launch,
    positive,
    probability,
    temperature,
)
from qdense.errors import QDenseError
from qdense.libraries import quiet_libraries, require_library
from qdense.processes import is_first

if TYPE_CHECKING:
    from qdense.data.rows import Columns

HELP = "score an adapter or a base model on benchmarks or on your own questions"
DESCRIPTION = (
    "Score an adapter, or a base model alone. A task is a benchmark, or a file of your own with prompts and completions; each "
    "row of it is an item. An answer is right if the task's rules find the expected one in it (of your own files: if it equals "
    "the completion)."
)
EXAMPLES = """\
  qdense evaluate held-out.jsonl --adapter runs/questions --with-base --decoding greedy
  qdense evaluate gsm8k,aqua,addsub,svamp --adapter runs/math10k --with-base
  qdense evaluate math --model llama3-8b --limit 100 --decoding greedy --json
  qdense evaluate commonsense --endpoint http://localhost:8000/v1 --model NAME
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tasks",
        metavar="TASKS",
        help="comma-separated benchmarks, groups of them (math, commonsense) and files of your own; `qdense tasks` lists them",
    )
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--adapter",
        metavar="RUN",
        type=Path,
        help="a run's folder, or an adapter in PEFT's format (default: the newest finished run)",
    )
    add_base(what, alone="; without --adapter, it is scored alone")
    what.add_argument(
        "--with-base", action="store_true", help="also score the base model without the adapter, with the same decoding"
    )
    what.add_argument(
        "--endpoint",
        metavar="URL",
        help="send the questions to --model on an OpenAI-compatible server, with zero-shot chain of thought; the key is "
        'read from OPENAI_API_KEY (needs "qdense[endpoint]")',
    )
    what.add_argument(
        "--concurrency", type=positive, metavar="N", help="simultaneous requests to the server (default: 8)"
    )
    what.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task (default: all)")
    what.add_argument(
        "--clean", action="store_true", help="also score without the items that the training set contains"
    )
    what.add_argument(
        "--trained-on",
        metavar="TRAIN",
        help="with --clean: the training set: a known name, a file or a recipe (default: the run's own)",
    )
    how = parser.add_argument_group("how completions are generated")
    how.add_argument(
        "--engine",
        choices=("qdense", "vllm"),
        default="qdense",
        help="what runs the model: qdense, or vLLM for DenseLoRA and LoRA adapters on an unquantized base (default: qdense; vllm "
        'needs "qdense[vllm]")',
    )
    how.add_argument(
        "--decoding",
        choices=("beam4", "greedy", "sample"),
        help="beam4 is the DenseLoRA authors' search (default; greedy with --endpoint or --engine vllm)",
    )
    how.add_argument("--samples", type=positive, metavar="K", help="sample: completions of each item (default: 8)")
    how.add_argument("--temperature", type=temperature, metavar="T", help="sample: the temperature (default: 0.7)")
    how.add_argument(
        "--top-p",
        type=probability,
        metavar="P",
        help="sample: draw from the likeliest tokens that together have this probability (default: 1)",
    )
    how.add_argument("--seed", type=int, metavar="N", help="sample: the random seed (default: 0)")
    how.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="longest answer, in tokens (default: the benchmark's; 256 for your own files)",
    )
    how.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="answers at a time; with beam4, items (default: as many as fit the memory)",
    )
    add_gpus(parser)
    add_data_dir(parser)
    parser.add_argument(
        "--show",
        type=positive,
        metavar="N",
        help="print N items of each task with the model's answers, wrong ones first (default: none)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    from qdense.benchmarks.tasks import tasks_named
    from qdense.data.templates import check_template

    tasks = tasks_named(arguments.tasks, _columns_of_run(arguments))
    if arguments.template is not None:
        check_template(arguments.template)
    _refuse_contradictions(arguments)
    if arguments.engine == "vllm":
        require_library("vllm", extra="vllm", purpose="--engine vllm")
    if arguments.endpoint is not None:
        require_library("openai", extra="endpoint", purpose="--endpoint")

    if must_launch(arguments, "auto"):
        return launched(arguments)

    from qdense.ui.console import make_console
    from qdense.ui.evaluation import EvaluationDisplay

    console = make_console(sys.stderr if arguments.json else sys.stdout)
    with EvaluationDisplay(console, quiet=arguments.quiet or not is_first()) as show:
        show.status = "loading libraries"
        quiet_libraries()
        from qdense.benchmarks.endpoint import Endpoint
        from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
        from qdense.events import Notice
        from qdense.inference.generation import DECODINGS
        from qdense.runs import newest_finished_run

        adapter, endpoint = arguments.adapter, None
        if arguments.endpoint is not None:
            endpoint = Endpoint(arguments.endpoint, arguments.model, arguments.concurrency or Endpoint.concurrency)
        elif adapter is None and arguments.model is None:
            adapter = newest_finished_run(Path("runs")).path
            show(Notice(f"scoring the newest finished run, {adapter}"))
        sampling = {
            "num_samples": arguments.samples,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "seed": arguments.seed,
        }
        summary = evaluate(
            EvaluationRequest(
                tasks=tasks,
                adapter=adapter,
                model=asked_base(arguments),
                with_base=arguments.with_base,
                decoding=replace(
                    DECODINGS[arguments.decoding or ("greedy" if endpoint or arguments.engine == "vllm" else "beam4")],
                    **{key: value for key, value in sampling.items() if value is not None},
                ),
                limit=arguments.limit,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                data_dir=arguments.data_dir,
                template=arguments.template,
                clean=arguments.clean,
                trained_on=arguments.trained_on,
                endpoint=endpoint,
                engine=arguments.engine,
            ),
            emit=show,
        )
    if not is_first():
        return 0
    if arguments.json:
        print(json.dumps(summary, indent=2))
    if arguments.show is not None:
        from qdense.benchmarks.evaluate import shown_items
        from qdense.ui.tables import show_items

        for task in tasks:
            show_items(console, task.name, shown_items(summary, task, arguments.data_dir, arguments.show))
    return 0


def _columns_of_run(arguments: argparse.Namespace) -> Columns | None:
    """The columns of the data that the run was trained on, for rows of the user's own; None if no file is named, or no run."""
    from qdense.data.rows import FORMATS, Columns
    from qdense.recipe import load_recipe
    from qdense.runs import RunFolder, newest_finished_run

    if not any(part.strip().lower().endswith(FORMATS) for part in arguments.tasks.split(",")):
        return None
    adapter = arguments.adapter
    if adapter is None and arguments.model is None:
        try:
            adapter = newest_finished_run(Path("runs")).path
        except QDenseError:  # said later, when a run is needed
            return None
    recipe = RunFolder.of_adapter(adapter).recipe if adapter is not None else None
    if recipe is None or not recipe.is_file():
        return None
    columns = load_recipe(recipe).data.columns
    return Columns(**columns.model_dump()) if columns is not None else None


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Raise QDenseError for options that would be silently ignored."""

    def given(*names: str) -> list[str]:
        return [f"--{name}" for name in names if getattr(arguments, name.replace("-", "_")) not in (None, False)]

    if arguments.with_base and arguments.adapter is None and arguments.model is not None:
        raise QDenseError("--with-base compares an adapter with its base; name the adapter with --adapter")
    if arguments.decoding != "sample" and (unused := given("samples", "temperature", "top-p", "seed")):
        raise QDenseError(
            f"{', '.join(unused)}: only with --decoding sample; {arguments.decoding or 'the default'} draws nothing"
        )
    if arguments.trained_on is not None and not arguments.clean:
        raise QDenseError("--trained-on: names the training set for --clean; add --clean")
    if arguments.gpus > 1 and (other := given("endpoint") or (["--engine vllm"] if arguments.engine == "vllm" else [])):
        raise QDenseError(f"--gpus {arguments.gpus}: cannot be used with {other[0]}, which has processes of its own")
    if arguments.engine == "vllm" and (unused := given("with-base", "endpoint", "batch-size")):
        instead = "; score the base separately, with --model" if "--with-base" in unused else ""
        raise QDenseError(f"{', '.join(unused)}: cannot be used with --engine vllm{instead}")
    if arguments.endpoint is None:
        if arguments.concurrency is not None:
            raise QDenseError("--concurrency: only with --endpoint URL")
        return
    if arguments.model is None:
        raise QDenseError("--endpoint: name the server's model with --model NAME")
    local = ("adapter", "with-base", "quantization", "dtype", "template", "batch-size")
    if unused := given(*local):
        raise QDenseError(f"{', '.join(unused)}: cannot be used with --endpoint")
