"""The one training loop: every scheme that trains runs it, with its own penalty, hooks and data."""

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._pytree import tree_leaves

from weft import checks
from weft.layers.base import StructuredLayer
from weft.measure import batch_size, call, check_repeatable, device_of, evaluating, quality, to_device
from weft.progress import track
from weft.schemes.checkpoint import Checkpoint, described
from weft.schemes.data_order import order_of, restore_order
from weft.schemes.log import Log
from weft.schemes.objective import Objective, inputs_of
from weft.schemes.processes import processes, writes_files
from weft.schemes.randomness import own_randomness, random_state, seed_all, set_random_state

Parameters = list[nn.Parameter]
Metric = Callable[[nn.Module], float]
Validation = Iterable[Any] | Metric

OPTIMISERS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options),
}
# The learning rate's factor at a share of the way.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


@dataclass(frozen=True)
class Training:
    """How to train: a value that any scheme may hold.

    Args:
        epochs: passes over the batches.
        learning_rate: at the start; an optimiser of your own has its own.
        weight_decay: of the named optimisers.
        optimiser: "adamw", "adam", "rmsprop", "sgd" (Nesterov momentum 0.9), or a function that makes
            one from the trainable parameters.
        schedule: "cosine" (half a period, to zero), "linear" (to zero) or "constant", or a function that
            makes a scheduler from the optimiser and the number of steps; it is stepped after every step.
            Where the number of batches is not known a named one is constant.
        accumulate: batches per step; their gradients are averaged by samples.
        mixed_precision: whether products run in bfloat16 (torch.autocast); weights and updates stay as they
            are.
        clip: the largest norm of the gradient; None for no bound.
        patience: ends when so many epochs in a row have not improved the validation metric, and gives the
            best epoch's weights; None trains to the end.
        seed: decides everything that is drawn while training: the same call gives the same result.
        objective: the loss.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range, or a name unknown.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimiser: str | Callable[[Parameters], Optimizer] = "adamw"
    schedule: str | Callable[[Optimizer, int], LRScheduler] = "cosine"
    accumulate: int = 1
    mixed_precision: bool = False
    clip: float | None = None
    patience: int | None = None
    seed: int = 0
    objective: Objective = Objective()

    def __post_init__(self) -> None:
        checks.integer_between("epochs", self.epochs, 1, None)
        checks.positive("learning_rate", self.learning_rate)
        if not self.weight_decay >= 0:
            raise ValueError(checks.fault("weight_decay", "at least 0", self.weight_decay, "use 0 for none"))
        if isinstance(self.optimiser, str):
            checks.one_of("optimiser", self.optimiser, OPTIMISERS)
        if isinstance(self.schedule, str):
            checks.one_of("schedule", self.schedule, SCHEDULES)
        checks.integer_between("accumulate", self.accumulate, 1, None)
        if self.clip is not None:
            checks.positive("clip", self.clip)
        if self.patience is not None:
            checks.integer_between("patience", self.patience, 1, None)
        checks.integer_between("seed", self.seed, 0, None)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Makes one from its own fields and those of its objective side by side.

        Args:
            **options: epochs, learning_rate, ..., label_share, temperature, ...

        Returns:
            The value; an unknown name is a TypeError.

        Examples:
            >>> Training.of(epochs=3, temperature=4.0).objective.temperature
            4.0
        """
        names = {field.name for field in fields(Objective)}
        loss = {name: options.pop(name) for name in list(options) if name in names}
        return cls(**options, objective=Objective(**loss)) if loss else cls(**options)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """What a training is, for its checkpoint.

        Args:
            model: the network before training.

        Returns:
            The options and the network's tensors' shapes by name, JSON-ready.
        """
        own = {field.name: described(getattr(self, field.name)) for field in fields(self)}
        own["tensors"] = {
            name: list(value.shape) if isinstance(value, Tensor) else None
            for name, value in model.state_dict().items()
        }
        own["objective"] = {
            field.name: described(getattr(self.objective, field.name)) for field in fields(Objective)
        }
        return own

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: nn.Module | None = None,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        validation: Validation | None = None,
        log: Log | None = None,
        checkpoint: Checkpoint | None = None,
        notes: Mapping[str, Any] | None = None,
        most_steps: int | None = None,
        description: str = "training",
        shown: bool | None = None,
    ) -> Log:
        """Trains a network in place; it is left in training mode.

        Whatever requires a gradient trains. Structured matrices whose values do not train as they are must
        have been relaxed (`weft.layers.base.relax`).

        Args:
            model: the network.
            batches: what the objective takes, iterable once per epoch.
            teacher: the network to learn from.
            penalty: is added to the loss of every step; its gradient flows into the network.
            after_step: is called with the network after every step, before the step's checkpoint.
            validation: held-out (inputs, labels) batches for the accuracy (of floating labels R²) after every
                epoch, or a function that gives a network's metric, larger is better.
            log: gets the entries; it may hold those of earlier stages. That of the checkpoint where None.
            checkpoint: where the state is kept. If it holds the state of this very training, that goes on
                from there.
            notes: fields that every entry gets, such as size.
            most_steps: ends after so many steps; the schedule stays that of the whole training.
            description: what the progress bar says.
            shown: whether to draw it; where None, on a terminal (lines elsewhere).

        Returns:
            The log.

        Raises:
            ValueError: nothing can be trained, there are no batches, patience has no validation, or the loss
                or a gradient became NaN or infinite (a DivergedError); the checkpoint then is the last good
                one.
        """
        trainable(model)
        self.objective.check(model, teacher)
        if self.patience is not None and validation is None:
            raise ValueError(
                checks.fault("validation", "given with patience", None, "pass validation batches")
            )
        if log is None:
            log = Log() if checkpoint is None else checkpoint.log
        given = _Given(
            batches,
            teacher,
            penalty,
            after_step,
            metric_of(validation),
            log,
            checkpoint,
            dict(notes or {}),
            most_steps,
            description,
            shown if writes_files() else False,
        )
        with own_randomness():
            _Stage(self, model, given).run()
        return log


def metric_of(validation: Validation | None) -> Metric | None:
    """What validates a network after every epoch.

    Args:
        validation: held-out (inputs, labels) batches, iterable more than once; a function; or None.

    Returns:
        The accuracy (of floating labels R²) on the batches, or the function.
    """
    if validation is None or callable(validation):
        return validation
    check_repeatable("validation", validation)
    return lambda model: quality(model, validation, shown=False)


def trainable(model: nn.Module) -> Parameters:
    """The parameters that require a gradient, shared ones once.

    Args:
        model: the network.

    Returns:
        At least one.

    Raises:
        ValueError: there are none; the message says why.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if parameters:
        return parameters
    whole = [
        name
        for name, module in model.named_modules()
        if isinstance(module, StructuredLayer) and not list(module.matrix.parameters())
    ]
    if whole:
        got = f"none: all tensors of {', '.join(map(repr, whole))} are integers"
        remedy = "plan a family with values that train, or leave a layer dense"
    else:
        got, remedy = "none that requires a gradient", "unfreeze some weights"
    raise ValueError(checks.fault("model", "one with weights to train", got, remedy))


class DivergedError(ValueError):
    """The loss, a gradient or a weight is no longer finite."""


class _Given(NamedTuple):
    """What `Training.run` was given."""

    batches: Iterable[Any]
    teacher: nn.Module | None
    penalty: Callable[[nn.Module], Tensor] | None
    after_step: Callable[[nn.Module], None] | None
    metric: Metric | None
    log: Log
    checkpoint: Checkpoint | None
    notes: dict[str, Any]
    most_steps: int | None
    description: str
    shown: bool | None


class _Stage:
    """One run of the loop: what changes from step to step."""

    def __init__(self, options: Training, model: nn.Module, given: _Given) -> None:
        self.options, self.given, self.original = options, given, model
        self.processes = processes()
        self.teacher = self.processes.place(given.teacher)
        work = self.processes.working_copy(model)
        self.optimiser = _optimiser(options, trainable(work))
        self.model, self.called = self.processes.prepare(work, self.optimiser)
        self.parameters = trainable(self.model)
        self.scheduler = _scheduler(options, self.optimiser, given.batches)
        self.log, self.checkpoint = given.log, given.checkpoint
        self.epoch = 0
        self.done = 0  # steps of this epoch
        self.first = given.log.steps
        self.order: list[Any] = []  # where the batches stood when the epoch began
        self.best: dict[str, Any] | None = None
        self.waited = 0
        self.finished = False

    # -- the loop

    def run(self) -> None:
        held = None if self.checkpoint is None else self.checkpoint.take()
        if held is not None:
            self._restore(held)
        while not self.finished:
            self._run_epoch(None if held is None else held["random"])
            held = None
        if self.checkpoint is not None and self.given.most_steps is None:
            self._save()
        self.processes.return_to(self.original, self.model)

    def _run_epoch(self, state: Mapping[str, Any] | None) -> None:
        """One epoch; from the middle of it where `state` says how the generators stood there."""
        if state is None:
            self.order = order_of(self.given.batches)
        else:
            restore_order(self.given.batches, self.order)
        # The order of an epoch follows from the seed and the steps before, whatever else was drawn.
        seed_all(self._seed(self.first + self.epoch))
        title = f"{self.given.description}, epoch {self.epoch + 1} of {self.options.epochs}"
        batches = track(self.given.batches, title, shown=self.given.shown)
        self.model.train()
        steps = 0
        for group in _groups(batches, self.options.accumulate):
            steps += 1
            if steps <= self.done:
                continue
            if state is not None:
                set_random_state(state)
                state = None
            self._step(group)
            if self.finished:
                return
        if not steps:
            remedy = "pass a list or a DataLoader, not an iterator that is used up"
            got = f"no batches in epoch {self.epoch + 1}"
            raise ValueError(checks.fault("batches", "not empty", got, remedy))
        if state is not None:
            set_random_state(state)
        self._end_epoch()

    def _step(self, group: list[Any]) -> None:
        self.processes.seed_step(self._seed(self.log.steps))
        samples = sum(map(batch_size, group))
        total, extra = 0.0, {}
        self.optimiser.zero_grad(set_to_none=True)
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            loss, value = self._loss(batch, samples)
            total += value
            if last and self.given.penalty is not None:
                added = self.given.penalty(self.model)
                extra = {"penalty": float(added.detach())}
                self._check("penalty", extra["penalty"], batch)
                loss = loss + added / self.processes.count
            self.processes.backward(loss, self.called, last=last)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._check("norm of the gradient", float(self.processes.whole(norm)), group[-1])
        if self.options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.clip, norm)
        self.optimiser.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.given.after_step is not None:
            self.given.after_step(self.model)
        self.done += 1
        self.log.step(epoch=self.epoch, loss=total, **extra, **self.given.notes)
        self.finished = self.log.steps - self.first == self.given.most_steps
        if self.checkpoint is not None and self.processes.agree(self.checkpoint.due()):
            self._save()

    def _loss(self, batch: Any, samples: int) -> tuple[Tensor, float]:
        """This process's part of the step's loss, and that of all processes as a number."""
        device = device_of(self.model)
        part, count = self.processes.share(batch, batch_size(batch))
        part = to_device(part, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.options.mixed_precision):
            loss = self.options.objective(self.model, part, self.teacher, self.called) * (count / samples)
        value = self.processes.total(float(loss.detach()))
        self._check("loss", value, batch)
        return loss, value

    def _end_epoch(self) -> None:
        metric = None
        if self.given.metric is not None:
            with evaluating(self.model), torch.no_grad():
                metric = self.processes.agree(float(self.given.metric(self.model)))
            self.log.note(epoch=self.epoch, metric=metric, **self.given.notes)
        self.epoch, self.done = self.epoch + 1, 0
        self.finished = self.epoch == self.options.epochs
        if self.options.patience is None or metric is None:
            return
        if self.best is None or metric > self.best["metric"]:
            state = self.processes.state(self.model)
            self.best, self.waited = {"metric": metric, "model": copy.deepcopy(dict(state))}, 0
        else:
            self.waited += 1
        self.finished |= self.waited >= self.options.patience
        if self.finished:
            self.processes.put(self.model, self.best["model"])

    def _seed(self, number: int) -> int:
        """One of this training's seeds; those of others are far from it."""
        return self.options.seed * 1_000_003 + number

    # -- what goes wrong

    def _check(self, what: str, value: float, batch: Any = None) -> None:
        if math.isfinite(value):
            return
        got = f"{value} at step {self.log.steps}{_blame(self.model, batch)}"
        remedy = f"lower the learning rate ({self.options.learning_rate}) or check the data"
        raise DivergedError(checks.fault(what, "finite", got, remedy))

    # -- checkpoints

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        if not all(bool(self.processes.whole(parameter.isfinite().all())) for parameter in self.parameters):
            self._check("weights", math.nan)  # a checkpoint of these would be no good one
        self.checkpoint.write({
            "model": self.processes.state(self.model),
            "optimiser": self.processes.optimiser_state(self.model, self.optimiser),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "first": self.first,
            "order": self.order,
            "random": random_state(),
            "best": self.best,
            "waited": self.waited,
            "finished": self.finished,
        })

    def _restore(self, held: Mapping[str, Any]) -> None:
        self.processes.put(self.model, held["model"])
        self.processes.put_optimiser(self.model, self.optimiser, held["optimiser"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(held["scheduler"])
        for name in ("epoch", "done", "first", "order", "best", "waited", "finished"):
            setattr(self, name, held[name])


# ------------------------------------------------------------------------------------------------------------
# Parts


def _optimiser(options: Training, parameters: Parameters) -> Optimizer:
    if not isinstance(options.optimiser, str):
        return options.optimiser(parameters)
    make = OPTIMISERS[options.optimiser]
    return make(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)


def _scheduler(options: Training, optimiser: Optimizer, batches: Iterable[Any]) -> LRScheduler | None:
    per_epoch = -(-operator.length_hint(batches) // options.accumulate)
    total = per_epoch * options.epochs
    if not isinstance(options.schedule, str):
        return options.schedule(optimiser, total)
    if not total:
        return None
    factor = SCHEDULES[options.schedule]
    return LambdaLR(optimiser, lambda step: factor(min(step, total) / total))


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches that hold samples, so many at a time; the last group may be smaller."""
    full = (batch for batch in batches if batch_size(batch))
    while group := list(itertools.islice(full, size)):
        yield group


def _blame(model: nn.Module, batch: Any) -> str:
    """Where numbers first stop being finite: a weight, the batch, a layer's output, or a gradient."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f", in weight {name} of norm {_norm(parameter)}"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if found or _finite(output):
                return
            if not _finite(given):
                found.append(f", in the batch itself (first used by layer {name!r})")
                return
            norms = ", ".join(f"{held} {_norm(weight)}" for held, weight in module.named_parameters())
            found.append(f", in the output of layer {name!r} (norms of its weights: {norms or 'none'})")

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not list(module.children()) or isinstance(module, StructuredLayer)
    ]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, to_device(inputs_of(batch), device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if not found and parameter.grad is not None and not _finite(parameter.grad):
            found.append(f", in the gradient of {name} (norm of the weight: {_norm(parameter)})")
    return found[0] if found else ""


def _norm(tensor: Tensor) -> str:
    return f"{float(tensor.detach().norm()):.4g}"


def _finite(value: Any) -> bool:
    """Whether the floating tensors in a module's input or output are finite."""
    return all(
        bool(tensor.isfinite().all())
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    )
