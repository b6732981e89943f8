"""Products of sparse matrices: W ≈ λ S₁ S₂ … S_Q with few entries in every row and column of each factor.

PALM4MSA (Le Magoarou and Gribonval 2016) descends in one factor after the other. With L = S₁ … S_{j−1},
R = S_{j+1} … S_Q and the norm ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F the objective in S = λS_j is the quadratic

    ‖W‖² + ⟨S, A S B⟩ − 2⟨S, T⟩,    A = LᵀHL,    B = RĜRᵀ,    T = LᵀHWĜRᵀ,

so that prefixes (LᵀHL, LᵀHWĜ) and suffixes (RĜRᵀ) are carried along a sweep and no residual is formed.
Everything below is a way to lower this quadratic under the sparsity constraint:

* `palm4msa`: one projected gradient step per factor and sweep, as published;
* `refit`: conjugate gradients on a fixed support, which never raises the objective;
* `splitting`: the alternating direction method of multipliers inside each factor while its penalty grows,
  then projected steps of the steepest descent's length, each with a refit. It reaches errors far below
  PALM4MSA's, because the inverse of A ⊗ B + ρI, not a scalar, decides about the support;
* `hierarchical`: one factor split off after the other, all refitted in between.

Source: Le Magoarou and Gribonval, "Flexible multilayer sparse approximations of matrices and applications",
2016, Fig. 4 (PALM4MSA) and Fig. 5 (hierarchical); Giffon, Ayache, Kadri, Artières and Sicre, "PSM-nets", 2021
(the projection); Blumensath and Davies 2010 (steps of steepest descent's length); Boyd et al. 2011, 9.1
(alternating directions with a non-convex projection).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from weft import checks

__all__ = [
    "Metric",
    "SparseFactorisation",
    "hierarchical",
    "largest_entries",
    "multiply",
    "palm4msa",
    "refit",
    "splitting",
]

# A positive semidefinite metric: the identity (None), a diagonal (vector) or a full matrix.
Metric = Tensor | None

# Below this density a product gathers the sparse factor's entries; beyond it the dense one measures faster.
_SPARSE_DENSITY = 0.2
_SMALLEST_SPARSE = 1 << 14
# Below this share of ‖W‖² the expanded objective is rounding noise, and the residual is formed.
_CANCELLATION = 1e-3
# Steps of the power iteration, cold and warm from the vector of the sweep before.
_COLD_STEPS, _WARM_STEPS = 30, 4
# Power iteration gives a lower bound of the Lipschitz constant; Fig. 4 asks for a step below its inverse.
_STEP_MARGIN = 1.001
_BACKTRACKS = 8
# Into so many strips a long line is divided to find its largest entries.
_STRIPS = 8
# Below the first error the factorisation is exact, and sweeps end when the second tolerance is met.
_EXACT_ERROR, _EXACT_TOLERANCE = 1e-6, 0.1


@dataclass(frozen=True)
class SparseFactorisation:
    """W ≈ λ S₁ … S_Q.

    Attributes:
        scale: λ.
        factors: S₁ … S_Q with Frobenius norm 1 and explicit zeros, of shapes (D, d), (d, d), …, (d, D') with
            d = min(D, D').
        error: the relative error in the norm of the fit.
        errors: the relative error after every sweep; `factors` are those of the least, the start's included.
    """

    scale: float
    factors: tuple[Tensor, ...]
    error: float
    errors: tuple[float, ...] = field(default=(), repr=False)

    def to_dense(self) -> Tensor:
        """λ S₁ … S_Q, shape (D, D')."""
        product = self.factors[0] * self.scale
        for factor in self.factors[1:]:
            product = product @ factor
        return product

    def balanced(self) -> list[Tensor]:
        """The factors with λ shared among them, so that all have the same norm."""
        share = abs(self.scale) ** (1 / len(self.factors))
        first, *others = (factor * share for factor in self.factors)
        return [math.copysign(1.0, self.scale) * first, *others]


def largest_entries(matrix: Tensor, sparsity: int) -> Tensor:
    """Where a matrix is among the `sparsity` largest in absolute value of its row or of its column.

    The union keeps at least `sparsity` entries in every row and column, and at most twice that many on
    average; a row or column of outstanding size may hold more. It is no exact projection onto any set.

    Args:
        matrix: shape (rows, columns).
        sparsity: K; rows or columns shorter than that are kept whole.

    Returns:
        A boolean matrix of the same shape.

    Examples:
        >>> largest_entries(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 1).int()
        tensor([[1, 0],
                [1, 1]], dtype=torch.int32)
    """
    size = matrix.abs()
    return _largest_along(size, sparsity, 1).logical_or_(_largest_along(size, sparsity, 0))


def _largest_along(size: Tensor, count: int, axis: int) -> Tensor:
    """Where a non-negative matrix is among the `count` largest along an axis; of equals the first count."""
    # `topk` leaves the order of equals open, and that order decides whether the hierarchical variant finds
    # the butterflies of a Hadamard matrix, all of whose entries are equal up to rounding.
    if count >= size.shape[axis]:
        return torch.ones_like(size, dtype=torch.bool)
    threshold = _kth_largest(size, count, axis)
    rounding = 64 * torch.finfo(size.dtype).eps * threshold
    kept = size >= threshold - rounding
    # One count of all is cheaper than one per line, and enough where no line has equals at its threshold.
    if int(kept.count_nonzero()) > count * size.shape[1 - axis]:
        lines = (kept.sum(axis) > count).nonzero().flatten()
        chosen = size.index_select(1 - axis, lines)
        above = chosen > (threshold + rounding).index_select(1 - axis, lines)
        tied = kept.index_select(1 - axis, lines) & ~above
        room = count - above.sum(axis, keepdim=True)
        kept.index_copy_(1 - axis, lines, above | (tied & (tied.cumsum(axis) <= room)))
    return kept


def _kth_largest(size: Tensor, count: int, axis: int) -> Tensor:
    """The `count` largest value along an axis, which stays with length 1."""
    width = size.shape[axis] // _STRIPS
    # NumPy's selection is vectorised and takes as long for every count, but wants its lines in one piece.
    if size.device.type == "cpu" and (axis == 1 or width < 4 * count):
        lines = size.movedim(axis, -1).contiguous().numpy()
        place = lines.shape[-1] - count
        return torch.from_numpy(np.partition(lines, place)[..., place]).unsqueeze(axis)
    if width < 4 * count:
        return size.topk(count, dim=axis, sorted=False).values.amin(axis, keepdim=True)
    # The largest K are among the K strips with the largest maxima: a search in two short lists.
    strips = size.narrow(axis, 0, _STRIPS * width).unflatten(axis, (_STRIPS, width))
    best = strips.amax(axis).topk(count, dim=axis, sorted=False).indices.unsqueeze(axis)
    shape = list(best.shape)
    shape[axis] = _STRIPS
    candidates = strips.gather(axis + 1, best.expand(shape)).flatten(axis, axis + 1)
    rest = size.narrow(axis, _STRIPS * width, size.shape[axis] - _STRIPS * width)
    shortlist = torch.cat([candidates, rest], dim=axis)
    return shortlist.topk(count, dim=axis, sorted=False).values.amin(axis, keepdim=True)


def multiply(sparse: Tensor, dense: Tensor) -> Tensor:
    """S X for a matrix S of many zeros: gathers its entries where these are few, else multiplies densely.

    Args:
        sparse: S, shape (rows, inner), with explicit zeros.
        dense: X, shape (inner, columns).

    Returns:
        Shape (rows, columns).
    """
    return _Factor(sparse).times(dense)


class _Factor:
    """A matrix of many zeros whose entries are found once, for products with it and with its transpose."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def scaled(self, scale: float) -> "_Factor":
        """The same entries times a number."""
        scaled = _Factor(self.dense * scale)
        scaled.__dict__["places"] = self.places
        return scaled

    @cached_property
    def places(self) -> tuple[Tensor, Tensor] | None:
        """Rows and columns of the entries, row by row; None where the dense product is the faster one."""
        # In double precision the gathering sum is not vectorised, and the dense product wins at any density.
        if self.dense.dtype != torch.float32 or self.dense.numel() < _SMALLEST_SPARSE:
            return None
        # In one dimension and on a mask `nonzero` is several times as fast.
        places = (self.dense != 0).flatten().nonzero().flatten()
        if len(places) > _SPARSE_DENSITY * self.dense.numel():
            return None
        columns = self.dense.shape[1]
        return places // columns, places % columns

    @cached_property
    def _by_rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.places is None:
            return None
        rows, columns = self.places
        return columns, self.dense[rows, columns], _starts(rows, len(self.dense))

    @cached_property
    def _by_columns(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.places is None:
            return None
        rows, columns = self.places
        order = columns.argsort(stable=True)
        rows, columns = rows[order], columns[order]
        return rows, self.dense[rows, columns], _starts(columns, self.dense.shape[1])

    def times(self, matrix: Tensor) -> Tensor:
        """S X."""
        return self.dense @ matrix if self._by_rows is None else _sum_of_rows(matrix, *self._by_rows)

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Sᵀ X."""
        return self.dense.T @ matrix if self._by_columns is None else _sum_of_rows(matrix, *self._by_columns)

    def right_times_symmetric(self, metric: Tensor) -> Tensor:
        """A S for a symmetric matrix A."""
        return metric @ self.dense if self.places is None else self.transposed_times(metric).T.contiguous()

    def right_transposed_times(self, matrix: Tensor) -> Tensor:
        """X Sᵀ."""
        return matrix @ self.dense.T if self.places is None else self.times(matrix.T).T.contiguous()


def _starts(sorted_rows: Tensor, count: int) -> Tensor:
    """Where each row's entries begin."""
    lengths = torch.bincount(sorted_rows, minlength=count)
    return lengths.cumsum(0) - lengths


def _sum_of_rows(matrix: Tensor, indices: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Rows of X by index, weighted and added from each start to the next."""
    return functional.embedding_bag(
        indices, matrix.contiguous(), starts, mode="sum", per_sample_weights=values
    )


def _inner(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩, rows accumulated in float64: objectives are differences of such sums."""
    return float((a * b).sum(-1).sum(dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------
# Metrics


def _rows_metric(metric: Metric, matrix: Tensor) -> Tensor:
    """A X."""
    if metric is None:
        return matrix
    return metric[:, None] * matrix if metric.ndim == 1 else metric @ matrix


def _columns_metric(matrix: Tensor, metric: Metric) -> Tensor:
    """X B."""
    if metric is None:
        return matrix
    return matrix * metric if metric.ndim == 1 else matrix @ metric


def _congruence(factor: _Factor, metric: Metric) -> Tensor:
    """S B Sᵀ."""
    if metric is None or metric.ndim == 1:
        return factor.times(_columns_metric(factor.dense, metric).T)
    return factor.times(factor.times(metric).T)


def _transposed_congruence(factor: _Factor, metric: Metric) -> Tensor:
    """Sᵀ A S."""
    if metric is None or metric.ndim == 1:
        return factor.transposed_times(_rows_metric(metric, factor.dense))
    return factor.transposed_times(factor.transposed_times(metric).T)


def _diagonal(metric: Metric, size: int, like: Tensor) -> Tensor:
    """The diagonal, floored so that it may be divided by."""
    if metric is None:
        return like.new_ones(size)
    diagonal = metric if metric.ndim == 1 else metric.diagonal()
    largest = float(diagonal.max()) if len(diagonal) else 0.0
    if largest <= 0:
        return torch.ones_like(diagonal)
    return diagonal.clamp_min(1e-10 * largest)


def _largest_eigenvalue(metric: Metric, vector: Tensor | None) -> tuple[float, Tensor | None]:
    """‖A‖₂ by power iteration, warm from an earlier call's vector, and the vector for the next call."""
    if metric is None:
        return 1.0, None
    if metric.ndim == 1:
        return float(metric.max()), None
    steps = _WARM_STEPS
    if vector is None or len(vector) != len(metric):
        # Not the vector of ones, which is exactly orthogonal to many structured eigenvectors.
        generator = torch.Generator().manual_seed(0)
        vector = (1 + torch.rand(len(metric), generator=generator)).to(metric)
        steps = _COLD_STEPS
    value = 0.0
    for _ in range(steps):
        image = metric @ vector
        value = float(image.norm())
        if value <= 0 or not math.isfinite(value):
            return 0.0, None
        vector = image / value
    return value, vector


# ----------------------------------------------------------------------------------------------------
# The quadratic in one factor


@dataclass(frozen=True)
class _Quadratic:
    """⟨S, A S B⟩ − 2⟨S, T⟩: the objective in one factor, up to the constant ‖W‖²."""

    left: Metric  # A, shape (rows, rows)
    right: Metric  # B, shape (columns, columns)
    target: Tensor  # T, shape (rows, columns)

    def apply(self, factor: Tensor | _Factor) -> Tensor:
        """A S B, with S of many zeros."""
        known = factor if isinstance(factor, _Factor) else _Factor(factor)
        if self.right is not None and self.right.ndim == 2:
            return _rows_metric(self.left, known.times(self.right))
        if self.left is not None and self.left.ndim == 2:
            return _columns_metric(known.right_times_symmetric(self.left), self.right)
        return _columns_metric(_rows_metric(self.left, known.dense), self.right)

    def value(self, factor: Tensor, image: Tensor | None = None) -> float:
        """⟨S, A S B − 2T⟩."""
        image = self.apply(factor) if image is None else image
        return _inner(factor, image - 2 * self.target)

    def scales(self) -> Tensor:
        """The square root of the diagonal of A ⊗ B as a matrix: what each entry weighs in the objective."""
        rows, columns = self.target.shape
        row_scale = _diagonal(self.left, rows, self.target).sqrt()
        return row_scale[:, None] * _diagonal(self.right, columns, self.target).sqrt()

    def balanced(self) -> tuple["_Quadratic", Tensor]:
        """The same objective in D ∘ S, where A ⊗ B has a unit diagonal, and D."""
        # Columns of one factor against rows of the next may be rescaled without changing the product: in this
        # scaling the size of an entry says what it is worth.
        scales = self.scales()
        left, right = (
            None if metric is None or metric.ndim == 1 else metric / root[:, None] / root
            for metric, root in (
                (self.left, _diagonal(self.left, len(scales), scales).sqrt()),
                (self.right, _diagonal(self.right, scales.shape[1], scales).sqrt()),
            )
        )
        return _Quadratic(left, right, self.target / scales), scales


_Solver = Callable[[int, _Quadratic, _Factor], Tensor]
_Spectrum = tuple[Tensor, Tensor]


def _fixed_support(quadratic: _Quadratic, factor: Tensor, support: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on a support, preconditioned by the diagonal; the objective never rises."""
    preconditioner = support / quadratic.scales().square()
    residual = (quadratic.target - quadratic.apply(factor)) * support
    direction = scaled = residual * preconditioner
    energy = first = _inner(residual, scaled)
    for _ in range(steps):
        if energy <= 0:
            break
        image = quadratic.apply(direction) * support
        curvature = _inner(direction, image)
        # Rounding makes the curvature of a null direction any sign.
        if curvature <= 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * image
        scaled = residual * preconditioner
        before, energy = energy, _inner(residual, scaled)
        if energy <= 1e-12 * first:
            break
        direction = scaled + (energy / before) * direction
    return factor


def _refit_factor(quadratic: _Quadratic, factor: Tensor, steps: int) -> Tensor:
    return _fixed_support(quadratic, factor, factor != 0, steps)


class _LipschitzStep:
    """Fig. 4, lines 4-6: S ← P(S − (A S B − T)/c) with c just above ‖A‖‖B‖, the Lipschitz constant."""

    def __init__(self, sparsity: Sequence[int]) -> None:
        self.sparsity = sparsity
        self.vectors: dict[tuple[int, str], Tensor | None] = {}

    def _norm(self, key: tuple[int, str], metric: Metric) -> float:
        value, self.vectors[key] = _largest_eigenvalue(metric, self.vectors.get(key))
        return value

    def __call__(self, index: int, quadratic: _Quadratic, factor: _Factor) -> Tensor:
        constant = self._norm((index, "left"), quadratic.left) * self._norm((index, "right"), quadratic.right)
        if constant <= 0:
            return factor.dense
        gradient = quadratic.apply(factor) - quadratic.target
        moved = torch.add(factor.dense, gradient, alpha=-1 / (_STEP_MARGIN * constant))
        return moved * largest_entries(moved, self.sparsity[index])


class _SteepestStep:
    """A projected step of steepest descent's length in the balanced scaling, then a refit; never rises.

    With the Lipschitz constant every entry pays for the few directions in which the objective is steep.
    The length that is optimal along the gradient on the present support is often a hundred times larger;
    where the projection then raises the objective, the step is halved.
    """

    def __init__(self, sparsity: Sequence[int], refit_steps: int = 4) -> None:
        self.sparsity = sparsity
        self.refit_steps = refit_steps

    def __call__(self, index: int, quadratic: _Quadratic, factor: _Factor) -> Tensor:
        sparsity = self.sparsity[index]
        balanced, scales = quadratic.balanced()
        point = factor.dense * scales
        image = balanced.apply(point)
        gradient, value = image - balanced.target, balanced.value(point, image)
        support = point != 0 if bool(point.any()) else largest_entries(gradient, sparsity)
        along = gradient * support
        slope, curvature = _inner(along, along), _inner(along, balanced.apply(along))
        if slope <= 0 or curvature <= 0:
            # On its support the factor is optimal; only a step off the support can help.
            slope, curvature = 1.0, 1.0
        length = slope / curvature
        for _ in range(_BACKTRACKS):
            trial = point - length * gradient
            trial = trial * largest_entries(trial, sparsity)
            if balanced.value(trial) <= value:
                point = trial
                break
            length /= 2
        return _refit_factor(quadratic, point / scales, self.refit_steps)


def _resolvent(metric: Tensor, shift: float) -> Tensor:
    """(A + ρI)⁻¹."""
    shifted = metric.clone()
    shifted.diagonal().add_(shift)
    return torch.linalg.inv(shifted)


class _Splitting:
    """Alternating directions: X minimises the quadratic plus ρ‖X − Z + U‖², Z projects X + U, U adds X − Z.

    In the balanced scaling, so that ρ counts in units of the diagonal.
    """

    def __init__(self, sparsity: Sequence[int], steps: int = 5, refit_steps: int = 5) -> None:
        self.sparsity = sparsity
        self.steps = steps
        self.refit_steps = refit_steps
        self.penalty = 1.0
        self.spectra: dict[tuple[int, str], tuple[Tensor, _Spectrum]] = {}

    def _spectrum(self, key: tuple[int, str], metric: Tensor) -> _Spectrum:
        """Eigenvalues and eigenvectors; those of Ĝ and H, the same in every sweep, are found once."""
        known = self.spectra.get(key)
        if known is None or not torch.equal(known[0], metric):
            values, vectors = torch.linalg.eigh(metric)
            known = self.spectra[key] = (metric, (values.clamp_min(0), vectors))
        return known[1]

    def _shifted_inverse(self, index: int, quadratic: _Quadratic) -> Callable[[Tensor], Tensor]:
        """The solution X of A X B + ρX = Y as a function of Y."""
        left, right, shift = quadratic.left, quadratic.right, self.penalty
        if left is not None and right is not None:
            left_values, left_vectors = self._spectrum((index, "left"), left)
            right_values, right_vectors = self._spectrum((index, "right"), right)
            spectrum = left_values[:, None] * right_values + shift
            return lambda matrix: (
                left_vectors @ ((left_vectors.T @ matrix @ right_vectors) / spectrum) @ right_vectors.T
            )
        if left is not None:
            inverse = _resolvent(left, shift)
            return lambda matrix: inverse @ matrix
        if right is not None:
            inverse = _resolvent(right, shift)
            return lambda matrix: matrix @ inverse
        return lambda matrix: matrix / (1 + shift)

    def __call__(self, index: int, quadratic: _Quadratic, factor: _Factor) -> Tensor:
        balanced, scales = quadratic.balanced()
        solve = self._shifted_inverse(index, balanced)
        kept, dual = factor.dense * scales, torch.zeros_like(factor.dense)
        for _ in range(self.steps):
            free = solve(balanced.target + self.penalty * (kept - dual))
            shifted = free + dual
            kept = shifted * largest_entries(shifted, self.sparsity[index])
            dual = shifted - kept
        return _refit_factor(quadratic, kept / scales, self.refit_steps)


# ----------------------------------------------------------------------------------------------------
# Sweeps over the factors


@dataclass(frozen=True)
class _Problem:
    """The target and its metrics; transposed where the rightmost factor comes first: sweeps run one way."""

    target: Tensor  # W
    left: Metric  # H
    right: Metric  # Ĝ
    weighted: Tensor  # HWĜ
    weighted_by_columns: Tensor  # the same with contiguous columns, to be multiplied from the right
    size: float  # ‖H^{1/2}WĜ^{1/2}‖²_F

    @classmethod
    def make(
        cls, target: Tensor, input_metric: Metric, output_metric: Metric, *, transpose: bool
    ) -> "_Problem":
        left, right = (input_metric, output_metric) if transpose else (output_metric, input_metric)
        left, right = (None if metric is None else metric.to(target) for metric in (left, right))
        target = target.T.contiguous() if transpose else target
        weighted = _columns_metric(_rows_metric(left, target), right)
        by_columns = weighted.T.contiguous().T
        return cls(target, left, right, weighted, by_columns, _inner(target, weighted))

    def relative_error(self, scale: float, factors: Sequence[Tensor]) -> float:
        """The relative error from the residual itself."""
        product = factors[-1] * scale
        for factor in reversed(factors[:-1]):
            product = multiply(factor, product)
        residual = self.target - product
        square = _inner(residual, _columns_metric(_rows_metric(self.left, residual), self.right))
        return _relative(square, self.size)


def _relative(square: float, size: float) -> float:
    if size <= 0:
        return 0.0
    return math.sqrt(max(square, 0.0) / size)


def _sweep(problem: _Problem, scale: float, factors: list[Tensor], solve: _Solver) -> tuple[float, float]:
    """Updates every factor once, from the left to the right, in place; returns λ and the relative error."""
    known = [_Factor(factor) for factor in factors]
    suffixes: list[Metric] = [problem.right]  # RĜRᵀ
    for factor in reversed(known[1:]):
        suffixes.append(_congruence(factor, suffixes[-1]))
    suffixes.reverse()
    prefix, moment = problem.left, problem.weighted  # LᵀHL and LᵀHWĜ
    square = problem.size
    for index, suffix in enumerate(suffixes):
        target = moment if index else problem.weighted_by_columns
        for factor in reversed(known[index + 1 :]):
            target = factor.right_transposed_times(target)
        quadratic = _Quadratic(prefix, suffix, target)
        scaled = solve(index, quadratic, known[index].scaled(scale))
        norm = float(scaled.norm())
        if norm > 0 and math.isfinite(norm):
            # λ takes the factor's norm, so that normalising changes nothing in the product.
            scale, factors[index] = norm, scaled / norm
        factor = _Factor(factors[index])
        if index < len(factors) - 1:
            prefix, moment = _transposed_congruence(factor, prefix), factor.transposed_times(moment)
        else:
            # Fig. 4, line 9: λ = ⟨W, Ŝ⟩ / ⟨Ŝ, Ŝ⟩ for the product Ŝ of the normalised factors.
            image = quadratic.apply(factor)
            along, curvature = _inner(factor.dense, target), _inner(factor.dense, image)
            if curvature > 0:
                scale = along / curvature
            square = problem.size - 2 * scale * along + scale * scale * curvature
    if square < _CANCELLATION * problem.size:
        return scale, problem.relative_error(scale, factors)
    return scale, _relative(square, problem.size)


class _Descent:
    """Sweeps with one solver after another, remembering the best iterate."""

    def __init__(self, problem: _Problem, scale: float, factors: Sequence[Tensor]) -> None:
        self.problem, self.scale, self.factors = problem, scale, list(factors)
        self.errors: list[float] = []
        self.best = (problem.relative_error(scale, factors), scale, tuple(factors))

    def run(self, solve: _Solver, sweeps: int, tolerance: float) -> None:
        """Sweeps until the error changes relatively by less than the tolerance."""
        before = math.inf
        for _ in range(sweeps):
            self.scale, error = _sweep(self.problem, self.scale, self.factors, solve)
            self.errors.append(error)
            # The union of row-wise and column-wise largest is no exact projection: single sweeps may rise.
            if error < self.best[0]:
                self.best = (error, self.scale, tuple(self.factors))
            wanted = tolerance if error > _EXACT_ERROR else max(tolerance, _EXACT_TOLERANCE)
            if abs(before - error) <= wanted * error:
                break
            before = error

    def rewind(self) -> None:
        """Goes back to the best iterate."""
        _, self.scale, factors = self.best
        self.factors = list(factors)

    def result(self, *, transpose: bool) -> SparseFactorisation:
        """The best iterate, in the orientation of the caller."""
        error, scale, factors = self.best
        if transpose:
            factors = tuple(factor.T.contiguous() for factor in reversed(factors))
        return SparseFactorisation(scale, tuple(factors), error, tuple(self.errors))


def _sparsities(sparsity: int | Sequence[int], factors: int) -> list[int]:
    counts = [sparsity] * factors if isinstance(sparsity, int) else list(sparsity)
    for count in counts:
        checks.integer_between("sparsity", count, 1, None)
    if len(counts) != factors:
        remedy = "pass one whole number, or one for each factor"
        raise ValueError(checks.fault("sparsity", f"of length {factors}", len(counts), remedy))
    return counts


def _identity_start(target: Tensor, factors: int) -> list[Tensor]:
    """Zero for the factor that is updated first and identities for the others, as the paper starts."""
    rows, columns = target.shape
    inner = min(rows, columns)
    sizes = [rows, *[inner] * (factors - 1), columns]
    starts = [
        torch.eye(height, width, dtype=target.dtype, device=target.device)
        for height, width in zip(sizes, sizes[1:], strict=False)
    ]
    starts[0] = torch.zeros_like(starts[0])
    return starts


def _prepare(
    target: Tensor,
    factors: int,
    start: SparseFactorisation | None,
    input_metric: Metric,
    output_metric: Metric,
    right_first: bool | None,
) -> tuple[_Descent, bool]:
    """The descent at its start, in the orientation in which the first factor to be updated stands left."""
    checks.integer_between("factors", factors, 1, None)
    # The outer factor that is not square comes first: as an identity it would cut off part of the target.
    transpose = target.shape[0] < target.shape[1] if right_first is None else right_first
    problem = _Problem.make(target, input_metric, output_metric, transpose=transpose)
    if start is None:
        return _Descent(problem, 1.0, _identity_start(problem.target, factors)), transpose
    if len(start.factors) != factors:
        remedy = "start from a factorisation with as many factors"
        raise ValueError(checks.fault("start", f"of {factors} factors", len(start.factors), remedy))
    given = [factor.to(target) for factor in start.factors]
    if transpose:
        given = [factor.T.contiguous() for factor in reversed(given)]
    return _Descent(problem, start.scale, given), transpose


def palm4msa(
    target: Tensor,
    sparsity: int | Sequence[int],
    factors: int = 2,
    *,
    input_metric: Metric = None,
    output_metric: Metric = None,
    start: SparseFactorisation | None = None,
    iterations: int = 300,
    tolerance: float = 1e-6,
    right_first: bool | None = None,
) -> SparseFactorisation:
    """Factors a matrix into sparse ones by proximal alternating linearised minimisation, as published.

    Args:
        target: W, shape (D, D'), floating.
        sparsity: K of every factor, or one K for each.
        factors: Q ≥ 1; with one the result is W pruned to the pattern, in one step.
        input_metric: Ĝ, shape (D', D') or its diagonal; the identity where None.
        output_metric: H, shape (D, D) or its diagonal; the identity where None.
        start: where to start from; where None, zero for the factor updated first, identities for the others.
        iterations: the largest number of sweeps.
        tolerance: sweeps end when the relative error changes by less, relatively.
        right_first: whether sweeps run from right to left; where None, the longer outer factor comes first.

    Returns:
        The best iterate; the projection is not exact, so that single sweeps may rise.

    Examples:
        >>> diagonal = torch.diag(torch.arange(1.0, 5.0))
        >>> palm4msa(diagonal, sparsity=1, factors=2).error < 1e-6
        True
    """
    counts = _sparsities(sparsity, factors)
    descent, transpose = _prepare(target, factors, start, input_metric, output_metric, right_first)
    descent.run(_LipschitzStep(counts[::-1] if transpose else counts), iterations, tolerance)
    return descent.result(transpose=transpose)


def refit(
    target: Tensor,
    start: SparseFactorisation,
    *,
    input_metric: Metric = None,
    output_metric: Metric = None,
    sweeps: int = 10,
    steps: int = 10,
    tolerance: float = 1e-4,
) -> SparseFactorisation:
    """Improves the values on the supports that the factors have: least squares in one factor after the other.

    Args:
        target: W, shape (D, D').
        start: the factorisation whose supports stay; its zeros remain zeros.
        input_metric: Ĝ, shape (D', D') or its diagonal; the identity where None.
        output_metric: H, shape (D, D) or its diagonal; the identity where None.
        sweeps: the largest number of sweeps.
        steps: steps of conjugate gradients per factor and sweep.
        tolerance: sweeps end when the relative error changes by less, relatively.

    Returns:
        A factorisation that is never worse than the start.
    """
    descent, transpose = _prepare(target, len(start.factors), start, input_metric, output_metric, None)
    supports = [factor != 0 for factor in descent.factors]
    descent.run(
        lambda index, block, factor: _fixed_support(block, factor.dense, supports[index], steps),
        sweeps,
        tolerance,
    )
    return descent.result(transpose=transpose)


def splitting(
    target: Tensor,
    sparsity: int | Sequence[int],
    factors: int = 2,
    *,
    input_metric: Metric = None,
    output_metric: Metric = None,
    start: SparseFactorisation | None = None,
    penalties: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7),
    iterations: int = 30,
    tolerance: float = 1e-3,
    right_first: bool | None = None,
) -> SparseFactorisation:
    """Factors a matrix into sparse ones, with a support search that sees how entries stand in for each other.

    One sweep of alternating directions per penalty, then projected steps of steepest descent's length with
    refits until they no longer pay. From a start only the second part runs, which never rises.

    Args:
        target: W, shape (D, D').
        sparsity: K of every factor, or one K for each.
        factors: Q ≥ 1.
        input_metric: Ĝ, shape (D', D') or its diagonal; the identity where None.
        output_metric: H, shape (D, D) or its diagonal; the identity where None.
        start: where to start from; where None, zero for the factor updated first, identities for the others.
        penalties: ρ of each sweep, in units of the diagonal of A ⊗ B; small ones explore, large ones settle.
        iterations: the largest number of sweeps in the second part.
        tolerance: the second part ends when the relative error changes by less, relatively.
        right_first: whether sweeps run from right to left; where None, the longer outer factor comes first.

    Returns:
        The best iterate.
    """
    counts = _sparsities(sparsity, factors)
    descent, transpose = _prepare(target, factors, start, input_metric, output_metric, right_first)
    counts = counts[::-1] if transpose else counts
    if start is None:
        exploration = _Splitting(counts)
        for penalty in penalties:
            exploration.penalty = penalty
            descent.run(exploration, 1, 0.0)
        descent.rewind()
    descent.run(_SteepestStep(counts), iterations, tolerance)
    return descent.result(transpose=transpose)


def hierarchical(
    target: Tensor,
    sparsity: int,
    factors: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> SparseFactorisation:
    """Factors a matrix by splitting sparse factors off a residual one by one, refitting all in between.

    The residual's sparsity falls geometrically from that of a full matrix to K, which for an n × n matrix,
    K = 2 and log₂ n factors is n/2, n/4, …, 2.

    Args:
        target: W, shape (D, D').
        sparsity: K of every factor.
        factors: Q ≥ 1.
        iterations: the largest number of sweeps of every split and of every refit.
        tolerance: sweeps end when the relative error changes by less, relatively.

    Returns:
        The best iterate of the last refit.

    Source:
        Le Magoarou and Gribonval 2016, Fig. 5.
    """
    _sparsities(sparsity, factors)
    if factors == 1:
        return palm4msa(target, sparsity, 1)
    full, tiny = min(target.shape), torch.finfo(target.dtype).tiny
    whole = SparseFactorisation(float(target.norm()), (target / target.norm().clamp_min(tiny),), 0.0)
    for level in range(1, factors):
        share = level / (factors - 1)
        residual_sparsity = max(sparsity, round(full ** (1 - share) * sparsity**share))
        *peeled, residual = whole.factors
        # Fig. 5, line 3: the residual of the level before becomes a sparse factor times a new residual.
        pair = (sparsity, residual_sparsity)
        split = palm4msa(residual, pair, iterations=iterations, tolerance=tolerance, right_first=True)
        start = SparseFactorisation(whole.scale * split.scale, (*peeled, *split.factors), 0.0)
        # Line 5: all factors so far are refitted to the whole matrix.
        counts = (*[sparsity] * level, residual_sparsity)
        whole = palm4msa(
            target,
            counts,
            level + 1,
            start=start,
            iterations=iterations,
            tolerance=tolerance,
            right_first=True,
        )
    return whole
