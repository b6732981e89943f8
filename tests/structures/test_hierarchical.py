"""Hierarchical matrices: kernels with known decay, planted blocks, the methods' ranks, the weighted fit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.structures.base import DenseGram, DiagonalGram, relative_error
from weft.structures.hierarchical import Hierarchical

CLASSIFIER = Path(__file__).parents[3] / "shared/data/imagenet_features/mobilenet_v2.npz"
KERNELS = {
    "inverse": lambda distance: 1.0 / (distance + (distance == 0) * 0.01),
    "logarithm": lambda distance: torch.log(distance + (distance == 0) * 0.01),
}


def line(size):
    return (torch.arange(size, dtype=torch.float64) / size)[:, None]


def square(side):
    axis = torch.arange(side, dtype=torch.float64) / side
    return torch.cartesian_prod(axis, axis)


def kernel_matrix(name, points):
    return KERNELS[name](torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist"))


def spectral_decay(rows, columns, seed=0):
    """σ_k = k^-0.75, like a trained weight."""
    random = np.random.default_rng(seed)
    size = min(rows, columns)
    left = np.linalg.qr(random.standard_normal((rows, size)))[0]
    right = np.linalg.qr(random.standard_normal((columns, size)))[0]
    return torch.from_numpy(left * np.arange(1, size + 1) ** -0.75 @ right.T)


def correlated_gram(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.relu(torch.randn(6 * size, size, generator=generator, dtype=torch.float64) @ mixing)
    return DenseGram(x.T @ x / len(x))


@pytest.mark.parametrize("method", ["svd", "rrqr", "aca", "aca_full"])
@pytest.mark.parametrize("name", KERNELS)
def test_error_falls_geometrically_with_rank_on_a_line(name, method):
    matrix = kernel_matrix(name, line(512))
    family = Hierarchical(rank=1, leaf_size=16, admissibility="strong", clustering="geometric", method=method)
    ranks = (1, 2, 3, 4, 5, 6)
    errors = [
        relative_error(matrix, dataclasses.replace(family, rank=rank).fit(matrix).to_dense())
        for rank in ranks
    ]
    # Asymptotically smooth kernels: at η = 1 each further term of the expansion gains a constant factor.
    slope = np.polyfit(ranks, np.log(errors), 1)[0]
    assert slope < np.log(0.3)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("name", KERNELS)
def test_error_falls_with_rank_on_a_square(name):
    side = 32
    matrix = kernel_matrix(name, square(side))
    family = Hierarchical(
        rank=1,
        leaf_size=32,
        admissibility="strong",
        eta=1.5,
        clustering="geometric",
        row_grid=(side, side),
        column_grid=(side, side),
    )
    errors = [
        relative_error(matrix, dataclasses.replace(family, rank=rank).fit(matrix).to_dense())
        for rank in (1, 3, 6, 10)
    ]
    # Ranks 1, 3, 6, 10 are the polynomials of degree 0 … 3 in two variables: again a factor per degree.
    assert all(after < 0.5 * before for before, after in zip(errors, errors[1:], strict=False))


def test_storage_at_a_tolerance_grows_like_n_log_n():
    per_row = []
    for size in (256, 512, 1024, 2048):
        matrix = kernel_matrix("inverse", line(size))
        member = Hierarchical(
            tolerance=1e-3, leaf_size=16, admissibility="strong", clustering="geometric", method="rrqr"
        ).fit(matrix)
        assert relative_error(matrix, member.to_dense()) <= 1e-3
        per_row.append(member.cost().parameters / size)
    growth = [after - before for before, after in zip(per_row, per_row[1:], strict=False)]
    assert all(
        step < 0.35 * per_row[0] for step in growth
    )  # n² would add the whole of it, and more each time
    assert growth[-1] < 1.3 * growth[0]


@pytest.mark.parametrize("method", ["svd", "rrqr", "aca", "aca_full"])
@pytest.mark.parametrize("admissibility", ["weak", "strong", "uniform"])
def test_planted_block_ranks_are_recovered(admissibility, method):
    structure = Hierarchical(rank=2, leaf_size=7, admissibility=admissibility, method=method)
    planted = structure.initialise((60, 45), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = planted.to_dense().detach()
    assert relative_error(dense, structure.fit(dense).to_dense()) < 1e-10


@pytest.mark.parametrize("method", ["rrqr", "aca", "aca_full"])
def test_other_methods_are_never_better_than_svd_and_within_known_factors(method):
    matrix = spectral_decay(96, 80)
    rank, leaf_size = 4, 20
    svd = Hierarchical(rank=rank, leaf_size=leaf_size, admissibility="uniform").fit(matrix)
    other = Hierarchical(rank=rank, leaf_size=leaf_size, admissibility="uniform", method=method).fit(matrix)
    best, error = (relative_error(matrix, member.to_dense()) for member in (svd, other))
    assert best <= error * (1 + 1e-12)
    # √(1 + 4^k k (n − k)) is the bound of pivoted QR (Gu and Eisenstat 1996), which crosses meet here too.
    assert error <= best * np.sqrt(1 + 4.0**rank * rank * (leaf_size - rank))


def test_tolerance_holds_block_by_block_and_one_rank_fewer_would_not_do():
    matrix = spectral_decay(64, 64)
    member = Hierarchical(tolerance=0.4, leaf_size=8).fit(matrix)
    assert any(tile.rank for tile in member.tiles)
    for tile, factors in zip(member.tiles, member.factors(), strict=True):
        block = matrix[tile.rows, tile.columns]
        values = np.linalg.svd(block.numpy(), compute_uv=False)
        if tile.rank is None:
            torch.testing.assert_close(factors.dense(), block)
        else:
            assert float((block - factors.dense()).detach().norm()) <= 0.4 * np.linalg.norm(values)
            assert np.linalg.norm(values[tile.rank - 1 :]) > 0.4 * np.linalg.norm(values)


def test_adaptive_partition_finds_a_low_rank_corner_and_a_zero_corner():
    generator = torch.Generator().manual_seed(2)
    matrix = torch.zeros(64, 64, dtype=torch.float64)
    matrix[:32, :32] = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    u, v = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    matrix[32:, :32] = u[:, None] * v
    member = Hierarchical(tolerance=1e-8, leaf_size=8, admissibility="adaptive").fit(matrix)
    assert relative_error(matrix, member.to_dense()) < 1e-12
    assert member.cost().parameters == 32 * 32 + 64
    kinds = {(r.row, r.column, r.rows, r.columns): (r.kind, r.label) for r in member.picture()}
    assert kinds[32, 0, 32, 32] == ("low_rank", "1")
    assert {kind for (_, column, *_), (kind, _) in kinds.items() if column >= 32} == {"zero"}
    assert {kind for (row, column, *_), (kind, _) in kinds.items() if row < 32 and column < 32} == {"dense"}


def test_adaptive_never_stores_more_than_the_fixed_partitions_at_the_same_tolerance():
    matrix = kernel_matrix("inverse", line(256))
    cost = {
        name: Hierarchical(tolerance=1e-3, leaf_size=16, admissibility=name).fit(matrix).cost().parameters
        for name in ("weak", "uniform", "strong", "adaptive")
    }
    assert cost["adaptive"] <= min(cost.values())
    assert cost["adaptive"] < 256 * 256


def test_a_principal_order_undoes_a_shuffle():
    generator = torch.Generator().manual_seed(3)
    blocks = torch.block_diag(*(torch.ones(20, 24, dtype=torch.float64) * scale for scale in (1.0, 1.4)))
    rows, columns = torch.randperm(40, generator=generator), torch.randperm(48, generator=generator)
    shuffled = blocks[rows][:, columns]
    structure = Hierarchical(rank=1, leaf_size=12, admissibility="uniform")
    plain, principal, automatic = (
        dataclasses.replace(structure, clustering=name).fit(shuffled)
        for name in ("cardinality", "principal", "automatic")
    )
    assert relative_error(shuffled, plain.to_dense()) > 0.1
    assert relative_error(shuffled, principal.to_dense()) < 1e-10
    assert relative_error(shuffled, automatic.to_dense()) < 1e-10
    x = torch.randn(3, 48, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(principal(x), x @ shuffled.T)


def test_automatic_clustering_keeps_the_order_where_that_is_better():
    matrix = kernel_matrix("inverse", line(128))
    structure = Hierarchical(rank=2, leaf_size=16)
    errors = {
        name: relative_error(matrix, dataclasses.replace(structure, clustering=name).fit(matrix).to_dense())
        for name in ("cardinality", "principal", "automatic")
    }
    assert errors["automatic"] == min(errors.values())


def test_a_grid_serves_a_two_dimensional_kernel_better_than_a_line():
    side = 16
    matrix = kernel_matrix("logarithm", square(side))
    structure = Hierarchical(rank=3, leaf_size=16, admissibility="uniform", clustering="geometric")
    gridded = dataclasses.replace(structure, row_grid=(side, side), column_grid=(side, side))
    on_line, on_grid = (relative_error(matrix, s.fit(matrix).to_dense()) for s in (structure, gridded))
    assert on_grid < 0.7 * on_line


@pytest.mark.parametrize(
    ("clustering", "admissibility"),
    [("geometric", "strong"), ("principal", "strong"), ("principal", "uniform")],
)
def test_scattered_points_may_be_given(clustering, admissibility):
    generator = torch.Generator().manual_seed(4)
    rows, columns = (torch.rand(size, 2, generator=generator, dtype=torch.float64) for size in (400, 300))
    matrix = torch.log(torch.cdist(rows, columns) + 1e-3)
    errors, shares = [], []
    for rank in (1, 2, 3):
        structure = Hierarchical(
            rank=rank, leaf_size=8, admissibility=admissibility, eta=2.0, clustering=clustering
        )
        member = structure.fit_points(matrix, rows, columns)
        errors.append(relative_error(matrix, member.to_dense()))
        shares.append(member.cost().parameters / matrix.numel())
        again = structure.from_tensors((400, 300), member.stored())
        assert torch.equal(again.to_dense(), member.to_dense())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0
    assert shares[0] < 0.55
    with pytest.raises(ValueError, match=r"row_points must be of shape \(400, dimensions\)"):
        structure.fit_points(matrix, columns, columns)
    with pytest.raises(ValueError, match="clustering must be 'geometric' or 'principal'"):
        dataclasses.replace(structure, clustering="cardinality").fit_points(matrix, rows, columns)


@pytest.mark.parametrize("admissibility", ["weak", "uniform"])
def test_descent_pays_where_the_gram_couples_the_blocks(admissibility):
    matrix, gram = spectral_decay(48, 64), correlated_gram(64)
    structure = Hierarchical(rank=2, leaf_size=12, admissibility=admissibility)
    plain, weighted = structure.fit(matrix), structure.fit(matrix, input_gram=gram)
    errors = [relative_error(matrix, member.to_dense(), input_gram=gram) for member in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]
    assert plain.cost() == weighted.cost()


def test_diagonal_grams_are_solved_exactly():
    matrix = spectral_decay(24, 32)
    inputs = torch.linspace(0.1, 3.0, 32, dtype=torch.float64)
    outputs = torch.linspace(2.0, 0.2, 24, dtype=torch.float64)
    structure = Hierarchical(rank=2, leaf_size=8, admissibility="uniform")
    grams = {"input_gram": DiagonalGram(inputs, 0.0), "output_gram": DiagonalGram(outputs, 0.0)}
    member = structure.fit(matrix, **grams)
    scaled = outputs.sqrt()[:, None] * matrix * inputs.sqrt()
    tails = 0.0
    for tile in member.tiles:
        values = np.linalg.svd(scaled[tile.rows, tile.columns].numpy(), compute_uv=False)
        tails += np.sum(values[tile.rank :] ** 2)
    expected = np.sqrt(tails) / float(scaled.norm())
    assert relative_error(matrix, member.to_dense(), **grams) == pytest.approx(expected, rel=1e-9)


def test_a_refit_from_a_start_keeps_its_order_and_goes_on():
    matrix, gram = spectral_decay(48, 64), correlated_gram(64)
    structure = Hierarchical(rank=2, leaf_size=12, admissibility="uniform", clustering="principal")
    first = structure.fit(matrix, input_gram=gram)
    moved = matrix + 0.05 * spectral_decay(48, 64, seed=1)
    second = structure.fit(moved, input_gram=gram, start=first)
    assert torch.equal(first.row_order, second.row_order)
    before = relative_error(moved, first.to_dense(), input_gram=gram)
    assert relative_error(moved, second.to_dense(), input_gram=gram) < before


def test_forward_never_forms_the_dense_matrix():
    structure = Hierarchical(rank=2, leaf_size=64)
    member = structure.initialise((1024, 1024))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, tensor.numel())
            return result

    stored = sum(tensor.numel() for tensor in member.stored().values())
    with torch.no_grad(), Watch():
        member(torch.randn(2, 1024))
        assert largest <= stored < 0.2 * 1024**2
        largest = 0
        member.rows(torch.tensor([3, 700]))
        assert largest <= stored


@pytest.mark.parametrize("shape", [(37, 53), (1, 200), (200, 1), (7, 1000)])
def test_odd_shapes_and_large_leaves_work(shape):
    matrix = spectral_decay(*shape).float()
    for structure in (
        Hierarchical(rank=1, leaf_size=10_000),
        Hierarchical(rank=1, leaf_size=1, admissibility="uniform"),
        Hierarchical(tolerance=0.2, leaf_size=3, admissibility="adaptive", clustering="automatic"),
    ):
        member = structure.fit(matrix)
        x = torch.randn(2, shape[1])
        torch.testing.assert_close(member(x), x @ member.to_dense().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 31, 32, 60])
def test_small_and_large_batches_give_the_same_products_and_gradients(batch):
    structure = Hierarchical(tolerance=0.3, leaf_size=5, admissibility="adaptive", clustering="principal")
    member = structure.fit(spectral_decay(40, 48))
    x = torch.randn(
        batch, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).requires_grad_()
    dense = member.to_dense()
    outputs = member(x), x @ dense.T
    got, expected = (
        torch.autograd.grad(output.square().sum(), [x, *member.parameters()]) for output in outputs
    )
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("admissibility", ["weak", "uniform", "adaptive"])
def test_an_exported_program_takes_any_batch(admissibility):
    structure = Hierarchical(tolerance=0.5, leaf_size=6, admissibility=admissibility, clustering="principal")
    member = structure.fit(spectral_decay(30, 40).float())
    sizes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(member, (torch.randn(3, 40),), dynamic_shapes=sizes)
    for batch in (1, 7, 50):
        x = torch.randn(batch, 40, generator=torch.Generator().manual_seed(6))
        torch.testing.assert_close(program.module()(x), member(x), rtol=1e-4, atol=1e-5)


def test_integers_are_stored_in_two_bytes_and_only_where_needed():
    matrix = spectral_decay(40, 48).float()
    fixed = Hierarchical(rank=2, leaf_size=10).fit(matrix)
    assert set(fixed.stored()) == {"strips", "right", "dense"}
    ordered = dataclasses.replace(fixed.structure, clustering="principal").fit(matrix)
    assert ordered.stored()["row_order"].nbytes == 80
    assert ordered.cost().bytes == 4 * ordered.cost().parameters + 80 + 96
    adaptive = Hierarchical(tolerance=0.3, leaf_size=10, admissibility="adaptive").fit(matrix)
    assert adaptive.stored()["blocks"].nbytes == 10 * len(adaptive.tiles)


# Blocks of which two thirds are columns that the others are combinations of.
OWN_COLUMNS = (Hierarchical(rank=24, leaf_size=32), (140, 136))
each_order = pytest.mark.parametrize("clustering", ["cardinality", "principal"])


def own_columns_member(clustering, dtype=torch.float64):
    structure, shape = OWN_COLUMNS
    return dataclasses.replace(structure, clustering=clustering).fit(spectral_decay(*shape).to(dtype))


@each_order
def test_blocks_by_their_own_columns_are_the_best_of_their_rank_in_fewer_numbers(clustering):
    member, matrix = own_columns_member(clustering), spectral_decay(*OWN_COLUMNS[1])
    rows, columns = member.orders()
    ordered, fitted = matrix[rows][:, columns], member.to_dense()[rows][:, columns]
    low_rank = [tile for tile in member.tiles if tile.rank]
    assert len(low_rank) == 2
    for tile in low_rank:
        u, s, v = np.linalg.svd(ordered[tile.rows, tile.columns].numpy(), full_matrices=False)
        best = torch.from_numpy((u[:, :24] * s[:24]) @ v[:24])
        torch.testing.assert_close(fitted[tile.rows, tile.columns], best)
    factors = sum(24 * (tile.height + tile.width) for tile in low_rank)
    saved = member.cost().parameters
    assert saved == 2 * 70 * 68 + factors - 2 * 24**2
    assert member.stored()["chosen"].nbytes == 2 * 68 // 8
    if clustering == "cardinality":
        predicted = member.structure.predicted_cost(member.shape, 8)
        assert (predicted.parameters, predicted.bytes) == (saved, 8 * saved + 17)


@each_order
@pytest.mark.parametrize("batch", [1, 31, 40])
def test_blocks_by_their_own_columns_give_the_dense_products_and_gradients(clustering, batch):
    member = own_columns_member(clustering)
    x = torch.randn(batch, 136, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x.requires_grad_()
    outputs = member(x), x @ member.to_dense().T
    got, expected = (
        torch.autograd.grad(output.square().sum(), [x, *member.parameters()]) for output in outputs
    )
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(got, expected)
    indices = torch.tensor([[0, 139, 70], [70, 69, 3]])
    torch.testing.assert_close(member.rows(indices), member.to_dense()[indices])


@each_order
def test_blocks_by_their_own_columns_are_read_back_and_refused_with_another_number_of_them(clustering):
    member = own_columns_member(clustering)
    again = member.structure.from_tensors(member.shape, member.stored())
    assert torch.equal(again.to_dense(), member.to_dense())
    refit = member.structure.fit(member.to_dense(), start=member)
    torch.testing.assert_close(refit.to_dense(), member.to_dense())
    chosen = member.stored()["chosen"].clone()
    chosen[0] ^= 1
    with pytest.raises(ValueError, match="chosen must be 24 columns marked for block"):
        member.structure.from_tensors(member.shape, {**member.stored(), "chosen": chosen})


def test_a_block_of_zeros_is_kept_by_its_own_columns_too():
    matrix = spectral_decay(140, 136)
    matrix[:70, 68:] = 0.0
    member = OWN_COLUMNS[0].fit(matrix)
    assert not member.to_dense()[:70, 68:].any()
    assert all(bool(tensor.isfinite().all()) for tensor in member.parameters())


def test_a_table_that_does_not_tile_or_an_order_that_is_none_is_refused():
    matrix = spectral_decay(40, 48).float()
    member = Hierarchical(tolerance=0.3, leaf_size=10, clustering="principal").fit(matrix)
    stored = member.stored()
    for name, message in (
        ("blocks", "blocks must be a table of blocks that tile"),
        ("row_order", "a permutation of 40"),
    ):
        broken = stored[name].clone()
        broken[1] = broken[0]
        with pytest.raises(ValueError, match=message):
            member.structure.from_tensors((40, 48), {**stored, name: broken})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "rank or tolerance must be given"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be a share above 0"),
        ({"rank": 1, "leaf_size": 0}, "leaf_size must be at least 1"),
        ({"rank": 1, "admissibility": "adaptive"}, "tolerance must be given for adaptive admissibility"),
        ({"rank": 1, "admissibility": "none"}, "admissibility must be one of"),
        ({"rank": 1, "eta": 0.0}, "eta must be a finite number above 0"),
        ({"rank": 1, "clustering": "random"}, "clustering must be one of"),
        ({"rank": 1, "method": "qr"}, "method must be one of"),
    ],
)
def test_impossible_structures_are_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        Hierarchical(**arguments)


def test_sizes_that_do_not_fit_the_weight_are_refused_by_name():
    matrix = spectral_decay(12, 10)
    with pytest.raises(ValueError, match="rank must be between 1 and 10 for a"):
        Hierarchical(rank=11).fit(matrix)
    with pytest.raises(ValueError, match="row_grid must be a grid of 12 points"):
        Hierarchical(rank=1, row_grid=(5, 2)).fit(matrix)


@pytest.mark.slow
@pytest.mark.skipif(not CLASSIFIER.exists(), reason=f"{CLASSIFIER} is not there")
def test_a_fifth_of_a_real_classifier_weighted_against_plain():
    data = np.load(CLASSIFIER)
    weight, features = torch.from_numpy(data["W"]), torch.from_numpy(data["f_sample"]).double()
    gram = DenseGram(features.T @ features / len(features))
    structure = Hierarchical(rank=7, leaf_size=62, admissibility="uniform", clustering="principal")
    plain, weighted = structure.fit(weight), structure.fit(weight, input_gram=gram)
    assert plain.cost().parameters <= 0.2 * weight.numel()
    errors = [relative_error(weight, member.to_dense(), input_gram=gram) for member in (plain, weighted)]
    assert errors[1] / errors[0] <= 0.65

    def accuracy(member):
        logits = data["f_val"] @ member.to_dense().detach().numpy().T + data["b"]
        return float((logits.argmax(1) == data["y_val"]).mean())

    assert accuracy(weighted) >= accuracy(plain) + 0.12
