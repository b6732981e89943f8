"""Cluster trees of indices, and partitions of a matrix into blocks of clusters.

A cluster tree orders the indices 0 … n − 1 so that every cluster is a contiguous range of the order. A
partition pairs clusters of a row tree with clusters of a column tree, from the roots down, until an
admissibility condition says that a block is one of low rank, or the leaves are reached.

Source: Hackbusch, A sparse matrix arithmetic based on H-matrices, Computing 62 (1999); Hackbusch,
Hierarchical
    Matrices: Algorithms and Analysis, 2015, chapters 5 and 6.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weft import checks

Box = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Cluster:
    """A contiguous range of a tree's order.

    Attributes:
        start: first position.
        stop: one past the last position.
        children: none for a leaf, else two that cover the range.
        box: the least and largest coordinates of the cluster's points; empty tuples where there are none.
    """

    start: int
    stop: int
    children: tuple["Cluster", ...] = ()
    box: Box = ((), ())

    @property
    def size(self) -> int:
        """The number of indices."""
        return self.stop - self.start

    @property
    def diameter(self) -> float:
        """The Euclidean diameter of the bounding box."""
        return math.dist(*self.box)

    def distance(self, other: "Cluster") -> float:
        """The Euclidean distance between two bounding boxes.

        Args:
            other: A cluster with coordinates of the same space.

        Returns:
            The distance; 0 where the boxes meet.
        """
        gaps = (
            max(low - other_high, other_low - high, 0.0)
            for low, high, other_low, other_high in zip(*self.box, *other.box, strict=True)
        )
        return math.hypot(*gaps)

    def leaves(self) -> Iterator["Cluster"]:
        """The leaves below, in order; the cluster itself if it is one.

        Yields:
            Leaves from the first position to the last.
        """
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclass(frozen=True)
class ClusterTree:
    """A tree of clusters and the order of the indices that makes them contiguous.

    Attributes:
        order: permutation of the indices, int64, shape (size,): position p holds index order[p].
        root: the cluster of all positions.
    """

    order: Tensor
    root: Cluster


# Splits a cluster of indices into two non-empty parts, each in the order wanted.
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


def cardinality_tree(size: int, leaf_size: int) -> ClusterTree:
    """Bisection into halves of equal size, keeping the order as it is.

    Args:
        size: Number of indices, at least 1.
        leaf_size: Least size of a leaf, at least 1; a cluster is split while both halves are that large.

    Returns:
        The tree; its boxes are the indices' own places on a line, scaled to [0, 1].

    Examples:
        >>> [leaf.size for leaf in cardinality_tree(10, 2).root.leaves()]
        [3, 2, 3, 2]
    """
    checks.integer_between("size", size, 1, None)
    place = (torch.arange(size, dtype=torch.float64) + 0.5)[:, None] / size

    def halve(indices: Tensor) -> tuple[Tensor, Tensor]:
        middle = (len(indices) + 1) // 2
        return indices[:middle], indices[middle:]

    return _grow(place, leaf_size, halve)


def geometric_tree(points: Tensor, leaf_size: int) -> ClusterTree:
    """Bisection of the bounding box in the middle of its longest side.

    Where a half of the box holds fewer points than a leaf must have, the cut moves to the nearest place that
    leaves enough on both sides, so that coinciding points do no harm.

    Args:
        points: Coordinates, shape (size, dimensions).
        leaf_size: Least size of a leaf, at least 1.

    Returns:
        The tree, with bounding boxes.
    """
    points = _check_points(points)

    def halve(indices: Tensor) -> tuple[Tensor, Tensor]:
        part = points[indices]
        low, high = part.amin(0), part.amax(0)
        axis = int((high - low).argmax())
        ordered, by_axis = part[:, axis].sort(stable=True)
        middle = int((ordered <= (low[axis] + high[axis]) / 2).sum())
        middle = min(max(middle, leaf_size), len(indices) - leaf_size)
        return indices[by_axis[:middle]], indices[by_axis[middle:]]

    return _grow(points, leaf_size, halve)


def principal_tree(points: Tensor, leaf_size: int) -> ClusterTree:
    """Bisection at the median along each cluster's principal direction.

    The sizes are those of `cardinality_tree`, whatever the points are.

    Args:
        points: Coordinates, shape (size, dimensions): places in space, or the rows of a matrix.
        leaf_size: Least size of a leaf, at least 1.

    Returns:
        The tree, with bounding boxes.
    """
    points = _check_points(points)

    def halve(indices: Tensor) -> tuple[Tensor, Tensor]:
        part = points[indices]
        by_projection = _principal_scores(part - part.mean(0)).argsort(stable=True)
        middle = (len(indices) + 1) // 2
        return indices[by_projection[:middle]], indices[by_projection[middle:]]

    return _grow(points, leaf_size, halve)


@dataclass(frozen=True)
class Block:
    """One block of a partition.

    Attributes:
        rows: the cluster of its rows.
        columns: the cluster of its columns.
        admissible: whether it is one of low rank.
    """

    rows: Cluster
    columns: Cluster
    admissible: bool


Admissible = Callable[[Cluster, Cluster], bool]


def strong(eta: float) -> Admissible:
    """Strong admissibility: max(diam(s), diam(t)) <= η dist(s, t).

    Args:
        eta: η > 0; larger values admit larger blocks.

    Returns:
        The condition on a row and a column cluster.
    """
    checks.positive("eta", eta)

    def condition(rows: Cluster, columns: Cluster) -> bool:
        distance = rows.distance(columns)
        return distance > 0 and max(rows.diameter, columns.diameter) <= eta * distance

    return condition


def block_partition(rows: Cluster, columns: Cluster, admissible: Admissible) -> list[Block]:
    """The coarsest partition whose blocks are admissible or pairs that cannot both be split.

    Args:
        rows: Root of the row tree.
        columns: Root of the column tree.
        admissible: The condition.

    Returns:
        Blocks that tile the matrix.
    """
    if admissible(rows, columns):
        return [Block(rows, columns, True)]
    if not (rows.children and columns.children):
        return [Block(rows, columns, False)]
    return [
        block
        for row_child in rows.children
        for column_child in columns.children
        for block in block_partition(row_child, column_child, admissible)
    ]


def off_diagonal_partition(rows: Cluster, columns: Cluster) -> list[Block]:
    """Weak admissibility (HODLR): every pair of unlike children is a block, like ones are split further.

    The trees are descended in step; blocks lie off the diagonal of their parent.

    Args:
        rows: Root of the row tree.
        columns: Root of the column tree.

    Returns:
        Blocks that tile the matrix; the diagonal pairs of leaves are not admissible.

    Source: Hackbusch, Khoromskij and Kriemann, Hierarchical matrices based on a weak admissibility criterion,
        Computing 73 (2004).
    """
    if not (rows.children and columns.children):
        return [Block(rows, columns, False)]
    blocks = []
    for i, row_child in enumerate(rows.children):
        for j, column_child in enumerate(columns.children):
            blocks += (
                off_diagonal_partition(row_child, column_child)
                if i == j
                else [Block(row_child, column_child, True)]
            )
    return blocks


def uniform_partition(rows: Cluster, columns: Cluster) -> list[Block]:
    """Block low rank: every pair of leaves is an admissible block.

    Args:
        rows: Root of the row tree.
        columns: Root of the column tree.

    Returns:
        Blocks that tile the matrix.

    Source: Amestoy et al., Improving multifrontal methods by means of block low-rank representations, SIAM
        J. Sci. Comput. 37 (2015).
    """
    return [
        Block(row_leaf, column_leaf, True) for row_leaf in rows.leaves() for column_leaf in columns.leaves()
    ]


def _grow(points: Tensor, leaf_size: int, split: Split) -> ClusterTree:
    """Splits clusters from the root down while both parts reach the least leaf size."""
    checks.integer_between("leaf_size", leaf_size, 1, None)
    order: list[Tensor] = []

    def cluster(indices: Tensor, start: int) -> Cluster:
        part = points[indices]
        box = (tuple(part.amin(0).tolist()), tuple(part.amax(0).tolist()))
        stop = start + len(indices)
        if len(indices) < 2 * leaf_size:
            order.append(indices)
            return Cluster(start, stop, (), box)
        first, second = split(indices)
        children = (cluster(first, start), cluster(second, start + len(first)))
        return Cluster(start, stop, children, box)

    root = cluster(torch.arange(len(points)), 0)
    return ClusterTree(torch.cat(order), root)


def _check_points(points: Tensor) -> Tensor:
    checks.finite("points", points)
    if points.ndim != 2 or 0 in points.shape:
        expected = "of shape (size, dimensions), no axis empty"
        raise ValueError(checks.fault("points", expected, tuple(points.shape), "pass one row per point"))
    return points.detach().cpu().double()


def _principal_scores(centred: Tensor) -> Tensor:
    """Projections onto the first principal direction, by the smaller of the two Gram matrices."""
    count, dimensions = centred.shape
    if dimensions <= count:
        direction = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
        # The sign is LAPACK's whim; fixing it makes the order repeat.
        return centred @ (direction * torch.sign(direction[direction.abs().argmax()]))
    scores = torch.linalg.eigh(centred @ centred.mT).eigenvectors[:, -1]
    return scores * torch.sign(scores[scores.abs().argmax()])
