"""Fine-tuning: a compressed network trained further, by labels or by the dense network as teacher."""

import copy
import math
import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.layers.base import harden, relax
from weft.measure import batch_size, call, device_of, evaluating, labelled, logits_of, paired, to_device
from weft.progress import track
from weft.schemes.result import Result


@dataclass(frozen=True)
class FineTune:
    """Trains every weight that is not frozen.

    Args:
        epochs: passes over the batches.
        learning_rate: of AdamW, decayed by a half cosine to zero.
        weight_decay: of AdamW.
        label_share: with a teacher and labels, the labels' share of the loss; the teacher's is the rest.
        temperature: softens the teacher's and the student's scores.
        optimiser: makes an optimiser from the trainable parameters; AdamW where None.
        loss: takes scores and labels and gives the mean loss; cross-entropy where None.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    label_share: float = 0.0
    temperature: float = 2.0
    optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        checks.integer_between("epochs", self.epochs, 1, None)
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("temperature", self.temperature)
        if not self.weight_decay >= 0:
            raise ValueError(checks.fault("weight_decay", "at least 0", self.weight_decay, "use 0 for none"))
        checks.share("label_share", self.label_share, zero_allowed=True)

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: nn.Module | None = None,
        shown: bool | None = None,
    ) -> Result:
        """Trains a copy of the model.

        Args:
            model: the compressed network; it is not changed.
            batches: (inputs, labels) pairs that can be iterated once per epoch; with a teacher and no label
                share inputs alone serve too.
            teacher: the dense network; its scores are the target.
            shown: whether to draw a progress bar; where None, only on a terminal.

        Returns:
            The trained network in the modes of the given one, and one log entry per step: step, epoch, loss,
            seconds.

        Raises:
            ValueError: nothing can be trained, there are no batches, or the loss became NaN or infinite.
        """
        student = copy.deepcopy(model)
        relax(student)
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not parameters:
            remedy = "unfreeze some weights"
            raise ValueError(
                checks.fault("model", "one with weights to train", "none that requires a gradient", remedy)
            )
        log = self._train(student, parameters, batches, teacher, shown)
        harden(student)
        modes = {name: module.training for name, module in model.named_modules()}
        for name, module in student.named_modules():
            module.training = modes.get(name, module.training)
        return Result(student, log)

    def _train(
        self,
        student: nn.Module,
        parameters: list[nn.Parameter],
        batches: Iterable[Any],
        teacher: nn.Module | None,
        shown: bool | None,
    ) -> list[dict[str, Any]]:
        optimiser = (
            torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
            if self.optimiser is None
            else self.optimiser(parameters)
        )
        length = operator.length_hint(batches)
        scheduler = None
        if length:
            total = length * self.epochs

            def cosine(step: int) -> float:
                return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))

            scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine)
        log: list[dict[str, Any]] = []
        start = time.perf_counter()
        student.train()
        for epoch in range(self.epochs):
            steps_before = len(log)
            for batch in track(batches, f"fine-tuning, epoch {epoch + 1} of {self.epochs}", shown=shown):
                if not batch_size(batch):
                    continue
                loss = self._loss(student, to_device(batch, device_of(student)), teacher)
                value = float(loss.detach())
                if not math.isfinite(value):
                    got = f"{value} at step {len(log)}"
                    remedy = f"lower the learning rate ({self.learning_rate}) or check the data"
                    raise ValueError(checks.fault("loss", "finite", got, remedy))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                if scheduler is not None:
                    scheduler.step()
                seconds = time.perf_counter() - start
                log.append({"step": len(log), "epoch": epoch, "loss": value, "seconds": seconds})
            if len(log) == steps_before:
                remedy = "pass a list or a DataLoader, not an iterator that is used up"
                got = f"no batches in epoch {epoch + 1}"
                raise ValueError(checks.fault("batches", "not empty", got, remedy))
        return log

    def _loss(self, student: nn.Module, batch: Any, teacher: nn.Module | None) -> Tensor:
        if teacher is None:
            given, labels = self._split(batch)
            return self._label_loss(logits_of(call(student, given)), labels)
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        given = batch[0] if pair else batch
        scores = logits_of(call(student, given)) / self.temperature
        with torch.no_grad(), evaluating(teacher):
            target = logits_of(call(teacher, given)) / self.temperature
        loss = F.kl_div(
            scores.log_softmax(-1).flatten(0, -2),
            target.log_softmax(-1).flatten(0, -2),
            log_target=True,
            reduction="batchmean",
        )
        loss = loss * self.temperature**2  # keeps the gradient's size whatever the temperature
        if self.label_share:
            _, labels = self._split(batch)
            supervised = self._label_loss(scores * self.temperature, labels)
            loss = (1 - self.label_share) * loss + self.label_share * supervised
        return loss

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels; a loss of the user's own takes labels of any dtype."""
        return labelled(batch) if self.loss is None else paired(batch)

    def _label_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.loss is not None:
            return self.loss(scores, labels)
        return F.cross_entropy(scores.flatten(0, -2), labels.flatten())


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    shown: bool | None = None,
    **options: Any,
) -> Result:
    """Trains a compressed network further; the given one is not changed.

    Args:
        model: the compressed network.
        batches: (inputs, labels) pairs; with a teacher inputs alone serve too.
        teacher: the dense network; its scores are the target, so that no labels are needed.
        shown: whether to draw a progress bar; where None, only on a terminal.
        **options: fields of `FineTune`: epochs, learning_rate, weight_decay, label_share, temperature, ...

    Returns:
        The trained network and one log entry per step.

    Examples:
        >>> import weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> small, _ = weft.compress(model, {"0": LowRank(rank=2)})
        >>> small, log = fine_tune(small, [torch.randn(16, 8)] * 3, teacher=model, epochs=2)
        >>> len(log)
        6
    """
    return FineTune(**options).run(model, batches, teacher=teacher, shown=shown)
