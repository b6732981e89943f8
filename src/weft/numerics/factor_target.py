"""One factor of a product, the others given: what it should be near to, and in which metric.

With P the product of the factors before X and S of those after it,

    ‖H^{1/2}(W − P X S)G^{1/2}‖² = const + ‖(PᵀHP)^{1/2}(T − X)(SGSᵀ)^{1/2}‖²,
    T = (PᵀHP)⁻¹ PᵀHW GSᵀ (SGSᵀ)⁻¹.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from weft.numerics.gram import DenseGram, Gram


class FactorTarget(NamedTuple):
    """What one factor is fitted to.

    Attributes:
        target: T, of the factor's shape.
        columns: SGSᵀ, or the product's own G where no factor comes after.
        rows: PᵀHP, or the product's own H where no factor comes before.
    """

    target: Tensor
    columns: Gram | None
    rows: Gram | None


def product_of(factors: Sequence[Tensor]) -> Tensor:
    """The product of matrices.

    Args:
        factors: from left to right, at least one.

    Returns:
        Their product.
    """
    return reduce(torch.matmul, factors)


def factor_target(
    matrix: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    input_gram: Gram | None,
    output_gram: Gram | None,
) -> FactorTarget:
    """What a factor of a product should be near to, the others given.

    Args:
        matrix: W, shape (outputs, inputs).
        before: the factors to its left.
        after: those to its right.
        input_gram: G, the same for all rows; the identity where None.
        output_gram: H; the identity where None.

    Returns:
        The target and its metrics.
    """
    target, rows, columns = matrix, output_gram, input_gram
    if before:
        left = product_of(before)
        carried = left if output_gram is None else output_gram.matmul(left.T).T
        rows = DenseGram(left.T @ carried, shrinkage=0.0)
        target = _solve(rows.moment, carried.T @ target)
    if after:
        right = product_of(after)
        carried = right if input_gram is None else input_gram.matmul(right)
        columns = DenseGram(carried @ right.T, shrinkage=0.0)
        target = _solve(columns.moment, carried @ target.T).T
    return FactorTarget(target, columns, rows)


def _solve(metric: Tensor, right_side: Tensor) -> Tensor:
    """A⁻¹ B for a positive semidefinite A, in the least-squares sense where it is singular."""
    solution = torch.linalg.lstsq(metric, right_side.to(torch.float64), driver="gelsd").solution
    return solution.to(right_side)
