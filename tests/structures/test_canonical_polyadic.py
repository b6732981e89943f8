"""Canonical polyadic kernels: planted terms, flattened convolutions, the metric, the steps that run."""

import pytest
import torch
import torch.nn.functional as F
from tests.test_structure_contract import dense_convolution, random_gram, random_weight

from weft.structures.base import Geometry, relative_error
from weft.structures.canonical_polyadic import CanonicalPolyadic
from weft.structures.low_rank import LowRank

SHAPE = (12, 10, 3, 3)


@pytest.mark.parametrize("shape", [(12, 10, 3), (12, 10, 3, 5), (6, 5, 3, 2, 3), (12, 10, 1, 5)], ids=str)
def test_few_planted_terms_are_found_again(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    planted = CanonicalPolyadic(3).initialise(shape, dtype=torch.float64, generator=generator)
    dense = planted.to_dense().detach()
    assert relative_error(dense, CanonicalPolyadic(3).fit(dense).to_dense()) < 0.02


def test_a_flattened_convolution_is_a_stack_of_rank_one_filters() -> None:
    """Jin et al. 2014: c×1×1, then 1×y×1, then 1×1×x, every filter on its own."""
    generator = torch.Generator().manual_seed(0)
    along, down, across = (
        torch.randn(8, size, dtype=torch.float64, generator=generator) for size in (5, 3, 3)
    )
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64, generator=generator)
    flattened = F.conv2d(x, along.reshape(8, 5, 1, 1))
    flattened = F.conv2d(flattened, down.reshape(8, 1, 3, 1), groups=8)
    flattened = F.conv2d(flattened, across.reshape(8, 1, 1, 3), groups=8)
    tensors = {"left": torch.eye(8, dtype=torch.float64), "right": along, "axis_0": down, "axis_1": across}
    member = CanonicalPolyadic(8).from_tensors((8, 5, 3, 3), tensors)
    geometry = Geometry((1, 1), ((0, 0), (0, 0)), (1, 1))
    torch.testing.assert_close(member.convolve(x, geometry), flattened)
    # A stack of rank-one filters is such a member, and its fit finds it nearly.
    kernel = torch.einsum("fc,fi,fj->fcij", along, down, across)
    torch.testing.assert_close(member.to_dense(), kernel)
    assert relative_error(kernel, CanonicalPolyadic(8).fit(kernel).to_dense()) < 0.15


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1, 1)], ids=str)
def test_without_long_axes_it_is_low_rank(shape: tuple[int, ...]) -> None:
    weight, grams = random_weight(shape, torch.float64), {"input_gram": random_gram(10)}
    member = CanonicalPolyadic(4).fit(weight, **grams)
    torch.testing.assert_close(member.to_dense(), LowRank(4).fit(weight, **grams).to_dense())


@pytest.mark.parametrize("rank", [3, 10, 25])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_weighted_fit_gains_over_the_plain_one(rank: int, with_output: bool) -> None:
    weight = random_weight(SHAPE, torch.float64)
    grams = {"input_gram": random_gram(90)}
    grams |= {"output_gram": random_gram(12, seed=2)} if with_output else {}
    weighted = relative_error(weight, CanonicalPolyadic(rank).fit(weight, **grams).to_dense(), **grams)
    assert weighted < 0.98 * relative_error(weight, CanonicalPolyadic(rank).fit(weight).to_dense(), **grams)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_curve_started_rank_by_rank_is_near_what_fits_give(weighted: bool) -> None:
    weight = random_weight((16, 12, 3, 3))
    grams = {"input_gram": random_gram(108)} if weighted else {}
    curve = CanonicalPolyadic.error_curve(weight, **grams)
    errors = [point.error for point in curve]
    assert all(after <= before * 1.01 for before, after in zip(errors, errors[1:], strict=False))
    for point in curve[:: len(curve) // 4]:
        member = point.structure.fit(weight, **grams)
        assert member.cost() == point.cost
        error = relative_error(weight, member.to_dense(), **grams)
        assert 0.9 * point.error <= error <= 1.05 * point.error


def test_the_factors_of_a_term_carry_the_same_weight() -> None:
    member = CanonicalPolyadic(4).fit(random_weight(SHAPE))
    norms = [member.left.norm(dim=0)] + [
        getattr(member, name).norm(dim=1) for name in ("right", "axis_0", "axis_1")
    ]
    for norm in norms[1:]:
        torch.testing.assert_close(norm, norms[0], rtol=1e-4, atol=1e-6)


def test_small_axes_run_as_one_depthwise_step_and_large_ones_one_by_one() -> None:
    geometry = Geometry((1, 3), ((1, 1), (1, 1)), (1, 1), input_size=(8, 9))
    # 1×1 on 8 × 9, depthwise 3×3 to 8 × 3, 1×1 on 8 × 3
    assert CanonicalPolyadic(5).multiply_adds(SHAPE, geometry) == 5 * (10 * 72 + 9 * 24 + 12 * 24)
    wide = Geometry((1, 3), ((2, 2), (2, 2)), (1, 1), input_size=(8, 9))
    # along the second axis to 8 × 3 first, because that shrinks the image, then along the first
    expected = 5 * (10 * 72 + 5 * 24 + 5 * 24 + 12 * 24)
    assert CanonicalPolyadic(5).multiply_adds((12, 10, 5, 5), wide) == expected
    grown = Geometry((2, 1), ((0, 0), (0, 0)), (1, 1), input_size=(4, 4), transposed=True)
    # along the second axis to 4 × 8 first, then along the first to 11 × 8; steps count at their inputs
    expected = 5 * (10 * 16 + 5 * 16 + 5 * 32 + 12 * 88)
    assert CanonicalPolyadic(5).multiply_adds((12, 10, 5, 5), grown) == expected


@pytest.mark.parametrize("transposed", [False, True])
def test_large_axes_equal_the_dense_convolution(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    member = CanonicalPolyadic(4).initialise((6, 4, 5, 5), dtype=torch.float64, generator=generator)
    geometry = Geometry((2, 1), ((1, 1), (2, 2)), (1, 1), transposed=transposed)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64, generator=generator)
    expected = dense_convolution(x, member.to_dense(), None, geometry)
    torch.testing.assert_close(member.convolve(x, geometry), expected)


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rank must be between 1 and 90 for a \(12, 10, 3, 3\) weight, got 91"
    ):
        CanonicalPolyadic(91).fit(torch.zeros(SHAPE))
    with pytest.raises(TypeError, match="rank must be a whole number"):
        CanonicalPolyadic(2.0)  # type: ignore[arg-type]
    assert not CanonicalPolyadic(5).fit(torch.zeros(SHAPE)).to_dense().any()
