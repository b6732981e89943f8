r"""Realisation of a matrix as a time-varying mixed system, by balanced reduction of its Hankel blocks.

Rows and columns are divided into p stages of m_k rows and n_k columns. The stages exchange states: causal
ones x_k from the first stage to the last, anticausal ones z_k from the last to the first,

    x_{k+1} = A_k x_k + B_k u_k,    z_{k−1} = E_k z_k + F_k u_k,    y_k = C_k x_k + D_k u_k + G_k z_k,

so that y = W u with W = D + C(I − ZA)⁻¹ZB + G(I − ZᵀE)⁻¹ZᵀF. What earlier inputs do to later outputs
passes through x_k and forms the k-th Hankel block H_k = W[stages ≥ k, stages < k]. Hence the least dimension
of x_k is rank H_k, and a matrix close to W with fewer states comes from low-rank approximations of the Hankel
blocks that fit together.

They fit together by construction here. One pass from the first stage to the last keeps an orthonormal basis
X_k of the rows that x_k carries and the compressed block P_k = H_k X_kᵀ. The next Hankel block loses the rows
of stage k and gains its columns, so only the narrow matrix [P_k without stage k, W[> k, k]] is decomposed;
its leading right singular vectors are [A_k B_k]. The projections are nested, so what the truncations discard
is orthogonal, and

    ‖W − Ŵ‖²_F = Σ_k τ_k² ≤ Σ_k Σ_{i > d_k} σ_i(H_k)²                                                 (1)

exactly, where τ_k is the norm of what is discarded at stage k: compressed blocks have no larger singular
values than H_k itself. The pass costs O(n² d) for stages about as wide as the state. Sweeps of alternating
least squares, at the same cost each, then lower the error further; they never raise it.

The anticausal part is the causal part of the matrix with both orders reversed, and is treated as that.

Source: Dewilde and van der Veen, Time-Varying Systems and Computations (1998), chapters 3, 5 and 9; Kissel
and Diepold, Deep convolutional neural networks with sequentially semiseparable weight matrices, ESANN 2022,
eqs. 1-3.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from weft import checks
from weft.numerics.svd import singular_value_decomposition

# Sweeps stop paying where the truncation has already reached the resolution of the squares it is measured by.
_SWEEP_FLOOR = torch.finfo(torch.float64).eps
# Directions of a metric below this share of the largest are mostly noise of the products that formed it.
_METRIC_FLOOR = 1e-12
# By how much the extrapolation of the weighted descent goes further after each success.
_STRIDE_GROWTH = 1.5


class StateSpace(NamedTuple):
    """One direction of a realisation: stage k's matrices, with empty ones where a stage has no neighbour.

    Attributes:
        transition: A_k of shape (d_{k+1}, d_k), or E_k of shape (d_{k−1}, d_k).
        input: B_k of shape (d_{k+1}, n_k), or F_k of shape (d_{k−1}, n_k).
        output: C_k or G_k, shape (m_k, d_k).
    """

    transition: tuple[Tensor, ...]
    input: tuple[Tensor, ...]
    output: tuple[Tensor, ...]

    def reversed(self) -> "StateSpace":
        """The same matrix entries seen from the other corner: stages, rows and columns in reverse order."""
        return StateSpace(
            self.transition[::-1],
            tuple(block.flip(1) for block in self.input[::-1]),
            tuple(block.flip(0) for block in self.output[::-1]),
        )


@dataclass(frozen=True)
class Realisation:
    """A matrix as a mixed causal and anticausal system.

    Attributes:
        causal: A_k, B_k, C_k.
        direct: D_k, shape (m_k, n_k).
        anticausal: E_k, F_k, G_k.
    """

    causal: StateSpace
    direct: tuple[Tensor, ...]
    anticausal: StateSpace

    @property
    def rows(self) -> tuple[int, ...]:
        """m_k, the number of rows of each stage."""
        return tuple(block.shape[0] for block in self.direct)

    @property
    def columns(self) -> tuple[int, ...]:
        """n_k, the number of columns of each stage."""
        return tuple(block.shape[1] for block in self.direct)

    @property
    def state_dimensions(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Causal and anticausal state dimensions between stages k − 1 and k, for k = 1 … p − 1."""
        return (
            tuple(block.shape[1] for block in self.causal.output[1:]),
            tuple(block.shape[1] for block in self.anticausal.output[:-1]),
        )

    def reversed(self) -> "Realisation":
        """The realisation of the matrix with rows and columns reversed; the directions change places."""
        return Realisation(
            self.anticausal.reversed(),
            tuple(block.flip(0, 1) for block in self.direct[::-1]),
            self.causal.reversed(),
        )

    def scale(self, rows: Tensor | None, columns: Tensor | None) -> "Realisation":
        """The realisation of diag(rows) W diag(columns).

        Args:
            rows: one factor per row, or None for ones.
            columns: one factor per column, or None for ones.

        Returns:
            A realisation with the same states.
        """
        scaled = self
        if rows is not None:
            parts = [part[:, None] for part in rows.split(self.rows)]
            scaled = Realisation(
                scaled.causal._replace(output=_products(parts, scaled.causal.output)),
                _products(parts, scaled.direct),
                scaled.anticausal._replace(output=_products(parts, scaled.anticausal.output)),
            )
        if columns is not None:
            parts = columns.split(self.columns)
            scaled = Realisation(
                scaled.causal._replace(input=_products(parts, scaled.causal.input)),
                _products(parts, scaled.direct),
                scaled.anticausal._replace(input=_products(parts, scaled.anticausal.input)),
            )
        return scaled

    def dense(self) -> Tensor:
        """The matrix (Σ m_k, Σ n_k), from the reachability matrices X_k = [A_{k−1} X_{k−1}, B_{k−1}]."""
        lower, upper = _reachability(self.causal), _reachability(self.anticausal.reversed())[::-1]
        return torch.cat([
            torch.cat([left @ reach, direct, right @ ahead.flip(1)], 1)
            for left, reach, direct, right, ahead in zip(
                self.causal.output, lower, self.direct, self.anticausal.output, upper, strict=True
            )
        ])


def stage_dimensions(size: int, stages: int) -> tuple[int, ...]:
    """Divides rows or columns among the stages as evenly as possible, the longer ones first.

    Args:
        size: number of rows or columns.
        stages: number of stages, at most `size`.

    Returns:
        One positive number per stage.

    Source: Kissel and Diepold 2022, eq. 3.

    Examples:
        >>> stage_dimensions(512, 10)
        (52, 52, 51, 51, 51, 51, 51, 51, 51, 51)
    """
    checks.integer_between("stages", stages, 1, size, of=f"{size} rows or columns")
    quotient, remainder = divmod(size, stages)
    return (quotient + 1,) * remainder + (quotient,) * (stages - remainder)


def state_bounds(rows: Sequence[int], columns: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The largest useful state dimensions: the smaller side of each Hankel block.

    Args:
        rows: m_k.
        columns: n_k.

    Returns:
        Bounds of the causal and the anticausal states between stages k − 1 and k, for k = 1 … p − 1.

    Examples:
        >>> state_bounds((2, 2, 2), (3, 3, 3))
        ((3, 2), (2, 3))
    """
    above, left = _offsets(rows), _offsets(columns)
    boundaries = range(1, len(rows))
    causal = tuple(min(left[k], above[-1] - above[k]) for k in boundaries)
    anticausal = tuple(min(left[-1] - left[k], above[k]) for k in boundaries)
    return causal, anticausal


def realise(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    state_dimensions: tuple[Sequence[int], Sequence[int]] | None = None,
    tolerance: float | None = None,
    sweeps: int = 2,
) -> Realisation:
    """Realises a matrix with given state dimensions, or with as few states as a tolerance asks for.

    The result is balanced (`balance`). Computed in float64; for a float32 weight, singular vectors come from
    Gram matrices, whose resolution of 1.5e-8 of the norm is finer than float32's.

    Args:
        weight: W, shape (Σ m_k, Σ n_k), float32 or float64.
        rows: m_k.
        columns: n_k.
        state_dimensions: causal and anticausal dimensions between stages k − 1 and k; what goes beyond
            `state_bounds` stays empty.
        tolerance: the relative error ‖W − Ŵ‖_F / ‖W‖_F that the result must not exceed.
        sweeps: alternating least-squares sweeps after the truncation; none where a tolerance is given.

    Returns:
        A realisation in the weight's dtype.

    Raises:
        ValueError: unless exactly one of state dimensions and tolerance is given.
    """
    if (state_dimensions is None) == (tolerance is None):
        remedy = "pass one of them"
        raise ValueError(
            checks.fault("state_dimensions or tolerance", "given, one of both", "both or none", remedy)
        )
    accurate = weight.dtype == torch.float64
    exact = weight.to(torch.float64)
    energy = float(exact.square().sum())
    budget = None if tolerance is None else tolerance**2 * energy
    limits = state_bounds(rows, columns) if state_dimensions is None else state_dimensions
    causal, discarded = _reduce(
        exact, rows, columns, limits[0], budget=None if budget is None else budget / 2, accurate=accurate
    )
    mirror = exact.flip(0, 1)
    anticausal, discarded_there = _reduce(
        mirror,
        rows[::-1],
        columns[::-1],
        limits[1][::-1],
        budget=None if budget is None else budget - discarded,
        accurate=accurate,
    )
    if tolerance is None and discarded + discarded_there > _SWEEP_FLOOR * energy:
        for _ in range(sweeps):
            causal = _sweep(exact, rows, columns, causal)
            anticausal = _sweep(mirror, rows[::-1], columns[::-1], anticausal)
    left = _offsets(columns)
    direct = tuple(
        row[:, start:stop]
        for row, (start, stop) in zip(exact.split(list(rows)), itertools.pairwise(left), strict=True)
    )
    realisation = balance(Realisation(causal, direct, anticausal.reversed()), minimal=tolerance is not None)
    return cast(realisation, weight.dtype)


def truncation_error(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    state_dimensions: tuple[Sequence[int], Sequence[int]],
) -> float:
    """The relative error of `realise` before its sweeps, by equation (1), without forming the approximation.

    Args:
        weight: W, shape (Σ m_k, Σ n_k), float32 or float64.
        rows: m_k.
        columns: n_k.
        state_dimensions: causal and anticausal dimensions.

    Returns:
        ‖W − Ŵ‖_F / ‖W‖_F; 0 for a zero matrix.
    """
    accurate = weight.dtype == torch.float64
    exact = weight.to(torch.float64)
    energy = float(exact.square().sum())
    _, below = _reduce(exact, rows, columns, state_dimensions[0], accurate=accurate)
    _, above = _reduce(
        exact.flip(0, 1), rows[::-1], columns[::-1], state_dimensions[1][::-1], accurate=accurate
    )
    return math.sqrt((below + above) / energy) if energy > 0 else 0.0


def balance(realisation: Realisation, *, minimal: bool = False) -> Realisation:
    """Changes the states' coordinates so that reachability and observability Gramians are equal and diagonal.

    Both become diag(σ_i(Ĥ_k)), the Hankel singular values of the realised matrix. In these coordinates every
    transition has norm at most 1: Σ_{k+1}^{1/2} A Σ_k^{-1/2} and Σ_{k+1}^{-1/2} A Σ_k^{1/2} are contractions
    because of the two Lyapunov equations, and A lies half-way between them (Heinz's inequality).

    Args:
        realisation: any realisation.
        minimal: whether states that the matrix does not need are removed.

    Returns:
        A realisation of the same matrix.
    """
    causal = _balance(realisation.causal, minimal)
    anticausal = _balance(realisation.anticausal.reversed(), minimal).reversed()
    return replace(realisation, causal=causal, anticausal=anticausal)


def hankel_singular_values(realisation: Realisation) -> tuple[list[Tensor], list[Tensor]]:
    """The singular values of all Hankel blocks, from the Gramians, without forming a block.

    Args:
        realisation: any realisation.

    Returns:
        One descending vector of length d_k per boundary k = 1 … p − 1, for the causal and the anticausal
        blocks.
    """
    causal = _gramian_factors(_input_normal(realisation.causal))
    anticausal = _gramian_factors(_input_normal(realisation.anticausal.reversed()))
    return [values for values, _ in causal[1:-1]], [values for values, _ in anticausal[1:-1]][::-1]


def cast(realisation: Realisation, dtype: torch.dtype) -> Realisation:
    """The realisation with tensors of another dtype.

    Args:
        realisation: any realisation.
        dtype: the wanted dtype.

    Returns:
        The same system, rounded.
    """

    def converted(space: StateSpace) -> StateSpace:
        return StateSpace(*(tuple(block.to(dtype) for block in role) for role in space))

    direct = tuple(block.to(dtype) for block in realisation.direct)
    return Realisation(converted(realisation.causal), direct, converted(realisation.anticausal))


# ------------------------------------------------------------------------------------------------------------
# The weighted norm


def realise_weighted(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    starts: Sequence[Realisation],
    input_metric: Tensor | None,
    output_metric: Tensor | None,
    passes: int = 16,
    least_gain: float = 2e-3,
) -> Realisation:
    """Realises a matrix in the norm ‖H^{1/2}(W − Ŵ)G^{1/2}‖_F.

    Whitening W by G^{1/2} would destroy the order of stages, so the metric goes into every step instead. The
    best of the starts and of a reduced-rank regression per stage is improved by block coordinate descent: Ŵ
    is affine in the matrices of one stage, whose least-squares problem has a closed form. Each step is exact,
    and an extrapolation along the last two iterates is taken only where it lowers the error, so the result is
    at least as good as each of the starts.

    Args:
        weight: W, shape (Σ m_k, Σ n_k), float32 or float64.
        rows: m_k.
        columns: n_k.
        starts: at least one realisation, such as `realise`'s; all with the same state dimensions.
        input_metric: G, float64, shape (Σ n_k, Σ n_k); the identity where None.
        output_metric: H, float64, shape (Σ m_k, Σ m_k); the identity where None.
        passes: the most passes over the stages, half of them in each direction.
        least_gain: the descent stops where a pass to and fro gains less than this share of the error.

    Returns:
        A balanced realisation in the weight's dtype.
    """
    exact = weight.to(torch.float64)
    if input_metric is None:
        input_metric = torch.eye(exact.shape[1], dtype=torch.float64, device=weight.device)
    candidates = [cast(start, torch.float64) for start in starts]
    dimensions = candidates[0].state_dimensions
    candidates.append(_regressed(exact, rows, columns, dimensions, input_metric, output_metric))
    descents = [_Descent(exact, candidate, input_metric, output_metric) for candidate in candidates]
    descent = min(descents, key=lambda each: each.error)
    initial, initial_error = descent.realisation(), descent.error
    negligible = _SWEEP_FLOOR * _metric_residual(exact, input_metric, output_metric)[1]
    previous, stride = None, 1.0
    for _ in range(0, passes, 2):
        if not descent.error > negligible:
            break
        before = descent.error
        if previous is not None:
            ahead = _extrapolated(descent.realisation(), previous, stride)
            trial = _Descent(exact, ahead, input_metric, output_metric)
            better = trial.error < descent.error
            previous = descent.realisation()
            descent = trial if better else descent
            stride = stride * _STRIDE_GROWTH if better else max(1.0, stride / 2)
        else:
            previous = descent.realisation()
        descent.run_forwards()
        descent.reverse()
        descent.run_forwards()
        descent.reverse()
        # The squared error falls by twice the relative gain of the error.
        if not before - descent.error > 2 * least_gain * descent.error:
            break
    found = balance(descent.realisation())
    # Where the metric is singular, rounding may have carried the tracked error away from the true one.
    true_error = _metric_residual(exact - found.dense(), input_metric, output_metric)[1]
    return cast(found if true_error <= initial_error else balance(initial), weight.dtype)


def _extrapolated(current: Realisation, previous: Realisation, stride: float) -> Realisation:
    """The realisation `stride` times the last change further on."""

    def beyond(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(after + stride * (after - before) for after, before in zip(new, old, strict=True))

    return Realisation(
        StateSpace(*(beyond(*pair) for pair in zip(current.causal, previous.causal, strict=True))),
        beyond(current.direct, previous.direct),
        StateSpace(*(beyond(*pair) for pair in zip(current.anticausal, previous.anticausal, strict=True))),
    )


class _Descent:
    """Block coordinate descent over the stages; keeps the residual's metric image HEG up to date.

    The matrices of stage k form one matrix S that maps (x_k, u_k, z_k) to (x_{k+1}, y_k, z_{k−1}), and
    Ŵ = constant + L S R with the reachability R = [X_k; I_k; X̄_k] of what enters, and the observability
    L = [Y_{k+1}, I_k, Ȳ_{k−1}] of what leaves the stage. For each of the three row parts `a` of S in turn,
    with the columns that this part has, the best change of S is

        ΔS_a = (L_aᵀ H L_a)⁻¹ (L_aᵀ · HEG · R_aᵀ) (R_a G R_aᵀ)⁻¹,    HEG ← HEG − (H L_a) ΔS_a (R_a G),

    with E = W − Ŵ, and the squared error falls by tr(ΔS_aᵀ L_aᵀ · HEG · R_aᵀ).
    """

    def __init__(
        self, weight: Tensor, realisation: Realisation, metric: Tensor, output_metric: Tensor | None
    ) -> None:
        self.metric, self.output_metric = metric, output_metric
        self.residual, self.error = _metric_residual(weight - realisation.dense(), metric, output_metric)
        self._load(realisation)

    def _load(self, realisation: Realisation) -> None:
        self.a, self.b, self.c = (list(role) for role in realisation.causal)
        self.d = list(realisation.direct)
        self.e, self.f, self.g = (list(role) for role in realisation.anticausal)
        self.above, self.left = _offsets(realisation.rows), _offsets(realisation.columns)

    def realisation(self) -> Realisation:
        """The current realisation."""
        return Realisation(
            StateSpace(tuple(self.a), tuple(self.b), tuple(self.c)),
            tuple(self.d),
            StateSpace(tuple(self.e), tuple(self.f), tuple(self.g)),
        )

    def reverse(self) -> None:
        """Turns to the other corner, so that the next pass visits the stages in the other order."""
        self._load(self.realisation().reversed())
        self.metric, self.residual = self.metric.flip(0, 1), self.residual.flip(0, 1)
        if self.output_metric is not None:
            self.output_metric = self.output_metric.flip(0, 1)

    def run_forwards(self) -> None:
        """One pass over the stages from the first to the last."""
        above, left = self.above, self.left
        stages, width = len(self.d), self.metric.shape[0]
        space = self.realisation()
        # X̄_k over the columns right of stage k, and Y_k over the rows from stage k on: not touched before
        # stage k.
        ahead = [reach.flip(1) for reach in _reachability(space.anticausal.reversed())[::-1]]
        observed = _observability(space.causal)
        reach = self.metric.new_zeros(0, width)
        reach_metric = reach
        behind = self.metric.new_zeros(0, 0)  # Ȳ_{k−1} over the rows above stage k
        for k in range(stages):
            here, below = slice(above[k], above[k + 1]), slice(above[k + 1], None)
            columns = slice(left[k], left[k + 1])
            states, inputs = self.a[k].shape[1], left[k + 1] - left[k]
            identity = torch.eye(inputs, dtype=reach.dtype, device=reach.device)
            entering = torch.cat([
                reach,
                _placed(identity, left[k], width),
                _placed(ahead[k], left[k + 1], width),
            ])
            image = torch.cat([reach_metric, self.metric[columns], ahead[k] @ self.metric[left[k + 1] :]])
            gram = entering @ image.T
            change = self._improve(here, None, entering, image, gram)
            parts = change.split([states, inputs, self.e[k].shape[1]], 1)
            self.c[k], self.d[k], self.g[k] = self.c[k] + parts[0], self.d[k] + parts[1], self.g[k] + parts[2]
            if k + 1 < stages:
                used = slice(0, states + inputs)
                change = self._improve(below, observed[k + 1], entering[used], image[used], gram[used, used])
                self.a[k], self.b[k] = self.a[k] + change[:, :states], self.b[k] + change[:, states:]
            if k > 0:
                used = slice(states, None)
                change = self._improve(
                    slice(0, above[k]), behind, entering[used], image[used], gram[used, used]
                )
                self.f[k], self.e[k] = self.f[k] + change[:, :inputs], self.e[k] + change[:, inputs:]
            if k + 1 < stages:
                behind = torch.cat([behind @ self.e[k], self.g[k]])
                reach, reach_metric = self._advance(k, entering, image, states + inputs)

    def _improve(
        self, rows: slice, observed: Tensor | None, entering: Tensor, image: Tensor, gram: Tensor
    ) -> Tensor:
        """The best change of one row part of a stage; `observed` is L_a, the identity where None."""
        residual = self.residual[rows] @ entering.T if observed is None else observed.T @ self.residual[rows]
        gradient = residual if observed is None else residual @ entering.T
        change = _solve(gram, gradient.T).T
        if self.output_metric is not None:
            spread = (
                self.output_metric[:, rows] if observed is None else self.output_metric[:, rows] @ observed
            )
            seen = spread[rows] if observed is None else observed.T @ spread[rows]
            change = _solve(seen, change)
            self.residual -= spread @ (change @ image)
        elif observed is None:
            self.residual[rows] -= change @ image
        else:
            change = _solve(observed.T @ observed, change)
            self.residual[rows] -= observed @ (change @ image)
        self.error -= float((change * gradient).sum())
        return change

    def _advance(self, k: int, entering: Tensor, image: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """X_{k+1} and X_{k+1} G, in coordinates that make X_{k+1} orthonormal in the metric."""
        step = torch.cat([self.a[k], self.b[k]], 1)
        reach, reach_metric = step @ entering[:used], step @ image[:used]
        if not len(reach):
            return reach, reach_metric
        values, vectors = torch.linalg.eigh(reach @ reach_metric.T)
        # States that the metric does not see keep their scale.
        root = torch.where(values > _METRIC_FLOOR * values[-1], values, 1.0).sqrt()
        forth, back = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
        self.a[k], self.b[k] = forth @ self.a[k], forth @ self.b[k]
        self.a[k + 1], self.c[k + 1] = self.a[k + 1] @ back, self.c[k + 1] @ back
        return forth @ reach, forth @ reach_metric


def _regressed(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    state_dimensions: tuple[Sequence[int], Sequence[int]],
    metric: Tensor,
    output_metric: Tensor | None,
) -> Realisation:
    """States chosen by reduced-rank regression, and the outputs regressed on them."""
    image = weight @ metric
    flipped = None if output_metric is None else output_metric.flip(0, 1)
    causal = _predictive_states(image, rows, columns, state_dimensions[0], metric, output_metric)
    anticausal = _predictive_states(
        image.flip(0, 1), rows[::-1], columns[::-1], state_dimensions[1][::-1], metric.flip(0, 1), flipped
    )
    anticausal = anticausal.reversed()
    ahead = [reach.flip(1) for reach in _reachability(anticausal.reversed())[::-1]]
    left, width = _offsets(columns), metric.shape[0]
    outputs = []
    for k, (reach, target) in enumerate(zip(_reachability(causal), image.split(list(rows)), strict=True)):
        identity = torch.eye(columns[k], dtype=metric.dtype, device=metric.device)
        entering = torch.cat([
            _placed(block, start, width)
            for block, start in ((reach, 0), (identity, left[k]), (ahead[k], left[k + 1]))
        ])
        best = _solve(entering @ metric @ entering.T, entering @ target.T).T
        outputs.append(best.split([len(reach), columns[k], len(ahead[k])], 1))
    before, direct, behind = (tuple(role) for role in zip(*outputs, strict=True))
    return Realisation(causal._replace(output=before), direct, anticausal._replace(output=behind))


def _predictive_states(
    image: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    dimensions: Sequence[int],
    metric: Tensor,
    output_metric: Tensor | None,
) -> StateSpace:
    """The causal states that predict the later rows best; the outputs are left empty."""
    # What the later columns tell need not be carried, so it is projected out of states and targets: by a
    # regression with a ridge of their mean variance, for they reach a row only through a narrow state.
    above, left = _offsets(rows), _offsets(columns)
    stages, width = len(rows), metric.shape[0]
    ridge = float(metric.diagonal().mean())
    # Cholesky from the last column upwards: its trailing blocks factor the trailing blocks of the metric.
    reverse = metric.flip(0, 1).clone()
    reverse.diagonal().add_(ridge if ridge > 0 else 1.0)
    factor = torch.linalg.cholesky(reverse).flip(0, 1)
    reach = metric.new_zeros(0, width)
    transition, entry = [], []
    for k in range(stages - 1):
        later = slice(left[k + 1], None)
        identity = torch.eye(columns[k], dtype=metric.dtype, device=metric.device)
        seen = torch.cat([reach, _placed(identity, left[k], width)])
        product = torch.cat([reach @ metric, metric[left[k] : left[k + 1]]])
        whitened = torch.linalg.solve_triangular(factor[later, later], product[:, later].T, upper=True)
        gram = product @ seen.T - whitened.T @ whitened
        explained = torch.linalg.solve_triangular(factor[later, later].T, whitened, upper=False)
        target = image[above[k + 1] :]
        cross = target @ seen.T - target[:, later] @ explained
        values, vectors = torch.linalg.eigh(gram)
        floor = _METRIC_FLOOR * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        whitener = vectors / values.clamp_min(floor).sqrt()
        cross = cross @ whitener
        weighed = cross if output_metric is None else output_metric[above[k + 1] :, above[k + 1] :] @ cross
        _, directions = torch.linalg.eigh(cross.T @ weighed)
        chosen = (whitener @ directions.flip(1)[:, : dimensions[k]]).T
        # Coordinates in which the states are orthonormal keep the products of many stages well scaled.
        _, triangle = torch.linalg.qr((chosen @ seen).T)
        pivots = triangle.diagonal()
        if len(pivots):  # else the state has no dimension
            pivots[pivots.abs() <= _METRIC_FLOOR * pivots.abs().max()] = 1.0  # directions without any column
        step = torch.linalg.solve_triangular(triangle.T, chosen, upper=False)
        step = functional.pad(step, (0, 0, 0, dimensions[k] - len(step)))
        transition.append(step[:, : len(reach)])
        entry.append(step[:, len(reach) :])
        reach = step @ seen
    transition.append(metric.new_zeros(0, len(reach)))
    entry.append(metric.new_zeros(0, columns[-1]))
    empty = (metric.new_zeros(height, step.shape[1]) for height, step in zip(rows, transition, strict=True))
    return StateSpace(tuple(transition), tuple(entry), tuple(empty))


def _metric_residual(error: Tensor, metric: Tensor, output_metric: Tensor | None) -> tuple[Tensor, float]:
    """H E G and the squared error tr(Eᵀ H E G)."""
    image = error @ metric
    if output_metric is not None:
        image = output_metric @ image
    return image, float((error * image).sum())


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """The least-norm solution of a positive semidefinite system, by Cholesky where that is accurate."""
    if not len(gram):
        return right
    factor, fails = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if not fails and bool(pivots.min() > _METRIC_FLOOR * pivots.max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _METRIC_FLOOR * values[-1]
    inverse = torch.where(kept, values, 1.0).reciprocal() * kept
    return vectors @ (inverse[:, None] * (vectors.T @ right))


# ------------------------------------------------------------------------------------------------------------
# One direction


def _reduce(
    weight: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    dimensions: Sequence[int],
    *,
    budget: float | None = None,
    accurate: bool = True,
) -> tuple[StateSpace, float]:
    """The causal part in input-normal form, and the squared norm of what was discarded.

    Args:
        weight: W in float64.
        rows: m_k.
        columns: n_k.
        dimensions: the state dimensions, or upper bounds of them where a budget is given.
        budget: the squared error that may be spent; shared out evenly over the stages that remain.
        accurate: whether singular values below 1.5e-8 of the norm must be right.

    Returns:
        A_k, B_k with [A_k B_k] of orthonormal rows, and C_k; the discarded energy.
    """
    above, left = _offsets(rows), _offsets(columns)
    stages = len(rows)
    carried = weight.new_zeros(len(weight), 0)  # P_k
    transition, entry, output = [], [], []
    discarded = 0.0
    for k in range(stages):
        output.append(carried[: rows[k]])
        if k + 1 == stages:
            break
        block = torch.cat([carried[rows[k] :], weight[above[k + 1] :, left[k] : left[k + 1]]], 1)
        energies, basis = _right_singular_vectors(block, accurate)
        dimension = dimensions[k]
        if budget is not None:
            allowed = (budget - discarded) / (stages - 1 - k)
            tails = energies.flip(0).cumsum(0).flip(0)  # what is lost by keeping the first i
            dimension = min(dimension, int((tails > allowed).sum()))
        discarded += float(energies[dimension:].sum())
        basis = functional.pad(basis[:dimension], (0, 0, 0, max(0, dimension - len(basis))))
        carried_states = carried.shape[1]
        transition.append(basis[:, :carried_states])
        entry.append(basis[:, carried_states:])
        carried = block @ basis.T
    transition.append(weight.new_zeros(0, carried.shape[1]))
    entry.append(weight.new_zeros(0, columns[-1]))
    return StateSpace(tuple(transition), tuple(entry), tuple(output)), discarded


def _right_singular_vectors(block: Tensor, accurate: bool) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and orthonormal right singular vectors as rows."""
    if accurate or block.shape[0] < block.shape[1]:
        _, values, right = singular_value_decomposition(block)
        return values.square(), right
    energies, vectors = torch.linalg.eigh(block.T @ block)
    return energies.flip(0).clamp_min(0), vectors.flip(1).T


def _sweep(weight: Tensor, rows: Sequence[int], columns: Sequence[int], space: StateSpace) -> StateSpace:
    """One alternating least-squares sweep over the causal part, backwards and forwards."""
    # With orthonormal X_k and Y_{k+1} the best matrices of stage k are the projections
    #     A_k = Y_{k+1}ᵀ W[>k, <k] X_kᵀ,    B_k = Y_{k+1}ᵀ W[>k, k],    C_k = W[k, <k] X_kᵀ.
    # Going backwards, C_k and A_k are replaced and Y_k made orthonormal; going forwards, A_k and B_k are
    # replaced and X_{k+1} made orthonormal.
    above, left = _offsets(rows), _offsets(columns)
    stages = len(rows)
    reach = _reachability(space)
    carried = [weight.new_zeros(len(weight), 0)]  # P_k = W[≥k, <k] X_kᵀ
    for k in range(stages - 1):
        fresh = weight[above[k + 1] :, left[k] : left[k + 1]]
        carried.append(carried[k][rows[k] :] @ space.transition[k].T + fresh @ space.input[k].T)
    needed = [weight.new_zeros(0, 0)] * (stages + 1)  # Y_kᵀ W[≥k, <k]
    needed[stages] = weight.new_zeros(0, weight.shape[1])
    for k in range(stages - 1, 0, -1):
        later = needed[k + 1][:, : left[k]]
        basis, _ = _orthogonalise(torch.cat([carried[k][: rows[k]], later @ reach[k].T]))
        needed[k] = (
            basis[: rows[k]].T @ weight[above[k] : above[k + 1], : left[k]] + basis[rows[k] :].T @ later
        )
    transition, entry, output = [], [], [weight.new_zeros(rows[0], 0)]
    states, current = weight.new_zeros(0, 0), carried[0]
    for k in range(stages - 1):
        target = needed[k + 1]
        basis, _ = _orthogonalise(torch.cat([target[:, : left[k]] @ states.T, target[:, left[k] :]], 1).T)
        step = basis.T
        transition.append(step[:, : len(states)])
        entry.append(step[:, len(states) :])
        fresh = weight[above[k + 1] :, left[k] : left[k + 1]]
        current = current[rows[k] :] @ transition[k].T + fresh @ entry[k].T
        output.append(current[: rows[k + 1]])
        states = torch.cat([transition[k] @ states, entry[k]], 1)
    transition.append(weight.new_zeros(0, len(states)))
    entry.append(weight.new_zeros(0, columns[-1]))
    return StateSpace(tuple(transition), tuple(entry), tuple(output))


def _reachability(space: StateSpace) -> list[Tensor]:
    """X_k of shape (d_k, columns before stage k), for all k."""
    reach = [space.input[0].new_zeros(0, 0)]
    for transition, entry in itertools.islice(
        zip(space.transition, space.input, strict=True), len(space.input) - 1
    ):
        reach.append(torch.cat([transition @ reach[-1], entry], 1))
    return reach


def _observability(space: StateSpace) -> list[Tensor]:
    """Y_k of shape (rows from stage k on, d_k), for all k."""
    observed = [space.output[-1].new_zeros(0, 0)]
    for transition, output in zip(reversed(space.transition), reversed(space.output), strict=True):
        observed.append(torch.cat([output, observed[-1] @ transition]))
    return observed[:0:-1]


def _input_normal(space: StateSpace) -> StateSpace:
    """The same causal part in coordinates in which every [A_k B_k] has orthonormal rows."""
    transition, entry, output = [], [], []
    factor = space.output[0].new_zeros(0, 0)  # old state = factor · new state
    for old_transition, old_entry, old_output in zip(*space, strict=True):
        output.append(old_output @ factor)
        basis, triangle = _orthogonalise(torch.cat([old_transition @ factor, old_entry], 1).T)
        states = factor.shape[1]
        transition.append(basis.T[:, :states])
        entry.append(basis.T[:, states:])
        factor = triangle.T
    return StateSpace(tuple(transition), tuple(entry), tuple(output))


def _gramian_factors(space: StateSpace) -> list[tuple[Tensor, Tensor]]:
    """Hankel singular values σ and V with Y_kᵀ Y_k = V σ² Vᵀ for an input-normal causal part, k = 0 … p."""
    empty = space.output[0].new_zeros(0, 0)
    root = empty
    factors = [(empty.new_zeros(0), empty)]
    for transition, output in zip(reversed(space.transition), reversed(space.output), strict=True):
        _, root = _orthogonalise(torch.cat([output, root @ transition]))
        if len(root):
            _, values, right = singular_value_decomposition(root)
            factors.append((values, right.T))
        else:
            factors.append((root.new_zeros(0), root.new_zeros(0, 0)))
    return factors[::-1]


def _balance(space: StateSpace, minimal: bool) -> StateSpace:
    """The causal part in coordinates in which both Gramians are diag(σ)."""
    space = _input_normal(space)
    into, back = [], []
    for values, vectors in _gramian_factors(space):
        # Coordinates below the rounding errors of the largest carry nothing but noise.
        needed = values > torch.finfo(values.dtype).eps * values[:1]
        kept = int(needed.sum()) if minimal else len(values)
        root = (values * needed)[:kept].sqrt()
        inverse = torch.where(root > 0, root, 1.0).reciprocal() * (root > 0)
        into.append(root[:, None] * vectors[:, :kept].T)
        back.append(vectors[:, :kept] * inverse)
    return StateSpace(
        tuple(
            after @ block @ before
            for after, block, before in zip(into[1:], space.transition, back, strict=False)
        ),
        tuple(after @ block for after, block in zip(into[1:], space.input, strict=True)),
        tuple(block @ before for block, before in zip(space.output, back, strict=False)),
    )


def _orthogonalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R with as many columns as the matrix; zero columns of Q stand in where it has fewer rows."""
    basis, triangle = torch.linalg.qr(matrix)
    missing = matrix.shape[1] - basis.shape[1]
    return functional.pad(basis, (0, missing)), functional.pad(triangle, (0, 0, 0, missing))


def _products(factors: Sequence[Tensor], blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(factor * block for factor, block in zip(factors, blocks, strict=True))


def _placed(block: Tensor, start: int, width: int) -> Tensor:
    """The block as columns `start` … of a matrix of zeros that is `width` columns wide."""
    return functional.pad(block, (start, width - start - block.shape[1]))


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each stage begins, and the total."""
    return [0, *itertools.accumulate(sizes)]
