"""Interpolative low rank: the matrices of low rank in r² numbers less, whichever way they are applied."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.numerics.gram import DenseGram
from weft.structures.base import Geometry, relative_error
from weft.structures.interpolative import Interpolative
from weft.structures.low_rank import LowRank


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.booleans(), st.integers(0, 20))
def test_it_is_the_low_rank_fit_in_fewer_numbers(rows, columns, rank, weighted, seed):
    rank = min(rank, rows, columns)
    weight = drawn(rows, columns, seed=seed)
    x = drawn(50, columns, seed=seed + 1)
    gram = DenseGram(x.T @ x / 50, 0.0) if weighted else None
    member = Interpolative(rank).fit(weight, input_gram=gram)
    other = LowRank(rank).fit(weight, input_gram=gram)
    torch.testing.assert_close(member.to_dense(), other.to_dense(), rtol=0, atol=1e-8)
    assert member.parameter_count() == other.parameter_count() - rank**2
    assert member.parameter_count() == rank * (rows + columns - rank)


def test_its_rows_are_the_matrixs_own_and_no_combination_is_large():
    weight = drawn(90, 60, dtype=torch.float32) * torch.logspace(0, -3, 60)
    member = Interpolative(20).fit(weight)
    marked = [bool(member.chosen[row // 8] >> (row % 8) & 1) for row in range(90)]
    own = member.to_dense()[torch.tensor(marked)]
    assert torch.equal(own, member.skeleton.mT)
    assert float(member.combinations.detach().abs().max()) <= 2.0 + 1e-6
    # float32 loses nothing more than for two factors.
    exact = LowRank(20).fit(weight.double())
    assert relative_error(exact.to_dense().float(), member) < 1e-6


def test_at_the_same_bytes_it_has_the_larger_rank_and_the_smaller_error():
    weight = drawn(96, 96, seed=4, dtype=torch.float32)
    budget = weight.nbytes // 2
    fits = []
    for family in (LowRank, Interpolative):
        points = [point for point in family.error_curve(weight) if point.cost.bytes <= budget]
        best = min(points, key=lambda point: point.error)
        fits.append((best.structure.rank, best.error))
    (plain_rank, plain_error), (rank, error) = fits
    assert plain_rank == 24
    assert rank >= 28
    assert error < plain_error


@pytest.mark.parametrize("batch", [1, 3, 40, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_the_native_product_is_that_of_the_composition(batch, bias):
    member = Interpolative(37).fit(drawn(150, 70, dtype=torch.float32))
    x, b = drawn(batch, 70, dtype=torch.float32), drawn(150, dtype=torch.float32) if bias else None
    with torch.no_grad():
        y = member.affine(x, b)
    expected = x.double() @ member.to_dense().detach().double().T + (0 if b is None else b.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(member._composed(x, b).detach(), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_as_a_convolution_it_is_its_dense_kernel(groups):
    kernel = drawn(12, 8 // groups, 3, 3, seed=2)
    member = Interpolative(5).fit(kernel)
    geometry = Geometry((2, 1), ((1, 1), (0, 0)), (1, 1), groups, "zeros", (9, 8))
    x, bias = drawn(2, 8, 9, 8, seed=3), drawn(12, seed=4)
    expected = torch.nn.functional.conv2d(x, member.to_dense(), bias, (2, 1), (1, 0), 1, groups)
    torch.testing.assert_close(member.convolve(x, geometry, bias), expected)
    structure = Interpolative(5)
    assert structure.multiply_adds(tuple(kernel.shape), geometry) == member.multiply_adds(geometry)
    if groups == 1:
        saved = LowRank(5).multiply_adds(tuple(kernel.shape), geometry) - member.multiply_adds(geometry)
        assert saved == 25 * geometry.output_positions((3, 3))


def test_a_file_whose_mask_marks_other_rows_than_the_rank_says_is_refused():
    member = Interpolative(3).fit(drawn(10, 6))
    tensors = member.stored()
    tensors["chosen"] = torch.tensor([255, 0], dtype=torch.uint8)
    with pytest.raises(ValueError, match="chosen must be 3 rows marked, got 8"):
        Interpolative(3).from_tensors((10, 6), tensors)
