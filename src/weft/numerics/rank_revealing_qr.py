"""Rank-revealing QR factorisation, stopped after a rank or at a tolerance."""

import torch
from torch import Tensor

from weft import checks
from weft.numerics.svd import check_matrix, check_rank, check_tolerance


def pivoted_qr(
    matrix: Tensor, rank: int | None = None, *, tolerance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """QR factorisation with column pivoting (Businger and Golub), stopped early.

    Each step takes the column with the largest residual, orthogonalises it twice against the basis so far
    ("twice is enough", Giraud et al. 2005) and projects the whole matrix onto the new direction. The matrix
    itself is never updated, so a step costs one product with a vector: O(rows · columns · rank) in all.

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Largest number of steps, between 1 and min(rows, columns); min(rows, columns) if None.
        tolerance: Stop as soon as ‖A − QR‖_F <= tolerance ‖A‖_F.

    Returns:
        Q (rows, r) orthonormal, R (r, columns) with columns in the matrix's own order, and the r pivot
        columns in the order taken. R[:, pivots] is upper triangular up to rounding; r is at least 1 and less
        than `rank` only where the tolerance, or an exactly exhausted residual, stops the factorisation.

    Source: Businger and Golub, Linear least squares solutions by Householder transformations, Numer. Math. 7
        (1965).
    """
    check_matrix(matrix)
    rank = min(matrix.shape) if rank is None else rank
    check_rank(rank, matrix)
    check_tolerance(tolerance)
    rows, columns = matrix.shape
    basis = matrix.new_zeros(rank, rows)  # Qᵀ: contiguous vectors
    triangle = matrix.new_zeros(rank, columns)
    pivots: list[int] = []
    residual = matrix.double().square().sum(0)  # squared norms of the residual's columns
    total = residual.sum()
    exact = residual.clone()  # where `residual` was last computed rather than downdated
    epsilon = torch.finfo(matrix.dtype).eps
    for step in range(rank):
        if step and bool(residual.max() <= epsilon**0.5 * exact.max()):
            # Downdating has lost half of the digits that decide the next pivot: compute the norms afresh.
            # Source: Drmač and Bujanović, On the failure of rank-revealing QR factorization software, 2008.
            remainder = matrix - basis[:step].mT @ triangle[:step]
            residual = remainder.double().square().sum(0)
            residual[pivots] = 0.0
            exact = residual.clone()
        floor = (columns * epsilon) ** 2 * total
        if step and bool(residual.sum() <= torch.maximum(tolerance**2 * total, floor)):
            break
        pivot = int(residual.argmax())
        direction = matrix[:, pivot].clone()
        for _ in range(2):
            direction -= basis[:step].mT @ (basis[:step] @ direction)
        norm = torch.linalg.vector_norm(direction)
        if step and not bool(norm > rows * epsilon * torch.linalg.vector_norm(matrix[:, pivot])):
            break  # the largest residual is rounding: the columns so far span the matrix
        if not bool(norm > 0):
            # A zero matrix: any unit vector is a basis of its range, and R is zero.
            direction, norm = torch.zeros_like(direction), norm.new_ones(())
            direction[0] = 1.0
        basis[step] = direction / norm
        triangle[step] = basis[step] @ matrix
        pivots.append(pivot)
        residual = (residual - triangle[step].double().square()).clamp_min(0.0)
        residual[pivot] = 0.0
    steps = len(pivots)
    return basis[:steps].mT.contiguous(), triangle[:steps], torch.tensor(pivots)


def strong_rank_revealing_qr(
    matrix: Tensor, rank: int, *, swap_bound: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-revealing QR with a guarantee: swaps columns until none enlarges |det R₁₁| by more than a factor.

    Column pivoting is the start. With k = rank and f = swap_bound the result satisfies, for every i and j,
    σ_i(R₁₁) >= σ_i(A)/√(1 + f²k(n − k)) and σ_j(R₂₂) <= σ_{k+j}(A)√(1 + f²k(n − k)) (Theorem 3.2), which
    column pivoting alone misses by factors up to 2^k (Kahan's matrix). Each swap multiplies |det R₁₁| by
    more than f, so their number is at most O(k log n).

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Between 1 and min(rows, columns).
        swap_bound: The factor f, at least 1; values near 1 swap more and gain little.

    Returns:
        Q (rows, r), R (r, columns) in the matrix's own column order, and the r pivot columns, as
        `pivoted_qr`.

    Raises:
        ValueError: If the swap bound is below 1.

    Source: Gu and Eisenstat, Efficient algorithms for computing a strong rank-revealing QR factorization,
        SIAM J. Sci. Comput. 17 (1996), Algorithm 4 and Theorem 3.2.
    """
    if not swap_bound >= 1:
        raise ValueError(checks.fault("swap_bound", "at least 1", swap_bound, "use the default of 2"))
    basis, triangle, pivots = pivoted_qr(matrix, rank)
    while len(pivots) == rank < matrix.shape[1]:
        leading = triangle[:, pivots].double()
        inverse = torch.linalg.solve(leading, torch.eye(rank, dtype=leading.dtype, device=leading.device))
        exchange = inverse @ triangle.double()
        tail_norms = torch.linalg.vector_norm((matrix - basis @ triangle).double(), dim=0)
        row_norms = torch.linalg.vector_norm(inverse, dim=1)
        # |det R₁₁| after exchanging pivot i for column j, over |det R₁₁| before (Lemma 3.1).
        growth = exchange.square() + (row_norms[:, None] * tail_norms[None, :]).square()
        growth[:, pivots] = 0.0
        best = int(growth.argmax())
        # A little slack keeps rounding from swapping a pair to and fro.
        if bool(growth.flatten()[best] <= swap_bound**2 * (1 + 1e-6)):
            break
        pivots = pivots.clone()
        pivots[best // growth.shape[1]] = best % growth.shape[1]
        basis = torch.linalg.qr(matrix[:, pivots]).Q
        triangle = basis.mT @ matrix
    return basis, triangle, pivots


def rank_revealing_qr(
    matrix: Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    swap_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Low-rank approximation by projection onto a few of the matrix's own columns.

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Largest rank; together with a tolerance whichever is reached first.
        tolerance: Stop as soon as the relative error in the Frobenius norm is at most this.
        swap_bound: With a number f >= 1 and a rank the strong factorisation; None takes column pivoting as
            it is.

    Returns:
        left (rows, r) with orthonormal columns and right (r, columns).

    Raises:
        ValueError: If neither rank nor tolerance is given.
    """
    if rank is None and tolerance is None:
        raise ValueError(
            checks.fault("rank or tolerance", "given", "neither", "pass rank=... or tolerance=...")
        )
    left, right, pivots = pivoted_qr(matrix, rank, tolerance=tolerance or 0.0)
    if swap_bound is not None:
        left, right, _ = strong_rank_revealing_qr(matrix, len(pivots), swap_bound=swap_bound)
    return left, right
