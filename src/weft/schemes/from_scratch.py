"""Training from scratch: a network of structured layers from a random start."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft import checks
from weft.layers.base import StructuredLayer
from weft.layers.replace import replace_layer
from weft.plan.plan import check_plan
from weft.schemes.direct import compress
from weft.schemes.fine_tune import FineTune
from weft.schemes.randomness import own_randomness, seed_all
from weft.schemes.result import Result
from weft.schemes.training import Validation
from weft.structures.base import Structure
from weft.structures.dense import Dense
from weft.survey import Survey
from weft.survey import survey as survey_model

STARTS = ("random", "supports")


@dataclass(frozen=True)
class FromScratch:
    """Gives the layers of a plan random members and trains everything.

    Semiseparable layers are trained by backpropagation through states (Kissel and Diepold 2022): automatic
    differentiation of the state recurrence, in the native kernel as in the reference.

    Args:
        training: how to train; see `FineTune`.
        start: "random" draws supports and values (PSM-random, for sparse products); "supports" fits to the
            given network's weights, keeps what the fit chose (supports, orders, ranks) and draws the values
            anew (PSM-reinit).

    Raises:
        ValueError: the start is unknown.

    References:
        Giffon, Ayache, Kadri, Artières and Sicre 2021, PSM-nets, section IV.
    """

    training: FineTune = FineTune()
    start: str = "random"

    def __post_init__(self) -> None:
        checks.one_of("start", self.start, STARTS)

    def initialise(
        self, model: nn.Module, plan: Mapping[str, Structure], survey: Survey | None = None
    ) -> nn.Module:
        """The random start.

        Layers of the plan get random members and biases of zero. Every other module that has a
        `reset_parameters` is drawn anew by it unless it is frozen; what has none stays as it is.

        Args:
            model: the architecture; its weights matter only to the start "supports". It is not changed.
            plan: structures by layer name; a layer that is `Dense()` or not named stays dense.
            survey: the network's survey, for the metric of the fits.

        Returns:
            The network to train.
        """
        found = survey_model(model) if survey is None else survey
        check_plan(plan, found)
        generator = torch.Generator().manual_seed(self.training.training.seed)
        if self.start == "supports":
            small = compress(model, plan, found, correct_biases=False).model
        else:
            small = copy.deepcopy(model)
        for name, structure in plan.items():
            if isinstance(structure, Dense):
                continue
            layer = found.layers[name]
            if self.start == "supports":
                held: Any = small.get_submodule(name)
                member = held.matrix.reinitialise(generator=generator).to(layer.weight.device)
                for each in layer.names:
                    own: Any = small.get_submodule(each)
                    own.matrix = member
            else:
                member = structure.initialise(layer.shape, dtype=layer.weight.dtype, generator=generator)
                small = replace_layer(small, layer.names, member)
        with own_randomness(), torch.no_grad():
            seed_all(self.training.training.seed)
            _reset(small)
        return small

    def run(
        self,
        model: nn.Module,
        plan: Mapping[str, Structure],
        batches: Iterable[Any],
        *,
        survey: Survey | None = None,
        **options: Any,
    ) -> Result:
        """Trains from the random start.

        Args:
            model: the architecture; it is not changed.
            plan: structures by layer name.
            batches: (inputs, labels) pairs, or what the objective takes.
            survey: the network's survey.
            **options: teacher, validation, log, checkpoint, ... as `FineTune.run` takes them.

        Returns:
            The trained network and its log.
        """
        start = self.initialise(model, plan, survey)
        described_as = {"scheme": "FromScratch", "start": self.start}
        return self.training.run(start, batches, described_as=described_as, **options)


def from_scratch(
    model: nn.Module,
    plan: Mapping[str, Structure],
    batches: Iterable[Any],
    *,
    start: str = "random",
    survey: Survey | None = None,
    teacher: nn.Module | None = None,
    validation: Validation | None = None,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    shown: bool | None = None,
    **options: Any,
) -> Result:
    """Trains a network of structured layers from a random start; the given network is not changed.

    Args:
        model: the architecture.
        plan: structures by layer name; other layers stay dense and are drawn anew too.
        batches: (inputs, labels) pairs; with a teacher inputs alone serve too.
        start: "random", or "supports" to keep those of a fit to the given weights.
        survey: the network's survey, for the metric of that fit.
        teacher: a network to learn from.
        validation: held-out (inputs, labels) batches, or a function that gives a network's metric.
        log: a file that gets one JSON line per step.
        checkpoint: a folder for the run's state; the same call with the same folder goes on from there.
        checkpoint_seconds: the least time between two checkpoints.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).
        **options: fields of `FineTune`, `Training` and `Objective`.

    Returns:
        The trained network and its log.

    Examples:
        >>> import torch, weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
        >>> small, log = weft.from_scratch(model, {"0": LowRank(rank=2)}, data, epochs=4)
        >>> small[0].matrix.structure.rank, len(log)
        (2, 4)
    """
    return FromScratch(FineTune.of(**options), start).run(
        model,
        plan,
        batches,
        survey=survey,
        teacher=teacher,
        validation=validation,
        log=log,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        shown=shown,
    )


def _reset(module: Any) -> None:
    if isinstance(module, StructuredLayer):
        if module.bias is not None and module.bias.requires_grad:
            module.bias.zero_()
        return
    for child in module.children():
        _reset(child)
    frozen = any(not parameter.requires_grad for parameter in module.parameters(recurse=False))
    if callable(getattr(module, "reset_parameters", None)) and not frozen:
        module.reset_parameters()
