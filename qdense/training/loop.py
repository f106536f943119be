"""The training of an adapter, top to bottom.

    for each step: its rows, packed into micro-batches; forward and backward of each; clip; optimizer; schedule;
                    report; validate; save

What is special about training a small adapter on a frozen 4-bit base is elsewhere: fp32 masters in `optimizer.py`, what
a layer recomputes in `qdense/modeling/recompute.py`, the loss without logits in `qdense/modeling/loss.py`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import get_scheduler

from qdense.cache import require_free_space
from qdense.data.examples import Example
from qdense.data.templates import template_named
from qdense.device import free_cache, peak_memory
from qdense.errors import DivergedError, EvaluationError, RunError
from qdense.events import CheckpointSaved, Emit, Notice, Sampled, StepDone, Validated, ValidationProgress
from qdense.inference.generation import DECODINGS, Prompt, generate
from qdense.methods import Method
from qdense.modeling.attach import run_tensors, trainable_parameters
from qdense.modeling.load import BaseModel
from qdense.modeling.loss import without_logits
from qdense.modeling.neftune import noisy_embeddings
from qdense.modeling.packing import packed_attention, why_not_packed
from qdense.modeling.recompute import Recompute, apply_recompute
from qdense.ops.cross_entropy import IGNORED
from qdense.planning.memory import StepLayout
from qdense.processes import of_all
from qdense.recipe import Recipe
from qdense.runs import RunFolder
from qdense.training.batches import Batches, micro_batches, seed_step
from qdense.training.checkpoint import Checkpoint, last_good_checkpoint
from qdense.training.loss_scale import LossScale
from qdense.training.metrics import MetricsFile
from qdense.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, take_over_changes
from qdense.training.signals import StopSignals
from qdense.training.watch import REMEDY, Watch

_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """The parts of a training run.

    Attributes:
        model: the base with its adapter attached; trained parameters require gradients.
        learning_rate, num_warmup_steps: the highest rate, and the steps until it is reached.
        layout: how steps are divided; a checkpoint's own layout is used instead if `takes_saved_layout`.
        training, validation: tokenized rows.
        samples: training.sample_prompts, tokenized.
        metrics: receives every event, and is flushed to disk before each checkpoint; of several processes only the
            first has it.
    """

    recipe: Recipe
    base: BaseModel
    model: Any
    method: Method
    training: Sequence[Example]
    validation: Sequence[Example]
    samples: Sequence[Prompt]
    num_steps: int
    learning_rate: float
    num_warmup_steps: int
    layout: StepLayout
    takes_saved_layout: bool
    folder: RunFolder
    metrics: MetricsFile | None
    signals: StopSignals
    emit: Emit


@dataclass(frozen=True)
class _Share:
    """One process's share of a step: the loss and the rows of each micro-batch, and its tokens."""

    losses: list[float]
    rows: list[list[int]]
    num_tokens: int


class TrainingLoop:
    """Trains `job.model`. The loop itself is `run`.

    Attributes:
        step, saved_step: the last completed step, and that of the last checkpoint.
        layout: how steps are divided now; running out of memory changes it.
        best_step, best_loss, best_weights: of the lowest validation loss so far.
        seconds: time spent training so far, without validation and pauses between resumed parts.
    """

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        settings = job.recipe.training
        self.job, self.accelerator, self.emit = job, accelerator, job.emit
        self.is_packed, self.is_divided = settings.packing, settings.shard
        if self.is_packed and (reason := why_not_packed(job.base.model)):
            self.emit(Notice(f"training.packing: {reason}; rows are padded instead", "warning"))
            self.is_packed = False
        self.follow(job.layout)
        self.batches = Batches(job.training, settings.batch_size, settings.seed)
        self.parameters = dict(trainable_parameters(job.model))
        self.optimizer = build_optimizer(
            settings.optimizer,
            self._parameter_groups(),
            learning_rate=job.learning_rate,
            weight_decay=settings.weight_decay,
            master_weights=job.recipe.has_masters,
        )
        scheduler: Any = get_scheduler(
            settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=job.num_warmup_steps,
            num_training_steps=job.num_steps,
        )
        self.share_of_rate = scheduler.lr_lambdas[
            0
        ]  # a function of the number of completed steps, so it has no state to save
        self.scale = LossScale(is_used=job.recipe.model.dtype == "float16")
        self.watch = Watch(
            self.parameters,
            job.method.has_gradient_at_start,
            skips=settings.on_nonfinite == "skip",
            emit=self.emit,
            last_good=lambda: last_good_checkpoint(job.folder.checkpoints),
        )
        self.step = self.saved_step = 0
        self.best_step, self.best_loss = 0, math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = job.metrics.seconds if job.metrics else 0.0
        self.peak_memory_bytes = peak_memory(job.base.device)

    def run(self) -> None:
        """Train to the last step, or to the end of the step in which a signal arrives, and write a checkpoint there.

        Raises:
            DivergedError: a loss or gradient is not finite.
            RunError: a parameter cannot learn, or a checkpoint cannot be written.
            OutOfMemoryError: even one row at a time does not fit.
        """
        try:
            self._run()
        except DivergedError:
            raise
        except Exception:
            # Of several processes one failed, or is gone; the state is that of the last step, on this one too.
            if self.accelerator.num_processes > 1 and self.step > self.saved_step:
                with suppress(RunError):
                    self.save()
            raise

    def _run(self) -> None:
        settings, num_steps = self.job.recipe.training, self.job.num_steps
        is_stopped = self._is_stopped()
        while self.step < num_steps and not is_stopped and not self.has_stalled:
            started, step = time.monotonic(), self.step + 1
            self.job.model.train()
            while True:
                of_processes = of_all(partial(self._of_step, step), is_joint=self.is_divided)
                self._sum_gradients()
                if not self.scale.halves_for(parameter.grad for parameter in self.parameters.values()):
                    break
                self.optimizer.zero_grad()
            losses = [loss for each in of_processes for loss in each.losses]
            rows = [group for each in of_processes for group in each.rows]
            num_tokens = sum(each.num_tokens for each in of_processes)
            # Before clipping, which turns an infinite norm into zeros.
            is_allowed = self.watch.allows(step, losses, rows)
            grad_norm = self.accelerator.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm or math.inf)
            share_of_rate = self.share_of_rate(step - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share_of_rate
            if is_allowed:
                self.optimizer.step()
                if self.job.method.schedule is not None:
                    self.job.method.schedule.step(self.job.model, step)
                    take_over_changes(self.optimizer)
            self.optimizer.zero_grad()
            self.scale.grow()
            self.step = step

            took = time.monotonic() - started
            self.seconds += took
            self.peak_memory_bytes = peak_memory(self.job.base.device)
            self.emit(
                StepDone(
                    step=step,
                    epoch=self.batches.epochs_after(step),
                    loss=sum(losses),
                    learning_rate=self.job.learning_rate * share_of_rate,
                    grad_norm=float(grad_norm),
                    num_tokens=num_tokens,
                    tokens_per_second=num_tokens / took,
                    memory_bytes=self.peak_memory_bytes,
                    seconds=self.seconds,
                )
            )
            is_last, is_stopped = step == num_steps, self._is_stopped()
            if self.job.validation and (step % settings.eval_steps == 0 or is_last):
                self.validate()
            if self.has_stalled:
                since = f"no lower validation loss in {settings.patience} validations"
                self.emit(Notice(f"step {step}: {since} (training.patience): the run ends"))
            if step % settings.save_steps == 0 or is_last or is_stopped or self.has_stalled:
                self.save()

    @property
    def has_stalled(self) -> bool:
        """Whether the last `training.patience` validations have not lowered the loss.

        It is known from the best step alone, so a resumed run agrees.
        """
        settings = self.job.recipe.training
        if settings.patience is None or not self.best_step:
            return False
        return self.step - self.best_step >= settings.patience * settings.eval_steps

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by factor, each with its learning rate. Their order does not depend on the rates, because a
        checkpoint stores optimizer state by position."""
        rates, groups = self.job.recipe.training.rates, defaultdict[str, list[Tensor]](list)
        for name, parameter in self.parameters.items():
            groups[self.job.method.factor_of(name)].append(parameter)
        return [
            {"params": parameters, "lr": self.job.learning_rate * rates.get(factor, 1.0)}
            for factor, parameters in groups.items()
        ]

    # --- forward and backward ---------------------------------------------------------------------------------------------

    def _of_step(self, step: int) -> _Share:
        batches, losses = self.forward_and_backward(step, self.batches.of_step(step))
        return _Share(losses, [batch["rows"] for batch in batches], sum(batch["num_tokens"] for batch in batches))

    def forward_and_backward(self, step: int, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], list[float]]:
        """Compute the gradients of this process's share of one step's rows. If memory runs out, repeat the step in smaller
        pieces; the batch stays the same.

        Returns:
            The micro-batches, and the loss of each: the sum of its token losses over the number of labels in the whole step.
        """
        # The loss is a mean over the labels of the whole step, however it is divided.
        num_labels = sum(example.num_labels for example in examples)
        num_processes = self.accelerator.num_processes
        mine = examples[self.accelerator.process_index :: num_processes]
        while True:
            seed_step(self.job.recipe.training.seed, step, self.accelerator.process_index)
            try:
                return self._try_forward_and_backward(mine, max(1, num_labels), min(len(examples), num_processes))
            except (torch.OutOfMemoryError, MemoryError):
                smaller = self._smaller_layout()
                if smaller is None or self.is_divided:
                    raise
            # Outside the handler, where the memory of the failed pass is free.
            if smaller.micro_batch_size < self.layout.micro_batch_size:
                what = f"micro-batches half as large, as with training.micro_batch_size = {smaller.micro_batch_size}"
            else:
                what = 'all layers recomputed, as with training.recompute = "all"'
            self.follow(smaller)
            self.emit(
                Notice(
                    f"step {step}: out of memory; the step is repeated with {what}. The batch stays {len(examples)}.",
                    "warning",
                )
            )
            self.optimizer.zero_grad()
            free_cache(self.job.base.device)

    def _try_forward_and_backward(
        self, examples: Sequence[Example], num_labels: int, num_sharing: int
    ) -> tuple[list[dict[str, Any]], list[float]]:
        batches = self.micro_batches(examples)
        num_own = len(batches)
        batches += self._empty_batches(num_own)
        scale = self.scale.value
        # Scaled where the loss is computed: gradients of the logits are float16 already.
        divisor = torch.tensor(num_labels / scale, device=self.job.base.device)
        losses = []
        for number, batch in enumerate(batches):
            share = scale / (num_own * num_sharing) if number < num_own else 0.0
            with self.passes(share), self._noise(batch):
                loss = self.token_loss(self.job.model, batch, divisor)
                loss.backward()
            losses.append(loss.detach().float() / scale)
            del loss  # its graph holds the first checkpoint, whose memory the next pass needs
        return batches, torch.stack(losses).tolist() if losses else []

    def _empty_batches(self, num_own: int) -> list[dict[str, Any]]:
        """Micro-batches without labels, as many as another process has more: all call a divided base equally often."""
        if not self.is_divided:
            return []
        most = max(of_all(lambda: num_own))
        first = self.job.training[0]
        unlabelled = Example(first.row, first.input_ids, np.full_like(first.labels, IGNORED))
        (batch,) = self.micro_batches([unlabelled])
        return [batch | {"rows": [], "num_tokens": 0, "num_labels": 0}] * (most - num_own)

    def _sum_gradients(self) -> None:
        """Sum over all processes once a step, so that each can divide its rows as its own memory requires."""
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters.values():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(gradient.to(parameter.grad_dtype), "sum")

    def _summed(self, *values: float) -> list[float]:
        """These numbers, summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        total: Tensor = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.job.base.device), "sum"
        )
        return total.tolist()

    def _is_stopped(self) -> bool:
        """Whether any process has received a signal."""
        return self._summed(float(self.job.signals.received is not None))[0] > 0

    def micro_batches(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Rows of a step or of a validation as input for the model: packed, or padded."""
        return micro_batches(
            examples,
            self.layout.micro_batch_size,
            max_length=self.job.recipe.data.max_length if self.is_packed else None,
            pad_token_id=self.job.base.pad_token_id,
        )

    @contextmanager
    def passes(self, share: float) -> Iterator[None]:
        """The context of each forward and its backward, which may recompute it. For `share` see RankSchedule.auxiliary_loss."""
        with ExitStack() as stack:
            stack.enter_context(without_logits(self.job.model))
            if self.is_packed:
                stack.enter_context(packed_attention(self.job.model))
            if self.job.method.schedule is not None:
                stack.enter_context(self.job.method.schedule.auxiliary_loss(self.job.model, share))
            yield

    def _noise(self, batch: dict[str, Any]) -> AbstractContextManager[None]:
        lengths = batch["lengths"] if self.is_packed else batch["attention_mask"].sum(dim=1).tolist()
        return noisy_embeddings(self.job.model, self.job.recipe.training.neftune, lengths, is_packed=self.is_packed)

    def token_loss(self, model: Any, batch: dict[str, Any], num_labels: Tensor) -> Tensor:
        """The sum of a micro-batch's token losses, divided by `num_labels`: a scalar."""
        arguments = {
            key: value.to(self.job.base.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in ("rows", "num_tokens", "num_labels")
        }
        loss: Tensor = model(**arguments, use_cache=False, num_items_in_batch=num_labels).loss
        return loss

    def follow(self, layout: StepLayout) -> None:
        """From now on divide steps and recompute layers as `layout` says."""
        self.layout = layout
        try:
            apply_recompute(self.job.model, Recompute(layout.recompute_layers, layout.offload, layout.mlp_tile_tokens))
        except ValueError as error:
            raise RunError(f"training.recompute: {error}") from error

    def _smaller_layout(self) -> StepLayout | None:
        """A layout that needs less memory than the current one; None if there is none."""
        if self.layout.micro_batch_size > 1:
            return replace(self.layout, micro_batch_size=(self.layout.micro_batch_size + 1) // 2)
        num_layers = int(self.job.model.config.num_hidden_layers)
        if self.job.recipe.training.recompute == "auto" and self.layout.recompute_layers < num_layers:
            return replace(self.layout, recompute_layers=num_layers)
        return None

    # --- validation -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Compute the validation loss, a mean over all loss tokens of the validation rows, and keep the best weights so far."""
        rows = self.job.validation[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.job.recipe.training.batch_size
        starts = range(0, -(-len(self.job.validation) // self.accelerator.num_processes), size)
        self.job.model.eval()
        total, count = 0.0, 0.0
        one = torch.ones((), device=self.job.base.device)
        for number, start in enumerate(starts, start=1):
            batches = self.micro_batches(rows[start : start + size])
            for batch in batches + self._empty_batches(len(batches)):
                with torch.no_grad(), self.passes(0.0):
                    total += float(self.token_loss(self.job.model, batch, one))
                count += batch["num_labels"]
            self.emit(ValidationProgress(number, len(starts)))
        total, count = self._summed(total, count)
        loss = total / count
        if not math.isfinite(loss):
            raise DivergedError(f"step {self.step}: the validation loss is {loss}. {REMEDY}")
        schedule = self.job.method.schedule
        has_settled = schedule is None or schedule.has_settled(self.job.model, self.step)
        is_best = has_settled and loss < self.best_loss
        if is_best:
            self.best_step, self.best_loss = self.step, loss
            if self.job.recipe.training.keep == "best":
                self.best_weights = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self.emit(Validated(self.step, loss, is_best))
        if self.job.samples and self.accelerator.is_main_process:
            self.sample()

    def sample(self) -> None:
        """Answer training.sample_prompts, each with the likeliest tokens."""
        job = self.job
        template = template_named(job.recipe.data.template, job.base.tokenizer)
        try:
            for completion in generate(
                job.base,
                job.model,
                job.samples,
                DECODINGS["greedy"],
                max_new_tokens=_SAMPLE_TOKENS,
                stop=template.stop,
                end_token=template.end_token,
                batch_size=len(job.samples),
            ):
                prompt = job.recipe.training.sample_prompts[completion.index]
                self.emit(Sampled(self.step, prompt, completion.completion))
        except EvaluationError as error:  # a sample is not worth a run
            self.emit(Notice(f"step {self.step}: training.sample_prompts: {error}", "warning"))

    @torch.no_grad()
    def use_best(self) -> int:
        """Load the weights with the lowest validation loss, if there are any; returns the step of the weights in the model."""
        if not self.best_weights:
            return self.step
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best_weights[name])
        return self.best_step

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. Raises RunError, which names the checkpoint to resume from."""
        if self.job.metrics is None:
            return
        folder = self.job.folder.checkpoints
        if not self.job.folder.recipe.is_file():
            raise RunError(
                f"step {self.step}: the run's folder {self.job.folder.path} was moved or removed during the run, so nothing "
                "more can be saved there. If it was moved, continue with --resume and its new place as --output."
            )
        needed_bytes = checkpoint_bytes(self.job.model, has_schedule=self.job.method.schedule is not None)
        require_free_space(folder, needed_bytes, f"checkpoint {self.step}")
        self.job.metrics.sync()  # a checkpoint without the metrics of its steps would leave a gap after a power cut
        try:
            path = self._checkpoint().save(folder)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"step {self.step}: the checkpoint cannot be written: {error}. It needs up to {needed_bytes / 2**20:,.0f} MiB: "
                f"check the space and permissions of {folder}. {last_good_checkpoint(folder)}"
            ) from error
        self.saved_step = self.step
        self.emit(CheckpointSaved(self.step, str(path)))

    def _checkpoint(self) -> Checkpoint:
        schedule = self.job.method.schedule
        averages, ranks = schedule.state(self.job.model) if schedule is not None else ({}, None)
        tensors, numbers = optimizer_state(self.optimizer)
        values = {
            "layout": asdict(self.layout),
            "best_step": self.best_step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,  # JSON has no infinity
            "optimizer": numbers,
            "schedule": ranks,
            "loss_scale": self.scale.state(),
        }
        return Checkpoint(self.step, run_tensors(self.job.model), self.best_weights, tensors, averages, values)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint was written. Raises RunError where it does not fit this run."""
        values, tensors = checkpoint.values, run_tensors(self.job.model)
        try:
            if tensors.keys() != checkpoint.weights.keys():
                odd = sorted(tensors.keys() ^ checkpoint.weights.keys())
                raise KeyError(f"{len(odd)} tensors are missing or unknown: {odd[0]}")
            if checkpoint.step > self.job.num_steps:
                raise ValueError(f"the run now has {self.job.num_steps} steps")
            for name, tensor in tensors.items():
                saved = checkpoint.weights[name]
                if saved.shape != tensor.shape:
                    raise ValueError(f"{name} is {list(saved.shape)} there and {list(tensor.shape)} here")
                tensor.copy_(saved)
            load_optimizer_state(self.optimizer, checkpoint.optimizer, values["optimizer"])
            if self.job.method.schedule is not None:
                self.job.method.schedule.restore(self.job.model, checkpoint.schedule, values["schedule"])
            self.scale.restore(values.get("loss_scale"))
            if self.job.takes_saved_layout:
                self.follow(StepLayout(**values["layout"]))
            # A run that kept the last weights has no best ones. If it should keep them now, it starts looking here.
            if values["best_loss"] is not None and (checkpoint.best or self.job.recipe.training.keep == "last"):
                self.best_step, self.best_loss = values["best_step"], values["best_loss"]
                self.best_weights = checkpoint.best
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"checkpoint {checkpoint.step} of {self.job.folder.path} does not fit this run: {error}. Remove it to continue "
                "from the one before, or start a new run."
            ) from error
        self.step = self.saved_step = checkpoint.step


def checkpoint_bytes(model: Any, *, has_schedule: bool = False) -> int:
    """An upper bound: weights, fp32 masters, two moments and the best weights take at most 16 bytes a parameter, AdaLoRA's
    three averages 12."""
    frozen = sum(tensor.numel() for tensor in run_tensors(model).values() if not tensor.requires_grad)
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    return (28 if has_schedule else 16) * trained + 4 * frozen + 2**20
