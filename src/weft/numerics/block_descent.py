"""Nearest block-structured matrix in a metric that couples the blocks: block coordinate descent.

The matrix is tiled by blocks, each dense or of a given rank. In the metric ‖H^{1/2} (W − Ŵ) G^{1/2}‖_F the
blocks are not independent: what one leaves over, its neighbours can make good. With E = W − Ŵ and the
gradient N = H E G, the best block on rows I and columns J, all others fixed, is the best approximation of
its rank to

    M = Pᵀ B Q + P⁻¹ N_IJ Q⁻ᵀ,      H_II = P Pᵀ,  G_JJ = Q Qᵀ,

in the whitened coordinates Pᵀ B Q: M is where the block would go without the constraint on its rank. Where H
is the identity, the rows of W do not influence each other, and with the right factors fixed all left factors
and dense blocks of some rows follow together from one least squares problem; that joint step after each sweep
halves the number of sweeps.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft import checks
from weft.numerics.block_layout import Factors, Tile
from weft.numerics.svd import truncated_svd

LowRankMethod = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Metric:
    """A positive semidefinite metric and the Cholesky factors of its diagonal blocks.

    Where a block is singular in the metric's precision, its factor is that of a slightly larger metric. A
    step in a larger metric minimises an upper bound of the error that touches it at the present point, so
    descent stays descent.

    Args:
        matrix: The metric, shape (size, size); None for the identity.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self.matrix = matrix
        self._roots: dict[tuple[int, int], Tensor] = {}

    def root(self, part: slice) -> Tensor | None:
        """The lower triangular factor of one diagonal block.

        Args:
            part: The block's range of indices.

        Returns:
            Shape (len(part), len(part)), or None for the identity.
        """
        if self.matrix is None:
            return None
        key = (part.start, part.stop)
        if key not in self._roots:
            block = self.matrix[part, part].to(torch.float64)
            ridge = torch.full_like(block[0], 10 * torch.finfo(self.matrix.dtype).eps)
            ridge *= block.diagonal().max().clamp_min(torch.finfo(torch.float32).tiny)
            factor, fails = torch.linalg.cholesky_ex(block + ridge.diag())
            while fails:
                ridge *= 10.0
                factor, fails = torch.linalg.cholesky_ex(block + ridge.diag())
            self._roots[key] = factor.to(self.matrix.dtype)
        return self._roots[key]


@dataclass(frozen=True)
class Norm:
    """The norm ‖H^{1/2} M G^{1/2}‖_F; by default the Frobenius norm.

    Attributes:
        input: G.
        output: H.
    """

    input: Metric = field(default_factory=lambda: Metric(None))
    output: Metric = field(default_factory=lambda: Metric(None))

    @property
    def couples(self) -> bool:
        """Whether the error in one block depends on that in others."""
        return self.input.matrix is not None or self.output.matrix is not None

    def roots(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """The factors P and Q that whiten a block, None for the identity.

        Args:
            tile: The block.

        Returns:
            P (height, height) and Q (width, width).
        """
        return self.output.root(tile.rows), self.input.root(tile.columns)


def independent_blocks(
    weight: Tensor,
    tiles: Sequence[Tile],
    method: LowRankMethod,
    norm: Norm,
) -> list[Factors]:
    """Fits every block on its own, in its diagonal block of the metric.

    Args:
        weight: W, shape (rows, columns).
        tiles: The blocks.
        method: Gives left (height, rank) and right (rank, width) for a matrix and a rank.
        norm: What to measure the error in.

    Returns:
        The values of every block, low-rank ones with exactly the tile's rank.
    """
    fitted = []
    for tile in tiles:
        block = weight[tile.rows, tile.columns]
        if tile.rank is None:
            fitted.append(Factors(block.clone(), None))
            continue
        row_root, column_root = norm.roots(tile)
        whitened = _whiten(Factors(block, None), row_root, column_root).left
        fitted.append(_unwhiten(_of_rank(whitened, tile.rank, method), row_root, column_root))
    return fitted


def squared_error(weight: Tensor, tiles: Sequence[Tile], factors: Sequence[Factors], norm: Norm) -> float:
    """The squared error tr(H E G Eᵀ).

    Args:
        weight: W, shape (rows, columns).
        tiles: The blocks.
        factors: Their values.
        norm: What to measure the error in.

    Returns:
        The squared error.
    """
    error = _error(weight, tiles, factors)
    gradient = error if norm.input.matrix is None else error @ norm.input.matrix
    gradient = gradient if norm.output.matrix is None else norm.output.matrix @ gradient
    return float((gradient * error).sum(dtype=torch.float64))


def descend(
    weight: Tensor,
    tiles: Sequence[Tile],
    start: Sequence[Factors],
    norm: Norm,
    *,
    exact_first_sweep: bool = True,
    gain: float = 5e-4,
    sweeps: int = 60,
) -> tuple[list[Factors], float]:
    """Improves all blocks together by block coordinate descent, until a sweep no longer pays.

    The first sweep takes each block's best approximation from an SVD. Later ones make one pass of orthogonal
    iteration per block, U = orth(M R̃ᵀ) and R̃ = UᵀM, which lowers the error too and costs a few products with
    the block's factors instead of an SVD.

    Args:
        weight: W, shape (rows, columns).
        tiles: The blocks; a start of another rank is truncated or grown by the first sweep, if that is exact.
        start: Values to start from.
        norm: What to measure the error in; not the Frobenius norm.
        exact_first_sweep: Whether the first sweep uses SVDs.
        gain: Least relative decrease of the error (not squared) that pays for another sweep.
        sweeps: Most sweeps.

    Returns:
        The best values met, and their squared error; never worse than the start if the start has the tiles'
        ranks.

    Raises:
        ValueError: The norm does not couple the blocks, so that there is nothing to improve.
    """
    if norm.input.matrix is None and norm.output.matrix is None:
        remedy = "use independent_blocks"
        raise ValueError(checks.fault("norm", "one that couples the blocks", "the Frobenius norm", remedy))
    if norm.input.matrix is None:
        turned, error = descend(
            weight.mT.contiguous(),
            [Tile(tile.columns, tile.rows, tile.rank) for tile in tiles],
            [_turned(values) for values in start],
            Norm(norm.output, norm.input),
            exact_first_sweep=exact_first_sweep,
            gain=gain,
            sweeps=sweeps,
        )
        return [_turned(values) for values in turned], error
    problem = _Coupled(weight, tiles, norm, list(start))
    error = problem.squared_error()
    fits = all(_rank_of(values) == tile.rank for tile, values in zip(tiles, start, strict=True))
    best, least = list(start), error if fits else float("inf")
    for sweep in range(sweeps):
        for index in range(len(tiles)):
            problem.improve(index, exact=exact_first_sweep and sweep == 0)
        # What is left is computed afresh: rounding in the running gradient must not add up over the sweeps.
        if norm.output.matrix is None:
            problem.refit_left()
        problem.refresh()
        before, error = error, problem.squared_error()
        if error < least:
            best, least = list(problem.factors), error
        if (sweep or fits) and not error < before * (1.0 - gain) ** 2:
            break
    return best, least


class _Coupled:
    """The state of a descent: every block's values, and the gradient they leave.

    With an input metric G there always is `reach`: for every block R G_J:, which its left factor carries into
    the gradient N = H (W G − Ŵ G); for a dense block it is G_J: itself.
    """

    def __init__(self, weight: Tensor, tiles: Sequence[Tile], norm: Norm, factors: list[Factors]) -> None:
        assert norm.input.matrix is not None
        self.weight, self.tiles, self.norm, self.metric = weight, tiles, norm, norm.input.matrix
        self.target = weight @ self.metric
        self.factors = factors
        self.reach = [self._reach(index) for index in range(len(tiles))]
        self.refresh()

    def refresh(self) -> None:
        """Computes the whitened values and the gradient from the factors."""
        self.states = [
            _whiten(values, *self.norm.roots(tile))
            for tile, values in zip(self.tiles, self.factors, strict=True)
        ]
        self.gradient = self.target.clone()
        for tile, values, reach in zip(self.tiles, self.factors, self.reach, strict=True):
            self.gradient[tile.rows].sub_(values.left @ reach)
        if self.norm.output.matrix is not None:
            self.gradient = self.norm.output.matrix @ self.gradient

    def squared_error(self) -> float:
        """tr(N Eᵀ)."""
        error = _error(self.weight, self.tiles, self.factors)
        return float((self.gradient * error).sum(dtype=torch.float64))

    def improve(self, index: int, *, exact: bool) -> None:
        """Improves one block, all others fixed, and moves the gradient: N ← N − H_:I (B_new − B_old) G_J:."""
        tile, old, old_reach = self.tiles[index], self.factors[index], self.reach[index]
        row_root, column_root = self.norm.roots(tile)
        step = _pull(self.gradient[tile.rows, tile.columns], row_root, column_root)
        self.states[index] = _improve(self.states[index], step, tile.rank, exact=exact)
        new = self.factors[index] = _unwhiten(self.states[index], row_root, column_root)
        if new.right is None and old.right is None:
            left, right = new.left - old.left, old_reach
        else:
            self.reach[index] = self._reach(index)
            left, right = torch.cat([new.left, -old.left], 1), torch.cat([self.reach[index], old_reach])
        if self.norm.output.matrix is None:
            self.gradient[tile.rows].sub_(left @ right)
        else:
            self.gradient.sub_((self.norm.output.matrix[:, tile.rows] @ left) @ right)

    def refit_left(self) -> None:
        """Solves for all left factors and dense blocks together, the right factors R fixed, H = I."""
        # Between two neighbouring cuts of the row partition, the rows of Ŵ are combinations X F of the rows F
        # of the right factors there, and of unit vectors for dense blocks: X (F G Fᵀ) = W G Fᵀ.
        lefts = [values.left.clone() for values in self.factors]
        cuts = sorted({cut for tile in self.tiles for cut in (tile.rows.start, tile.rows.stop)})
        for first, last in itertools.pairwise(cuts):
            here = [
                i for i, tile in enumerate(self.tiles) if tile.rows.start <= first and last <= tile.rows.stop
            ]
            depths = [len(self.reach[index]) for index in here]
            if not 0 < sum(depths) <= self.weight.shape[1] // 2:
                continue  # nearly dense rows: the system would cost more than the sweeps it saves
            stacked = torch.cat([self.reach[index] for index in here])
            system = torch.cat([self._onto(stacked, index) for index in here], 1).double()
            right_side = torch.cat([self._onto(self.target[first:last], index) for index in here], 1).double()
            system.diagonal().add_(1e-9 * system.diagonal().mean() + torch.finfo(torch.float32).tiny)
            solution = torch.linalg.solve(system, right_side, left=False).to(self.weight)
            for index, part in zip(here, solution.split(depths, dim=1), strict=True):
                start = self.tiles[index].rows.start
                lefts[index][first - start : last - start] = part
        self.factors = [Factors(left, values.right) for left, values in zip(lefts, self.factors, strict=True)]

    def _reach(self, index: int) -> Tensor:
        """R G_J:."""
        rows, right = self.metric[self.tiles[index].columns], self.factors[index].right
        return rows if right is None else right @ rows

    def _onto(self, matrix: Tensor, index: int) -> Tensor:
        """M_:J Rᵀ."""
        part, right = matrix[:, self.tiles[index].columns], self.factors[index].right
        return part if right is None else part @ right.mT


def _error(weight: Tensor, tiles: Sequence[Tile], factors: Sequence[Factors]) -> Tensor:
    """E = W − Ŵ; all of W where there are no tiles."""
    error = weight.clone()
    for tile, values in zip(tiles, factors, strict=True):
        error[tile.rows, tile.columns] -= values.dense()
    return error


def _turned(values: Factors) -> Factors:
    """The transposed block."""
    if values.right is None:
        return Factors(values.left.mT.contiguous(), None)
    return Factors(values.right.mT.contiguous(), values.left.mT.contiguous())


def _rank_of(values: Factors) -> int | None:
    return None if values.right is None else len(values.right)


def _of_rank(matrix: Tensor, rank: int, method: LowRankMethod) -> Factors:
    """Factors of exactly this rank; zeros stand in where the matrix has no more to give."""
    left, right = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    if rank:
        found_left, found_right = method(matrix, rank)
        left[:, : len(found_right)], right[: len(found_right)] = found_left, found_right
    return Factors(left, right)


def _whiten(values: Factors, row_root: Tensor | None, column_root: Tensor | None) -> Factors:
    """Pᵀ B Q."""
    left = values.left if row_root is None else row_root.mT @ values.left
    if values.right is None:
        return Factors(left if column_root is None else left @ column_root, None)
    return Factors(left, values.right if column_root is None else values.right @ column_root)


def _unwhiten(state: Factors, row_root: Tensor | None, column_root: Tensor | None) -> Factors:
    """P⁻ᵀ M Q⁻¹."""

    def from_columns(matrix: Tensor) -> Tensor:
        if column_root is None:
            return matrix
        return torch.linalg.solve_triangular(column_root, matrix, upper=False, left=False)

    left = state.left
    if row_root is not None:
        left = torch.linalg.solve_triangular(row_root.mT, left, upper=True)
    if state.right is None:
        return Factors(from_columns(left), None)
    return Factors(left, from_columns(state.right))


def _pull(gradient: Tensor, row_root: Tensor | None, column_root: Tensor | None) -> Tensor:
    """P⁻¹ N_IJ Q⁻ᵀ: the step to the unconstrained minimum, in whitened coordinates."""
    if column_root is not None:
        gradient = torch.linalg.solve_triangular(column_root.mT, gradient, upper=True, left=False)
    if row_root is not None:
        gradient = torch.linalg.solve_triangular(row_root, gradient, upper=False)
    return gradient


def _improve(state: Factors, step: Tensor, rank: int | None, *, exact: bool) -> Factors:
    """The best M = state + step of this rank, or one pass of orthogonal iteration towards it."""
    if rank is None:
        return Factors(state.dense() + step, None)
    if rank == 0 or exact or state.right is None:
        return _of_rank(state.dense() + step, rank, truncated_svd)
    left, right = state.left, state.right
    basis = torch.linalg.qr(left @ (right @ right.mT) + step @ right.mT).Q
    return Factors(basis, (basis.mT @ left) @ right + basis.mT @ step)
