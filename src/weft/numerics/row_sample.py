"""A few rows that stand for all: sampling in proportion to size."""

import torch
from torch import Tensor

from weft import checks


def sample_rows(
    sizes: Tensor, most: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rows drawn in proportion to their sizes, and by what a sum over them is multiplied.

    For values x_i that go with the sizes, Σ_drawn x_i / π_i is an unbiased estimate of Σ x_i, and its spread
    is only that of x_i / size_i. Rows of large size are drawn for certain, so that a few that make up most of
    the sum are exact.

    Args:
        sizes: at least 0, shape (rows,).
        most: how many rows are drawn at most; all where there are no more.
        generator: the source of randomness; a fixed seed where None.

    Returns:
        Increasing row numbers, and 1 / π_i for each, float64.

    Source: Madow 1949 (systematic sampling with unequal probabilities); Horvitz and Thompson 1952.

    Examples:
        >>> sample_rows(torch.tensor([5.0, 0.0, 1.0]), 8)
        (tensor([0, 1, 2]), tensor([1., 1., 1.], dtype=torch.float64))
    """
    checks.integer_between("most", most, 1, None)
    rows = len(sizes)
    if rows <= most:
        return torch.arange(rows), torch.ones(rows, dtype=torch.float64)
    generator = generator or torch.Generator().manual_seed(0)
    mass = sizes.detach().to(device="cpu", dtype=torch.float64).clamp_min(0)
    order = mass.argsort(descending=True)
    ordered = mass[order]
    left = ordered.flip(0).cumsum(0).flip(0)  # of this row and all smaller ones
    # A row is certain where its share of what is left would give it more than one draw.
    draws = most - torch.arange(rows, dtype=torch.float64)
    certain = int(((ordered * draws >= left) & (draws > 0) & (ordered > 0)).cummin(0).values.sum())
    rest, count = ordered[certain:], most - certain
    weights = torch.ones(rows, dtype=torch.float64)
    if not count or not float(rest.sum()) > 0:
        return order[:certain].sort().values, weights[:certain]
    chances = rest * (count / rest.sum())
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    shuffled = torch.randperm(len(rest), generator=generator)
    reached = chances[shuffled].cumsum(0) - start
    steps = reached.floor()
    hit = steps > torch.cat([reached.new_full((1,), -start).floor(), steps[:-1]])
    drawn = shuffled[hit]
    chosen = torch.cat([order[:certain], order[certain:][drawn]])
    weights = torch.cat([weights[:certain], 1 / chances[drawn]])
    place = chosen.argsort()
    return chosen[place], weights[place]
