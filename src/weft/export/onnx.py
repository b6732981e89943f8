"""A network as an ONNX file, checked against the network in onnxruntime."""

import importlib
import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from weft import checks
from weft.export.torch_export import BATCH_AXIS, arguments_of, batch_axes, trace, with_batch_size
from weft.measure import Batch, batch_size, call_checked, device_of, evaluating, to_device
from weft.storage import write_beside

# The loggers of the exporter and the libraries under it, which comment on every step.
_TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")
# One ONNX file is one protocol buffer, which holds less than 2 GiB; the graph itself needs a little of that.
_LARGEST_FILE = 2**31 - 2**24


def export_onnx(
    model: nn.Module,
    sample: Batch,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> Path:
    """Writes a network, in evaluation mode, as an ONNX file of standard operators.

    Structured layers stay structured in the file: it holds their factors, not their dense weights.
    `check_onnx` compares the file with the network.

    Args:
        model: the network, compressed or not; it is not changed.
        sample: inputs to trace it with: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        path: the file, by convention `*.onnx`.
        dynamic_batch: whether the file takes any batch size, on an axis called "batch"; inputs whose first
            axis is as long as the first input's are taken to have the batch there.
        opset: the version of ONNX's operator set; the exporter's own choice where None.

    Returns:
        The path.

    Raises:
        ValueError: the network cannot be traced or expressed in ONNX, or is too large for one file.
    """
    _package("onnx", "onnxscript")
    if opset is not None:
        checks.integer_between("opset", opset, 1, None)
    size = batch_size(sample)
    if dynamic_batch and size < 2:
        sample = with_batch_size(sample, 2)
    shapes = batch_axes(model, sample, BATCH_AXIS) if dynamic_batch else None
    converted = _convert(trace(model, sample, dynamic_batch=dynamic_batch), shapes, opset)
    _widen_indices(converted.model.graph)
    _forget_tracing(converted.model.graph)
    stored = sum(value.const_value.nbytes for value in converted.model.graph.initializers.values())
    if stored > _LARGEST_FILE:
        remedy = "compress it further, or use export_torch"
        raise ValueError(
            checks.fault("model", f"at most {_LARGEST_FILE:,} bytes in ONNX", f"{stored:,}", remedy)
        )
    return write_beside(path, lambda beside: converted.save(beside, external_data=False))


def _convert(program: ExportedProgram, shapes: dict[str, Any] | None, opset: int | None) -> Any:
    """The ONNX program of a traced one."""
    with _quiet():
        try:
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, dynamic_shapes=shapes
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error.__cause__ or error
            got = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
            remedy = "use export_torch, or another opset"
            raise ValueError(checks.fault("model", "expressible in ONNX", got, remedy)) from error
    assert converted is not None  # noqa: S101  (None only from the exporter without dynamo)
    written = converted.model.opset_imports.get("")
    if opset is not None and written != opset:  # the exporter falls back without an error
        remedy = f"use opset={written} or leave it out"
        raise ValueError(checks.fault("opset", "one that the exporter can convert to", opset, remedy))
    return converted


def _widen_indices(graph: Any) -> None:
    """Casts indices of 32 bits, which the exporter passes on, to the 64 that these operators demand."""
    intermediate = importlib.import_module("onnx_ir")
    for node in list(graph.all_nodes()):
        if (
            node.op_type not in {"GatherND", "ScatterND"}
            or node.inputs[1].dtype != intermediate.DataType.INT32
        ):
            continue
        cast = intermediate.node("Cast", [node.inputs[1]], {"to": intermediate.DataType.INT64})
        cast.outputs[0].dtype = intermediate.DataType.INT64
        node.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])


def _forget_tracing(graph: Any) -> None:
    """Takes the exporter's notes off: paths of this machine, more bytes than a small network has."""
    nodes = list(graph.all_nodes())
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in nodes for value in node.outputs),
    ]
    for part in (graph, *nodes, *values):
        for key in [key for key in part.metadata_props if key.startswith("pkg.torch")]:
            del part.metadata_props[key]


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silences warnings and log lines of the exporter; errors are raised as ever."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_onnx(
    path: str | os.PathLike[str], model: nn.Module, sample: Batch, tolerance: float = 1e-4
) -> float:
    """Runs an ONNX file in onnxruntime and compares its outputs with the network's.

    Where the file takes any batch size, it is run with one sample and with two more than `sample` has, too.

    Args:
        path: the file.
        model: the network that it was made from, run in evaluation mode.
        sample: inputs, as for `export_onnx`.
        tolerance: the largest relative difference allowed.

    Returns:
        The largest difference found, max |y − ŷ| / max |ŷ| over the entries of an output ŷ of the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: onnxruntime cannot read the file, or an output differs by more than the tolerance, or in
            shape, or their number differs.
    """
    checks.positive("tolerance", tolerance)
    runtime = _package("onnxruntime")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(checks.fault("path", "an existing file", file, "check the name"))
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types have no common base below this
        remedy = "write it again with export_onnx"
        got = str(error).strip().splitlines()[0]
        raise ValueError(
            checks.fault(str(file), "an ONNX file that onnxruntime takes", got, remedy)
        ) from error
    sizes = [batch_size(sample)]
    if any(isinstance(axis, str) for given in session.get_inputs() for axis in given.shape[:1]):
        sizes += [size for size in (1, sizes[0] + 2) if size not in sizes]
    largest = 0.0
    for size in sizes:
        batch = sample if size == sizes[0] else with_batch_size(sample, size)
        difference = _difference(session, model, batch)
        if not difference <= tolerance:  # written so that NaN fails too
            got = f"{difference:.2e} with a batch of {size}"
            remedy = "export this very model again, or pass a larger tolerance"
            raise ValueError(checks.fault(f"difference of {file}", f"at most {tolerance:g}", got, remedy))
        largest = max(largest, difference)
    return largest


def _difference(session: Any, model: nn.Module, sample: Batch) -> float:
    """The largest relative difference between the outputs of file and network."""
    with evaluating(model), torch.no_grad():
        expected = _tensors(call_checked(model, to_device(sample, device_of(model)), "sample"))
    outputs = session.run(None, _feed(session, sample))
    if len(outputs) != len(expected):
        remedy = "export this very model again"
        raise ValueError(
            checks.fault("outputs of the file", f"{len(expected)} tensors", len(outputs), remedy)
        )
    largest = 0.0
    for output, tensor in zip(outputs, expected, strict=True):
        got, wanted = torch.from_numpy(output).double(), tensor.cpu().double()
        checks.shape("output of the file", got.shape, wanted.shape, "export this very model again")
        if not wanted.numel():
            continue
        scale = float(wanted.abs().max())
        difference = float((got - wanted).abs().max()) / max(scale, torch.finfo(torch.float32).tiny)
        largest = difference if difference != difference else max(largest, difference)
    return largest


def _feed(session: Any, sample: Batch) -> dict[str, Any]:
    """The inputs of a session, by name where the sample has the names, else in order."""
    positional, keywords = arguments_of(sample)
    names = [given.name for given in session.get_inputs()]
    if keywords.keys() >= set(names):
        return {name: keywords[name].cpu().numpy() for name in names}
    values = _tensors((positional, keywords))
    if len(values) != len(names):
        got = f"{len(values)} tensors"
        remedy = "pass the sample that the file was exported with"
        raise ValueError(checks.fault("sample", f"{len(names)} inputs ({', '.join(names)})", got, remedy))
    return {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _package(*names: str) -> ModuleType:
    """Imports the packages of the extra weft[onnx]; gives the last one."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ModuleNotFoundError as error:
        got = f"no module named {error.name}"
        remedy = "run: pip install 'weft[onnx]'"
        raise ImportError(
            checks.fault(f"package {error.name}", "installed for ONNX files", got, remedy)
        ) from error
