"""The nearest matrix of a given rank in ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F (generalised Eckart-Young).

With roots Ĝ = S Sᵀ and H = T Tᵀ the nearest matrix of rank r in ‖Tᵀ(W − Ŵ)S‖_F is Ŵ = T⁻ᵀ U_r U_rᵀ Tᵀ W,
where U_r are the leading left singular vectors of Tᵀ W S. S is never inverted, so a singular input Gram needs
no care.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DenseGram, DiagonalGram, Gram, squared_error
from weft.numerics.svd import singular_values, singular_values_by_gram, truncated_svd
from weft.numerics.variable_projection import solve_left


def nearest_of_rank(
    matrix: Tensor,
    rank: int,
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    method: Callable[[Tensor, int], tuple[Tensor, Tensor]] = truncated_svd,
) -> tuple[Tensor, Tensor]:
    """The factors of the nearest matrix of a rank; with another method than the SVD, of a near one.

    Args:
        matrix: W, shape (outputs, inputs).
        rank: between 1 and the smaller side.
        input_gram: Ĝ; the identity where None. Where its blocks differ, the right factor is that of their
            mean, and the left factor optimal for it.
        output_gram: H; the identity where None.
        method: gives factors of a rank for a matrix; only the column space of the left one is used.

    Returns:
        left (outputs, rank) and right (rank, inputs), columns and rows of the same norm. The weighted fit is
        never worse than the plain one.
    """
    groups = isinstance(input_gram, BlockDiagonalGram)
    # Without a closed form the plain fit may happen to be the better one in the weighted norm.
    metrics = [(input_gram, output_gram)]
    if (groups or method is not truncated_svd) and (input_gram is not None or output_gram is not None):
        metrics.append((None, None))
    fits = []
    for column_metric, row_metric in metrics:
        mean = None if column_metric is None else column_metric.average()
        left, right = _project(matrix, rank, mean, row_metric, method)
        if groups and output_gram is None:
            left = solve_left(matrix, right, input_gram)
        fits.append((left, right))
    if len(fits) > 1:
        fits.sort(key=lambda fit: float(squared_error(matrix - fit[0] @ fit[1], input_gram, output_gram)))
    return balance(*fits[0])


def _project(
    matrix: Tensor,
    rank: int,
    input_gram: Gram | None,
    output_gram: Gram | None,
    method: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """L = T⁻ᵀ U_r and R = U_rᵀ Tᵀ W."""
    coloured = matrix if output_gram is None else output_gram.whiten(matrix.T).T  # Tᵀ W
    left, _ = method(coloured if input_gram is None else input_gram.whiten(coloured), rank)
    # Householder's Q is orthonormal whatever the columns: zeros stand in where the matrix had no more to
    # give.
    basis = torch.linalg.qr(F.pad(left, (0, rank - left.shape[1]))).Q
    left = basis if output_gram is None else output_gram.unwhiten(basis.T).T
    return left, basis.T @ coloured


def errors_by_rank(matrix: Tensor, input_gram: Gram | None = None, output_gram: Gram | None = None) -> Tensor:
    """The least relative error of every rank: its square is Σ σ_k² over k > r, relative to Σ σ_k².

    Args:
        matrix: W, shape (outputs, inputs).
        input_gram: Ĝ, without blocks that differ; the identity where None.
        output_gram: H; the identity where None.

    Returns:
        Shape (min(outputs, inputs),), float64: entry r − 1 is the error of rank r.
    """
    if output_gram is not None:
        matrix = output_gram.whiten(matrix.T).T
    if input_gram is not None:
        matrix = input_gram.whiten(matrix)
    values = singular_values_by_gram(matrix) if matrix.dtype == torch.float32 else singular_values(matrix)
    energy = values.square()
    beyond = energy.flip(0).cumsum(0).flip(0)
    return (torch.cat([beyond[1:], beyond.new_zeros(1)]) / beyond[0].clamp_min(1e-300)).sqrt()


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scales every column of L and row of R to the same norm, which trains and quantises best.

    Args:
        left: L, shape (outputs, rank).
        right: R, shape (rank, inputs).

    Returns:
        Both, with the same product.
    """
    column, row = left.norm(dim=0), right.norm(dim=1)
    tiny = torch.finfo(left.dtype).tiny
    scale = torch.where((column > tiny) & (row > tiny), (row / column.clamp_min(tiny)).sqrt(), 1.0)
    return left * scale, right / scale[:, None]


def leading_gram(gram: Gram, leading: int) -> Gram:
    """The metric of the leading coordinates of inputs (leading, trailing), averaged over the trailing ones.

    Channels of a patch are such leading coordinates: images look alike wherever the kernel stands.

    Args:
        gram: of size leading · trailing.
        leading: how many leading coordinates there are.

    Returns:
        A Gram of size `leading`.
    """
    if isinstance(gram, DiagonalGram):
        return DiagonalGram(gram.diagonal().reshape(leading, -1).mean(1), shrinkage=0.0)
    metric = gram.dense().reshape(leading, gram.size // leading, leading, -1)
    return DenseGram(metric.diagonal(dim1=1, dim2=3).mean(2), shrinkage=0.0)
