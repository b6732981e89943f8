"""Choosing levels in a metric: against exhaustive search, against plain rounding, and step by step."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.numerics.gptq import (
    Codebook,
    Levels,
    Uniform,
    descend,
    quantise,
    quantise_several,
    round_with_feedback,
    uniform_levels,
)
from weft.numerics.gram import (
    BlockDiagonalGram,
    DenseGram,
    DiagonalGram,
    inverse_root,
    row_sizes,
    row_weights,
    squared_error,
)
from weft.numerics.kmeans import codebooks


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, DenseGram]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(2 * columns, columns, dtype=torch.float64, generator=generator) @ mixing
    return matrix, DenseGram(x.T @ x / len(x))


def levels_of(kind: str, matrix: Tensor) -> Levels:
    if kind == "uniform":
        return uniform_levels(matrix, 4, 1, 1.5)
    if kind == "groups":
        return uniform_levels(matrix, 4, 2, None)
    if kind == "rows":
        return Codebook(codebooks(matrix, 4), several=True)
    return Codebook(codebooks(matrix.reshape(1, -1), 4))


KINDS = ("uniform", "groups", "rows", "shared")


def test_error_feedback_is_the_published_recursion() -> None:
    """Column by column, with the inverse of the metric of the columns still open."""
    matrix, gram = problem(5, 12)
    levels = levels_of("uniform", matrix)
    left, expected, metric = matrix.clone(), torch.empty_like(matrix), gram.dense()
    for column in range(12):
        inverse = torch.linalg.inv(metric[column:, column:])
        expected[:, column] = levels.snap(left[:, column], column)
        error = (left[:, column] - expected[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    got = round_with_feedback(matrix, levels, inverse_root(metric))
    torch.testing.assert_close(got, expected)


def test_an_order_is_that_of_permuted_columns() -> None:
    matrix, gram = problem(4, 10)
    levels = levels_of("uniform", matrix)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    root = inverse_root(gram.dense()[order][:, order])
    permuted = round_with_feedback(matrix[:, order], levels, root)
    assert torch.equal(round_with_feedback(matrix, levels, root, order)[:, order], permuted)


@pytest.mark.parametrize("kind", KINDS)
def test_descent_lowers_the_error_of_every_row_until_no_single_change_helps(kind: str) -> None:
    matrix, gram = problem(6, 150)  # more columns than a block
    metric, levels = gram.dense(), levels_of(kind, matrix)

    def errors(dense: Tensor) -> Tensor:
        return ((matrix - dense) @ metric * (matrix - dense)).sum(1)

    dense = levels.nearest(matrix)
    for _ in range(60):
        after = descend(matrix, dense, levels, metric)
        assert bool((errors(after) <= errors(dense) + 1e-9).all())
        if torch.equal(after, dense):
            break
        dense = after
    codes, best = levels.encode(dense), errors(dense)
    for column in range(0, 150, 7):
        for code in range(4):
            trial = codes.clone()
            trial[:, column] = code
            assert bool((errors(levels.decode(trial)) >= best - 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric_kind", ["none", "diagonal", "dense"])
def test_solved_levels_are_stationary(kind: str, metric_kind: str) -> None:
    matrix, gram = problem(5, 24)
    metric = {"none": None, "diagonal": gram.diagonal(), "dense": gram.dense()}[metric_kind]
    levels = levels_of(kind, matrix)
    codes = levels.encode(matrix)
    solved = levels.solve(matrix, codes, metric)

    def total(dense: Tensor) -> Tensor:
        error = matrix - dense
        if metric is None:
            return error.square().sum()
        return ((error * metric if metric.ndim == 1 else error @ metric) * error).sum()

    names = ("scales", "zeros") if kind == "groups" else ("scales",) if kind == "uniform" else ("table",)
    given = [getattr(solved, name).clone().requires_grad_() for name in names]
    free = type(solved)(**{**vars(solved), **dict(zip(names, given, strict=True))})
    before, after = total(levels.decode(codes)), total(free.decode(codes))
    after.backward()
    assert float(after.detach()) <= float(before) + 1e-9
    for tensor in given:
        assert float(tensor.grad.abs().max()) <= 1e-6 * float(before)


def test_small_problems_are_solved_nearly_at_the_optimum() -> None:
    ratios = []
    for seed in range(12):
        matrix, gram = problem(1, 7, seed)
        levels, metric = levels_of("uniform", matrix), gram.dense()
        grid = levels.decode(torch.arange(4)[None])[0]
        choices = torch.tensor(list(itertools.product(grid.tolist(), repeat=7)), dtype=torch.float64)
        error = matrix - choices
        best = float(((error @ metric) * error).sum(1).min())
        codes, same = quantise(matrix, [levels], input_gram=gram, solves=False)
        found = float(squared_error(matrix - same.decode(codes), gram))
        plain = float(squared_error(matrix - levels.nearest(matrix), gram))
        assert best - 1e-9 <= found <= plain + 1e-9
        ratios.append(found / best)
    assert sorted(ratios)[6] < 1.2


@pytest.mark.parametrize("gram", [True, False], ids=["metric", "plain"])
def test_several_at_once_are_what_they_are_alone(gram: bool) -> None:
    matrix, metric = problem(9, 24)
    grams = {"input_gram": metric} if gram else {}
    starts = [[uniform_levels(matrix, count, 2, count / 2)] for count in (4, 16, 64)]
    starts[0].append(uniform_levels(matrix, 4, 2, 1.5))
    together = quantise_several(matrix, starts, **grams)
    for own, (codes, levels) in zip(starts, together, strict=True):
        alone, theirs = quantise(matrix, own, **grams)
        assert torch.equal(codes, alone)
        torch.testing.assert_close(levels.decode(codes), theirs.decode(alone))


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.9}, {"sweeps": 1}], ids=str)
def test_blocks_of_rows_have_their_own_metrics(options: dict[str, Any]) -> None:
    matrix, first = problem(8, 16)
    _, second = problem(8, 16, seed=1)
    levels = levels_of("uniform", matrix)
    both = BlockDiagonalGram(torch.stack([first.moment, second.moment]), shrinkage=0.0)
    codes, found = quantise(matrix, [levels], input_gram=both, **options)
    for index in range(2):
        own = torch.arange(4 * index, 4 * index + 4)
        alone, theirs = quantise(matrix[own], [levels.rows(own)], input_gram=both.block(index), **options)
        assert torch.equal(codes[own], alone)
        torch.testing.assert_close(found.rows(own).decode(alone), theirs.decode(alone))


def test_rows_take_up_what_the_rows_before_them_lost() -> None:
    """The error comes to that of rows apart times their pivots in H, which are smaller than its diagonal."""
    matrix, gram = problem(64, 24)
    _, output = problem(24, 64, seed=3)
    levels = uniform_levels(matrix, 16, 1, 8.0)
    errors = []
    for rows in (None, output):
        codes, found = quantise(matrix, [levels], input_gram=gram, output_gram=rows)
        lost = matrix - found.decode(codes)
        errors.append(float(squared_error(lost, gram, output)))
        if rows is None:
            predicted = float(row_weights(output, 64) @ row_sizes(lost, gram))
    assert predicted < 0.8 * errors[0]
    assert errors[1] == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_rows_of_one_value_are_exact(value: float) -> None:
    matrix = torch.full((3, 8), value)
    for zero in (None, 2.0, 1.5):
        levels = uniform_levels(matrix, 4, 2, zero)
        codes, found = quantise(matrix, [levels])
        assert isinstance(found, Uniform)
        torch.testing.assert_close(found.decode(codes), matrix, rtol=1e-5, atol=1e-6)


def test_a_diagonal_output_metric_leaves_rows_apart() -> None:
    matrix, gram = problem(12, 16)
    levels = levels_of("uniform", matrix)
    codes, _ = quantise(matrix, [levels], input_gram=gram)
    weighted, _ = quantise(matrix, [levels], input_gram=gram, output_gram=DiagonalGram(torch.rand(12)))
    assert torch.equal(codes, weighted)
