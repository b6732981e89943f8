"""Rows of large volume: against determinants, the bound, and matrices made to mislead."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.numerics.maxvol import rows_of_large_volume


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30), st.floats(1.05, 4.0))
def test_the_rows_give_back_the_matrix_by_combinations_within_the_bound(rows, rank, seed, bound):
    rank = min(rank, rows)
    left = drawn(rows, rank, seed=seed)
    chosen, table = rows_of_large_volume(left, bound=bound)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == rank
    torch.testing.assert_close(table @ left[chosen], left, rtol=0, atol=1e-9 * float(left.abs().max()))
    assert float(table.abs().max()) <= max(1.0, bound) + 1e-9
    assert torch.equal(table[chosen], torch.eye(rank, dtype=torch.float64))


def test_elimination_alone_would_pass_the_bound_where_exchanges_do_not():
    # Kahan-like: elimination with partial pivoting takes the first rows, and their inverse grows like 2^k.
    size = 24
    square = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    left = torch.cat([square, torch.ones(1, size, dtype=torch.float64)])
    first = torch.linalg.solve(square.mT, left.mT).mT
    assert float(first.abs().max()) > 1e5
    chosen, table = rows_of_large_volume(left)
    assert float(table.abs().max()) <= 2.0
    torch.testing.assert_close(table @ left[chosen], left, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_exchange_enlarges_the_volume_by_more_than_the_bound(seed):
    left = drawn(9, 3, seed=seed)
    chosen, _ = rows_of_large_volume(left, bound=1.01)

    def volume(rows):
        return abs(np.linalg.det(left[list(rows)].numpy()))

    mine = volume(chosen.tolist())
    for place, row in itertools.product(range(3), range(9)):
        exchanged = chosen.tolist()
        exchanged[place] = row
        assert volume(exchanged) <= 1.01 * mine + 1e-12
    # What follows for the largest of all (Goreinov et al. 2010, theorem 5): within a factor of r^(r/2).
    largest = max(volume(rows) for rows in itertools.combinations(range(9), 3))
    assert mine >= largest / (3**1.5 * 1.01**3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_depend_on_each_other_are_expressed_all_the_same(dtype):
    left = drawn(20, 3, seed=1, dtype=dtype) @ drawn(3, 6, seed=2, dtype=dtype)
    chosen, table = rows_of_large_volume(left)
    assert len(set(chosen.tolist())) == 6
    torch.testing.assert_close(
        table @ left[chosen].double(), left.double(), rtol=0, atol=20 * torch.finfo(dtype).eps * 30
    )


def test_a_matrix_of_zeros_and_a_single_row():
    chosen, table = rows_of_large_volume(torch.zeros(5, 2))
    assert torch.equal(table @ torch.zeros(2, 2, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64))
    assert len(chosen) == 2
    chosen, table = rows_of_large_volume(torch.tensor([[-3.0]]))
    assert chosen.tolist() == [0]
    assert table.tolist() == [[1.0]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="left must be at least as many rows as columns"):
        rows_of_large_volume(torch.ones(2, 3))
    with pytest.raises(ValueError, match="bound must be above 1"):
        rows_of_large_volume(torch.ones(3, 2), bound=1.0)
