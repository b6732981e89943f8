"""Cluster trees and block partitions: sizes, orders and the conditions, checked entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.numerics.cluster_tree import (
    block_partition,
    cardinality_tree,
    geometric_tree,
    off_diagonal_partition,
    principal_tree,
    strong,
    uniform_partition,
)


def all_clusters(cluster):
    """A cluster and everything below it."""
    return [cluster, *(below for child in cluster.children for below in all_clusters(child))]


def points_on_a_spiral(count, dimensions=2):
    """Distinct points without symmetry."""
    angle = torch.linspace(0.3, 9.0, count, dtype=torch.float64)
    return torch.stack([angle * angle.cos(), angle * angle.sin(), angle][:dimensions], 1)


TREES = {
    "cardinality": lambda size, leaf: cardinality_tree(size, leaf),
    "geometric": lambda size, leaf: geometric_tree(points_on_a_spiral(size), leaf),
    "principal": lambda size, leaf: principal_tree(points_on_a_spiral(size), leaf),
    "coinciding": lambda size, leaf: geometric_tree(torch.zeros(size, 2), leaf),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 120), leaf_size=st.integers(1, 40))
def test_leaves_tile_the_order_and_none_is_too_small_or_could_be_split(make, size, leaf_size):
    tree = make(size, leaf_size)
    assert sorted(tree.order.tolist()) == list(range(size))
    leaves = list(tree.root.leaves())
    assert [leaf.start for leaf in leaves] == [0, *(leaf.stop for leaf in leaves[:-1])]
    assert leaves[-1].stop == size
    assert all(leaf.size < 2 * leaf_size for leaf in leaves)
    assert len(leaves) == 1 or all(leaf.size >= leaf_size for leaf in leaves)
    for cluster in all_clusters(tree.root):
        if cluster.children:
            first, second = cluster.children
            assert (first.start, first.stop, second.stop) == (cluster.start, second.start, cluster.stop)


@pytest.mark.parametrize("size", [7, 64, 101])
def test_halves_differ_by_one_at_most_in_cardinality_and_principal_trees(size):
    shapes = []
    for tree in (cardinality_tree(size, 3), principal_tree(points_on_a_spiral(size), 3)):
        for cluster in all_clusters(tree.root):
            if cluster.children:
                assert cluster.children[0].size - cluster.children[1].size in (0, 1)
        shapes.append([leaf.size for leaf in tree.root.leaves()])
    assert shapes[0] == shapes[1]
    assert torch.equal(cardinality_tree(size, 3).order, torch.arange(size))


def test_boxes_hold_their_points_and_distances_are_those_of_the_boxes():
    points = points_on_a_spiral(60, 3)
    tree = geometric_tree(points, 5)
    clusters = all_clusters(tree.root)
    for cluster in clusters:
        own = points[tree.order[cluster.start : cluster.stop]]
        torch.testing.assert_close(
            torch.tensor(cluster.box, dtype=torch.float64), torch.stack([own.amin(0), own.amax(0)])
        )
        assert cluster.diameter >= float(torch.pdist(own).max()) - 1e-12 if len(own) > 1 else True
        for other in clusters:
            theirs = points[tree.order[other.start : other.stop]]
            nearest = float(torch.cdist(own, theirs).min())
            assert cluster.distance(other) <= nearest + 1e-7
            assert cluster.distance(other) == pytest.approx(other.distance(cluster))


def test_geometric_bisection_separates_two_clouds_and_a_principal_split_follows_the_long_axis():
    generator = torch.Generator().manual_seed(0)
    clouds = torch.cat([torch.rand(6, 2, generator=generator), torch.rand(11, 2, generator=generator) + 9.0])
    first, second = geometric_tree(clouds, 3).root.children
    assert (first.size, second.size) == (6, 11)
    along = torch.linspace(-1, 1, 20, dtype=torch.float64)[torch.randperm(20, generator=generator)]
    diagonal = along[:, None] * torch.tensor([3.0, 4.0], dtype=torch.float64)
    ordered = along[principal_tree(diagonal, 1).order]
    assert torch.equal(ordered, ordered.sort(descending=bool(ordered[0] > ordered[-1])).values)


def coverage(blocks, rows, columns):
    """How often each entry is covered."""
    count = torch.zeros(rows, columns, dtype=torch.int64)
    for block in blocks:
        count[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop] += 1
    return count


PARTITIONS = {
    "weak": off_diagonal_partition,
    "uniform": uniform_partition,
    "strong": lambda rows, columns: block_partition(rows, columns, strong(1.0)),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), leaf_size=st.integers(1, 20))
def test_blocks_tile_the_matrix(partition, rows, columns, leaf_size):
    blocks = partition(cardinality_tree(rows, leaf_size).root, cardinality_tree(columns, leaf_size).root)
    assert bool((coverage(blocks, rows, columns) == 1).all())


def test_weak_admissibility_leaves_only_the_diagonal_leaves_dense():
    tree = cardinality_tree(64, 8)
    blocks = off_diagonal_partition(tree.root, tree.root)
    dense = [(block.rows.start, block.columns.start) for block in blocks if not block.admissible]
    assert dense == [(start, start) for start in range(0, 64, 8)]
    assert sorted(block.rows.size for block in blocks if block.admissible) == [8] * 8 + [16] * 4 + [32] * 2


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_strong_admissibility_holds_on_every_block_and_on_no_coarser_one(eta):
    points = points_on_a_spiral(200)
    tree = geometric_tree(points, 6)
    condition = strong(eta)
    blocks = block_partition(tree.root, tree.root, condition)
    parents = {
        (child.start, child.stop): cluster
        for cluster in all_clusters(tree.root)
        for child in cluster.children
    }
    assert any(block.admissible for block in blocks)
    for block in blocks:
        own, theirs = (points[tree.order[c.start : c.stop]] for c in (block.rows, block.columns))
        if block.admissible:
            gap = float(torch.cdist(own, theirs).min())
            diameters = [float(torch.pdist(part).max()) if len(part) > 1 else 0.0 for part in (own, theirs)]
            assert max(diameters) <= eta * gap * (1 + 1e-9)
        else:
            assert not (block.rows.children and block.columns.children)
        row_parent = parents.get((block.rows.start, block.rows.stop))
        column_parent = parents.get((block.columns.start, block.columns.stop))
        if row_parent is not None and column_parent is not None:
            assert not condition(row_parent, column_parent)


def test_storage_of_a_strong_partition_grows_like_n_log_n():
    per_row = []
    for size in (256, 512, 1024, 2048, 4096):
        tree = cardinality_tree(size, 16)
        blocks = block_partition(tree.root, tree.root, strong(1.0))
        numbers = sum(
            4 * (block.rows.size + block.columns.size)
            if block.admissible
            else block.rows.size * block.columns.size
            for block in blocks
        )
        per_row.append(numbers / size)
    # n log n means that every doubling adds the same to the storage of a row; n² would double it.
    growth = [after - before for before, after in zip(per_row, per_row[1:], strict=False)]
    assert max(growth) <= 1.05 * min(growth)


def test_impossible_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="leaf_size must be at least 1, got 0"):
        cardinality_tree(5, 0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        cardinality_tree(0, 1)
    with pytest.raises(ValueError, match="points must be of shape"):
        geometric_tree(torch.zeros(5), 1)
    with pytest.raises(ValueError, match="points must be finite"):
        principal_tree(torch.full((5, 2), torch.nan), 1)
    with pytest.raises(ValueError, match="eta must be a finite number above 0"):
        strong(0.0)
