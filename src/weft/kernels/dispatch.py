"""Which code runs a primitive: the native library or the PyTorch reference."""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = [
    "calls_operation",
    "in_eager",
    "in_plain_eager",
    "native",
    "needs_plain_operations",
    "operation_runs_natively",
    "route",
    "takes_raw_pointers",
]


# The native library's that this code was written for: see native/bindings.cpp.
_INTERFACE = 4


def _without(what: str, briefly: str) -> str:
    """Says once per process that the native kernels cannot be used, and what runs instead."""
    # A logger without handlers writes its warnings to standard error, in one line.
    logging.getLogger("weft.kernels").warning(
        "weft: native kernels are %s; everything runs on the slower PyTorch reference. "
        "Reinstall weft with a C++17 compiler at hand, or set WEFT_KERNELS=reference to silence this.",
        what,
    )
    return f"reference (native kernels are {briefly})"


def _load() -> tuple[Any, str]:
    """The native library and its description, or None and why it is not in use."""
    chosen = os.environ.get("WEFT_KERNELS", "native")
    if chosen not in {"native", "reference"}:
        raise ValueError(
            f"the environment variable WEFT_KERNELS must be 'native' or 'reference', got {chosen!r}; "
            "unset it for the native kernels"
        )
    if chosen == "reference":
        return None, "reference (WEFT_KERNELS=reference)"
    try:
        library = importlib.import_module("weft.kernels._native")
    except ImportError as error:
        return None, _without(f"missing ({error})", "not installed")
    if getattr(library, "interface", None) != _INTERFACE:
        # It would take what it is given for something else, and compute wrong numbers.
        return None, _without("from another version of weft", "of another version")
    return library, f"native ({library.instructions()})"


native, _route = _load()


def route() -> str:
    """What runs the primitives in this process.

    Returns:
        `native (...)` with the instruction set, or `reference (...)` with the reason.

    Examples:
        >>> route().split(" ")[0] in {"native", "reference"}
        True
    """
    return _route


# Bound once: looking the names up costs as much as calling them, and every call of every layer comes here.
_is_compiling = torch.compiler.is_compiling

_Questions = tuple[tuple[Callable[[], object], object], ...]
# Questions to PyTorch, each with its answer where no tracer or transform looks at an eager call; forward-mode
# differentiation is asked for beside them, as its level is no function.
_TRANSFORMS: _Questions = ((peek_interpreter_stack, None), (torch._C._get_tracing_state, None))
# The same where no dispatch mode and no autocast stand between a call and its operations,
_DISPATCH_MODES: _Questions = ((torch._C._len_torch_dispatch_stack, 0),)
_MODES: _Questions = (*_DISPATCH_MODES, (torch._C._is_any_autocast_enabled, False))
# and no mode that replaces PyTorch's functions.
_FUNCTION_MODES: _Questions = ((torch._C._len_torch_function_stack, 0),)


def _by_dispatcher(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")


# What inductor's graphs make their results with. It goes past the dispatcher, behind which nothing waits
# where the guard has let a call through, and costs half as much.
_empty_strided = getattr(guards, "_empty_strided_cpu", _by_dispatcher)


def _introduce_torch(
    *, by_exchange: bool = True, empty_strided: Callable[..., Tensor] = _empty_strided
) -> None:
    """Tells the native library whom to ask about tensors, and for new ones.

    Args:
        by_exchange: Whether it may ask through DLPack's table of functions, which torch has from 2.10 on, not
            for one attribute of a tensor after the other, which costs three times as much.
        empty_strided: What gives a tensor on the host of some sizes, strides and dtype.
    """
    questions, answers = zip(*_TRANSFORMS, *_MODES, *_FUNCTION_MODES, strict=True)
    native.know_torch(
        Tensor,
        Parameter,
        torch.float32,
        torch.bfloat16,
        torch.uint8,
        torch.is_grad_enabled,
        torch.get_num_threads,
        questions,
        answers,
        forward_ad,
        empty_strided,
        by_exchange,
    )


if native is not None:
    _introduce_torch()
_native_guard = None if native is None else native.takes_raw_pointers


def _untransformed(*questions: _Questions) -> bool:
    """Whether PyTorch gives each answer, and differentiates nothing forwards."""
    answered = all(ask() == answer for part in questions for ask, answer in part)
    return answered and forward_ad._current_level < 0


def needs_plain_operations() -> bool:
    """Whether a call must be composed of operations that every exporter, tracer and transform knows.

    Returns:
        False in eager calls and under a compiler, where a custom autograd function serves as well.
    """
    if _is_compiling():
        return torch.compiler.is_exporting()
    return not _untransformed(_TRANSFORMS)


def in_plain_eager() -> bool:
    """Whether a call is a plain eager one, whose intermediate results may be kept for later calls.

    Returns:
        False where a compiler, exporter, tracer, functorch transform, dispatch mode, autocast or forward-mode
        differentiation takes part.
    """
    return not _is_compiling() and _untransformed(_TRANSFORMS, _MODES)


def in_eager() -> bool:
    """Whether a call is an eager one, autocast or not: its operations run as they come, by whichever route.

    Returns:
        False where a compiler, exporter, tracer, functorch transform, dispatch mode or forward-mode
        differentiation takes part.
    """
    return not _is_compiling() and _untransformed(_TRANSFORMS, _DISPATCH_MODES)


def calls_operation(x: Tensor) -> bool:
    """Whether a call should become one of weft's own operations in a compiled graph.

    Everything else that the native library cannot take is composed of PyTorch's operations: an exported or
    traced model must not need weft, transforms and autocast know PyTorch's operations only, and in eager
    training recording one operation of Python's costs more than recording the few of the reference.

    Args:
        x: The input of the primitive.

    Returns:
        True while a compiler, not an exporter, records the call.
    """
    return (
        _is_compiling() and not torch.compiler.is_exporting() and not torch.is_autocast_enabled(x.device.type)
    )


def operation_runs_natively(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether an operation in a compiled graph would run natively, so that the graph gains by holding it.

    Args:
        x: The input of the primitive.
        *tensors: The other floating tensors that it reads; None for an absent one.

    Returns:
        True where all are of one of the kernels' dtypes, in host memory, and no gradient is recorded: with
        gradients the reference's own operations are faster, and known to every transform.
    """
    present = [x, *(tensor for tensor in tensors if tensor is not None)]
    return (
        native is not None
        and x.device.type == "cpu"
        and x.dtype in {torch.float32, torch.bfloat16}
        and all(tensor.dtype == x.dtype for tensor in present)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present))
    )


def takes_raw_pointers(*tensors: Tensor | None) -> bool:
    """The one guard in front of the native library: whether it may read the tensors' memory right now.

    Refuses whatever stands between a call and the memory (compiler, exporter, tracer, functorch transforms,
    function and dispatch modes, autocast, forward-mode differentiation), tensors other than plain contiguous
    float32 or bfloat16 in host memory, and calls that have to be recorded for a gradient. Shapes and equal
    dtypes are the primitive's to check.

    Args:
        *tensors: Every tensor that the native function would read; None for an absent one.

    Returns:
        True where the addresses of the tensors may be handed over.
    """
    return _native_guard is not None and not _is_compiling() and _native_guard(*tensors)
