"""What training makes small: the loss on labels, the distance to a teacher's scores and features, or both."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.measure import (
    call,
    class_scores,
    device_of,
    evaluating,
    labelled,
    logits_of,
    matched,
    paired,
    to_device,
)

_IGNORED = -100  # the label that torch's cross-entropy passes over


@dataclass(frozen=True)
class Objective:
    """The loss of one batch.

    With scores s of the student and t of the teacher, temperature τ and label share α it is

        (1 − α) τ² KL(softmax(t/τ) ‖ softmax(s/τ)) + α loss(s, labels) + β mean_f ‖f_s − f_t‖² / ‖f_t‖²,

    the last term over the outputs f of the modules named in `features`. Without a teacher it is the loss on
    labels alone. Classes are on the last axis, or on axis 1 where labels or two axes of space say so.

    Of a regression, whose labels are floating or whose output is one number, softmax makes nothing: there the
    first term is (1 − α) times the mean of (s − t)², and the loss on labels the mean squared error too.

    Args:
        label_share: α, with a teacher and labels; at 0 no labels are needed.
        temperature: τ, softens the teacher's and the student's scores.
        loss: takes scores and labels and gives the mean loss; where None cross-entropy, or the mean squared
            error for floating labels.
        features: names of modules, the same in student and teacher, whose outputs shall agree.
        feature_weight: β.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range.

    References:
        Hinton, Vinyals and Dean 2015, Distilling the knowledge in a neural network, section 2; Romero et al.
        2015, FitNets, eq. 3 (here relative and without a regressor: the modules have the same outputs).
    """

    label_share: float = 0.0
    temperature: float = 2.0
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        checks.share("label_share", self.label_share, zero_allowed=True)
        checks.positive("temperature", self.temperature)
        checks.positive("feature_weight", self.feature_weight)

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Checks that the features can be compared.

        Args:
            student: the network that trains.
            teacher: the network that it learns from, or None.

        Raises:
            ValueError: there is no teacher, or one of the two has no module of a feature's name.
        """
        if self.features and teacher is None:
            raise ValueError(checks.fault("teacher", "given with features", None, "pass the dense network"))
        for role, model in (("student", student), ("teacher", teacher)):
            known = set() if model is None else {name for name, _ in model.named_modules()}
            for name in self.features:
                if name not in known:
                    expected = f"a module of the {role}"
                    remedy = "see model.named_modules()"
                    raise ValueError(checks.fault("features", expected, repr(name), remedy))

    def __call__(
        self, student: nn.Module, batch: Any, teacher: nn.Module | None, called: nn.Module | None = None
    ) -> Tensor:
        """The loss.

        Args:
            student: the network that trains.
            batch: (inputs, labels), or inputs alone where no labels are needed.
            teacher: the network to learn from; run in evaluation mode and without gradients.
            called: what is called in place of the student, where it is wrapped for several processes.

        Returns:
            A scalar, the mean over the batch.
        """
        called = student if called is None else called
        if teacher is None:
            given, labels = self._split(batch)
            return self._label_loss(logits_of(call(called, given)), labels)
        given = inputs_of(batch)
        with _recorded(student, self.features) as own:
            scores = logits_of(call(called, given))
        with _recorded(teacher, self.features) as wanted, torch.no_grad(), evaluating(teacher):
            target = logits_of(call(teacher, to_device(given, device_of(teacher)))).to(scores.device)
        loss = (1 - self.label_share) * self._divergence(scores, target, _labels_of(batch))
        if self.label_share:
            loss = loss + self.label_share * self._label_loss(scores, self._split(batch)[1])
        distances = [_distance(own[name], wanted[name]) for name in self.features]
        return loss + self.feature_weight * torch.stack(distances).mean() if distances else loss

    def _divergence(self, scores: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        floating = labels is not None and labels.is_floating_point()
        if floating or scores.ndim < 2 or scores.shape[-1] == 1:
            return F.mse_loss(scores, target)
        scores, target = (class_scores(one, labels) for one in (scores, target))
        loss = F.kl_div(
            (scores / self.temperature).log_softmax(-1).flatten(0, -2),
            (target / self.temperature).log_softmax(-1).flatten(0, -2),
            log_target=True,
            reduction="batchmean",
        )
        return loss * self.temperature**2  # keeps the gradient's size whatever the temperature

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels; those of classes as torch's loss takes them."""
        given, labels = paired(batch)
        return (given, labels) if self.loss is not None or labels.is_floating_point() else labelled(batch)

    def _label_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.loss is not None:
            return self.loss(scores, labels)
        if labels.is_floating_point():
            return F.mse_loss(scores, matched(labels, scores).to(scores))
        scores = class_scores(scores, labels)
        flat = labels.flatten()
        meant = flat[flat != _IGNORED]
        if meant.numel() and (int(meant.min()) < 0 or int(meant.max()) >= scores.shape[-1]):
            expected = f"between 0 and {scores.shape[-1] - 1}"
            got = f"{int(meant.min())} to {int(meant.max())}"
            remedy = "check that data and model have the same classes"
            raise ValueError(checks.fault("labels", expected, got, remedy))
        return F.cross_entropy(scores.flatten(0, -2), flat)


def _labels_of(batch: Any) -> Tensor | None:
    """A batch's labels, where it has some."""
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    return batch[1] if pair and isinstance(batch[1], Tensor) else None


def inputs_of(batch: Any) -> Any:
    """A batch without its labels.

    Args:
        batch: (inputs, labels), or inputs alone.

    Returns:
        The inputs.
    """
    return batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch


def _distance(own: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.detach().to(own)
    return (own - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(own.dtype).tiny)


@contextmanager
def _recorded(model: nn.Module, names: tuple[str, ...]) -> Generator[dict[str, Tensor], None, None]:
    """The outputs of modules in the calls made meanwhile, the last one where a module runs more than once."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = logits_of(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
