"""Weighted nonlinear least squares without matrices: the values of any structure, its support being given.

min over θ of ‖H^{1/2}(W − f(θ))Ĝ^{1/2}‖_F, where f builds a dense weight from real values: the factors of a
low rank seen through a reshape, a codebook, the values of all terms of a sum together. Gauss-Newton steps are
solved by conjugate gradients on products with the Jacobian and its transpose, so that f only has to be
differentiable and no matrix larger than W is formed. Where f is linear in θ the first step solves it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.numerics.gram import Gram, squared_error

__all__ = ["refine"]

Values = tuple[Tensor, ...]


def refine(
    synthesise: Callable[[Values], Tensor],
    values: Sequence[Tensor],
    target: Tensor,
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    steps: int = 10,
    products: int = 20,
    tolerance: float = 1e-3,
) -> Values:
    """Values that fit a target no worse than the given ones, usually better.

    Levenberg-Marquardt: every step minimises ‖r − Jδ‖² + μ‖Dδ‖² over δ in the weighted norm by conjugate
    gradients, where D makes a step as large, relatively, for small tensors as for large ones. The damping μ
    falls by steps that succeed and grows by those that fail.

    Args:
        synthesise: f: from tensors of the values' shapes to a dense weight, differentiable.
        values: θ to start from; floating, at least one.
        target: W, shape (outputs, inputs).
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        steps: the most Gauss-Newton steps.
        products: the most conjugate-gradient iterations per step.
        tolerance: stops where a step lowers the squared error by a smaller share.

    Returns:
        The best values found, in the given ones' dtypes.

    Source: Levenberg 1944; Marquardt 1963; Hestenes and Stiefel 1952 (conjugate gradients).
    """
    current = tuple(value.detach() for value in values)
    best, damping = _error(synthesise(current), target, input_gram, output_gram), 1e-4
    for _ in range(steps):
        linearised: Any = torch.func.vjp(synthesise, current)
        dense, transposed = linearised
        gradient = transposed(_weigh(target - dense, input_gram, output_gram))[0]
        if not any(bool(part.any()) for part in gradient):
            break
        scales = [value.square().mean() for value in current]
        largest = max(float(scale) for scale in scales) or 1.0
        # A tensor of zeros, such as a term that is not used yet, steps like the largest one.
        scales = [
            scale if float(scale) > 1e-12 * largest else torch.full_like(scale, largest) for scale in scales
        ]

        def curvature(
            step: Values,
            current: Values = current,
            transposed: Callable[[Tensor], tuple[Values]] = transposed,
        ) -> Values:
            image = torch.func.jvp(synthesise, (current,), (step,))[1]
            return transposed(_weigh(image, input_gram, output_gram))[0]

        step = _conjugate_gradients(curvature, gradient, scales, damping, products)
        trial = tuple(value + part for value, part in zip(current, step, strict=True))
        error = _error(synthesise(trial), target, input_gram, output_gram)
        if not error < best:  # written so that NaN fails too
            damping *= 30
            if damping > 1e4:
                break
            continue
        gain, best, current, damping = best - error, error, trial, max(damping / 10, 1e-9)
        if gain <= tolerance * max(best, torch.finfo(target.dtype).tiny):
            break
    return current


def _weigh(error: Tensor, input_gram: Gram | None, output_gram: Gram | None) -> Tensor:
    """H E Ĝ."""
    weighed = error if input_gram is None else input_gram.matmul(error)
    return weighed if output_gram is None else output_gram.matmul(weighed.T).T


def _error(dense: Tensor, target: Tensor, input_gram: Gram | None, output_gram: Gram | None) -> float:
    return float(squared_error(target - dense, input_gram, output_gram))


def _conjugate_gradients(
    curvature: Callable[[Values], Values],
    gradient: Values,
    scales: list[Tensor],
    damping: float,
    products: int,
) -> Values:
    """Solves (JᵀMJ + μD)δ = g, preconditioned by the scales; D is in units of the curvature along g."""

    def dot(a: Values, b: Values) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    def scaled(a: Values) -> Values:
        return tuple(x * scale for x, scale in zip(a, scales, strict=True))

    residual, solution = gradient, tuple(torch.zeros_like(part) for part in gradient)
    search = preconditioned = scaled(residual)
    weight = start = dot(residual, preconditioned)
    unit: float | None = None
    for _ in range(products):
        product = curvature(search)
        bent = dot(search, product)
        if unit is None:
            unit = bent / max(dot(search, search), 1e-300)
        metric = tuple(part / scale for part, scale in zip(search, scales, strict=True))
        damped = bent + damping * unit * (mean := float(scales[0])) * dot(search, metric)
        if not damped > 0:
            break
        length = weight / damped
        solution = tuple(a + length * b for a, b in zip(solution, search, strict=True))
        residual = tuple(
            a - length * (b + damping * unit * mean * c)
            for a, b, c in zip(residual, product, metric, strict=True)
        )
        preconditioned = scaled(residual)
        before, weight = weight, dot(residual, preconditioned)
        if weight <= 1e-10 * start:
            break
        search = tuple(a + (weight / before) * b for a, b in zip(preconditioned, search, strict=True))
    return solution
