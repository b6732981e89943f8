"""Blocks of a matrix, and the order in which their numbers are stored and applied."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    def inner_size(self) -> int:
        """The length of the vector between the factors; 0 for a dense block."""
        return self.rank or 0

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
    """Blocks that share a cluster, stacked, for all clusters of the same size: one batched product.

    Attributes:
        starts: the clusters' first positions, ascending.
        extent: the clusters' size.
        depth: the stack's height: the sum of ranks, or for dense blocks of widths.
        tiles: for each cluster the indices of its tiles, in the order of the stack.
    """

    starts: tuple[int, ...]
    extent: int
    depth: int
    tiles: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """How many numbers the stack stores."""
        return len(self.starts) * self.extent * self.depth

    def positions(self) -> Tensor:
        """The positions of all clusters, one after the other, shape (clusters · extent,)."""
        return (torch.tensor(self.starts)[:, None] + torch.arange(self.extent)).flatten()


class BlockLayout:
    """Where the numbers of every block stand in the flat stored tensors.

    `right` holds, for every column cluster, the right factors of the blocks over it, stacked to (depth,
    extent); `left` for every row cluster the left factors beside each other, (extent, depth); `dense` for
    every row cluster its dense blocks beside each other, (extent, depth). Clusters of equal shape stand
    together, so that each tensor is a short sequence of batches: `*_stacks`.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.tiles = list(tiles)
        low_rank = [index for index, tile in enumerate(tiles) if tile.rank]
        dense = [index for index, tile in enumerate(tiles) if tile.rank is None]
        self.right_stacks = self._stacks(low_rank, "columns", lambda tile: tile.inner_size)
        self.left_stacks = self._stacks(low_rank, "rows", lambda tile: tile.inner_size)
        self.dense_stacks = self._stacks(dense, "rows", lambda tile: tile.width)
        # Where each low-rank tile's part of the inner vector starts, in the order of the right stacks.
        self.inner_start: dict[int, int] = {}
        position = 0
        for stack in self.right_stacks:
            for index in itertools.chain.from_iterable(stack.tiles):
                self.inner_start[index] = position
                position += tiles[index].inner_size
        self.inner_size = position

    def _stacks(self, members: Sequence[int], side: str, depth_of: Callable[[Tile], int]) -> list[Stack]:
        clusters: dict[tuple[int, int], list[int]] = {}
        for index in members:
            part = getattr(self.tiles[index], side)
            clusters.setdefault((part.start, part.stop - part.start), []).append(index)
        shapes: dict[tuple[int, int], list[tuple[int, tuple[int, ...]]]] = {}
        for (first, extent), indices in sorted(clusters.items()):
            depth = sum(depth_of(self.tiles[index]) for index in indices)
            shapes.setdefault((extent, depth), []).append((first, tuple(indices)))
        return [
            Stack(tuple(first for first, _ in found), extent, depth, tuple(indices for _, indices in found))
            for (extent, depth), found in shapes.items()
        ]

    def numbers(self) -> dict[str, int]:
        """The stored tensors that there are, with their sizes."""
        sizes = {
            "left": sum(stack.numel for stack in self.left_stacks),
            "right": sum(stack.numel for stack in self.right_stacks),
            "dense": sum(stack.numel for stack in self.dense_stacks),
        }
        return {name: size for name, size in sizes.items() if size}

    def pack(self, values: Sequence[Factors]) -> dict[str, Tensor]:
        """The stored tensors for the values of every tile."""
        parts = {
            "left": [
                torch.cat([values[index].left for index in indices], 1)
                for stack in self.left_stacks
                for indices in stack.tiles
            ],
            "right": [
                torch.cat([part for index in indices if (part := values[index].right) is not None])
                for stack in self.right_stacks
                for indices in stack.tiles
            ],
            "dense": [
                torch.cat([values[index].left for index in indices], 1)
                for stack in self.dense_stacks
                for indices in stack.tiles
            ],
        }
        return {name: torch.cat([part.flatten() for part in found]) for name, found in parts.items() if found}

    def unpack(self, left: Tensor | None, right: Tensor | None, dense: Tensor | None) -> list[Factors]:
        """The values of every tile as views of the stored tensors."""
        lefts = self._views(self.left_stacks, left, along=1, depth_of=lambda tile: tile.inner_size)
        rights = self._views(self.right_stacks, right, along=0, depth_of=lambda tile: tile.inner_size)
        blocks = self._views(self.dense_stacks, dense, along=1, depth_of=lambda tile: tile.width)
        values = []
        for index, tile in enumerate(self.tiles):
            if tile.rank is None:
                values.append(Factors(blocks[index], None))
            elif tile.rank:
                values.append(Factors(lefts[index], rights[index]))
            else:
                some = next(tensor for tensor in (left, dense, torch.empty(0)) if tensor is not None)
                values.append(Factors(some.new_zeros(tile.height, 0), some.new_zeros(0, tile.width)))
        return values

    def _views(
        self, stacks: Sequence[Stack], flat: Tensor | None, *, along: int, depth_of
    ) -> dict[int, Tensor]:
        views: dict[int, Tensor] = {}
        if flat is None:
            return views
        for stack, batch in zip(stacks, flat.split([stack.numel for stack in stacks]), strict=True):
            shape = (stack.extent, stack.depth) if along else (stack.depth, stack.extent)
            for indices, matrix in zip(stack.tiles, batch.view(-1, *shape), strict=True):
                parts = matrix.split([depth_of(self.tiles[index]) for index in indices], dim=along)
                views.update(zip(indices, parts, strict=True))
        return views
