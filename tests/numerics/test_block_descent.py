"""Block coordinate descent against generalised Eckart-Young, normal equations and autograd's gradients."""

import numpy as np
import pytest
import torch

from weft.numerics.block_descent import Metric, Norm, descend, independent_blocks, squared_error
from weft.numerics.block_layout import Factors, Tile
from weft.numerics.svd import truncated_svd


def metric(size, seed, decay=1.0):
    """A dense metric whose blocks are strongly coupled."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.arange(1, size + 1, dtype=torch.float64) ** -decay) @ basis.T


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(rows, columns, height, width, rank):
    return [
        Tile(slice(i, i + height), slice(j, j + width), rank)
        for i in range(0, rows, height)
        for j in range(0, columns, width)
    ]


NORMS = {
    "input": lambda: Norm(Metric(metric(16, 1))),
    "output": lambda: Norm(output=Metric(metric(12, 2))),
    "both": lambda: Norm(Metric(metric(16, 1)), Metric(metric(12, 2))),
}


def dense_of(tiles, values, like):
    matrix = torch.zeros_like(like)
    for tile, value in zip(tiles, values, strict=True):
        matrix[tile.rows, tile.columns] = value.dense()
    return matrix


def weighted(error, norm):
    """‖H^{1/2} E G^{1/2}‖_F by numpy's eigenvectors."""
    for gram, side in ((norm.output, 0), (norm.input, 1)):
        if gram.matrix is not None:
            values, vectors = np.linalg.eigh(gram.matrix.numpy())
            root = torch.from_numpy(vectors * np.sqrt(values) @ vectors.T)
            error = root @ error if side == 0 else error @ root
    return float(torch.linalg.matrix_norm(error))


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_one_block_of_low_rank_is_the_generalised_eckart_young_solution(make):
    norm, matrix = make(), weight(12, 16)
    tiles = [Tile(slice(0, 12), slice(0, 16), 3)]
    zeros = [Factors(torch.zeros(12, 3, dtype=torch.float64), torch.zeros(3, 16, dtype=torch.float64))]
    values, error = descend(matrix, tiles, zeros, norm)
    coloured = matrix
    for gram, side in ((norm.output, 0), (norm.input, 1)):
        if gram.matrix is not None:
            root = torch.linalg.cholesky(gram.matrix)
            coloured = root.T @ coloured if side == 0 else coloured @ root
    optimum = np.linalg.norm(np.linalg.svd(coloured.numpy(), compute_uv=False)[3:])
    assert error**0.5 == pytest.approx(optimum, rel=1e-6)
    assert weighted(matrix - dense_of(tiles, values, matrix), norm) == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_dense_and_full_rank_blocks_reach_zero(make):
    norm, matrix = make(), weight(12, 16)
    tiles = grid(12, 16, 6, 8, None)
    zeros = [Factors(torch.zeros(6, 8, dtype=torch.float64), None) for _ in tiles]
    _, error = descend(matrix, tiles, zeros, norm, sweeps=200, gain=1e-9)
    assert error <= 1e-6 * squared_error(matrix, (), (), norm)


def test_a_dense_block_beside_zeros_solves_the_normal_equations():
    norm, matrix = NORMS["input"](), weight(12, 16)
    tiles = [Tile(slice(0, 12), slice(0, 10), None), Tile(slice(0, 12), slice(10, 16), 0)]
    start = independent_blocks(matrix, tiles, truncated_svd, Norm())
    values, _ = descend(matrix, tiles, start, norm)
    gram = norm.input.matrix
    expected = np.linalg.solve(gram[:10, :10].numpy(), (matrix @ gram[:, :10]).T.numpy()).T
    np.testing.assert_allclose(values[0].left.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_more_sweeps_never_hurt_and_beat_independent_blocks(make, exact):
    norm, matrix = make(), weight(12, 16)
    tiles = grid(12, 16, 6, 8, 2)
    start = independent_blocks(matrix, tiles, truncated_svd, norm)
    errors = [squared_error(matrix, tiles, start, norm)]
    for sweeps in (1, 2, 4, 8, 16):
        values, error = descend(matrix, tiles, start, norm, sweeps=sweeps, gain=0.0, exact_first_sweep=exact)
        assert error == pytest.approx(weighted(matrix - dense_of(tiles, values, matrix), norm) ** 2, rel=1e-8)
        errors.append(error)
    assert all(after <= before * (1 + 1e-12) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.95 * errors[0]


def test_where_it_stops_the_gradient_in_the_factors_nearly_vanishes():
    norm, matrix = NORMS["both"](), weight(12, 16)
    tiles = grid(12, 16, 6, 8, 2)
    start = independent_blocks(matrix, tiles, truncated_svd, norm)
    norms = []
    for values in (start, descend(matrix, tiles, start, norm, sweeps=400, gain=1e-9)[0]):
        leaves = [factor.clone().requires_grad_() for value in values for factor in (value.left, value.right)]
        pairs = [Factors(left, right) for left, right in zip(leaves[::2], leaves[1::2], strict=True)]
        error = matrix - dense_of(tiles, pairs, matrix)
        (norm.output.matrix @ error @ norm.input.matrix * error).sum().backward()
        norms.append(sum(float(leaf.grad.square().sum()) for leaf in leaves) ** 0.5)
    assert norms[1] < 1e-2 * norms[0]


def test_independent_blocks_are_optimal_where_the_metric_does_not_couple_them():
    matrix = weight(12, 16)
    tiles = grid(12, 16, 6, 8, 2)
    block_diagonal = torch.block_diag(metric(8, 3), metric(8, 4))
    norm = Norm(Metric(block_diagonal))
    start = independent_blocks(matrix, tiles, truncated_svd, norm)
    before = squared_error(matrix, tiles, start, norm)
    _, after = descend(matrix, tiles, start, norm, gain=0.0, sweeps=20)
    assert after == pytest.approx(before, rel=1e-9)


def test_a_start_of_larger_rank_is_truncated_to_the_tiles():
    norm, matrix = NORMS["input"](), weight(12, 16)
    wide, narrow = grid(12, 16, 6, 8, 4), grid(12, 16, 6, 8, 2)
    start = independent_blocks(matrix, wide, truncated_svd, norm)
    values, error = descend(matrix, narrow, start, norm)
    _, fresh = descend(matrix, narrow, independent_blocks(matrix, narrow, truncated_svd, norm), norm)
    assert all(value.left.shape[1] == 2 for value in values)
    assert error <= 1.05 * fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_metric_gives_finite_values_and_descends(dtype):
    samples = torch.randn(3, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    norm, matrix = Norm(Metric((samples.T @ samples).to(dtype))), weight(12, 16).to(dtype)
    tiles = grid(12, 16, 6, 8, 1)
    start = independent_blocks(matrix, tiles, truncated_svd, Norm())
    values, error = descend(matrix, tiles, start, norm)
    assert all(bool(torch.isfinite(value.dense()).all()) for value in values)
    assert error < squared_error(matrix, tiles, start, norm)
