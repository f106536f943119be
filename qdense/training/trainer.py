"""transformers.Trainer, with what DenseLoRA needs of it: exact resumes, true losses, and no run that learns nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qdense.cache import require_free_space
from qdense.data.examples import Example, collate, join, pack
from qdense.device import peak_memory
from qdense.errors import RunError
from qdense.events import CheckpointSaved, Emit, Notice, StepDone, Validated, ValidationProgress
from qdense.methods import Method
from qdense.modeling.adapter_files import restore_state, save_state
from qdense.modeling.attach import trainable_parameters
from qdense.modeling.load import BaseModel
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention, why_not_packed
from qdense.modeling.recompute import Recompute, apply_recompute
from qdense.ops.cross_entropy import IGNORED
from qdense.planning.memory import Choice
from qdense.recipe import Recipe
from qdense.training.checkpoint import appearing_checkpoint, checkpoint_folder, checkpoints
from qdense.training.optimizer import build_optimizer
from qdense.training.signals import StopSignals

_BEST_WEIGHTS = "best.safetensors"
_STATE = "qdense.json"  # what else a resumed run needs
_MOST_SKIPPED = 10  # steps in a row


class AdapterTrainer(Trainer):
    """Trainer for an adapter on a frozen base.

    What differs from Trainer, and why:
      - Its batch is the whole optimizer step: examples, which are packed (or padded) into micro-batches here. The step's loss is
        the mean over its loss tokens, however they are split. Memory that runs out halves the micro-batches, and at one row has
        all layers recomputed where the recipe leaves that to the plan.
      - The optimizer is `build_optimizer`'s, with fp32 masters.
      - Checkpoints hold the adapter in PEFT's format, in its own dtype; Trainer's way of loading it back casts bf16 to
        fp32, and a resumed run would not be the same run.
      - Each checkpoint also holds the best adapter so far: nothing outside it decides how a resumed run ends.
      - Validation loss is the mean over all loss tokens, whatever the batches.
      - A loss that is not finite, and a parameter without a gradient, stop the run.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        base: BaseModel,
        model: Any,
        method: Method,
        choice: Choice,
        keeps_choice: bool,
        training: Sequence[Example],
        validation: Sequence[Example],
        checkpoint_dir: Path,
        emit: Emit,
        signals: StopSignals,
        sync_metrics: Callable[[], None],
        seconds_before: float = 0.0,
    ) -> None:
        self.recipe, self.emit, self.adapted, self.method = recipe, emit, model, method
        self.keeps_choice = keeps_choice  # of the checkpoint that it goes on from
        self.checkpoint_dir, self.signals, self.sync_metrics = checkpoint_dir, signals, sync_metrics
        self.pad_token_id = base.pad_token_id
        self.is_packed = recipe.training.packing
        if self.is_packed and (reason := why_not_packed(base.model)):
            emit(Notice(f"training.packing: {reason}; rows are padded instead", "warning"))
            self.is_packed = False
        self._follow(choice)
        self.best_step, self.best_loss, self.best_weights = 0, math.inf, {}  # type: int, float, dict[str, Tensor]
        self.progress = _ProgressCallback(self, emit, base.device, seconds_before)
        self.watch = _Watch(self)
        super().__init__(
            model=model,
            args=_training_arguments(recipe, base, checkpoint_dir, has_validation=bool(validation)),
            data_collator=lambda examples: {"examples": examples},
            train_dataset=training,
            eval_dataset=validation or None,
            callbacks=[self.watch, _Ranks(self), _Stop(self), self.progress],
        )
        self.remove_callback(PrinterCallback)

    def _follow(self, choice: Choice) -> None:
        """Cut up steps, and recompute, as `choice` says from now on."""
        self.choice = choice
        try:
            apply_recompute(self.adapted, Recompute(choice.recompute_layers, choice.offload, choice.mlp_tile_tokens))
        except ValueError as error:
            raise RunError(f"training.recompute: {error}") from error

    # --- optimizer --------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        settings = self.recipe.training
        self.optimizer = build_optimizer(
            settings.optimizer,
            [parameter for _, parameter in trainable_parameters(self.adapted)],
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            master_weights=self.recipe.adapter.master_weights and self.recipe.adapter.dtype == "bfloat16",
        )
        return self.optimizer

    # --- steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimizer step's examples."""
        model.train()
        is_cuda = self.args.device.type == "cuda"
        generators = torch.get_rng_state(), torch.cuda.get_rng_state() if is_cuda else None
        while True:
            try:
                return self._forward_and_backward(model, inputs["examples"])
            except (torch.OutOfMemoryError, MemoryError):
                smaller = self._smaller_choice()
                if smaller is None:
                    raise
            # Out of the handler: what the failed pass still held is free by now.
            if smaller.micro_batch_size < self.choice.micro_batch_size:
                what = f"micro-batches half as large, as with training.micro_batch_size = {smaller.micro_batch_size}"
            else:
                what = 'all layers recomputed, as with training.recompute = "all"'
            self._follow(smaller)
            self.emit(
                Notice(
                    f"step {self.state.global_step + 1}: out of memory; the step is repeated with {what}. "
                    f"The batch stays {len(inputs['examples'])}.",
                    "warning",
                )
            )
            model.zero_grad()
            torch.set_rng_state(generators[0])
            if generators[1] is not None:
                torch.cuda.set_rng_state(generators[1])
                torch.cuda.empty_cache()

    def _smaller_choice(self) -> Choice | None:
        """What needs less memory than the choice now; None if that is all that may be done."""
        if self.choice.micro_batch_size > 1:
            return replace(self.choice, micro_batch_size=(self.choice.micro_batch_size + 1) // 2)
        num_layers = int(self.adapted.config.num_hidden_layers)
        if self.recipe.training.recompute == "auto" and self.choice.recompute_layers < num_layers:
            return replace(self.choice, recompute_layers=num_layers)
        return None

    def _forward_and_backward(self, model: Any, examples: Sequence[Example]) -> Tensor:
        self.progress.micro_batches, self.progress.num_tokens = [], 0
        micro_batches = self._micro_batches(examples)
        num_labels = torch.tensor(max(1, sum(batch["num_labels"] for batch in micro_batches)), device=self.args.device)
        # Several processes average their gradients; the loss is a mean over the labels of all.
        num_labels, num_processes = self.accelerator.reduce(num_labels, "sum"), self.accelerator.num_processes
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with self._passes(1 / len(micro_batches)), nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self._loss(model, batch, num_labels) * num_processes
                self.progress.micro_batches.append((loss.detach(), batch["rows"]))
                self.accelerator.backward(loss)
            self.progress.num_tokens += batch["num_tokens"]
            total += loss.detach()
            del loss  # its graph holds the first checkpoint, which the next pass needs the room of
        return total

    def _micro_batches(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """A step's examples (or some to validate on) as the model takes them: packed, or padded."""
        size = self.choice.micro_batch_size
        if self.is_packed:
            batches = [join(group) for group in pack(examples, size * self.recipe.data.max_length)]
        else:
            groups = [examples[start : start + size] for start in range(0, len(examples), size)]
            batches = [collate(group, self.pad_token_id) for group in groups]
        for batch in batches:
            batch["num_labels"] = int((batch["labels"][:, 1:] != IGNORED).sum())
        return batches

    @contextmanager
    def _passes(self, share: float) -> Iterator[None]:
        """What surrounds each forward, and its backward, which may recompute it; `share`: see RankSchedule.weighing."""
        with ExitStack() as stack:
            stack.enter_context(without_logits(self.adapted))
            if self.is_packed:
                stack.enter_context(packed_attention(self.adapted))
            if self.method.schedule is not None:
                stack.enter_context(self.method.schedule.weighing(self.adapted, share))
            yield

    def _loss(self, model: Any, batch: dict[str, Any], num_labels: Tensor) -> Tensor:
        """The losses of a micro-batch's tokens, summed, over `num_labels`."""
        arguments = {key: value for key, value in batch.items() if key not in ("rows", "num_tokens", "num_labels")}
        arguments = self._prepare_inputs(arguments)
        loss: Tensor = model(**arguments, use_cache=False, num_items_in_batch=num_labels).loss
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer counts these by a tensor that its batches have and ours lack; nobody reads the figure

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss: mean over all loss tokens of the validation rows."""
        loader, schedule = self.get_eval_dataloader(), self.method.schedule
        was_training = self.adapted.training
        self.adapted.eval()
        total, count = 0.0, 0
        one = torch.ones((), device=self.args.device)
        for number, inputs in enumerate(loader, start=1):
            for batch in self._micro_batches(inputs["examples"]):
                with torch.no_grad(), self._passes(0.0):
                    total += float(self._loss(self.adapted, batch, one))
                count += batch["num_labels"]
            self.emit(ValidationProgress(number, len(loader)))
        self.adapted.train(was_training)
        loss_mean = total / count
        if not math.isfinite(loss_mean):
            raise RunError(f"step {self.state.global_step}: the validation loss is {loss_mean}. {_REMEDY}")
        has_settled = schedule is None or schedule.has_settled(self.adapted, self.state.global_step)
        is_best = has_settled and loss_mean < self.best_loss
        if is_best:
            self.best_step, self.best_loss = self.state.global_step, loss_mean
            self.best_weights = {name: p.detach().cpu().clone() for name, p in trainable_parameters(self.adapted)}
        self.emit(Validated(self.state.global_step, loss_mean, is_best))
        metrics = {"eval_loss": loss_mean}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def use_best(self) -> int:
        """Put the weights of the lowest validation loss into the model; returns their step."""
        for name, parameter in trainable_parameters(self.adapted):
            parameter.data.copy_(self.best_weights[name])
        return self.best_step

    # --- checkpoints --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        require_free_space(self.checkpoint_dir, checkpoint_bytes(self.adapted), f"checkpoint {step}")
        self.sync_metrics()  # a checkpoint without the metrics of its steps would leave a gap behind a power cut
        try:
            with appearing_checkpoint(self.checkpoint_dir, step) as self._building:
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            needed = checkpoint_bytes(self.adapted) / 2**20
            raise RunError(
                f"step {step}: the checkpoint cannot be written: {error}. It needs up to {needed:,.0f} MiB: check the space and "
                f"permissions of {self.checkpoint_dir}. {self.last_good_checkpoint}"
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer makes the checkpoint's folder."""
        return str(self._building)

    @property
    def last_good_checkpoint(self) -> str:
        """A sentence on where a run that stops now can go on from."""
        found = checkpoints(self.checkpoint_dir)
        if not found:
            return "There is no checkpoint yet: the run must start anew."
        return f"The last good checkpoint is {found[0]}; --resume goes on from it."

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_state(self.adapted, folder, self.method)
        state: dict[str, Any] = {
            "choice": asdict(self.choice),
            "best_step": self.best_step,
            "best_loss": None,
        }
        if self.best_weights:
            safetensors.torch.save_file(self.best_weights, folder / _BEST_WEIGHTS)
            state["best_loss"] = self.best_loss
        (folder / _STATE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore(Path(resume_from_checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bf16 needs no scaling of the loss. (Trainer would look for a file.)"""

    def restore(self, folder: Path) -> None:
        """Take weights, and the best ones so far, from a checkpoint; optimizer and order are Trainer's business."""
        if not (folder / _STATE).is_file():
            raise RunError(
                f"{folder}: has no {_STATE}: another version of qdense wrote it. Go on with that version, "
                "or start a new run with another --output."
            )
        restore_state(self.adapted, folder, self.method)
        state = json.loads((folder / _STATE).read_text())
        if self.keeps_choice:
            self._follow(Choice(**state["choice"]))
        if state["best_loss"] is not None:
            self.best_step, self.best_loss = state["best_step"], state["best_loss"]
            self.best_weights = safetensors.torch.load_file(folder / _BEST_WEIGHTS)


_REMEDY = "Lower training.learning_rate, or look at these rows."


class _Watch(TrainerCallback):
    """Stops a run whose loss is not finite, or in which a parameter cannot learn; tells of a loss that explodes."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer
        self.num_skipped = 0  # steps, one after the other
        self.mean_loss, self.lowest_mean, self.has_exploded = math.nan, math.inf, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        micro_batches = self.trainer.progress.micro_batches
        losses = torch.stack([loss for loss, _ in micro_batches]).float().cpu()
        named = list(trainable_parameters(self.trainer.adapted))
        # One transfer for all of them. Clipping has happened by now; it keeps zero, NaN and infinity what they are.
        norms = torch.stack(
            [losses.new_zeros((), device=p.device) if p.grad is None else p.grad.norm() for _, p in named]
        )
        norms = norms.float().cpu()
        if not torch.isfinite(losses).all():
            bad = [
                row
                for loss, (_, rows) in zip(losses, micro_batches, strict=True)
                if not loss.isfinite()
                for row in rows
            ]
            return self._skip_or_stop(f"step {step}: the loss is not finite; data rows {bad} (counted from 0).", named)
        if not torch.isfinite(norms).all():
            rows = [row for _, batch_rows in micro_batches for row in batch_rows]
            return self._skip_or_stop(
                f"step {step}: a gradient is not finite; data rows {rows} (counted from 0).", named
            )
        self.num_skipped = 0
        self._watch_for_explosion(step, float(losses.sum()))
        if step in (1, 3):
            awake = self.trainer.method.awake_at_start
            dead = [
                name for (name, _), norm in zip(named, norms, strict=True)
                if norm == 0 and (step == 3 or awake(name))
            ]  # fmt: skip
            if dead:
                raise RunError(
                    f"step {step}: {len(dead)} of {len(named)} trainable tensors have no gradient, so they would never learn: "
                    f"{', '.join(dead[:3])}{', ...' if len(dead) > 3 else ''}. This is a fault of the set-up, not of the data: "
                    "check adapter.target_modules and training.recompute, and report it."
                )

    def _skip_or_stop(self, what: str, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.num_skipped += 1
        if self.trainer.recipe.training.on_nonfinite == "stop":
            raise RunError(f"{what} {_REMEDY} {self.trainer.last_good_checkpoint}")
        if self.num_skipped > _MOST_SKIPPED:
            raise RunError(
                f"{what} {self.num_skipped} steps in a row would be skipped by now (training.on_nonfinite). {_REMEDY} "
                f"{self.trainer.last_good_checkpoint}"
            )
        for _, parameter in named:
            parameter.grad = None  # optimizers leave such a parameter alone, and their moments too
        self.trainer.emit(Notice(f"{what} This step changes nothing (training.on_nonfinite).", "warning"))

    def _watch_for_explosion(self, step: int, loss: float) -> None:
        self.mean_loss = loss if math.isnan(self.mean_loss) else 0.9 * self.mean_loss + 0.1 * loss
        self.lowest_mean = min(self.lowest_mean, self.mean_loss)
        if self.mean_loss > 2 * self.lowest_mean + 0.5 and not self.has_exploded:  # no such rise is the rows' doing
            self.has_exploded = True
            self.trainer.emit(
                Notice(
                    f"step {step}: the loss has exploded: its mean was {self.lowest_mean:.3g}, and is {self.mean_loss:.3g}. "
                    'Lower training.learning_rate; training.keep = "best" keeps the weights from before.',
                    "warning",
                )
            )


class _Stop(TrainerCallback):
    """Ends the run behind a step, with a checkpoint, when a signal has asked for it."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.signals.received is not None:
            control.should_save = control.should_training_stop = True


class _Ranks(TrainerCallback):
    """Runs the method's schedule, between the optimizer's step and the end of its gradients."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.method.schedule is None or self.trainer.watch.num_skipped:
            return
        self.trainer.method.schedule.step(self.trainer.adapted, state.global_step + 1)
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)  # accelerate wraps it
        if hasattr(optimizer, "adopt"):
            optimizer.adopt()


class _ProgressCallback(TrainerCallback):
    """Turns Trainer's steps into events."""

    def __init__(self, trainer: AdapterTrainer, emit: Emit, device: torch.device, seconds_before: float) -> None:
        self.trainer, self.emit, self.device = trainer, emit, device
        self.micro_batches: list[tuple[Tensor, list[int]]] = []
        self.num_tokens = 0
        self.peak_memory_bytes = 0
        self.seconds = seconds_before
        self._step_started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.monotonic()
        self.micro_batches, self.num_tokens = [], 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(sum(float(loss) for loss, _ in self.micro_batches))
        took = time.monotonic() - self._step_started
        self.seconds += took
        self.peak_memory_bytes = peak_memory(self.device)
        self.emit(
            StepDone(
                step=state.global_step,
                epoch=float(state.epoch),
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]),
                num_tokens=self.num_tokens,
                tokens_per_second=self.num_tokens / took,
                memory_bytes=self.peak_memory_bytes,
                seconds=self.seconds,
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.emit(
            CheckpointSaved(state.global_step, str(checkpoint_folder(self.trainer.checkpoint_dir, state.global_step)))
        )


def checkpoint_bytes(model: Any) -> int:
    """An upper bound: weights, fp32 masters, two moments and the best weights are at most 16 bytes a parameter."""
    return 16 * sum(parameter.numel() for _, parameter in trainable_parameters(model)) + 2**20


def _training_arguments(recipe: Recipe, base: BaseModel, folder: Path, *, has_validation: bool) -> TrainingArguments:
    settings = recipe.training
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is an error here, not something to average over
        eval_strategy="steps" if has_validation else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on a machine with several GPUs, one process uses one, not DataParallel
    return arguments
