"""Argument checks: one wording for each kind of fault.

Every message names the argument, what was expected, what came, and what to do about it:

    rank must be between 1 and 512 for a (1000, 512) weight, got 600; use rank <= 512
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def fault(argument: str, expected: object, got: object, remedy: str) -> str:
    """Words one fault.

    Args:
        argument: the name that the caller knows the value by.
        expected: what it must be, worded to follow "must be".
        got: what came instead.
        remedy: what the caller can do, in the imperative.

    Returns:
        The message, without a full stop.

    Examples:
        >>> fault("rank", "between 1 and 512", 600, "use rank <= 512")
        'rank must be between 1 and 512, got 600; use rank <= 512'
    """
    return f"{argument} must be {expected}, got {got}; {remedy}"


def integer_between(argument: str, value: object, low: int, high: int | None, *, of: str = "") -> int:
    """Checks a whole number against its bounds, both included.

    Args:
        argument: the argument's name.
        value: what came.
        low: the least allowed value.
        high: the largest allowed value; None for no bound.
        of: what the bounds belong to, such as "a (1000, 512) weight".

    Returns:
        The value as an `int`.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.

    Examples:
        >>> integer_between("rank", 600, 1, 512, of="a (1000, 512) weight")
        Traceback (most recent call last):
        ValueError: rank must be between 1 and 512 for a (1000, 512) weight, got 600; use rank <= 512
    """
    owner = f" for {of}" if of else ""
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            fault(argument, f"a whole number {bounds}{owner}", repr(value), f"pass an int for {argument}")
        )
    if value < low:
        raise ValueError(fault(argument, f"{bounds}{owner}", value, f"use {argument} >= {low}"))
    if high is not None and value > high:
        raise ValueError(fault(argument, f"{bounds}{owner}", value, f"use {argument} <= {high}"))
    return value


def share(argument: str, value: object, *, zero_allowed: bool = False) -> float:
    """Checks a share: a number above 0 (or from 0 on) and at most 1.

    Args:
        argument: the argument's name.
        value: what came.
        zero_allowed: whether 0 itself is allowed.

    Returns:
        The value as a `float`.

    Raises:
        TypeError: it is no number.
        ValueError: it is not a share.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(fault(argument, "a number up to 1", repr(value), f"pass a float for {argument}"))
    enough = value >= 0 if zero_allowed else value > 0
    if not (enough and value <= 1):  # written so that NaN fails too
        least, sign = ("from 0", "<=") if zero_allowed else ("above 0", "<")
        raise ValueError(
            fault(argument, f"a share {least} and at most 1", value, f"use 0 {sign} {argument} <= 1")
        )
    return float(value)


def positive(argument: str, value: object) -> float:
    """Checks a finite number above zero.

    Args:
        argument: the argument's name.
        value: what came.

    Returns:
        The value as a `float`.

    Raises:
        TypeError: it is no number.
        ValueError: it is zero, negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(fault(argument, "a number above 0", repr(value), f"pass a float for {argument}"))
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(fault(argument, "a finite number above 0", value, f"use {argument} > 0"))
    return float(value)


def one_of(argument: str, value: object, options: Collection[object]) -> None:
    """Checks a value against the list of known ones.

    Args:
        argument: the argument's name.
        value: what came.
        options: what is known.

    Raises:
        ValueError: the value is not among them.

    Examples:
        >>> one_of("method", "qr", ("svd", "rrqr"))
        Traceback (most recent call last):
        ValueError: method must be one of 'svd', 'rrqr', got 'qr'; choose one of these
    """
    if value not in options:
        known = ", ".join(repr(option) for option in options)
        raise ValueError(fault(argument, f"one of {known}", repr(value), "choose one of these"))


def finite(argument: str, tensor: Tensor) -> None:
    """Checks that a floating tensor holds neither NaN nor infinity.

    Args:
        argument: the argument's name.
        tensor: what came.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: some entries are not finite.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(fault(argument, "a floating-point tensor", got, "convert it, e.g. with .float()"))
    # A sum is as finite as its terms, or overflows, and takes a twentieth of the time of looking at each.
    if math.isfinite(float(tensor.detach().sum())):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        got = f"{bad} NaN or infinite of {tensor.numel()}"
        raise ValueError(fault(argument, "finite everywhere", got, "repair or reload the weights or data"))


def weight(tensor: Tensor, argument: str = "weight") -> None:
    """Checks a weight: floating (else TypeError), finite, at least two axes, none empty.

    Args:
        tensor: what came.
        argument: the argument's name.

    Raises:
        ValueError: its shape is no weight's, or it is not finite.
    """
    if isinstance(tensor, Tensor) and (tensor.ndim < 2 or 0 in tensor.shape):
        expected = "of shape (outputs, inputs) or (outputs, channels, *kernel), no axis empty"
        raise ValueError(fault(argument, expected, tuple(tensor.shape), "pass the layer's own weight"))
    finite(argument, tensor)


def shape(argument: str, got: Sequence[int], expected: Sequence[int], remedy: str) -> None:
    """Checks a shape against the one that fits.

    Args:
        argument: the argument's name.
        got: the shape that came.
        expected: the shape that fits.
        remedy: what the caller can do.

    Raises:
        ValueError: they differ.
    """
    if tuple(got) != tuple(expected):
        raise ValueError(fault(argument, f"of shape {tuple(expected)}", tuple(got), remedy))


def last_dimension(x: Tensor, inputs: int) -> None:
    """Checks the input of a matrix apply: its last dimension is the matrix's number of inputs.

    Args:
        x: the input, shape (*batch, inputs).
        inputs: the number of columns of the matrix.

    Raises:
        ValueError: the last dimension differs, or there is none.
    """
    if x.ndim == 0 or x.shape[-1] != inputs:
        expected = f"of shape (*batch, {inputs})"
        raise ValueError(fault("x", expected, tuple(x.shape), f"pass vectors of length {inputs} last"))


def missing_and_surplus(got: Collection[str], expected: Collection[str]) -> list[str]:
    """Words what is missing among names, and what is there too much.

    Args:
        got: the names that came.
        expected: the names that are needed.

    Returns:
        Up to two parts of a message; none where the names agree.

    Examples:
        >>> missing_and_surplus(["left", "other"], ["left", "right"])
        ['missing: right', 'surplus: other']
    """
    missing, surplus = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    words = (("missing", missing), ("surplus", surplus))
    return [f"{word}: {', '.join(names)}" for word, names in words if names]


def tensor_names(got: Collection[str], expected: Collection[str], owner: str) -> None:
    """Checks that stored tensors are there by name, none missing and none surplus.

    Args:
        got: the names that came.
        expected: the names that are needed.
        owner: what they belong to.

    Raises:
        ValueError: a name is missing or surplus.

    Examples:
        >>> tensor_names(["left"], ["left", "right"], "LowRank(rank=2)")
        Traceback (most recent call last):
        ValueError: tensors of LowRank(rank=2) must be left, right, got left; missing: right; reload or refit
    """
    parts = missing_and_surplus(got, expected)
    if parts:
        listed = ", ".join(sorted(got)) or "none"
        wanted = ", ".join(sorted(expected)) or "none"
        raise ValueError(fault(f"tensors of {owner}", wanted, listed, "; ".join([*parts, "reload or refit"])))
