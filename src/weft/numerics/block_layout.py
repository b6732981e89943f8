"""Blocks of a matrix, and the order in which their numbers are stored and applied.

A low-rank block is stored as two factors, or as some of its own columns and what combinations of these the
others are: rank² numbers fewer for the same blocks (Cheng et al. 2005, interpolative decomposition).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from weft.numerics.bit_mask import mask_bytes, packed, places_of, unpacked
from weft.numerics.maxvol import by_own_rows, with_identity

_Depth = Callable[["Tile"], int]


@dataclass(frozen=True)
class Tile:
    """One block's place and rank.

    Attributes:
        rows: its range of rows.
        columns: its range of columns.
        rank: its rank, 0 for a block of zeros, None for a dense block.
    """

    rows: slice
    columns: slice
    rank: int | None

    @property
    def height(self) -> int:
        """The number of rows."""
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Factors:
    """One block's values.

    Attributes:
        left: shape (height, rank), or the block itself where it is dense.
        right: shape (rank, width), None where the block is dense.
    """

    left: Tensor
    right: Tensor | None

    def dense(self) -> Tensor:
        """The block as a matrix, shape (height, width)."""
        return self.left if self.right is None else self.left @ self.right


@dataclass(frozen=True)
class Stack:
    """Blocks that share a cluster or strip, stacked, for all of the same size: one batched product.

    Each one's matrix is stored with its inputs along the rows, (inputs, outputs): the product of few
    vectors then adds up scaled contiguous rows, which is what runs fastest.

    Attributes:
        starts: the first positions of the clusters, or strips, ascending.
        extent: their size.
        inputs: how many numbers the product of one takes.
        outputs: how many it gives.
        tiles: for each one the indices of its tiles, in the order of the stack.
    """

    starts: tuple[int, ...]
    extent: int
    inputs: int
    outputs: int
    tiles: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """The number of clusters."""
        return len(self.starts)

    @property
    def numel(self) -> int:
        """How many numbers the stack stores."""
        return self.count * self.inputs * self.outputs

    def positions(self) -> Tensor:
        """The positions of all clusters, one after the other, shape (count · extent,)."""
        return (torch.tensor(self.starts)[:, None] + torch.arange(self.extent)).flatten()


# How many numbers a block by its own columns has to save for each of its inputs: these are then picked one by
# one, which takes about as long as reading so many weights each.
_WORTH_PICKING = 8


def interpolative_blocks(tiles: Sequence[Tile]) -> frozenset[int]:
    """Which blocks are stored by their own columns.

    Args:
        tiles: The blocks of a matrix.

    Returns:
        The indices of those that save enough by it and are alone over their columns: blocks that share a
        column cluster are applied together, to inputs in one order.
    """
    over = Counter((tile.columns.start, tile.columns.stop) for tile in tiles if tile.rank)
    return frozenset(
        index
        for index, tile in enumerate(tiles)
        if tile.rank
        and _WORTH_PICKING * tile.width <= tile.rank**2
        and tile.rank < tile.width
        and over[tile.columns.start, tile.columns.stop] == 1
    )


def stored_numbers(tiles: Sequence[Tile]) -> int:
    """How many real coefficients blocks are stored in.

    Args:
        tiles: The blocks of a matrix.

    Returns:
        Their number.
    """
    saved = interpolative_blocks(tiles)
    return sum(
        tile.height * tile.width
        if tile.rank is None
        else tile.rank * (tile.height + tile.width - (tile.rank if index in saved else 0))
        for index, tile in enumerate(tiles)
    )


class BlockLayout:
    """Where the numbers of every block stand in the flat stored tensors.

    The borders of all blocks cut the rows into strips. `strips` holds for every strip the transposed left
    factors of the blocks across it, their part inside of it, below each other: (sum of ranks, strip); `dense`
    for every strip its transposed dense blocks below each other: (sum of widths, strip). `right` holds for
    every column cluster the transposed right factors of the blocks over it, side by side: (cluster, sum of
    ranks).

    A block by its own columns has these as its left factor, so that its right factor is the identity in them;
    `combinations` holds what is left of that, transposed: (cluster − rank, rank). `chosen` says which columns
    they are, one bit for each column of every such block. The block's coefficients are then the chosen inputs
    + the other inputs @ combinations.

    So what a strip of the output is computed from stands in one piece, in the order in which it is
    read. Clusters and strips of equal shapes stand together: each tensor is a short sequence of batches, the
    stacks; within a stack clusters ascend, within a cluster its blocks.

    Args:
        tiles: The blocks.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.tiles = list(tiles)
        low_rank = [index for index, tile in enumerate(tiles) if tile.rank]
        dense = [index for index, tile in enumerate(tiles) if tile.rank is None]
        borders = sorted({border for tile in tiles for border in (tile.rows.start, tile.rows.stop)})
        self.strips = list(itertools.starmap(slice, itertools.pairwise(borders)))
        across = [[strip for strip in self.strips if _lies_in(strip, tile.rows)] for tile in tiles]
        self.interpolative = interpolative_blocks(self.tiles)

        def columns_of(index: int) -> list[slice]:
            return [self.tiles[index].columns]

        self.right_stacks = self._stacks(
            [index for index in low_rank if index not in self.interpolative],
            columns_of,
            _inner_size,
            into=False,
        )
        self.combination_stacks = [
            replace(stack, inputs=stack.extent - stack.outputs)
            for stack in self._stacks(sorted(self.interpolative), columns_of, _inner_size, into=False)
        ]
        self.strip_stacks = self._stacks(low_rank, across.__getitem__, _inner_size, into=True)
        self.dense_stacks = self._stacks(dense, across.__getitem__, _width, into=True)
        # Where each low-rank tile's part of the inner vector starts: right stacks first, then combinations.
        self.inner_start: dict[int, int] = {}
        position = 0
        for index in _in_order((*self.right_stacks, *self.combination_stacks)):
            self.inner_start[index] = position
            position += _inner_size(tiles[index])
        self.inner_size = position

    def _stacks(
        self, members: Sequence[int], parts_of: Callable[[int], list[slice]], depth_of: _Depth, *, into: bool
    ) -> list[Stack]:
        """Groups tiles by cluster or strip, and those by shape; `into` where the product gives them."""
        clusters: dict[tuple[int, int], list[int]] = {}
        for index in members:
            for part in parts_of(index):
                clusters.setdefault((part.start, part.stop - part.start), []).append(index)
        shapes: dict[tuple[int, int], list[tuple[int, tuple[int, ...]]]] = {}
        for (start, extent), indices in sorted(clusters.items()):
            depth = sum(depth_of(self.tiles[index]) for index in indices)
            shapes.setdefault((extent, depth), []).append((start, tuple(indices)))
        stacks = []
        for (extent, depth), found in shapes.items():
            sizes = (depth, extent) if into else (extent, depth)
            stacks.append(
                Stack(
                    tuple(start for start, _ in found), extent, *sizes, tuple(indices for _, indices in found)
                )
            )
        return stacks

    def numbers(self) -> dict[str, int]:
        """The sizes of the stored tensors of real numbers that there are, by name."""
        stacks = {
            "strips": self.strip_stacks,
            "right": self.right_stacks,
            "combinations": self.combination_stacks,
            "dense": self.dense_stacks,
        }
        return {name: sum(stack.numel for stack in found) for name, found in stacks.items() if found}

    def mask_bytes(self) -> int:
        """How many bytes `chosen` has; 0 where there is none."""
        return mask_bytes(sum(self.tiles[index].width for index in self.interpolative))

    def masks(self, chosen: Tensor | None) -> dict[int, Tensor]:
        """Which of its columns every block by its own columns has chosen, bool, shape (width,).

        Args:
            chosen: What `pack` gave under this name, None where it gave none.

        Returns:
            The masks by tile, in the order of the combination stacks.
        """
        order = _in_order(self.combination_stacks)
        if chosen is None or not order:
            return {}
        widths = [self.tiles[index].width for index in order]
        return dict(zip(order, unpacked(chosen, sum(widths)).split(widths), strict=True))

    def inner_order(self) -> Tensor:
        """Where the strip stacks' inputs stand in the inner vector, one after the other."""
        return self._ranges(
            (self.inner_start[index], self.inner_start[index] + _inner_size(self.tiles[index]))
            for index in _in_order(self.strip_stacks)
        )

    def dense_order(self) -> Tensor:
        """Which positions of the columns the dense stacks take, one after the other."""
        columns = (self.tiles[index].columns for index in _in_order(self.dense_stacks))
        return self._ranges((part.start, part.stop) for part in columns)

    @staticmethod
    def _ranges(bounds: Iterable[tuple[int, int]]) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*pair) for pair in bounds)])

    def pack(self, values: Sequence[Factors]) -> dict[str, Tensor]:
        """The stored tensors for the values of every tile.

        Args:
            values: One per tile.

        Returns:
            `strips`, `right`, `combinations`, `dense` and `chosen`, each flat, where there is something in
            it.
        """
        lefts, rights = [value.left for value in values], [value.right for value in values]
        masks = []
        for index in _in_order(self.combination_stacks):
            # Its columns are the rows of its transpose.
            right = values[index].right
            assert right is not None
            lefts[index], rights[index], marked = by_own_rows(right.mT, lefts[index].mT)
            masks.append(marked)

        def left_parts(stacks: Sequence[Stack]) -> list[Tensor]:
            return [
                torch.cat([lefts[index][self._inside(index, strip)].mT for index in indices])
                for strip, indices in _parts(stacks)
            ]

        def right_parts(stacks: Sequence[Stack]) -> list[Tensor]:
            return [
                torch.cat([part.mT for index in indices if (part := rights[index]) is not None], 1)
                for _, indices in _parts(stacks)
            ]

        parts = {
            "strips": left_parts(self.strip_stacks),
            "right": right_parts(self.right_stacks),
            "combinations": right_parts(self.combination_stacks),
            "dense": left_parts(self.dense_stacks),
            "chosen": [packed(torch.cat(masks))] if masks else [],
        }
        return {name: torch.cat([part.flatten() for part in found]) for name, found in parts.items() if found}

    def _inside(self, index: int, strip: slice) -> slice:
        """A strip's rows within those of a tile across it."""
        first = self.tiles[index].rows.start
        return slice(strip.start - first, strip.stop - first)

    def unpack(self, tensors: Mapping[str, Tensor | None]) -> list[Factors]:
        """The values of every tile, views of the stored tensors where one strip holds them.

        Args:
            tensors: What `pack` gave.

        Returns:
            One per tile.
        """
        lefts = self._views(self.strip_stacks, tensors.get("strips"), _inner_size, dim=0)
        rights = self._views(self.right_stacks, tensors.get("right"), _inner_size, dim=1)
        rights |= self._views(self.combination_stacks, tensors.get("combinations"), _inner_size, dim=1)
        for index, marked in self.masks(tensors.get("chosen")).items():
            combinations = rights[index][0]
            rights[index] = [with_identity(combinations, places_of(marked.to(combinations.device)))]
        blocks = self._views(self.dense_stacks, tensors.get("dense"), _width, dim=0)
        empty = next((tensor for tensor in tensors.values() if tensor is not None), torch.empty(0))
        values = []
        for index, tile in enumerate(self.tiles):
            if tile.rank is None:
                values.append(Factors(_below_each_other(blocks[index]), None))
            elif tile.rank:
                values.append(Factors(_below_each_other(lefts[index]), *rights[index]))
            else:
                values.append(Factors(empty.new_zeros(tile.height, 0), empty.new_zeros(0, tile.width)))
        return values

    def _views(
        self, stacks: Sequence[Stack], flat: Tensor | None, depth_of: _Depth, *, dim: int
    ) -> dict[int, list[Tensor]]:
        """Of every tile its parts in the stacks, in the order of their places."""
        found: dict[int, list[tuple[int, Tensor]]] = {}
        for stack, matrices in batches(stacks, flat):
            for start, indices, matrix in zip(stack.starts, stack.tiles, matrices, strict=True):
                parts = matrix.split([depth_of(self.tiles[index]) for index in indices], dim=dim)
                for index, part in zip(indices, parts, strict=True):
                    found.setdefault(index, []).append((start, part.mT))
        return {
            index: [part for _, part in sorted(parts, key=itemgetter(0))] for index, parts in found.items()
        }


def batches(stacks: Sequence[Stack], flat: Tensor | None) -> list[tuple[Stack, Tensor]]:
    """Cuts a flat stored tensor into the stacks' batches.

    Args:
        stacks: The stacks whose numbers it holds.
        flat: The tensor, None where there are no stacks.

    Returns:
        Each stack with its matrices, shape (count, inputs, outputs).
    """
    if flat is None:
        return []
    parts = flat.split([stack.numel for stack in stacks])
    return [
        (stack, part.view(stack.count, stack.inputs, stack.outputs))
        for stack, part in zip(stacks, parts, strict=True)
    ]


def batched_products(stacks: Sequence[Stack], flat: Tensor, vectors: Tensor, axis: int) -> list[Tensor]:
    """Applies stacks to consecutive parts of vectors, one batched product each.

    Args:
        stacks: The stacks.
        flat: Their numbers.
        vectors: The vectors side by side: their entries, as many as the stacks' inputs over all clusters,
            run along `axis`, and the batch along the other one.
        axis: 1 for vectors as rows, best for a few, or 0 for vectors as columns, best for many.

    Returns:
        For each stack the products, count · outputs entries along `axis`.
    """
    parts = vectors.split([stack.count * stack.inputs for stack in stacks], dim=axis)
    products = []
    for (stack, matrices), part in zip(batches(stacks, flat), parts, strict=True):
        if axis:
            batch = part.shape[0]
            product = torch.bmm(part.reshape(batch, stack.count, stack.inputs).transpose(0, 1), matrices)
            products.append(product.transpose(0, 1).reshape(batch, stack.count * stack.outputs))
        else:
            columns = part.reshape(stack.count, stack.inputs, part.shape[1])
            products.append(torch.bmm(matrices.mT, columns).flatten(0, 1))
    return products


def _inner_size(tile: Tile) -> int:
    return tile.rank or 0


def _width(tile: Tile) -> int:
    return tile.width


def _below_each_other(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _lies_in(strip: slice, rows: slice) -> bool:
    return rows.start <= strip.start and strip.stop <= rows.stop


def _parts(stacks: Sequence[Stack]) -> list[tuple[slice, tuple[int, ...]]]:
    """Every cluster or strip of some stacks with its tiles."""
    return [
        (slice(start, start + stack.extent), indices)
        for stack in stacks
        for start, indices in zip(stack.starts, stack.tiles, strict=True)
    ]


def _in_order(stacks: Sequence[Stack]) -> list[int]:
    """The tiles in the order of the stacks, one that lies across several strips as often."""
    return [index for _, indices in _parts(stacks) for index in indices]
