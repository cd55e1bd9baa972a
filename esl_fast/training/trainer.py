"""The training loop."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from esl_fast.data import DataError, DataSet, EpochSampler, PairDataset, SizeAugmentation
from esl_fast.data.pairs import CACHE_BYTES, affordable_workers
from esl_fast.evaluation import Encoder, evaluate
from esl_fast.evaluation.protocol import autocast
from esl_fast.files import existing, replacing
from esl_fast.model import MatchingModel, load_checkpoint
from esl_fast.model.checkpoint import CheckpointError, write_model
from esl_fast.model.sequences import Features
from esl_fast.ops import contrastive_loss
from esl_fast.training.accumulate import backward_in_parts
from esl_fast.training.config import TrainConfig
from esl_fast.training.interrupt import Interrupted, Interrupts
from esl_fast.training.optim import lr_factor, make_optimizer, set_lr
from esl_fast.training.runs import BEST, LAST, RunLog, read_metrics
from esl_fast.training.state import read_state, write_state

# What a checkpoint remembers of the trainer itself.
REMEMBERED = (
    "step", "steps_per_epoch", "best_rsum", "best_step", "unsaved_rsum", "evals_since_best", "latest_r1",
    "validated_step",
)  # fmt: skip


class Trainer:
    """Trains ``model`` on a data set, in the folder ``run``; ``resume`` continues from its last checkpoint,
    whose model it must be.

    One step is one optimizer update on ``batch_size`` pairs. The order of pairs and their augmentation are functions of
    seed and epoch, the learning rate one of the step, so that a resumed run takes exactly the steps that an
    uninterrupted one takes.
    """

    def __init__(
        self, config: TrainConfig, data: DataSet, model: MatchingModel, run: Path, *, resume: bool = False
    ) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = next(model.parameters()).device
        self.model = model
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.pairs = PairDataset(data.train, model.image_transform, model.tokenize)
        if config.size_augmentation:
            self.pairs.augment = SizeAugmentation(
                self.pairs.tokens, model.special_tokens, model.word_starts, config.seed, config.size_augmentation
            )
        self.steps_per_epoch = len(self.pairs) // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size is {config.batch_size}, but the training split has {len(self.pairs)} pairs")
        self.total_steps = config.epochs * self.steps_per_epoch
        evaluations = min(config.evals_per_epoch, self.steps_per_epoch)
        self.eval_points = {round(k * self.steps_per_epoch / evaluations) for k in range(1, evaluations + 1)}
        self.validation = Encoder(data.val, config.eval_batch_size, config.workers, cache_bytes=CACHE_BYTES)
        self.step, self.evals_since_best, self.latest_r1 = 0, 0, 0.0
        self.best_rsum, self.best_step, self.unsaved_rsum = -1.0, 0, -1.0
        self.validated_step = -1
        if resume:
            self._restore()
        self.log = RunLog(run, self.step if resume else None)
        self.interrupts = Interrupts()

    def fit(self) -> dict[str, Any]:
        """Train to the end and evaluate the best checkpoint on the test split, or on validation where there is none.

        Returns:
            What :func:`esl_fast.evaluation.evaluate` says, ``split``, and of the best checkpoint ``best_step`` and
            ``best_val_rsum``.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after saving.
            DataError: an image cannot be read, after saving.
            KeyboardInterrupt: on a second Ctrl-C, at once.
            FloatingPointError: the loss is not finite.
            OSError: not even a first checkpoint can be saved.
        """
        with self.interrupts.caught():
            try:
                self._train()
                return self._test() | {"best_step": self.best_step, "best_val_rsum": self.best_rsum}
            except Interrupted as interrupt:
                interrupt.saved = self._save(LAST)
                raise
            except DataError as error:
                saved = f"step {self.step} of {self.total_steps} is saved" if self._save(LAST) else "nothing is saved"
                raise DataError(
                    f"{str(error).rstrip()}; {saved}: once that is mended, --resume {self.run} continues"
                ) from error

    def _train(self) -> None:
        self._validate_if_due()
        for epoch in range(self.step // self.steps_per_epoch, self.config.epochs):
            if self._exhausted():
                tqdm.write(f"stopping early: no better rsum in {self.evals_since_best} evaluations")
                break
            self._train_epoch(epoch)
            self.interrupts.stop_if_asked()
        if self.unsaved_rsum > self.best_rsum:
            warnings.warn(
                f"the best model, of validation rsum {self.unsaved_rsum:.1f}, could not be saved; "
                f"{self.run / BEST} is of rsum {self.best_rsum:.1f}",
                stacklevel=3,
            )

    def _test(self) -> dict[str, Any]:
        split = self.data.val if self.data.test is None else self.data.test
        result = evaluate(
            [lambda: load_checkpoint(self.run / BEST).to(self.device)],
            split,
            batch_size=self.config.eval_batch_size,
            workers=self.config.workers,
            precision=self.config.precision,
        )
        known = (entry for entry in read_metrics(self.run) if entry["kind"] == "test")
        if split is self.data.test and not any(entry["step"] == self.best_step for entry in known):
            self.log.write("test", self.best_step, **result["metrics"])
        return result | {"split": split.name}

    def _exhausted(self) -> bool:
        return 0 < self.config.patience <= self.evals_since_best

    def _train_epoch(self, epoch: int) -> None:
        done = self.step - epoch * self.steps_per_epoch
        if self.pairs.augment is not None:
            self.pairs.augment.epoch = epoch
        sampler = EpochSampler(len(self.pairs), self.config.seed, epoch, start=done * self.config.batch_size)
        loader = DataLoader(
            self.pairs,
            self.config.batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=affordable_workers(self.config.workers),
            pin_memory=self.device.type == "cuda",
            # The loader's own draw must not disturb the generators that a resumed run restores.
            generator=torch.Generator(),
            collate_fn=self.pairs.collate,
        )
        label = f"epoch {epoch + 1}/{self.config.epochs}"
        with tqdm(loader, label, self.steps_per_epoch, initial=done, unit="step", disable=None) as bar:
            clock = _Clock(self.step)
            for batch in bar:
                self.model.train()
                with self.interrupts.held_back():
                    with self._recognizing_divergence():
                        loss = self._train_step(batch)
                    if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                        self._report(bar, epoch, loss, clock.rate(self.step) * self.config.batch_size)
                if self._validate_if_due():
                    clock = _Clock(self.step)
                if self._exhausted():
                    return

    def _report(self, bar: tqdm, epoch: int, loss_on_device: Tensor, rate: float) -> None:
        loss = loss_on_device.item()  # only here does the loop wait for the device
        if not math.isfinite(loss):
            raise self._divergence(f"the loss is {loss}")
        norm = self.grad_norm.item()
        bar.set_postfix({"loss": f"{loss:.3f}", "images/s": f"{rate:.0f}", "R@1": f"{self.latest_r1:.1f}"})
        self.log.write(
            "train",
            self.step,
            epoch=epoch + 1,
            loss=loss,
            grad_norm=norm if math.isfinite(norm) else None,  # a step that fp16's scaler leaves out
            **{group["name"]: group["lr"] for group in self.optimizer.param_groups},
            logit_scale=self.model.logit_scale.exp().item(),
            images_per_s=round(rate, 1),
        )

    def _divergence(self, sign: str) -> FloatingPointError:
        return FloatingPointError(
            f"{sign} at step {self.step}: try a lower lr, or precision=bf16 or fp32; "
            f"the last good state is in {self.run / LAST}"
        )

    @contextmanager
    def _recognizing_divergence(self) -> Iterator[None]:
        """Features that are not finite, refused before there is a loss, are the model's fault once it has trained."""
        try:
            yield
        except ValueError as error:
            if not self.step or "non-finite" not in str(error):
                raise
            raise self._divergence(str(error)) from error

    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        """One optimizer update; returns the loss without waiting for it."""
        decay = self.config.decay_epoch * self.steps_per_epoch if self.config.schedule == "step" else None
        set_lr(self.optimizer, lr_factor(self.step, self.total_steps, self.config.warmup, decay))
        batch["tokens"] = self.model.trim(batch["tokens"])
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, self.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_logit_scale()
        self.step += 1
        return loss

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Gradients of the loss over the whole batch, encoded in ``accum_freq`` parts."""

        def loss_of(image_features: Features, text_features: Features) -> Tensor:
            return self._loss(image_features, text_features, batch["image_index"])

        if self.config.accum_freq > 1:
            return backward_in_parts(
                batch,
                self.config.accum_freq,
                model=self.model,
                encode=self._encode,
                loss_of=loss_of,
                scale=self.scaler.scale,
            )
        loss = loss_of(*self._encode(batch))
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _encode(self, batch: dict[str, Tensor]) -> tuple[Features, Features]:
        with autocast(self.device, self.config.precision):
            image_features = self.model.encode_image(batch["image"], batch.get("image_lengths"))
            text_features = self.model.encode_text(batch["tokens"])
        return image_features.float(), text_features.float()

    def _loss(self, image_features: Features, text_features: Features, image_index: Tensor) -> Tensor:
        scores = self.model.head.scores(image_features, text_features)
        if self.config.objective == "hinge":
            ids = None if self.config.same_image == "negative" else image_index
            hardest = self.step >= self.config.hinge_epochs * self.steps_per_epoch
            return scores.hinge_loss(ids, margin=self.config.margin, hardest=hardest)
        return contrastive_loss(
            *scores.factors(),
            self.model.logit_scale.exp(),
            image_ids=image_index,
            text_ids=image_index,
            same_owner=self.config.same_image,
        )

    def _validate_if_due(self) -> bool:
        """Evaluate on the validation split where the schedule says so; whether it did."""
        within = self.step % self.steps_per_epoch or (self.steps_per_epoch if self.step else 0)
        if self.step == self.validated_step or (self.step and within not in self.eval_points):
            return False
        with self._recognizing_divergence():
            metrics = self.validation.encode(self.model, self.config.precision).metrics()
        with self.interrupts.held_back():
            self._record(metrics)
        return True

    def _record(self, metrics: dict[str, float]) -> None:
        self.log.write("val", self.step, epoch=round(self.step / self.steps_per_epoch, 3), **metrics)
        self.validated_step = self.step
        self.latest_r1 = (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2
        better = metrics["rsum"] > self.best_rsum
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        tqdm.write(
            f"step {self.step}: validation rsum {metrics['rsum']:.1f} "
            f"(R@1 image-to-text {metrics['i2t_r1']:.1f}, text-to-image {metrics['t2i_r1']:.1f})"
            f"{' *' if better else ''}"
        )
        if better and self._save(BEST):
            self.best_rsum, self.best_step = metrics["rsum"], self.step
        elif better:
            self.unsaved_rsum = max(self.unsaved_rsum, metrics["rsum"])
        self._save(LAST)

    def _save(self, name: str) -> bool:
        """A checkpoint that replaces its predecessor whole or not at all; a failure must not cost the run."""
        progress = {name: getattr(self, name) for name in REMEMBERED} | {"scaler": self.scaler.state_dict()}
        try:
            with replacing(self.run / name) as folder:
                write_model(self.model, folder)
                if name == LAST:
                    write_state(folder, self.model, self.optimizer, progress)
        except (OSError, SafetensorError) as error:
            if not existing(self.run / name).exists():
                raise OSError(f"could not save {self.run / name}, the first checkpoint of its name: {error}") from error
            warnings.warn(
                f"could not save {self.run / name}: {error}; the checkpoint before it is intact. "
                "Make room; training goes on and saves again after the next evaluation.",
                stacklevel=2,
            )
            return False
        return True

    def _restore(self) -> None:
        folder = existing(self.run / LAST)
        try:
            progress = read_state(folder, self.model, self.optimizer)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()[:40])  # PyTorch lists every key
            raise CheckpointError(f"cannot resume from {folder}: {reason}") from error
        before, now = progress.get("steps_per_epoch", self.steps_per_epoch), self.steps_per_epoch
        if before != now:
            raise CheckpointError(
                f"cannot resume from {folder}: an epoch had {before} steps and now has {now}, "
                "with another batch_size or other training data"
            )
        for name in REMEMBERED:
            setattr(self, name, progress.get(name, getattr(self, name)))
        if progress["scaler"]:
            self.scaler.load_state_dict(progress["scaler"])


class _Clock:
    """Steps a second since it was last asked."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        return rate
