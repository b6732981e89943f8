"""Singular value decompositions against numpy, closed forms and the Eckart-Young bound."""

import numpy as np
import pytest
import torch

from weft.numerics import svd

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 7), (7, 1), (13, 13), (40, 17), (17, 40)]


def matrix_of(values, rows, columns, seed=0):
    """A matrix with prescribed singular values, built from numpy's QR of Gaussian matrices."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((columns, len(values))))[0]
    return torch.from_numpy(left @ np.diag(values) @ right.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_error_is_the_tail_of_numpys_singular_values(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        left, right = svd.truncated_svd(matrix, rank)
        assert left.shape == (shape[0], rank)
        assert right.shape == (rank, shape[1])
        assert left.dtype == right.dtype == dtype
        error = torch.linalg.matrix_norm((matrix - left @ right).double())
        expected = np.sqrt(np.sum(values[rank:] ** 2))
        assert float(error) == pytest.approx(expected, abs=50 * torch.finfo(dtype).eps * values[0])


@pytest.mark.parametrize("shape", [(40, 17), (17, 40)])
def test_factors_share_the_singular_values_evenly(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, right = svd.truncated_svd(matrix, 5)
    expected = torch.from_numpy(np.diag(np.linalg.svd(matrix.numpy(), compute_uv=False)[:5]))
    torch.testing.assert_close(left.mT @ left, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(right @ right.mT, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_small_singular_values_survive_to_the_dtypes_own_resolution(shape):
    # σ = 1 … 1e-12: the Gram matrix in float64 would lose everything below 1e-8.
    values = 10.0 ** -np.linspace(0, 12, 13)
    matrix = matrix_of(values, *shape)
    for rank in range(1, 13):
        left, right = svd.truncated_svd(matrix, rank)
        assert float(torch.linalg.matrix_norm(matrix - left @ right, 2)) == pytest.approx(
            values[rank], rel=1e-2, abs=1e-14
        )
    left, right = svd.truncated_svd(matrix.float(), 6)
    assert float(torch.linalg.matrix_norm(matrix.float() - left @ right, 2)) == pytest.approx(
        values[6], abs=3e-7
    )


def test_a_zero_matrix_gives_zero_factors():
    for dtype in DTYPES:
        left, right = svd.truncated_svd(torch.zeros(5, 4, dtype=dtype), 2)
        assert float((left @ right).abs().max()) == 0.0
        assert bool(torch.isfinite(left).all() & torch.isfinite(right).all())


def test_implicit_qr_takes_over_where_divide_and_conquer_does_not_converge(monkeypatch):
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)

    def fail(*arguments, **keywords):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    left, s, right = svd.singular_value_decomposition(matrix)
    np.testing.assert_allclose(s.numpy(), values, rtol=1e-12)
    np.testing.assert_allclose(svd.singular_values(matrix).numpy(), values, rtol=1e-12)
    torch.testing.assert_close(left * s @ right, matrix, rtol=1e-12, atol=1e-12)
    left, right = svd.truncated_svd(matrix.float(), 3)
    assert left.dtype == torch.float32
    assert float(torch.linalg.matrix_norm(matrix - left @ right)) == pytest.approx(
        np.linalg.norm(values[3:]), rel=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_randomised_error_lies_between_the_optimum_and_its_expected_bound(shape, dtype):
    values = np.arange(1, 121) ** -1.0
    matrix = matrix_of(values, *shape).to(dtype)
    rank, oversampling = 20, 10
    optimum = np.linalg.norm(values[rank:])
    generator = torch.Generator().manual_seed(4)
    plain, refined = (
        float(
            torch.linalg.matrix_norm(
                matrix
                - torch.matmul(
                    *svd.randomized_svd(
                        matrix, rank, oversampling=oversampling, power_iterations=q, generator=generator
                    )
                )
            )
        )
        for q in (0, 3)
    )
    assert optimum * (1 - 1e-6) <= refined <= plain
    # Halko, Martinsson and Tropp 2011, Theorem 10.5 for the basis of rank + oversampling columns, plus the
    # truncation to the rank (Theorem 9.3): the square of the error is at most the sum of both squares.
    bound = optimum * np.sqrt(1 + (1 + rank / (oversampling - 1)))
    assert plain <= bound
    assert refined <= 1.01 * optimum


def test_randomised_is_reproducible_and_exact_at_full_rank():
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    first, second = (
        torch.matmul(*svd.randomized_svd(matrix, 4, generator=torch.Generator().manual_seed(6)))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    left, right = svd.randomized_svd(matrix, 9, oversampling=0, power_iterations=0)
    torch.testing.assert_close(left @ right, matrix, rtol=1e-10, atol=1e-10)


def test_recompression_truncates_the_product():
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    right = torch.randn(12, 25, generator=generator, dtype=torch.float64)
    values = np.linalg.svd((left @ right).numpy(), compute_uv=False)
    smaller = torch.matmul(*svd.recompress(left, right, 5))
    assert np.linalg.matrix_rank(smaller.numpy(), tol=1e-9) == 5
    assert float(torch.linalg.matrix_norm(left @ right - smaller)) == pytest.approx(
        np.linalg.norm(values[5:])
    )


def test_rank_at_tolerance_is_the_first_that_is_accurate_enough():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    total = values.norm()
    for rank in range(5):
        exact = float(values[rank:].norm() / total)
        assert svd.rank_at_tolerance(values, exact * (1 + 1e-6)) == rank
        if rank < 4:
            assert svd.rank_at_tolerance(values, exact * (1 - 1e-6)) == rank + 1
    assert svd.rank_at_tolerance(torch.zeros(3), 0.0) == 0


@pytest.mark.parametrize(
    ("matrix", "rank", "error", "words"),
    [
        (torch.zeros(3, 4), 4, ValueError, "rank must be between 1 and 3"),
        (torch.zeros(3, 4), 0, ValueError, "rank must be between 1 and 3"),
        (torch.zeros(3), 1, ValueError, "two-dimensional"),
        (torch.zeros(0, 4), 1, ValueError, "two-dimensional"),
        (torch.full((3, 4), torch.nan), 1, ValueError, "finite"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), 1, TypeError, "float32 or float64"),
    ],
)
@pytest.mark.parametrize("factorise", [svd.truncated_svd, svd.randomized_svd])
def test_impossible_arguments_are_refused_by_name(factorise, matrix, rank, error, words):
    with pytest.raises(error, match=words):
        factorise(matrix, rank)


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        svd.rank_at_tolerance(torch.ones(2), -1)
