"""Adaptive cross approximation against the SVD, exact ranks and matrices made to mislead it."""

import numpy as np
import pytest
import torch

from weft.numerics.aca import adaptive_cross_approximation

DTYPES = [torch.float32, torch.float64]
PIVOTINGS = ["partial", "full"]


def separated_kernel(rows, columns, dtype=torch.float64):
    """1/|x − y| between the intervals [0, 1] and [2, 3]: singular values fall geometrically."""
    x, y = torch.linspace(0, 1, rows, dtype=dtype), torch.linspace(2, 3, columns, dtype=dtype)
    return 1.0 / (x[:, None] - y).abs()


def relative_error(matrix, factors):
    """‖A − LR‖_F / ‖A‖_F in float64."""
    left, right = (factor.double() for factor in factors)
    return float(
        torch.linalg.matrix_norm(matrix.double() - left @ right) / torch.linalg.matrix_norm(matrix.double())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pivoting", PIVOTINGS)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_stopping_rule_reaches_its_accuracy_on_a_smooth_kernel(tolerance, pivoting, dtype):
    matrix = separated_kernel(120, 90, dtype)
    left, right = adaptive_cross_approximation(matrix, tolerance=tolerance, pivoting=pivoting)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    needed = int(np.sum(np.sqrt(np.cumsum(values[::-1] ** 2)[::-1]) > tolerance * np.linalg.norm(values)))
    assert left.dtype == right.dtype == dtype
    assert relative_error(matrix, (left, right)) <= tolerance
    assert needed <= left.shape[1] <= needed + 2


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_error_is_never_below_the_svds_and_within_the_growth_factor_of_it(pivoting):
    matrix = separated_kernel(64, 80)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in range(1, 8):
        left, right = adaptive_cross_approximation(matrix, rank, pivoting=pivoting)
        error = matrix - left @ right
        assert left.shape[1] == rank
        assert float(torch.linalg.matrix_norm(error)) >= np.linalg.norm(values[rank:]) * (1 - 1e-6)
        # Largest entry after k steps with full pivoting: at most 4^k (k + 1) σ_{k+1} (Harbrecht, Peters and
        # Schneider 2012); partial pivoting keeps within the bound on this monotone kernel.
        assert float(error.abs().max()) <= 4.0**rank * (rank + 1) * values[rank]


@pytest.mark.parametrize("pivoting", PIVOTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (37, 20), (20, 37)])
def test_exact_rank_is_recovered(shape, pivoting):
    generator = torch.Generator().manual_seed(1)
    rank = min(3, *shape)
    matrix = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, shape[1], generator=generator, dtype=torch.float64
    )
    left, right = adaptive_cross_approximation(matrix, tolerance=1e-10, pivoting=pivoting)
    torch.testing.assert_close(left @ right, matrix, rtol=1e-9, atol=1e-9)
    assert left.shape[1] <= rank + 1


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_a_cross_reproduces_its_rows_and_columns(pivoting):
    matrix = torch.randn(12, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, right = adaptive_cross_approximation(matrix, 4, pivoting=pivoting)
    exact = (matrix - left @ right).abs() < 1e-10
    assert int(exact.all(dim=1).sum()) == 4
    assert int(exact.all(dim=0).sum()) == 4


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_zero_rows_and_columns_do_not_stop_it(pivoting):
    matrix = torch.zeros(40, 30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    core = torch.randn(5, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 4, generator=generator, dtype=torch.float64
    )
    matrix[21:26, 11:15] = core
    factors = adaptive_cross_approximation(matrix, tolerance=1e-8, pivoting=pivoting)
    assert relative_error(matrix, factors) < 1e-8


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_decoupled_blocks_are_all_found(pivoting):
    # The chain of partial pivots never leaves the first block by itself.
    matrix = torch.block_diag(*(separated_kernel(16, 16) * scale for scale in (1.0, 0.5, 2.0)))
    factors = adaptive_cross_approximation(matrix, tolerance=1e-5, pivoting=pivoting)
    assert relative_error(matrix, factors) < 1e-4


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_full_rank_reproduces_the_matrix(pivoting):
    matrix = torch.randn(9, 14, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert relative_error(matrix, adaptive_cross_approximation(matrix, 9, pivoting=pivoting)) < 1e-10


@pytest.mark.parametrize("pivoting", PIVOTINGS)
def test_a_zero_matrix_gives_one_zero_term(pivoting):
    left, right = adaptive_cross_approximation(torch.zeros(4, 6), 3, pivoting=pivoting)
    assert left.shape == (4, 1)
    assert float((left @ right).abs().max()) == 0.0


def test_partial_pivoting_reads_few_entries():
    class Counting(torch.Tensor):
        """Counts the entries that indexing hands out."""

        read = 0

        def __getitem__(self, index):
            part = self.as_subclass(torch.Tensor)[index]
            Counting.read += part.numel()
            return part

    matrix = separated_kernel(801, 700)
    left, _ = adaptive_cross_approximation(matrix.as_subclass(Counting), tolerance=1e-6)
    # Each step reads a row (twice) and a column; one that would stop also looks at 16 untouched rows.
    assert 0 < Counting.read <= (3 + 16) * left.shape[1] * 801 < matrix.numel() / 4


def test_impossible_arguments_are_refused_by_name():
    matrix = torch.ones(3, 4)
    with pytest.raises(ValueError, match="rank or tolerance must be given"):
        adaptive_cross_approximation(matrix)
    with pytest.raises(ValueError, match="rank must be between 1 and 3"):
        adaptive_cross_approximation(matrix, 9)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        adaptive_cross_approximation(matrix, tolerance=-1.0)
    with pytest.raises(ValueError, match="pivoting must be one of"):
        adaptive_cross_approximation(matrix, 1, pivoting="rook")
    with pytest.raises(ValueError, match="finite"):
        adaptive_cross_approximation(torch.full((2, 2), torch.nan), 1)
