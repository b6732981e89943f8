"""Weighted least squares without matrices: against normal equations solved by another route."""

import pytest
import torch
from torch import Tensor

from weft.numerics.gauss_newton import refine
from weft.numerics.gram import DenseGram, squared_error


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(size: int, seed: int = 3) -> DenseGram:
    x = torch.relu(drawn(40, size, seed=seed)) + 0.1
    return DenseGram(x.T @ x / 40)


def test_a_linear_problem_is_solved_as_by_the_normal_equations() -> None:
    target, basis = drawn(5, 6), drawn(7, 5, 6, seed=1)
    inner, outer = gram_of(6), gram_of(5, seed=4)
    (got,) = refine(
        lambda values: torch.tensordot(values[0], basis, dims=1),
        (torch.zeros(7, dtype=torch.float64),),
        target,
        input_gram=inner,
        output_gram=outer,
        steps=20,
        products=50,
        tolerance=0.0,
    )
    metric = torch.kron(outer.dense(), inner.dense())
    columns = basis.flatten(1).T
    expected = torch.linalg.solve(columns.T @ metric @ columns, columns.T @ metric @ target.flatten())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_low_rank_factors_reach_the_optimum_of_the_closed_form(weighted: bool) -> None:
    target, inner = drawn(9, 8), gram_of(8) if weighted else None
    left, right = refine(
        lambda values: values[0] @ values[1],
        (drawn(9, 3, seed=5), drawn(3, 8, seed=6)),
        target,
        input_gram=inner,
        steps=60,
        products=60,
        tolerance=0.0,
    )
    coloured = target if inner is None else inner.whiten(target)
    best = float(torch.linalg.svdvals(coloured)[3:].square().sum())
    assert float(squared_error(target - left @ right, inner)) == pytest.approx(best, rel=1e-4)


def test_what_cannot_be_better_stays_as_it_is() -> None:
    left, right = drawn(4, 2), drawn(2, 5, seed=1)
    found = refine(lambda values: values[0] @ values[1], (left, right), left @ right)
    assert torch.equal(found[0], left)
    assert torch.equal(found[1], right)


def test_a_term_that_starts_at_zero_is_used() -> None:
    target = drawn(4, 5)
    found = refine(
        lambda values: values[0] + values[1],
        (torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)),
        target,
        steps=5,
    )
    torch.testing.assert_close(found[0] + found[1], target, rtol=1e-4, atol=1e-4)
