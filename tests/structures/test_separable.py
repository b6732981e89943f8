"""Separable: Eckart-Young on the unfolding, the metric, counts of the strided chain."""

import math

import numpy as np
import pytest
import torch
from tests.test_structure_contract import random_gram, random_weight

from weft.structures.base import Geometry, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.separable import Separable

SHAPE = (12, 10, 3, 5)


def test_the_plain_fit_is_the_truncated_svd_of_the_unfolding() -> None:
    weight = random_weight(SHAPE, torch.float64)
    unfolded = weight.permute(0, 3, 1, 2).reshape(60, 30).numpy()
    left, values, right = np.linalg.svd(unfolded, full_matrices=False)
    for rank in (1, 7, 30):
        best = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
        expected = best.reshape(12, 5, 10, 3).permute(0, 2, 3, 1)
        torch.testing.assert_close(Separable(rank).fit(weight).to_dense().detach(), expected)
    curve = Separable.error_curve(weight)
    for rank, point in enumerate(curve, start=1):
        assert point.structure == Separable(rank)
        expected = math.sqrt(float((values[rank:] ** 2).sum() / (values**2).sum()))
        assert point.error == pytest.approx(expected, rel=1e-9)


def test_a_kernel_with_one_long_axis_is_low_rank() -> None:
    for shape, turned in (((8, 6, 5, 1), False), ((8, 6, 5), False), ((8, 6), False), ((8, 6, 1, 5), True)):
        weight = random_weight(shape, torch.float64)
        member = Separable(3).fit(weight).to_dense()
        if turned:
            other = LowRank(3).fit(weight.transpose(0, 1).contiguous()).to_dense().transpose(0, 1)
        else:
            other = LowRank(3).fit(weight).to_dense()
        torch.testing.assert_close(member, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [2, 6, 15])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_weighted_fit_gains_over_the_plain_one(rank: int, with_output: bool) -> None:
    weight = random_weight(SHAPE, torch.float64)
    grams = {"input_gram": random_gram(150)}
    grams |= {"output_gram": random_gram(12, seed=2)} if with_output else {}
    weighted = relative_error(weight, Separable(rank).fit(weight, **grams).to_dense(), **grams)
    assert weighted < 0.99 * relative_error(weight, Separable(rank).fit(weight).to_dense(), **grams)


def test_the_weighted_curve_is_what_fits_give() -> None:
    weight = random_weight((16, 12, 3, 3))
    grams = {"input_gram": random_gram(108)}
    curve = Separable.error_curve(weight, **grams)
    for point in curve[:: len(curve) // 4]:
        error = relative_error(weight, point.structure.fit(weight, **grams).to_dense(), **grams)
        assert 0.97 * point.error <= error <= point.error * (1 + 1e-6)


def test_the_first_step_takes_its_axis_stride() -> None:
    geometry = Geometry((2, 3), ((1, 1), (2, 2)), (1, 1), input_size=(8, 9))
    # 8 × 9 -> 4 × 9 -> 4 × 3
    assert Separable(7).multiply_adds(SHAPE, geometry) == 7 * (10 * 3 * 4 * 9 + 12 * 5 * 4 * 3)
    with pytest.raises(
        ValueError, match=r"rank must be between 1 and 30 for a \(12, 10, 3, 5\) weight, got 31"
    ):
        Separable(31).fit(torch.zeros(SHAPE))
