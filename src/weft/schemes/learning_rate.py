"""The learning rate chosen among several by a few steps of training and the metric that they lead to."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weft import checks
from weft.measure import check_repeatable, evaluating
from weft.progress import track
from weft.schemes.data_order import order_of, restore_order
from weft.schemes.training import DivergedError, Training, Validation, metric_of


def choose_learning_rate(
    training: Training,
    model: nn.Module,
    batches: Iterable[Any],
    rates: Sequence[float],
    *,
    validation: Validation,
    steps: int = 10,
    teacher: nn.Module | None = None,
    shown: bool | None = None,
) -> Training:
    """Tries every learning rate for a few steps from the same weights, on the same batches.

    Args:
        training: how to train; its optimiser is one of the named ones.
        model: the network as it will be trained (relaxed); it is not changed.
        batches: what the objective takes; their order is put back afterwards.
        rates: what to choose from; at equal metrics the first one wins.
        validation: held-out (inputs, labels) batches, or a function that gives a metric, larger is better.
        steps: how long each is tried.
        teacher: the network to learn from.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        The training with the rate whose steps led to the best metric; one whose loss is not finite loses.

    Raises:
        ValueError: there are no rates, all of them diverge, or the optimiser brings its own rate.

    References:
        Giffon, Ayache, Kadri, Artières and Sicre 2021, PSM-nets: among 1e-3, 1e-4 and 1e-5, after ten
        iterations.

    Examples:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> data = [(x, x.argmax(1))]
        >>> training = Training(epochs=20)
        >>> choose_learning_rate(training, nn.Linear(8, 8), data, (1e-6, 0.1), validation=data).learning_rate
        0.1
    """
    if not rates:
        raise ValueError(checks.fault("rates", "at least one number", rates, "e.g. (1e-3, 1e-4, 1e-5)"))
    if not isinstance(training.optimiser, str):
        remedy = "name the optimiser, or leave rates out"
        raise ValueError(checks.fault("optimiser", "a name where rates are given", "a function", remedy))
    checks.integer_between("steps", steps, 1, None)
    order = order_of(batches)  # before the check, which starts a pass
    check_repeatable("batches", batches)
    metric, found = metric_of(validation), []
    for rate in track(list(rates), "choosing the learning rate", shown=shown):
        trial = copy.deepcopy(model)
        restore_order(batches, order)
        candidate = replace(training, learning_rate=rate, patience=None)
        try:
            candidate.run(trial, batches, teacher=teacher, most_steps=steps, shown=False)
        except DivergedError:
            continue
        with evaluating(trial), torch.no_grad():
            value = float(metric(trial)) if metric is not None else 0.0
        found.append((value, rate))
    restore_order(batches, order)
    if not found:
        raise ValueError(
            checks.fault("rates", "such that one does not diverge", tuple(rates), "add a smaller one")
        )
    return replace(training, learning_rate=max(found, key=lambda pair: pair[0])[1])
