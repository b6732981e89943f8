"""A matrix of low rank, L R, applied to a batch of vectors: y = (x Rᵀ) Lᵀ + b."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from weft.kernels import dispatch

__all__ = ["low_rank_apply"]

# The largest batch for the native product: beyond it two calls of the vendor's product measure faster.
_LARGEST_NATIVE_BATCH = 16


def low_rank_apply(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the matrix L R to a batch of vectors: y = (x Rᵀ) Lᵀ + b.

    Args:
        x: The vectors, shape (*batch, inputs).
        left: L, shape (outputs, rank).
        right: R, shape (rank, inputs).
        bias: b, shape (outputs,), or None.

    Returns:
        The products, shape (*batch, outputs).

    Examples:
        >>> x, left, right = torch.ones(5, 3), torch.ones(4, 2), torch.ones(2, 3)
        >>> low_rank_apply(x, left, right).shape
        torch.Size([5, 4])
    """
    if dispatch.takes_raw_pointers(x, left, right, bias):
        return _apply_in_memory(x, left, right, bias)
    if dispatch.calls_operation(x):
        return _operation(x, left, right, bias)
    return reference(x, left, right, bias)


def reference(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype, with every gradient."""
    return functional.linear(functional.linear(x, right), left, bias)


def _apply_in_memory(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The product of tensors that passed the guard, by the native code where that can do it and pays."""
    # Shapes that do not fit together go to the reference too, which raises PyTorch's own error.
    *batch_shape, inputs = x.shape or (0,)
    batch = math.prod(batch_shape)
    if not 0 < batch <= _LARGEST_NATIVE_BATCH or left.ndim != 2 or right.ndim != 2:
        return reference(x, left, right, bias)
    outputs, rank = left.shape
    if right.shape != (rank, inputs) or (bias is not None and bias.shape != (outputs,)):
        return reference(x, left, right, bias)
    out = x.new_empty(*batch_shape, outputs)
    dispatch.native.low_rank_apply(
        x.data_ptr(),
        left.data_ptr(),
        right.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        batch,
        inputs,
        rank,
        outputs,
        torch.get_num_threads(),
    )
    return out


# The operation that compiled graphs hold. Its backward is made of differentiable operations.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "low_rank_apply(Tensor x, Tensor left, Tensor right, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.low_rank_apply.default
_library.impl("low_rank_apply", reference, "CompositeExplicitAutograd")


def _on_host(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    if dispatch.takes_raw_pointers(x, left, right, bias):
        return _apply_in_memory(x, left, right, bias)
    return reference(x, left, right, bias)


_library.impl("low_rank_apply", _on_host, "CPU")


def _fake(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], left.shape[0])


torch.library.register_fake("weft::low_rank_apply", _fake, lib=_library)


def _remember(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, left, right, bias = inputs
    ctx.save_for_backward(x, left, right)
    ctx.has_bias = bias is not None


def _backward(ctx, gradient: Tensor):
    """With h = x Rᵀ and g = ∂/∂y: ∂x = (g L) R, ∂L = gᵀ h, ∂R = (g L)ᵀ x, ∂b = Σ g."""
    x, left, right = ctx.saved_tensors
    needs_x, needs_left, needs_right, needs_bias = ctx.needs_input_grad
    x_rows, rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    to_hidden = rows @ left if needs_x or needs_right else None
    return (
        (to_hidden @ right).reshape(x.shape) if to_hidden is not None and needs_x else None,
        rows.T @ (x_rows @ right.T) if needs_left else None,
        to_hidden.T @ x_rows if to_hidden is not None and needs_right else None,
        rows.sum(0) if ctx.has_bias and needs_bias else None,
    )


torch.library.register_autograd("weft::low_rank_apply", _backward, setup_context=_remember, lib=_library)
