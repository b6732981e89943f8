"""Codebooks of numbers: one-dimensional k-means, and the closed forms of two and three levels.

On a line the clusters of an optimal codebook are neighbours in sorted order, so that dynamic programming
finds the optimum: with D_k(j) the least error of the first j points in k clusters,

    D_k(j) = min_i D_{k−1}(i) + cost(i, j),   cost(i, j) = Σ ω w² − (Σ ω w)² / Σ ω over the points i+1 … j.

All rows of a matrix are clustered at once.
"""

import torch
from torch import Tensor

from weft import checks

__all__ = ["binary_scale", "codebooks", "nearest_level", "ternary_scale"]

# Numbers that the dynamic program looks at, over all rows: beyond that neighbouring points are merged first.
_BUDGET = 1e8
_FEWEST_BINS, _MOST_BINS = 64, 2048
_NUMBERS_AT_ONCE = 1 << 23
_LLOYD_ITERATIONS = 20


def codebooks(points: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """The codebook of every row of points: Σ ω (w − nearest level)² is least.

    Rows of few points get the optimum, by dynamic programming. Of longer ones runs of neighbours in sorted
    order are merged into their means first, and Lloyd's iterations over all points follow.

    Args:
        points: shape (rows, points), floating.
        count: how many levels, at least 1; where a row has fewer distinct points, levels repeat.
        weights: ω ≥ 0, of a shape that broadcasts to the points'; equal where None.

    Returns:
        The levels in increasing order, shape (rows, count), in the points' dtype.

    Source: Wang and Song 2011 (dynamic programming); Lloyd 1982.

    Examples:
        >>> codebooks(torch.tensor([[0.0, 0.25, 5.0, 6.0, 5.5]]), 2)
        tensor([[0.1250, 5.5000]])
    """
    checks.integer_between("count", count, 1, None)
    rows, length = points.shape
    order = points.to(torch.float64).sort(dim=1)
    values = order.values
    mass = torch.ones_like(values)
    if weights is not None:
        mass = weights.to(values).expand_as(values).gather(1, order.indices)
        # Points that weigh nothing are looked at where nothing else is there to be seen.
        mass = mass + 1e-12 * mass.mean(1, keepdim=True).clamp_min(1e-300)
    bins = min(length, _MOST_BINS, max(_FEWEST_BINS, 2 * count, int((_BUDGET / (rows * count)) ** 0.5)))
    size = max(1, _NUMBERS_AT_ONCE // (bins + 1) ** 2)
    found = torch.cat([
        _optimal(*_merged(some, own, bins), count)
        for some, own in zip(values.split(size), mass.split(size), strict=True)
    ])
    if bins < length:
        found = _lloyd(values, mass, found)
    return found.to(points)


def _merged(values: Tensor, mass: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Runs of sorted points as their means and masses, (rows, bins) each."""
    rows, length = values.shape
    if bins == length:
        return values, mass
    owner = (torch.arange(length) * bins // length).expand(rows, -1)
    total = mass.new_zeros(rows, bins).scatter_add(1, owner, mass)
    return mass.new_zeros(rows, bins).scatter_add(1, owner, mass * values) / total, total


def _optimal(values: Tensor, mass: Tensor, count: int) -> Tensor:
    """The best levels of sorted points by dynamic programming, (rows, count)."""
    rows, length = values.shape
    if count >= length:
        return values[:, torch.arange(count).clamp_max(length - 1)]
    centre = values.mean(1, keepdim=True)  # sums of squares of far-off points would cancel
    sums = [
        torch.nn.functional.pad(part.cumsum(1), (1, 0))
        for part in (mass, mass * (values - centre), mass * (values - centre).square())
    ]

    def between(part: Tensor) -> Tensor:  # over the points i+1 … j, at [row, i, j]
        return part[:, None, :] - part[:, :, None]

    weight, first, second = (between(part) for part in sums)
    cost = (second - first.square() / weight.clamp_min(1e-300)).clamp_min_(0)
    cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).tril(-1), torch.inf)
    best, choices = cost[:, 0], []
    for _ in range(1, count):
        best, choice = (best[:, :, None] + cost).min(1)
        choices.append(choice)
    end = torch.full((rows, 1), length)
    levels = []
    for choice in reversed(choices):
        start = choice.gather(1, end)
        levels.append(_mean(sums, start, end))
        end = start
    levels.append(_mean(sums, torch.zeros_like(end), end))
    return (torch.cat(levels[::-1], 1) + centre).sort(1).values


def _mean(sums: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
    weight, first = ((part.gather(1, end) - part.gather(1, start)) for part in sums[:2])
    return torch.where(weight > 0, first / weight.clamp_min(1e-300), 0)


def _lloyd(values: Tensor, mass: Tensor, levels: Tensor) -> Tensor:
    """Lloyd's iterations over sorted points; a level without points stays where it is."""
    for _ in range(_LLOYD_ITERATIONS):
        owner = nearest_level(values, levels)
        total = torch.zeros_like(levels).scatter_add(1, owner, mass)
        moment = torch.zeros_like(levels).scatter_add(1, owner, mass * values)
        moved = torch.where(total > 0, moment / total.clamp_min(1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved.sort(1).values
    return levels


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest level of every value.

    Args:
        values: shape (rows, values).
        levels: in increasing order, shape (rows, count), or (1, count) for all rows.

    Returns:
        Indices, int64, shape (rows, values).

    Examples:
        >>> nearest_level(torch.tensor([[-1.0, 0.4, 0.6, 7.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[0, 0, 1, 1]])
    """
    borders = (levels[:, 1:] + levels[:, :-1]) / 2
    if len(levels) == 1:
        return torch.bucketize(values, borders[0])
    return torch.searchsorted(borders.contiguous(), values.contiguous())


def binary_scale(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """The best c of the codebook {−c, c}: the mean of |w|.

    Args:
        points: shape (*batch, points).
        weights: ω ≥ 0, of a shape that broadcasts to the points'; equal where None.

    Returns:
        c, shape (*batch,).

    Source: Carreira-Perpiñán and Idelbayev 2017, section 4.2 (Rastegari et al. 2016).

    Examples:
        >>> binary_scale(torch.tensor([1.0, -3.0]))
        tensor(2.)
    """
    mass = torch.ones_like(points) if weights is None else weights.to(points).expand_as(points)
    return (mass * points.abs()).sum(-1) / mass.sum(-1).clamp_min(torch.finfo(points.dtype).tiny)


def ternary_scale(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """The best c of the codebook {−c, 0, c}: the mean of the k largest |w|, where (Σ |w|)² / k is largest.

    With weights the k points of largest |w| give (Σ ω |w|)² / Σ ω.

    Args:
        points: shape (*batch, points).
        weights: ω ≥ 0, of a shape that broadcasts to the points'; equal where None.

    Returns:
        c, shape (*batch,).

    Source: Carreira-Perpiñán and Idelbayev 2017, section 4.2, theorem on ternarisation with scale.

    Examples:
        >>> ternary_scale(torch.tensor([4.0, -4.0, 1.0, 0.5]))
        tensor(4.)
    """
    mass = torch.ones_like(points) if weights is None else weights.to(points).expand_as(points)
    order = points.abs().sort(dim=-1, descending=True)
    mass = mass.gather(-1, order.indices)
    total = mass.cumsum(-1).clamp_min(torch.finfo(points.dtype).tiny)
    moment = (mass * order.values).cumsum(-1)
    best = (moment.square() / total).argmax(-1, keepdim=True)
    return (moment / total).gather(-1, best).squeeze(-1)
