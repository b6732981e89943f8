"""One-dimensional k-means against brute force, and the closed forms against searches."""

import itertools

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from weft.numerics.kmeans import binary_scale, codebooks, nearest_level, ternary_scale


def cost(points: Tensor, levels: Tensor, weights: Tensor | None = None) -> float:
    error = (points[:, None] - levels).square().amin(1)
    return float((error if weights is None else weights * error).sum())


def brute_force(points: Tensor, count: int, weights: Tensor) -> float:
    """The least cost over all ways to cut the sorted points into runs."""
    order = torch.argsort(points)
    points, weights = points[order], weights[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(points)), count - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(points))):
            own, mass = points[start:stop], weights[start:stop]
            centre = (own * mass).sum() / mass.sum()
            total += float((mass * (own - centre).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_short_rows_get_the_optimum(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    points = torch.randn(6, 11, dtype=torch.float64, generator=generator) + 100
    weights = torch.rand(6, 11, dtype=torch.float64, generator=generator) + 0.01
    found = codebooks(points, count, weights)
    assert found.shape == (6, count)
    assert bool((found.diff(dim=1) >= 0).all())
    for row, levels, mass in zip(points, found, weights, strict=True):
        assert cost(row, levels, mass) == pytest.approx(brute_force(row, count, mass), rel=1e-9)


@pytest.mark.parametrize("count", [4, 16])
def test_long_rows_are_no_worse_than_scikit_learns_best_of_ten(count: int) -> None:
    points = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    found = cost(points, codebooks(points[None], count)[0])
    theirs = KMeans(count, n_init=10, random_state=0).fit(points[:, None].numpy()).inertia_
    assert found <= 1.002 * theirs


def test_fewer_distinct_points_than_levels_cost_nothing() -> None:
    points = torch.tensor([[1.0, 1.0, 2.0, 2.0, 2.0, 5.0]])
    for count in (3, 4, 9):
        assert cost(points[0], codebooks(points, count)[0]) == pytest.approx(0, abs=1e-12)


def test_points_without_weight_do_not_count() -> None:
    points, weights = torch.tensor([[0.0, 1.0, 50.0, 51.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(codebooks(points, 2, weights)[0], torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)


def test_nearest_level_is_nearest_with_one_codebook_and_with_many() -> None:
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for rows in (1, 5):
        levels = torch.randn(rows, 6, generator=torch.Generator().manual_seed(2)).sort(1).values
        expected = (values[..., None] - levels[:, None]).abs().argmin(2)
        assert torch.equal(nearest_level(values, levels), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("solve", "signs"), [(binary_scale, (-1, 1)), (ternary_scale, (-1, 0, 1))])
def test_closed_forms_are_the_best_scales(solve: object, signs: tuple[int, ...], weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(4, 30, dtype=torch.float64, generator=generator)
    weights = torch.rand(4, 30, dtype=torch.float64, generator=generator) if weighted else None
    found = solve(points, weights)  # type: ignore[operator]
    for index, row in enumerate(points):
        mass = None if weights is None else weights[index]
        levels = torch.tensor(signs, dtype=torch.float64)
        grid = torch.linspace(0, 3, 3001, dtype=torch.float64)
        best = min(cost(row, scale * levels, mass) for scale in grid)
        assert cost(row, found[index] * levels, mass) <= best + 1e-9
