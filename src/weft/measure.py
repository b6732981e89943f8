"""Measuring a network: its metric, its cost, its latency; dense and compressed side by side."""

import gc
import importlib.metadata
import inspect
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from weft import checks
from weft.kernels import route
from weft.layers.base import StructuredLayer
from weft.layers.replace import dense_weight, geometry_of_layer, looks_up
from weft.numerics.entropy_coding import entropy_bound
from weft.numerics.svd import singular_values_by_gram
from weft.progress import track
from weft.storage import structured_layers
from weft.structures.base import Cost

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
Metric = Callable[[nn.Module, Iterable[Any]], float]


# ------------------------------------------------------------------------------------------------------------
# Calling a model


def call(model: nn.Module, batch: Batch) -> Any:
    """Calls a model with a batch: tensor `model(x)`, tuple or list `model(*x)`, dictionary `model(**x)`.

    Args:
        model: the network.
        batch: its inputs.

    Returns:
        What the model returns.

    Raises:
        TypeError: the model does not take as many inputs as the batch holds.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    try:
        return model(*batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        expected = f"what {type(model).__name__}.forward takes"
        remedy = "if your batches are (inputs, targets) pairs, pass weft.inputs(batches)"
        raise TypeError(checks.fault("batch", expected, f"{len(batch)} inputs", remedy)) from error


def call_checked(model: nn.Module, batch: Batch, argument: str = "batches") -> Any:
    """Calls a model with a batch that a user gave and nobody has tried yet.

    Args:
        model: the network.
        batch: its inputs.
        argument: the name that the user knows them by.

    Returns:
        What the model returns.

    Raises:
        ValueError: the model fails on them; its own words are in the message.
        OutOfMemoryError: there is not enough memory, for which the batch is not to blame.
    """
    try:
        return call(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{tuple(item.shape)} of {item.dtype}" for item in tensors_in(batch))
        expected = "what the model takes"
        got = f"{shapes or type(batch).__name__} ({str(error).splitlines()[0] if str(error) else error!r})"
        remedy = "pass inputs of the shape and type that the model was made for"
        raise ValueError(checks.fault(argument, expected, got, remedy)) from error


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch.

    Args:
        batch: a model's inputs.

    Yields:
        A tensor itself, or those that a dictionary, list or tuple holds.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        yield from (item for item in values if isinstance(item, Tensor))


def _takes(model: nn.Module, batch: Sequence[Any]) -> bool:
    """Whether a model's signature has a place for every input; looked at only once a call has failed."""
    try:
        inspect.signature(model.forward).bind(*batch)
    except TypeError:
        return False
    return True


class inputs:  # noqa: N801  (reads as a function: weft.inputs(loader))
    """The inputs of (inputs, targets) batches, for calls that need no labels; iterates as often as they do.

    Args:
        batches: an iterable of pairs.

    Examples:
        >>> [x.shape for x in inputs([(torch.zeros(2, 3), torch.zeros(2))])]
        [torch.Size([2, 3])]
    """

    def __init__(self, batches: Iterable[Sequence[Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return (batch[0] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def check_repeatable(argument: str, batches: Iterable[Any]) -> None:
    """Checks that batches can be iterated more than once.

    Args:
        argument: the argument's name.
        batches: what came.

    Raises:
        TypeError: they are an iterator, which is used up after one pass.
    """
    if iter(batches) is batches:
        remedy = "pass a list or a DataLoader"
        got = type(batches).__name__
        raise TypeError(checks.fault(argument, "iterable more than once", got, remedy))


def batch_size(batch: Batch) -> int:
    """The number of samples in a batch: the first dimension of its first tensor.

    Args:
        batch: a model's inputs.

    Returns:
        The number of samples; 1 where no tensor has a batch dimension.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 1)


def to_device(value: Any, device: torch.device) -> Any:
    """Moves a tensor, or the tensors in a list, tuple or dictionary, to a device.

    Args:
        value: a batch, or a part of one.
        device: where to.

    Returns:
        The same structure on the device; tuples come back as lists.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU where it has none.

    Args:
        model: the network.

    Returns:
        The device.
    """
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Puts a model into evaluation mode and every module back into its own mode afterwards.

    Args:
        model: the network.

    Yields:
        The model.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


def logits_of(output: Any) -> Tensor:
    """The scores in a model's output: the tensor itself, its field or entry `logits`, or its first tensor.

    Args:
        output: what a model returned.

    Returns:
        A floating tensor.

    Raises:
        TypeError: there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    remedy = "pass a metric= of your own"
    raise TypeError(
        checks.fault("model output", "a tensor or something that holds one", type(output).__name__, remedy)
    )


def class_scores(scores: Tensor, labels: Tensor | None = None) -> Tensor:
    """A classifier's scores with the classes on the last axis.

    torch's own losses have the classes of images and sequences on axis 1, language models on the last one.

    Args:
        scores: shape (*batch, classes), or (batch, classes, *space).
        labels: class numbers, shape (*batch,) or (batch, *space), which tell the two apart; without them two
            axes of space or more mean the second.

    Returns:
        Shape (*batch, classes) or (batch, *space, classes).
    """
    in_space = scores.ndim > 3
    if labels is not None and scores.ndim > 2:
        fits_last = labels.shape == scores.shape[:-1]
        in_space = not fits_last and labels.shape == (scores.shape[0], *scores.shape[2:])
    return scores.movedim(1, -1) if in_space else scores


# ------------------------------------------------------------------------------------------------------------
# Metrics


def quality(model: nn.Module, data: Iterable[Sequence[Any]], *, shown: bool | None = None) -> float:
    """The metric where none is named: top-1 accuracy for integer labels, R² for floating targets.

    Args:
        model: the network; run in evaluation mode.
        data: pairs of inputs and labels.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        Larger is better; `quality_name` says which it is.

    Raises:
        ValueError: there are no batches.
    """
    batches = iter(track(data, "evaluating", shown=shown))
    first = next(batches, None)
    if first is None:
        raise ValueError(checks.fault("data", "not empty", "no samples", "pass at least one batch"))
    metric = r_squared if quality_name(first) == "R²" else accuracy
    return metric(model, itertools.chain([first], batches), shown=False)


def quality_name(batch: Sequence[Any]) -> str:
    """What `quality` is for data of this kind.

    Args:
        batch: inputs and labels.

    Returns:
        "accuracy" or "R²".
    """
    return "R²" if paired(batch)[1].is_floating_point() else "accuracy"


def r_squared(model: nn.Module, data: Iterable[Sequence[Any]], *, shown: bool | None = None) -> float:
    """The share of the targets' variance that a regression explains: 1 − Σ‖y − ŷ‖² / Σ‖y − mean(y)‖².

    Args:
        model: the network; run in evaluation mode.
        data: pairs of inputs and floating targets, one number per output.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        At most 1; 0 is what the mean target reaches, NaN what an output that is no number makes of it.

    Raises:
        ValueError: there are no batches, all targets are equal, or they and the outputs do not match.
    """
    lost = 0.0
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for batch in track(data, "evaluating", shown=shown):
            given, targets = paired(batch)
            output = logits_of(call_checked(model, to_device(given, device), "data")).double().cpu()
            targets = matched(targets.double().cpu(), output)
            lost += float((targets - output).square().sum())
            # Moved by what the batch tells, as sums of squares lose the digits of large means.
            own, own_count = targets.mean(0), len(targets)
            spread = spread + (targets - own).square().sum(0)
            spread = spread + (own - mean).square() * (count * own_count / max(1, count + own_count))
            mean = mean + (own - mean) * (own_count / max(1, count + own_count))
            count += own_count
    whole = float(spread.sum())
    if not whole > 0:
        got = "all equal" if count else "none"
        raise ValueError(checks.fault("targets", "of different values", got, "pass more samples"))
    return 1 - lost / whole


def matched(targets: Tensor, output: Tensor) -> Tensor:
    """Targets of a regression in the shape of what the network gives, which may have an axis of one more.

    Args:
        targets: floating.
        output: the network's.

    Returns:
        The targets, in the output's shape.

    Raises:
        ValueError: the shapes differ in more than axes of one.
    """
    counts = [[len(one), *(size for size in one.shape[1:] if size > 1)] for one in (targets, output)]
    if counts[0] != counts[1]:
        remedy = "give one number per output, or class numbers as integers"
        expected = f"of shape {tuple(output.shape)}"
        raise ValueError(checks.fault("floating targets", expected, tuple(targets.shape), remedy))
    return targets.reshape(output.shape)


def accuracy(model: nn.Module, data: Iterable[Sequence[Any]], *, shown: bool | None = None) -> float:
    """Top-1 accuracy over (inputs, labels) batches.

    Args:
        model: the network; run in evaluation mode.
        data: pairs of inputs and integer labels (anything else is a TypeError); labels of the shape of the
            scores without their last axis, or without axis 1 as torch's losses have it.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        The share of labels that are the largest score; NaN among the scores counts as wrong.

    Raises:
        ValueError: there are no batches, or labels and scores do not match.
    """
    right = count = 0
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for batch in track(data, "evaluating", shown=shown):
            given, labels = labelled(batch)
            scores = class_scores(logits_of(call_checked(model, to_device(given, device), "data")), labels)
            if labels.shape != scores.shape[:-1]:
                remedy = "one label per score vector"
                raise ValueError(
                    checks.fault(
                        "labels", f"of shape {tuple(scores.shape[:-1])}", tuple(labels.shape), remedy
                    )
                )
            if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= scores.shape[-1]):
                got = f"{int(labels.min())} to {int(labels.max())}"
                remedy = "check that data and model have the same classes"
                raise ValueError(checks.fault("labels", f"between 0 and {scores.shape[-1] - 1}", got, remedy))
            known = ~scores.isnan().any(-1)  # the largest of NaNs is no answer
            right += int(((scores.argmax(-1) == labels.to(scores.device)) & known).sum())
            count += labels.numel()
    if not count:
        raise ValueError(checks.fault("data", "not empty", "no labelled samples", "pass at least one batch"))
    return right / count


def paired(batch: Any) -> tuple[Any, Tensor]:
    """Splits a batch into inputs and targets.

    Args:
        batch: (inputs, targets).

    Returns:
        The inputs and the targets.

    Raises:
        TypeError: it is no pair.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        remedy = "pass batches of (inputs, labels)"
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        if isinstance(batch, list | tuple) and len(batch) == 2:
            got = "no labels" if batch[1] is None else f"labels that are {type(batch[1]).__name__}"
        raise TypeError(checks.fault("data", "an iterable of (inputs, labels) pairs", got, remedy))
    return batch[0], batch[1]


def labelled(batch: Any) -> tuple[Any, Tensor]:
    """Splits a batch into inputs and labels.

    Args:
        batch: (inputs, labels); what is no pair is a TypeError.

    Returns:
        The inputs and the integer labels.

    Raises:
        TypeError: the labels are no integers.
    """
    given, labels = paired(batch)
    if labels.is_floating_point() or labels.is_complex():
        remedy = "pass integer labels, or a metric= or loss= of your own"
        raise TypeError(checks.fault("labels", "integers", labels.dtype, remedy))
    return given, labels.long()


# ------------------------------------------------------------------------------------------------------------
# Cost


def network_cost(model: nn.Module, batch: Batch | None = None) -> Cost:
    """What a whole network costs.

    Multiply-adds are counted from a real run by torch's own counter (matrix products, convolutions,
    attention); a structured layer counts with its own cost, whatever code ran it.

    Args:
        model: the network.
        batch: inputs for the run; without them multiply-adds are 0.

    Returns:
        Parameters and bytes of all stored tensors, shared ones once; multiply-adds per sample.
    """
    layers = {module.matrix for module in model.modules() if isinstance(module, StructuredLayer)}
    parameters = size = 0
    for matrix in layers:
        cost = matrix.cost()
        parameters, size = parameters + cost.parameters, size + cost.bytes
    inside = {tensor.data_ptr() for matrix in layers for tensor in matrix.state_dict().values()}
    seen: set[tuple[int, torch.Size]] = set()
    trainable = {parameter.data_ptr() for parameter in model.parameters()}
    for tensor in model.state_dict().values():
        key = (tensor.data_ptr(), tensor.shape) if isinstance(tensor, Tensor) else None
        if key is None or key in seen or key[0] in inside:
            continue
        seen.add(key)
        size += tensor.nbytes
        parameters += tensor.numel() if key[0] in trainable else 0
    return Cost(parameters, size, 0 if batch is None else _count_multiply_adds(model, batch))


@dataclass(frozen=True)
class Footprint:
    """What a network's tensors take, in bytes.

    Attributes:
        stored: in a file, entropy coding aside: parameters and persistent buffers, shared ones once.
        memory: in this process: those, buffers unpacked from them, and what structured matrices keep.
        entropy_bound: in a file with entropy coding, at the least: `weft.save(..., entropy_coding=True)`
            comes near.
    """

    stored: int
    memory: int
    entropy_bound: int


def footprint(model: nn.Module) -> Footprint:
    """Counts the bytes of a network's tensors.

    Args:
        model: the network; what its last call unpacked and kept counts as memory.

    Returns:
        The bytes stored, in memory, and at the entropy of the stored symbols.

    Examples:
        >>> footprint(nn.Linear(4, 4)).stored
        80
    """
    stored = _distinct(model.state_dict().values())
    held = _distinct([*model.state_dict().values(), *model.parameters(), *model.buffers()])
    kept = sum(
        {
            module.matrix: module.matrix.derived_bytes()
            for module in model.modules()
            if isinstance(module, StructuredLayer)
        }.values()
    )
    return Footprint(
        sum(tensor.nbytes for tensor in stored),
        sum(tensor.nbytes for tensor in held) + kept,
        sum(entropy_bound(tensor) for tensor in stored),
    )


def _distinct(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, those that share their memory once."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    return list({(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in tensors}.values())


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent_flops(x: Sequence[int], into: Sequence[int], again: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (math.prod(into) + math.prod(again))


def _matrix_vector_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


_UNCOUNTED_BY_TORCH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.dot: _matrix_vector_flops,
}


def _count_multiply_adds(model: nn.Module, batch: Batch) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED_BY_TORCH)
    outside: list[float] = []
    own: list[float] = []
    handles = []

    def enter(module: StructuredLayer, _: Any) -> None:
        outside.append(-counter.get_total_flops() / 2)

    def leave(module: StructuredLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        outside[-1] += counter.get_total_flops() / 2  # what torch counted inside: to be taken off again
        geometry = geometry_of_layer(module)
        per_vector = module.matrix.multiply_adds()
        if geometry is None:
            own.append(per_vector * output.numel() / module.matrix.outputs)
        else:
            space = len(module.matrix.shape) - 2
            positions = math.prod(output.shape[-space:])
            size = tuple((args[0] if args else kwargs["input"]).shape[-space:])
            unit = module.matrix.multiply_adds(replace(geometry, input_size=size))
            own.append(unit * output.numel() / (module.matrix.outputs * positions))

    with evaluating(model), torch.no_grad():
        for module in model.modules():
            # What it takes to form single rows no family states: there torch's own count stands.
            if isinstance(module, StructuredLayer) and not looks_up(module):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            with counter, slow_attention_path():
                call(model, to_device(batch, device_of(model)))
        finally:
            for handle in handles:
                handle.remove()
    return round((counter.get_total_flops() / 2 - sum(outside) + sum(own)) / max(1, batch_size(batch)))


@contextmanager
def slow_attention_path() -> Any:
    """Turns the fused transformer path off, behind which hooks and counters do not see single layers.

    Yields:
        Nothing.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# ------------------------------------------------------------------------------------------------------------
# Memory


def peak_activations(model: nn.Module, batch: Batch) -> int:
    """Measures the memory that one call in evaluation takes for a while, by torch's own allocator.

    Args:
        model: the network.
        batch: its inputs.

    Returns:
        Bytes per sample: the largest sum of all that the call had allocated and not yet freed, its result
        included, its input not. What native code holds for itself is not seen.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))
        >>> peak_activations(model, torch.zeros(4, 8))
        800
    """
    device = device_of(model)
    given = to_device(batch, device)
    with evaluating(model), torch.inference_mode():
        call(model, given)  # what is kept between calls is formed now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call(model, given)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            peak = traced_peak(lambda: call(model, given))
    return math.ceil(peak / max(1, batch_size(batch)))


def traced_peak(run: Callable[[], object]) -> int:
    """Measures the memory that a call takes for a while, by torch's own allocator on the CPU.

    Args:
        run: what is called.

    Returns:
        The most bytes that were allocated and not yet freed at once.
    """
    return max(itertools.accumulate(size for _, size in _traced(run)[0]), default=0)


def activation_profile(
    model: nn.Module, batch: Batch, layers: Mapping[str, Sequence[nn.Module]]
) -> tuple[dict[str, int], int]:
    """Measures what activations take before some layers run, and at the most while none of them does.

    Args:
        model: the network, on the CPU.
        batch: its inputs.
        layers: modules by name.

    Returns:
        Bytes by name, at the call where they are the most; and the peak outside of all these calls.
    """
    handles, begun = [], []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            region = torch.autograd.profiler.record_function(_REGION + name)
            region.__enter__()
            begun.append(region)

        return hook

    def leave(*_: object) -> None:
        begun.pop().__exit__(None, None, None)

    with evaluating(model), torch.inference_mode():
        call(model, batch)
        try:
            for name, modules in layers.items():
                for module in modules:
                    handles.append(module.register_forward_pre_hook(enter(name)))
                    handles.append(module.register_forward_hook(leave))
            allocations, regions = _traced(lambda: call(model, batch))
        finally:
            for handle in handles:
                handle.remove()
    before: dict[str, int] = {}
    outside = live = 0
    edges = sorted(
        [
            *((start, 0, name) for name, start, _ in regions),
            *((stop, 1, name) for name, _, stop in regions),
            *((when, 2, size) for when, size in allocations),
        ],
        key=lambda edge: edge[0],
    )
    inside = 0
    for _, kind, what in edges:
        if kind == 0:
            inside += 1
            before[str(what)] = max(before.get(str(what), 0), live)
        elif kind == 1:
            inside -= 1
        else:
            live += int(what)
            if not inside:
                outside = max(outside, live)
    return before, outside


_REGION = "weft::"


def _traced(run: Callable[[], object]) -> tuple[list[tuple[int, int]], list[tuple[str, int, int]]]:
    """Allocations as (nanoseconds, bytes, negative where freed), and regions as (name, start, stop)."""
    profiler = torch.autograd.profiler.profile(profile_memory=True)
    with _quiet():
        profiler.__enter__()
    try:
        result = run()
    finally:
        with _quiet():
            profiler.__exit__(None, None, None)
    del result
    recorded: Any = profiler.kineto_results
    events = sorted(recorded.events(), key=lambda event: event.start_ns())
    allocations = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    regions = [
        (event.name().removeprefix(_REGION), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().startswith(_REGION)
    ]
    return allocations, regions


@contextmanager
def _quiet() -> Any:
    """Silences what libraries write to standard error, as the profiler does when it starts and ends."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (a device)
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# ------------------------------------------------------------------------------------------------------------
# Latency


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over many calls.

    Attributes:
        median: the median.
        low: the 10 % quantile.
        high: the 90 % quantile.
        calls: how many calls were timed.
    """

    median: float
    low: float
    high: float
    calls: int


@contextmanager
def threads(count: int) -> Any:
    """Sets torch's number of threads for a while.

    Args:
        count: at least 1.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_alternating(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 15,
    most: int = 2000,
    device: torch.device | None = None,
    before: Callable[[Callable[[], object]], object] | None = None,
) -> dict[str, Timing]:
    """Times several calls in turns, so that what disturbs the machine disturbs all of them alike.

    Args:
        calls: what to time, by name.
        seconds: about how long to measure altogether.
        least: the least number of rounds.
        most: the largest number of rounds.
        device: synchronised around every call where it is no CPU.
        before: done before every call, outside of its time; is given the call.

    Returns:
        One timing per name.
    """

    def once(run: Callable[[], object]) -> float:
        if before is not None:
            before(run)
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        run()
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        for run in calls.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for rounds in range(most):
        if rounds >= least and time.perf_counter() > end:
            break
        for name, run in calls.items():
            taken[name].append(once(run))
    return {name: _summary(values) for name, values in taken.items()}


def _summary(values: list[float]) -> Timing:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[-1], len(values))


def repeat_to(batch: Any, size: int) -> Any:
    """A batch of a given size, made by repeating or cutting another.

    Args:
        batch: a model's inputs.
        size: the number of samples wanted.

    Returns:
        The same structure with `size` samples; tuples come back as lists.
    """
    if isinstance(batch, Tensor):
        if not batch.ndim:
            return batch
        return batch[torch.arange(size, device=batch.device) % batch.shape[0]].contiguous()
    if isinstance(batch, Mapping):
        return {key: repeat_to(item, size) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        return [repeat_to(item, size) for item in batch]
    return batch


@dataclass(frozen=True)
class Latency:
    """Dense and compressed, timed in turns in the same run.

    Attributes:
        batch: samples per call.
        threads: torch's number of threads.
        dense: seconds per call of the dense network.
        compressed: seconds per call of the compressed one.
    """

    batch: int
    threads: int
    dense: Timing
    compressed: Timing

    @property
    def speedup(self) -> float:
        """Dense time over compressed time."""
        return self.dense.median / self.compressed.median


def latencies(
    dense: nn.Module,
    compressed: nn.Module,
    sample: Batch,
    *,
    batches: Sequence[int] = (1, 128),
    thread_counts: Sequence[int] | None = None,
    seconds: float = 1.0,
    before: Callable[[Callable[[], object]], object] | None = None,
    shown: bool | None = None,
) -> list[Latency]:
    """Times two networks in turns.

    Args:
        dense: the dense network.
        compressed: the compressed one.
        sample: inputs that are repeated or cut to each batch size.
        batches: samples per call.
        thread_counts: torch's thread counts; where None, the current one.
        seconds: about how long to measure per combination.
        before: as `time_alternating` has it.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        One row per combination.
    """
    wanted = [(size, count) for count in (thread_counts or [torch.get_num_threads()]) for size in batches]
    for model in (dense, compressed):
        with evaluating(model), torch.inference_mode():
            first = repeat_to(to_device(sample, device_of(model)), min(batches))
            call_checked(model, first, "sample")
    rows = []
    with evaluating(dense), evaluating(compressed), torch.inference_mode():
        for size, count in track(wanted, "timing", shown=shown):
            given = repeat_to(sample, size)
            on_dense, on_compressed = (to_device(given, device_of(model)) for model in (dense, compressed))
            with threads(count):
                timed = time_alternating(
                    {
                        "dense": lambda given=on_dense: call(dense, given),
                        "compressed": lambda given=on_compressed: call(compressed, given),
                    },
                    seconds=seconds,
                    device=device_of(dense),
                    before=before,
                )
            rows.append(Latency(size, count, timed["dense"], timed["compressed"]))
    return rows


def environment() -> dict[str, Any]:
    """The machine and the versions, to be written beside every measurement.

    Returns:
        JSON-ready data.
    """
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  (no path of the user's)
            name = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name
            )
    except OSError:
        pass  # only Linux has it
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "weft": importlib.metadata.version("weft"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": route(),
    }


# ------------------------------------------------------------------------------------------------------------
# Side by side


@dataclass(frozen=True)
class LayerRow:
    """One layer of the compressed network.

    Attributes:
        name: its name.
        structure: its structure as text.
        shape: the dense weight's shape.
        dense: the dense weight's cost.
        cost: the structured one's.
        picture: its blocks as JSON-ready rectangles.
        only_storage_shrinks: whether it takes the dense layer's multiply-adds or more, as a convolution that
            runs by its dense kernel does.
        distance: ‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, W the dense weight; None where it is not at hand.
        singular_values: some of both matrices' singular values: "place" (from 1), "dense", "structured"; None
            where the dense weight is not at hand or has more than 2,048 rows and columns.
    """

    name: str
    structure: str
    shape: tuple[int, ...]
    dense: Cost
    cost: Cost
    picture: list[dict[str, Any]]
    only_storage_shrinks: bool = False
    distance: float | None = None
    singular_values: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class Measurement:
    """Dense and compressed, measured in the same run.

    Attributes:
        metric: what the values are, such as "accuracy".
        dense_value: the dense network's.
        value: the compressed one's.
        dense_cost: the dense network's cost.
        cost: the compressed one's.
        latencies: times, measured in turns.
        layers: the compressed layers.
        environment: machine and versions.
        dense_footprint: the dense network's bytes; None in measurements from before they were counted.
        footprint: the compressed one's.
        dense_activations: bytes per sample that a call of the dense network holds at most at once; None in
            measurements from before they were measured.
        activations: the compressed one's.
    """

    metric: str
    dense_value: float
    value: float
    dense_cost: Cost
    cost: Cost
    latencies: list[Latency]
    layers: list[LayerRow]
    environment: dict[str, Any]
    dense_footprint: Footprint | None = None
    footprint: Footprint | None = None
    dense_activations: int | None = None
    activations: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON-ready data.

        Returns:
            Nested dictionaries and lists.
        """
        return asdict(self)


def layer_rows(
    model: nn.Module, *, against: nn.Module | None = None, shown: bool | None = None
) -> list[LayerRow]:
    """Describes every structured layer of a network; layers that share a matrix once.

    Args:
        model: the compressed network.
        against: the dense one, for distances and singular values.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        One row per matrix.
    """
    rows = []
    for name in track(structured_layers(model), "describing layers", shown=shown):
        module: Any = model.get_submodule(name)
        matrix = module.matrix
        count = math.prod(matrix.shape)
        width = next((tensor.element_size() for tensor in matrix.parameters()), 4)
        dense = Cost(count, count * width, count)
        picture = [asdict(block) for block in matrix.picture()]
        geometry = geometry_of_layer(module)
        cost = matrix.cost(geometry)  # without an input size: per output position
        only_storage = matrix.only_storage_shrinks(geometry)
        beside = None if against is None else _dense_twin(against, name, matrix.shape)
        compared = {} if beside is None else _compared(beside, matrix.to_dense())
        rows.append(
            LayerRow(
                name, str(matrix.structure), matrix.shape, dense, cost, picture, only_storage, **compared
            )
        )
    return rows


# A matrix with more rows and columns takes longer than its singular values are worth on a page.
_MOST_SINGULAR_VALUES = 2048
# How many of them are kept, the first ones densest.
_SHOWN_VALUES = 60


def _dense_twin(dense: nn.Module, name: str, shape: Sequence[int]) -> Tensor | None:
    """The weight of the dense network's layer of this name; None where it has none of this shape."""
    try:
        weight = dense_weight(dense.get_submodule(name))
    except AttributeError:
        return None
    return None if weight is None or tuple(weight.shape) != tuple(shape) else weight


def _compared(weight: Tensor, structured: Tensor) -> dict[str, Any]:
    """A layer's distance and singular values, as `LayerRow` has them."""
    pair = [matrix.detach().cpu().flatten(1) for matrix in (weight, structured)]
    norm = float(torch.linalg.vector_norm(pair[0], dtype=torch.float64))
    apart = float(torch.linalg.vector_norm(pair[0] - pair[1].to(pair[0]), dtype=torch.float64))
    if not math.isfinite(apart):  # a training that ran away is still worth a report
        return {}
    found: dict[str, Any] = {"distance": apart / norm if norm else None}
    if 1 < min(pair[0].shape) <= _MOST_SINGULAR_VALUES:
        count = min(pair[0].shape)
        places = sorted({round(count ** (step / _SHOWN_VALUES)) for step in range(_SHOWN_VALUES + 1)})
        kept = torch.tensor(places) - 1
        curves = [singular_values_by_gram(matrix.float())[kept].tolist() for matrix in pair]
        found["singular_values"] = {"place": places, "dense": curves[0], "structured": curves[1]}
    return found
