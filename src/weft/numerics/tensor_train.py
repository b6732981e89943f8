"""Tensor trains: mode sizes, decomposition, improvement in a weighted norm, and the order of contraction.

A matrix whose row index is (i₁, …, i_d) and whose column index is (j₁, …, j_d), row-major, is the train of
cores G_k of shape (r_{k−1}, m_k, n_k, r_k), r₀ = r_d = 1:

    A(i₁ … i_d, j₁ … j_d) = G₁[i₁, j₁] G₂[i₂, j₂] … G_d[i_d, j_d].

Sources: Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33 (2011); Novikov, Podoprikhin, Osokin
and Vetrov, Tensorizing neural networks, NIPS 2015, eq. (3); Holtz, Rohwedder and Schneider, The alternating
linear scheme for tensor optimization in the tensor train format, SIAM J. Sci. Comput. 34 (2012).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.numerics.svd import truncated_svd

Modes = tuple[tuple[int, int], ...]

# What writing and reading one number of an intermediate result costs, in multiply-adds: measured on
# convolutions of 64 to 512 channels, where with less the chain was chosen where it took longer.
WRITING = 40


# ------------------------------------------------------------------------------------------------------------
# Sizes


@functools.lru_cache(maxsize=4096)
def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """Factors of about equal size whose product is at least a given one, by as little as balance allows.

    Exact where the size has factors of which the largest is at most four times the smallest; else those of
    the next larger size that has, as for a prime.

    Args:
        size: at least 1.
        count: how many factors.

    Returns:
        The factors, largest first.

    Examples:
        >>> balanced_factors(1024, 3), balanced_factors(13, 2), balanced_factors(2, 3)
        ((16, 8, 8), (7, 2), (2, 1, 1))
    """
    while True:
        factors = _factors(size, count)
        if factors[0] <= 4 * factors[-1]:
            return factors
        size += 1


def _factors(size: int, count: int) -> tuple[int, ...]:
    """The exact factorisation with the smallest largest factor."""
    if count == 1:
        return (size,)
    root = size ** (1 / count)
    first = next(factor for factor in range(math.ceil(root - 1e-9), size + 1) if size % factor == 0)
    return tuple(sorted((first, *_factors(size // first, count - 1)), reverse=True))


def balanced_modes(outputs: int, inputs: int, cores: int) -> Modes:
    """Modes with outputs and inputs both split evenly, the larger ones of either at opposite ends.

    Args:
        outputs: rows of the matrix.
        inputs: columns.
        cores: how many cores.

    Returns:
        (m_k, n_k) per core; the products are at least the matrix's sizes.

    Examples:
        >>> balanced_modes(1024, 1024, 4)
        ((8, 4), (8, 4), (4, 8), (4, 8))
    """
    pairs = zip(balanced_factors(outputs, cores), reversed(balanced_factors(inputs, cores)), strict=True)
    return tuple(pairs)


def skewed_modes(outputs: int, inputs: int, cores: int) -> Modes:
    """Modes with cores of about equal size, those of the first half for outputs, of the second for inputs.

    The first half has n_k = 2 and shares the outputs out, the second has m_k = 2 and shares the inputs out.
    For a given rank the cores are as large as with balanced modes; but what lies between the two halves, the
    second being applied first, holds 2^{d/2} 2^{d/2} r numbers, for balanced modes √(M N) r.

    Args:
        outputs: rows of the matrix.
        inputs: columns.
        cores: how many cores.

    Returns:
        (m_k, n_k) per core; the products are at least the matrix's sizes.

    Examples:
        >>> skewed_modes(1024, 1024, 4)
        ((16, 2), (16, 2), (2, 16), (2, 16))
    """
    if cores == 1:
        return ((outputs, inputs),)
    last = cores // 2
    first = cores - last
    rows, twos_out = _halved(outputs, last)
    columns, twos_in = _halved(inputs, first)
    heads = zip(balanced_factors(rows, first), twos_in, strict=True)
    tails = zip(twos_out, reversed(balanced_factors(columns, last)), strict=True)
    return (*heads, *tails)


def _halved(size: int, times: int) -> tuple[int, tuple[int, ...]]:
    """A size halved so often, rounded up, and the twos; ones in their place where it is too small."""
    twos = []
    for _ in range(times):
        twos.append(2 if size >= 4 else 1)
        size = math.ceil(size / twos[-1])
    return size, tuple(sorted(twos, reverse=True))


def bond_limits(modes: Modes) -> tuple[int, ...]:
    """The largest rank that every bond between two cores can have.

    Args:
        modes: (m_k, n_k) per core.

    Returns:
        One number per bond.
    """
    sizes = [rows * columns for rows, columns in modes]
    before = itertools.accumulate(sizes[:-1], int.__mul__)
    after = list(itertools.accumulate(reversed(sizes[1:]), int.__mul__))[::-1]
    return tuple(map(min, before, after))


def bonds(modes: Modes, rank: int) -> tuple[int, ...]:
    """The ranks r₀ … r_d of a train of a maximal rank.

    Args:
        modes: (m_k, n_k) per core.
        rank: the maximal rank.

    Returns:
        One number more than there are cores; 1 at either end.
    """
    return (1, *(min(rank, limit) for limit in bond_limits(modes)), 1)


def core_shapes(modes: Modes, rank: int) -> list[tuple[int, int, int, int]]:
    """The shapes (r_{k−1}, m_k, n_k, r_k) of the cores.

    Args:
        modes: (m_k, n_k) per core.
        rank: the maximal rank.

    Returns:
        One shape per core.
    """
    ranks = bonds(modes, rank)
    return [(ranks[k], *mode, ranks[k + 1]) for k, mode in enumerate(modes)]


# ------------------------------------------------------------------------------------------------------------
# Matrices and trains


def to_train_order(matrix: Tensor, modes: Modes) -> Tensor:
    """A matrix as the tensor with one axis per core.

    Args:
        matrix: shape (Π m_k, Π n_k).
        modes: (m_k, n_k) per core.

    Returns:
        Shape (m₁n₁, …, m_d n_d).
    """
    count = len(modes)
    tensor = matrix.reshape(*(rows for rows, _ in modes), *(columns for _, columns in modes))
    order = [axis for k in range(count) for axis in (k, count + k)]
    return tensor.permute(order).reshape([rows * columns for rows, columns in modes])


def from_train_order(tensor: Tensor, modes: Modes) -> Tensor:
    """Undoes `to_train_order`.

    Args:
        tensor: m₁n₁ · … · m_d n_d numbers in that order.
        modes: (m_k, n_k) per core.

    Returns:
        Shape (Π m_k, Π n_k).
    """
    count = len(modes)
    apart = tensor.reshape([size for mode in modes for size in mode])
    order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
    return apart.permute(order).reshape(math.prod([rows for rows, _ in modes]), -1)


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix of a train, from left to right.

    Args:
        cores: shapes (r_{k−1}, m_k, n_k, r_k).

    Returns:
        Shape (Π m_k, Π n_k).
    """
    product = cores[0].flatten(0, 2)
    for core in cores[1:]:
        product = (product @ core.flatten(1)).reshape(-1, core.shape[3])
    return from_train_order(product, tuple((core.shape[1], core.shape[2]) for core in cores))


def train_svd(
    matrix: Tensor, modes: Modes, rank: int, *, method: str = "svd", generator: torch.Generator | None = None
) -> list[Tensor]:
    """A train of maximal rank R near a matrix, by one truncated SVD per bond (Oseledets 2011, algorithm 1).

    Its error is at most √(d − 1) times that of the nearest one. All cores but the last are left-orthogonal.

    Args:
        matrix: shape (Π m_k, Π n_k), float32 or float64.
        modes: (m_k, n_k) per core.
        rank: the maximal rank.
        method: "svd" or "randomized".
        generator: the source of the random vectors; a fixed seed where None.

    Returns:
        The cores.
    """
    ranks = bonds(modes, rank)
    rest = to_train_order(matrix, modes)
    cores = []
    for k, mode in enumerate(modes[:-1]):
        basis, rest = _split(rest.reshape(ranks[k] * math.prod(mode), -1), ranks[k + 1], method, generator)
        cores.append(basis.reshape(ranks[k], *mode, ranks[k + 1]))
    return [*cores, rest.reshape(ranks[-2], *modes[-1], 1)]


def _split(
    matrix: Tensor, rank: int, method: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of leading left singular vectors, and the matrix in that basis."""
    if rank == matrix.shape[0]:
        return torch.eye(rank, dtype=matrix.dtype, device=matrix.device), matrix
    if rank == matrix.shape[1]:
        basis, rest = torch.linalg.qr(matrix)
        return basis, rest
    if method == "randomized":
        return _randomized_split(matrix, rank, generator or torch.Generator().manual_seed(0))
    left, _ = truncated_svd(matrix, rank)
    basis = torch.linalg.qr(left).Q  # orthonormal even where the matrix has a lower rank
    return basis, basis.T @ matrix


def _randomized_split(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Subspace iteration (Halko et al. 2011, algorithm 4.4) with one power and a third more vectors."""
    # For flat spectra more vectors buy more than more powers. The small matrix is cut by the eigenvectors of
    # its Gram, so that the large one is read four times in all.
    width = min(rank + max(10, rank // 3), *matrix.shape)
    directions = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ directions).Q
    basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    small = basis.T @ matrix
    vectors = torch.linalg.eigh((small @ small.T).double()).eigenvectors[:, -rank:].to(matrix)
    return basis @ vectors, vectors.T @ small


def truncation_errors(matrix: Tensor, modes: Modes, ranks: Sequence[int]) -> list[float]:
    """The squared errors of `train_svd` for many maximal ranks, SVDs that they have in common computed once.

    Args:
        matrix: shape (Π m_k, Π n_k).
        modes: (m_k, n_k) per core.
        ranks: maximal ranks.

    Returns:
        ‖A − Â‖²_F per maximal rank: what the truncations left out, which is orthogonal to what follows.
    """
    kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    tensor = to_train_order(matrix, modes)

    def decomposed(prefix: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Squared singular values and scaled right vectors of the unfolding behind the ranks of a prefix."""
        if prefix not in kept:
            rest = tensor if len(prefix) == 1 else decomposed(prefix[:-1])[1][: prefix[-1]]
            unfolded = rest.reshape(prefix[-1] * math.prod(modes[len(prefix) - 1]), -1)
            left, right = truncated_svd(unfolded, min(unfolded.shape))
            values = left.square().sum(0)  # truncated_svd shares the singular values out evenly
            kept[prefix] = values.square(), values.sqrt()[:, None] * right
        return kept[prefix]

    errors = []
    for rank in ranks:
        sizes = bonds(modes, rank)
        lost = [decomposed(sizes[: k + 1])[0][sizes[k + 1] :].sum() for k in range(len(modes) - 1)]
        errors.append(float(torch.stack(lost).double().sum()) if lost else 0.0)
    return errors


def alternate(
    target: Tensor,
    cores: Sequence[Tensor],
    metric: Callable[[Tensor], Tensor],
    *,
    sweeps: int = 2,
    iterations: int = 4,
    tolerance: float = 1e-3,
) -> list[Tensor]:
    """Improves a train in a weighted norm, one core after the other; the error never grows.

    With the cores before k left-orthogonal and those behind it right-orthogonal, the best core k solves a
    linear least squares problem whose condition is that of the metric (Holtz et al. 2012, section 3). A few
    steps of conjugate gradients from the present core approach it, every one an improvement.

    Args:
        target: the matrix, shape (Π m_k, Π n_k).
        cores: where to start.
        metric: the symmetric positive semidefinite map E ↦ H E Ĝ on matrices of the target's shape.
        sweeps: how often to go through all cores, forwards and backwards in turns.
        iterations: steps of conjugate gradients per core.
        tolerance: sweeps end when one improves the squared error by less than this share.

    Returns:
        The cores.
    """
    modes = tuple((core.shape[1], core.shape[2]) for core in cores)
    train = _right_orthogonal([core.clone() for core in cores])
    count = len(train)
    residual = target - contract(train)
    error = float((residual * metric(residual)).sum())
    rights: list[Tensor] = [torch.empty(0)] * count + [target.new_ones(1, 1)]  # the cores from k on, unfolded
    for k in reversed(range(1, count)):
        rights[k] = _unfold_right(train[k], rights[k + 1])
    lefts: list[Tensor] = [target.new_ones(1, 1)] + [torch.empty(0)] * count  # the cores before k, unfolded
    for sweep in range(sweeps):
        forwards = sweep % 2 == 0
        order = range(count) if forwards else reversed(range(count))
        for k in order:
            train[k] = _solve_core(target, train, modes, k, lefts[k], rights[k + 1], metric, iterations)
            if forwards and k < count - 1:
                basis, rest = torch.linalg.qr(train[k].flatten(0, 2))
                shape = train[k].shape
                train[k] = basis.reshape(*shape[:3], -1)
                train[k + 1] = torch.tensordot(rest, train[k + 1], dims=1)
                lefts[k + 1] = (lefts[k] @ train[k].flatten(1)).reshape(-1, train[k].shape[3])
            elif not forwards and k > 0:
                basis, rest = torch.linalg.qr(train[k].flatten(1).T)
                shape = train[k].shape
                train[k] = basis.T.reshape(-1, *shape[1:])
                train[k - 1] = train[k - 1] @ rest.T
                rights[k] = _unfold_right(train[k], rights[k + 1])
        residual = target - contract(train)
        now = float((residual * metric(residual)).sum())
        if now > error * (1 - tolerance):
            break
        error = now
    return train


def _unfold_right(core: Tensor, behind: Tensor) -> Tensor:
    return (core.flatten(0, 2) @ behind).reshape(core.shape[0], -1)


def _right_orthogonal(cores: list[Tensor]) -> list[Tensor]:
    for k in reversed(range(1, len(cores))):
        shape = cores[k].shape
        basis, rest = torch.linalg.qr(cores[k].flatten(1).T)
        cores[k] = basis.T.reshape(shape)
        cores[k - 1] = cores[k - 1] @ rest.T
    return cores


def _solve_core(
    target: Tensor,
    train: list[Tensor],
    modes: Modes,
    k: int,
    left: Tensor,
    right: Tensor,
    metric: Callable[[Tensor], Tensor],
    iterations: int,
) -> Tensor:
    """Conjugate gradients on LᵀM(L X R)Rᵀ = LᵀM(W)Rᵀ, from the present core."""
    core = train[k]
    middle = math.prod(modes[k])

    def spread(part: Tensor) -> Tensor:
        tensor = (left @ part.reshape(left.shape[1], -1)).reshape(-1, right.shape[0]) @ right
        return from_train_order(tensor, modes)

    def gathered(matrix: Tensor) -> Tensor:
        tensor = to_train_order(matrix, modes).reshape(-1, right.shape[1]) @ right.T
        return (left.T @ tensor.reshape(left.shape[0], middle * right.shape[0])).reshape(core.shape)

    rest = gathered(metric(target - spread(core)))
    direction, size = rest, float(rest.square().sum())
    first = size
    for _ in range(iterations):
        if size <= 1e-12 * first or size == 0:
            break
        image = gathered(metric(spread(direction)))
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        step = size / curvature
        core = core + step * direction
        rest = rest - step * image
        before, size = size, float(rest.square().sum())
        direction = rest + size / before * direction
    return core


# ------------------------------------------------------------------------------------------------------------
# The order of contraction


@dataclass(frozen=True)
class Extent:
    """How many positions per image a train that is a convolution's kernel meets; 1 each for a matrix.

    Attributes:
        before: positions of the input.
        applications: how often the kernel is applied.
        after: positions of the output.
        taps: entries of the kernel's space, all of them in the last core; 0 for a matrix.
    """

    before: int = 1
    applications: int = 1
    after: int = 1
    taps: int = 0


@dataclass(frozen=True)
class Step:
    """One contraction: some neighbouring cores, merged, with what there is of the input so far.

    Attributes:
        first: first core.
        last: the core behind the last one.
        direction: -1 where it goes on to the left of what is done, 1 to the right, 0 for the first step.
        order: the axes of what there is, kept ones first, contracted ones last; axis 0 is the batch's.
        kept: the sizes of the kept axes without the batch.
        contracted: how many numbers are contracted at every position, without the kernel's taps.
        made: the sizes of the new axes, which come last.
        spatial: whether the kernel's space is among the cores.
    """

    first: int
    last: int
    direction: int
    order: tuple[int, ...]
    kept: tuple[int, ...]
    contracted: int
    made: tuple[int, ...]
    spatial: bool


@dataclass(frozen=True)
class Schedule:
    """The order in which a train meets its input.

    Attributes:
        steps: the contractions.
        order: the axes of the last result that make it the output, axis 0 being the batch's.
        taps: entries of the kernel's space.
        cost: multiply-adds and writing together, which is the least for the extent it was made for.
    """

    steps: tuple[Step, ...]
    order: tuple[int, ...]
    taps: int
    cost: int

    def multiply_adds(self, extent: Extent) -> int:
        """Multiply-adds of all steps.

        Args:
            extent: positions, for a convolution.

        Returns:
            Their number per vector, or per image.
        """
        total, positions = 0, extent.before
        for step in self.steps:
            products = math.prod(step.kept) * math.prod(step.made) * step.contracted
            if step.spatial:
                positions = extent.after
                total += products * self.taps * extent.applications
            else:
                total += products * positions
        return total

    def peak(self, extent: Extent) -> int:
        """The most numbers that a step has in memory: what it gets, the same in its order, and what it makes.

        Args:
            extent: positions, for a convolution.

        Returns:
            Their number per vector, or per image.
        """
        most, positions = 0, extent.before
        for step in self.steps:
            given = 2 * math.prod(step.kept) * step.contracted * positions
            positions = extent.after if step.spatial else positions
            most = max(most, given + math.prod(step.kept) * math.prod(step.made) * positions)
        return most


@functools.lru_cache(maxsize=4096)
def schedule(modes: Modes, ranks: tuple[int, ...], extent: Extent) -> Schedule:
    """The cheapest order: from either end or from the middle, neighbouring cores merged where that pays.

    The cores that are done are neighbours at any time, so that a shortest path over the intervals of cores
    finds the order: every step adds a run of neighbouring cores, merged into one, at the left or at the
    right. All cores merged at once would be the dense matrix, and are left out.

    Args:
        modes: (m_k, n_k) per core; where the extent has taps, the last one is (1, taps).
        ranks: r₀ … r_d.
        extent: positions, for a convolution.

    Returns:
        The schedule.
    """
    count = len(modes)
    spatial = count - 1 if extent.taps else -1
    # The cost of the best way to have done the cores from i to j, and its runs in order.
    best: dict[tuple[int, int], tuple[int, tuple[tuple[int, int, int], ...]]] = {}

    def positions(first: int, last: int) -> int:
        return extent.after if first <= spatial < last else extent.before

    def numbers(first: int, last: int) -> int:
        """Numbers per position while the cores from `first` to `last` are done."""
        rest = math.prod(mode[1] for k, mode in enumerate(modes) if not first <= k < last and k != spatial)
        bond = ranks[first] * ranks[last] if first < last else 1
        return rest * bond * math.prod(mode[0] for mode in modes[first:last])

    def offer(old: tuple[int, int], new: tuple[int, int], run: tuple[int, int, int]) -> None:
        first, last, direction = run
        contracted = math.prod(mode[1] for mode in modes[first:last])
        contracted *= {0: 1, 1: ranks[first], -1: ranks[last]}[direction]
        applied = extent.applications if first <= spatial < last else positions(*new)
        writing = numbers(*old) * positions(*old) + numbers(*new) * positions(*new)
        cost, runs = best.get(old, (0, ()))
        cost += numbers(*new) * contracted * applied + WRITING * writing
        if new not in best or cost < best[new][0]:
            best[new] = cost, (*runs, run)

    for length in range(1, count + 1):
        for first in range(count - length + 1):
            last = first + length
            if length < count or count == 1:
                offer((first, first), (first, last), (first, last, 0))
            for inner in range(first + 1, last):
                offer((inner, last), (first, last), (first, inner, -1))
                offer((first, inner), (first, last), (inner, last, 1))
    cost, runs = best[0, count]
    return _laid_out(modes, ranks, spatial, runs, cost)


def _laid_out(
    modes: Modes,
    ranks: tuple[int, ...],
    spatial: int,
    runs: tuple[tuple[int, int, int], ...],
    cost: int,
) -> Schedule:
    """The axes of every step."""
    axes = [("n", k) for k in range(len(modes)) if k != spatial]
    steps = []
    for first, last, direction in runs:
        taken = [("n", k) for k in range(first, last) if k != spatial]
        if direction == 1:
            taken = [("bond", first), *taken]
        elif direction == -1:
            taken = [*taken, ("bond", last)]
        kept = [axis for axis in axes if axis not in taken]
        made = [("m", k) for k in range(first, last)]
        made = [*([("bond", first)] if direction != 1 else []), *made]
        made = [*made, *([("bond", last)] if direction != -1 else [])]

        def size(axis: tuple[str, int]) -> int:
            kind, k = axis
            return ranks[k] if kind == "bond" else modes[k][0 if kind == "m" else 1]

        order = (0, *(1 + axes.index(axis) for axis in (*kept, *taken)))
        steps.append(
            Step(
                first,
                last,
                direction,
                order,
                tuple(map(size, kept)),
                math.prod(map(size, taken)),
                tuple(map(size, made)),
                first <= spatial < last,
            )
        )
        axes = [*kept, *made]
    # Only the m's are left to be put into order: bonds within the train are contracted, the outer ones are 1.
    final = sorted(range(len(axes)), key=lambda place: (axes[place][0] == "bond", axes[place][1]))
    final = (0, *(1 + place for place in final))
    return Schedule(tuple(steps), final, modes[spatial][1] if spatial >= 0 else 0, cost)


def merged(cores: Sequence[Tensor], step: Step) -> Tensor:
    """The cores of a step as one matrix.

    Args:
        cores: all cores of the train.
        step: the step.

    Returns:
        Shape (made, contracted) with all sizes multiplied, or (made, contracted, taps) where the step has the
        kernel's space.
    """
    run = cores[step.first : step.last]
    left, right = run[0].shape[0], run[-1].shape[3]
    product = run[0].flatten(0, 2)
    for core in run[1:]:
        product = (product @ core.flatten(1)).reshape(-1, core.shape[3])
    count = len(run)
    tensor = product.reshape(left, *(size for core in run for size in core.shape[1:3]), right)
    rows, columns = list(range(1, 2 * count, 2)), list(range(2, 2 * count + 1, 2))
    end = 2 * count + 1
    taps = [columns.pop()] if step.spatial else []
    if step.direction == 1:
        order = [*rows, end, 0, *columns, *taps]
    elif step.direction == -1:
        order = [0, *rows, *columns, end, *taps]
    else:
        order = [0, *rows, end, *columns, *taps]
    shape = [math.prod(step.made), step.contracted, *([run[-1].shape[2]] if step.spatial else [])]
    return tensor.permute(order).reshape(shape)
