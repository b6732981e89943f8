"""Singular value decompositions: whole, truncated, randomised, and recompression of a product.

Everything here returns factors `left (rows, rank)` and `right (rank, columns)` whose product approximates the
matrix, in the matrix's own dtype (float32 or float64).
"""

from collections.abc import Iterator

import torch
from scipy import linalg as scipy_linalg
from torch import Tensor

from weft import checks

# How many entries of a float32 matrix are in float64 at a time: 32 MiB.
_NUMBERS_AT_A_TIME = 2**22


def singular_value_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition that does not give up where divide and conquer fails to converge.

    LAPACK's `gesdd` rarely fails on finite input, but it does; `gesvd` (implicit QR) then takes over in
    float64.

    Args:
        matrix: Shape (rows, columns), float32 or float64.

    Returns:
        U (rows, k), singular values (k,) in descending order, Vᵀ (k, columns), with k = min(rows, columns).
    """
    check_matrix(matrix)
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(left).all()):
            return left, values, right
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        pass
    left, values, right = scipy_linalg.svd(
        matrix.detach().double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd"
    )
    return tuple(torch.from_numpy(part).to(matrix) for part in (left, values, right))  # type: ignore[return-value]


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, with the same way out as `singular_value_decomposition`.

    Args:
        matrix: Shape (rows, columns), float32 or float64.

    Returns:
        Shape (min(rows, columns),), in descending order.
    """
    check_matrix(matrix)
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return singular_value_decomposition(matrix)[1]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a given rank in every unitarily invariant norm.

    The singular values are shared out evenly, left = U_r S_r^{1/2} and right = S_r^{1/2} V_rᵀ, so that both
    factors have the same scale when they are trained or quantised.

    A float32 matrix is decomposed through its Gram matrix formed in float64: the eigenvalues' error ε₆₄‖A‖²
    is an error of at most √ε₆₄ ‖A‖ = 1.5e-8 ‖A‖ in the singular values, below float32's own resolution of
    6e-8 ‖A‖. In float64 that argument fails, and the matrix itself is decomposed.

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Between 1 and min(rows, columns).

    Returns:
        left (rows, rank) and right (rank, columns).

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1
        (1936).
    """
    check_matrix(matrix)
    check_rank(rank, matrix)
    if matrix.dtype == torch.float32:
        left, values, right = _leading_triplets_by_gram(matrix, rank)
    else:
        left, values, right = singular_value_decomposition(matrix)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(matrix.dtype), (root[:, None] * right[:rank]).to(matrix.dtype)


def randomized_svd(
    matrix: Tensor,
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Near-best approximation of a given rank from products with a few random vectors.

    Algorithm 4.4 (randomised subspace iteration, orthonormalised after every product) finds an orthonormal Q
    with A ≈ QQᵀA, and Algorithm 5.1 decomposes the small matrix QᵀA.

    Args:
        matrix: Shape (rows, columns), float32 or float64.
        rank: Between 1 and min(rows, columns).
        oversampling: Random vectors beyond the rank; at least 0.
        power_iterations: Products with AAᵀ that sharpen the spectrum; at least 0.
        generator: Source of the random vectors, on the CPU; the global one if None.

    Returns:
        left (rows, rank) and right (rank, columns), the singular values shared out evenly.

    Source: Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53 (2011), Alg. 4.4
        and 5.1.
    """
    check_matrix(matrix)
    check_rank(rank, matrix)
    checks.integer_between("oversampling", oversampling, 0, None)
    checks.integer_between("power_iterations", power_iterations, 0, None)
    rows, columns = matrix.shape
    width = min(rank + oversampling, rows, columns)
    # Drawn in float64 on the CPU, so that one seed means the same directions for every dtype and device.
    directions = torch.randn(columns, width, dtype=torch.float64, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(power_iterations):
        dual_basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ dual_basis).Q
    small_left, values, right = singular_value_decomposition(basis.mT @ matrix)
    root = values[:rank].sqrt()
    return basis @ (small_left[:, :rank] * root), root[:, None] * right[:rank]


def recompress(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of a product, without forming the product: O((rows + columns) k²) for k inner columns.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ the product's SVD is that of the small matrix R₁R₂ᵀ between Q₁ and Q₂.

    Args:
        left: Shape (rows, k).
        right: Shape (k, columns).
        rank: Between 1 and k; capped at min(rows, columns).

    Returns:
        left (rows, rank) and right (rank, columns), the singular values shared out evenly.

    Raises:
        ValueError: If the shapes do not chain.
    """
    check_matrix(left)
    check_matrix(right)
    if left.shape[1] != right.shape[0]:
        expected = f"of shape ({left.shape[1]}, columns)"
        raise ValueError(checks.fault("right", expected, tuple(right.shape), "pass factors that chain"))
    checks.integer_between("rank", rank, 1, left.shape[1], of=f"{left.shape[1]} inner columns")
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.mT)
    core_left, values, core_right = singular_value_decomposition(left_triangle @ right_triangle.mT)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return left_basis @ (core_left[:, :rank] * root), (root[:, None] * core_right[:rank]) @ right_basis.mT


def rank_at_tolerance(values: Tensor, tolerance: float) -> int:
    """Smallest rank whose truncation error is within a relative tolerance in the Frobenius norm.

    Args:
        values: Singular values in descending order, shape (k,).
        tolerance: Relative to the norm of all values; at least 0.

    Returns:
        The rank, between 0 (for a zero matrix, or a tolerance of at least 1) and k.
    """
    check_tolerance(tolerance)
    squares = values.double().square()
    # tails[r] = Σ_{k > r} σ_k², summed from the smallest so that small tails keep their digits.
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return int((tails > tolerance**2 * tails[0]).sum())


def check_matrix(matrix: Tensor) -> None:
    """Refuses what no factorisation here accepts: anything but a finite float32 or float64 matrix.

    Args:
        matrix: The candidate.

    Raises:
        ValueError: The matrix is not two-dimensional, is empty, or has entries that are not finite.
        TypeError: Its dtype is neither float32 nor float64.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        got = f"shape {tuple(matrix.shape)}"
        raise ValueError(
            checks.fault("matrix", "two-dimensional with no axis empty", got, "reshape it first")
        )
    if matrix.dtype not in {torch.float32, torch.float64}:
        raise TypeError(
            checks.fault("matrix", "float32 or float64", matrix.dtype, "convert it with .float()")
        )
    checks.finite("matrix", matrix)


def check_rank(rank: int, matrix: Tensor) -> None:
    """Refuses a rank that the matrix cannot have.

    Args:
        rank: The rank asked for, between 1 and min(rows, columns).
        matrix: The matrix to be factorised.
    """
    checks.integer_between("rank", rank, 1, min(matrix.shape), of=f"a {tuple(matrix.shape)} matrix")


def check_tolerance(tolerance: float) -> None:
    """Refuses a relative tolerance that is negative or no number.

    Args:
        tolerance: The relative tolerance, at least 0.

    Raises:
        ValueError: It is negative or NaN.
    """
    if not tolerance >= 0:  # written so that NaN fails too
        raise ValueError(
            checks.fault("tolerance", "at least 0", tolerance, "use 0 to keep all that is not zero")
        )


def singular_values_by_gram(matrix: Tensor) -> Tensor:
    """All singular values of a float32 matrix through its Gram matrix, with the accuracy of `truncated_svd`.

    Args:
        matrix: Shape (rows, columns), float32.

    Returns:
        Shape (min(rows, columns),), float64, in descending order.
    """
    check_matrix(matrix)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    try:
        squares = torch.linalg.eigvalsh(_gram(matrix))
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return singular_values(matrix.double())
    return squares.flip(0).clamp_min(0).sqrt()


def _leading_triplets_by_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets from the eigenvectors of the smaller Gram matrix, in float64."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _leading_triplets_by_gram(matrix.mT, rank)
        return left.mT, values, right.mT
    try:
        vectors = torch.linalg.eigh(_gram(matrix)).eigenvectors
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return singular_value_decomposition(matrix.double())
    left = vectors[:, -rank:].flip(1)
    # S_r V_rᵀ = U_rᵀA is a projection: no division by small singular values.
    scaled_right = torch.cat([left.mT @ part for part in _in_double(matrix)], dim=1)
    values = torch.linalg.vector_norm(scaled_right, dim=1)
    tiny = torch.finfo(values.dtype).tiny
    return left, values, scaled_right / values.clamp_min(tiny)[:, None]


def _gram(matrix: Tensor) -> Tensor:
    """AAᵀ in float64."""
    total = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for part in _in_double(matrix):
        total.addmm_(part, part.mT)
    return total


def _in_double(matrix: Tensor) -> Iterator[Tensor]:
    """Columns in float64, few at a time: a large matrix is never there twice."""
    for part in matrix.split(max(1, _NUMBERS_AT_A_TIME // matrix.shape[0]), dim=1):
        yield part.double()
