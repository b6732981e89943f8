"""Vector quantisation: against every choice where these can be counted, and each step never for the worse."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weft.numerics.gram import DenseGram, DiagonalGram, inverse_root
from weft.numerics.vector_quantisation import (
    Codes,
    _sweep,
    book_of,
    cluster,
    nearest,
    quantise,
    with_feedback,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(size: int, *, samples: int = 60, shrinkage: float = 0.1, seed: int = 3) -> DenseGram:
    x = torch.relu(drawn(samples, size, seed=seed)) @ drawn(size, size, seed=seed + 1)
    return DenseGram(x.T @ x / samples, shrinkage)


def best_of_all(matrix: Tensor, codes: Codes, gram: DenseGram | None) -> float:
    """The least squared error over all choices of codes, row by row."""
    metric = torch.eye(matrix.shape[1], dtype=torch.float64) if gram is None else gram.dense()
    subspaces, codewords = codes.codes.shape[1], codes.codebooks.shape[1]
    total = 0.0
    for row, scale in zip(matrix, codes.scales, strict=True):
        errors = []
        for choice in itertools.product(range(codewords), repeat=subspaces):
            pieces = [
                codes.codebooks[book_of(subspaces, len(codes.codebooks))[s], k] for s, k in enumerate(choice)
            ]
            error = row - scale * torch.cat(pieces)
            errors.append(float(error @ metric @ error))
        total += min(errors)
    return total


@pytest.mark.parametrize("books", [1, 2, 4])
def test_the_choice_is_near_the_best_of_all(books: int) -> None:
    matrix, gram = drawn(12, 8), gram_of(8)
    codes = quantise(matrix, 4, 3, books, scaled=True, input_gram=gram, sweeps=30, tolerance=0.0)
    best = best_of_all(matrix, codes, gram)
    got = codes.error(matrix, gram, None)
    assert best <= got * (1 + 1e-9)
    assert got <= 1.25 * best
    nearest_only = replace(codes, codes=_nearest_codes(matrix, codes))
    assert got < nearest_only.error(matrix, gram, None)


def _nearest_codes(matrix: Tensor, codes: Codes) -> Tensor:
    pieces = (matrix / codes.scales[:, None]).reshape(len(matrix), codes.codes.shape[1], -1)
    columns = [nearest(pieces[:, s], codes.codebooks[book]) for s, book in enumerate(codes.books())]
    return torch.stack(columns, dim=1)


def test_in_the_plain_norm_the_nearest_codeword_is_chosen() -> None:
    matrix = drawn(10, 6)
    codes = quantise(matrix, 3, 4, 1, scaled=False, sweeps=100, tolerance=0.0)
    assert codes.error(matrix, None, None) == pytest.approx(best_of_all(matrix, codes, None))


def test_the_inverse_root_is_upper_triangular_and_a_root() -> None:
    metric = gram_of(9).dense()
    upper = inverse_root(metric)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(metric))


def test_a_singular_metric_has_an_inverse_root_all_the_same() -> None:
    x = drawn(3, 9)
    assert torch.isfinite(inverse_root(x.T @ x)).all()
    assert torch.isfinite(inverse_root(torch.zeros(4, 4, dtype=torch.float64))).all()


def test_feedback_makes_up_for_errors_that_nearest_codes_leave() -> None:
    matrix, gram = drawn(30, 12), gram_of(12)
    start = quantise(matrix, 6, 4, 1, scaled=True)
    fed = with_feedback(matrix, start, gram.dense())
    assert fed.error(matrix, gram, None) < start.error(matrix, gram, None)


def test_feedback_in_a_diagonal_metric_changes_nothing() -> None:
    matrix = drawn(30, 12)
    start = quantise(matrix, 6, 4, 1, scaled=True, sweeps=100, tolerance=0.0)
    assert torch.equal(with_feedback(matrix, start, torch.eye(12, dtype=torch.float64)).codes, start.codes)


def test_a_sweep_never_raises_the_error_and_ends_where_no_single_code_helps() -> None:
    matrix, gram = drawn(20, 12), gram_of(12)
    codes = quantise(matrix, 4, 5, 2, scaled=True)
    errors = [codes.error(matrix, gram, None)]
    for _ in range(30):
        codes = _sweep(matrix, codes, gram.dense())
        errors.append(codes.error(matrix, gram, None))
    assert all(after <= before + 1e-9 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]
    for subspace, word in itertools.product(range(4), range(5)):
        other = codes.codes.clone()
        other[:, subspace] = word
        moved = matrix - replace(codes, codes=other).dense()
        kept = matrix - codes.dense()
        assert bool(
            (((moved @ gram.dense()) * moved).sum(1) >= ((kept @ gram.dense()) * kept).sum(1) - 1e-9).all()
        )


def test_a_diagonal_metric_weighs_columns() -> None:
    matrix = drawn(200, 4)
    weights = DiagonalGram(torch.tensor([1e4, 1e-4, 1e4, 1e-4], dtype=torch.float64), shrinkage=0.0)
    codes = quantise(matrix, 2, 8, 1, scaled=False, input_gram=weights)
    error = (matrix - codes.dense()).square().mean(0)
    assert bool((error[[0, 2]] < 0.1 * error[[1, 3]]).all())


def test_codes_to_start_from_are_improved() -> None:
    matrix, gram = drawn(30, 12), gram_of(12)
    given = quantise(matrix + 0.1 * drawn(30, 12, seed=7), 6, 4, 1, scaled=True, input_gram=gram)
    found = quantise(matrix, 6, 4, 1, scaled=True, input_gram=gram, start=given)
    assert found.error(matrix, gram, None) < given.error(matrix, gram, None)


def test_clusters_of_well_separated_points_are_found() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    points = centres.repeat(50, 1) + 0.01 * drawn(150, 2)
    found = cluster(points, 3)
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.01


def test_a_point_without_weight_has_no_say() -> None:
    points = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    found = cluster(points, 1, weights=torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([[0.5]], dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_distinct_points_than_centres_do_no_harm(count: int) -> None:
    found = cluster(torch.ones(4, 2), count)
    assert found.shape == (count, 2)
    assert torch.equal(found, torch.ones(count, 2))


def test_zero_matrices_and_rows_are_kept() -> None:
    matrix = drawn(6, 4)
    matrix[2] = 0
    codes = quantise(matrix, 2, 4, 1, scaled=True, input_gram=gram_of(4))
    assert torch.isfinite(codes.dense()).all()
    assert float(codes.dense()[2].norm()) < 1e-6
    assert float(quantise(torch.zeros(3, 4), 2, 2, 1, scaled=True).dense().norm()) == 0
