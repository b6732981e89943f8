"""Pruning's algorithms against direct solutions by another route."""

import math

import pytest
import torch
from tests.test_structure_contract import random_gram, random_weight
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DiagonalGram
from weft.numerics.pruning import (
    Among,
    Grid,
    Objective,
    l0_constraint,
    l0_penalty,
    l1_constraint,
    l1_penalty,
    prune,
    reconstruct,
    search,
    select,
)


def weight(rows: int = 12, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def support(shape: tuple[int, int], density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density


def test_reconstruction_is_least_squares_in_every_row() -> None:
    w, gram = weight(), random_gram(20)
    mask = support((12, 20))
    mask[3] = False  # a row that keeps nothing
    got = reconstruct(Objective(w, gram, None), mask)
    metric = gram.dense()
    for row, kept, values in zip(w, mask, got, strict=True):
        expected = torch.zeros(20, dtype=torch.float64)
        expected[kept] = torch.linalg.solve(metric[kept][:, kept], (metric @ row)[kept])
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


def test_reconstruction_with_an_output_gram_solves_the_coupled_system() -> None:
    w, inputs, outputs = weight(6, 9), random_gram(9), random_gram(6, seed=5)
    mask = support((6, 9), 0.4)
    got = reconstruct(Objective(w, inputs, outputs), mask)
    kept = mask.flatten()
    metric = torch.kron(outputs.dense(), inputs.dense())
    expected = torch.zeros(54, dtype=torch.float64)
    expected[kept] = torch.linalg.solve(metric[kept][:, kept], (metric @ w.flatten())[kept])
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-8, atol=1e-8)


def test_reconstruction_with_a_metric_for_every_group_of_rows() -> None:
    w = weight(8, 9)
    gram = BlockDiagonalGram(torch.stack([random_gram(9, seed=seed).moment for seed in (1, 2)]))
    mask = support((8, 9))
    got = reconstruct(Objective(w, gram, None), mask)
    for group, rows in enumerate((slice(0, 4), slice(4, 8))):
        metric = gram.moment[group] + gram.ridge * torch.eye(9, dtype=torch.float64)
        for row, kept, values in zip(w[rows], mask[rows], got[rows], strict=True):
            if kept.any():
                own = torch.linalg.solve(metric[kept][:, kept], (metric @ row)[kept])
                torch.testing.assert_close(values[kept], own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("both", [False, True])
def test_the_penalised_step_is_a_stationary_point(both: bool) -> None:
    w, y = weight(), weight() * 0.3
    objective = Objective(w, random_gram(20), random_gram(12, seed=3) if both else None)
    x = objective.nearest(y, 0.7)
    gradient = objective.apply(x - w) + 0.7 * (x - y)
    assert float(gradient.abs().max()) < 1e-10


def test_search_is_far_better_than_the_largest_entries() -> None:
    w = random_weight((64, 80), torch.float64)
    objective = Objective(w, random_gram(80), None)
    errors = {}
    for score in ("magnitude", "input", "search"):
        _, values = prune(objective, score, Grid(1, 1), 512)
        errors[score] = math.sqrt(objective.error(values))
        assert int((values != 0).sum()) <= 512
    assert errors["search"] < 0.9 * min(errors["magnitude"], errors["input"])


def test_without_coupling_the_search_is_the_optimum() -> None:
    w = weight()
    gram = DiagonalGram(torch.linspace(0.1, 4, 20))
    mask = search(Objective(w, gram, None), Grid(1, 1), 50)
    energy = w.square() * gram.diagonal()
    assert float(energy[mask].min()) >= float(energy[~mask].max())


@pytest.mark.parametrize("pattern", [Grid(1, 1), Grid(3, 4), Grid(12, 1), Grid(1, 20), Among(2, 4)], ids=str)
@pytest.mark.parametrize("score", ["magnitude", "input", "search"])
def test_patterns_keep_as_many_as_asked(pattern: Grid | Among, score: str) -> None:
    objective = Objective(weight(), random_gram(20), None)
    mask, values = prune(objective, score, pattern, 5)
    spread = pattern.spread(mask)
    assert spread.shape == (12, 20)
    assert bool((values[~spread] == 0).all())
    if isinstance(pattern, Among):
        assert bool((spread.reshape(12, 5, 4).sum(2) == 2).all())
    else:
        assert int(mask.sum()) == 5
        assert int(spread.sum()) == 5 * pattern.rows * pattern.columns


def test_starts_are_never_lost() -> None:
    w, gram = weight(), random_gram(20)
    objective = Objective(w, gram, None)
    mask = search(objective, Grid(1, 1), 60)
    values = reconstruct(objective, mask)
    _, found = prune(objective, "magnitude", Grid(1, 1), 60, starts=[(mask, values)])
    assert objective.error(found) <= objective.error(values) * (1 + 1e-12)


def test_the_input_score_follows_the_inputs() -> None:
    w = torch.ones(1, 4, dtype=torch.float64)
    objective = Objective(w, DiagonalGram(torch.tensor([1.0, 9.0, 4.0, 2.0]), shrinkage=0.0), None)
    assert select(objective, "input", Grid(1, 1), 2).tolist() == [[False, True, True, False]]


def _brute_force(w: Tensor, cost: object) -> float:
    """The least cost over a fine grid of values for every entry of a vector of two."""
    axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    return float(cost(theta, w).min())


@pytest.mark.parametrize("entries", [(2.0, -0.5), (0.3, 0.2), (-1.0, 2.5)])
def test_the_penalties_minimise_what_they_say(entries: tuple[float, float]) -> None:
    w = torch.tensor(entries, dtype=torch.float64)
    mu, alpha = 2.0, 0.7

    def l0(theta: Tensor, w: Tensor) -> Tensor:
        return mu / 2 * (w - theta).square().sum(-1) + alpha * (theta.abs() > 1e-9).sum(-1)

    def l1(theta: Tensor, w: Tensor) -> Tensor:
        return mu / 2 * (w - theta).square().sum(-1) + alpha * theta.abs().sum(-1)

    assert float(l0(l0_penalty(w, alpha, mu), w)) <= _brute_force(w, l0) + 1e-9
    assert float(l1(l1_penalty(w, alpha, mu), w)) <= _brute_force(w, l1) + 1e-9


def test_the_constraints_are_projections() -> None:
    w = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for radius in (0.5, 10.0, 100.0):
        theta = l1_constraint(w, radius)
        assert float(theta.abs().sum()) == pytest.approx(radius)
        # The variational inequality of a projection, against random points of the ball.
        others = torch.randn(500, 200, dtype=torch.float64)
        others = others / others.abs().sum(1, keepdim=True) * radius
        assert float(((others - theta) @ (w - theta)).max()) <= 1e-9
    assert torch.equal(l1_constraint(w, 1e6), w)
    kept = l0_constraint(w, 30)
    assert int((kept != 0).sum()) == 30
    assert float(kept[kept != 0].abs().min()) >= float(w[kept == 0].abs().max())
    with pytest.raises(ValueError, match="radius must be a finite number above 0"):
        l1_constraint(w, 0)
    with pytest.raises(ValueError, match="count must be between 0 and 200"):
        l0_constraint(w, 201)
