"""Rank-revealing QR against LAPACK's pivoted QR, Kahan's matrix and the singular value bounds."""

import numpy as np
import pytest
import scipy.linalg
import torch

from weft.numerics.rank_revealing_qr import pivoted_qr, rank_revealing_qr, strong_rank_revealing_qr

DTYPES = [torch.float32, torch.float64]


def decaying(rows, columns, power, seed=0, dtype=torch.float64):
    """σ_k = k^-power between random orthonormal bases."""
    random = np.random.default_rng(seed)
    size = min(rows, columns)
    left = np.linalg.qr(random.standard_normal((rows, size)))[0]
    right = np.linalg.qr(random.standard_normal((columns, size)))[0]
    return torch.from_numpy(left * np.arange(1, size + 1) ** -power @ right.T).to(dtype)


def kahan(size, angle=1.2):
    """Kahan's matrix: pivoting keeps its order, yet its last singular value is far below the last |r_kk|."""
    cosine, sine = np.cos(angle), np.sin(angle)
    upper = np.eye(size) - cosine * np.triu(np.ones((size, size)), 1)
    # A slight scaling of the columns makes the order of the pivots unique in floating point.
    return torch.from_numpy(np.diag(sine ** np.arange(size)) @ upper @ np.diag(1 - 1e-10 * np.arange(size)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (31, 31), (50, 23), (23, 50)])
def test_pivots_and_triangle_are_lapacks(shape):
    matrix = decaying(*shape, 0.5, seed=1)
    basis, triangle, pivots = pivoted_qr(matrix)
    _, expected, order = scipy.linalg.qr(matrix.numpy(), mode="economic", pivoting=True)
    assert pivots.tolist() == order[: len(pivots)].tolist()
    np.testing.assert_allclose(triangle[:, order].abs().numpy(), np.abs(expected), atol=1e-10)
    torch.testing.assert_close(basis @ triangle, matrix, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_basis_is_orthonormal_on_an_ill_conditioned_matrix(dtype):
    matrix = torch.from_numpy(scipy.linalg.hilbert(40)).to(dtype)
    basis, triangle, _ = pivoted_qr(matrix, tolerance=10 * torch.finfo(dtype).eps)
    identity = torch.eye(basis.shape[1], dtype=dtype)
    epsilon = torch.finfo(dtype).eps
    assert float((basis.mT @ basis - identity).abs().max()) < 100 * epsilon
    assert float(torch.linalg.matrix_norm(matrix - basis @ triangle)) < 100 * epsilon
    assert basis.shape[1] < 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
def test_the_tolerance_is_met_and_one_step_fewer_would_not_do(tolerance, dtype):
    matrix = decaying(60, 45, 1.5, dtype=dtype)
    left, right = rank_revealing_qr(matrix, tolerance=tolerance)
    norm = torch.linalg.matrix_norm(matrix)
    assert left.dtype == right.dtype == dtype
    assert float(torch.linalg.matrix_norm(matrix - left @ right) / norm) <= tolerance
    shorter = matrix - left[:, :-1] @ right[:-1]
    assert float(torch.linalg.matrix_norm(shorter) / norm) > tolerance


@pytest.mark.parametrize("power", [0.0, 0.75, 2.0])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_error_is_never_below_the_svds_and_within_the_strong_factor_of_it(shape, power):
    matrix = decaying(*shape, power, seed=2)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in (1, 5, 20, 39):
        left, right = rank_revealing_qr(matrix, rank, swap_bound=2.0)
        error = float(torch.linalg.matrix_norm(matrix - left @ right, 2))
        assert error >= values[rank] * (1 - 1e-9)
        assert error <= values[rank] * np.sqrt(1 + 4 * rank * (shape[1] - rank))


def test_swaps_repair_kahans_matrix():
    size = 60
    matrix = kahan(size)
    rank = size - 1
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    bound = np.sqrt(1 + 4 * rank * (size - rank))
    _, triangle, pivots = pivoted_qr(matrix, rank)
    greedy = np.linalg.svd(triangle[:, pivots].numpy(), compute_uv=False)
    basis, triangle, pivots = strong_rank_revealing_qr(matrix, rank)
    strong = np.linalg.svd(triangle[:, pivots].numpy(), compute_uv=False)
    assert greedy[-1] < values[rank - 1] / bound  # column pivoting alone fails here
    assert strong[-1] >= values[rank - 1] / bound
    assert float(torch.linalg.matrix_norm(matrix - basis @ triangle, 2)) <= values[rank] * bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_rank_is_found_and_the_factorisation_stops(dtype):
    generator = torch.Generator().manual_seed(3)
    matrix = (torch.randn(30, 4, generator=generator) @ torch.randn(4, 50, generator=generator)).to(dtype)
    left, right = rank_revealing_qr(matrix, 10)
    exact = np.linalg.matrix_rank(matrix.double().numpy(), tol=1e-4)
    assert exact == 4
    if dtype == torch.float64:  # the float32 product, exactly represented, has rounding of its own
        left, right = rank_revealing_qr(matrix, 10, tolerance=1e-5)
    assert left.shape[1] in range(4, 11)
    assert float(torch.linalg.matrix_norm(matrix - left @ right)) < 1e-5 * float(
        torch.linalg.matrix_norm(matrix)
    )


def test_the_full_rank_residual_of_an_exactly_low_rank_matrix_is_not_chased():
    generator = torch.Generator().manual_seed(4)
    options = {"generator": generator, "dtype": torch.float64}
    matrix = torch.randn(30, 4, **options) @ torch.randn(4, 50, **options)
    basis, _, pivots = pivoted_qr(matrix, 20)
    assert basis.shape[1] == len(pivots) == 4


def test_a_zero_matrix_gives_one_zero_term():
    left, right = rank_revealing_qr(torch.zeros(4, 6), 3)
    assert left.shape == (4, 1)
    assert float((left @ right).abs().max()) == 0.0
    assert bool(torch.isfinite(left).all())


def test_impossible_arguments_are_refused_by_name():
    matrix = torch.ones(3, 4)
    with pytest.raises(ValueError, match="rank or tolerance must be given"):
        rank_revealing_qr(matrix)
    with pytest.raises(ValueError, match="rank must be between 1 and 3"):
        rank_revealing_qr(matrix, 4)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        rank_revealing_qr(matrix, tolerance=-0.1)
    with pytest.raises(ValueError, match="swap_bound must be at least 1"):
        rank_revealing_qr(matrix, 2, swap_bound=0.5)
    with pytest.raises(ValueError, match="finite"):
        rank_revealing_qr(torch.full((2, 2), torch.inf), 1)
