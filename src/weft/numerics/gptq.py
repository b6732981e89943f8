"""Rounding to few levels in the metric of the inputs: error feedback, coordinate descent, levels solved for.

Every entry of W (rows, columns) becomes one of the `Levels` of its row and column. In the metric Ĝ the
choices of one row depend on each other:

1. Error feedback (GPTQ). Column after column is rounded, and the later columns take over what was lost: with
   Ĝ⁻¹ = UᵀU, U upper triangular, the error e of column j moves the later ones by −e U[j, later] / U[j, j].
2. Coordinate descent. With E = W − Ŵ the best value of entry (i, j), all others given, is
   ŵ_ij + (E Ĝ)_ij / Ĝ_jj, and the nearest level to it is the best one.
3. Between sweeps the levels (scales, zeros, codebooks) are solved for by weighted least squares.

Rows without a common codebook are apart from each other, so that each keeps the best of several starts. An
output metric couples them; what the others' errors leave is then part of a row's target.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from weft.numerics.gram import (
    BlockDiagonalGram,
    DiagonalGram,
    Gram,
    inverse_root,
    row_blocks,
    row_root,
    squared_error,
)
from weft.numerics.kmeans import nearest_level

__all__ = [
    "Codebook",
    "Levels",
    "Uniform",
    "descend",
    "quantise",
    "quantise_several",
    "row_errors",
    "round_with_feedback",
    "uniform_levels",
]

_BLOCK = 64
# Rounds of descent for rows whose levels are found already.
_OUTPUT_SWEEPS = 2
# Numbers of the matrices that are worked on at a time, all starts together.
_NUMBERS = 2**23
# Codebooks of more levels are solved for in the metric's diagonal only: a product per level is too much.
_MOST_SOLVED = 32


class Levels(ABC):
    """What entries may become. All tensors have one line per row of the matrix, or one for all."""

    @property
    @abstractmethod
    def shared(self) -> bool:
        """Whether the rows have their levels in common."""

    @abstractmethod
    def snap(self, values: Tensor, column: int) -> Tensor:
        """The nearest levels of one column's values, shape (rows,)."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The codes of the nearest levels, shape (rows, columns), int64."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, shape (rows, columns)."""

    @abstractmethod
    def solve(self, matrix: Tensor, codes: Tensor, metric: Tensor | None) -> Self:
        """The best levels for given codes.

        Args:
            matrix: W, shape (rows, columns).
            codes: shape (rows, columns).
            metric: Ĝ as a matrix, as its diagonal, or None for the identity.

        Returns:
            Levels that are no worse in any row (in sum, where they are shared).
        """

    @abstractmethod
    def rows(self, chosen: Tensor) -> Self:
        """The levels of some of the rows."""

    @abstractmethod
    def concatenate(self, others: Sequence[Any]) -> Self:
        """The levels of these rows, then those of the others' rows; all of one kind."""

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest levels, shape (rows, columns)."""
        return self.decode(self.encode(values))


@dataclass(frozen=True)
class Uniform(Levels):
    """Levels at equal distances: scale · (code − zero), per row and group of neighbouring columns.

    Attributes:
        scales: shape (rows, groups); of either sign.
        zeros: shape (rows, groups).
        count: how many codes, from 0; one number, or one for every row, shape (rows, 1).
        free: whether `solve` may move the zeros.
        columns: the matrix's, which the groups divide equally.
    """

    scales: Tensor
    zeros: Tensor
    count: int | Tensor
    free: bool
    columns: int

    @property
    def shared(self) -> bool:
        return False

    def snap(self, values: Tensor, column: int) -> Tensor:
        group = self._group_of(column)
        count = self.count if isinstance(self.count, int) else self.count[:, 0]
        return _snap(values, self.scales[:, group], self.zeros[:, group], count)

    def _group_of(self, column: int) -> int:
        return column * self.scales.shape[1] // self.columns

    def spread(self, part: Tensor) -> Tensor:
        """Scales or zeros as one number per entry, shape (rows, columns)."""
        return part.repeat_interleave(self.columns // part.shape[1], 1)

    def encode(self, values: Tensor) -> Tensor:
        scales = self.spread(_safe(self.scales))
        return _clipped((values / scales + self.spread(self.zeros)).round_(), self.count).long()

    def decode(self, codes: Tensor) -> Tensor:
        grouped = codes.to(self.scales).unflatten(1, (self.scales.shape[1], -1))
        return ((grouped - self.zeros[..., None]) * self.scales[..., None]).flatten(1)

    def solve(self, matrix: Tensor, codes: Tensor, metric: Tensor | None) -> "Uniform":
        rows, groups = self.scales.shape
        levels = codes.to(matrix).unflatten(1, (groups, -1))
        offset = levels.mean(2) if self.free else self.zeros  # centred, the system is better conditioned
        basis = [levels - offset[..., None]]
        if self.free:
            basis.append(torch.ones_like(levels))
        system, right = _normal_equations([part.flatten(1) for part in basis], groups, matrix, metric)
        solution = _solve(system, right)
        # w ≈ scale · (level − offset) + shift
        scales, shift = _by_basis(solution, groups)
        zeros = self.zeros
        if self.free:
            usable = scales.abs() > torch.finfo(scales.dtype).tiny
            zeros = torch.where(usable, offset - shift / _safe(scales), self.zeros)
            scales = torch.where(usable, scales, self.scales)
        now = _by_basis_inverse(self.scales, self.scales * (offset - self.zeros), right)
        pick = (_value(system, right, solution) < _value(system, right, now))[:, None]
        return replace(
            self, scales=torch.where(pick, scales, self.scales), zeros=torch.where(pick, zeros, self.zeros)
        )

    def rows(self, chosen: Tensor) -> "Uniform":
        count = self.count if isinstance(self.count, int) else self.count[chosen]
        return replace(self, scales=self.scales[chosen], zeros=self.zeros[chosen], count=count)

    def concatenate(self, others: "Sequence[Uniform]") -> "Uniform":
        parts = (self, *others)
        scales, zeros = (torch.cat([getattr(one, name) for one in parts]) for name in ("scales", "zeros"))
        count = self.count
        if any(isinstance(one.count, Tensor) or one.count != count for one in parts):
            count = torch.cat([_count_of_rows(one) for one in parts])
        return replace(self, scales=scales, zeros=zeros, count=count)


def _count_of_rows(levels: Uniform) -> Tensor:
    if isinstance(levels.count, Tensor):
        return levels.count
    return torch.full((len(levels.scales), 1), levels.count, device=levels.scales.device)


def _clipped(places: Tensor, count: int | Tensor) -> Tensor:
    """Clips rounded places to the codes, in place."""
    if isinstance(count, int):
        return places.clamp_(0, count - 1)
    return torch.minimum(places.clamp_(min=0), (count - 1).to(places), out=places)


def _snap(values: Tensor, scales: Tensor, zeros: Tensor, count: int | Tensor) -> Tensor:
    return scales * (_clipped((values / _safe(scales) + zeros).round_(), count) - zeros)


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() > torch.finfo(scales.dtype).tiny, scales, 1.0)


@dataclass(frozen=True)
class Codebook(Levels):
    """Any levels, in increasing order.

    Attributes:
        table: shape (rows, count), or (1, count) for all rows.
        several: whether every row has its own, also where there is only one row.
    """

    table: Tensor
    several: bool = False

    @property
    def shared(self) -> bool:
        return not self.several

    def snap(self, values: Tensor, column: int) -> Tensor:
        if self.shared:
            borders = (self.table[0, 1:] + self.table[0, :-1]) / 2
            return self.table[0][torch.bucketize(values, borders)]
        return self.table.gather(1, nearest_level(values[:, None], self.table))[:, 0]

    def encode(self, values: Tensor) -> Tensor:
        return nearest_level(values, self.table)

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.expand(len(codes), -1).gather(1, codes)

    def solve(self, matrix: Tensor, codes: Tensor, metric: Tensor | None) -> "Codebook":
        rows, count = len(matrix), self.table.shape[1]

        def by_level(values: Tensor) -> Tensor:
            return values.new_zeros(rows, count).scatter_add(1, codes, values)

        if metric is None or metric.ndim == 1 or count > _MOST_SOLVED:
            diagonal = torch.ones_like(matrix) if metric is None else metric.expand_as(matrix)
            if metric is not None and metric.ndim == 2:
                diagonal = metric.diagonal().expand_as(matrix)
            weight, moment = by_level(diagonal), by_level(diagonal * matrix)
            if self.shared:
                weight, moment = weight.sum(0, keepdim=True), moment.sum(0, keepdim=True)
            tiny = torch.finfo(matrix.dtype).tiny
            table = torch.where(weight > tiny, moment / weight.clamp_min(tiny), self.table)
        else:
            system = torch.stack(
                [by_level((codes == level).to(matrix) @ metric) for level in range(count)], dim=2
            )
            # Solved for the change: levels that no entry has stay.
            right = by_level((matrix - self.decode(codes)) @ metric)
            if self.shared:
                system, right = system.sum(0, keepdim=True), right.sum(0, keepdim=True)
            table = self.table + _solve(system, right)
        trial = replace(self, table=table.sort(1).values)
        errors = [
            row_errors(matrix - one.decode(codes), metric) for one in (replace(self, table=table), self)
        ]
        if self.shared:
            return trial if float(errors[0].sum()) < float(errors[1].sum()) else self
        return replace(self, table=torch.where((errors[0] < errors[1])[:, None], trial.table, self.table))

    def rows(self, chosen: Tensor) -> "Codebook":
        return self if self.shared else replace(self, table=self.table[chosen])

    def concatenate(self, others: "Sequence[Codebook]") -> "Codebook":
        return replace(self, table=torch.cat([one.table for one in (self, *others)]))


def row_errors(error: Tensor, metric: Tensor | None) -> Tensor:
    """The squared error of every row.

    Args:
        error: E, shape (rows, columns).
        metric: Ĝ as a matrix, as its diagonal, or None.

    Returns:
        Shape (rows,).
    """
    if metric is None:
        return error.square().sum(1)
    weighed = error * metric if metric.ndim == 1 else error @ metric
    return (weighed * error).sum(1)


def _normal_equations(
    basis: Sequence[Tensor], groups: int, matrix: Tensor, metric: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the best coefficients of every row solve, one coefficient per part of the basis and group.

    Returns:
        (rows, systems, n, n) and (rows, systems, n): one system of all coefficients where the metric couples
        the groups, else one per group.
    """
    rows, columns = matrix.shape

    def by_group(values: Tensor) -> Tensor:
        return torch.stack([(part * values).unflatten(1, (groups, -1)).sum(2) for part in basis], 2)

    if metric is not None and metric.ndim == 2:
        width, images, right = columns // groups, [], []
        for group in range(groups):
            own = slice(group * width, (group + 1) * width)
            for part in basis:
                image = part[:, own] @ metric[own]
                images.append(by_group(image).flatten(1))
                right.append((image * matrix).sum(1))
        return torch.stack(images, 2)[:, None], torch.stack(right, 1)[:, None]
    scaled = matrix.new_ones(columns) if metric is None else metric
    system = torch.stack([by_group(part * scaled) for part in basis], 3)
    return system, by_group(matrix * scaled)


def _by_basis(solution: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Coefficients as (rows, groups) of the first and of the second part of the basis, zeros without one."""
    both = solution.flatten(1).unflatten(1, (groups, -1))
    return both[..., 0], both[..., 1] if both.shape[2] > 1 else torch.zeros_like(both[..., 0])


def _by_basis_inverse(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """The coefficients in the order of the normal equations."""
    parts = [first, second][: like[0].numel() // first.shape[1]]
    return torch.stack(parts, 2).reshape(like.shape)


def _value(system: Tensor, right: Tensor, solution: Tensor) -> Tensor:
    """The squared error of every row but for the constant ‖w‖²."""
    return (((system @ solution[..., None])[..., 0] - 2 * right) * solution).sum((1, 2))


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """Solves positive semidefinite systems, in the limit of a small ridge where they are singular."""
    if system.shape[-1] == 1:
        scale = system[..., 0]
        return torch.where(scale > 0, right / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0)
    wide = system.to(torch.float64)
    size = wide.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    identity = torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device)
    wide = wide + 1e-10 * size[..., None, None] * identity
    solution, fails = torch.linalg.solve_ex(wide, right.to(torch.float64)[..., None])
    return torch.where((fails == 0)[..., None], solution[..., 0], 0).nan_to_num_(0, 0, 0).to(right)


# ------------------------------------------------------------------------------------------------------------
# Choosing


def round_with_feedback(matrix: Tensor, levels: Levels, root: Tensor, order: Tensor | None = None) -> Tensor:
    """Rounds column after column; the later ones take over the error.

    Args:
        matrix: W, shape (rows, columns).
        levels: what entries may become.
        root: U with Ĝ⁻¹ = UᵀU, upper triangular, for the columns in the order given.
        order: which column comes first, second, …; as they stand where None.

    Returns:
        Ŵ, all entries at levels.

    Source: Frantar et al. 2023, Algorithm 1 (blocks of columns, so that most work is matrix products).
    """
    columns = matrix.shape[1]
    places = range(columns) if order is None else order.tolist()
    left = (matrix if order is None else matrix[:, order]).T  # a column's values shall lie together
    left = left.clone(memory_format=torch.contiguous_format)
    rounded = torch.empty_like(left)
    pivots = root.diagonal().tolist()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, own = left[start:stop], root[start:stop, start:stop]
        errors = torch.empty_like(block)
        for index in range(stop - start):
            value = levels.snap(block[index], places[start + index])
            rounded[start + index] = value
            errors[index] = (block[index] - value) / pivots[start + index]
            block[index + 1 :].addr_(own[index, index + 1 :], errors[index], alpha=-1)
        left[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
    result = rounded.T.contiguous()
    if order is None:
        return result
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=order.device)
    return result[:, back]


def descend(
    matrix: Tensor, dense: Tensor, levels: Levels, metric: Tensor, weighed: Tensor | None = None
) -> Tensor:
    """One sweep of coordinate descent over all entries.

    Args:
        matrix: W, shape (rows, columns).
        dense: Ŵ, all entries at levels.
        levels: what entries may become.
        metric: Ĝ, shape (columns, columns).
        weighed: (W − Ŵ) Ĝ where it is known already.

    Returns:
        Ŵ with no larger error in any row.
    """
    current = dense.T.clone(memory_format=torch.contiguous_format)
    if weighed is None:
        weighed = (matrix - dense) @ metric
    weighed = weighed.T.clone(memory_format=torch.contiguous_format)
    curvature = metric.diagonal().clamp_min(torch.finfo(metric.dtype).tiny).tolist()
    for start in range(0, len(current), _BLOCK):
        stop = min(start + _BLOCK, len(current))
        block, own = weighed[start:stop].clone(), metric[start:stop, start:stop]
        before = current[start:stop].clone()
        for index in range(stop - start):
            value = current[start + index]
            chosen = levels.snap(value + block[index] / curvature[start + index], start + index)
            block.addr_(own[index], chosen - value, alpha=-1)
            current[start + index] = chosen
        weighed.addmm_(metric[:, start:stop], current[start:stop] - before, alpha=-1)
    return current.T.contiguous()


Fit = tuple[Tensor, Levels]


def quantise(matrix: Tensor, starts: Sequence[Levels], **options: Any) -> Fit:
    """Codes and levels near a matrix in the weighted norm.

    Args:
        matrix: W, shape (rows, columns), float32 or float64.
        starts: levels to start from; every row keeps what serves it best.
        options: Grams and all else that `quantise_several` takes.

    Returns:
        The codes, int64, shape (rows, columns), and their levels.
    """
    return quantise_several(matrix, [starts], **options)[0]


def quantise_several(
    matrix: Tensor,
    starts: Sequence[Sequence[Levels]],
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    feedback: bool = True,
    by_importance: bool = False,
    solves: bool = True,
    sweeps: int = 8,
    tolerance: float = 2e-3,
) -> list[Fit]:
    """Several quantisations of one matrix, such as in several numbers of bits, in one pass over its columns.

    A pass goes from column to column, and a column of few rows takes as long as one of many.

    Args:
        matrix: W, shape (rows, columns), float32 or float64.
        starts: for every quantisation levels to start from; all of one kind, with as many groups.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        feedback: whether entries are chosen together; else each is rounded to its nearest level.
        by_importance: whether error feedback starts with the columns of largest Ĝ_jj.
        solves: whether levels are solved for; else they stay as given.
        sweeps: the most rounds of coordinate descent and solving.
        tolerance: a row is done once a round lowers its squared error by a smaller share.

    Returns:
        Codes and levels of every quantisation, as `quantise` gives them.
    """
    if isinstance(input_gram, BlockDiagonalGram):
        options = {
            "feedback": feedback,
            "by_importance": by_importance,
            "solves": solves,
            "sweeps": sweeps,
            "tolerance": tolerance,
        }
        return [_by_block(matrix, own, input_gram, options) for own in starts]
    diagonal = None if input_gram is None else input_gram.diagonal().to(matrix)
    metric = root = order = None
    if feedback and input_gram is not None and not isinstance(input_gram, DiagonalGram):
        dense = input_gram.dense()
        order = torch.argsort(dense.diagonal(), descending=True) if by_importance else None
        root = inverse_root(dense if order is None else dense[order][:, order]).to(matrix)
        metric = dense.to(matrix)
    problem = _Problem(diagonal, metric, root, order, solves, sweeps, tolerance)
    if starts[0][0].shared:
        found = [problem.shared(matrix, own) for own in starts]
    else:
        found = problem.apart(matrix, starts)
    # A diagonal output metric weighs the rows, which are apart.
    if output_gram is not None and feedback and not isinstance(output_gram, DiagonalGram):
        found = [_with_output_metric(problem, matrix, *fit, input_gram, output_gram) for fit in found]
    return found


@dataclass(frozen=True)
class _Problem:
    """In which metric levels and codes are chosen, and how long.

    Attributes:
        diagonal: of Ĝ; None for the identity.
        metric: Ĝ where columns are chosen together; None where each entry is rounded by itself.
        root: U with Ĝ⁻¹ = UᵀU, for the columns in their order.
        order: of the columns in error feedback.
        solves: whether levels are solved for.
        sweeps: the most rounds.
        tolerance: the gain below which rounds end.
    """

    diagonal: Tensor | None
    metric: Tensor | None
    root: Tensor | None
    order: Tensor | None
    solves: bool
    sweeps: int
    tolerance: float

    def shared(self, matrix: Tensor, starts: Sequence[Levels]) -> Fit:
        """Codes and levels that all rows have in common."""
        fits = [self._separable(matrix, levels) for levels in starts]
        if self.metric is None or self.root is None:
            return _best(matrix, fits, self.diagonal)
        for levels in starts:
            rounded = round_with_feedback(matrix, levels, self.root, self.order)
            fits.append((levels.encode(rounded), levels))
        return self._improve(matrix, *_best(matrix, fits, self.metric))

    def apart(self, matrix: Tensor, starts: Sequence[Sequence[Levels]]) -> list[Fit]:
        """Codes and levels row by row; all starts of all quantisations stand below each other."""
        copies = [levels for own in starts for levels in own]
        size = max(1, _NUMBERS // (len(copies) * matrix.shape[1]))
        found: list[list[Fit]] = [[] for _ in starts]
        for first in range(0, len(matrix), size):
            chosen = torch.arange(first, min(first + size, len(matrix)), device=matrix.device)
            part = [[levels.rows(chosen) for levels in own] for own in starts]
            for own, fit in zip(found, self._apart(matrix[chosen], part), strict=True):
                own.append(fit)
        return [
            own[0]
            if len(own) == 1
            else (
                torch.cat([codes for codes, _ in own]),
                own[0][1].concatenate([levels for _, levels in own[1:]]),
            )
            for own in found
        ]

    def _apart(self, matrix: Tensor, starts: Sequence[Sequence[Levels]]) -> list[Fit]:
        rows = len(matrix)
        copies = [levels for own in starts for levels in own]
        stacked, tall = copies[0].concatenate(copies[1:]), matrix.repeat(len(copies), 1)
        codes, levels = self._separable(tall, stacked)
        weight = self.diagonal if self.metric is None else self.metric
        errors = row_errors(tall - levels.decode(codes), weight)
        if self.root is not None:
            trial = stacked.encode(round_with_feedback(tall, stacked, self.root, self.order))
            now = row_errors(tall - stacked.decode(trial), weight)
            better = now < errors
            codes[better], errors = trial[better], torch.minimum(now, errors)
            levels = _exchanged(levels, better, stacked)
        winners, first = [], 0
        for own in starts:  # of every quantisation and row the best start
            best = errors[first * rows : (first + len(own)) * rows].reshape(len(own), rows).argmin(0)
            winners.append((first + best) * rows + torch.arange(rows, device=best.device))
            first += len(own)
        picked = torch.cat(winners)
        codes, levels = codes[picked], levels.rows(picked)
        if self.metric is not None:
            codes, levels = self._improve_rows(matrix.repeat(len(starts), 1), codes, levels, self.metric)
        pieces = torch.arange(len(codes), device=codes.device).split(rows)
        return [(codes[piece], levels.rows(piece)) for piece in pieces]

    def _separable(self, matrix: Tensor, levels: Levels) -> Fit:
        """Every entry to its nearest level, levels solved for, in turn."""
        codes = levels.encode(matrix)
        for _ in range(self.sweeps if self.solves else 0):
            levels = levels.solve(matrix, codes, self.diagonal)
            before, codes = codes, levels.encode(matrix)
            if torch.equal(before, codes):
                break
        return codes, levels

    def _improve_rows(self, matrix: Tensor, codes: Tensor, levels: Levels, metric: Tensor) -> Fit:
        """Coordinate descent and solving in turn, for every row as long as it gains."""
        if self.solves:
            levels = levels.solve(matrix, codes, metric)
        left = torch.arange(len(matrix), device=matrix.device)
        own, dense = levels, levels.decode(codes)
        weighed = (matrix - dense) @ metric
        errors = (weighed * (matrix - dense)).sum(1)
        for _ in range(self.sweeps):
            trial = own.encode(descend(matrix, dense, own, metric, weighed))
            moved = own.solve(matrix, trial, metric) if self.solves else own
            dense = moved.decode(trial)
            weighed = (matrix - dense) @ metric
            now = (weighed * (matrix - dense)).sum(1)
            better = now < errors
            codes[left[better]] = trial[better]
            chosen = torch.arange(len(codes), device=codes.device)
            chosen[left[better]] = len(codes) + better.nonzero()[:, 0]
            levels = levels.concatenate([moved]).rows(chosen)
            going = better & (errors - now > self.tolerance * now)
            if not bool(going.any()):
                break
            left, matrix, own = left[going], matrix[going], moved.rows(going.nonzero()[:, 0])
            dense, weighed, errors = dense[going], weighed[going], now[going]
        return codes, levels

    def _improve(self, matrix: Tensor, codes: Tensor, levels: Levels) -> Fit:
        """Coordinate descent and solving in turn, for levels in common."""
        metric = self.metric
        assert metric is not None  # noqa: S101  (who calls this has one)
        if self.solves:
            levels = levels.solve(matrix, codes, metric)
        dense = levels.decode(codes)
        before = float(row_errors(matrix - dense, metric).sum())
        for _ in range(self.sweeps):
            trial = levels.encode(descend(matrix, dense, levels, metric))
            moved = levels.solve(matrix, trial, metric) if self.solves else levels
            now_dense = moved.decode(trial)
            now = float(row_errors(matrix - now_dense, metric).sum())
            if not now < before:
                break
            codes, levels, dense = trial, moved, now_dense
            gain, before = before - now, now
            if gain <= self.tolerance * now:
                break
        return codes, levels


def _exchanged(levels: Levels, exchanged: Tensor, others: Levels) -> Levels:
    """Levels of which some rows are another's."""
    index = torch.arange(len(exchanged), device=exchanged.device)
    return levels.concatenate([others]).rows(torch.where(exchanged, index + len(index), index))


def _best(matrix: Tensor, fits: Sequence[Fit], metric: Tensor | None) -> Fit:
    """Of fits with levels in common the best one."""
    errors = [float(row_errors(matrix - levels.decode(codes), metric).sum()) for codes, levels in fits]
    return fits[errors.index(min(errors))]


def _joined(levels: Sequence[Levels], winner: Tensor) -> Levels:
    """Rows of several levels, those of each in the order in which `winner` names them."""
    place = torch.argsort(torch.argsort(winner, stable=True))
    return levels[0].concatenate(levels[1:]).rows(place)


def _with_output_metric(
    problem: _Problem,
    matrix: Tensor,
    codes: Tensor,
    levels: Levels,
    input_gram: Gram | None,
    output_gram: Gram,
) -> Fit:
    """Error feedback from row to row, then coordinate descent, in both metrics.

    With H = R Rᵀ, R upper triangular, the error is the sum over rows i of ‖(RᵀE)_i‖² in Ĝ, and (RᵀE)_i is
    R_ii e_i + Σ_{k<i} R_ki e_k: every row's target takes up what the ones before it have lost. Rows go in
    blocks, within which they are apart.

    Returns:
        Codes and levels of no larger error.
    """
    best, error = (codes, levels), matrix - levels.decode(codes)
    before = float(squared_error(error, input_gram, output_gram))
    for fit in _feedback_over_rows(problem, matrix, levels, output_gram):
        now = float(squared_error(matrix - fit[1].decode(fit[0]), input_gram, output_gram))
        if now < before:
            best, before = fit, now
    return _descend_over_rows(matrix, *best, input_gram, output_gram)


def _feedback_over_rows(
    problem: _Problem, matrix: Tensor, levels: Levels, output_gram: Gram
) -> Iterator[Fit]:
    if levels.shared or problem.metric is None:
        return
    root = row_root(output_gram).to(matrix)
    lost = torch.zeros_like(matrix)
    fits: list[Fit] = []
    problem = replace(problem, sweeps=min(problem.sweeps, _OUTPUT_SWEEPS))
    for own in row_blocks(len(matrix)):
        own = own.to(matrix.device)
        first, last = int(own[0]), int(own[-1]) + 1
        pull = root[:first, first:last].T @ lost[:first]
        target = matrix[own] + torch.linalg.solve_triangular(
            root[first:last, first:last].T, pull, upper=False
        )
        codes, found = problem.apart(target, [[levels.rows(own)]])[0]
        lost[own] = matrix[own] - found.decode(codes)
        fits.append((codes, found))
    yield torch.cat([codes for codes, _ in fits]), fits[0][1].concatenate([found for _, found in fits[1:]])


def _descend_over_rows(
    matrix: Tensor, codes: Tensor, levels: Levels, input_gram: Gram | None, output_gram: Gram, rounds: int = 1
) -> Fit:
    """Coordinate descent in both metrics.

    With the errors of the other rows given, row i costs H_ii ‖w_i + Σ_{k≠i} H_ik e_k / H_ii − ŵ_i‖² in Ĝ.
    Blocks of rows move together; a block's move that does not help is taken back.

    Returns:
        Codes of no larger error, and the levels as they were.
    """
    rows, columns = matrix.shape
    coupling = output_gram.dense().to(matrix)
    identity = torch.ones(columns, dtype=matrix.dtype, device=matrix.device)
    metric = torch.diag(identity) if input_gram is None else input_gram.dense().to(matrix)
    size = max(1, min(rows, max(32, rows // 8)))
    pivots = coupling.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny)
    dense = levels.decode(codes)
    error = matrix - dense
    before = float(squared_error(error, input_gram, output_gram))
    for _ in range(rounds):
        started = before
        for start in range(0, rows, size):
            own = torch.arange(start, min(start + size, rows))
            pull = coupling[own] @ error / pivots[own, None]
            part = levels.rows(own)
            moved = descend(dense[own] + pull, dense[own], part, metric)
            trial = error.clone()
            trial[own] = matrix[own] - moved
            now = float(squared_error(trial, input_gram, output_gram))
            if now < before:
                error, before = trial, now
                dense = dense.clone()
                dense[own] = moved
        if started - before <= 2e-3 * started:
            break
    return levels.encode(dense), levels


def _by_block(
    matrix: Tensor, starts: Sequence[Levels], gram: BlockDiagonalGram, options: Mapping[str, Any]
) -> Fit:
    """Every part of the rows in its own metric; with shared levels all in the mean metric."""
    # An output metric is left out: it couples rows of different groups, whose errors no Ĝ measures together.
    if starts[0].shared:
        return quantise(matrix, starts, input_gram=gram.average(), **options)
    size = len(matrix) // gram.groups
    fits = []
    for index in range(gram.groups):
        own = torch.arange(index * size, (index + 1) * size)
        part = [levels.rows(own) for levels in starts]
        fits.append(quantise(matrix[own], part, input_gram=gram.block(index), **options))
    winner = torch.arange(gram.groups).repeat_interleave(size)
    return torch.cat([codes for codes, _ in fits]), _joined([levels for _, levels in fits], winner)


# ------------------------------------------------------------------------------------------------------------
# First levels

# Clipping: levels end at such shares of a row's largest entry.
_SHARES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 1.0)


def uniform_levels(
    matrix: Tensor, count: int, groups: int, zero: float | None, weights: Tensor | None = None
) -> Uniform:
    """Uniform levels whose distance is searched for, rounding being plain.

    Args:
        matrix: W, shape (rows, columns).
        count: how many levels.
        groups: into how many groups of neighbours the columns are divided.
        zero: the code that stands for zero; where None, one per row and group, found too.
        weights: of the columns, shape (columns,); equal where None.

    Returns:
        The levels.
    """
    rows, columns = matrix.shape
    parts = matrix.unflatten(1, (groups, -1))
    mass = matrix.new_ones(columns) if weights is None else weights.to(matrix)
    mass = mass.reshape(groups, -1)
    low, high = parts.amin(2), parts.amax(2)
    best = matrix.new_full((rows, groups), torch.inf)
    scales, zeros = torch.zeros_like(best), torch.full_like(best, zero or 0.0)
    for share in _SHARES:
        if zero is None:
            tries = [_between(share * low, share * high, count), _between(share * low, high, count)]
            tries += [_between(low, share * high, count)]
        else:
            below, above = max(zero, 0.5), max(count - 1 - zero, 0.5)
            own = torch.full_like(best, zero)
            fitting = share * torch.maximum(-low / below, high / above)
            tries = [(fitting, own)]
            if below != above:  # the longer side may be the negative one
                tries.append((-share * torch.maximum(high / below, -low / above), own))
        for scale, offset in tries:
            snapped = _snap(parts, scale[..., None], offset[..., None], count)
            error = ((parts - snapped).square() * mass).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, offset, zeros)
    return Uniform(scales, zeros, count, zero is None, columns)


def _between(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros of levels from low to high; of equal ends one level is at them."""
    scale = (high - low) / max(count - 1, 1)
    flat = scale <= torch.finfo(scale.dtype).tiny
    scale = torch.where(flat, torch.where(high == 0, 1.0, high), scale)
    return scale, torch.where(flat, torch.where(high == 0, 0.0, -1.0), -low / scale)
