"""A network as a torch.export program."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from weft import checks
from weft.measure import (
    Batch,
    batch_size,
    call_checked,
    device_of,
    evaluating,
    slow_attention_path,
    to_device,
)
from weft.storage import write_beside

BATCH_AXIS = "batch"


def export_torch(
    model: nn.Module, sample: Batch, path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Path:
    """Writes a network, in evaluation mode, as a torch.export program that runs without weft.

    Args:
        model: the network, compressed or not; it is not changed.
        sample: inputs to trace it with: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        path: the file, by convention `*.pt2`; read it with `torch.export.load(path).module()`.
        dynamic_batch: whether the program takes any batch size, rather than the sample's own; inputs whose
            first axis is as long as the first input's are taken to have the batch there.

    Returns:
        The path.

    Examples:
        >>> import tempfile, torch, weft
        >>> from weft.structures.low_rank import LowRank
        >>> small, _ = weft.compress(nn.Sequential(nn.Linear(8, 8)), {"0": LowRank(rank=2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_torch(small, torch.randn(4, 8), f"{folder}/small.pt2")
        ...     program = torch.export.load(path).module()
        >>> program(torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """
    program = trace(model, sample, dynamic_batch=dynamic_batch)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # torch insists on the ending .pt2 of a path, but not of an open file
            torch.export.save(program, file)

    return write_beside(path, write)


def trace(model: nn.Module, sample: Batch, *, dynamic_batch: bool = True) -> ExportedProgram:
    """Traces a network in evaluation mode.

    Args:
        model: the network; its modules' modes are kept.
        sample: inputs as `export_torch` takes them.
        dynamic_batch: whether the batch axis stays symbolic.

    Returns:
        The program.

    Raises:
        ValueError: the network ties its computation to the sample's batch size, or cannot be traced.
    """
    size = batch_size(sample)
    if dynamic_batch and size < 2:  # the tracer takes a size of 0 or 1 for a constant
        sample, size = with_batch_size(sample, 2), 2
    sample = to_device(sample, device_of(model))
    positional, keywords = arguments_of(sample)
    with evaluating(model), torch.no_grad(), slow_attention_path():
        call_checked(model, sample, "sample")
        shapes = batch_axes(model, sample, Dim(BATCH_AXIS)) if dynamic_batch else None
        try:
            return torch.export.export(model, positional, keywords, dynamic_shapes=shapes)
        except Exception as error:
            # torch raises dozens of types here, most of them private; all mean that tracing failed.
            reason = _reason(error)
            expected = f"traceable by torch.export with {'any' if dynamic_batch else 'a fixed'} batch size"
            remedy = "pass dynamic_batch=False or keep sizes symbolic (x.shape[0], not len(x))"
            if not dynamic_batch:
                remedy = "remove data-dependent Python from its forward; the traceback above names the line"
            raise ValueError(checks.fault("model", expected, reason, remedy)) from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "specialized it to be a constant" in text:
        return "one whose code turns the batch size into a constant"
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.') if text else 'without a message'}"


def arguments_of(sample: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for.

    Args:
        sample: a tensor, a sequence of arguments or a mapping of keyword arguments.

    Returns:
        Both, one of them empty.
    """
    if isinstance(sample, Tensor):
        return (sample,), {}
    return ((), dict(sample)) if isinstance(sample, Mapping) else (tuple(sample), {})


def batch_axes(model: nn.Module, sample: Batch, axis: Any) -> dict[str, Any]:
    """Marks the batch axis of every input that has one.

    Args:
        model: the network, for its arguments' names.
        sample: inputs.
        axis: what stands for the batch axis.

    Returns:
        By argument name, in the shape of the inputs: {0: axis} for tensors with a batch axis, else None.
    """
    positional, keywords = arguments_of(sample)
    size = batch_size(sample)
    bound = inspect.signature(model.forward).bind(*positional, **keywords).arguments

    def mark(value: Any) -> dict[int, Any] | None:
        return {0: axis} if isinstance(value, Tensor) and _has_batch(value, size) else None

    return {name: _map_leaves(mark, value) for name, value in bound.items()}


def with_batch_size(sample: Batch, size: int) -> Batch:
    """The same inputs for another number of samples, made by repeating or cutting.

    Args:
        sample: inputs.
        size: the number of samples wanted.

    Returns:
        The same structure; tensors without a batch axis are passed through.
    """
    given = batch_size(sample)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or not _has_batch(value, given):
            return value
        return value[torch.arange(size, device=value.device) % given].contiguous()

    return _map_leaves(resize, sample)


def _has_batch(tensor: Tensor, size: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == size


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_leaves(function, item) for item in value)
    return function(value)
