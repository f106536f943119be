"""The results of commands as tables: a `show_` function for each command except `compare` (see `comparison`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdense.methods import METHODS
from qdense.text import clean, clean_lines
from qdense.ui.console import accuracy_text, plain_decimals, size

if TYPE_CHECKING:  # some of these import torch, which most commands do not need
    from qdense.analysis import Analysis
    from qdense.benchmarks.evaluate import ShownItem
    from qdense.benchmarks.tasks import Task
    from qdense.catalogs.families import Family
    from qdense.doctor import Check
    from qdense.modeling.export import ExportReport
    from qdense.modeling.merge import MergeReport
    from qdense.planning.parameters import ParameterCount
    from qdense.planning.plan import Plan


def show_score(console: Console, result: dict[str, Any]) -> None:
    """The result of `qdense score`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rule", no_wrap=True)
    for name in ("right", "%, 95% Wilson", "no answer"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in ("paper", "strict"):
        scored = result[rule]
        table.add_row(rule, f"{scored['num_correct']:,}", accuracy_text(scored), f"{scored['num_without_answer']:,}")
        for k, share in scored.get("pass_at", {}).items():
            table.add_row(f"  pass@{k}", "", f"{100 * share:.1f}", "", style="dim")
    samples = f", the majority of {result['num_samples']} samples each" if "num_samples" in result else ""
    console.print(f"{result['task']}: {result['num_scored']:,} of {result['num_items']:,} items scored{samples}")
    console.print(table)


def show_contamination(console: Console, origin: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """The result of `qdense data check`: a line for each task, then an example of each kind of match."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    for name in ("items", "exact", "near", "same numbers", "other numbers", "clean"):
        table.add_column(name, justify="right")
    keys = ("num_items", "num_exact", "num_near", "num_near_same_numbers", "num_near_other_numbers")
    for task, overlap in found.items():
        num_clean = len(overlap["clean_indices"])
        style = "yellow" if num_clean < overlap["num_items"] else ""
        table.add_row(task, *(f"{overlap[key]:,}" for key in keys), f"{num_clean:,}", style=style)
    console.print(Text(clean(f"test items in {origin}")))
    console.print(table)
    if any(overlap["num_near"] or overlap["num_exact"] for overlap in found.values()):
        console.print(
            "exact: the same question is in the training data; near: almost the same words are. With other numbers, a near one "
            "is a new question, and only says that the test is close to what was trained on. clean: neither.",
            style="dim",
        )
    for task, overlap in found.items():
        for match in overlap["examples"]:
            is_near = match["kind"] != "exact"
            how = f"{100 * match['share']:.0f}% of its words, {match['kind']}" if is_near else match["kind"]
            console.print(Text(f"\n{task} item {match['item']}, training row {match['row']}: {how}", style="dim"))
            for label, text in (("test", match["test_text"]), ("training", match["training_text"])):
                console.print(Text(f"  {label}: {_excerpt(text)}"))


def _excerpt(text: str, length: int = 240) -> str:
    text = clean(" ".join(text.split()))
    return text if len(text) <= length else f"{text[:length]} ..."


def show_tasks(console: Console, tasks: Mapping[str, Task], groups: Mapping[str, Sequence[str]]) -> None:
    """The table of `qdense tasks`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    table.add_column("items", justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("LLM-Adapters' name", no_wrap=True)
    table.add_column("source", overflow="fold")
    for task in tasks.values():
        table.add_row(task.name, f"{task.num_items:,}", task.answers.name, task.upstream_name, task.source)
    console.print(table)
    for name, members in groups.items():
        console.print(f"{name}: {', '.join(members)}")


def show_families(console: Console, families: Sequence[Family]) -> None:
    """The table of `qdense models`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("model_type", "models", "rows", "memory", "tried on"):
        table.add_column(name, no_wrap=name != "models")
    for family in families:
        table.add_row(
            family.model_type,
            family.models,
            "padded" if family.why_not_packed else "packed",
            "planned" if family.is_planned else "estimated",
            family.tried_on or "random weights",
        )
    console.print(table)
    if experts := [family.model_type for family in families if family.has_experts]:
        console.print(f"of {', '.join(experts)}, only attention can be adapted, and experts stay unquantized")
    console.print("a model_type that is missing here: rows are padded, and you name adapter.target_modules yourself")


def show_methods(console: Console, counts: Sequence[ParameterCount]) -> None:
    """The table of `qdense params --method all`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("method", "trainable", "%", ""):
        table.add_column(name, justify="right" if name in ("trainable", "%") else "left")
    for count in counts:
        table.add_row(
            count.method,
            f"{count.trainable_parameters:,}",
            plain_decimals(count.percent, 3),
            METHODS[count.method].summary,
        )
    first = next(count for count in counts if count.r is not None)
    console.print(
        clean(f"{first.model}, {first.base_parameters:,} parameters; r {first.r} for methods that have a rank")
    )
    console.print(table)


def show_merge(console: Console, report: MergeReport) -> None:
    """The result of `qdense merge`, and its rounding error."""
    console.print(clean(f"wrote {report.folder}: the adapter on {report.onto} weights, rounded to {report.rounded_to}"))
    console.print(
        f"lost to rounding: {plain_decimals(100 * report.lost_median, 2)}% of an update in the median of {report.num_layers} "
        f"layers, at most {plain_decimals(100 * report.lost_worst, 2)}% ({clean(report.worst_layer)})"
    )
    console.print(
        f"compared with the unmerged adapter: divergence {report.divergence:.2g} nats per token, the same most likely token "
        f"for {report.num_same:,} of {report.num_tokens:,}"
    )


def show_items(console: Console, task: str, items: Sequence[ShownItem]) -> None:
    """`qdense evaluate --show`: questions, what was expected, and what the model wrote."""
    for item in items:
        verdict = Text("right", style="green") if item.is_right else Text("wrong", style="red")
        console.print(Text.assemble((f"\n{clean(task)}, item {item.index}: ", "bold"), verdict))
        for label, text in (("question", item.question), ("expected", item.expected), ("answer", item.completion)):
            lines = clean_lines(text.strip()).replace("\n", f"\n{'':11}")
            console.print(Text(f"  {label:<9}{lines}"))


def show_export(console: Console, report: ExportReport) -> None:
    """The result of `qdense export`, and what was lost."""
    how = "exact" if report.is_exact else "fitted"
    console.print(clean(f"wrote {report.folder}: a LoRA of rank {report.rank}, {how}"))
    if not report.is_exact or report.lost_worst > 1e-6:
        of = "matrix differs from the adapter's" if report.is_exact else "output differs from the adapter's"
        console.print(
            f"the LoRA's {of} by {plain_decimals(100 * report.lost_median, 2)}% (median of {report.num_layers} modules), at most "
            f"{plain_decimals(100 * report.lost_worst, 2)}% ({clean(report.worst_layer)})"
        )
    if report.losses:
        shown = "; ".join(
            f"{title} {report.losses[name]:.4f}, {100 * report.accuracies[name]:.1f}%"
            for name, title in (("base", "base model"), ("adapter", "adapter"), ("fitted", "LoRA"))
        )
        console.print(f"loss and right next tokens on {report.num_held_out} rows that the fit did not use: {shown}")


def show_analysis(console: Console, analysis: Analysis) -> None:
    """The table of `qdense analyze`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("")
    for name in ("elements", "slices", "change", "near 0", "unmoved", "eff. rank"):
        table.add_column(name, justify="right")
    for run, lines in itertools.groupby(analysis.summaries, key=lambda line: line.run):
        shown = list(lines)
        if shown[0].factor:
            table.add_row(Text(clean(run), style="bold"))
        for line in shown:
            rank = "" if line.effective_rank is None else f"{line.effective_rank:.1f}"
            near_zero = f"{100 * line.near_zero:.1f}%"
            if line.factor:
                counts = (
                    f"{line.num_elements:,}",
                    f"{line.num_slices:,}",
                    f"{plain_decimals(100 * line.relative_change, 3)}%",
                )
                table.add_row(f"  {clean(line.factor)}", *counts, near_zero, f"{100 * line.unmoved:.1f}%", rank)
            else:
                table.add_row(clean(line.run), "", "", "", near_zero, "", rank)
    console.print(table)
    console.print(
        f"Medians over slices of {analysis.side} x {analysis.side} (seed {analysis.seed}). change: over the initial values; over "
        f"the final ones of tensors that start at zero. near 0: below {analysis.near_zero:g} of the change's own. All RMS."
    )
    console.print(clean(f"wrote {', '.join(analysis.files)} to {analysis.folder}"))


_PARTS = {
    "weights": "weights of the base",
    "gathered_layers": "two layers, gathered from all cards",
    "embeddings_and_head": "embeddings and output layer",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "optimizer, masters",
    "checkpoints": "checkpoints of recomputed layers",
    "activations": "activations",
    "passing_gradients": "gradients of activations",
    "logits": "logits, a slice at a time",
    "copies_of_weights": "copies of a weight in use",
}


def show_plan(console: Console, plan: Plan, title: str, longest_context_tokens: int) -> None:
    """The table of `qdense plan`: where memory goes at the peak, whether it fits, how it will run."""
    machine = plan.machine
    console.print(Text(clean(f"{title}: {plan.summary}"), style="bold"))
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for part, num_bytes in plan.memory.breakdown.items():
        if num_bytes:
            table.add_row(_PARTS[part], size(num_bytes))
    moments = {
        "forward": "in forward",
        "loss": "while the loss is computed",
        "recompute": "while a layer is recomputed",
        "backward": "in backward",
    }
    table.add_row(f"predicted peak, {moments[plan.memory.moment]}", size(plan.predicted_peak_bytes), style="bold")
    what = "CUDA's context, fragments" if machine.kernels.is_cuda else "the process itself, fragments"
    table.add_row(what, size(plan.needed_bytes - plan.predicted_peak_bytes))
    table.add_row(clean(f"available on {machine.name}"), size(machine.memory_bytes))
    console.print(table)
    if machine.num_processes > 1:
        held = f"1/{machine.num_processes} of the layers" if plan.gathered_bytes else "the whole model"
        console.print(
            f"each of {machine.num_processes} cards holds {held} and takes its share of a step's rows; they sum "
            f"{size(plan.summed_bytes)} of gradients after each step"
        )
    if plan.gathered_bytes:
        console.print(
            f"each card receives {size(plan.gathered_bytes)} of layers in a forward pass, and again in its backward"
        )
    for note in plan.notes:
        console.print(Text(clean(f"note: {note}"), style="yellow"))
    if plan.why_padded:
        console.print(Text(clean(f"note: rows are padded, not packed: {plan.why_padded}"), style="yellow"))
    if plan.fits:
        console.print(Text(f"fits: {size(plan.needed_bytes)} of {size(machine.memory_bytes)}", style="green"))
    else:
        console.print(Text(f"does not fit: {size(plan.needed_bytes)} of {size(machine.memory_bytes)}", style="red"))
        for remedy in plan.remedies:
            console.print(Text(clean(f"  {remedy}")))
        return
    console.print(f"longest row for which the memory suffices, one at a time: {longest_context_tokens:,} tokens")
    if plan.layout.offload:
        console.print(f"host memory for checkpoints: {size(plan.host_bytes)}, pinned")
    if len(plan.speeds) > 1 and len(set(plan.speeds.values())) == 1:
        speed = float(f"{next(iter(plan.speeds.values())):.3g}")
        console.print(
            f"about {speed:,.0f} tokens/s on any of these cards: {', '.join(plan.speeds)}; each step has so little to compute "
            "that Python, not the card, sets the pace"
        )
    elif plan.speeds:
        speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in plan.speeds.items())
        console.print(f"tokens/s, predicted from shapes (an H200 reached 0.60 to 0.93 of them): {speeds}")


def show_parameters(console: Console, count: ParameterCount) -> None:
    """The table of `qdense params`."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("module")
    table.add_column("trainable", justify="right")
    for name, number in count.by_module.items():
        table.add_row(name, f"{number:,}")
    table.add_row("all", f"{count.trainable_parameters:,}", style="bold")
    method = count.method if count.r is None else f"{count.method} r {count.r}"
    console.print(
        clean(f"{method} on {count.model}: {plain_decimals(count.percent, 4)}% of {count.base_parameters:,} parameters")
    )
    console.print(table)


def show_doctor(console: Console, checks: Sequence[Check]) -> None:
    """The table of `qdense doctor`: a line for each check, with the remedy under a bad one."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    styles = {"good": "green", "bad": "bold red", "not here": "dim"}
    for check in checks:
        detail = Text(clean(check.detail))
        if check.remedy:
            detail.append(f"\n{clean(check.remedy)}", style="yellow")
        table.add_row(Text(check.state, style=styles[check.state]), Text(clean(check.name)), detail)
    console.print(table)
    num_bad = sum(check.state == "bad" for check in checks)
    if num_bad:
        console.print(Text(f"{num_bad} of {len(checks)} checks are bad", style="bold red"))
    else:
        console.print(Text("no problems found", style="green"))
