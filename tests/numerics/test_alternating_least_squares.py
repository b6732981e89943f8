"""Alternating least squares: planted terms found again, descent, no degeneracy, warm starts."""

import math

import pytest
import torch
from torch import Tensor

from weft.numerics.alternating_least_squares import canonical_polyadic, rank_one_terms, unit_rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rebuilt(factors: list[Tensor]) -> Tensor:
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"k{letter}" for letter in letters) + "->" + letters, *factors)


@pytest.mark.parametrize("shape", [(8, 9), (6, 5, 4), (7, 6, 3, 3), (5, 4, 3, 2, 3)], ids=str)
def test_planted_terms_are_found_again(shape: tuple[int, ...]) -> None:
    planted = rebuilt([drawn(2, size, seed=axis) for axis, size in enumerate(shape)])
    factors, error = canonical_polyadic(planted, 2, ridge=0.0, sweeps=500, tolerance=1e-12)
    assert math.sqrt(error) <= 1e-4 * float(planted.norm())
    assert float((planted - rebuilt(factors)).norm()) <= 1e-4 * float(planted.norm())


def test_the_error_is_that_of_the_factors_and_falls_with_sweeps_and_terms() -> None:
    tensor = drawn(12, 10, 3, 3)
    errors = []
    for rank, sweeps in ((4, 5), (4, 50), (8, 50), (20, 50)):
        factors, error = canonical_polyadic(tensor, rank, sweeps=sweeps)
        assert error == pytest.approx(float((tensor - rebuilt(factors)).square().sum()), rel=1e-6)
        for factor in factors[1:]:
            torch.testing.assert_close(factor.norm(dim=1), torch.ones(rank, dtype=torch.float64))
        errors.append(error)
    assert errors == sorted(errors, reverse=True)


def test_the_matrix_case_reaches_the_truncated_svd() -> None:
    matrix = drawn(9, 7)
    _, error = canonical_polyadic(matrix, 3, ridge=0.0, sweeps=2000, tolerance=1e-12)
    assert error == pytest.approx(float(torch.linalg.svdvals(matrix)[3:].square().sum()), rel=1e-4)


def test_the_ridge_keeps_terms_of_a_tensor_without_a_best_approximation_bounded() -> None:
    """On the border of rank 2: without a ridge two terms grow for ever and cancel (de Silva and Lim 2008)."""
    a, b = torch.eye(2, dtype=torch.float64)
    tensor = sum(torch.einsum("i,j,k->ijk", *term) for term in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(tensor, Tensor)
    growth = []
    for ridge in (0.0, 1e-3):
        sizes = []
        for sweeps in (200, 2000):
            factors, _ = canonical_polyadic(tensor, 2, ridge=ridge, sweeps=sweeps, tolerance=0.0)
            sizes.append(float(factors[0].norm()))
        growth.append(sizes[1] / sizes[0])
    assert growth[0] > 1.1
    assert growth[1] < 1.01


def test_a_warm_start_is_no_worse_than_what_it_starts_from() -> None:
    tensor = drawn(12, 10, 3, 3)
    before, error = canonical_polyadic(tensor, 6)
    after, better = canonical_polyadic(tensor, 9, start=before[1:], sweeps=5)
    assert better < error
    assert [factor.shape for factor in after] == [(9, size) for size in tensor.shape]


def test_terms_are_the_outer_products_of_rows() -> None:
    left, right = drawn(3, 2), drawn(3, 4, seed=1)
    expected = torch.einsum("ka,kb->kab", left, right).reshape(3, 8)
    torch.testing.assert_close(rank_one_terms([left, right]), expected)
    zero = torch.zeros(2, 3)
    assert torch.equal(unit_rows(zero), zero)
