"""The command line. Heavy imports are inside the commands, so that --help and a typing mistake are answered at once.

Exit status: 0 done; 1 `qdense doctor` found something bad; 2 a mistake, explained in one message; 130 stopped by Ctrl-C, 143 by
SIGTERM. Anything else is our fault.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdense import __version__
from qdense.cache import cache_dir
from qdense.errors import QDenseError, RunStopped, did_you_mean
from qdense.text import clean, printable

if TYPE_CHECKING:
    from qdense.benchmarks.tasks import Task

_EXAMPLES = """\
examples:
  qdense train recipes/demo.toml
  qdense plan recipes/math10k.toml --memory 24GiB
  qdense train recipes/math10k.toml --fraction 0.1 --output runs/math10k-10
  qdense train recipes/math10k.toml --set adapter.r=64 --set model.name=/models/llama3 --resume
  qdense evaluate gsm8k,aqua,addsub,svamp --adapter runs/math10k
  qdense evaluate math --model llama3-8b --limit 100 --decoding greedy --json
  qdense evaluate commonsense --endpoint http://localhost:8000/v1 --model NAME
  qdense merge runs/only-matrix merged-model
  qdense score gsm8k completions.jsonl
  qdense compare runs/lora-1 runs/lora-2 runs/dense-1 runs/dense-2 --published llama3-8b
  qdense data check math10k gsm8k,addsub
  qdense tasks math --export lm-eval exported
  qdense analyze runs/dense runs/lora
  qdense params llama3-8b --r 32 --method all
  qdense doctor
"""


# What can be wrong with a path that a user names.
_PATH_FAULTS = {
    errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG
}  # fmt: skip
_GO_ON = "by the same command (train: with --resume, from the last checkpoint)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Idle OpenMP threads that spin starve each other: with a busy neighbour, CPU steps take 10 to 50 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parser().parse_args(argv)
    try:
        with _ended_by_signals():
            return arguments.command(arguments) or 0
    except RunStopped as stop:
        print(printable(str(stop)), file=sys.stderr)
        return 128 + stop.signal_number
    except QDenseError as error:
        return _fail(str(error))
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(f"\nstopped; go on {_GO_ON}", file=sys.stderr)
        return 128 + int(number)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"no space left on the disk while writing {error.filename or 'a file'}. Free some, then go on {_GO_ON}."
            )
        if error.errno in _PATH_FAULTS:
            return _fail(f"{error.filename}: {error.strerror}. Check the path and its permissions.")
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(
                f"out of GPU memory: {str(error).splitlines()[0]}\nTraining has tried micro-batches down to one row: "
                f'`qdense plan RECIPE` shows what takes the memory; set training.recompute = "auto" or lower data.max_length. '
                f"Lower --batch-size of an evaluation. "
                f"Then go on {_GO_ON}."
            )
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end a command as Ctrl-C does: through its clean-up, the cursor shown again."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qdense",
        description="DenseLoRA fine-tuning of 4-bit LLaMA models on one consumer GPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qdense {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train", help="train an adapter by a recipe", description="Train an adapter by a recipe."
    )
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file, for instance recipes/math10k.toml")
    train.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a value of the recipe")
    train.add_argument("--fraction", type=float, metavar="F", help="train on this share of the rows (data.fraction)")
    train.add_argument("--output", metavar="DIR", help="the run's folder (output.dir)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run's folder")
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although recipe, data, base or versions are not those that the run began with",
    )
    _add_data_dir(train)
    train.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    train.set_defaults(command=_train)

    plan = commands.add_parser(
        "plan",
        help="say before a run whether it fits the card, and how it will run",
        description="Predict a run's memory and speed from shapes alone: nothing is loaded, no GPU is needed. Exit status 0, "
        "also where it does not fit.",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a TOML file, for instance recipes/math10k.toml")
    plan.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a value of the recipe")
    plan.add_argument(
        "--memory",
        type=_memory,
        metavar="SIZE",
        help="of the card, for instance 24GiB (default: what is free on this machine's GPU; without one, 24GiB)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON on stdout")
    plan.set_defaults(command=_plan)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model or an adapter on benchmarks",
        description="Score an adapter, or a bare base, on benchmarks. Without --adapter and --model: the newest finished run.",
    )
    evaluate.add_argument(
        "tasks",
        metavar="TASKS",
        help="comma-separated tasks and groups: gsm8k, math, commonsense, ... (`qdense tasks`)",
    )
    what = evaluate.add_argument_group("what is scored")
    what.add_argument("--adapter", metavar="RUN", type=Path, help="a run's folder, or an adapter in PEFT's format")
    what.add_argument(
        "--model", metavar="NAME", help="the base, if not the one the adapter recorded; alone, it is scored bare"
    )
    what.add_argument(
        "--quantization", choices=("nf4", "int8", "none"), help="how to load the base (as the adapter's; nf4)"
    )
    what.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="what the base computes in (as the adapter's; bfloat16)"
    )
    what.add_argument("--with-base", action="store_true", help="score the adapter's base too, with the same decoding")
    what.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask --model at an OpenAI-compatible server instead, zero-shot chain of thought; key: OPENAI_API_KEY",
    )
    what.add_argument(
        "--concurrency", type=_positive, metavar="N", help="requests to the server at a time (default: 8)"
    )
    what.add_argument("--limit", type=_positive, metavar="N", help="only the first N items of each task")
    what.add_argument("--clean", action="store_true", help="score also without the items that the training set holds")
    what.add_argument(
        "--trained-on", metavar="TRAIN", help="that training set, if not the run's: a known name, a file or a recipe"
    )
    how = evaluate.add_argument_group("how completions are made")
    how.add_argument(
        "--decoding",
        choices=("beam4", "greedy", "sample"),
        help="beam4 is the authors' (default; of an endpoint: greedy)",
    )
    how.add_argument("--samples", type=_positive, metavar="K", help="sample: completions of each item (default: 8)")
    how.add_argument("--temperature", type=_temperature, metavar="T", help="sample: default 0.7")
    how.add_argument(
        "--top-p", type=_share, metavar="P", help="sample: from the tokens that hold this share (default: 1)"
    )
    how.add_argument("--seed", type=int, metavar="N", help="sample: default 0")
    how.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest completion (default: the task's)")
    how.add_argument("--template", metavar="NAME", help="prompt template, if not the adapter's: alpaca, llm-adapters")
    how.add_argument("--batch-size", type=_positive, metavar="N", help="sequences (with beams: items) at a time")
    _add_data_dir(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")
    evaluate.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    evaluate.set_defaults(command=_evaluate)

    merge = commands.add_parser(
        "merge",
        help="write base and adapter as one model",
        description="Add an adapter that is a matrix to its base's weights, in fp32, rounded once; tells what the rounding cost.",
    )
    merge.add_argument("run", metavar="RUN", type=Path, help="a run, or an adapter's folder")
    merge.add_argument("output", metavar="DIR", type=Path, help="the folder to write the model into")
    merge.add_argument(
        "--onto",
        choices=("original", "nf4"),
        default="original",
        help="the weights to add to: the base's own (default), or the NF4 values that the adapter was trained on",
    )
    merge.add_argument(
        "--into-nf4-with-loss",
        action="store_true",
        help="quantize the sum to NF4 again, which rounds most of a small adapter away; the loss is told",
    )
    merge.add_argument("--json", action="store_true", help="print JSON on stdout")
    merge.set_defaults(command=_merge)

    score = commands.add_parser(
        "score",
        help="score completions that exist, without a model",
        description='Score completions, {"index": i, "completion": "..."} a line, against a test set. No model is needed.',
    )
    score.add_argument("task", metavar="TASK", help="one task, for instance gsm8k")
    score.add_argument("completions", metavar="COMPLETIONS.jsonl", type=Path)
    score.add_argument("--limit", type=_positive, metavar="N", help="the file holds the first N items only")
    _add_data_dir(score)
    score.add_argument("--json", action="store_true", help="print JSON on stdout")
    score.set_defaults(command=_score)

    compare = commands.add_parser(
        "compare",
        help="put runs side by side, with paired tests",
        description="Put evaluated runs side by side, on the items they have in common: accuracies, differences to the first "
        "with an exact paired test for each task, and a bootstrap interval for the average. Seeds of one recipe are pooled.",
    )
    compare.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="a run's folder, its RUN/eval/DIGEST, or runs/base-MODEL"
    )
    compare.add_argument(
        "--rule",
        choices=("paper", "strict"),
        default="paper",
        help="how answers are read: paper is the authors' (default)",
    )
    compare.add_argument(
        "--published", choices=("llama3-8b", "llama2-7b"), help="add the published rows for this model, marked as such"
    )
    compare.add_argument(
        "--format", choices=("table", "json", "csv", "markdown"), help="default: by the ending of FILE, else table"
    )
    compare.add_argument(
        "--output", metavar="FILE", type=Path, help="write to FILE (.json, .csv, .md) and not to stdout"
    )
    compare.set_defaults(command=_compare)

    analyze = commands.add_parser(
        "analyze",
        help="show what training changed in the adapters",
        description="The updates of finished runs, side by side: size, share near zero, effective rank; heat maps of slices of "
        "equal size, and histograms, as PNG. From each run's initial and final values.",
    )
    analyze.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a finished run's folder")
    analyze.add_argument(
        "--layers",
        metavar="N,N",
        type=_layer_numbers,
        help="of the heat maps (default: the first, a middle one, the last)",
    )
    analyze.add_argument(
        "--side", type=_positive, metavar="N", help="of the slices (default: the smallest matrix, up to 64)"
    )
    analyze.add_argument("--seed", type=int, default=0, metavar="N", help="draws the slices (default: 0)")
    analyze.add_argument(
        "--output", metavar="DIR", type=Path, help="where the files go (default: analysis/ in the first run)"
    )
    analyze.add_argument("--json", action="store_true", help="print JSON on stdout")
    analyze.set_defaults(command=_analyze)

    tasks = commands.add_parser(
        "tasks",
        help="list the benchmarks, or export them to lm-evaluation-harness",
        description="List the benchmarks, or write them as task files of lm-evaluation-harness, for a second opinion.",
    )
    tasks.add_argument("tasks", metavar="TASKS", nargs="?", help="only these, comma-separated (default: every one)")
    tasks.add_argument("--json", action="store_true", help="print JSON on stdout")
    tasks.add_argument("--export", nargs=2, metavar=("lm-eval", "DIR"), help="write task files into this folder")
    tasks.add_argument("--template", metavar="NAME", help="prompt of the exported tasks (alpaca)")
    tasks.add_argument(
        "--decoding",
        choices=("greedy", "beam4"),
        help="of the exported tasks (greedy; the harness cuts beam searches short)",
    )
    _add_data_dir(tasks)
    tasks.set_defaults(command=_tasks)

    data = commands.add_parser("data", help="look into data sets", description="Look into data sets.")
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    check = data_commands.add_parser(
        "check",
        help="find test items that a training set holds",
        description="Find the test items that a training set holds, exactly or nearly. Exit status 0, whatever is found.",
    )
    check.add_argument("train", metavar="TRAIN", help="a known training set (math10k, ...), a file of one, or a recipe")
    check.add_argument("tasks", metavar="TASKS", help="comma-separated tasks: gsm8k, math, commonsense, all, ...")
    _add_data_dir(check)
    check.add_argument("--json", action="store_true", help="print JSON on stdout")
    check.set_defaults(command=_data_check)

    params = commands.add_parser(
        "params",
        help="count trainable parameters",
        description="Count trainable parameters from built-in shapes, without weights or network.",
    )
    params.add_argument("subject", metavar="RECIPE_OR_MODEL", help="a recipe, or a built-in model such as llama3-8b")
    params.add_argument(
        "--method", metavar="NAME", help="a method's name (default: the recipe's, or denselora), or all"
    )
    params.add_argument("--r", type=_positive, help="rank (default: the recipe's, or 32)")
    params.add_argument(
        "--target-modules", metavar="LETTERS", help='the paper\'s letters, for instance "QKVUD" (the default)'
    )
    params.add_argument("--json", action="store_true", help="print JSON on stdout")
    params.set_defaults(command=_params)

    doctor = commands.add_parser(
        "doctor",
        help="look for what is wrong with this machine or installation",
        description="Look at Python, packages, CUDA, kernels, a 4-bit layer, memory, disk and cache; say what to do where one is "
        "bad. For bug reports too: no secret and no home folder's name is shown. Exit status 0 if nothing is bad, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON on stdout")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path(os.environ["QDENSE_DATA"]) if os.environ.get("QDENSE_DATA") else None,
        help="data in LLM-Adapters' layout (default: QDENSE_DATA); what is not there is downloaded",
    )


def _toml(value: str | int) -> str:
    """A value as TOML: JSON's spelling, but for characters that JSON would write as pairs of escapes."""
    return json.dumps(value, ensure_ascii=False)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)", text.strip(), re.IGNORECASE)
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size of memory: a number and GiB or MiB, for instance 24GiB"
        )
    # "24 GB" on a card's box are 24 GiB in its driver.
    return int(number * (2**30 if match[2][0] in "gG" else 2**20))


def _layer_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: layer numbers, for instance 0,15,31") from None


def _temperature(text: str) -> float:
    return _number(text, lambda number: 0 < number <= 100, "a temperature: above 0 (for 0, --decoding greedy)")


def _share(text: str) -> float:
    return _number(text, lambda number: 0 < number <= 1, "a share: above 0, at most 1")


def _number(text: str, is_good: Callable[[float], bool], wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not is_good(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


# --- commands ---------------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> None:
    from qdense.recipe import load_recipe

    overrides = list(arguments.set)
    if arguments.fraction is not None:
        overrides.append(f"data.fraction={arguments.fraction!r}")
    if arguments.output is not None:
        overrides.append(f"output.dir={_toml(arguments.output)}")
    recipe = load_recipe(arguments.recipe, overrides)

    from qdense.ui import TrainingDisplay, make_console

    with TrainingDisplay(make_console(), quiet=arguments.quiet) as show:
        show.status = "loading libraries"
        _quiet_libraries()
        from qdense.training.run import train

        train(
            recipe,
            resume=arguments.resume,
            data_dir=arguments.data_dir,
            emit=show,
            accept_changes=arguments.accept_changes,
        )


def _plan(arguments: argparse.Namespace) -> None:
    from qdense.planning.plan import Machine, longest_context, make_plan
    from qdense.planning.shapes import model_shape
    from qdense.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    shape = model_shape(recipe.model.name)
    if arguments.memory is None and _gpu_here():
        _quiet_libraries()
        from qdense.planning.machine import this_machine

        machine = this_machine(recipe, shape)
    else:
        memory_bytes = arguments.memory or 24 * 2**30
        name = f"a card of {memory_bytes / 2**30:g} GiB"
        machine = Machine.card_of(memory_bytes, name, plain=recipe.training.kernels == "torch")
    plan = make_plan(recipe, shape, machine)
    longest = longest_context(recipe, shape, machine)
    if arguments.json:
        print(json.dumps({**plan.as_json(), "longest_context_tokens": longest}, indent=2))
        return
    from qdense.ui import make_console, show_plan

    show_plan(make_console(), plan, f"{recipe.adapter.method} on {recipe.model.name}", longest)


def _gpu_here() -> bool:
    """Whether this machine seems to have an NVIDIA GPU; asking torch would take seconds on a machine without one."""
    import shutil

    return shutil.which("nvidia-smi") is not None


def _evaluate(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.tasks import tasks_named
    from qdense.data.templates import template_named

    tasks = tasks_named(arguments.tasks)
    if arguments.template is not None:
        template_named(arguments.template)
    _refuse_contradictions(arguments)

    from qdense.ui import EvaluationDisplay, make_console

    console = make_console(sys.stderr if arguments.json else sys.stdout)
    with EvaluationDisplay(console, quiet=arguments.quiet) as show:
        show.status = "loading libraries"
        _quiet_libraries()
        from qdense.benchmarks.endpoint import Endpoint
        from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
        from qdense.benchmarks.generation import DECODINGS
        from qdense.events import Notice
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
        asked = {"name": arguments.model, "quantization": arguments.quantization, "dtype": arguments.dtype}
        summary = evaluate(
            EvaluationRequest(
                tasks=tasks,
                adapter=adapter,
                model={key: value for key, value in asked.items() if value is not None},
                with_base=arguments.with_base,
                decoding=replace(
                    DECODINGS[arguments.decoding or ("greedy" if endpoint else "beam4")],
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
            ),
            emit=show,
        )
    if arguments.json:
        print(json.dumps(summary, indent=2))


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Options of `evaluate` that would be ignored silently."""

    def given(*names: str) -> list[str]:
        return [f"--{name}" for name in names if getattr(arguments, name.replace("-", "_")) not in (None, False)]

    if arguments.with_base and arguments.adapter is None and arguments.model is not None:
        raise QDenseError("--with-base compares an adapter with its base; name the adapter by --adapter")
    if arguments.decoding != "sample" and (unused := given("samples", "temperature", "top-p", "seed")):
        raise QDenseError(
            f"{', '.join(unused)}: only with --decoding sample; {arguments.decoding or 'the default'} draws nothing"
        )
    if arguments.trained_on is not None and not arguments.clean:
        raise QDenseError("--trained-on: names the training set for --clean; add --clean")
    if arguments.endpoint is None:
        if arguments.concurrency is not None:
            raise QDenseError("--concurrency: counts requests to a server; name one by --endpoint URL")
        return
    if arguments.model is None:
        raise QDenseError("--endpoint: name the server's model by --model NAME")
    local = ("adapter", "with-base", "quantization", "dtype", "template", "batch-size")
    if unused := given(*local):
        raise QDenseError(f"{', '.join(unused)}: means nothing to a model behind --endpoint; leave it out")


def _merge(arguments: argparse.Namespace) -> None:
    _quiet_libraries()
    from qdense.modeling.merge import merge

    def notice(text: str) -> None:
        print(printable(text), file=sys.stderr)

    report = merge(
        arguments.run, arguments.output, onto=arguments.onto, into_nf4=arguments.into_nf4_with_loss, notice=notice
    )
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps(asdict(report), indent=2))
        return
    from qdense.ui import make_console, show_merge

    show_merge(make_console(), report)


def _score(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.results import read_completions, score_task
    from qdense.benchmarks.tasks import load_items, task_named
    from qdense.ui import make_console, show_score

    task = task_named(arguments.task)
    labels = [row.answer for row in load_items(task, arguments.data_dir).rows[: arguments.limit]]
    result, _ = score_task(task, labels, read_completions(arguments.completions, len(labels)))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show_score(make_console(), result)


def _compare(arguments: argparse.Namespace) -> None:
    if not arguments.runs and arguments.published is None:
        raise QDenseError("nothing to compare: name evaluated runs, or published rows by --published llama3-8b")
    from qdense.cache import write_atomically
    from qdense.comparison.compare import compare
    from qdense.comparison.evaluations import load_evaluation
    from qdense.comparison.tables import as_csv, as_markdown
    from qdense.ui import drawn, make_console, show_comparison

    comparison = compare(
        [load_evaluation(run) for run in arguments.runs], rule=arguments.rule, published=arguments.published
    )
    output: Path | None = arguments.output
    by_suffix = {".json": "json", ".csv": "csv", ".md": "markdown", ".txt": "table"}
    form = arguments.format or (by_suffix.get(output.suffix.lower()) if output else "table")
    if form is None:
        raise QDenseError(f"--output {output}: its ending must be one of {', '.join(by_suffix)}, or name a --format")
    if form == "table" and output is None:
        show_comparison(make_console(), comparison)
        return
    if form == "json":
        text = json.dumps(comparison, indent=2) + "\n"
    elif form == "table":
        text = drawn(lambda console: show_comparison(console, comparison))
    else:
        text = as_csv(comparison) if form == "csv" else as_markdown(comparison)
        text = "\n".join(map(clean, text.split("\n")))  # it may be printed, and holds names of folders
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, text)


def _analyze(arguments: argparse.Namespace) -> None:
    _quiet_libraries()
    from qdense.analysis import analyze

    analysis = analyze(
        arguments.runs, arguments.output, layers=arguments.layers, side=arguments.side, seed=arguments.seed
    )
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps(asdict(analysis), indent=2))
        return
    from qdense.ui import make_console, show_analysis

    show_analysis(make_console(), analysis)


def _tasks(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.tasks import GROUPS, TASKS, describe, tasks_named

    chosen = TASKS if arguments.tasks is None else {task.name: task for task in tasks_named(arguments.tasks)}
    groups = {name: members for name, members in GROUPS.items() if chosen.keys() >= set(members)}
    if arguments.export is not None:
        _export_tasks(arguments, list(chosen.values()))
        return
    for option in ("template", "decoding"):
        if getattr(arguments, option) is not None:
            raise QDenseError(f"--{option}: of exported tasks; add --export lm-eval DIR")
    if arguments.json:
        print(json.dumps({"tasks": [describe(task) for task in chosen.values()], "groups": groups}, indent=2))
        return
    from qdense.ui import make_console, show_tasks

    show_tasks(make_console(), chosen, groups)


def _export_tasks(arguments: argparse.Namespace, tasks: Sequence[Task]) -> None:
    import shlex

    kind, folder = arguments.export
    if kind != "lm-eval":
        raise QDenseError(f'--export "{kind}": unknown format; known: lm-eval')
    if not folder:
        raise QDenseError("--export lm-eval: name the folder to write into")

    from qdense.benchmarks.generation import DECODINGS
    from qdense.benchmarks.harness import export
    from qdense.data.templates import template_named

    template, decoding = template_named(arguments.template or "alpaca"), DECODINGS[arguments.decoding or "greedy"]
    names = export(tasks, Path(folder), arguments.data_dir, template, decoding)
    if arguments.json:
        print(json.dumps({"folder": folder, "num_tasks": len(tasks), "names": names}, indent=2))
        return
    print(f"wrote {len(tasks)} tasks to {folder} (template {template.name}, {decoding.name})")
    if decoding.name == "beam4":
        print(
            "The harness ends a whole batch's beam search at the first end of any: its completions will differ from ours."
        )
    print(
        "\nRun them (pip install lm-eval) on an adapter that was trained with this template:\n"
        "  python -m qdense.tuners lm_eval --model hf --model_args pretrained=MODEL,peft=RUN/adapter,dtype=bfloat16 \\\n"
        f"    --include_path {shlex.quote(folder)} --tasks {','.join(names)} --batch_size 16\n"
        "MODEL is a hub id or a folder. For an NF4 base, name the folder that qdense has cached, and the tokenizer:\n"
        f"  pretrained={cache_dir('quantized')}/NAME-...,tokenizer=MODEL"
    )


def _data_check(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.tasks import load_items, tasks_named

    tasks = tasks_named(arguments.tasks)

    from qdense.data.contamination import describe, overlaps
    from qdense.data.sources import load_named_or_file

    training = load_named_or_file(arguments.train, arguments.data_dir)
    tests = {task.name: load_items(task, arguments.data_dir) for task in tasks}
    found = {task: describe(overlap, training, tests[task]) for task, overlap in overlaps(training, tests).items()}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    from qdense.ui import make_console, show_contamination

    show_contamination(make_console(), training.origin, found)


def _params(arguments: argparse.Namespace) -> None:
    from qdense.methods import METHODS
    from qdense.planning.parameters import ParameterCount, count_parameters
    from qdense.recipe import load_recipe, recipe_from_tables

    is_recipe = arguments.subject.endswith(".toml") or os.path.isfile(arguments.subject)
    if arguments.method not in (None, "all", *METHODS):
        raise QDenseError(
            f'--method "{arguments.method}": unknown method{did_you_mean(arguments.method, METHODS)}; or "all"'
        )

    def count(method: str | None) -> ParameterCount:
        asked = {"method": method, "r": arguments.r, "target_modules": arguments.target_modules}
        asked = {key: value for key, value in asked.items() if value is not None}
        if is_recipe:
            overrides = [f"adapter.{key}={_toml(value)}" for key, value in asked.items()]
            overrides.append('model.quantization="none"')  # it changes no count, and full fine-tuning has no other
            recipe = load_recipe(arguments.subject, overrides)
            return count_parameters(recipe.model.name, recipe.adapter)
        base = {"name": "llama3-8b", "quantization": "none"}
        tables = {"model": base, "data": {"name": "wordproblems"}, "adapter": asked}
        return count_parameters(arguments.subject, recipe_from_tables(tables, source="qdense params").adapter)

    counts = [count(name) for name in METHODS] if arguments.method == "all" else [count(arguments.method)]
    if arguments.json:
        from dataclasses import asdict

        records = [asdict(counted) for counted in counts]
        print(json.dumps(records if arguments.method == "all" else records[0], indent=2))
        return
    from qdense.ui import make_console, show_methods, show_parameters

    if arguments.method == "all":
        show_methods(make_console(), counts)
    else:
        show_parameters(make_console(), counts[0])


def _doctor(arguments: argparse.Namespace) -> int:
    from qdense.doctor import BAD, diagnose, versions

    checks = diagnose()
    status = int(any(check.state == BAD for check in checks))
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps({"checks": [asdict(check) for check in checks], "versions": versions()}, indent=2))
        return status
    try:
        from qdense.ui import make_console, show_doctor
    except Exception:  # what draws may be what is broken
        for check in checks:
            print("\n  ".join(filter(None, (f"{check.state}: {check.name}: {check.detail}", check.remedy))))
    else:
        show_doctor(make_console(), checks)
    return status


def _quiet_libraries() -> None:
    """Import the heavy libraries and keep their remarks off the display; errors still come through."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "liger_kernel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
