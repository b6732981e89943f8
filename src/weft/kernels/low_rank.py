"""A matrix of low rank, L R, applied to a batch of vectors: y = (x Rᵀ) Lᵀ + b."""

import torch
from torch import Tensor
from torch.nn import functional

from weft import checks
from weft.kernels import dispatch

__all__ = ["low_rank_apply"]

# Bound once, as looking names up costs more than calling them.
_native_apply = None if dispatch.native is None else dispatch.native.low_rank_apply
_get_num_threads = torch.get_num_threads
_is_compiling = torch.compiler.is_compiling


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
    if not _is_compiling():
        y = _apply_in_memory(x, left, right, bias)
        return reference(x, left, right, bias) if y is None else y
    if dispatch.calls_operation(x):
        return _operation(x, left, right, bias)
    return reference(x, left, right, bias)


def reference(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype, with every gradient."""
    checks.last_dimension(x, right.shape[-1])
    return functional.linear(functional.linear(x, right), left, bias)


def _apply_in_memory(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product by the native code; None where the guard forbids it or it does not pay."""
    # Also where shapes do not fit together: the reference then raises PyTorch's own error.
    if _native_apply is None:
        return None
    return _native_apply(x, left, right, bias, _get_num_threads())


# The operation that compiled graphs hold. Its backward is made of differentiable operations.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "low_rank_apply(Tensor x, Tensor left, Tensor right, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.low_rank_apply.default
_library.impl("low_rank_apply", reference, "CompositeExplicitAutograd")


def _on_host(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _apply_in_memory(x, left, right, bias)
    return reference(x, left, right, bias) if y is None else y


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
