"""Fine-tuning: a compressed network trained further, by labels or by the dense network as teacher."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import nn

from weft import checks
from weft.layers.base import harden, relax
from weft.measure import check_repeatable, network_cost
from weft.schemes.checkpoint import Stages
from weft.schemes.corrections import correct_batch_norm, restart_batch_norm
from weft.schemes.learning_rate import choose_learning_rate
from weft.schemes.objective import inputs_of
from weft.schemes.result import Result
from weft.schemes.training import Training, Validation


@dataclass(frozen=True)
class FineTune:
    """Trains all that is not frozen; supports stay, codes train straight through their rounding.

    Args:
        training: the options of the loop.
        rates: learning rates to choose from by validation, in place of the training's own.
        trial_steps: how many steps each of them is tried.
        batch_norm: whether batch-norm statistics are first corrected for what compression did to them; needs
            a teacher (see `weft.schemes.corrections`).
    """

    training: Training = Training()
    rates: tuple[float, ...] = ()
    trial_steps: int = 10
    batch_norm: bool = False

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Makes one from its own fields and those of `Training` and `Objective` side by side.

        Args:
            **options: rates, ..., epochs, learning_rate, ..., label_share, temperature, ...

        Returns:
            The value; an unknown name is a TypeError.
        """
        own = {field.name for field in fields(cls)} - {"training"}
        scheme = {name: options.pop(name) for name in list(options) if name in own}
        return cls(Training.of(**options), **scheme)

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
        described_as: Mapping[str, Any] | None = None,
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
            described_as: what the run is besides, for its checkpoint, where another scheme calls.
            shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

        Returns:
            The trained network in the modes of the given one, and one log entry per step (step, epoch, loss,
            size, seconds) and per validation (metric in place of loss).

        Raises:
            ValueError: nothing can be trained, there are no batches, the loss became NaN or infinite, or
                batch-norm shall be corrected without a teacher, or a rate be chosen without validation.
        """
        if self.batch_norm and teacher is None:
            remedy = "pass the dense network"
            raise ValueError(checks.fault("teacher", "given with batch_norm", None, remedy))
        if self.rates and validation is None:
            remedy = "pass held-out batches"
            raise ValueError(checks.fault("validation", "given with rates", None, remedy))
        described = {
            "scheme": "FineTune",
            "rates": list(self.rates),
            "batch_norm": self.batch_norm,
            **self.training.describe(model),
            **(described_as or {}),
        }
        stages = Stages(checkpoint, described, log=log, seconds=checkpoint_seconds)
        kept = stages.checkpoint
        student = copy.deepcopy(model)
        if self.batch_norm and teacher is not None and not (kept and kept.within):
            check_repeatable("batches", batches)
            restart_batch_norm(student, teacher)
            correct_batch_norm(student, teacher, map(inputs_of, batches), shown=shown)
        relax(student)
        training = self.training
        if self.rates and validation is not None:
            held = {} if kept is None else kept.outer
            if "learning_rate" not in held:
                held["learning_rate"] = choose_learning_rate(
                    training,
                    student,
                    batches,
                    self.rates,
                    validation=validation,
                    steps=self.trial_steps,
                    teacher=teacher,
                    shown=shown,
                ).learning_rate
            training = replace(training, learning_rate=held["learning_rate"])
        written = training.run(
            student,
            batches,
            teacher=teacher,
            validation=validation,
            log=stages.log,
            checkpoint=kept,
            notes={"size": network_cost(model).bytes},
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
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).
        **options: fields of `FineTune`, `Training` and `Objective`: rates, epochs, learning_rate, optimiser,
            label_share, ...

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
    return FineTune.of(**options).run(
        model,
        batches,
        teacher=teacher,
        validation=validation,
        log=log,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        shown=shown,
    )
