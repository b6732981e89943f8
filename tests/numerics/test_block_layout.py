"""The stored order of blocks: packing is undone by unpacking, and products are those of the blocks."""

import pytest
import torch

from weft.numerics.block_layout import (
    BlockLayout,
    Factors,
    Tile,
    batched_products,
    interpolative_blocks,
    stored_numbers,
)

TILES = [
    Tile(slice(0, 3), slice(0, 4), 1),
    Tile(slice(0, 3), slice(4, 6), None),
    Tile(slice(3, 7), slice(0, 4), None),
    Tile(slice(3, 7), slice(4, 6), 0),
    Tile(slice(0, 7), slice(6, 11), 2),
    Tile(slice(7, 10), slice(0, 4), 1),
    Tile(slice(7, 10), slice(4, 11), 1),
]


def random_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = []
    for tile in TILES:
        depth = tile.width if tile.rank is None else tile.rank
        left = torch.randn(tile.height, depth, generator=generator)
        right = None if tile.rank is None else torch.randn(depth, tile.width, generator=generator)
        values.append(Factors(left, right))
    return values


def test_unpacking_undoes_packing_and_nothing_else_is_stored():
    layout, values = BlockLayout(TILES), random_values()
    packed = layout.pack(values)
    assert {name: tensor.numel() for name, tensor in packed.items()} == layout.numbers()
    counted = sum(
        value.left.numel() + (0 if value.right is None else value.right.numel()) for value in values
    )
    assert sum(layout.numbers().values()) == counted
    for value, again in zip(values, layout.unpack(packed), strict=True):
        assert torch.equal(value.dense(), again.dense())
        assert (value.right is None) == (again.right is None)


def test_views_reach_the_stored_numbers():
    layout = BlockLayout(TILES)
    packed = layout.pack(random_values())
    layout.unpack(packed)[0].left.fill_(7.0)
    assert int((packed["strips"] == 7.0).sum()) == 3


def test_clusters_of_equal_shape_share_one_batch():
    tiles = [Tile(slice(4 * i, 4 * i + 4), slice(5 * j, 5 * j + 5), 1) for i in range(3) for j in range(2)]
    layout = BlockLayout(tiles)
    (right,), (left,) = layout.right_stacks, layout.strip_stacks
    assert (right.count, right.inputs, right.outputs) == (2, 5, 3)
    assert (left.count, left.inputs, left.outputs) == (3, 2, 4)
    assert not layout.dense_stacks


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batched_products_are_those_of_each_cluster(batch, axis):
    layout, values = BlockLayout(TILES), random_values()
    packed = layout.pack(values)
    x = torch.randn(batch, 11, generator=torch.Generator().manual_seed(1))

    def products(stacks, name, entries):
        given = entries if axis else entries.T
        return [part if axis else part.T for part in batched_products(stacks, packed[name], given, axis)]

    positions = torch.cat([stack.positions() for stack in layout.right_stacks])
    hidden = torch.cat(products(layout.right_stacks, "right", x[:, positions]), 1)
    assert hidden.shape == (batch, layout.inner_size)
    for index, start in layout.inner_start.items():
        tile, value = TILES[index], values[index]
        torch.testing.assert_close(hidden[:, start : start + tile.rank], x[:, tile.columns] @ value.right.T)
    total = torch.zeros(batch, 10)
    pieces = products(layout.strip_stacks, "strips", hidden[:, layout.inner_order()])
    pieces += products(layout.dense_stacks, "dense", x[:, layout.dense_order()])
    for stack, piece in zip((*layout.strip_stacks, *layout.dense_stacks), pieces, strict=True):
        total.index_add_(1, stack.positions(), piece)
    dense = torch.zeros(10, 11)
    for tile, value in zip(TILES, values, strict=True):
        dense[tile.rows, tile.columns] = value.dense()
    torch.testing.assert_close(total, x @ dense.T)


def test_a_block_is_stored_by_its_own_columns_where_that_saves_enough_and_it_is_alone_over_them():
    alone = Tile(slice(0, 80), slice(0, 50), 20)
    assert interpolative_blocks([alone]) == {0}  # 20² = 8 · 50
    assert stored_numbers([alone]) == 20 * (80 + 50 - 20)
    for other in (Tile(slice(0, 80), slice(0, 51), 20), Tile(slice(0, 80), slice(0, 50), 19)):
        assert not interpolative_blocks([other])
        assert stored_numbers([other]) == other.rank * (80 + other.width)
    below = Tile(slice(80, 160), slice(0, 50), 20)
    assert not interpolative_blocks([alone, below])
    assert interpolative_blocks([alone, Tile(below.rows, below.columns, None)]) == {0}
