"""Adaptive cross approximation: low rank from a few of the matrix's own rows and columns."""

import torch
from torch import Tensor

from weft import checks
from weft.numerics.svd import check_matrix, check_rank, check_tolerance


def adaptive_cross_approximation(
    matrix: Tensor, rank: int | None = None, *, tolerance: float | None = None, pivoting: str = "partial"
) -> tuple[Tensor, Tensor]:
    """Low-rank approximation by successive crosses u_k v_kᵀ through a pivot entry of the residual.

    Both pivotings stop at ‖u_k‖‖v_k‖ <= tolerance · ‖A_k‖_F (the stopping rule), at the rank, or where the
    residual is exhausted. Partial pivoting looks only at the rows and columns it takes: O((rows + columns)
    r²) in all. It is blind to parts of the matrix that its chain of pivots never meets (a block-diagonal
    matrix, say), so before it stops it looks at untouched rows spread over the matrix, and goes on from the
    largest of them if that is not yet resolved. Full pivoting takes the largest entry of the whole residual:
    O(rows · columns · r), and the safer choice for a matrix that exists anyway.

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Largest rank, between 1 and min(rows, columns); together with a tolerance whichever is reached
            first.
        tolerance: Relative accuracy of the stopping rule; an estimate, not a bound.
        pivoting: "partial" or "full".

    Returns:
        left (rows, r) and right (r, columns), with r at least 1 (zero factors for a zero matrix).

    Raises:
        ValueError: If neither rank nor tolerance is given.

    Source: Bebendorf, Approximation of boundary element matrices, Numer. Math. 86 (2000), Section 4;
        Bebendorf and Rjasanow, Adaptive low-rank approximation of collocation matrices, Computing 70 (2003).
    """
    check_matrix(matrix)
    if rank is None and tolerance is None:
        raise ValueError(
            checks.fault("rank or tolerance", "given", "neither", "pass rank=... or tolerance=...")
        )
    check_tolerance(tolerance or 0.0)
    rank = min(matrix.shape) if rank is None else rank
    check_rank(rank, matrix)
    checks.one_of("pivoting", pivoting, _PIVOTINGS)
    left, right = _PIVOTINGS[pivoting](matrix, rank, tolerance or 0.0)
    if not left:
        return matrix.new_zeros(matrix.shape[0], 1), matrix.new_zeros(1, matrix.shape[1])
    return torch.stack(left, dim=1), torch.stack(right)


def _full_pivoting(matrix: Tensor, rank: int, tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
    residual = matrix.clone()
    floor = torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
    left: list[Tensor] = []
    right: list[Tensor] = []
    square = 0.0
    for _ in range(rank):
        pivot = int(residual.abs().argmax())
        row, column = divmod(pivot, matrix.shape[1])
        value = residual[row, column].clone()
        if not abs(float(value)) > floor:
            break
        u, v = residual[:, column].clone(), residual[row] / value
        # addr_ leaves rounding in the pivot's row and column; they are zero by construction, and must be for
        # the argmax.
        residual.addr_(u, v, alpha=-1.0)
        residual[row] = 0.0
        residual[:, column] = 0.0
        cross, square = _grown_norm(left, right, u, v, square)
        u, v = _balanced(u, v)
        left.append(u)
        right.append(v)
        if cross <= tolerance * square**0.5:
            break
    return left, right


def _partial_pivoting(matrix: Tensor, rank: int, tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
    rows, columns = matrix.shape
    epsilon = torch.finfo(matrix.dtype).eps
    left_rows = matrix.new_empty(rank, rows)
    right_rows = matrix.new_empty(rank, columns)
    left: list[Tensor] = []
    right: list[Tensor] = []
    unused = torch.ones(rows, dtype=torch.bool, device=matrix.device)
    square = 0.0
    largest = 0.0  # largest pivot row entry seen: what is zero is relative to it
    row = 0
    while len(left) < rank:
        step = len(left)
        unused[row] = False
        residual_row = matrix[row] - left_rows[:step, row] @ right_rows[:step]
        largest = max(largest, float(matrix[row].abs().max()))
        column = int(residual_row.abs().argmax())
        value = residual_row[column]
        if not abs(float(value)) > epsilon * largest:
            # A zero row tells nothing (Bebendorf's loop takes the next one): look where something is left.
            found = _largest_unresolved_row(
                matrix, left_rows[:step], right_rows[:step], unused, epsilon * largest
            )
            if found is None:
                break
            row = found
            continue
        v = residual_row / value
        u = matrix[:, column] - left_rows[:step].mT @ right_rows[:step, column]
        cross, square = _grown_norm(left, right, u, v, square)
        u, v = _balanced(u, v)
        left_rows[step], right_rows[step] = u, v
        left.append(u)
        right.append(v)
        if not bool(unused.any()):
            break
        if cross <= tolerance * square**0.5:
            threshold = max(tolerance, epsilon) * square**0.5 / rows**0.5
            found = _largest_unresolved_row(
                matrix, left_rows[: step + 1], right_rows[: step + 1], unused, threshold
            )
            if found is None:
                break
            row = found
        else:
            row = int(torch.where(unused, u.abs(), -1.0).argmax())
    return left, right


def _largest_unresolved_row(
    matrix: Tensor, left_rows: Tensor, right_rows: Tensor, unused: Tensor, threshold: float, samples: int = 16
) -> int | None:
    """The unused row with the largest residual norm, if that exceeds the threshold."""
    candidates = unused.nonzero().flatten()
    if not len(candidates):
        return None
    spread = candidates[torch.linspace(0, len(candidates) - 1, min(samples, len(candidates))).long()]
    # All rows are looked at only while nothing at all is found: a matrix with many zero rows is not given up.
    for chosen in (spread, candidates) if not len(left_rows) else (spread,):
        norms = torch.linalg.vector_norm(matrix[chosen] - left_rows[:, chosen].mT @ right_rows, dim=1)
        best = int(norms.argmax())
        if bool(norms[best] > threshold):
            return int(chosen[best])
    return None


def _grown_norm(
    left: list[Tensor], right: list[Tensor], u: Tensor, v: Tensor, square: float
) -> tuple[float, float]:
    """‖u‖‖v‖ and ‖A_k‖_F² = ‖A_{k−1}‖_F² + 2 Σ_l (u·u_l)(v_l·v) + ‖u‖²‖v‖² (Bebendorf and Rjasanow 2003)."""
    cross = float(torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v))
    mixed = float((torch.stack(left) @ u) @ (torch.stack(right) @ v)) if left else 0.0
    return cross, max(square + 2.0 * mixed + cross**2, 0.0)


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same cross with both vectors of equal norm."""
    scale = (torch.linalg.vector_norm(v) / torch.linalg.vector_norm(u)).sqrt()
    return u * scale, v / scale


_PIVOTINGS = {"full": _full_pivoting, "partial": _partial_pivoting}
