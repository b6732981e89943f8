"""PALM4MSA and its kin against independent oracles: sorting, butterflies, planted products, dense solves."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics import palm4msa as algorithms
from weft.numerics.palm4msa import (
    SparseFactorisation,
    hierarchical,
    largest_entries,
    multiply,
    palm4msa,
    refit,
    splitting,
)

SIZES = ((12, 12), (9, 20), (20, 9), (7, 1), (1, 7), (1, 1))


def matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def metric(size: int, seed: int = 0) -> Tensor:
    """An ill-conditioned second moment of non-negative inputs."""
    x = torch.relu(matrix((2 * size + 3, size), seed) + 0.5)
    moment = x.T @ x / len(x)
    return moment + 0.01 * torch.eye(size, dtype=moment.dtype)


def weighted_square(error: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """tr(H E Ĝ Eᵀ) by the eigenvalue roots of both metrics, a route of its own."""

    def root(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    error = error if left is None else root(left) @ error
    error = error if right is None else error @ root(right)
    return float(error.square().sum())


def relative(
    target: Tensor, approximation: Tensor, left: Tensor | None = None, right: Tensor | None = None
) -> float:
    return math.sqrt(
        weighted_square(target - approximation, left, right) / weighted_square(target, left, right)
    )


def planted(size: int, sparsity: int, factors: int, seed: int = 0) -> SparseFactorisation:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(factors):
        support = torch.zeros(size, size, dtype=torch.float64)
        for shift in torch.randperm(size, generator=generator)[:sparsity].tolist():
            support += torch.eye(size, dtype=torch.float64).roll(shift, 1)[
                torch.randperm(size, generator=generator)
            ]
        values = torch.randn(size, size, dtype=torch.float64, generator=generator)
        # Values away from zero: a planted entry near zero is nobody's to find.
        factor = (support > 0) * (values + 0.5 * values.sign())
        parts.append(factor / factor.norm())
    return SparseFactorisation(3.0, tuple(parts), math.nan)


# -- the projection


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), count=st.integers(1, 10), data=st.data())
def test_largest_entries_is_the_union_of_row_wise_and_column_wise_sorting(rows, columns, count, data) -> None:
    # Whole numbers bring ties: the first of equals is kept, as a stable sort keeps it.
    entries = data.draw(st.lists(st.integers(-4, 4), min_size=rows * columns, max_size=rows * columns))
    given_matrix = torch.tensor(entries, dtype=torch.float64).reshape(rows, columns)
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        order = sorted(range(columns), key=lambda j: (-abs(float(given_matrix[i, j])), j))
        expected[i, order[:count]] = True
    for j in range(columns):
        order = sorted(range(rows), key=lambda i: (-abs(float(given_matrix[i, j])), i))
        expected[order[:count], j] = True
    assert torch.equal(largest_entries(given_matrix, count), expected)


@pytest.mark.parametrize("shape", [(300, 517), (1, 1000), (129, 1)])
@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_threshold_from_strips_is_that_of_a_full_sort(
    shape: tuple[int, int], count: int, axis: int
) -> None:
    size = matrix(shape).abs()
    place = min(count, shape[axis])
    expected = size.sort(dim=axis, descending=True).values.narrow(axis, place - 1, 1)
    assert torch.equal(algorithms._kth_largest(size, place, axis), expected)


@pytest.mark.parametrize("shape", [(40, 40), (20, 60), (60, 20)])
def test_largest_entries_keeps_between_k_and_twice_k_on_average(shape: tuple[int, int]) -> None:
    kept = largest_entries(matrix(shape), 5)
    assert int(kept.sum(0).min()) >= 5
    assert int(kept.sum(1).min()) >= 5
    assert 5 * max(shape) <= int(kept.sum()) <= 5 * sum(shape)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_multiply_equals_the_dense_product(density: float, dtype: torch.dtype) -> None:
    kept = torch.rand(200, 150, generator=torch.Generator().manual_seed(0)) < density
    sparse, dense = matrix((200, 150), 1, dtype) * kept, matrix((150, 30), 2, dtype)
    torch.testing.assert_close(multiply(sparse, dense), sparse @ dense)
    torch.testing.assert_close(multiply(sparse.T, dense.new_ones(200, 3)), sparse.T @ dense.new_ones(200, 3))


# -- PALM4MSA


@pytest.mark.parametrize("shape", SIZES)
def test_one_factor_is_pruning_to_the_pattern(shape: tuple[int, int]) -> None:
    target = matrix(shape)
    sparsity = max(1, min(shape) // 4)
    pruned = target * largest_entries(target, sparsity)
    torch.testing.assert_close(palm4msa(target, sparsity, 1).to_dense(), pruned)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("algorithm", [palm4msa, splitting])
@pytest.mark.parametrize("weighted", [False, True])
def test_reported_error_shapes_norms_and_sparsity_are_what_they_claim(
    shape, factors, algorithm, weighted
) -> None:
    target, sparsity = matrix(shape), max(1, min(shape) // 4)
    grams = {"input_metric": metric(shape[1]), "output_metric": metric(shape[0], 1)} if weighted else {}
    fit = algorithm(target, sparsity, factors, iterations=20, **grams)
    left, right = grams.get("output_metric"), grams.get("input_metric")
    assert fit.error == pytest.approx(relative(target, fit.to_dense(), left, right), rel=1e-6, abs=1e-9)
    assert fit.error <= 1
    inner = min(shape)
    sizes = [shape[0], *[inner] * (factors - 1), shape[1]]
    for factor, size in zip(fit.factors, zip(sizes, sizes[1:], strict=False), strict=True):
        assert factor.shape == size
        assert float(factor.norm()) == pytest.approx(1)
        assert int((factor != 0).sum()) <= sparsity * sum(size)


def test_the_best_iterate_is_returned() -> None:
    # A start at the truth: the projection of a later sweep may leave it, the answer may not.
    truth = planted(24, 3, 2)
    noisy = truth.to_dense() + 0.05 * matrix((24, 24), 5) * truth.to_dense().square().mean().sqrt()
    fit = palm4msa(noisy, 2, 2, start=truth, iterations=15, tolerance=0.0)
    assert fit.error <= relative(noisy, truth.to_dense()) + 1e-12
    assert fit.error <= min(fit.errors) + 1e-12
    assert max(fit.errors) > fit.error * (1 + 1e-6)


def test_the_first_sweep_is_the_published_step() -> None:
    """One factor after the other by the formulas of Fig. 4, written out with the residual and exact norms."""
    target, sparsity = matrix((10, 10)), 3
    factors, scale = [torch.zeros_like(target), torch.eye(10, dtype=target.dtype)], 1.0
    for j in range(2):
        left = torch.eye(10, dtype=target.dtype) if j == 0 else factors[0]
        right = factors[1] if j == 0 else torch.eye(10, dtype=target.dtype)
        constant = 1.001 * float(torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2)) ** 2
        factor = scale * factors[j]
        factor = factor - left.T @ (left @ factor @ right - target) @ right.T / constant
        factor = factor * largest_entries(factor, sparsity)
        scale, factors[j] = float(factor.norm()), factor / factor.norm()
    product = factors[0] @ factors[1]
    scale = float((target * product).sum() / product.square().sum())
    fit = palm4msa(target, sparsity, 2, iterations=1, right_first=False)
    # The power iteration's norm is a little below the exact one.
    torch.testing.assert_close(fit.to_dense(), scale * product, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("algorithm", [palm4msa, splitting])
def test_a_transposed_target_gives_the_transposed_factorisation(algorithm) -> None:
    target = matrix((11, 17))
    fit = algorithm(target, 3, 2, iterations=10)
    mirrored = algorithm(target.T.contiguous(), 3, 2, iterations=10)
    torch.testing.assert_close(mirrored.to_dense(), fit.to_dense().T)


@pytest.mark.parametrize("factors", [2, 3])
def test_a_planted_product_is_recovered_from_its_true_support(factors: int) -> None:
    truth = planted(32, 3, factors)
    target = truth.to_dense()
    # The truth's supports and signs, without its values: half of every value is noise.
    start = SparseFactorisation(
        1.0,
        tuple(
            factor * (1 + 0.5 * matrix((32, 32), 7 + i).clamp(-1, 1))
            for i, factor in enumerate(truth.factors)
        ),
        math.nan,
    )
    assert relative(target, start.to_dense() * 3.0) > 0.2
    assert refit(target, start, sweeps=400, tolerance=1e-9).error < 1e-6


@pytest.mark.parametrize("algorithm", [palm4msa, splitting])
def test_a_planted_product_is_recovered_from_a_perturbed_start(algorithm) -> None:
    truth = planted(32, 3, 2)
    target = truth.to_dense()
    noise = [matrix((32, 32), 9 + i) for i in range(2)]
    start = SparseFactorisation(
        truth.scale,
        tuple(f + 0.05 * n * f.norm() / n.norm() for f, n in zip(truth.factors, noise, strict=True)),
        math.nan,
    )
    assert relative(target, start.to_dense()) > 0.03
    assert algorithm(target, 3, 2, start=start, iterations=2000, tolerance=1e-9).error < 1e-4


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_hierarchical_variant_finds_the_butterflies_of_a_hadamard_matrix(
    size: int, dtype: torch.dtype
) -> None:
    target = torch.tensor(scipy.linalg.hadamard(size), dtype=dtype)
    fit = hierarchical(target, 2, round(math.log2(size)))
    assert relative(target.double(), fit.to_dense().double()) < 1e-6
    for factor in fit.factors:
        assert (factor != 0).sum(0).tolist() == [2] * size
        assert (factor != 0).sum(1).tolist() == [2] * size


@pytest.mark.slow
def test_the_hierarchical_variant_factors_a_large_hadamard_matrix() -> None:
    target = torch.tensor(scipy.linalg.hadamard(256), dtype=torch.float32)
    fit = hierarchical(target, 2, 8)
    assert relative(target.double(), fit.to_dense().double()) < 1e-6
    assert {int((factor != 0).sum(0).max()) for factor in fit.factors} == {2}


# -- refits and splitting


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_refit_never_raises_the_objective_and_keeps_the_supports(
    shape: tuple[int, int], weighted: bool
) -> None:
    target = matrix(shape)
    grams = {"input_metric": metric(shape[1]), "output_metric": metric(shape[0], 1)} if weighted else {}
    start = palm4msa(target, max(1, min(shape) // 4), 3, iterations=3)
    fit = refit(target, start, sweeps=8, tolerance=0.0, **grams)
    errors = [
        relative(target, start.to_dense(), grams.get("output_metric"), grams.get("input_metric")),
        *fit.errors,
    ]
    assert all(
        after <= before * (1 + 1e-9) + 1e-12 for before, after in zip(errors, errors[1:], strict=False)
    )
    for before, after in zip(start.factors, fit.factors, strict=True):
        assert not bool(after[before == 0].any())


def test_a_refit_of_one_factor_is_weighted_least_squares() -> None:
    """Against a dense solve of the normal equations (H ⊗ Ĝ restricted to the support)."""
    target, right, left = matrix((6, 7)), metric(7), metric(6, 1)
    support = largest_entries(target, 2)
    start = SparseFactorisation(1.0, (target * support / (target * support).norm(),), math.nan)
    fit = refit(target, start, input_metric=right, output_metric=left, steps=200)
    chosen = support.flatten().nonzero().flatten()
    normal = torch.kron(left, right)[chosen][:, chosen]
    moment = (left @ target @ right).flatten()[chosen]
    expected = torch.zeros(42, dtype=torch.float64)
    expected[chosen] = torch.linalg.solve(normal, moment)
    torch.testing.assert_close(fit.to_dense().flatten(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_splitting_is_far_better_than_the_published_steps(weighted: bool) -> None:
    left, _, right = torch.linalg.svd(matrix((60, 60)))
    target = left * torch.arange(1, 61, dtype=torch.float64) ** -0.75 @ right
    grams = {"input_metric": metric(60)} if weighted else {}
    published = palm4msa(target, 6, 2, **grams)
    assert splitting(target, 6, 2, **grams).error < 0.9 * published.error


def test_descent_from_a_start_never_rises() -> None:
    target = matrix((30, 30))
    start = palm4msa(target, 4, 2, iterations=5)
    errors = [start.error, *splitting(target, 4, 2, start=start, tolerance=0.0, iterations=10).errors]
    assert all(
        after <= before * (1 + 1e-9) + 1e-12 for before, after in zip(errors, errors[1:], strict=False)
    )


def test_a_diagonal_metric_equals_its_dense_matrix() -> None:
    target, weights = matrix((12, 15)), matrix((15, 1), 3).flatten().abs() + 0.1
    as_vector = splitting(target, 3, 2, input_metric=weights, iterations=5)
    as_matrix = splitting(target, 3, 2, input_metric=torch.diag(weights), iterations=5)
    assert as_vector.error == pytest.approx(as_matrix.error, rel=1e-6)


@pytest.mark.parametrize("algorithm", [palm4msa, splitting])
def test_a_zero_target_gives_zero(algorithm) -> None:
    fit = algorithm(torch.zeros(5, 6), 2, 2)
    assert fit.error == 0
    assert not bool(fit.to_dense().any())


@pytest.mark.parametrize("algorithm", [palm4msa, splitting])
def test_impossible_arguments_are_refused(algorithm) -> None:
    with pytest.raises(ValueError, match="factors must be at least 1, got 0"):
        algorithm(torch.ones(3, 3), 1, 0)
    with pytest.raises(ValueError, match="sparsity must be at least 1, got 0"):
        algorithm(torch.ones(3, 3), 0, 2)
    with pytest.raises(ValueError, match="sparsity must be of length 2, got 3"):
        algorithm(torch.ones(3, 3), (1, 1, 1), 2)
    with pytest.raises(ValueError, match="start must be of 3 factors, got 2"):
        algorithm(torch.ones(3, 3), 1, 3, start=palm4msa(torch.ones(3, 3), 1, 2))


def test_the_power_iteration_finds_the_spectral_norm() -> None:
    moment = metric(40)
    value, vector = algorithms._largest_eigenvalue(moment, None)
    assert value == pytest.approx(float(torch.linalg.matrix_norm(moment, 2)), rel=1e-6)
    warm, _ = algorithms._largest_eigenvalue(moment * 1.01, vector)
    assert warm == pytest.approx(1.01 * value, rel=1e-6)
