"""A matrix whose rows consist of codewords, applied to vectors: y_i = scale_i Σ_s ⟨x_s, w(i, s)⟩ + b_i.

The word w(i, s) of row i and subspace s is one of the few of a codebook, and the subspaces of a row follow
each other. Where it pays the inner products of x_s with all words of its book are a table, made once per
vector, in which every row looks up its own (the asymmetric distance of Jégou, Douze and Schmid 2011, section
III-A). For many vectors some rows at a time are written down and multiplied by all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.kernels import dispatch

__all__ = ["codewords_apply"]

# What one byte of codes can tell apart.
_MOST_CODEWORDS = 256

# Bound once, as looking names up costs more than calling them.
_native_apply: Any = None if dispatch.native is None else dispatch.native.codewords_apply
_get_num_threads = torch.get_num_threads
_is_compiling = torch.compiler.is_compiling

Composed = Callable[[Tensor, Tensor | None], Tensor]


def codewords_apply(
    x: Tensor,
    codes: Tensor,
    words: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    subspaces: int,
    composed: Composed,
) -> Tensor:
    """Applies a matrix of codewords to a batch of vectors.

    Args:
        x: The vectors, shape (*batch, inputs).
        codes: The words' numbers, uint8, shape (outputs, subspaces); up to 16 codewords two to a byte, those
            of even subspaces in the lower half, shape (outputs, ⌈subspaces / 2⌉).
        words: The codebooks with the words in their columns, shape (books, width, codewords); subspace s uses
            book ⌊s · books / subspaces⌋.
        scales: Shape (outputs,), or None for ones.
        bias: Shape (outputs,), or None.
        subspaces: Into how many pieces a row is cut.
        composed: The same product of PyTorch's operations, (x, bias) to the result: for gradients, other
            devices and dtypes, and where there is no native code.

    Returns:
        The products, shape (*batch, outputs).
    """
    if not _is_compiling():
        y = _apply_in_memory(x, codes, words, scales, bias, subspaces)
        return composed(x, bias) if y is None else y
    fits = words.shape[-1] <= _MOST_CODEWORDS
    if fits and dispatch.calls_operation(x) and dispatch.operation_runs_natively(x, words, scales, bias):
        return _operation(x, codes, words, scales, bias, subspaces)
    return composed(x, bias)


def reference(
    x: Tensor, codes: Tensor, words: Tensor, scales: Tensor | None, bias: Tensor | None, subspaces: int
) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype."""
    return functional.linear(x, weight_of(codes, words, scales, subspaces), bias)


def weight_of(codes: Tensor, words: Tensor, scales: Tensor | None, subspaces: int) -> Tensor:
    """The weight, shape (outputs, inputs), from what `codewords_apply` takes."""
    books, _, codewords = words.shape
    wide = codes.long()
    if codewords <= 16:
        wide = torch.stack([wide & 15, wide >> 4], dim=2).flatten(1)[:, :subspaces]
    book = torch.arange(subspaces, device=codes.device) * books // subspaces
    weight = words.mT.flatten(0, 1)[book * codewords + wide].flatten(1)
    return weight if scales is None else weight * scales[:, None]


def _apply_in_memory(
    x: Tensor, codes: Tensor, words: Tensor, scales: Tensor | None, bias: Tensor | None, subspaces: int
) -> Tensor | None:
    """The product by native code; None where the guard forbids it or sizes do not fit together."""
    if _native_apply is None or words.shape[-1] > _MOST_CODEWORDS:
        return None
    return _native_apply(x, codes, words, scales, bias, subspaces, _get_num_threads())


# The operation that compiled graphs hold, without gradients: with them the composition's own serve.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "codewords_apply(Tensor x, Tensor codes, Tensor words, Tensor? scales, Tensor? bias, int subspaces) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.codewords_apply.default
_library.impl("codewords_apply", reference, "CompositeExplicitAutograd")


def _on_host(x, codes, words, scales, bias, subspaces) -> Tensor:
    y = _apply_in_memory(x, codes, words, scales, bias, subspaces)
    return reference(x, codes, words, scales, bias, subspaces) if y is None else y


_library.impl("codewords_apply", _on_host, "CPU")


@torch.library.register_fake("weft::codewords_apply", lib=_library)
def _(x, codes, words, scales, bias, subspaces) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
