"""Variable projection: the closed left factor, descent to the optimum, all kinds of metrics."""

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DenseGram, DiagonalGram, Gram, squared_error
from weft.numerics.variable_projection import fit_chain, refine, solve_left


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int = 3) -> Tensor:
    x = torch.relu(drawn(3 * size, size, seed=seed)) + 0.1
    return x.T @ x / len(x)


def grams(size: int) -> dict[str, Gram | None]:
    return {
        "none": None,
        "dense": DenseGram(moment(size)),
        "diagonal": DiagonalGram(moment(size).diagonal()),
        "blocks": BlockDiagonalGram(torch.stack([moment(size, seed=5), 3 * moment(size, seed=6)])),
    }


each_gram = pytest.mark.parametrize("kind", ["none", "dense", "diagonal", "blocks"])


@each_gram
def test_the_left_factor_satisfies_the_normal_equations(kind: str) -> None:
    weight, basis, gram = drawn(6, 10), drawn(4, 10, seed=1), grams(10)[kind]
    left = solve_left(weight, basis, gram)
    residual = weight - left @ basis
    measured = residual if gram is None else gram.matmul(residual)
    torch.testing.assert_close(measured @ basis.T, torch.zeros(6, 4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_dependent_rows_of_the_basis_give_the_least_norm() -> None:
    weight, row = drawn(3, 5), drawn(1, 5, seed=1)
    left = solve_left(weight, torch.cat([row, row, torch.zeros_like(row)]))
    torch.testing.assert_close(left[:, 0], left[:, 1])
    assert not left[:, 2].any()
    torch.testing.assert_close(
        left @ torch.cat([row, row, 0 * row]), weight @ row.T @ row / float(row @ row.T)
    )


@each_gram
def test_descent_ends_where_no_direction_descends(kind: str) -> None:
    """The optimum over both factors of a product is the truncated SVD of the whitened weight."""
    weight, gram = drawn(6, 10), grams(10)[kind]
    start = [drawn(3, 10, seed=2)]
    for _ in range(3):  # rounding can end one descent on a plateau
        found = refine(weight, lambda factors: factors[0], start, gram, evaluations=3000, tolerance=1e-15)
        start = found.factors
    error = float(squared_error(weight - found.left @ found.factors[0], gram))
    assert found.squared_error == pytest.approx(error, rel=1e-5)
    if kind != "blocks":
        seen = weight if gram is None else gram.whiten(weight)
        values = np.linalg.svd(seen.numpy(), compute_uv=False)
        assert error == pytest.approx(float((values[3:] ** 2).sum()), rel=1e-4)
    for seed in range(20):
        nearby = found.factors[0] + 1e-3 * drawn(3, 10, seed=100 + seed)
        moved = weight - solve_left(weight, nearby, gram) @ nearby
        assert float(squared_error(moved, gram)) >= error * (1 - 1e-6)


@each_gram
@pytest.mark.parametrize("with_output", [False, True])
def test_a_chain_is_never_worse_than_its_plain_fit(kind: str, with_output: bool) -> None:
    weight, gram = drawn(6, 12), grams(12)[kind]
    output = DenseGram(moment(6, seed=9)) if with_output else None

    def basis(factors: list[Tensor]) -> Tensor:
        return torch.einsum("ka,kb->kab", *factors).flatten(1)

    def starts(dense: Tensor, metric: Gram | None) -> list[Tensor]:
        return [drawn(3, 4, seed=1), drawn(3, 3, seed=2)]

    left, factors = fit_chain(weight, basis, starts, input_gram=gram, output_gram=output)
    plain_left, plain = fit_chain(weight, basis, starts)
    error = float(squared_error(weight - left @ basis(factors), gram, output))
    plain_error = float(squared_error(weight - plain_left @ basis(plain), gram, output))
    assert error <= plain_error
    if gram is not None:
        assert error < 0.95 * plain_error


def test_a_zero_weight_gives_a_zero_chain() -> None:
    found = refine(torch.zeros(3, 5), lambda factors: factors[0], [drawn(2, 5)], DenseGram(moment(5)))
    assert not found.left.any()
    assert found.squared_error == 0.0
