"""One training run, from a validated recipe to a saved adapter.

A run's folder:
    recipe.toml     the resolved recipe, with [provenance]: versions, device, data checksum, base fingerprint, git hash
                    and the plan's choice, which a resumed run keeps
    metrics.jsonl   a line for each step and each validation
    initial.safetensors  the trained tensors before the first step (not of full fine-tuning: they are the base's)
    adapter/        the result: PEFT's files and qdense.json
    checkpoints/    what --resume goes on from
    eval/           what `qdense evaluate` found
"""

from __future__ import annotations

import math
import os
import pickle
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from transformers import set_seed

from qdense.benchmarks.tasks import TASKS
from qdense.cache import appearing_folder, require_free_space, write_atomically
from qdense.catalogs.datasets import TRAINING_SETS
from qdense.data.contamination import overlaps
from qdense.data.examples import Encoded, collate, encode_rows, split_rows
from qdense.data.sources import DataSet, load_training_set, local_test_set
from qdense.device import device_name, memory_total, peak_memory
from qdense.errors import QDenseError, RunError, RunStopped
from qdense.events import Emit, Notice, TrainingDone, TrainingStarted
from qdense.methods import METHODS
from qdense.modeling.adapter_files import AdapterCard, save_adapter, save_trainable
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.liger import use_liger
from qdense.modeling.load import BaseModel, load_base
from qdense.modeling.locate import fetched_shape
from qdense.ops.kernels import use_kernels
from qdense.planning.machine import slow_kernels, this_machine
from qdense.planning.memory import Choice
from qdense.planning.plan import Plan, make_plan
from qdense.provenance import git_hash, package_versions
from qdense.recipe import Recipe
from qdense.training.checkpoint import CHECKPOINTS_TO_KEEP, checkpoint_step
from qdense.training.metrics import MetricsFile
from qdense.training.resume import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    INITIAL_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    Resumed,
    checkpoint_to_resume,
    refuse_other_inputs,
    running,
    sole_owner,
)
from qdense.training.signals import StopSignals
from qdense.training.trainer import AdapterTrainer, checkpoint_bytes


def train(recipe: Recipe, *, resume: bool, data_dir: Path | None, emit: Emit, accept_changes: bool = False) -> Path:
    """Train the adapter that `recipe` describes and save it.

    Args:
        resume: go on from the last checkpoint in `output.dir`; without one, start afresh and say so.
        data_dir: a folder in LLM-Adapters' layout, for data sets known by name.
        emit: is given the events of `qdense.events`.
        accept_changes: resume although recipe, data, base or versions are not those that the run began with.

    Returns:
        The run's folder.

    Raises:
        QDenseError: whatever keeps the run from starting, or must stop it; RunStopped when a signal has.
    """
    run_dir = Path(recipe.output.dir)
    with sole_owner(run_dir):
        resumed = checkpoint_to_resume(recipe, run_dir, emit, resume=resume, accept_changes=accept_changes)
        _train(recipe, run_dir, resumed, data_dir, emit, accept_changes)
    return run_dir


def _train(
    recipe: Recipe, run_dir: Path, resumed: Resumed | None, data_dir: Path | None, emit: Emit, accept_changes: bool
) -> None:

    def notice(text: str) -> None:
        emit(Notice(text))

    # Data before the model: its faults are the commonest, and found in a second.
    data = load_training_set(recipe.data, data_dir, emit)
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
        notice(f"not read by method {recipe.adapter.method}: {keys}")
    plan = _plan(recipe, resumed.choice if resumed else None, emit)
    base = load_base(recipe.model, notice)
    use_kernels(recipe.training.kernels)
    if plan.machine.kernels.has_liger:
        use_liger(base.model)
    training = encode_rows(data.rows, split.training, base.tokenizer, recipe.data)
    validation = encode_rows(data.rows, split.validation, base.tokenizer, recipe.data) if split.validation else None
    _report_truncation(training, recipe, emit)
    num_steps = _num_steps(recipe, len(training.examples))

    if recipe.training.warmup_steps >= num_steps:
        emit(
            Notice(
                f"the warm-up (training.warmup_steps = {recipe.training.warmup_steps}) is as long as the run ({num_steps} steps) "
                "or longer: the learning rate never reaches training.learning_rate",
                "warning",
            )
        )

    set_seed(recipe.training.seed)
    method = METHODS[recipe.adapter.method]
    num_rows = method.num_calibration_rows(recipe.adapter)
    calibration = [collate([example], base.pad_token_id) for example in training.examples[:num_rows]]
    model = attach_adapter(base, recipe.adapter, num_steps, calibration)
    num_trainable = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    # One more than are kept: the oldest goes only once the newest is written. And room for the result and the metrics.
    require_free_space(
        run_dir, (CHECKPOINTS_TO_KEEP + 1) * checkpoint_bytes(model) + 64 * 2**20, "the run's checkpoints"
    )
    facts = _facts(recipe, base, data, training, len(split.validation), num_trainable, plan)
    if resumed is not None:
        refuse_other_inputs(
            run_dir,
            data_checksum=data.checksum,
            data=data.origin,
            fingerprint=base.fingerprint,
            base=base.name,
            accept_changes=accept_changes,
            emit=emit,
        )
    provenance = {
        **_provenance(data, base),
        "num_steps": num_steps,
        "num_training_rows": len(training.examples),
        "num_validation_rows": len(split.validation),
        "plan": plan.record(),
        "summary": dict(facts),
    }
    write_atomically(run_dir / RECIPE_FILE, tomli_w.dumps({**recipe.resolved(), "provenance": provenance}))
    if resumed is None and method.is_adapter:
        save_trainable(model, run_dir / INITIAL_FILE)
    first_step = checkpoint_step(resumed.checkpoint) if resumed else 0
    metrics = MetricsFile(run_dir / METRICS_FILE, resume_step=first_step)

    def emit_all(event: Any) -> None:
        metrics(event)
        emit(event)

    with running(run_dir, plan, memory_total(base.device)), StopSignals(emit) as signals:
        trainer = AdapterTrainer(
            recipe=recipe,
            base=base,
            model=model,
            method=method,
            choice=plan.choice,
            keeps_choice=resumed is None or resumed.choice is not None,
            training=training.examples,
            validation=validation.examples if validation else [],
            checkpoint_dir=run_dir / CHECKPOINT_DIR,
            emit=emit_all,
            signals=signals,
            sync_metrics=metrics.sync,
            seconds_before=metrics.seconds,
        )
        emit(
            TrainingStarted(
                title=f"{recipe.adapter.method} on {recipe.model.name}",
                facts=facts,
                num_steps=num_steps,
                first_step=first_step,
                memory_total_bytes=memory_total(base.device),
                memory_name="GPU" if base.device.type == "cuda" else "process",
            )
        )
        try:
            if resumed and first_step >= num_steps:
                # Killed between the last checkpoint and the result. Trainer would train one step too many.
                trainer.restore(resumed.checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(resumed.checkpoint) if resumed else None)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(error, trainer, plan, base.device) from error
        except (
            pickle.UnpicklingError,
            EOFError,
            SafetensorError,
        ) as error:  # while it is read; its checksums are right
            raise RunError(
                f"{resumed.checkpoint if resumed else run_dir}: holds what no run of qdense has written, and is not read: "
                f"{str(error).splitlines()[0]} Remove it to go on from the checkpoint before, or start a new run."
            ) from None
        finally:
            metrics.close()
        if signals.received is not None and trainer.state.global_step < num_steps:
            raise RunStopped(
                f"stopped by {signals.received.name} behind step {trainer.state.global_step} of {num_steps}. "
                f"{trainer.last_good_checkpoint}",
                signals.received,
            )
    # Trainer validates after the last step too, so there always is a best.
    kept_step = trainer.use_best() if recipe.training.keep == "best" else num_steps
    card = AdapterCard(
        model=recipe.model.model_dump(exclude_none=True, exclude={"device"}) | {"name": base.reference},
        fingerprint=base.fingerprint,
        template=recipe.data.template,
        method=recipe.adapter.method,
    )
    with appearing_folder(run_dir / ADAPTER_DIR) as building:
        save_adapter(model, building, card)
    emit(
        TrainingDone(
            adapter_dir=str(run_dir / ADAPTER_DIR),
            num_steps=num_steps,
            kept_step=kept_step,
            seconds=trainer.progress.seconds,
            peak_memory_bytes=trainer.progress.peak_memory_bytes,
            predicted_memory_bytes=plan.predicted_memory_bytes,
        )
    )


def _out_of_memory(error: BaseException, trainer: AdapterTrainer, plan: Plan, device: torch.device) -> RunError:
    """What was planned, what was used, what to lower."""
    choice, gib = trainer.choice, 2**30
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"step {trainer.state.global_step + 1}: out of memory, one row at a time: {what}. "
        f"Planned: {plan.predicted_memory_bytes / gib:.1f} GiB for {plan.summary}; used at most: "
        f"{peak_memory(device) / gib:.1f} GiB of {memory_total(device) / gib:.1f} GiB. Close what else uses the memory, set "
        f'training.recompute = "all" ({choice.recompute_layers} layers now) or lower data.max_length (a changed recipe needs '
        f"--accept-changes). {trainer.last_good_checkpoint}"
    )


def _plan(recipe: Recipe, settled: Choice | None, emit: Emit) -> Plan:
    """The run's plan, from shapes, before the model is loaded; `settled` is what a resumed run began with.

    Raises ModelError where the model's shapes cannot be known.
    """
    shape = fetched_shape(recipe.model)
    machine = this_machine(recipe, shape)
    plan = make_plan(recipe, shape, machine, settled)
    for reason in slow_kernels(recipe, shape, machine):
        emit(Notice(f"slower, and with more memory, than it could be: {reason}", "warning"))
    if not plan.fits:
        emit(
            Notice(
                f"this run is predicted to need {plan.needed_bytes / 2**30:.1f} GiB, and {machine.name} has "
                f"{machine.memory_bytes / 2**30:.1f} GiB for it. {'; '.join(plan.remedies)}. See `qdense plan`",
                "warning",
            )
        )
    return plan


def _num_steps(recipe: Recipe, num_examples: int) -> int:
    settings = recipe.training
    if settings.max_steps is not None:
        return settings.max_steps
    return math.ceil(settings.epochs * math.ceil(num_examples / settings.batch_size))


def _warn_of_test_items(name: str, data: DataSet, data_dir: Path | None, emit: Emit) -> None:
    """Say which benchmarks the training set holds items of, as far as their test files are here: nothing is downloaded."""
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes would all say the same
        return
    tests, faults = {}, []
    for task in TASKS.values():
        try:
            test = local_test_set(task.file, data_dir)
        except (QDenseError, OSError) as error:  # no reason not to train
            faults.append(str(error))
            continue
        if test is not None:
            tests[task.name] = test
    held = [
        f"{task} ({overlap.num_exact:,} exact, {overlap.num_near:,} near of {overlap.num_items:,})"
        for task, overlap in overlaps(data, tests).items()
        if overlap.matches
    ]
    if held:
        emit(
            Notice(
                f"{name} holds test items of {', '.join(held)}: those scores may be too high. `qdense evaluate --clean` "
                f"also scores the rest; `qdense data check {name} TASKS` shows what was found",
                "warning",
            )
        )
    for fault in dict.fromkeys(faults):
        emit(Notice(f"not looked for in the training set: {fault}", "warning"))


def _report_truncation(encoded: Encoded, recipe: Recipe, emit: Emit) -> None:
    if not encoded.num_truncated:
        return
    total = len(encoded.examples) + encoded.num_dropped
    dropped = (
        f"; {encoded.num_dropped} of them have nothing left to learn from and are left out"
        if encoded.num_dropped
        else ""
    )
    emit(
        Notice(
            f"{encoded.num_truncated:,} of {total:,} training rows are longer than data.max_length = {recipe.data.max_length} "
            f"tokens: they lose the end of their answer, {encoded.num_without_answer:,} all of it{dropped}",
            "warning",
        )
    )


def _facts(
    recipe: Recipe,
    base: BaseModel,
    data: DataSet,
    training: Encoded,
    num_validation: int,
    num_trainable: int,
    plan: Plan,
) -> tuple[tuple[str, str], ...]:
    adapter, settings = recipe.adapter, recipe.training
    share = (
        100
        * num_trainable
        / (num_trainable + sum(_num_elements(p) for p in base.model.parameters() if not p.requires_grad))
    )
    method = METHODS[adapter.method]
    shown = {"r": f" r {adapter.r}", "alpha": f", alpha {adapter.scaling_alpha:g},"}
    settings_of_adapter = "".join(text for key, text in shown.items() if key in method.uses)
    dtype = adapter.dtype if method.is_adapter else recipe.model.dtype
    modules = ", ".join(name.removesuffix("_proj") for name in method.targets(adapter))
    epochs = f"{settings.max_steps} steps" if settings.max_steps else f"{settings.epochs:g} epochs"
    return (
        ("base", f"{recipe.model.name} ({recipe.model.quantization}, {recipe.model.dtype}) on {device_name(base.device)}"),
        ("adapter", f"{adapter.method}{settings_of_adapter} on {modules}"),
        ("trainable", f"{num_trainable:,} parameters, {share:.3g}% of the model, {dtype}"),
        ("data", f"{recipe.data.path or recipe.data.name}: {len(training.examples):,} rows"
                 f" of {len(data.rows) - num_validation:,}, {num_validation} more for validation"),
        ("training", f"{epochs}, batch {settings.batch_size}{', packed' if settings.packing else ''}, "
                     f"lr {settings.learning_rate:g}, {settings.optimizer}"),
        ("plan", f"{plan.summary}; {plan.predicted_memory_bytes / 2**30:.1f} GiB predicted"),
    )  # fmt: skip


def _num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of a base tensor; two of NF4 lie in one byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _provenance(data: DataSet, base: BaseModel) -> dict[str, Any]:
    """What made a run, for recipe.toml."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(base.device),
        "git_hash": git_hash(),
        "versions": package_versions(),
        "data": {"origin": data.origin, "sha256": data.checksum, "num_rows": len(data.rows)},
        "base_fingerprint": base.fingerprint,
    }
