"""Canonical polyadic decomposition: a tensor as a sum of rank-one terms, by alternating least squares.

    W ≈ Σ_k a_k ∘ b_k ∘ c_k ∘ ...,   factors of shape (rank, size), one row per term

Each factor in turn is a regularised least squares problem with the others fixed. All factors but the first
keep rows of unit norm, so that the ridge on the first one bounds the terms: two large terms that cancel
(degeneracy) cost more than they gain. The product of the tensor with the first factor serves the updates of
all others in a sweep, so that a sweep costs two passes over the tensor whatever its order.

After a sweep the factors go on in the direction in which it moved them, and come back where that raises the
error: half the sweeps for the same error. They run in float32, at twice the rate, the last ones in the
tensor's own precision.

Source: Harshman 1970; Carroll and Chang 1970; Kolda and Bader, Tensor decompositions and applications, SIAM
    Review 51 (2009), section 3.4; Phan, Tichavský and Cichocki 2013 for shared products; Ang, Cohen,
    Hien and Gillis, Extrapolated alternating algorithms for approximate canonical polyadic decomposition,
    ICASSP 2020, algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Sweeps of every start before the best is chosen, and most sweeps of that one.
_TRIAL_SWEEPS, _SWEEPS = 10, 80
# Fewest sweeps in the tensor's own precision.
_LAST_SWEEPS = 5
# How far factors go on after a sweep, as a share of its step: at first, at most, and its growth.
_STEP, _LONGEST_STEP, _STEP_GROWTH = 0.5, 1.0, 1.2


def rank_one_terms(factors: Sequence[Tensor]) -> Tensor:
    """The outer products of the factors' rows, flattened.

    Args:
        factors: each of shape (rank, size).

    Returns:
        Shape (rank, product of the sizes).
    """
    terms = factors[0]
    for factor in factors[1:]:
        terms = (terms.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
    return terms


def unit_rows(factor: Tensor) -> Tensor:
    """Rows scaled to norm 1; rows of zeros stay."""
    return factor / torch.linalg.vector_norm(factor, dim=1, keepdim=True).clamp_min(1e-30)


def canonical_polyadic(
    tensor: Tensor,
    rank: int,
    *,
    start: Sequence[Tensor] | None = None,
    restarts: int = 2,
    ridge: float = 1e-5,
    sweeps: int = _SWEEPS,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], float]:
    """The best of several starts of regularised alternating least squares.

    Args:
        tensor: W, of any order from 2.
        rank: the number of terms.
        start: factors of fewer or as many terms to go on from, the first one aside; terms that are missing
            are drawn. Without a start one is taken from the unfoldings' singular vectors, the others are
            drawn.
        restarts: how many starts are tried in all; one where `start` is given.
        ridge: λ on the first factor, in units of the mean squared norm of the other factors' terms.
        sweeps: most sweeps.
        tolerance: stops where a sweep lowers the error relatively less.
        generator: the source of drawn terms; a fixed seed where None.

    Returns:
        The factors, the first one with all of the scale, and the squared error without the ridge.
    """
    generator = generator or torch.Generator().manual_seed(0)
    scale = float(torch.linalg.vector_norm(tensor)) or 1.0
    single = (tensor / scale).float()
    trials = []
    for trial in range(1 if start is not None else max(1, restarts)):
        if start is not None:
            factors = [_extended(unit_rows(factor).float(), rank, generator) for factor in start]
        elif trial == 0:
            factors = [
                _extended(_singular_rows(single, axis, rank), rank, generator)
                for axis in range(1, tensor.ndim)
            ]
        else:
            factors = [_extended(single.new_zeros(0, size), rank, generator) for size in tensor.shape[1:]]
        trials.append(_sweep(single, factors, min(_TRIAL_SWEEPS, sweeps), ridge, tolerance))
    best, _, taken = min(trials, key=lambda found: found[1])
    if sweeps > taken:
        best, _, more = _sweep(single, best[1:], sweeps - taken, ridge, tolerance)
        taken += more
    others = [factor.to(tensor) for factor in best[1:]]
    best, error, _ = _sweep(tensor, others, max(_LAST_SWEEPS, sweeps - taken), ridge, tolerance)
    return best, error


def _sweep(
    tensor: Tensor, others: Sequence[Tensor], sweeps: int, ridge: float, tolerance: float
) -> tuple[list[Tensor], float, int]:
    """Alternating least squares from all factors but the first: all factors, squared error, sweeps taken."""
    others = list(others)
    matrix = tensor.flatten(1)
    energy = float(matrix.square().sum())
    first, error = _first(matrix, others, ridge, energy)
    updated: list[Tensor] | None = None
    step, longest = _STEP, _LONGEST_STEP
    taken = 0
    while taken < sweeps:
        taken += 1
        product = torch.tensordot(first, tensor, dims=1)  # (rank, *all other modes)
        grams = [factor @ factor.mT for factor in others]
        own = first @ first.mT
        for axis in range(len(others)):
            normal = own.clone()
            for other, gram in enumerate(grams):
                normal = normal if other == axis else normal * gram
            solved = _solve(normal, _all_but(product, others, axis), ridge)
            others[axis] = unit_rows(solved)
            grams[axis] = others[axis] @ others[axis].mT
        before, previous, updated = error, updated, others
        if previous is not None:
            others = [unit_rows(new + step * (new - old)) for new, old in zip(updated, previous, strict=True)]
            first, error = _first(matrix, others, ridge, energy)
            if error <= before:
                longest = min(_LONGEST_STEP, longest * _STEP_GROWTH)
                step = min(longest, step * _STEP_GROWTH)
            else:
                longest, step = step, step / 2
        if previous is None or error > before:
            others = list(updated)
            first, error = _first(matrix, others, ridge, energy)
        if error >= before * (1 - tolerance):
            break
    return [first, *others], max(error, 0.0), taken


def _first(matrix: Tensor, others: Sequence[Tensor], ridge: float, energy: float) -> tuple[Tensor, float]:
    """The first factor for given others, and the squared error that it leaves."""
    terms = rank_one_terms(others)
    cross = terms @ matrix.mT
    normal = terms @ terms.mT
    first = _solve(normal, cross, ridge)
    return first, energy - float((first * (2 * cross - normal @ first)).sum())


def _all_but(product: Tensor, others: Sequence[Tensor], axis: int) -> Tensor:
    """Contracts every mode of (rank, *modes) but one with its factor, term by term: (rank, size)."""
    for other in range(len(others) - 1, axis, -1):
        product = (product * _along(others[other], product.ndim, product.ndim - 1)).sum(-1)
    for factor in others[:axis]:
        product = (product * _along(factor, product.ndim, 1)).sum(1)
    return product


def _along(factor: Tensor, ndim: int, axis: int) -> Tensor:
    shape = [len(factor)] + [1] * (ndim - 1)
    shape[axis] = factor.shape[1]
    return factor.reshape(shape)


def _solve(normal: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(normal + λ I)⁻¹ cross with λ relative to the mean diagonal."""
    damping = max(ridge * float(normal.diagonal().mean()), torch.finfo(normal.dtype).tiny)
    while True:
        damped = normal + damping * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
        factor, fails = torch.linalg.cholesky_ex(damped)
        if not fails:
            return torch.cholesky_solve(cross, factor)
        damping *= 100


def _singular_rows(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """The leading left singular vectors of an unfolding, as rows."""
    unfolded = tensor.movedim(axis, 0).flatten(1)
    return torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(1).mT[:rank]


def _extended(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Rows up to a number of terms, the missing ones drawn."""
    drawn = torch.randn(max(0, rank - len(rows)), rows.shape[1], dtype=torch.float64, generator=generator)
    return torch.cat([rows[:rank], unit_rows(drawn.to(rows))])
