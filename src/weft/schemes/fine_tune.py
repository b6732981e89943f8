"""Fine-tuning: a compressed network trained further, by labels or by the dense network as teacher."""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft import checks
from weft.layers.base import harden, relax
from weft.measure import check_repeatable, network_cost
from weft.schemes.checkpoint import Checkpoint
from weft.schemes.corrections import correct_batch_norm, restart_batch_norm
from weft.schemes.log import Log
from weft.schemes.objective import inputs_of
from weft.schemes.result import Result
from weft.schemes.training import Training, Validation


@dataclass(frozen=True)
class FineTune:
    """Trains all that is not frozen; supports stay, codes train straight through their rounding.

    Args:
        training: the options of the loop.
        batch_norm: whether batch-norm statistics are first corrected for what compression did to them; needs
            a teacher (see `weft.schemes.corrections`).
    """

    training: Training = Training()
    batch_norm: bool = False

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: nn.Module | None = None,
        validation: Validation | None = None,
        log: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 30.0,
        shown: bool | None = None,
    ) -> Result:
        """Trains a copy of the model.

        Args:
            model: the compressed network; it is not changed.
            batches: (inputs, labels) pairs that can be iterated once per epoch; with a teacher and no label
                share inputs alone serve too.
            teacher: the dense network; its scores are the target.
            validation: held-out (inputs, labels) batches for the accuracy after every epoch, or a function
                that gives a network's metric, larger is better.
            log: a file that gets one JSON line per step; in the checkpoint's folder where None.
            checkpoint: a folder for the run's state; the same call with the same folder goes on from there.
            checkpoint_seconds: the least time between two checkpoints.
            shown: whether to draw a progress bar; where None, only on a terminal.

        Returns:
            The trained network in the modes of the given one, and one log entry per step (step, epoch, loss,
            size, seconds) and per validation (metric in place of loss).

        Raises:
            ValueError: nothing can be trained, there are no batches, the loss became NaN or infinite, or
                batch-norm shall be corrected without a teacher.
        """
        kept = None
        if checkpoint is not None:
            run = {"scheme": "FineTune", "batch_norm": self.batch_norm, **self.training.describe(model)}
            kept = Checkpoint(checkpoint, run, log=log, seconds=checkpoint_seconds)
        student = copy.deepcopy(model)
        if self.batch_norm:
            if teacher is None:
                remedy = "pass the dense network"
                raise ValueError(checks.fault("teacher", "given with batch_norm", None, remedy))
            check_repeatable("batches", batches)
            restart_batch_norm(student, teacher)
            correct_batch_norm(student, teacher, map(inputs_of, batches), shown=shown)
        relax(student)
        written = self.training.run(
            student,
            batches,
            teacher=teacher,
            validation=validation,
            log=Log(log) if kept is None else kept.log,
            checkpoint=kept,
            notes={"size": network_cost(model).bytes},
            description="fine-tuning",
            shown=shown,
        )
        harden(student)
        modes = {name: module.training for name, module in model.named_modules()}
        for name, module in student.named_modules():
            module.training = modes.get(name, module.training)
        return Result(student, written.entries)


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    validation: Validation | None = None,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    shown: bool | None = None,
    batch_norm: bool = False,
    **options: Any,
) -> Result:
    """Trains a compressed network further; the given one is not changed.

    Args:
        model: the compressed network.
        batches: (inputs, labels) pairs; with a teacher inputs alone serve too.
        teacher: the dense network; its scores are the target, so that no labels are needed.
        validation: held-out (inputs, labels) batches, or a function that gives a network's metric.
        log: a file that gets one JSON line per step.
        checkpoint: a folder for the run's state; the same call with the same folder goes on from there.
        checkpoint_seconds: the least time between two checkpoints.
        shown: whether to draw a progress bar; where None, only on a terminal.
        batch_norm: whether batch-norm statistics are corrected first.
        **options: fields of `Training` and `Objective`: epochs, learning_rate, optimiser, label_share, ...

    Returns:
        The trained network and its log.

    Examples:
        >>> import torch, weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> small, _ = weft.compress(model, {"0": LowRank(rank=2)})
        >>> small, log = fine_tune(small, [torch.randn(16, 8)] * 3, teacher=model, epochs=2)
        >>> len(log)
        6
    """
    return FineTune(Training.of(**options), batch_norm).run(
        model,
        batches,
        teacher=teacher,
        validation=validation,
        log=log,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        shown=shown,
    )
