"""Realisations against the formula, exact ranks, whole Hankel blocks' singular values, and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.hankel_realisation import (
    Realisation,
    balance,
    hankel_singular_values,
    realise,
    realise_weighted,
    stage_dimensions,
    state_bounds,
    truncation_error,
)

SHAPES = [(24, 30), (30, 24), (17, 17), (23, 9), (12, 40)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    left, _, right = torch.linalg.svd(random_matrix(rows, columns, seed), full_matrices=False)
    return (left * torch.arange(1, left.shape[1] + 1, dtype=torch.float64) ** -0.75) @ right


def random_metric(size: int, seed: int) -> Tensor:
    """A correlated second moment with a mean, as after a ReLU."""
    x = torch.relu(
        random_matrix(3 * size, size, seed) @ random_matrix(size, size, seed + 1) / math.sqrt(size)
    )
    return x.T @ x / len(x) + 0.02 * torch.eye(size, dtype=torch.float64)


def stages_of(shape: tuple[int, int], stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return stage_dimensions(shape[0], stages), stage_dimensions(shape[1], stages)


def constant(rows: tuple[int, ...], columns: tuple[int, ...], dimension: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(min(dimension, bound) for bound in side) for side in state_bounds(rows, columns))


def formula(realisation: Realisation) -> Tensor:
    """W = D + C(I − ZA)⁻¹ZB + G(I − ZᵀE)⁻¹ZᵀF with block-diagonal A … G and the block shift Z."""

    def one_direction(space, step: int) -> Tensor:
        stages = len(space.output)
        states = [block.shape[1] for block in space.output]
        starts = [0, *itertools.accumulate(states)]

        def shifted(blocks: tuple[Tensor, ...], widths: list[int]) -> Tensor:
            """Z times a block-diagonal matrix: block k goes to the rows of the state of stage k ± 1."""
            offsets = [0, *itertools.accumulate(widths)]
            result = torch.zeros(starts[-1], offsets[-1], dtype=torch.float64)
            for k, block in enumerate(blocks):
                to = k + step
                if 0 <= to < stages:
                    result[starts[to] : starts[to + 1], offsets[k] : offsets[k + 1]] = block
            return result

        identity = torch.eye(starts[-1], dtype=torch.float64)
        columns = [block.shape[1] for block in space.input]
        inner = torch.linalg.solve(
            identity - shifted(space.transition, states), shifted(space.input, columns)
        )
        return torch.block_diag(*space.output) @ inner

    direct = torch.block_diag(*realisation.direct)
    return direct + one_direction(realisation.causal, 1) + one_direction(realisation.anticausal, -1)


def hankel_blocks(
    matrix: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    above, left = [0, *itertools.accumulate(rows)], [0, *itertools.accumulate(columns)]
    boundaries = range(1, len(rows))
    return (
        [matrix[above[k] :, : left[k]] for k in boundaries],
        [matrix[: above[k], left[k] :] for k in boundaries],
    )


def weighted_error(error: Tensor, metric: Tensor, output_metric: Tensor | None = None) -> float:
    weighed = error @ metric
    return float((error * (weighed if output_metric is None else output_metric @ weighed)).sum())


@given(size=st.integers(1, 300), data=st.data())
def test_stage_dimensions_differ_by_at_most_one_and_cover_everything(size: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, size))
    dimensions = stage_dimensions(size, stages)
    assert sum(dimensions) == size
    assert len(dimensions) == stages
    assert max(dimensions) - min(dimensions) <= 1
    assert list(dimensions) == sorted(dimensions, reverse=True)


def test_more_stages_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="stages must be between 1 and 4 for 4 rows or columns, got 5"):
        stage_dimensions(4, 5)


@each_shape
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 9])
def test_full_state_dimensions_are_exact_for_any_matrix(shape: tuple[int, int], stages: int) -> None:
    rows, columns = stages_of(shape, stages)
    matrix = random_matrix(*shape)
    realisation = realise(matrix, rows, columns, state_dimensions=state_bounds(rows, columns))
    torch.testing.assert_close(formula(realisation), matrix, rtol=0, atol=1e-11)
    torch.testing.assert_close(realisation.dense(), matrix, rtol=0, atol=1e-11)


@each_shape
@pytest.mark.parametrize(("stages", "dimension"), [(2, 3), (4, 2), (9, 1), (3, 0)])
def test_dense_equals_the_papers_formula(shape: tuple[int, int], stages: int, dimension: int) -> None:
    rows, columns = stages_of(shape, stages)
    realisation = realise(
        random_matrix(*shape), rows, columns, state_dimensions=constant(rows, columns, dimension)
    )
    torch.testing.assert_close(realisation.dense(), formula(realisation), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "stages"), [(40, 40), (40, 7), (41, 13)])
def test_the_inverse_of_a_tridiagonal_matrix_needs_one_state(size: int, stages: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tridiagonal = 4 * torch.eye(size, dtype=torch.float64)
    for offset in (-1, 1):
        tridiagonal += torch.diag(torch.rand(size - 1, dtype=torch.float64, generator=generator), offset)
    inverse = torch.linalg.inv(tridiagonal)
    rows, columns = stages_of((size, size), stages)
    fixed = realise(inverse, rows, columns, state_dimensions=constant(rows, columns, 1))
    torch.testing.assert_close(formula(fixed), inverse, rtol=0, atol=1e-13)
    found = realise(inverse, rows, columns, tolerance=1e-12)
    assert max(map(max, found.state_dimensions)) == 1


def test_a_banded_plus_a_semiseparable_matrix_is_recovered() -> None:
    size, stages = 60, 12
    generator = torch.Generator().manual_seed(2)

    def factors(rank: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(size, rank, dtype=torch.float64, generator=generator) for _ in range(2))

    lower, upper = factors(3), factors(2)
    matrix = (lower[0] @ lower[1].T).tril(-1) + (upper[0] @ upper[1].T).triu(1)
    for offset in (-2, -1, 0, 1, 2):
        matrix += torch.diag(
            torch.randn(size - abs(offset), dtype=torch.float64, generator=generator), offset
        )
    rows, columns = stages_of((size, size), stages)
    # A band of two adds at most two to the rank of each Hankel block.
    exact = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, 5))
    torch.testing.assert_close(formula(exact), matrix, rtol=0, atol=1e-10)
    causal, anticausal = realise(matrix, rows, columns, tolerance=1e-12).state_dimensions
    assert max(causal) <= 5
    assert max(anticausal) <= 4


@each_shape
@pytest.mark.parametrize("stages", [2, 4, 9])
def test_a_tolerance_finds_the_rank_of_every_hankel_block(shape: tuple[int, int], stages: int) -> None:
    rows, columns = stages_of(shape, stages)
    planted = realise(
        random_matrix(*shape), rows, columns, state_dimensions=constant(rows, columns, 2)
    ).dense()
    found = realise(planted, rows, columns, tolerance=1e-11)
    torch.testing.assert_close(found.dense(), planted, rtol=0, atol=1e-9)
    for dimensions, blocks in zip(found.state_dimensions, hankel_blocks(planted, rows, columns), strict=True):
        ranks = [int(torch.linalg.matrix_rank(block, rtol=1e-10)) for block in blocks]
        assert list(dimensions) == ranks


@each_shape
@pytest.mark.parametrize("stages", [1, 2, 5, 9])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_a_tolerance_is_kept(shape: tuple[int, int], stages: int, tolerance: float) -> None:
    rows, columns = stages_of(shape, stages)
    matrix = decaying_matrix(*shape)
    realisation = realise(matrix, rows, columns, tolerance=tolerance)
    assert float((matrix - formula(realisation)).norm() / matrix.norm()) <= tolerance


@each_shape
@pytest.mark.parametrize(("stages", "dimension"), [(2, 3), (4, 2), (9, 1)])
def test_the_error_is_bounded_by_the_discarded_hankel_singular_values(
    shape: tuple[int, int], stages: int, dimension: int
) -> None:
    rows, columns = stages_of(shape, stages)
    matrix = decaying_matrix(*shape)
    dimensions = constant(rows, columns, dimension)
    bound = 0.0
    for blocks, kept in zip(hankel_blocks(matrix, rows, columns), dimensions, strict=True):
        for block, size in zip(blocks, kept, strict=True):
            bound += float(torch.linalg.svdvals(block)[size:].square().sum())
    truncated = realise(matrix, rows, columns, state_dimensions=dimensions, sweeps=0)
    error = float((matrix - formula(truncated)).square().sum())
    assert error <= bound * (1 + 1e-12)
    assert math.sqrt(error) == pytest.approx(
        truncation_error(matrix, rows, columns, dimensions) * float(matrix.norm()), rel=1e-9
    )


@each_shape
@pytest.mark.parametrize("stages", [2, 4, 9])
def test_sweeps_never_raise_the_error(shape: tuple[int, int], stages: int) -> None:
    rows, columns = stages_of(shape, stages)
    matrix = decaying_matrix(*shape)
    errors = []
    for sweeps in range(5):
        realisation = realise(
            matrix, rows, columns, state_dimensions=constant(rows, columns, 2), sweeps=sweeps
        )
        errors.append(float((matrix - realisation.dense()).norm()))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    if stages > 2:  # two stages have one Hankel block per direction: its truncation is optimal at once
        assert errors[-1] < errors[0]


@each_shape
def test_two_stages_are_as_good_as_their_two_blocks_allow(shape: tuple[int, int]) -> None:
    rows, columns = stages_of(shape, 2)
    matrix = decaying_matrix(*shape)
    realisation = realise(matrix, rows, columns, state_dimensions=((2,), (1,)))
    below, above = (side[0] for side in hankel_blocks(matrix, rows, columns))
    best = torch.linalg.svdvals(below)[2:].square().sum() + torch.linalg.svdvals(above)[1:].square().sum()
    assert float((matrix - realisation.dense()).square().sum()) == pytest.approx(float(best), rel=1e-10)


@each_shape
@pytest.mark.parametrize(("stages", "dimension"), [(2, 3), (4, 2), (9, 1), (4, 30)])
def test_gramians_hold_the_singular_values_of_the_hankel_blocks(
    shape: tuple[int, int], stages: int, dimension: int
) -> None:
    rows, columns = stages_of(shape, stages)
    matrix = random_matrix(*shape)
    realisation = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, dimension))
    blocks = hankel_blocks(formula(realisation), rows, columns)
    for values, whole in zip(hankel_singular_values(realisation), blocks, strict=True):
        for found, block in zip(values, whole, strict=True):
            expected = torch.linalg.svdvals(block)[: len(found)]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_shape
@pytest.mark.parametrize(("stages", "dimension"), [(3, 2), (5, 4)])
def test_a_realisation_is_balanced_and_stable(shape: tuple[int, int], stages: int, dimension: int) -> None:
    rows, columns = stages_of(shape, stages)
    realisation = realise(
        random_matrix(*shape), rows, columns, state_dimensions=constant(rows, columns, dimension)
    )
    values = hankel_singular_values(realisation)
    for space, sigma in (
        (realisation.causal, values[0]),
        (realisation.anticausal.reversed(), values[1][::-1]),
    ):
        reachability = torch.zeros(0, 0, dtype=torch.float64)
        for k in range(stages - 1):
            reachability = (
                space.transition[k] @ reachability @ space.transition[k].T + space.input[k] @ space.input[k].T
            )
            torch.testing.assert_close(reachability, torch.diag(sigma[k]), rtol=1e-8, atol=1e-9)
            if k:
                assert float(torch.linalg.matrix_norm(space.transition[k], 2)) <= 1 + 1e-12


def test_balancing_keeps_the_matrix_and_can_drop_needless_states() -> None:
    rows, columns = stages_of((30, 20), 5)
    planted = realise(random_matrix(30, 20), rows, columns, state_dimensions=constant(rows, columns, 2))
    wasteful = realise(planted.dense(), rows, columns, state_dimensions=constant(rows, columns, 6), sweeps=0)
    assert max(wasteful.state_dimensions[0]) == 6
    torch.testing.assert_close(balance(wasteful).dense(), planted.dense(), rtol=0, atol=1e-11)
    small = balance(wasteful, minimal=True)
    torch.testing.assert_close(small.dense(), planted.dense(), rtol=0, atol=1e-11)
    assert small.state_dimensions == planted.state_dimensions


@each_shape
def test_reversing_and_scaling_are_what_they_say(shape: tuple[int, int]) -> None:
    rows, columns = stages_of(shape, 4)
    realisation = realise(random_matrix(*shape), rows, columns, state_dimensions=constant(rows, columns, 2))
    dense = realisation.dense()
    torch.testing.assert_close(formula(realisation.reversed()), dense.flip(0, 1))
    heights, widths = random_matrix(1, shape[0])[0], random_matrix(1, shape[1], seed=1)[0]
    scaled = realisation.scale(heights, widths)
    torch.testing.assert_close(formula(scaled), heights[:, None] * dense * widths)


def test_single_precision_uses_gram_matrices_to_its_own_accuracy() -> None:
    rows, columns = stages_of((60, 50), 6)
    matrix = decaying_matrix(60, 50)
    dimensions = constant(rows, columns, 4)
    double = realise(matrix, rows, columns, state_dimensions=dimensions)
    single = realise(matrix.float(), rows, columns, state_dimensions=dimensions)
    assert {block.dtype for block in single.direct} == {torch.float32}
    torch.testing.assert_close(single.dense().double(), double.dense(), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    dimension=st.integers(0, 6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_sizes_give_finite_results_no_worse_than_the_diagonal_blocks_alone(
    height: int, width: int, dimension: int, seed: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, min(height, width)))
    rows, columns = stages_of((height, width), stages)
    matrix = random_matrix(height, width, seed)
    realisation = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, dimension))
    assert realisation.rows == rows
    assert realisation.columns == columns
    assert realisation.state_dimensions == constant(rows, columns, dimension)
    error = float((matrix - formula(realisation)).norm())
    assert error <= float((matrix - torch.block_diag(*realisation.direct)).norm()) * (1 + 1e-12)


@pytest.mark.parametrize(
    "matrix", [torch.zeros(12, 9), torch.ones(12, 9), torch.eye(12)[:, :9]], ids=["0", "1", "I"]
)
def test_degenerate_matrices_are_realised(matrix: Tensor) -> None:
    rows, columns = stages_of((12, 9), 4)
    for kind in ({"state_dimensions": constant(rows, columns, 2)}, {"tolerance": 1e-6}):
        realisation = realise(matrix, rows, columns, **kind)
        torch.testing.assert_close(realisation.dense(), matrix, rtol=0, atol=1e-6)


def test_state_dimensions_or_tolerance_one_of_both() -> None:
    rows, columns = stages_of((6, 6), 2)
    with pytest.raises(ValueError, match="state_dimensions or tolerance must be given, one of both"):
        realise(torch.zeros(6, 6), rows, columns)


# The weighted norm


@each_shape
@pytest.mark.parametrize("with_output", [False, True])
def test_a_weighted_realisation_is_better_than_the_plain_one_and_states_its_error_truly(
    shape: tuple[int, int], with_output: bool
) -> None:
    rows, columns = stages_of(shape, 4)
    matrix = decaying_matrix(*shape)
    metric = random_metric(shape[1], 5)
    output_metric = random_metric(shape[0], 7) if with_output else None
    plain = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, 2))
    weighted = realise_weighted(
        matrix, rows, columns, starts=[plain], input_metric=metric, output_metric=output_metric
    )
    assert weighted.state_dimensions == plain.state_dimensions
    errors = [weighted_error(matrix - formula(each), metric, output_metric) for each in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_the_identity_as_metric_gives_the_plain_norm() -> None:
    rows, columns = stages_of((24, 30), 4)
    matrix = decaying_matrix(24, 30)
    plain = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, 2), sweeps=40)
    again = realise_weighted(matrix, rows, columns, starts=[plain], input_metric=None, output_metric=None)
    assert float((matrix - again.dense()).norm()) == pytest.approx(
        float((matrix - plain.dense()).norm()), rel=1e-3
    )


def test_more_passes_never_raise_the_weighted_error() -> None:
    rows, columns = stages_of((24, 30), 5)
    matrix, metric = decaying_matrix(24, 30), random_metric(30, 5)
    plain = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, 2))
    errors = [weighted_error(matrix - plain.dense(), metric)]
    for passes in (2, 4, 8, 16, 32):
        realisation = realise_weighted(
            matrix,
            rows,
            columns,
            starts=[plain],
            input_metric=metric,
            output_metric=None,
            passes=passes,
            least_gain=0.0,
        )
        errors.append(weighted_error(matrix - realisation.dense(), metric))
    assert all(after <= before * (1 + 1e-10) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("with_output", [False, True])
def test_a_converged_weighted_realisation_is_stationary(with_output: bool) -> None:
    """At the end of the descent the gradient vanishes with respect to every stage matrix, by autograd."""
    rows, columns = stages_of((10, 12), 3)
    matrix, metric = decaying_matrix(10, 12), random_metric(12, 5)
    output_metric = random_metric(10, 7) if with_output else None
    plain = realise(matrix, rows, columns, state_dimensions=constant(rows, columns, 2))
    found = realise_weighted(
        matrix,
        rows,
        columns,
        starts=[plain],
        input_metric=metric,
        output_metric=output_metric,
        passes=2000,
        least_gain=1e-12,
    )

    def gradient_size(realisation: Realisation) -> float:
        blocks = [*realisation.direct]
        for space in (realisation.causal, realisation.anticausal):
            blocks += [block for role in space for block in role if block.numel()]
        for block in blocks:
            block.requires_grad_()
        error = matrix - formula(realisation)
        weighed = error @ metric if output_metric is None else output_metric @ error @ metric
        gradients = torch.autograd.grad((error * weighed).sum(), blocks)
        return max(float(gradient.abs().max()) for gradient in gradients)

    assert gradient_size(found) < 1e-3 * gradient_size(plain)


def test_exactly_representable_matrices_are_kept_under_a_singular_metric() -> None:
    rows, columns = stages_of((24, 30), 4)
    planted = realise(random_matrix(24, 30), rows, columns, state_dimensions=constant(rows, columns, 2))
    x = random_matrix(5, 30, seed=3)
    found = realise_weighted(
        planted.dense(), rows, columns, starts=[planted], input_metric=x.T @ x, output_metric=None
    )
    error = planted.dense() - found.dense()
    assert torch.isfinite(error).all()
    assert weighted_error(error, x.T @ x) <= 1e-12 * weighted_error(planted.dense(), x.T @ x)
