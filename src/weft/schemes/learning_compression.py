"""Learning-compression (LC): the weights are trained and compressed in turn until both agree.

The problem is

    min over W, Θ of  L(W) + λ C(Θ)   subject to   W_l = Δ(Θ_l)  for every layer l,

L the loss of the network with dense weights W, Δ(Θ_l) the dense weight of the structured matrix Θ_l, C what
all of them cost. With multipliers B and a penalty μ that rises, its augmented Lagrangian is minimised by
turns over W and over Θ:

    L step   W ← argmin L(W) + μ/2 Σ ‖W_l − Δ(Θ_l) − B_l/μ‖²          training; knows no structure
    C step   Θ ← argmin λ C(Θ) + μ/2 Σ ‖W_l − B_l/μ − Δ(Θ_l)‖²        compression; knows no data
    B step   B_l ← B_l − μ (W_l − Δ(Θ_l))

(Carreira-Perpiñán 2017, section 3, the LC algorithm; with B = 0 throughout the quadratic penalty method.) The
first Θ is direct compression: the C step of the trained network. With `metric="outputs"` every norm here is
that of what the layer gives out, ‖· Ĝ^{1/2}‖ with the survey's Gram Ĝ, its mean diagonal 1. Θ then starts
where `weft.compress` does, which for structures that change the weights much is far better than at the
nearest weights; the multipliers are B Ĝ. The C steps are the tasks below:

- a structure of fixed size, layer by layer: `fit(start=previous)`;
- `Together`: one size for several layers, such as 5 % of all their weights;
- `Priced`: for every layer the family and size with the least λ C + μ/2 ‖·‖², exact over its error curve.
  With low rank alone this is the rank selection of Idelbayev and Carreira-Perpiñán 2020: as Σ σ_k² over k > r
  is all that the error needs, one SVD serves all ranks;
- `Within`: the same under a budget in place of a price, by `weft.allocate`;
- `Added`: sums, every term a task of its own, fitted in turn to what the others leave (the additive
  combinations of Idelbayev and Carreira-Perpiñán 2021).
"""

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft import checks
from weft.layers.replace import dense_weight, replace_layer
from weft.numerics.gram import squared_error
from weft.plan.allocate import allocate
from weft.plan.budget import Budget, Price
from weft.plan.constraints import Constraints
from weft.plan.error_curves import error_curves
from weft.plan.plan import check_plan
from weft.plan.sensitivity import Sensitivity
from weft.schemes.checkpoint import Stages, member_from, member_state
from weft.schemes.corrections import correct_batch_norm
from weft.schemes.data_order import order_of, restore_order
from weft.schemes.objective import inputs_of
from weft.schemes.result import Result
from weft.schemes.training import Training, Validation, metric_of
from weft.structures import select
from weft.structures.base import Structure, StructuredMatrix
from weft.structures.dense import Dense
from weft.structures.sum_of import sum_of, terms_of
from weft.survey import LayerSurvey, Survey
from weft.survey import survey as survey_model

Members = Mapping[str, StructuredMatrix]
METRICS = ("weights", "outputs")

# Rounds over the terms of a sum, and the relative gain in the objective below which they end.
_ROUNDS, _TOLERANCE = 5, 1e-3


# ------------------------------------------------------------------------------------------------------------
# C steps


class Task(ABC):
    """What some layers are to become: their C step."""

    @abstractmethod
    def check(self, survey: Survey) -> None:
        """Checks before any training that the task can be carried out; a ValueError says why not.

        Args:
            survey: the network's survey, its layers those of the task.
        """

    def charge(self, member: StructuredMatrix, survey: Survey, name: str) -> float:
        """λ C of one layer's member; here nothing, as the size is given.

        Args:
            member: what the layer is to become.
            survey: as for `fit`.
            name: the layer.

        Returns:
            What it costs in the unit of the loss.
        """
        return 0.0

    @abstractmethod
    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        """Argmin λ C(Θ) + μ/2 Σ ‖W − Δ(Θ)‖².

        Args:
            survey: the layers of the task; their weights are W, what is to be approximated. Its input Grams
                are the metric, of which there are none where weights are compared as they are: the C step
                knows no data.
            penalty: μ.
            starts: the members of the previous C step, by layer; none at first.

        Returns:
            One member per layer.
        """


@dataclass(frozen=True)
class Each(Task):
    """Every layer by itself, at the structure's own size; a bare `Structure` among the tasks means this."""

    structure: Structure

    def check(self, survey: Survey) -> None:
        check_plan(dict.fromkeys(survey.layers, self.structure), survey)

    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        return {name: _fit(self.structure, layer, starts.get(name)) for name, layer in survey.layers.items()}


@dataclass(frozen=True)
class Together(Task):
    """One size for all layers: `Together(Pruned(density=0.05))` keeps the 5 % largest of all weights.

    Args:
        structure: of a family whose size several weights can share (`Structure.share_out`), in the metric
            of the C steps.
    """

    structure: Structure

    def check(self, survey: Survey) -> None:
        check_plan(dict.fromkeys(survey.layers, self.structure), survey)
        self.structure.share_out([layer.weight for layer in survey.layers.values()])

    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        layers = list(survey.layers.values())
        shared = self.structure.share_out(
            [layer.weight for layer in layers], [layer.input_gram for layer in layers]
        )
        return {
            layer.name: _fit(structure, layer, starts.get(layer.name))
            for layer, structure in zip(layers, shared, strict=True)
        }


@dataclass(frozen=True)
class Priced(Task):
    """For every layer the family and size with the least λ C + μ/2 ‖W − Δ(Θ)‖², the dense weight included.

    Args:
        families: "all", names, or classes.
        price: λ: how much loss one parameter, byte or multiply-add is worth.
        constraints: what stays dense, and families by layer.
    """

    families: str | Iterable[str | type[Structure]]
    price: Price
    constraints: Constraints = Constraints()

    def check(self, survey: Survey) -> None:
        select(self.families)
        self.price.check(survey.total)

    def charge(self, member: StructuredMatrix, survey: Survey, name: str) -> float:
        layer = survey.layers[name]
        return self.price.of(layer.per_sample(member.cost(layer.geometry)))

    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        found = {}
        curves = error_curves(survey, select(self.families), constraints=self.constraints, shown=False)
        for name, curve in curves.items():
            layer = survey.layers[name]
            energy = _energy(layer, layer.weight)
            best = min(
                curve, key=lambda point: self.price.of(point.cost) + penalty / 2 * energy * point.error**2
            )
            # A family whose fits only approximate the best may do better from where it was.
            chosen = [best.structure, *(start.structure for start in [starts.get(name)] if start is not None)]
            members = [_fit(structure, layer, starts.get(name)) for structure in dict.fromkeys(chosen)]
            objectives = [
                self.charge(member, survey, name) + penalty / 2 * _distance(layer, member)
                for member in members
            ]
            found[name] = members[objectives.index(min(objectives))]
        return found


@dataclass(frozen=True)
class Within(Task):
    """Families and sizes with the least Σ ‖W − Δ(Θ)‖² under a budget.

    Args:
        families: "all", names, or classes.
        budget: what the whole network may cost; layers outside the task count as they are.
    """

    families: str | Iterable[str | type[Structure]]
    budget: Budget

    def check(self, survey: Survey) -> None:
        select(self.families)
        self.budget.limits(survey.total)

    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        energies = {name: ((1.0, _energy(layer, layer.weight)),) for name, layer in survey.layers.items()}
        plan = allocate(survey, self.families, self.budget, sensitivity=Sensitivity(energies), shown=False)
        return {
            name: _fit(structure, survey.layers[name], starts.get(name)) for name, structure in plan.items()
        }


@dataclass(frozen=True)
class Added(Task):
    """Sums of one member per term: `Added((Together(Pruned(0.01)), Quantized(1, codebook="kmeans")))`.

    Args:
        terms: tasks, or structures of fixed size; fitted in turn to what the others leave.

    Raises:
        ValueError: there is no term.
    """

    terms: tuple[Task | Structure, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(checks.fault("terms", "at least one task", "none", "name a structure"))

    @property
    def _tasks(self) -> list[Task]:
        return [_task(term) for term in self.terms]

    def check(self, survey: Survey) -> None:
        for task in self._tasks:
            task.check(survey)

    def fit(self, survey: Survey, penalty: float, starts: Members) -> dict[str, StructuredMatrix]:
        terms = {name: terms_of(start) for name, start in starts.items()}
        parts: list[Members] = [
            {name: own[index] for name, own in terms.items()} for index in range(len(self.terms))
        ]
        if not starts:  # every term is once the first, as what the first one takes is lost to the others
            orders = [self._order(first) for first in range(len(parts))]
            tried = [self._round(survey, penalty, parts, order) for order in orders]
            parts = min(tried, key=lambda one: self._objective(survey, penalty, one))
        best = math.inf
        for _ in range(_ROUNDS):
            parts = self._round(survey, penalty, parts, self._order(0))
            objective = self._objective(survey, penalty, parts)
            if best - objective <= _TOLERANCE * objective:
                break
            best = objective
        return {name: sum_of([part[name] for part in parts]) for name in survey.layers}

    def _order(self, first: int) -> list[int]:
        return [(first + index) % len(self.terms) for index in range(len(self.terms))]

    def _round(
        self, survey: Survey, penalty: float, parts: Sequence[Members], order: Iterable[int]
    ) -> list[Members]:
        """Every term fitted once to what the others leave."""
        parts = list(parts)
        for index in order:
            left = {
                name: layer.weight
                - sum(
                    part[name].to_dense().detach()
                    for place, part in enumerate(parts)
                    if place != index and name in part
                )
                for name, layer in survey.layers.items()
            }
            parts[index] = self._tasks[index].fit(_with_weights(survey, left), penalty, parts[index])
        return parts

    def _objective(self, survey: Survey, penalty: float, parts: Sequence[Members]) -> float:
        """λ C + μ/2 ‖·‖² of a sum."""
        total = 0.0
        for name, layer in survey.layers.items():
            total += penalty / 2 * _distance(layer, sum_of([part[name] for part in parts]))
            total += sum(
                task.charge(part[name], survey, name) for task, part in zip(self._tasks, parts, strict=True)
            )
        return total


def _task(given: "Task | Structure") -> Task:
    if not isinstance(given, Task | Structure):
        remedy = "pass e.g. LowRank(rank=8), or Priced('LowRank', Price(parameters=1e-6))"
        raise TypeError(checks.fault("tasks", "structures or tasks", repr(given), remedy))
    return Each(given) if isinstance(given, Structure) else given


def _fit(structure: Structure, layer: LayerSurvey, start: StructuredMatrix | None) -> StructuredMatrix:
    """The nearest member, from the previous one where that is of the same family."""
    same = start is not None and type(start.structure) is type(structure)
    return structure.fit(layer.weight, input_gram=layer.input_gram, start=start if same else None)


def _energy(layer: LayerSurvey, error: Tensor) -> float:
    """‖E‖² in the layer's metric."""
    return float(squared_error(error.detach().flatten(1).double(), layer.input_gram))


def _distance(layer: LayerSurvey, member: StructuredMatrix) -> float:
    """‖W − Δ(Θ)‖²."""
    return _energy(layer, layer.weight - member.to_dense())


def _with_weights(survey: Survey, weights: Mapping[str, Tensor]) -> Survey:
    """The survey of some layers, with other weights."""
    return replace(
        survey, layers={name: replace(survey.layers[name], weight=weights[name]) for name in weights}
    )


def _measured(survey: Survey, metric: str) -> Survey:
    """The survey with the Grams that the metric is made of, and no others."""
    layers = {}
    for name, layer in survey.layers.items():
        gram = None
        if metric == "outputs":
            if layer.input_gram is None:
                remedy = "pass survey=weft.survey(model, batches)"
                raise ValueError(checks.fault("survey", "one with Grams", f"none for {name}", remedy))
            gram = layer.input_gram.normalized()
        layers[name] = replace(layer, input_gram=gram, output_gram=None)
    return replace(survey, layers=layers)


# ------------------------------------------------------------------------------------------------------------
# The algorithm


def rising(first: float = 9e-5, factor: float = 1.1, steps: int = 40) -> tuple[float, ...]:
    """A geometric schedule of penalties, μ_k = first · factor^k.

    Args:
        first: μ₀; so small that the first L step hardly feels it.
        factor: at least 1; at most about 1.5, or the weights freeze where they are.
        steps: how many.

    Returns:
        The penalties.

    Raises:
        ValueError: the factor lets them fall.

    Examples:
        >>> rising(1e-3, 2.0, 3)
        (0.001, 0.002, 0.004)
    """
    checks.positive("first", first)
    checks.integer_between("steps", steps, 1, None)
    if not (factor >= 1 and math.isfinite(factor)):
        raise ValueError(checks.fault("factor", "at least 1", factor, "let the penalty rise, e.g. 1.1"))
    return tuple(first * factor**step for step in range(steps))


class Learn(Protocol):
    """An L step: trains a network on its own loss plus a penalty."""

    def __call__(self, model: nn.Module, penalty: Callable[[nn.Module], Tensor], step: int) -> None:
        """Trains.

        Args:
            model: the dense network, changed in place.
            penalty: gives μ/2 Σ ‖W_l − Δ(Θ_l) − B_l/μ‖² for it, to be added to the loss of every batch.
            step: which L step this is, from 0.
        """
        ...


@dataclass(frozen=True)
class LearningCompression:
    """The LC algorithm.

    Args:
        training: how every L step trains.
        penalties: μ_k, one per L step; they must not fall.
        learning_rate_decay: the learning rate of L step k is the training's times its k-th power.
        multipliers: whether B is kept (augmented Lagrangian), or stays 0 (quadratic penalty).
        metric: how weights are compared: "weights" as they are, or "outputs" by what the layer gives out for
            the inputs that the survey saw. The latter wants a survey with batches and a learning rate with
            rate · μ · (largest over mean eigenvalue of the Gram, about 10 to 100) below 1.

    Raises:
        ValueError: the penalties are not positive and rising, or there are none; the decay is no share; the
            metric is unknown.
    """

    training: Training = Training(optimiser="sgd", learning_rate=0.05)
    penalties: Sequence[float] = rising()
    learning_rate_decay: float = 0.98
    multipliers: bool = True
    metric: str = "weights"

    def __post_init__(self) -> None:
        if not len(self.penalties):
            raise ValueError(checks.fault("penalties", "at least one", "none", "use e.g. rising()"))
        for penalty in self.penalties:
            checks.positive("penalties", penalty)
        for before, after in zip(self.penalties, self.penalties[1:], strict=False):
            if after < before:
                got = f"{after:g} after {before:g}"
                remedy = "sort them, or use e.g. rising(9e-5, 1.1, 40)"
                raise ValueError(checks.fault("penalties", "a schedule that never falls", got, remedy))
        checks.share("learning_rate_decay", self.learning_rate_decay)
        checks.one_of("metric", self.metric, METRICS)

    def run(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task | Structure],
        batches: Iterable[Any],
        *,
        learn: Learn | None = None,
        teacher: nn.Module | None = None,
        survey: Survey | None = None,
        validation: Validation | None = None,
        log: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 30.0,
        shown: bool | None = None,
    ) -> Result:
        """Trains a copy of a network so that compressing it loses as little as possible.

        Args:
            model: the trained dense network; it is not changed.
            tasks: patterns of layer names (as in `Constraints`; of several that match the first counts) with
                what these layers are to become; a plan is such a mapping. Other layers are trained along and
                stay dense. A pattern that matches no layer, and a task that its layers cannot take, is a
                ValueError.
            batches: (inputs, labels) pairs that can be iterated once per epoch; with a teacher inputs alone
                serve too.
            learn: your own L step, in place of `training`.
            teacher: a network whose scores are the target; the dense one, say.
            survey: the network's survey; needed for prices and budgets of multiply-adds, and for the metric
                of outputs.
            validation: held-out (inputs, labels) batches for the compressed network's accuracy after every C
                step, or a function that gives a network's metric.
            log: a file that gets one JSON line per step; in the checkpoint's folder where None.
            checkpoint: a folder for the run's state; the same call with the same folder goes on from there.
            checkpoint_seconds: the least time between two checkpoints within an L step.
            shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

        Returns:
            The compressed network, and the log: the training's steps, and after every C step lc_step, mu,
            distance (between W and Δ(Θ), relative and in the scheme's metric), metric, parameters, size
            (bytes), multiply_adds, structures.
        """
        order = order_of(batches)
        dense = copy.deepcopy(model)
        known = survey_model(model) if survey is None else survey
        run = _Run(dense, tasks, _measured(known, self.metric))
        described = self._describe(model, tasks)
        stages = Stages(checkpoint, described, log=log, seconds=checkpoint_seconds)
        metric = metric_of(validation)
        if not stages.resumed:
            run.compress(self.penalties[0])  # direct compression
        for step in stages.left(len(self.penalties), restore=run.restore, state=run.state):
            mu = self.penalties[step]
            if learn is not None:
                learn(dense, run.penalty(mu), step)
            else:
                rate = self.training.learning_rate * self.learning_rate_decay**step
                replace(self.training, learning_rate=rate).run(
                    dense,
                    batches,
                    teacher=teacher,
                    penalty=run.penalty(mu),
                    log=stages.log,
                    checkpoint=stages.checkpoint,
                    notes={"lc_step": step, "mu": mu, "size": run.size()["size"]},
                    description=f"L step {step + 1} of {len(self.penalties)}",
                    shown=shown,
                )
            run.compress(mu)
            if self.multipliers:
                run.update_multipliers(mu)
            value = {} if metric is None else {"metric": metric(run.compressed(model))}
            stages.log.note(lc_step=step, mu=mu, distance=run.distance(), **value, **run.size())
        small = run.compressed(model)
        restore_order(batches, order)  # in which order sums are rounded must not depend on interruptions
        correct_batch_norm(small, dense, map(inputs_of, batches), shown=shown)
        return Result(small, stages.log.entries)

    def _describe(self, model: nn.Module, tasks: Mapping[str, Task | Structure]) -> dict[str, Any]:
        return {
            "scheme": "LearningCompression",
            "penalties": list(self.penalties),
            "learning_rate_decay": self.learning_rate_decay,
            "multipliers": self.multipliers,
            "metric": self.metric,
            "tasks": {pattern: str(task) for pattern, task in tasks.items()},
            **self.training.describe(model),
        }


class _Run:
    """W (the network), Θ and B of a run in progress."""

    def __init__(self, dense: nn.Module, tasks: Mapping[str, Task | Structure], survey: Survey) -> None:
        self.dense, self.survey = dense, survey
        self.tasks = _share_layers(tasks, survey)
        for task, names in self.tasks:
            task.check(_with_weights(survey, {name: survey.layers[name].weight for name in names}))
        names = [name for _, names in self.tasks for name in names]
        self.members: dict[str, StructuredMatrix] = {}
        self.multipliers = {name: torch.zeros_like(self.weight(dense, name)) for name in names}

    def weight(self, model: nn.Module, name: str) -> Tensor:
        """W_l in the shape that its structured matrix has; differentiable."""
        weight = dense_weight(model.get_submodule(name))
        assert weight is not None  # noqa: S101  (the survey has seen it)
        return weight

    def penalty(self, penalty: float) -> Callable[[nn.Module], Tensor]:
        """μ/2 Σ ‖W_l − Δ(Θ_l) − B_l/μ‖², a function of the network; a layer that stays dense is free."""
        anchors = {
            name: member.to_dense().detach() + self.multipliers[name] / penalty
            for name, member in self.members.items()
            if not isinstance(member.structure, Dense)
        }
        grams = {name: self.survey.layers[name].input_gram for name in anchors}

        def of(model: nn.Module) -> Tensor:
            distances = [
                squared_error((self.weight(model, name) - anchor).flatten(1), grams[name])
                for name, anchor in anchors.items()
            ]
            return penalty / 2 * sum(distances, torch.zeros(()))

        return of

    def compress(self, penalty: float) -> None:
        """The C step."""
        for task, names in self.tasks:
            targets = {
                name: (self.weight(self.dense, name) - self.multipliers[name] / penalty).detach()
                for name in names
            }
            starts = {name: self.members[name] for name in names if name in self.members}
            self.members |= task.fit(_with_weights(self.survey, targets), penalty, starts)

    def update_multipliers(self, penalty: float) -> None:
        """The B step."""
        for name, member in self.members.items():
            self.multipliers[name] -= penalty * (self.weight(self.dense, name) - member.to_dense()).detach()

    def state(self) -> dict[str, Any]:
        """W, Θ and B for a checkpoint."""
        members = {name: member_state(member) for name, member in self.members.items()}
        return {"model": self.dense.state_dict(), "members": members, "multipliers": self.multipliers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of a checkpoint."""
        self.dense.load_state_dict(state["model"])
        for name, held in state["members"].items():
            device = self.weight(self.dense, name).device
            self.members[name] = member_from(held).to(device)
            self.multipliers[name] = state["multipliers"][name].to(device)

    def distance(self) -> float:
        """‖W − Δ(Θ)‖ / ‖W‖ over all layers of the tasks."""
        weights = {name: self.weight(self.dense, name).detach() for name in self.members}
        layers = _with_weights(self.survey, weights).layers
        lost = sum(_distance(layer, self.members[name]) for name, layer in layers.items())
        return math.sqrt(lost / sum(_energy(layer, layer.weight) for layer in layers.values()))

    def size(self) -> dict[str, Any]:
        """What the compressed network costs, and its structures."""
        total = self.survey.total
        for name, member in self.members.items():
            layer = self.survey.layers[name]
            total = total - layer.cost + layer.per_sample(member.cost(layer.geometry))
        return {
            "parameters": total.parameters,
            "size": total.bytes,
            "multiply_adds": total.multiply_adds,
            "structures": {name: str(member.structure) for name, member in self.members.items()},
        }

    def compressed(self, model: nn.Module) -> nn.Module:
        """The network with Δ(Θ) in place of W but where that is dense, in the modes of the given one."""
        small = copy.deepcopy(self.dense)
        modes = {name: module.training for name, module in model.named_modules()}
        for name, module in small.named_modules():
            module.training = modes[name]
        for name, member in self.members.items():
            if not isinstance(member.structure, Dense):
                small = replace_layer(small, self.survey.layers[name].names, copy.deepcopy(member))
        return small


def _share_layers(tasks: Mapping[str, Task | Structure], survey: Survey) -> list[tuple[Task, list[str]]]:
    """Every task with its layers, in the survey's order."""
    if not tasks:
        raise ValueError(checks.fault("tasks", "at least one", "none", "name layers, e.g. {'*': ...}"))
    layers: dict[str, list[str]] = {pattern: [] for pattern in tasks}
    for name, layer in survey.layers.items():
        for pattern in tasks:
            if any(own == pattern or fnmatchcase(own, pattern) for own in layer.names):
                layers[pattern].append(name)
                break
    for pattern, names in layers.items():
        if not names:
            got = f"{pattern!r}, which is left with none of {', '.join(survey.layers) or 'no layers'}"
            remedy = "write a layer's name, with * for any part of it"
            raise ValueError(checks.fault("tasks", "patterns of layer names", got, remedy))
    return [(_task(task), layers[pattern]) for pattern, task in tasks.items()]
