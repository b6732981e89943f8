"""Hierarchical matrices: a tree of blocks, most of low rank, some dense.

Rows and columns are ordered by a cluster tree each, and an admissibility condition partitions the matrix
into blocks of clusters. Admissible blocks are stored as two factors, or, where that saves enough, as some of
their own columns and the combinations that give the others; one whose factors would need as many numbers as
the block itself is stored dense, as are the blocks that are not admissible.

In the plain norm every block is fitted on its own. A Gram couples them, so a weighted fit starts from the
better of the plain blocks and the blocks fitted in their own part of the metric, and goes on by block
coordinate descent.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.block_sequence import Program, Segment, Space, Step, block_sequence_apply, write_program
from weft.numerics.aca import adaptive_cross_approximation
from weft.numerics.block_descent import (
    LowRankMethod,
    Metric,
    Norm,
    descend,
    independent_blocks,
    squared_error,
)
from weft.numerics.block_layout import (
    BlockLayout,
    Factors,
    Stack,
    Tile,
    batched_products,
    batches,
    stored_numbers,
)
from weft.numerics.cluster_tree import (
    Block,
    Cluster,
    ClusterTree,
    block_partition,
    cardinality_tree,
    geometric_tree,
    off_diagonal_partition,
    principal_tree,
    strong,
    uniform_partition,
)
from weft.numerics.gram import squared_error as true_squared_error
from weft.numerics.rank_revealing_qr import rank_revealing_qr
from weft.numerics.svd import rank_at_tolerance, singular_values, truncated_svd
from weft.structures.base import (
    BlockDiagonalGram,
    Candidate,
    Cost,
    DiagonalGram,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    ladder,
    matrix_multiply_adds,
    matrix_shape,
)

ADMISSIBILITIES = ("weak", "strong", "uniform", "adaptive")
CLUSTERINGS = ("cardinality", "geometric", "principal", "automatic")
METHODS: Mapping[str, LowRankMethod] = {
    "svd": truncated_svd,
    "aca": adaptive_cross_approximation,
    "aca_full": lambda matrix, rank: adaptive_cross_approximation(matrix, rank, pivoting="full"),
    "rrqr": rank_revealing_qr,
}
# Coordinates of rows and columns for principal clustering: their leading singular vectors, scaled. Strong
# admissibility needs few, or no two clusters are ever far apart.
_COORDINATES = 16
_COORDINATES_STRONG = 3


@dataclass(frozen=True)
class Hierarchical(Structure):
    """Matrices of low-rank and dense blocks over two cluster trees.

    Args:
        rank: Rank of every low-rank block; the largest one allowed where there is a tolerance too.
        tolerance: Relative accuracy of every low-rank block in the Frobenius norm; ranks then depend on the
            weight.
        leaf_size: Least number of rows and of columns of a leaf; a cluster is split while both halves are
            that large.
        admissibility: "weak" (HODLR: every off-diagonal pair of siblings), "strong" (max(diam) <= η dist),
            "uniform" (block low rank: every pair of leaves), "adaptive" (the cheapest partition at the
            tolerance).
        eta: η of the strong condition.
        clustering: How rows and columns are ordered: "cardinality" (as they are, halved), "geometric" (by
            places on a grid), "principal" (by their leading singular vectors), "automatic" (the one that
            serves best).
        method: How a block's factors are found: "svd", "rrqr", "aca" or "aca_full" (partial and full
            pivoting).
        row_grid: The grid that the rows lie on, such as (28, 28) for pixels; a line where None.
        column_grid: The grid that the columns lie on.

    Raises:
        ValueError: Neither rank nor tolerance is given, or a value is out of bounds.

    Examples:
        >>> Hierarchical(rank=30).parameter_count((1000, 512))
        192880
    """

    source: ClassVar[str] = "Hackbusch 1999; Bebendorf 2000 (ACA); Amestoy et al. 2015 (block low rank)"

    rank: int | None = None
    tolerance: float | None = None
    leaf_size: int = 64
    admissibility: str = "weak"
    eta: float = 1.0
    clustering: str = "cardinality"
    method: str = "svd"
    row_grid: tuple[int, ...] | None = None
    column_grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.tolerance is None:
            raise ValueError(
                checks.fault("rank or tolerance", "given", "neither", "pass rank=... or tolerance=...")
            )
        if self.rank is not None:
            checks.integer_between("rank", self.rank, 1, None)
        if self.tolerance is not None:
            checks.share("tolerance", self.tolerance)
        checks.integer_between("leaf_size", self.leaf_size, 1, None)
        checks.one_of("admissibility", self.admissibility, ADMISSIBILITIES)
        checks.positive("eta", self.eta)
        checks.one_of("clustering", self.clustering, CLUSTERINGS)
        checks.one_of("method", self.method, METHODS)
        for name, grid in (("row_grid", self.row_grid), ("column_grid", self.column_grid)):
            for extent in grid or ():
                checks.integer_between(name, extent, 1, None)
        if self.admissibility == "adaptive" and self.tolerance is None:
            remedy = "pass tolerance=... or another admissibility"
            raise ValueError(checks.fault("tolerance", "given for adaptive admissibility", None, remedy))

    # -- sizes

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        ladders = [
            [
                dataclasses.replace(family, rank=rank)
                for rank in ladder(1, min(matrix_shape(shape)), ratio=1.5)
            ]
            for family in cls._variants(shape)
        ]
        dense = math.prod(matrix_shape(shape))
        sized = [(member.parameter_count(shape) or 0, member) for member in itertools.chain(*ladders)]
        for size, structure in sorted(sized, key=lambda pair: pair[0]):
            if size < dense:
                yield structure

    @classmethod
    def _variants(cls, shape: Shape) -> list[Self]:
        """The partitions worth trying: about eight leaves on the shorter side, weak and uniform."""
        leaf_size = max(4, min(matrix_shape(shape)) // 8)
        return [cls(rank=1, leaf_size=leaf_size, admissibility=name) for name in ("weak", "uniform")]

    def parameter_count(self, shape: Shape) -> int | None:
        tiles = self._predicted_tiles(shape)
        return None if tiles is None else stored_numbers(tiles)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        numbers = self.parameter_count(shape)
        return None if numbers is None else matrix_multiply_adds(numbers, shape, geometry)

    def predicted_cost(self, shape: Shape, element_size: int, geometry: Geometry | None = None) -> Cost:
        cost = super().predicted_cost(shape, element_size, geometry)
        masks = BlockLayout(self._predicted_tiles(shape) or []).mask_bytes()
        return dataclasses.replace(cost, bytes=cost.bytes + masks)

    def check(self, shape: Shape) -> None:
        rows, columns = matrix_shape(shape)
        if self.rank is not None:
            checks.integer_between("rank", self.rank, 1, min(rows, columns), of=f"a {tuple(shape)} weight")
        for name, grid, size in (
            ("row_grid", self.row_grid, rows),
            ("column_grid", self.column_grid, columns),
        ):
            if grid is not None and math.prod(grid) != size:
                remedy = "give the grid's extent along each axis"
                raise ValueError(checks.fault(name, f"a grid of {size} points", grid, remedy))

    def _predicted_tiles(self, shape: Shape) -> list[Tile] | None:
        """The blocks and ranks where they follow from the shape alone, else None."""
        self.check(shape)
        by_content = self.clustering == "geometric" or (
            self.clustering != "cardinality" and (self.admissibility == "strong" or self._has_grid())
        )
        if self.tolerance is not None or by_content:
            return None
        rows, columns = matrix_shape(shape)
        # A principal tree has the sizes of a cardinality tree: both halve.
        trees = cardinality_tree(rows, self.leaf_size), cardinality_tree(columns, self.leaf_size)
        return [_tile(block, self.rank) for block in self._partition(*trees)]

    # -- partitions

    def _partition(self, rows: ClusterTree, columns: ClusterTree) -> list[Block]:
        match self.admissibility:
            case "weak":
                return off_diagonal_partition(rows.root, columns.root)
            case "strong":
                return block_partition(rows.root, columns.root, strong(self.eta))
            case _:
                return uniform_partition(rows.root, columns.root)

    def _trees(self, weight: Tensor, clustering: str) -> tuple[ClusterTree, ClusterTree]:
        rows, columns = weight.shape
        match clustering:
            case "geometric":
                points = _grid(self.row_grid or (rows,)), _grid(self.column_grid or (columns,))
                return self._trees_of_points(*points, clustering)
            case "principal":
                return self._trees_of_points(*self._embedding(weight), clustering)
            case _:
                return cardinality_tree(rows, self.leaf_size), cardinality_tree(columns, self.leaf_size)

    def _trees_of_points(
        self, row_points: Tensor, column_points: Tensor, clustering: str
    ) -> tuple[ClusterTree, ClusterTree]:
        grow = geometric_tree if clustering == "geometric" else principal_tree
        return grow(row_points, self.leaf_size), grow(column_points, self.leaf_size)

    def _embedding(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns as points of one space: U S^{1/2} and V S^{1/2}, truncated."""
        wanted = _COORDINATES_STRONG if self.admissibility == "strong" else _COORDINATES
        left, right = truncated_svd(weight, min(wanted, *weight.shape))
        return left, right.mT

    def _tiles(self, problem: "_Problem", rows: ClusterTree, columns: ClusterTree) -> list[Tile]:
        """The blocks of an ordered weight, with their ranks."""

        def rank_of(row_cluster: Cluster, column_cluster: Cluster) -> int:
            return self._rank_at_tolerance(problem, row_cluster, column_cluster)

        if self.admissibility == "adaptive":
            return self._cheapest(rows.root, columns.root, rank_of)[1]
        blocks = self._partition(rows, columns)
        if self.tolerance is None:
            return [_tile(block, self.rank) for block in blocks]
        return [
            _tile(block, rank_of(block.rows, block.columns) if block.admissible else None) for block in blocks
        ]

    def _rank_at_tolerance(self, problem: "_Problem", rows: Cluster, columns: Cluster) -> int:
        """The block's numerical rank, at most `rank`."""
        # Of the plain weight: a Gram improves the values of the same blocks, it does not change what is
        # stored.
        block = problem.plain[rows.start : rows.stop, columns.start : columns.stop]
        tolerance = self.tolerance or 0.0
        match self.method:
            case "svd":
                rank = rank_at_tolerance(singular_values(block), tolerance)
            case "rrqr":
                rank = rank_revealing_qr(block, tolerance=tolerance)[0].shape[1]
            case _:
                pivoting = "full" if self.method == "aca_full" else "partial"
                rank = adaptive_cross_approximation(block, tolerance=tolerance, pivoting=pivoting)[0].shape[1]
        return rank if self.admissibility == "adaptive" or self.rank is None else min(rank, self.rank)

    def _cheapest(
        self, rows: Cluster, columns: Cluster, rank_of: Callable[[Cluster, Cluster], int]
    ) -> tuple[int, list[Tile]]:
        """The partition with the fewest numbers: low rank, dense, or the best partitions of the children."""
        rank = rank_of(rows, columns)
        allowed = self.rank is None or rank <= self.rank
        own = [_tile(Block(rows, columns, True), rank if allowed else None)]
        cost = stored_numbers(own)
        if not (rows.children or columns.children) or cost == 0:
            return cost, own
        parts = [
            self._cheapest(row_child, column_child, rank_of)
            for row_child in rows.children or (rows,)
            for column_child in columns.children or (columns,)
        ]
        split_cost = sum(part_cost for part_cost, _ in parts)
        if split_cost < cost:
            return split_cost, [tile for _, tiles in parts for tile in tiles]
        return cost, own

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "HierarchicalMatrix":
        matrix = weight.flatten(1)
        if isinstance(start, HierarchicalMatrix) and start.structure == self and self.tolerance is None:
            # The start's own order and blocks: an alternating scheme would not settle if they changed under
            # it.
            problem = _Problem(matrix, *start.orders(), input_gram, output_gram)
            return self._member(
                weight.shape, problem, problem.solve(self.method, start.tiles, start.factors())
            )
        problem, tiles = min(self._arrangements(matrix, input_gram, output_gram), key=self._drawback)
        return self._member(weight.shape, problem, problem.solve(self.method, tiles))

    def fit_points(
        self,
        weight: Tensor,
        row_points: Tensor,
        column_points: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
    ) -> "HierarchicalMatrix":
        """The member nearest to a weight whose rows and columns lie at given places.

        Args:
            weight: W, shape (rows, columns), floating.
            row_points: The rows' coordinates, shape (rows, dimensions).
            column_points: The columns' coordinates, shape (columns, dimensions); for strong admissibility in
                the same space.
            input_gram: Ĝ; the identity where None.
            output_gram: H; the identity where None.

        Returns:
            The member; later fits that start from it keep its order and blocks.

        Raises:
            ValueError: The clustering is not one by points, or the points do not fit the weight.
        """
        checks.weight(weight)
        self.check(tuple(weight.shape))
        if self.clustering not in ("geometric", "principal"):
            remedy = "choose one of these"
            raise ValueError(
                checks.fault("clustering", "'geometric' or 'principal'", repr(self.clustering), remedy)
            )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().to(dtype).flatten(1)
        for name, points, size in zip(
            ("row_points", "column_points"), (row_points, column_points), matrix.shape, strict=True
        ):
            if points.ndim != 2 or len(points) != size:
                expected = f"of shape ({size}, dimensions)"
                raise ValueError(
                    checks.fault(name, expected, tuple(points.shape), "pass one point per index")
                )
        with torch.no_grad():
            rows, columns = self._trees_of_points(row_points, column_points, self.clustering)
            problem = _Problem(matrix, rows.order, columns.order, input_gram, output_gram)
            solution = problem.solve(self.method, self._tiles(problem, rows, columns))
            return self._member(tuple(weight.shape), problem, solution).to(weight.dtype)

    def _arrangements(
        self, matrix: Tensor, input_gram: Gram | None, output_gram: Gram | None
    ) -> Iterator[tuple["_Problem", list[Tile]]]:
        """The ordered problem and its blocks, for every clustering in question."""
        clusterings = [self.clustering]
        if self.clustering == "automatic":
            clusterings = ["cardinality", "principal", *(["geometric"] if self._has_grid() else [])]
        for clustering in clusterings:
            rows, columns = self._trees(matrix, clustering)
            problem = _Problem(matrix, rows.order, columns.order, input_gram, output_gram)
            yield problem, self._tiles(problem, rows, columns)

    def _drawback(self, arrangement: tuple["_Problem", list[Tile]]) -> float:
        """What an automatic choice makes small: the numbers stored at a tolerance, else the plain error."""
        problem, tiles = arrangement
        if self.tolerance is not None or self.clustering != "automatic":
            return stored_numbers(tiles)
        # Not the weighted error: with and without Gram the arrangement is the same, and the Gram only
        # improves it.
        plain = independent_blocks(problem.plain, tiles, METHODS[self.method], _PLAIN)
        return squared_error(problem.plain, tiles, plain, _PLAIN)

    def _member(
        self, shape: Shape, problem: "_Problem", solution: list[tuple[Tile, Factors]]
    ) -> "HierarchicalMatrix":
        tiles = [tile for tile, _ in solution]
        layout = BlockLayout(tiles)
        ordered = self.clustering != "cardinality"
        return HierarchicalMatrix(
            self,
            shape,
            **layout.pack([_balanced(factors) for _, factors in solution]),
            blocks=None if self.parameter_count(shape) is not None else _write_tiles(tiles, shape),
            row_order=_narrow(problem.row_order, len(problem.row_order)) if ordered else None,
            column_order=_narrow(problem.column_order, len(problem.column_order)) if ordered else None,
        )

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "HierarchicalMatrix":
        self.check(shape)
        rows, columns = matrix_shape(shape)
        tiles = self._predicted_tiles(shape)
        orders = torch.arange(rows), torch.arange(columns)
        if tiles is None:
            # Without a weight there is nothing to cluster by but places, and no rank but a share of the
            # block's size.
            by_place = "geometric" if self.clustering == "geometric" or self._has_grid() else "cardinality"
            trees = self._trees(torch.empty(rows, columns), by_place)
            orders = trees[0].order, trees[1].order
            tiles = [
                _tile(block, self.rank or max(1, min(block.rows.size, block.columns.size) // 4))
                for block in self._partition(*trees)
            ]
        solution = []
        for tile in tiles:
            # Every entry of the matrix gets the variance 1 / inputs.
            right_rows = tile.height if tile.rank is None else tile.rank
            right = torch.randn(right_rows, tile.width, dtype=dtype, generator=generator) / math.sqrt(columns)
            if tile.rank is None:
                solution.append((tile, Factors(right, None)))
                continue
            left = torch.randn(tile.height, tile.rank, dtype=dtype, generator=generator) / math.sqrt(
                tile.rank
            )
            solution.append((tile, Factors(left, right)))
        return self._member(
            shape, _Problem(torch.empty(rows, columns, dtype=dtype), *orders, None, None), solution
        )

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "HierarchicalMatrix":
        self.check(shape)
        rows, columns = matrix_shape(shape)
        tiles = self._predicted_tiles(shape)
        names = [] if self.clustering == "cardinality" else ["row_order", "column_order"]
        if tiles is None:
            names.append("blocks")
            checks.tensor_names(tensors.keys() & {"blocks"}, ["blocks"], str(self))
            tiles = _read_tiles(tensors["blocks"], shape)
        layout = BlockLayout(tiles)
        numbers = layout.numbers() | ({"chosen": layout.mask_bytes()} if layout.interpolative else {})
        checks.tensor_names(tensors.keys(), [*numbers, *names], str(self))
        remedy = "load the file that belongs to this model"
        for name, number in numbers.items():
            checks.shape(name, tensors[name].shape, (number,), remedy)
        for index, mask in layout.masks(tensors.get("chosen")).items():
            if int(mask.sum()) != tiles[index].rank:
                expected = f"{tiles[index].rank} columns marked for block {index}"
                raise ValueError(checks.fault("chosen", expected, int(mask.sum()), remedy))
        for name, size in (("row_order", rows), ("column_order", columns)):
            if name in tensors:
                _check_order(name, tensors[name], size)
        return HierarchicalMatrix(self, shape, **tensors)

    @classmethod
    def error_curve(
        cls,
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
        inner: Iterable[Structure] = (),
    ) -> list[Candidate]:
        """All ranks of a partition together.

        Uncoupled blocks give every rank's error from one singular value decomposition each. In a Gram that
        couples them the largest rank is fitted first, and every smaller one starts from the one before.

        Args:
            weight: W.
            input_gram: Ĝ.
            output_gram: H.
            geometry: the convolution's; its input size makes multiply-adds those of an image.
            inner: unused.

        Returns:
            One candidate per size, cheapest first.
        """
        if isinstance(input_gram, BlockDiagonalGram) or isinstance(output_gram, BlockDiagonalGram):
            return super().error_curve(
                weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry, inner=inner
            )
        checks.weight(weight)
        shape = tuple(weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().to(dtype).flatten(1)
        problem = _Problem(
            matrix, torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1]), input_gram, output_gram
        )
        partitions: dict[Hierarchical, list[Hierarchical]] = {}
        for candidate in cls.candidates(shape, inner):
            partitions.setdefault(dataclasses.replace(candidate, rank=1), []).append(candidate)
        curve = []
        for family in partitions.values():
            sized = {candidate: candidate._predicted_tiles(shape) or [] for candidate in reversed(family)}
            for candidate, error in problem.errors(sized):
                curve.append(candidate.point(weight, error, geometry))
        return sorted(curve, key=lambda point: point.cost.parameters)

    def _has_grid(self) -> bool:
        return self.row_grid is not None or self.column_grid is not None


_PLAIN = Norm()
# From this batch size on the product runs on vectors as columns.
_MANY = 32


class _Problem:
    """A weight with its rows and columns in the trees' order, and the metric to fit it in.

    Diagonal Grams leave block structure and ranks alone: they become scales of the ordered weight. Other
    Grams become metrics that couple the blocks.
    """

    def __init__(
        self,
        matrix: Tensor,
        row_order: Tensor,
        column_order: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
    ) -> None:
        self.row_order, self.column_order = row_order.to(matrix.device), column_order.to(matrix.device)
        self.plain = matrix[self.row_order][:, self.column_order]
        self.grams = input_gram, output_gram
        self.row_scale, output_metric = self._resolve(output_gram, self.row_order)
        self.column_scale, input_metric = self._resolve(input_gram, self.column_order)
        self.norm = Norm(input_metric, output_metric)
        self.weight = self.plain
        if self.row_scale is not None:
            self.weight = self.row_scale[:, None] * self.weight
        if self.column_scale is not None:
            self.weight = self.weight * self.column_scale

    def _resolve(self, gram: Gram | None, order: Tensor) -> tuple[Tensor | None, Metric]:
        """The scale of a diagonal Gram or the metric of another, in the order's coordinates."""
        if gram is None:
            return None, Metric(None)
        if isinstance(gram, DiagonalGram):
            diagonal = gram.diagonal().to(self.plain)[order]
            return diagonal.clamp_min(_LEAST_SCALE * diagonal.max()).sqrt(), Metric(None)
        return None, Metric(gram.dense().to(self.plain)[order][:, order].contiguous())

    def solve(
        self, method: str, tiles: Sequence[Tile], start: Sequence[Factors] | None = None
    ) -> list[tuple[Tile, Factors]]:
        """The best values found for the blocks.

        Args:
            method: How a block's factors are found.
            tiles: The blocks.
            start: Values to try beside the blocks' own fits.

        Returns:
            Every block with its values, in the ordered weight's coordinates.
        """
        plain = independent_blocks(self.plain, tiles, METHODS[method], _PLAIN)
        if self.grams == (None, None):
            return list(zip(tiles, plain, strict=True))
        starts = [
            self._scaled(tiles, plain),
            independent_blocks(self.weight, tiles, METHODS[method], self.norm),
            *([self._scaled(tiles, start)] if start is not None else []),
        ]
        errors = [squared_error(self.weight, tiles, values, self.norm) for values in starts]
        best = starts[errors.index(min(errors))]
        if self.norm.couples:
            best, _ = descend(self.weight, tiles, best, self.norm, exact_first_sweep=method == "svd")
        best = self._scaled(tiles, best, inverse=True)
        if isinstance(self.grams[0], BlockDiagonalGram) or isinstance(self.grams[1], BlockDiagonalGram):
            # The descent knows the mean metric only; whether that served every block of rows is to be seen.
            best = min(best, plain, key=lambda values: self._true_error(tiles, values))
        return list(zip(tiles, best, strict=True))

    def errors(self, sized: Mapping[Hierarchical, Sequence[Tile]]) -> Iterator[tuple[Hierarchical, float]]:
        """The relative error of structures with the same blocks, dearest first.

        Args:
            sized: Structures and their tiles, which differ in rank only.

        Yields:
            Each structure and its error.
        """
        total = squared_error(self.weight, (), (), self.norm)
        tails: dict[tuple[int, int], Tensor] = {}
        values: Sequence[Factors] | None = None
        for structure, tiles in sized.items():
            if self.norm.couples:
                values = values or independent_blocks(self.weight, tiles, truncated_svd, self.norm)
                # Looser than a fit's: the neighbouring rank was a good start, and a curve has many points.
                values, error = descend(self.weight, tiles, values, self.norm, gain=4e-3)
            else:
                error = 0.0
                for tile in tiles:
                    place = tile.rows.start, tile.columns.start
                    if place not in tails:
                        energy = singular_values(self.weight[tile.rows, tile.columns]).double().square()
                        tails[place] = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
                    error += 0.0 if tile.rank is None else float(tails[place][tile.rank])
            yield structure, math.sqrt(max(error, 0.0) / total) if total > 0 else 0.0

    def _scaled(
        self, tiles: Sequence[Tile], values: Sequence[Factors], *, inverse: bool = False
    ) -> list[Factors]:
        """Values moved into the scaled weight's coordinates, or back."""
        power = -1.0 if inverse else 1.0
        scaled = []
        for tile, factors in zip(tiles, values, strict=True):
            left, right = factors.left.to(self.plain), factors.right
            if self.row_scale is not None:
                left = self.row_scale[tile.rows, None] ** power * left
            if self.column_scale is not None:
                columns = self.column_scale[tile.columns] ** power
                left, right = (left * columns, None) if right is None else (left, right * columns)
            scaled.append(Factors(left, right))
        return scaled

    def _true_error(self, tiles: Sequence[Tile], values: Sequence[Factors]) -> float:
        """The squared error in the Grams themselves, in the weight's own order."""
        error = self.plain.clone()
        for tile, factors in zip(tiles, values, strict=True):
            error[tile.rows, tile.columns] -= factors.dense()
        restored = torch.empty_like(error)
        restored[self.row_order[:, None], self.column_order] = error
        return float(true_squared_error(restored, *self.grams))


# Relative to the largest entry of a diagonal Gram: an input that never fires keeps a trace of weight.
_LEAST_SCALE = 1e-12


class HierarchicalMatrix(StructuredMatrix):
    """A member of `Hierarchical`.

    Stores the flat tensors `strips`, `right`, `combinations`, `dense` and `chosen` in the order of
    `BlockLayout`, each where there is something in it; `blocks` (tiles, 5), rows of (row, column, height,
    width, rank + 1; 0 for dense), where the blocks do not follow from structure and shape; `row_order` and
    `column_order`, where the order is not the weight's own. Integers below 65536 are stored as two bytes
    along a last axis.
    """

    strips: nn.Parameter | None
    right: nn.Parameter | None
    combinations: nn.Parameter | None
    dense: nn.Parameter | None
    chosen: Tensor | None
    blocks: Tensor | None
    row_order: Tensor | None
    column_order: Tensor | None
    gather_index: Tensor | None
    inner_index: Tensor | None
    fetch_index: Tensor | None
    scatter_index: Tensor | None
    row_position: Tensor | None
    column_position: Tensor | None
    own_columns: Tensor | None
    other_columns: Tensor | None

    def __init__(
        self,
        structure: Hierarchical,
        shape: Shape,
        strips: Tensor | None = None,
        right: Tensor | None = None,
        combinations: Tensor | None = None,
        dense: Tensor | None = None,
        chosen: Tensor | None = None,
        blocks: Tensor | None = None,
        row_order: Tensor | None = None,
        column_order: Tensor | None = None,
    ) -> None:
        super().__init__(structure, shape)
        numbers = {"strips": strips, "right": right, "combinations": combinations, "dense": dense}
        for name, values in numbers.items():
            self.register_parameter(name, None if values is None else nn.Parameter(values.contiguous()))
        kept = {"chosen": chosen, "blocks": blocks, "row_order": row_order, "column_order": column_order}
        for name, values in kept.items():
            self._keep(name, None if values is None else values.contiguous(), persistent=True)
        tiles = structure._predicted_tiles(self.shape) if blocks is None else _read_tiles(blocks, self.shape)
        self.layout = BlockLayout(tiles or [])
        masks = self.layout.masks(None if chosen is None else chosen.cpu())
        self._make_indices(masks)
        self._program = _write_program(self.layout, self.outputs, self.inputs, *self.orders(), masks)
        self.native_call = self._program.native_call

    def _make_indices(self, masks: Mapping[int, Tensor]) -> None:
        """Derives the product's index tensors, which are not stored; None where one would change nothing."""
        layout = self.layout
        rows, columns = self.orders()
        taken = [stack.positions() for stack in layout.right_stacks]
        starts = {index: self.tiles[index].columns.start for index in masks}
        none = torch.empty(0, dtype=torch.int64)
        own = torch.cat([none, *(mask.nonzero()[:, 0] + starts[index] for index, mask in masks.items())])
        others = torch.cat([
            none,
            *((~mask).nonzero()[:, 0] + starts[index] for index, mask in masks.items()),
        ])
        gathered = columns[torch.cat([*taken, others, layout.dense_order(), own])]
        given = [rows[stack.positions()] for stack in (*layout.strip_stacks, *layout.dense_stacks)]
        scattered = torch.cat([none, *given])
        once = torch.equal(scattered.sort().values, torch.arange(self.outputs))
        indices = {
            "gather_index": _unless_identity(gathered, self.inputs),
            "inner_index": _unless_identity(layout.inner_order(), layout.inner_size),
            # Where every output is given once, it is fetched from its place; else what is given adds up.
            "fetch_index": _unless_identity(scattered.argsort(), self.outputs) if once else None,
            "scatter_index": None if once else scattered,
            "row_position": None if self.row_order is None else rows.argsort(),
            "column_position": None if self.column_order is None else columns.argsort(),
            # The columns that blocks are stored by, and their others, block after block.
            "own_columns": own if masks else None,
            "other_columns": others if masks else None,
        }
        device = next((tensor.device for tensor in self.state_dict().values()), None)
        for name, index in indices.items():
            self._keep(name, None if index is None else index.to(device), persistent=False)

    def _keep(self, name: str, tensor: Tensor | None, *, persistent: bool) -> None:
        """Registers a buffer; an absent one is a plain None: torch.export miscounts registered ones."""
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor, persistent=persistent)

    @property
    def tiles(self) -> list[Tile]:
        """The blocks, in the order of the rows and columns of the trees."""
        return self.layout.tiles

    def orders(self) -> tuple[Tensor, Tensor]:
        """The row and column orders, on the CPU: position p of the blocks is index order[p] of the weight."""
        rows, columns = self.row_order, self.column_order
        return (
            torch.arange(self.outputs) if rows is None else _widen(rows).cpu(),
            torch.arange(self.inputs) if columns is None else _widen(columns).cpu(),
        )

    def factors(self) -> list[Factors]:
        """The values of every tile, parts of the stored tensors."""
        names = ("strips", "right", "combinations", "dense", "chosen")
        return self.layout.unpack({name: getattr(self, name) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return block_sequence_apply(x, self._parameters, self._program, bias, self._by_stacks)

    def _by_stacks(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product as one batched product per stack, of PyTorch's operations."""
        checks.last_dimension(x, self.inputs)
        vectors = x.reshape(-1, self.inputs)
        layout, batch = self.layout, vectors.shape[0]  # len would fix the size in an export
        # A branch on the batch size would tie a compiled or exported graph to it.
        many = not torch.compiler.is_compiling() and batch >= _MANY
        axis = 0 if many else 1
        if many:
            vectors = vectors.T
        if self.gather_index is not None:
            vectors = vectors.index_select(axis, self.gather_index)
        pieces: list[Tensor] = []
        # In their order: what right factors take, what combinations take, what dense blocks take, and the
        # inputs of chosen columns.
        taken, others, straight = (
            sum(stack.count * stack.inputs for stack in stacks)
            for stacks in (layout.right_stacks, layout.combination_stacks, layout.dense_stacks)
        )
        if self.strips is not None:
            hidden: list[Tensor] = []
            if self.right is not None:
                part = vectors.narrow(axis, 0, taken)
                hidden += batched_products(layout.right_stacks, self.right, part, axis)
            if self.combinations is not None:
                part = vectors.narrow(axis, taken, others)
                combined = batched_products(layout.combination_stacks, self.combinations, part, axis)
                before = taken + others + straight
                own = vectors.narrow(axis, before, vectors.shape[axis] - before)
                hidden.append(torch.cat(combined, axis) + own)
            inner = hidden[0] if len(hidden) == 1 else torch.cat(hidden, axis)
            if self.inner_index is not None:
                inner = inner.index_select(axis, self.inner_index)
            pieces += batched_products(layout.strip_stacks, self.strips, inner, axis)
        if self.dense is not None:
            part = vectors.narrow(axis, taken + others, straight)
            pieces += batched_products(layout.dense_stacks, self.dense, part, axis)
        if not pieces:  # every block is zero
            pieces.append(vectors.new_zeros((self.outputs, batch) if many else (batch, self.outputs)))
        result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
        if self.scatter_index is not None:
            size = (self.outputs, batch) if many else (batch, self.outputs)
            result = result.new_zeros(size).index_add(axis, self.scatter_index, result)
        elif self.fetch_index is not None:
            result = result.index_select(axis, self.fetch_index)
        if many:
            result = result.T.contiguous()
        result = result if bias is None else result + bias
        return result.reshape(*x.shape[:-1], self.outputs)

    def to_dense(self) -> Tensor:
        ordered = self._zeros(self.outputs, self.inputs)
        for tile, factors in zip(self.tiles, self.factors(), strict=True):
            ordered[tile.rows, tile.columns] = factors.dense()
        if self.row_position is not None and self.column_position is not None:
            ordered = ordered[self.row_position][:, self.column_position]
        return ordered.reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        positions = indices.reshape(-1)
        if self.row_position is not None:
            positions = self.row_position[positions]
        # In parts, so that the coefficients below stay small for a large vocabulary.
        parts = positions.split(max(1, 2**24 // (self.layout.inner_size + self.inputs)))
        result = torch.cat([self._ordered_rows(part) for part in parts])
        if self.column_position is not None:
            result = result[:, self.column_position]
        return result.reshape(*indices.shape, self.inputs)

    def _ordered_rows(self, positions: Tensor) -> Tensor:
        """Rows at positions of the row order, their entries in the column order."""
        layout, count = self.layout, len(positions)
        result = self._zeros(count, self.inputs)
        # The rows' coefficients: what multiplies the right factors, in the order of the right stacks.
        inner = self._zeros(count, layout.inner_size)
        order = layout.inner_order().to(positions.device)
        for stack, matrices, part in _with_parts(layout.strip_stacks, self.strips, order):
            inner = inner.scatter_add(1, *_picked(stack, matrices, part, positions))
        found = batches(layout.right_stacks, self.right)
        targets = [stack.positions().to(positions.device) for stack in layout.right_stacks]
        if self.own_columns is not None and self.other_columns is not None:
            # A block's own column takes the coefficient as it is, the others take combinations.
            own = inner[:, layout.inner_size - len(self.own_columns) :]
            result = result.index_add(1, self.own_columns, own)
            found += batches(layout.combination_stacks, self.combinations)
            sizes = [stack.count * stack.inputs for stack in layout.combination_stacks]
            targets += self.other_columns.split(sizes)
        parts = inner.split([stack.count * stack.outputs for stack, _ in found], dim=1)
        for (stack, matrices), part, target in zip(found, parts, targets, strict=True):
            coefficients = part.reshape(count, stack.count, stack.outputs).transpose(0, 1)
            product = (
                torch
                .bmm(coefficients, matrices.mT)
                .transpose(0, 1)
                .reshape(count, stack.count * stack.inputs)
            )
            result = result.index_add(1, target, product)
        order = layout.dense_order().to(positions.device)
        for stack, matrices, part in _with_parts(layout.dense_stacks, self.dense, order):
            result = result.scatter_add(1, *_picked(stack, matrices, part, positions))
        return result

    def _zeros(self, *size: int) -> Tensor:
        tensors = (tensor for tensor in (self.strips, self.dense, torch.empty(0)) if tensor is not None)
        return next(tensors).new_zeros(*size)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(stored_numbers(self.tiles), self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        """The blocks in the order of the trees, low-rank ones with their rank written in."""
        rectangles = []
        for tile in self.tiles:
            kind = "dense" if tile.rank is None else "low_rank" if tile.rank else "zero"
            label = str(tile.rank) if tile.rank else ""
            place = tile.rows.start, tile.columns.start, tile.height, tile.width
            rectangles.append(Rectangle(*place, kind, label))
        return rectangles


def _write_program(
    layout: BlockLayout,
    outputs: int,
    inputs: int,
    rows: Tensor,
    columns: Tensor,
    masks: Mapping[int, Tensor],
) -> Program:
    """The product in two phases: inputs to the low-rank blocks' coefficients, then both to the outputs."""
    # The first states are inputs: in the order of the columns, where that is another one; then for every
    # block by its own columns these, and behind them its other columns.
    straight = _unless_identity(columns, inputs)
    gathered = [] if straight is None else [straight]
    source = Space.INPUT if straight is None else Space.STATE
    picked: dict[int, int] = {}
    end = 0 if straight is None else inputs
    for index, mask in masks.items():
        picked[index] = end
        own = columns[layout.tiles[index].columns]
        gathered += [own[mask], own[~mask]]
        end += len(own)
    # Each strip of the outputs is one step, with the parts of all blocks across it as segments: its sum is
    # complete before it is written, and written once.
    numbers = layout.numbers()
    index = {name: place for place, name in enumerate(numbers)}
    hidden, position = [], end
    for stack, start in _clusters_in_store(layout.right_stacks):
        for cluster in range(stack.count):
            segment = Segment(
                index["right"],
                start + cluster * stack.inputs * stack.outputs,
                stack.outputs,
                source,
                stack.starts[cluster],
                stack.inputs,
            )
            hidden.append([Step(Space.STATE, position, stack.outputs, (segment,))])
            position += stack.outputs
    for stack, start in _clusters_in_store(layout.combination_stacks):
        for cluster, (tile,) in enumerate(stack.tiles):
            begin, rank = start + cluster * stack.inputs * stack.outputs, stack.outputs
            others = picked[tile] + rank
            segment = Segment(index["combinations"], begin, rank, Space.STATE, others, stack.inputs)
            hidden.append([Step(Space.STATE, position, rank, (segment,), picked[tile])])
            position += rank
    # All that one strip of the outputs is the sum of.
    parts: dict[int, list[Segment]] = {strip.start: [] for strip in layout.strips}
    for name, stacks in (("strips", layout.strip_stacks), ("dense", layout.dense_stacks)):
        for stack, start in _clusters_in_store(stacks):
            for cluster, members in enumerate(stack.tiles):
                begin = start + cluster * stack.inputs * stack.outputs
                segments = parts[stack.starts[cluster]]
                for space, offset, depth in _joined(
                    _source(layout, member, source, end) for member in members
                ):
                    segments.append(Segment(index[name], begin, stack.extent, space, offset, depth))
                    begin += depth * stack.extent
    written = [
        [Step(Space.OUTPUT, strip.start, strip.stop - strip.start, tuple(parts[strip.start]))]
        for strip in layout.strips
    ]
    return write_program(
        inputs,
        outputs,
        end + layout.inner_size,
        list(numbers.values()),
        [hidden, written] if hidden else [written],
        gathered=torch.cat(gathered) if gathered else None,
        output_places=_unless_identity(rows.argsort(), outputs),
        names=numbers,
    )


def _source(layout: BlockLayout, member: int, inputs: Space, inner: int) -> tuple[Space, int, int]:
    """Where the numbers stand that a tile's rows are multiplied by: space, offset, how many."""
    # Inputs in the order of the columns stand in the space `inputs`, the first coefficient in state `inner`.
    tile = layout.tiles[member]
    if tile.rank is None:
        return inputs, tile.columns.start, tile.width
    return Space.STATE, inner + layout.inner_start[member], tile.rank


def _clusters_in_store(stacks: Sequence[Stack]) -> Iterator[tuple[Stack, int]]:
    """Each stack with the place of its first number in their flat tensor."""
    start = 0
    for stack in stacks:
        yield stack, start
        start += stack.numel


def _joined(sources: Iterable[tuple[Space, int, int]]) -> list[tuple[Space, int, int]]:
    """Stretches (space, offset, depth) with those that follow each other made one."""
    joined: list[tuple[Space, int, int]] = []
    for space, offset, depth in sources:
        if joined and joined[-1][0] is space and sum(joined[-1][1:]) == offset:
            joined[-1] = (space, joined[-1][1], joined[-1][2] + depth)
        else:
            joined.append((space, offset, depth))
    return joined


def _with_parts(
    stacks: Sequence[Stack], flat: Tensor | None, order: Tensor
) -> Iterator[tuple[Stack, Tensor, Tensor]]:
    """Each stack with its matrices and the part of an order of inputs that belongs to it, (count, inputs)."""
    parts = order.split([stack.count * stack.inputs for stack in stacks])
    for (stack, matrices), part in zip(batches(stacks, flat), parts, strict=flat is not None):
        yield stack, matrices, part.reshape(stack.count, stack.inputs)


def _picked(stack: Stack, matrices: Tensor, order: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of some rows in a stack of row clusters, zeros for rows outside it, and where they belong.

    Args:
        stack: The stack.
        matrices: Its matrices, shape (count, inputs, extent).
        order: Where every input of a cluster belongs, shape (count, inputs).
        positions: Positions in the row order, shape (rows,).

    Returns:
        Targets and entries, both of shape (rows, inputs).
    """
    starts = torch.tensor(stack.starts, device=positions.device)
    cluster = (torch.searchsorted(starts, positions, right=True) - 1).clamp_min(0)
    local = positions - starts[cluster]
    inside = (local >= 0) & (local < stack.extent)
    entries = matrices[cluster, :, local.clamp(0, stack.extent - 1)]
    return order[cluster], entries * inside[:, None]


def _tile(block: Block, rank: int | None) -> Tile:
    """The tile for a block: dense where it is not admissible, or where factors would not save a number."""
    height, width = block.rows.size, block.columns.size
    if not block.admissible or rank is None or rank * (height + width) >= height * width:
        rank = None
    return Tile(
        slice(block.rows.start, block.rows.stop), slice(block.columns.start, block.columns.stop), rank
    )


def _balanced(values: Factors) -> Factors:
    """Both factors' columns and rows at the same norm, which trains and quantises best."""
    if values.right is None:
        return values
    column, row = values.left.norm(dim=0), values.right.norm(dim=1)
    tiny = torch.finfo(column.dtype).tiny
    scale = torch.where((column > tiny) & (row > tiny), (row / column.clamp_min(tiny)).sqrt(), 1.0)
    return Factors(values.left * scale, values.right / scale[:, None])


def _grid(extents: Sequence[int]) -> Tensor:
    """The points of a grid, row-major, with unit spacing; shape (points, axes)."""
    axes = [torch.arange(extent, dtype=torch.float64) for extent in extents]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)


def _unless_identity(index: Tensor, size: int) -> Tensor | None:
    """An index tensor, or None where it says 0 … size − 1 and selecting by it would change nothing."""
    if len(index) == size and bool((index == torch.arange(size, device=index.device)).all()):
        return None
    return index


def _narrow(values: Tensor, bound: int) -> Tensor:
    """Integers below `bound` as they are stored: two bytes along a last axis, low byte first, or int32."""
    if bound > 2**16:
        return values.to(torch.int32)
    return torch.stack([values % 256, values // 256], -1).to(torch.uint8)


def _widen(stored: Tensor) -> Tensor:
    """Stored integers as int64."""
    if stored.dtype != torch.uint8:
        return stored.to(torch.int64)
    low, high = stored.to(torch.int64).unbind(-1)
    return low + 256 * high


def _check_order(name: str, stored: Tensor, size: int) -> None:
    """Refuses stored integers that are no permutation."""
    order = _widen(stored)
    if order.shape != (size,) or not bool(
        (order.sort().values == torch.arange(size, device=order.device)).all()
    ):
        remedy = "load the file that belongs to this model"
        raise ValueError(checks.fault(name, f"a permutation of {size} indices", tuple(order.shape), remedy))


def _write_tiles(tiles: Sequence[Tile], shape: Shape) -> Tensor:
    """The table of blocks: (row, column, height, width, rank + 1; 0 for dense)."""
    rows = [
        (
            tile.rows.start,
            tile.columns.start,
            tile.height,
            tile.width,
            0 if tile.rank is None else tile.rank + 1,
        )
        for tile in tiles
    ]
    return _narrow(torch.tensor(rows), max(matrix_shape(shape)) + 1)


def _read_tiles(stored: Tensor, shape: Shape) -> list[Tile]:
    """The blocks of a table; refuses one that does not tile the matrix."""
    rows, columns = matrix_shape(shape)
    table = _widen(stored).cpu()
    tiles = []
    cover = torch.zeros(rows + 1, columns + 1, dtype=torch.int64)
    sound = table.ndim == 2 and table.shape[1] == 5
    for row, column, height, width, code in table.tolist() if sound else []:
        stop, end = row + height, column + width
        sound = (
            sound
            and 0 <= row < stop <= rows
            and 0 <= column < end <= columns
            and code <= min(height, width) + 1
        )
        if not sound:
            break
        # A two-dimensional difference array: its running sums count how often each entry is covered.
        cover[row, column] += 1
        cover[stop, end] += 1
        cover[row, end] -= 1
        cover[stop, column] -= 1
        tiles.append(Tile(slice(row, stop), slice(column, end), code - 1 if code else None))
    if not sound or not bool((cover.cumsum(0).cumsum(1)[:rows, :columns] == 1).all()):
        expected = f"a table of blocks that tile a ({rows}, {columns}) matrix"
        raise ValueError(
            checks.fault("blocks", expected, tuple(stored.shape), "load the file that belongs to it")
        )
    return tiles
