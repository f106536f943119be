"""One training run, from a validated recipe to a saved adapter: what comes before and after the loop (`loop.py`)."""

from __future__ import annotations

import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError

from qdense.cache import appearing_folder, require_free_space, write_atomically
from qdense.catalogs.datasets import TRAINING_SETS
from qdense.catalogs.models import CatalogModel
from qdense.data.contamination import local_overlaps
from qdense.data.examples import Encoded, Example, collate, encode_rows, split_rows
from qdense.data.rows import STANDARD_COLUMNS, Message
from qdense.data.sources import DataSet, load_training_set
from qdense.data.templates import chat_template_for, prompt_ids, template_named
from qdense.device import choose_device, device_description, has_bfloat16, memory_total, peak_memory
from qdense.errors import RunError, RunStopped, counted
from qdense.events import Emit, Notice, TrainingDone, TrainingStarted, ignore
from qdense.inference.generation import Prompt
from qdense.methods import METHODS
from qdense.modeling.adapter_files import AdapterCard, save_adapter, save_trainable
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.liger import use_liger
from qdense.modeling.load import BaseModel, load_base
from qdense.modeling.locate import fetched_shape
from qdense.modeling.packing import why_not_packed
from qdense.modeling.shard import divide
from qdense.ops.kernels import use_kernels, why_not_triton
from qdense.planning.machine import slow_kernels, this_machine
from qdense.planning.memory import StepLayout
from qdense.planning.plan import Plan, make_plan
from qdense.processes import PATIENCE, first_alone, of_all, place, require_ranks
from qdense.provenance import git_hash, package_versions
from qdense.recipe import ColumnsRecipe, DataRecipe, Recipe
from qdense.runs import RunFolder
from qdense.training.checkpoint import CHECKPOINTS_TO_KEEP, Checkpoint, last_good_checkpoint
from qdense.training.loop import Job, TrainingLoop, checkpoint_bytes
from qdense.training.metrics import MetricsFile
from qdense.training.resume import Resumed, checkpoint_to_resume, refuse_other_inputs
from qdense.training.signals import StopSignals, named
from qdense.training.trackers import Trackers, require_trackers

_WARMUP_SHARE = 0.05  # of the run, for "auto": the authors' 100 steps are 5% of a Math10K run


def train(recipe: Recipe, *, resume: bool, data_dir: Path | None, emit: Emit, accept_changes: bool = False) -> Path:
    """Train the adapter that `recipe` describes and save it.

    Args:
        resume: continue from the last checkpoint in `output.dir`; if there is none, start afresh and say so.
        data_dir: a folder in LLM-Adapters' layout, for data sets known by name.
        emit: receives the events of `qdense.events`.
        accept_changes: resume even if recipe, data, base or versions differ from those that the run began with.

    Returns:
        The run's folder.

    Raises:
        QDenseError: the run cannot start or continue; RunStopped after a signal.
    """
    require_ranks()
    require_trackers(recipe)
    _require_kernels(recipe)
    if recipe.training.shard and place()[1] == 1:
        raise RunError("training.shard = true: there is one process. Start several with --gpus N, or set it to false")
    run = RunFolder(Path(recipe.output.dir))
    accelerator = Accelerator(
        cpu=choose_device(recipe.model.device).type == "cpu",
        mixed_precision="no",  # base and adapter have their own dtypes
        log_with=list(recipe.training.trackers) or None,
        project_dir=run.logs,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    is_first = accelerator.is_main_process
    if not is_first:  # of several processes, the first decides, reports and writes
        emit = ignore
    with run.sole_writer():
        resumed, *_ = of_all(
            lambda: (
                checkpoint_to_resume(recipe, run, emit, resume=resume, accept_changes=accept_changes)
                if is_first
                else None
            )
        )

        recipe = resumed.recipe if resumed else recipe
        recipe = recipe.settled(has_bfloat16=has_bfloat16(choose_device(recipe.model.device)))

        def prepare() -> _Prepared:
            prepared = _prepare(recipe, resumed, data_dir, emit)
            if resumed is not None and is_first:
                refuse_other_inputs(
                    run,
                    data_checksum=prepared.data.checksum,
                    data=prepared.data.origin,
                    fingerprint=prepared.base.fingerprint,
                    base=prepared.base.name,
                    accept_changes=accept_changes,
                    emit=emit,
                )
            if is_first:
                _record(run, prepared, is_new=resumed is None)
            return prepared

        prepared = first_alone(prepare)
        done = _run(run, prepared, resumed, accelerator, emit)
        if not is_first:
            return run.path
        card = AdapterCard(
            model=prepared.recipe.model.model_dump(exclude_none=True, exclude={"device"})
            | {"name": prepared.base.reference},
            fingerprint=prepared.base.fingerprint,
            template=prepared.recipe.data.template,
            method=recipe.adapter.method,
        )
        try:
            with appearing_folder(run.adapter) as building:
                save_adapter(prepared.model, building, card)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{run.adapter}: the trained adapter cannot be written: {error}. Free some space or check the permissions; "
                f"nothing is lost: --resume then writes it from the last checkpoint."
            ) from error
        emit(done)
    return run.path


def _require_kernels(recipe: Recipe) -> None:
    """Raise RunError before anything loads if the recipe requires kernels that cannot run here."""
    if recipe.training.kernels == "triton" and (fault := why_not_triton(choose_device(recipe.model.device).type)):
        raise RunError(f'training.kernels = "triton": {fault}. Use "auto" or "torch".')


@dataclass(frozen=True)
class _Prepared:
    """Everything that exists before the first step, with the adapter as initialised and numbers in place of "auto"."""

    recipe: Recipe
    plan: Plan
    base: BaseModel
    model: Any
    data: DataSet
    training: Encoded
    validation: Sequence[Example]
    samples: list[Prompt]
    num_steps: int
    learning_rate: float
    num_warmup_steps: int
    facts: tuple[tuple[str, str], ...]


def _prepare(recipe: Recipe, resumed: Resumed | None, data_dir: Path | None, emit: Emit) -> _Prepared:
    # Data comes before the model: its faults are the most common, and are found in a second.
    data = load_training_set(recipe.data, data_dir, emit)
    recipe = _with_data(recipe, recipe.data.settled(data.kind))
    _tell_of_data(recipe, data, emit)
    split = split_rows(
        len(data.rows),
        validation_rows=recipe.data.validation_rows,
        fraction=recipe.data.fraction,
        seed=recipe.data.seed,
    )
    if recipe.data.name in TRAINING_SETS:
        _warn_of_test_items(recipe.data.name, data, data_dir, emit)
    if recipe.adapter.unused:
        keys = ", ".join(f"adapter.{key}" for key in recipe.adapter.unused)
        emit(Notice(f"not read by method {recipe.adapter.method}: {keys}"))
    shape = fetched_shape(recipe.model.name, recipe.model.revision)
    plan = _plan(recipe, shape, resumed.layout if resumed else None, emit)
    base = load_base(recipe.model, lambda text: emit(Notice(text)), to_divide=recipe.training.shard)
    recipe = _with_data(recipe, recipe.data.model_copy(update={"template": _template(recipe, base, emit)}))
    use_kernels(recipe.training.kernels)
    if plan.machine.kernels.has_liger:
        use_liger(base.model)
    training = encode_rows(data.rows, split.training, base.tokenizer, recipe.data)
    validation = encode_rows(data.rows, split.validation, base.tokenizer, recipe.data) if split.validation else None
    _report_truncation(training, recipe, emit)
    num_steps = recipe.training.num_steps(len(training.examples))
    learning_rate, num_warmup_steps = _learning_rate(recipe, shape), _num_warmup_steps(recipe, num_steps, emit)

    torch.manual_seed(recipe.training.seed)
    num_rows = METHODS[recipe.adapter.method].num_calibration_rows(recipe.adapter)
    if num_rows and recipe.training.shard:
        raise RunError(
            f"training.shard = true: cannot be used with {recipe.adapter.method}, which first runs the whole base"
        )
    calibration = [collate([example], base.pad_token_id) for example in training.examples[:num_rows]]
    model = attach_adapter(base, recipe.adapter, num_steps, calibration)
    facts = _facts(recipe, base, model, data, training, len(split.validation), plan, learning_rate)
    return _Prepared(
        recipe=_settled(recipe, data, learning_rate, num_warmup_steps),
        plan=plan,
        base=base,
        model=model,
        data=data,
        training=training,
        validation=validation.examples if validation else [],
        samples=_samples(recipe, base),
        num_steps=num_steps,
        learning_rate=learning_rate,
        num_warmup_steps=num_warmup_steps,
        facts=facts,
    )


def _samples(recipe: Recipe, base: BaseModel) -> list[Prompt]:
    """training.sample_prompts as the model reads them."""
    prompts = recipe.training.sample_prompts
    template = template_named(recipe.data.template, base.tokenizer) if prompts else None
    return [
        Prompt(index, 0, prompt_ids(template, [Message("user", text)], base.tokenizer))
        for index, text in enumerate(prompts)
        if template is not None
    ]


def _record(run: RunFolder, prepared: _Prepared, *, is_new: bool) -> None:
    """Write the resolved recipe with its provenance, and the initial adapter. Raises if the disk has too little space."""
    recipe, data, base = prepared.recipe, prepared.data, prepared.base
    has_schedule = METHODS[recipe.adapter.method].schedule is not None
    # One checkpoint more than are kept, since the oldest is removed only after the newest is written; and the result and metrics.
    needed_bytes = (CHECKPOINTS_TO_KEEP + 1) * checkpoint_bytes(prepared.model, has_schedule=has_schedule) + 64 * 2**20
    require_free_space(run.path, needed_bytes, "the run's checkpoints")
    provenance = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_description(base.device),
        "git_hash": git_hash(),
        "versions": package_versions(),
        "data": {"origin": data.origin, "sha256": data.checksum, "num_rows": len(data.rows)},
        "base_fingerprint": base.fingerprint,
        "num_steps": prepared.num_steps,
        "num_training_rows": len(prepared.training.examples),
        "num_validation_rows": len(prepared.validation),
        "plan": prepared.plan.record(),
        "summary": dict(prepared.facts),
    }
    write_atomically(run.recipe, tomli_w.dumps({**recipe.resolved(), "provenance": provenance}))
    if data.skipped:
        write_atomically(run.skipped_rows, "".join(f"{fault}\n" for fault in data.skipped))
    if is_new and METHODS[recipe.adapter.method].is_adapter:
        save_trainable(prepared.model, run.initial)


def _run(
    run: RunFolder, prepared: _Prepared, resumed: Resumed | None, accelerator: Accelerator, emit: Emit
) -> TrainingDone:
    """Train, and leave the weights to keep in the model. Raises RunStopped if a signal came before the last step."""
    recipe, plan, base = prepared.recipe, prepared.plan, prepared.base
    checkpoint = _load(resumed.checkpoint) if resumed else None
    first_step = checkpoint.step if checkpoint else 0
    total_bytes = memory_total(base.device)
    running = {
        "planned_bytes": plan.predicted_memory_bytes,
        "memory_total_bytes": total_bytes,
        "micro_batch_size": plan.layout.micro_batch_size,
        "recompute_layers": plan.layout.recompute_layers,
    }
    with (
        run.running(running) if accelerator.is_main_process else nullcontext(),
        StopSignals(emit) as signals,
        _listeners(run, recipe, accelerator, first_step, emit) as told,
    ):
        metrics, emit_all = told
        job = Job(
            recipe=recipe,
            base=base,
            model=prepared.model,
            method=METHODS[recipe.adapter.method],
            training=prepared.training.examples,
            validation=prepared.validation,
            samples=prepared.samples,
            num_steps=prepared.num_steps,
            learning_rate=prepared.learning_rate,
            num_warmup_steps=prepared.num_warmup_steps,
            layout=plan.layout,
            takes_saved_layout=resumed is None or resumed.layout is not None,
            folder=run,
            metrics=metrics,
            signals=signals,
            emit=emit_all,
        )
        if recipe.training.shard:
            divide(prepared.model, base.device)
        loop = TrainingLoop(job, accelerator)
        if checkpoint is not None:
            loop.restore(checkpoint)
        emit(
            TrainingStarted(
                title=f"{recipe.adapter.method} on {recipe.model.name}",
                facts=prepared.facts,
                num_steps=prepared.num_steps,
                first_step=first_step,
                memory_total_bytes=total_bytes,
                memory_name="GPU" if base.device.type == "cuda" else "process",
            )
        )
        try:
            loop.run()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(error, loop, plan) from error
        except RuntimeError as error:
            if accelerator.num_processes == 1 or "peer" not in str(error):
                raise
            raise RunError(
                f"another process of this run has ended; its own output says why, unless it was killed (`dmesg | grep -i oom`). "
                f"{last_good_checkpoint(run.checkpoints)}"
            ) from error
        if loop.step < prepared.num_steps and not loop.has_stalled:
            received = signals.received or signal.SIGTERM  # another process received it
            raise RunStopped(
                f"stopped by {named(received)} after step {loop.step} of {prepared.num_steps}. "
                f"{last_good_checkpoint(run.checkpoints)}",
                received,
            )
        if recipe.training.keep == "best" and not loop.best_weights:
            loop.validate()  # `keep` was changed after the last step
    return TrainingDone(
        adapter_dir=str(run.adapter),
        num_steps=loop.step,
        kept_step=loop.use_best() if recipe.training.keep == "best" else loop.step,
        seconds=loop.seconds,
        peak_memory_bytes=loop.peak_memory_bytes,
        predicted_memory_bytes=plan.predicted_memory_bytes,
    )


@contextmanager
def _listeners(
    run: RunFolder, recipe: Recipe, accelerator: Accelerator, first_step: int, emit: Emit
) -> Iterator[tuple[MetricsFile | None, Emit]]:
    """The metrics file, and a function that passes each event to it, the trackers and the display. Closed at the end. Of
    several processes only the first has them."""
    if not accelerator.is_main_process:
        yield None, emit
        return
    metrics, trackers = MetricsFile(run.metrics, resume_step=first_step), None
    try:
        trackers = Trackers(accelerator, recipe, run, emit)

        def emit_all(event: Any) -> None:
            for listener in (metrics, trackers, emit):
                listener(event)

        yield metrics, emit_all
    finally:
        metrics.close()
        if trackers is not None:
            trackers.close()


def _load(path: Path) -> Checkpoint:
    """Load a checkpoint whose checksums are right. Raises RunError for contents that no run writes."""
    try:
        return Checkpoint.load(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: has contents that qdense does not write, so it is not read: {str(error).splitlines()[0]} Remove it to "
            "continue from the one before, or start a new run."
        ) from None


def _out_of_memory(error: BaseException, loop: TrainingLoop, plan: Plan) -> RunError:
    """An error that says what was planned, what was used and what to lower."""
    layout, device, gib = loop.layout, loop.job.base.device, 2**30
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"step {loop.step + 1}: out of memory, one row at a time: {what}. "
        f"Planned: {plan.predicted_memory_bytes / gib:.1f} GiB for {plan.summary}; used at most: "
        f"{peak_memory(device) / gib:.1f} GiB of {memory_total(device) / gib:.1f} GiB. Close other programs, set "
        f'training.recompute = "all" ({layout.recompute_layers} layers now) or lower data.max_length (a changed recipe needs '
        f"--accept-changes). {last_good_checkpoint(loop.job.folder.checkpoints)}"
    )


def _plan(recipe: Recipe, shape: CatalogModel, settled: StepLayout | None, emit: Emit) -> Plan:
    """The run's plan, from shapes, before the model is loaded. `settled` is the layout of a resumed run."""
    machine = replace(this_machine(recipe, shape), num_processes=place()[1])
    plan = make_plan(recipe, shape, machine, settled)
    for note in plan.notes:
        emit(Notice(note))
    for reason in slow_kernels(recipe, shape, machine):
        emit(Notice(f"slower than it could be, and with more memory: {reason}", "warning"))
    if not plan.fits:
        emit(
            Notice(
                f"this run is predicted to need {plan.needed_bytes / 2**30:.1f} GiB, and {machine.name} has "
                f"{machine.memory_bytes / 2**30:.1f} GiB for it. {'; '.join(plan.remedies)}. See `qdense plan`",
                "warning",
            )
        )
    return plan


def _learning_rate(recipe: Recipe, shape: CatalogModel) -> float:
    given = recipe.training.learning_rate
    method = METHODS[recipe.adapter.method]
    return method.default_learning_rate(recipe.adapter, shape.hidden_size) if given == "auto" else given


def _num_warmup_steps(recipe: Recipe, num_steps: int, emit: Emit) -> int:
    given = recipe.training.warmup_steps
    if given == "auto":
        return int(_WARMUP_SHARE * num_steps)
    if given >= num_steps:
        emit(
            Notice(
                f"the warm-up (training.warmup_steps = {given}) is no shorter than the run ({num_steps} steps), so the learning "
                "rate never reaches training.learning_rate",
                "warning",
            )
        )
    return given


def _with_data(recipe: Recipe, data: DataRecipe) -> Recipe:
    return recipe.model_copy(update={"data": data})


def _template(recipe: Recipe, base: BaseModel, emit: Emit) -> Any:
    """The template by name. For a tokenizer without a chat template it is the one whose tokens it has; and whether a model
    that learns it will end its answers is checked."""
    name: str = recipe.data.template
    if name == "chat":
        name = chat_template_for(base.tokenizer)
        if name != "chat":
            emit(Notice(f'the tokenizer of {base.name} has no chat template: conversations are written as "{name}"'))
    template = template_named(name, base.tokenizer)
    if not template.adds_special_tokens and template.end_token is None:
        emit(
            Notice(
                f'the chat template "{name}" ends an answer with no special token of this tokenizer, so the model cannot learn '
                "where an answer ends, and will keep writing",
                "warning",
            )
        )
    return name


def _settled(recipe: Recipe, data: DataSet, learning_rate: float, num_warmup_steps: int) -> Recipe:
    """The recipe as the run's folder keeps it: with numbers for "auto", and with the recognised columns."""
    training = recipe.training.model_copy(update={"learning_rate": learning_rate, "warmup_steps": num_warmup_steps})
    is_known_set = recipe.data.name in TRAINING_SETS
    columns = recipe.data.columns if is_known_set else ColumnsRecipe(**data.columns._asdict())
    return recipe.model_copy(update={"training": training, "data": recipe.data.model_copy(update={"columns": columns})})


def _tell_of_data(recipe: Recipe, data: DataSet, emit: Emit) -> None:
    """Report which columns were recognised, and which rows were dropped."""
    if recipe.data.columns is None and data.columns != STANDARD_COLUMNS:
        loss_on = {"all": "all tokens", "response": "all answers", "last": "the last answer"}.get(
            recipe.data.train_on, ""
        )
        columns = data.columns
        where = columns.messages or f"{columns.instruction} and {columns.output}"
        found = {
            "pair": f"{columns.instruction} is the instruction, {columns.output} the output",
            "conversation": f"conversations in {where}; template {recipe.data.template}, loss on {loss_on}",
            "text": f"whole texts in {columns.text}; loss on all of their tokens",
        }[data.kind]
        emit(Notice(f"columns: {found}"))
    if data.skipped:
        total, num_skipped = len(data.rows) + len(data.skipped), len(data.skipped)
        shown = "; ".join(data.skipped[:3])
        more = "; ..." if num_skipped > 3 else ""
        emit(Notice(f"left out {counted(num_skipped, 'bad row')} of {total:,}: {shown}{more}", "warning"))


def _warn_of_test_items(name: str, data: DataSet, data_dir: Path | None, emit: Emit) -> None:
    """Report the benchmarks whose items are in the training set. Only test files that are already here are searched."""
    found, faults = local_overlaps(data, data_dir)
    held = [
        f"{task} ({overlap.num_exact:,} exact, {overlap.num_near:,} near of {overlap.num_items:,})"
        for task, overlap in found.items()
        if overlap.matches
    ]
    if held:
        emit(
            Notice(
                f"{name} contains test items of {', '.join(held)}: their scores may be too high. `qdense evaluate --clean` "
                f"also scores the rest; `qdense data check {name} TASKS` shows what was found",
                "warning",
            )
        )
    for fault in faults:
        emit(Notice(f"not searched for in the training set: {fault}", "warning"))


def _report_truncation(encoded: Encoded, recipe: Recipe, emit: Emit) -> None:
    if not encoded.num_truncated:
        return
    total = len(encoded.examples) + encoded.num_dropped
    dropped = f"; {encoded.num_dropped} of them have no answer left and are dropped" if encoded.num_dropped else ""
    emit(
        Notice(
            f"{encoded.num_truncated:,} of {total:,} training rows are longer than data.max_length = {recipe.data.max_length} "
            f"tokens and lose the end of their answer, {encoded.num_without_answer:,} all of it{dropped}",
            "warning",
        )
    )


def _facts(
    recipe: Recipe,
    base: BaseModel,
    model: Any,
    data: DataSet,
    training: Encoded,
    num_validation: int,
    plan: Plan,
    learning_rate: float,
) -> tuple[tuple[str, str], ...]:
    adapter, settings = recipe.adapter, recipe.training
    num_trainable = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    share = (
        100
        * num_trainable
        / (num_trainable + sum(_num_elements(p) for p in base.model.parameters() if not p.requires_grad))
    )
    method = METHODS[adapter.method]
    shown = {"r": f" r {adapter.r}", "alpha": f", alpha {adapter.scaling_alpha:g},"}
    settings_of_adapter = "".join(text for key, text in shown.items() if key in method.adapter_keys)
    dtype = adapter.dtype if method.is_adapter else recipe.model.dtype
    modules = ", ".join(name.removesuffix("_proj") for name in method.targets(adapter.on(base.model.config.model_type)))
    is_packed = settings.packing and why_not_packed(base.model) is None
    rate_source = f" ({adapter.method}'s default)" if settings.learning_rate == "auto" else ""
    epochs = f"{settings.max_steps} steps" if settings.max_steps else f"{settings.epochs:g} epochs"
    return (
        ("base", f"{recipe.model.name} ({recipe.model.quantization}, {recipe.model.dtype}) on {device_description(base.device)}"),
        ("adapter", f"{adapter.method}{settings_of_adapter} on {modules}"),
        ("trainable", f"{num_trainable:,} parameters, {share:.3g}% of the model, {dtype}"),
        ("data", f"{recipe.data.path or recipe.data.name}: {len(training.examples):,} rows"
                 f" of {len(data.rows) - num_validation:,}, {num_validation} more for validation"),
        ("training", f"{epochs}, batch {settings.batch_size}{', packed' if is_packed else ''}, "
                     f"learning rate {learning_rate:g}{rate_source}, {settings.optimizer}"),
        ("plan", f"{plan.summary}; {plan.predicted_memory_bytes / 2**30:.1f} GiB predicted"),
    )  # fmt: skip


def _num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of a base tensor; NF4 stores two in a byte, of whatever dtype."""
    return 2 * parameter.nbytes if hasattr(parameter, "quant_state") else parameter.numel()
