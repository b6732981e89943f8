"""Iterative pruning: the size falls in small steps, with training between them.

The size of every layer at step t = 0 … n follows the cubic schedule of Zhu and Gupta 2017, equation 1; for
sparsities s, from s_i at the start to s_f at the end,

    s_t = s_f + (s_i − s_f) (1 − t / n)³,

so that much goes at first, where there is much to spare, and little at the end. What is scheduled here is the
number of parameters as a share of the dense weight's, 1 − s for a pruned one, so that a rank or the entries
of a sparse product fall in the same way.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft import checks
from weft.layers.base import harden, relax
from weft.layers.replace import put_dense_weight, replace_layer
from weft.measure import Batch, check_repeatable, network_cost
from weft.plan.plan import check_plan
from weft.schemes.checkpoint import Stages, member_from, member_state
from weft.schemes.direct import compress
from weft.schemes.result import Result
from weft.schemes.training import Training, Validation, metric_of
from weft.structures.base import Structure, StructuredMatrix
from weft.structures.dense import Dense
from weft.survey import survey as survey_model


def cubic(share: float, step: int, steps: int, *, first: float = 1.0) -> float:
    """The share of the parameters at one step (Zhu and Gupta 2017, equation 1, of the shares that are left).

    Args:
        share: at the last step.
        step: t, from 0 to `steps`.
        steps: n.
        first: at step 0.

    Returns:
        The share, falling from `first` to `share`.

    Examples:
        >>> [round(cubic(0.2, step, 4), 4) for step in range(5)]
        [1.0, 0.5375, 0.3, 0.2125, 0.2]
    """
    return share + (first - share) * (1 - step / steps) ** 3


@dataclass(frozen=True)
class IterativePruning:
    """Shrinks every layer in steps to the size that its plan says, training after each.

    Args:
        training: after every step but the last.
        last: after the last step; as after the others where None.
        steps: n.

    Raises:
        TypeError: the number of steps is no whole number.
        ValueError: it is below 1.
    """

    training: Training = Training()
    last: Training | None = None
    steps: int = 8

    def __post_init__(self) -> None:
        checks.integer_between("steps", self.steps, 1, None)

    def run(
        self,
        model: nn.Module,
        plan: Mapping[str, Structure],
        batches: Iterable[Any],
        *,
        calibration: Iterable[Batch] | None = None,
        teacher: nn.Module | None = None,
        validation: Validation | None = None,
        log: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 30.0,
        shown: bool | None = None,
    ) -> Result:
        """Shrinks and trains a copy of a network.

        Args:
            model: the trained dense network; it is not changed.
            plan: the structures of the last step by layer name, of families whose size can change
                (`Structure.resized`); else a ValueError.
            batches: (inputs, labels) pairs that can be iterated once per epoch; with a teacher inputs alone
                serve too.
            calibration: data without labels; every step then fits in the metric of its own inputs and
                corrects biases and batch-norm statistics.
            teacher: a network whose scores are the target; the dense one, say.
            validation: held-out (inputs, labels) batches for the accuracy after every step, or a function
                that gives a network's metric.
            log: a file that gets one JSON line per step; in the checkpoint's folder where None.
            checkpoint: a folder for the run's state; the same call with the same folder goes on from there.
            checkpoint_seconds: the least time between two checkpoints within a training.
            shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

        Returns:
            The compressed network, and the log: the training's steps, and after each of the n steps stage,
            metric, parameters, size (bytes), structures.
        """
        if calibration is not None:
            check_repeatable("calibration", calibration)
        run = _Run(copy.deepcopy(model), dict(plan))
        stages = Stages(checkpoint, self._describe(model, plan), log=log, seconds=checkpoint_seconds)
        metric = metric_of(validation)
        for stage in stages.left(self.steps, restore=run.restore, state=run.state):
            step = stage + 1
            training = self.last if self.last is not None and step == self.steps else self.training
            small = run.shrunk(step, self.steps, calibration, shown)
            size = network_cost(small).bytes  # before codes become floats for training
            relax(small)
            training.run(
                small,
                batches,
                teacher=teacher,
                log=stages.log,
                checkpoint=stages.checkpoint,
                notes={"stage": step, "size": size},
                description=f"pruning step {step} of {self.steps}",
                shown=shown,
            )
            harden(small)
            run.take(small)
            value = {} if metric is None else {"metric": metric(run.compressed())}
            cost = network_cost(small)
            structures = {name: str(member.structure) for name, member in run.members.items()}
            stages.log.note(
                stage=step, **value, parameters=cost.parameters, size=cost.bytes, structures=structures
            )
        return Result(run.compressed(), stages.log.entries)

    def _describe(self, model: nn.Module, plan: Mapping[str, Structure]) -> dict[str, Any]:
        return {
            "scheme": "IterativePruning",
            "steps": self.steps,
            "plan": {name: structure.to_json() for name, structure in plan.items()},
            "last": None if self.last is None else self.last.describe(model),
            **self.training.describe(model),
        }


class _Run:
    """The dense network that the sizes fall on, and the members that stand for its layers."""

    def __init__(self, dense: nn.Module, plan: Mapping[str, Structure]) -> None:
        self.dense = dense
        survey = survey_model(dense)
        check_plan(plan, survey)
        self.plan = {name: structure for name, structure in plan.items() if not isinstance(structure, Dense)}
        self.layers = {name: survey.layers[name] for name in self.plan}
        self.shares: dict[str, float] = {}
        for name, structure in self.plan.items():
            weight = self.layers[name].weight
            count = structure.parameter_count(self.layers[name].shape)
            count = structure.fit(weight).parameter_count() if count is None else count
            self.shares[name] = count / weight.numel()
            structure.resized(1.0, self.layers[name].shape)  # before any training: it may refuse
        self.members: dict[str, StructuredMatrix] = {}

    def shrunk(
        self, step: int, steps: int, calibration: Iterable[Batch] | None, shown: bool | None
    ) -> nn.Module:
        """The network at one step's sizes, fitted to the weights as they are now."""
        sizes = {}
        for name, structure in self.plan.items():
            factor = cubic(self.shares[name], step, steps) / self.shares[name]
            sizes[name] = structure.resized(factor, self.layers[name].shape) if step < steps else structure
        survey = survey_model(self.dense, calibration, shown=shown)
        return compress(
            self.dense, sizes, survey, batches=calibration, starts=self.members, shown=shown
        ).model

    def take(self, small: nn.Module) -> None:
        """Takes over what was trained: the members, and their dense weights for the next step's fit."""
        state = small.state_dict()
        own = self.dense.state_dict()
        self.dense.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})
        for name, layer in self.layers.items():
            structured: Any = small.get_submodule(name)
            self.members[name] = structured.matrix
            put_dense_weight(self.dense.get_submodule(layer.name), structured.matrix.to_dense())

    def compressed(self) -> nn.Module:
        """The network with the members in place of the dense weights."""
        small = copy.deepcopy(self.dense)
        for name, member in self.members.items():
            small = replace_layer(small, self.layers[name].names, copy.deepcopy(member))
        return small

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        members = {name: member_state(member) for name, member in self.members.items()}
        return {"model": self.dense.state_dict(), "members": members}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of a checkpoint."""
        self.dense.load_state_dict(state["model"])
        self.members = {name: member_from(held) for name, held in state["members"].items()}
