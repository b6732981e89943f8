"""Factorisations whose first factor is free: that factor eliminated, the others by L-BFGS.

A chain's weight is Ŵ = A B(θ): the columns of A (outputs, width) are free, and the rows of B (width, inputs)
are made from the other factors θ. In the metric G the best A for given θ is a least squares solution,

    A = W G Bᵀ (B G Bᵀ + λI)⁻¹,                                                                  (1)

and what it leaves is a function of θ alone (variable projection), with the gradient that A held fixed has:

    f(θ) = tr(W G Wᵀ) − tr(W G Bᵀ (B G Bᵀ + λI)⁻¹ B G Wᵀ),                                       (2)
    ∂f/∂B = −2 Aᵀ (W − A B) G.                                                                   (3)

An evaluation costs one product of B with G. A metric H on the outputs needs no care: with H = T Tᵀ all of
this holds for TᵀW, and A is T⁻ᵀ times what (1) gives.

Source: Golub and Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems whose
    variables separate, SIAM Journal on Numerical Analysis 10 (1973), theorem 2.1; Kaufman 1975 for (3).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DiagonalGram, Gram, squared_error

# Floating-point operations that one refinement may take; a pass over the largest layers is a few of these.
_OPERATIONS = 3e11
_MOST_EVALUATIONS, _LEAST_EVALUATIONS = 120, 8


class Refined(NamedTuple):
    """What a refinement found.

    Attributes:
        left: A, shape (outputs, width), float64.
        factors: θ, float64.
        squared_error: f(θ), with the ridge.
    """

    left: Tensor
    factors: list[Tensor]
    squared_error: float


class Metric:
    """An input Gram as float64 tensors, one block per group of rows.

    Args:
        gram: the Gram; the identity where None.
        rows: the weight's rows, which the groups share out evenly.
    """

    def __init__(self, gram: Gram | None, rows: int) -> None:
        self.rows = rows
        self.groups = gram.groups if isinstance(gram, BlockDiagonalGram) else 1
        self.blocks: Tensor | None = None
        self.scale: Tensor | None = None
        if isinstance(gram, DiagonalGram):
            self.scale = gram.diagonal()
        elif isinstance(gram, BlockDiagonalGram):
            self.blocks = gram.moment.clone()
            self.blocks.diagonal(dim1=1, dim2=2).add_(gram.ridge)
        elif gram is not None:
            self.blocks = gram.dense().unsqueeze(0)

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Every group's rows of a weight times its block: (rows, n) -> (groups, rows / groups, n)."""
        parts = matrix.reshape(self.groups, -1, matrix.shape[1])
        return self._times(parts)

    def of_basis(self, basis: Tensor) -> Tensor:
        """A basis that all groups share times every block: (width, n) -> (groups, width, n)."""
        return self._times(basis.unsqueeze(0))

    def _times(self, parts: Tensor) -> Tensor:
        if self.scale is not None:
            return parts * self.scale
        return parts if self.blocks is None else parts @ self.blocks


def solve_left(matrix: Tensor, basis: Tensor, gram: Gram | None = None) -> Tensor:
    """The A of least error for given rows B; of least norm where B's rows depend on each other.

    Args:
        matrix: W, shape (outputs, inputs).
        basis: B, shape (width, inputs).
        gram: the input metric, per group of rows where it is block-diagonal; the identity where None.

    Returns:
        A, shape (outputs, width), in the matrix's dtype.
    """
    metric = Metric(gram, len(matrix))
    wide = basis.double()
    reach = metric.of_basis(wide)  # B G
    cross = matrix.double().reshape(metric.groups, -1, matrix.shape[1]) @ reach.mT
    normal = reach @ wide.T
    # Scaled to a unit diagonal, so that the cut-off of small singular values does not see the rows' scales.
    size = normal.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scaled = size[:, :, None] * normal * size[:, None, :]
    solution = torch.linalg.lstsq(scaled, size[:, :, None] * cross.mT, driver="gelsd").solution
    return (size[:, :, None] * solution).mT.reshape(len(matrix), -1).to(matrix.dtype)


def refine(
    matrix: Tensor,
    basis: Callable[[Sequence[Tensor]], Tensor],
    start: Sequence[Tensor],
    gram: Gram | None = None,
    *,
    ridge: float = 1e-9,
    evaluations: int | None = None,
    tolerance: float = 1e-6,
) -> Refined:
    """Lowers the error of Ŵ = A B(θ) from a start, A eliminated.

    Args:
        matrix: W, shape (outputs, inputs).
        basis: makes B (width, inputs) from the factors, by differentiable operations.
        start: the factors to start from.
        gram: the input metric; the identity where None.
        ridge: λ in units of the mean diagonal of B G Bᵀ at the start.
        evaluations: most evaluations of (2) and (3); by the size of the problem where None.
        tolerance: stops where an iteration lowers the error relatively less.

    Returns:
        Left factor, factors and squared error; with the ridge never worse than the start.
    """
    metric = Metric(gram, len(matrix))
    weight = matrix.double()
    shapes = [tuple(factor.shape) for factor in start]
    sizes = [factor.numel() for factor in start]
    target = metric.of_rows(weight)  # W G
    energy = float((target.reshape(weight.shape) * weight).sum())
    ridge_value: float | None = None

    def unpack(point: NDArray[np.float64]) -> list[Tensor]:
        parts = torch.from_numpy(np.array(point, dtype=np.float64)).split(sizes)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def evaluate(factors: list[Tensor]) -> tuple[float, Tensor, list[Tensor]]:
        nonlocal ridge_value
        leaves = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad():
            rows = basis(leaves)
        fixed = rows.detach()
        reach = metric.of_basis(fixed)
        normal = reach @ fixed.T
        diagonal = normal.diagonal(dim1=1, dim2=2)
        if ridge_value is None:
            ridge_value = max(ridge * float(diagonal.mean()), 1e-300)
        cross = target @ fixed.T
        left = _solve(normal, cross, ridge_value)
        error = energy - float((left * cross).sum())
        # Summed over groups: −2 Aᵀ (W G − A B G).
        slope = -2 * (left.mT @ target - (left.mT @ left) @ reach).sum(0)
        gradients = torch.autograd.grad(rows, leaves, slope)
        return error, left.reshape(len(weight), -1), list(gradients)

    def objective(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        error, _, gradients = evaluate(unpack(point))
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return error / energy, flat.numpy() / energy

    first = [factor.detach().double().contiguous() for factor in start]
    if not energy > 0:
        return Refined(solve_left(weight, basis(first), gram), first, 0.0)
    if evaluations is None:
        width, inputs = basis(first).shape
        own = metric.blocks is not None
        per_evaluation = 2 * width * inputs * (inputs * metric.groups * own + 2 * len(weight) + 2 * width)
        evaluations = int(min(_MOST_EVALUATIONS, max(_LEAST_EVALUATIONS, _OPERATIONS / per_evaluation)))
    packed = torch.cat([factor.reshape(-1) for factor in first]).numpy()
    found = optimize.minimize(
        objective,
        packed,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxfun": evaluations,
            "maxiter": evaluations,
            "ftol": tolerance,
            "gtol": 1e-12,
            "maxcor": 20,
        },
    )
    factors = unpack(found.x)
    error, left, _ = evaluate(factors)
    return Refined(left, factors, error)


def fit_chain(
    matrix: Tensor,
    basis: Callable[[Sequence[Tensor]], Tensor],
    starts: Callable[[Tensor, Gram | None], list[Tensor]],
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    ridge: float = 1e-9,
    evaluations: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The chain A B(θ) nearest to a weight in ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F, never worse than the plain one.

    Args:
        matrix: W, shape (outputs, inputs).
        basis: makes B from the factors.
        starts: gives factors for a weight in the Frobenius norm, and, with a Gram, in an approximation of its
            norm that the family's own algorithm can use.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        ridge: see `refine`.
        evaluations: see `refine`.

    Returns:
        A and θ in float64.
    """
    weight = matrix.double()
    plain = starts(weight, None)
    plain_left = solve_left(weight, basis(plain))
    if input_gram is None and output_gram is None:
        return plain_left, plain
    found = [(plain_left, plain), (solve_left(weight, basis(plain), input_gram), plain)]
    # TᵀW: afterwards only the input metric is left. It mixes the rows of groups, which then share a metric.
    coloured = weight if output_gram is None else output_gram.whiten(weight.mT).mT
    metric = input_gram if input_gram is None or output_gram is None else input_gram.average()
    factors = starts(coloured, None if metric is None else metric.average())
    candidates = [factors] if metric is None else [factors, plain]
    errors = [
        float(squared_error(coloured - solve_left(coloured, basis(start), metric) @ basis(start), metric))
        for start in candidates
    ]
    factors = candidates[errors.index(min(errors))]
    if metric is not None:
        refined = refine(coloured, basis, factors, metric, ridge=ridge, evaluations=evaluations)
        factors = refined.factors
    left = solve_left(coloured, basis(factors), metric)
    left = left if output_gram is None else output_gram.unwhiten(left.mT).mT
    found.append((left, factors))
    return min(
        found,
        key=lambda pair: float(squared_error(weight - pair[0] @ basis(pair[1]), input_gram, output_gram)),
    )


def _solve(normal: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Gives cross · (normal + ridge)⁻¹ for every group, with a larger ridge where rounding asks for it."""
    while True:
        damped = normal + ridge * torch.eye(normal.shape[1], dtype=normal.dtype)
        factor, fails = torch.linalg.cholesky_ex(damped)
        if not bool(fails.any()):
            return torch.cholesky_solve(cross.mT, factor).mT
        ridge *= 100
