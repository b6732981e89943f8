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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DiagonalGram, Gram, inverse_root, squared_error
from weft.numerics.kmeans import nearest_level

__all__ = ["Codebook", "Levels", "Uniform", "descend", "quantise", "round_with_feedback", "uniform_levels"]

_BLOCK = 64
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
        count: how many codes, from 0.
        free: whether `solve` may move the zeros.
        columns: the matrix's, which the groups divide equally.
    """

    scales: Tensor
    zeros: Tensor
    count: int
    free: bool
    columns: int

    @property
    def shared(self) -> bool:
        return False

    def snap(self, values: Tensor, column: int) -> Tensor:
        group = self._group_of(column)
        return _snap(values, self.scales[:, group], self.zeros[:, group], self.count)

    def _group_of(self, column: int) -> int:
        return column * self.scales.shape[1] // self.columns

    def spread(self, part: Tensor) -> Tensor:
        """Scales or zeros as one number per entry, shape (rows, columns)."""
        return part.repeat_interleave(self.columns // part.shape[1], 1)

    def encode(self, values: Tensor) -> Tensor:
        scales = self.spread(_safe(self.scales))
        return (values / scales + self.spread(self.zeros)).round_().clamp_(0, self.count - 1).long()

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
        solution = _least_squares([part.flatten(1) for part in basis], groups, matrix, metric)
        scales, shift = solution[:, :groups], solution[:, groups:]
        zeros = self.zeros
        if self.free:
            usable = scales.abs() > torch.finfo(scales.dtype).tiny
            zeros = torch.where(usable, offset - shift / _safe(scales), self.zeros)
            scales = torch.where(usable, scales, self.scales)
        trial = replace(self, scales=scales, zeros=zeros)
        better = row_errors(matrix - trial.decode(codes), metric) < row_errors(
            matrix - self.decode(codes), metric
        )
        pick = better[:, None]
        return replace(
            self, scales=torch.where(pick, scales, self.scales), zeros=torch.where(pick, zeros, self.zeros)
        )

    def rows(self, chosen: Tensor) -> "Uniform":
        return replace(self, scales=self.scales[chosen], zeros=self.zeros[chosen])

    def concatenate(self, others: "Sequence[Uniform]") -> "Uniform":
        scales, zeros = (
            torch.cat([getattr(one, name) for one in (self, *others)]) for name in ("scales", "zeros")
        )
        return replace(self, scales=scales, zeros=zeros)


def _snap(values: Tensor, scales: Tensor, zeros: Tensor, count: int) -> Tensor:
    return scales * ((values / _safe(scales) + zeros).round_().clamp_(0, count - 1) - zeros)


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


def _least_squares(basis: Sequence[Tensor], groups: int, matrix: Tensor, metric: Tensor | None) -> Tensor:
    """Coefficients of every row, one per basis and group: (rows, len(basis) · groups)."""
    rows, columns = matrix.shape

    def by_group(values: Tensor) -> Tensor:
        return torch.cat([(part * values).unflatten(1, (groups, -1)).sum(2) for part in basis], 1)

    if metric is not None and metric.ndim == 2:
        width, images = columns // groups, []
        for part in basis:
            for group in range(groups):
                own = slice(group * width, (group + 1) * width)
                images.append(by_group(part[:, own] @ metric[own]))
        return _solve(torch.stack(images, 2), by_group(matrix @ metric))
    scaled = matrix.new_ones(columns) if metric is None else metric
    images = []
    for part in basis:  # groups are apart: one small system each
        columnwise = by_group(part * scaled).unflatten(1, (len(basis), groups))
        images.append(columnwise)
    system = torch.stack(images, 2).permute(0, 3, 1, 2)  # (rows, groups, basis, basis)
    right = by_group(matrix * scaled).unflatten(1, (len(basis), groups)).transpose(1, 2)
    return _solve(system, right).transpose(1, 2).flatten(1)


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


def descend(matrix: Tensor, dense: Tensor, levels: Levels, metric: Tensor) -> Tensor:
    """One sweep of coordinate descent over all entries.

    Args:
        matrix: W, shape (rows, columns).
        dense: Ŵ, all entries at levels.
        levels: what entries may become.
        metric: Ĝ, shape (columns, columns).

    Returns:
        Ŵ with no larger error in any row.
    """
    current = dense.T.clone(memory_format=torch.contiguous_format)
    weighed = metric @ (matrix - dense).T
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


def quantise(
    matrix: Tensor,
    starts: Sequence[Levels],
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    feedback: bool = True,
    by_importance: bool = False,
    solves: bool = True,
    sweeps: int = 8,
    tolerance: float = 2e-3,
) -> tuple[Tensor, Levels]:
    """Codes and levels near a matrix in the weighted norm.

    Args:
        matrix: W, shape (rows, columns), float32 or float64.
        starts: levels to start from; every row keeps what serves it best.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        feedback: whether entries are chosen together; else each is rounded to its nearest level.
        by_importance: whether error feedback starts with the columns of largest Ĝ_jj.
        solves: whether levels are solved for; else they stay as given.
        sweeps: the most rounds of coordinate descent and solving.
        tolerance: stops where a round lowers the squared error by a smaller share.

    Returns:
        The codes, int64, shape (rows, columns), and their levels.
    """
    if isinstance(input_gram, BlockDiagonalGram):
        return _by_block(matrix, starts, input_gram, output_gram, feedback, by_importance, solves, sweeps)
    diagonal = None if input_gram is None else input_gram.diagonal().to(matrix)
    fits = [_separable(matrix, levels, diagonal, solves, sweeps) for levels in starts]
    if input_gram is None or isinstance(input_gram, DiagonalGram) or not feedback:
        best = _best(matrix, fits, diagonal)
    else:
        dense = input_gram.dense()
        order = torch.argsort(dense.diagonal(), descending=True) if by_importance else None
        root = inverse_root(dense if order is None else dense[order][:, order]).to(matrix)
        metric = dense.to(matrix)
        rounded = [round_with_feedback(matrix, levels, root, order) for levels in starts]
        pairs = [(levels.encode(part), levels) for part, levels in zip(rounded, starts, strict=True)]
        best = _best(matrix, [*fits, *pairs], metric)
        best = _improve(matrix, *best, metric, solves, sweeps, tolerance)
    if output_gram is not None and feedback:
        best = _with_output_metric(matrix, *best, input_gram, output_gram)
    return best


Fit = tuple[Tensor, Levels]


def _separable(matrix: Tensor, levels: Levels, diagonal: Tensor | None, solves: bool, sweeps: int) -> Fit:
    """Every entry to its nearest level, levels solved for, in turn."""
    codes = levels.encode(matrix)
    for _ in range(sweeps if solves else 0):
        levels = levels.solve(matrix, codes, diagonal)
        before, codes = codes, levels.encode(matrix)
        if torch.equal(before, codes):
            break
    return codes, levels


def _best(matrix: Tensor, fits: Sequence[Fit], metric: Tensor | None) -> Fit:
    """Of every row the best fit; of shared levels the best one."""
    errors = torch.stack([row_errors(matrix - levels.decode(codes), metric) for codes, levels in fits])
    if fits[0][1].shared:
        return fits[int(errors.sum(1).argmin())]
    winner = errors.argmin(0)
    codes, levels = torch.empty_like(fits[0][0]), []
    for index, (own, _) in enumerate(fits):
        codes[winner == index] = own[winner == index]
    for index, (_, own) in enumerate(fits):
        levels.append(own.rows(winner == index))
    return codes, _joined(levels, winner)


def _joined(levels: Sequence[Levels], winner: Tensor) -> Levels:
    """Rows of several levels, those of each in the order in which `winner` names them."""
    place = torch.argsort(torch.argsort(winner, stable=True))
    return levels[0].concatenate(levels[1:]).rows(place)


def _improve(
    matrix: Tensor,
    codes: Tensor,
    levels: Levels,
    metric: Tensor,
    solves: bool,
    sweeps: int,
    tolerance: float,
) -> Fit:
    """Coordinate descent and solving in turn."""
    if solves:
        levels = levels.solve(matrix, codes, metric)
    dense = levels.decode(codes)
    before = float(row_errors(matrix - dense, metric).sum())
    for _ in range(sweeps):
        trial = levels.encode(descend(matrix, dense, levels, metric))
        moved = levels.solve(matrix, trial, metric) if solves else levels
        now_dense = moved.decode(trial)
        now = float(row_errors(matrix - now_dense, metric).sum())
        if not now < before:
            break
        codes, levels, dense = trial, moved, now_dense
        gain, before = before - now, now
        if gain <= tolerance * now:
            break
    return codes, levels


def _with_output_metric(
    matrix: Tensor, codes: Tensor, levels: Levels, input_gram: Gram | None, output_gram: Gram, rounds: int = 3
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
    matrix: Tensor,
    starts: Sequence[Levels],
    gram: BlockDiagonalGram,
    output_gram: Gram | None,
    feedback: bool,
    by_importance: bool,
    solves: bool,
    sweeps: int,
) -> Fit:
    """Every part of the rows in its own metric; with shared levels all in the mean metric."""
    options = {"feedback": feedback, "by_importance": by_importance, "solves": solves, "sweeps": sweeps}
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
