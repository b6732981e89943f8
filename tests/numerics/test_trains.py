"""Tensor trains as tensors: sizes, decomposition, improvement, and the order of contraction."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.tensor_train import (
    WRITING,
    Extent,
    Modes,
    alternate,
    balanced_factors,
    balanced_modes,
    bond_limits,
    bonds,
    contract,
    core_shapes,
    merged,
    schedule,
    skewed_modes,
    to_train_order,
    train_svd,
    truncation_errors,
)

MODES: Modes = ((3, 2), (2, 4), (2, 3))


def matrix(modes: Modes = MODES, seed: int = 0) -> Tensor:
    rows, columns = (math.prod(side) for side in zip(*modes, strict=True))
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator)).Q
    width = min(rows, columns)
    return left[:, :width] * torch.arange(1, width + 1) ** -0.75 @ right[:width]


def random_cores(modes: Modes, rank: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in core_shapes(modes, rank)
    ]


# ------------------------------------------------------------------------------------------------------------
# Sizes


@given(st.integers(1, 5000), st.integers(1, 6))
def test_balanced_factors_are_balanced_and_pad_little(size: int, count: int) -> None:
    factors = balanced_factors(size, count)
    product = math.prod(factors)
    assert len(factors) == count
    assert factors == tuple(sorted(factors, reverse=True))
    assert factors[0] <= 4 * factors[-1]
    # No smaller size from the given one on has balanced factors: an exhaustive search over them all.
    if product > size and count == 2:
        for smaller in range(size, product):
            assert not any(
                smaller % first == 0 and max(first, smaller // first) <= 4 * min(first, smaller // first)
                for first in range(1, smaller + 1)
            )


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 6))
def test_modes_hold_the_matrix(outputs: int, inputs: int, cores: int) -> None:
    for choose in (balanced_modes, skewed_modes):
        modes = choose(outputs, inputs, cores)
        assert len(modes) == cores
        assert math.prod(rows for rows, _ in modes) >= outputs
        assert math.prod(columns for _, columns in modes) >= inputs


def test_sizes_that_have_factors_are_not_padded() -> None:
    for outputs, inputs in ((1024, 1024), (512, 256), (1000, 1280), (64, 64)):
        for choose in (balanced_modes, skewed_modes):
            rows, columns = (math.prod(side) for side in zip(*choose(outputs, inputs, 4), strict=True))
            assert (rows, columns) == (outputs, inputs)


# ------------------------------------------------------------------------------------------------------------
# Decomposition


def test_entries_are_products_of_slices() -> None:
    cores = random_cores(MODES, 3)
    whole = contract(cores)
    for row in itertools.product(*(range(rows) for rows, _ in MODES)):
        for column in itertools.product(*(range(columns) for _, columns in MODES)):
            entry = torch.linalg.multi_dot([
                core[:, i, j] for core, i, j in zip(cores, row, column, strict=True)
            ])
            flat_row = (row[0] * 2 + row[1]) * 2 + row[2]
            flat_column = (column[0] * 4 + column[1]) * 3 + column[2]
            torch.testing.assert_close(whole[flat_row, flat_column], entry.squeeze())


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_a_train_of_full_rank_is_exact(method: str) -> None:
    target = matrix()
    cores = train_svd(target, MODES, max(bond_limits(MODES)), method=method)
    assert [tuple(core.shape) for core in cores] == core_shapes(MODES, 1000)
    torch.testing.assert_close(contract(cores), target)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_error_is_what_the_truncations_left_out_and_quasi_optimal(rank: int) -> None:
    target = matrix()
    error = float((target - contract(train_svd(target, MODES, rank))).square().sum())
    assert truncation_errors(target, MODES, [1, rank, 4])[1] == pytest.approx(error, rel=1e-9)
    # Theorem 2.2 of Oseledets 2011: at most the sum of the unfoldings' own least errors.
    tensor, ranks, bound, least = to_train_order(target, MODES), bonds(MODES, rank), 0.0, 0.0
    for k in range(1, len(MODES)):
        values = torch.linalg.svdvals(tensor.flatten(0, k - 1).flatten(1)).square()
        bound += float(values[ranks[k] :].sum())
        least = max(least, float(values[ranks[k] :].sum()))
    assert least - 1e-12 <= error <= bound + 1e-12


def test_a_zero_matrix_has_a_train() -> None:
    target = torch.zeros_like(matrix())
    assert torch.equal(contract(train_svd(target, MODES, 2)), target)
    assert truncation_errors(target, MODES, [1, 2]) == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------
# Improvement


def weighted(error: Tensor, metric: Tensor) -> float:
    return float((error @ metric * error).sum())


def spd(size: int, seed: int) -> Tensor:
    x = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / (2 * size) + 0.05 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_sweep_improves_the_weighted_error(rank: int) -> None:
    target, gram = matrix(), spd(24, 2)
    cores = train_svd(target, MODES, rank)
    errors = [weighted(target - contract(cores), gram)]
    for sweeps in (1, 2, 4, 8):
        better = alternate(target, cores, lambda e: e @ gram, sweeps=sweeps, tolerance=0.0)
        assert [core.shape for core in better] == [core.shape for core in cores]
        errors.append(weighted(target - contract(better), gram))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_improvement_reaches_the_optimum_where_it_is_known() -> None:
    # Two cores and a Gram that is a Kronecker product: whitened, the problem is one truncated SVD.
    modes: Modes = ((4, 3), (3, 5))
    target, parts = matrix(modes), (spd(3, 3), spd(5, 4))
    gram = torch.kron(*parts)
    roots = [torch.linalg.cholesky(part) for part in parts]
    values = torch.linalg.svdvals(to_train_order(target @ torch.kron(*roots), modes)).square()
    best = float(values[3:].sum())
    better = alternate(
        target, random_cores(modes, 3), lambda e: e @ gram, sweeps=60, iterations=10, tolerance=0.0
    )
    assert weighted(target - contract(better), gram) == pytest.approx(best, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The order of contraction


def brute_force(modes: Modes, ranks: tuple[int, ...], extent: Extent) -> int:
    """The least cost over all ways to cut the cores into runs and to take them one beside the other."""
    count, spatial = len(modes), len(modes) - 1 if extent.taps else -1
    least = None
    for cuts in itertools.product([False, True], repeat=count - 1):
        ends = [k + 1 for k, cut in enumerate(cuts) if cut]
        runs = list(zip([0, *ends], [*ends, count], strict=True))
        if len(runs) == 1 and count > 1:
            continue
        for order in itertools.permutations(runs):
            done: set[int] = set()
            cost = 0
            for first, last in order:
                if done and first - 1 not in done and last not in done:
                    break  # no neighbour

                def axes(done: set[int]) -> dict[tuple[str, int], int]:
                    found = {("n", k): modes[k][1] for k in range(count) if k not in done and k != spatial}
                    found |= {("m", k): modes[k][0] for k in done}
                    found |= {("r", k): ranks[k] for k in range(count + 1) if (k in done) != (k - 1 in done)}
                    return found

                new = done | set(range(first, last))
                before, after = axes(done), axes(new)
                inside = first <= spatial < last
                products = math.prod((before | after).values()) * (extent.taps if inside else 1)
                here = extent.after if spatial in new else extent.before
                products *= extent.applications if inside else here
                written = math.prod(before.values()) * (extent.after if spatial in done else extent.before)
                written += math.prod(after.values()) * here
                cost += products + WRITING * written
                done = new
            else:
                least = cost if least is None else min(least, cost)
    assert least is not None
    return least


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from([
        Extent(),
        Extent(4, 1, 1, 9),
        Extent(1, 1, 4, 9),
        Extent(1, 1, 1, 3),
        Extent(6, 1, 1, 1),
    ]),
)
@settings(deadline=None, max_examples=60)
def test_the_schedule_is_the_cheapest(modes: list[tuple[int, int]], rank: int, extent: Extent) -> None:
    if extent.taps:
        modes = [*modes, (1, extent.taps)]
    chosen = tuple(modes)
    found = schedule(chosen, bonds(chosen, rank), extent)
    assert found.cost == brute_force(chosen, bonds(chosen, rank), extent)
    assert found.multiply_adds(extent) < found.cost


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=5),
    st.integers(1, 6),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_merged_cores_in_the_schedules_order_are_the_matrix(
    modes: list[tuple[int, int]], rank: int, seed: int
) -> None:
    chosen = tuple(modes)
    cores = random_cores(chosen, rank, seed)
    plan = schedule(chosen, bonds(chosen, rank), Extent())
    x = torch.randn(3, math.prod(columns for _, columns in modes), dtype=torch.float64)
    hidden, products = x.reshape(3, *(columns for _, columns in modes)), 0
    for step in plan.steps:
        operator = merged(cores, step)
        rows = hidden.permute(step.order).reshape(-1, step.contracted)
        hidden = (rows @ operator.T).reshape(3, *step.kept, *step.made)
        products += len(rows) * operator.numel()
    torch.testing.assert_close(hidden.permute(plan.order).flatten(1), x @ contract(cores).T)
    assert products == 3 * plan.multiply_adds(Extent())


def test_skewed_modes_keep_the_hidden_representation_small() -> None:
    skewed, balanced = skewed_modes(1024, 1024, 4), balanced_modes(1024, 1024, 4)
    plans = [schedule(modes, bonds(modes, 50), Extent()) for modes in (skewed, balanced)]
    assert sum(map(math.prod, core_shapes(skewed, 50))) == sum(map(math.prod, core_shapes(balanced, 50)))
    assert 4 * plans[0].multiply_adds(Extent()) == plans[1].multiply_adds(Extent())
    assert plans[0].peak(Extent()) < 3 * 1024  # input, its copy and 800 hidden numbers
    assert plans[1].peak(Extent()) > 20 * 1024
