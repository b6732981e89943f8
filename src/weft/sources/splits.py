"""The parts of a data set: something that gives batches of (inputs, targets), again and again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from weft import checks
from weft.checks import fault
from weft.sources.archive import numeric_tensor

Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
"""One batch of a model's inputs: a tensor for model(x), a tuple for model(*x), a dict for model(**x)."""

Batch: TypeAlias = tuple[Inputs, Tensor | None]
"""One batch of inputs with its targets, None where there are no labels."""


class Batches(Protocol):
    """Batches that can be iterated over any number of times; `len` gives their number where it is known."""

    def __iter__(self) -> Iterator[Batch]:
        """Starts another pass."""
        ...


class Split(ABC):
    """One part of a data set, such as its training part."""

    @abstractmethod
    def batches(
        self, batch_size: int = 128, *, limit: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> Batches:
        """Gives the examples in batches.

        Args:
            batch_size: examples per batch; the last batch may be smaller.
            limit: the largest number of examples; None for all.
            shuffle: whether every pass has its own order.
            seed: decides which examples a limit draws, and the orders of the passes.

        Returns:
            A re-iterable of (inputs, targets).
        """


class IndexedSplit(Split):
    """A split whose examples have numbers: `len(split)` examples, `split[indices]` a batch of them."""

    @abstractmethod
    def __len__(self) -> int:
        """Counts the examples."""

    @abstractmethod
    def read(self, groups: Sequence[Tensor]) -> Iterator[Batch]:
        """Reads batches of examples.

        Args:
            groups: for every batch the examples' numbers, shape (batch,).

        Returns:
            The batches, in the order asked for.
        """

    def __getitem__(self, indices: slice | Sequence[int] | Tensor) -> Batch:
        """Reads one batch: a slice or a sequence of examples' numbers."""
        return next(iter(self.read([torch.arange(len(self))[indices]])))

    def batches(
        self, batch_size: int = 128, *, limit: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> "IndexedBatches":
        """Gives the examples in batches.

        Args:
            batch_size: examples per batch; the last batch may be smaller.
            limit: the largest number of examples, drawn at random with `seed` (files are often sorted by
                class, so that the first ones would all show the same thing); a smaller limit draws a part of
                what a larger one draws. None for all examples, in their own order.
            shuffle: whether every pass has its own order: pass number p uses the seed `seed + p`.
            seed: decides which examples a limit draws, and the orders of the passes.

        Returns:
            A re-iterable of (inputs, targets) with a length.
        """
        return IndexedBatches(self, batch_size, limit=limit, shuffle=shuffle, seed=seed)

    def divide(
        self, share: float = 0.5, batch_size: int = 128, *, seed: int = 0
    ) -> tuple["IndexedBatches", "IndexedBatches"]:
        """Divides the examples in two at random.

        Args:
            share: the first part's, at least one example.
            batch_size: examples per batch.
            seed: decides the division.

        Returns:
            Batches of the first part and of the rest.
        """
        checks.share("share", share)
        first = IndexedBatches(self, batch_size, limit=max(1, int(len(self) * share)), seed=seed)
        second = IndexedBatches(self, batch_size)
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[first.indices] = False
        second.indices = kept.nonzero().squeeze(1)
        return first, second


class IndexedBatches:
    """The batches of an `IndexedSplit`, as its `batches` method describes them."""

    def __init__(
        self,
        split: IndexedSplit,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.split = split
        self.batch_size = checks.integer_between("batch_size", batch_size, 1, None)
        self.shuffle = shuffle
        self.seed = seed
        self.passes = 0
        self.indices = torch.arange(len(split))
        if limit is not None:
            self.indices = self._permutation(len(split), seed)[
                : checks.integer_between("limit", limit, 1, None)
            ]

    @property
    def examples(self) -> int:
        """How many examples one pass shows."""
        return len(self.indices)

    def resume_at(self, passes: int) -> None:
        """Continues an interrupted training: the next pass has the order of pass number `passes`."""
        self.passes = checks.integer_between("passes", passes, 0, None)

    def __len__(self) -> int:
        """Counts the batches."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Starts another pass."""
        order = self.indices
        if self.shuffle:
            order = order[self._permutation(len(order), self.seed + self.passes)]
        self.passes += 1
        return self.split.read(order.split(self.batch_size))

    @staticmethod
    def _permutation(count: int, seed: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class InputBatches:
    """The inputs alone of batches of (inputs, targets): what calibration takes."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Counts the batches; a TypeError where a stream does not know."""
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Inputs]:
        """Starts another pass."""
        return (inputs for inputs, _ in self.batches)


class TensorSplit(IndexedSplit):
    """Examples that lie in memory, kept in their stored type and prepared when a batch is read.

    Args:
        inputs: the examples, shape (examples, *input); floating ones must be finite.
        targets: their labels, integers of shape (examples, ...), or a regression's floating targets; None
            where there are none.
        scaling: how unsigned bytes become numbers; other integers stay what they are (token numbers),
            floating inputs are read in torch's default type.
        name: what the split is called in errors.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        scaling: "Scaling | None" = None,
        name: str = "data",
    ) -> None:
        if inputs.ndim == 0 or len(inputs) == 0:
            got = f"shape {tuple(inputs.shape)}"
            raise ValueError(
                fault(f"inputs of {name}", "at least one example", got, "give data that is not empty")
            )
        if inputs.is_floating_point():
            checks.finite(f"inputs of {name}", inputs)
        if targets is not None:
            _check_targets(name, targets, len(inputs))
            targets = targets.to(torch.get_default_dtype()) if targets.is_floating_point() else targets.long()
        if scaling is not None:
            scaling.check(name, inputs)
        self.inputs = inputs
        self.targets = targets
        self.scaling = scaling or Scaling()

    def __len__(self) -> int:
        """Counts the examples."""
        return len(self.inputs)

    def read(self, groups: Sequence[Tensor]) -> Iterator[Batch]:
        """Reads batches of examples.

        Args:
            groups: for every batch the examples' numbers, shape (batch,).

        Yields:
            Scaled inputs, shape (batch, *input), and targets, shape (batch, ...).
        """
        for indices in groups:
            yield self.scaling(self.inputs[indices]), None if self.targets is None else self.targets[indices]

    def restrict(self, indices: Tensor) -> "TensorSplit":
        """Keeps some of the examples.

        Args:
            indices: their numbers.

        Returns:
            A split of these alone.
        """
        targets = None if self.targets is None else self.targets[indices]
        return TensorSplit(self.inputs[indices], targets, scaling=self.scaling)


class DatasetSplit(IndexedSplit):
    """A torch `Dataset` with numbered examples, collated as a `DataLoader` does.

    An example is an input; (input,); (input, target); or a dict whose entry "labels" or "label", where there
    is one, is the target.

    Args:
        dataset: has `__len__` and `__getitem__`.
        collate: makes a batch of a list of examples; None for torch's own way.
        workers: how many processes read; 0 reads in this one.
        name: what the split is called in errors.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        name: str = "data",
    ) -> None:
        self.count = len(dataset)  # pyright: ignore[reportArgumentType]
        if self.count == 0:
            raise ValueError(
                fault(f"inputs of {name}", "at least one example", "none", "give data that is not empty")
            )
        self.dataset = dataset
        self.collate = collate
        self.workers = workers
        self.name = name

    def __len__(self) -> int:
        """Counts the examples."""
        return self.count

    def read(self, groups: Sequence[Tensor]) -> Iterator[Batch]:
        """Reads batches of examples.

        Args:
            groups: for every batch the examples' numbers, shape (batch,).

        Yields:
            Collated inputs and targets.
        """
        numbers = [indices.tolist() for indices in groups]
        loader = DataLoader(
            self.dataset,
            batch_sampler=numbers,
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator(),  # its own, so that reading does not advance torch's global generator
        )
        for batch in loader:
            yield _checked(self.name, batch)


class StreamSplit(Split):
    """A torch `IterableDataset`: examples in their own order, of unknown number.

    Args:
        dataset: iterated anew for every pass.
        collate: makes a batch of a list of examples; None for torch's own way.
        workers: how many processes read; 0 reads in this one.
        name: what the split is called in errors.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        name: str = "data",
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.workers = workers
        self.name = name

    def batches(
        self, batch_size: int = 128, *, limit: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> "StreamBatches":
        """Gives the examples in batches, as the stream brings them.

        Args:
            batch_size: examples per batch.
            limit: a pass ends with the batch that reaches this number of examples; None for all.
            shuffle: must be False: a stream has one order.
            seed: without effect.

        Returns:
            A re-iterable of (inputs, targets) without a length.

        Raises:
            ValueError: `shuffle` is asked for.
        """
        if shuffle:
            remedy = "shuffle inside the IterableDataset, or give a data set with numbered examples"
            raise ValueError(fault("shuffle", f"False for the stream {self.name}", True, remedy))
        return StreamBatches(self, batch_size, limit)


class StreamBatches:
    """The batches of a `StreamSplit`, as its `batches` method describes them."""

    def __init__(self, split: StreamSplit, batch_size: int, limit: int | None) -> None:
        self.split = split
        self.batch_size = checks.integer_between("batch_size", batch_size, 1, None)
        self.limit = None if limit is None else checks.integer_between("limit", limit, 1, None)

    def __iter__(self) -> Iterator[Batch]:
        """Starts another pass; a stream without any example is a ValueError."""
        split, seen = self.split, 0
        loader = DataLoader(
            split.dataset,
            self.batch_size,
            collate_fn=split.collate,
            num_workers=split.workers,
            generator=torch.Generator(),  # its own, so that reading does not advance torch's global generator
        )
        for batch in loader:
            yield _checked(split.name, batch)
            seen += self.batch_size
            if self.limit is not None and seen >= self.limit:
                return
        if not seen:
            remedy = "give data that is not empty"
            raise ValueError(fault(f"inputs of {split.name}", "at least one example", "none", remedy))


@dataclass(frozen=True)
class Scaling:
    """Turns stored inputs into a model's inputs: (x / divisor - mean) / std.

    Attributes:
        divisor: applied to unsigned bytes only.
        mean: per channel (axis 1 of a batch); None for no shift.
        std: per channel; None for no division.
    """

    divisor: float = 255.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def check(self, name: str, inputs: Tensor) -> None:
        """Checks that the constants fit.

        Args:
            name: what the split is called in errors.
            inputs: shape (examples, channels, ...).

        Raises:
            ValueError: there is another number of channels, a std is not positive, or the inputs are
                integers.
        """
        for argument, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
                remedy = f"leave {argument} away, or store unsigned bytes or floats"
                raise ValueError(fault(argument, f"absent for the integer inputs of {name}", values, remedy))
            channels = inputs.shape[1] if inputs.ndim > 1 else 0
            if len(values) not in {1, channels}:
                remedy = "give one number per channel"
                got = f"{len(values)} numbers"
                raise ValueError(fault(argument, f"{channels} numbers for the inputs of {name}", got, remedy))
            if argument == "std" and not all(value > 0 for value in values):
                raise ValueError(
                    fault(argument, "positive", values, "give every channel's standard deviation")
                )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Scales a batch.

        Args:
            inputs: shape (batch, channels, ...).

        Returns:
            The scaled batch in torch's default floating type; integers other than bytes unchanged.
        """
        stored_bytes = inputs.dtype == torch.uint8
        if not stored_bytes and not inputs.is_floating_point():
            return inputs
        x = inputs.to(torch.get_default_dtype())
        channelwise = (-1,) + (1,) * (inputs.ndim - 2)
        if stored_bytes:
            x = x / self.divisor
        if self.mean is not None:
            x = x - x.new_tensor(self.mean).view(channelwise)
        if self.std is not None:
            x = x / x.new_tensor(self.std).view(channelwise)
        return x


def hold_out(split: TensorSplit, share: float) -> tuple[TensorSplit | None, TensorSplit | None]:
    """Divides examples into a training and a held-out part, always in the same way.

    Args:
        split: all examples.
        share: the held-out share, from 0 (no test part) to 1 (no training part).

    Returns:
        Training part and test part; None for a part that the share excludes.

    Raises:
        ValueError: there are too few examples for this share.
    """
    first = split.targets if split.targets is not None and split.targets.ndim == 1 else None
    train, test = held_out_indices(len(split), first, share)
    if 0 < share < 1 and not (len(train) and len(test)):
        remedy = "give more data, or use held_out=0 or held_out=1"
        raise ValueError(fault("held_out", f"a share that divides {len(split)} examples", share, remedy))
    return (split.restrict(train) if len(train) else None), (split.restrict(test) if len(test) else None)


def held_out_indices(count: int, labels: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Chooses which examples to hold out: a stratified draw with a fixed seed.

    Examples are put in random order, sorted by label, and held out at equal distances, so that every class
    loses the same share up to one example and the total is exactly floor(share * count).

    Args:
        count: the number of examples.
        labels: shape (count,), or None to draw without regard to classes.
        share: the held-out share.

    Returns:
        The numbers of the training examples and of the held-out ones, each ascending.

    Examples:
        >>> train, test = held_out_indices(10, torch.tensor([0, 1] * 5), 0.4)
        >>> len(train), (test % 2).bincount()
        (6, tensor([2, 2]))
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    # The small number keeps a product such as 0.29 * 100 from falling just below the whole number that it is.
    steps = (torch.arange(count + 1, dtype=torch.float64) * share + 1e-9).floor()
    chosen = steps.diff() > 0
    return order[~chosen].sort().values, order[chosen].sort().values


def as_split(examples: object, name: str) -> Split:
    """Makes a split of what a user's own function returned.

    Args:
        examples: a tensor or array of inputs; a pair (inputs, labels) of them; a torch `TensorDataset`,
            `Dataset`, `IterableDataset` or `DataLoader` (whose own batch size and order give way to those
            asked for); or a split.
        name: what the split is called in errors.

    Returns:
        The split.
    """
    return _split_of(examples, name)


@singledispatch
def _split_of(examples: object, name: str) -> Split:
    expected = "a tensor, a pair (inputs, labels), a torch Dataset or a DataLoader"
    raise TypeError(fault(f"{name} data", expected, type(examples).__name__, "return one of these"))


@_split_of.register
def _(examples: Split, name: str) -> Split:
    return examples


@_split_of.register
def _(examples: Tensor, name: str) -> Split:
    return TensorSplit(examples, name=name)


@_split_of.register
def _(examples: np.ndarray, name: str) -> Split:
    return TensorSplit(numeric_tensor(f"inputs of {name}", examples), name=name)


@_split_of.register(tuple)
@_split_of.register(list)
def _(examples: Sequence[Any], name: str) -> Split:
    if len(examples) != 2:
        raise ValueError(
            fault(f"{name} data", "a pair (inputs, labels)", f"{len(examples)} items", "return a pair")
        )
    inputs, targets = (
        item if isinstance(item, Tensor) else numeric_tensor(f"{role} of {name}", np.asarray(item))
        for role, item in zip(("inputs", "labels"), examples, strict=True)
    )
    return TensorSplit(inputs, targets, name=name)


@_split_of.register
def _(examples: TensorDataset, name: str) -> Split:
    if len(examples.tensors) == 1:
        return TensorSplit(examples.tensors[0], name=name)
    return as_split(examples.tensors, name)


@_split_of.register
def _(examples: Dataset, name: str) -> Split:
    if not hasattr(type(examples), "__len__"):
        got = type(examples).__name__
        remedy = "define __len__, or derive from IterableDataset"
        raise TypeError(fault(f"{name} data", "a Dataset with a length", got, remedy))
    return DatasetSplit(examples, name=name)


@_split_of.register
def _(examples: IterableDataset, name: str) -> Split:
    return StreamSplit(examples, name=name)


@_split_of.register
def _(examples: DataLoader, name: str) -> Split:
    if examples.batch_sampler is None:
        remedy = "give it a batch_size and let the data set yield single examples"
        raise ValueError(fault(f"{name} DataLoader", "one that makes batches", "batch_size=None", remedy))
    split: Any = StreamSplit if isinstance(examples.dataset, IterableDataset) else DatasetSplit
    return split(examples.dataset, collate=examples.collate_fn, workers=examples.num_workers, name=name)


@singledispatch
def _divide(batch: Any) -> tuple[Any, Any]:
    # One collated batch -> (inputs, targets or None). Here: a tensor, or whatever a collate function made.
    return batch, None


@_divide.register(tuple)
@_divide.register(list)
def _(batch: Sequence[Any]) -> tuple[Any, Any]:
    if len(batch) not in {1, 2}:
        remedy = "let the data set give (input, target); several inputs go in a tuple or a dict"
        raise ValueError(
            fault("an example", "input, (input,) or (input, target)", f"{len(batch)} items", remedy)
        )
    inputs, targets = (*batch, None)[:2]
    return (tuple(inputs) if isinstance(inputs, list) else inputs), targets


@_divide.register(Mapping)
def _(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    targets = batch.get("labels", batch.get("label"))
    return {name: value for name, value in batch.items() if name not in {"label", "labels"}}, targets


def _checked(name: str, batch: Any) -> Batch:
    inputs, targets = _divide(batch)
    tensors = list(_tensors(inputs))
    for tensor in tensors:
        if tensor.is_floating_point():
            checks.finite(f"inputs of {name}", tensor)
    if targets is not None:
        if not isinstance(targets, Tensor):
            remedy = "let the data set or the collate function give numbers"
            raise TypeError(
                fault(f"labels of {name}", "a tensor of integers", type(targets).__name__, remedy)
            )
        _check_targets(name, targets, len(tensors[0]) if tensors else len(targets))
    return inputs, targets


def _check_targets(name: str, targets: Tensor, count: int) -> None:
    argument = f"labels of {name}"
    if targets.is_complex() or targets.dtype == torch.bool:
        expected = "integers, or floating for a regression"
        raise TypeError(fault(argument, expected, targets.dtype, "convert them, e.g. with .astype('int64')"))
    if targets.is_floating_point():
        checks.finite(argument, targets)
    if targets.ndim == 0 or len(targets) != count:
        expected = f"one for each of the {count} inputs"
        raise ValueError(
            fault(argument, expected, f"shape {tuple(targets.shape)}", "give as many labels as inputs")
        )
    if targets.ndim == 1 and not targets.is_floating_point() and int(targets.min()) < 0:
        remedy = "number the classes from 0 on; a hidden test part has no labels to compare with"
        raise ValueError(fault(argument, "class numbers from 0 on", int(targets.min()), remedy))


@singledispatch
def _tensors(inputs: object) -> Iterable[Tensor]:
    return ()


@_tensors.register
def _(inputs: Tensor) -> Iterable[Tensor]:
    return (inputs,)


@_tensors.register(tuple)
def _(inputs: tuple[Any, ...]) -> Iterable[Tensor]:
    return (tensor for item in inputs for tensor in _tensors(item))


@_tensors.register(Mapping)
def _(inputs: Mapping[str, Any]) -> Iterable[Tensor]:
    return (tensor for item in inputs.values() for tensor in _tensors(item))
