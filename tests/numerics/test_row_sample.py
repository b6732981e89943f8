"""Rows drawn in proportion to size: unbiased, exact where a few rows are all that counts."""

import pytest
import torch

from weft.numerics.row_sample import sample_rows


def test_few_rows_are_all_taken() -> None:
    rows, factors = sample_rows(torch.tensor([0.0, 3.0, 1.0]), 3)
    assert rows.tolist() == [0, 1, 2]
    assert factors.tolist() == [1.0, 1.0, 1.0]


def test_sums_are_estimated_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(300, generator=generator, dtype=torch.float64) ** 4
    values = sizes * (0.5 + torch.rand(300, generator=generator, dtype=torch.float64))
    estimates = []
    for _ in range(2000):
        rows, factors = sample_rows(sizes, 20, generator=generator)
        assert len(rows) <= 20
        assert bool((rows.diff() > 0).all())
        estimates.append(float(factors @ values[rows]))
    found = torch.tensor(estimates, dtype=torch.float64)
    standard_error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean() - values.sum())) < 4 * standard_error
    assert standard_error < 0.01 * float(values.sum())


@pytest.mark.parametrize("seed", range(5))
def test_what_goes_with_the_size_is_exact(seed: int) -> None:
    sizes = torch.arange(1.0, 101.0) ** 2
    rows, factors = sample_rows(sizes, 15, generator=torch.Generator().manual_seed(seed))
    assert float(factors @ sizes[rows].double()) == pytest.approx(float(sizes.sum()), rel=1e-9)


def test_rows_that_make_up_most_are_certain() -> None:
    sizes = torch.full((1000,), 1e-3)
    sizes[[7, 500]] = 100.0
    rows, factors = sample_rows(sizes, 10)
    chosen = dict(zip(rows.tolist(), factors.tolist(), strict=True))
    assert chosen[7] == chosen[500] == 1.0
    assert len(rows) == 10


def test_rows_without_size_are_left_out() -> None:
    sizes = torch.zeros(50)
    sizes[:3] = 1.0
    rows, _ = sample_rows(sizes, 5)
    assert rows.tolist() == [0, 1, 2]
