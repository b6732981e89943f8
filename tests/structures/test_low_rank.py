"""Low rank: the textbook's facts, the generalised Eckart-Young theorem by other routes, the four methods."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DenseGram, DiagonalGram, Gram
from weft.structures.base import Geometry, relative_error
from weft.structures.low_rank import METHODS, LowRank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, *, power: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix with singular values k^(-power)."""
    width = min(rows, columns)
    left = torch.linalg.qr(drawn(rows, width, seed=seed)).Q
    right = torch.linalg.qr(drawn(columns, width, seed=seed + 1)).Q
    return (left * torch.arange(1, width + 1, dtype=torch.float64) ** -power) @ right.T


def gram_of(size: int, *, samples: int = 40, shrinkage: float = 0.1, seed: int = 3) -> DenseGram:
    x = torch.relu(drawn(samples, size, seed=seed)) + 0.1
    return DenseGram(x.T @ x / samples, shrinkage)


sizes = st.integers(1, 9)


# ------------------------------------------------------------------------------------------------------------
# Textbook facts


@given(sizes, sizes, st.integers(1, 9), st.integers(1, 6), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_the_error_behind_any_input_is_at_most_the_next_singular_value(
    rows: int, columns: int, rank: int, samples: int, seed: int
) -> None:
    """‖A Ŵ − A W‖_F ≤ s_{t+1} ‖A‖_F for W (m, k) of which t singular values are kept (Denton et al. 2014)."""
    weight, rank = drawn(rows, columns, seed=seed), min(rank, rows, columns)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    next_value = values[rank] if rank < len(values) else 0.0
    approximation = LowRank(rank).fit(weight).to_dense().detach()
    inputs = drawn(samples, columns, seed=seed + 1)
    assert float((inputs @ (approximation - weight).T).norm()) <= next_value * float(inputs.norm()) + 1e-9
    assert np.linalg.norm((approximation - weight).numpy(), 2) == pytest.approx(next_value, abs=1e-9)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None)
def test_the_compression_rate_is_the_textbooks(rows: int, columns: int, rank: int) -> None:
    """mk / (t(m + k)), the singular values absorbed into the factors."""
    rank = min(rank, rows, columns)
    rate = rows * columns / LowRank(rank).initialise((rows, columns)).cost().parameters
    assert rate == rows * columns / (rank * (rows + columns))


@given(sizes, sizes)
@settings(deadline=None, max_examples=20)
def test_candidates_are_those_that_store_less_than_the_dense_weight(rows: int, columns: int) -> None:
    ranks = [candidate.rank for candidate in LowRank.candidates((rows, columns))]
    saving = [rank for rank in range(1, min(rows, columns) + 1) if rank * (rows + columns) < rows * columns]
    assert ranks[0] == 1
    assert ranks[-1] == max(saving, default=1)
    assert set(ranks) <= {1, *saving}


# ------------------------------------------------------------------------------------------------------------
# Generalised Eckart-Young


def nearest_by_whitening(weight: np.ndarray, rank: int, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """The optimum by symmetric square roots, truncation and un-whitening: another route than the fit's."""
    left, right = scipy.linalg.sqrtm(outer).real, scipy.linalg.sqrtm(inner).real
    u, s, v = np.linalg.svd(left @ weight @ right)
    truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
    return np.linalg.solve(left, truncated) @ np.linalg.inv(right)


@given(
    st.integers(2, 8), st.integers(2, 8), st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 99)
)
@settings(deadline=None, max_examples=60)
def test_the_weighted_fit_is_the_whitened_optimum(
    rows: int, columns: int, rank: int, with_input: bool, with_output: bool, seed: int
) -> None:
    weight, rank = drawn(rows, columns, seed=seed), min(rank, rows, columns)
    inner, outer = gram_of(columns, seed=seed), gram_of(rows, seed=seed + 1)
    grams: dict[str, Gram] = {}
    grams |= {"input_gram": inner} if with_input else {}
    grams |= {"output_gram": outer} if with_output else {}
    got = LowRank(rank).fit(weight, **grams).to_dense().detach()
    expected = nearest_by_whitening(
        weight.numpy(),
        rank,
        inner.dense().numpy() if with_input else np.eye(columns),
        outer.dense().numpy() if with_output else np.eye(rows),
    )
    best = relative_error(weight, torch.from_numpy(expected), **grams)
    assert relative_error(weight, got, **grams) == pytest.approx(best, rel=1e-6, abs=1e-9)
    if rank < min(rows, columns):
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_alternating_least_squares_finds_nothing_better() -> None:
    weight, rank = drawn(7, 9), 3
    inner, outer = gram_of(9), gram_of(7, seed=8)
    grams: dict[str, Gram] = {"input_gram": inner, "output_gram": outer}
    metric, _ = inner.dense(), outer.dense()
    fitted = relative_error(weight, LowRank(rank).fit(weight, **grams).to_dense(), **grams)
    best = math.inf
    for seed in range(8):
        right = drawn(rank, 9, seed=100 + seed)
        for _ in range(
            300
        ):  # each half is a least-squares problem; H drops out of the one for L, Ĝ out of that for R
            left = weight @ metric @ right.T @ torch.linalg.inv(right @ metric @ right.T)
            right = torch.linalg.solve(left.T @ outer.dense() @ left, left.T @ outer.dense() @ weight)
        best = min(best, relative_error(weight, left @ right, **grams))
    assert fitted == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["input", "output", "both"])
def test_singular_grams_give_the_optimum_and_a_bounded_weight(which: str, dtype: torch.dtype) -> None:
    rows, columns, samples = 20, 30, 6
    weight = drawn(rows, columns).to(dtype)
    x, g = drawn(samples, columns, seed=1), drawn(samples, rows, seed=2)
    grams: dict[str, Gram] = {}
    if which != "output":
        grams["input_gram"] = DenseGram(x.T @ x, shrinkage=0.0)
    if which != "input":
        grams["output_gram"] = DenseGram(g.T @ g, shrinkage=0.0)
    seen = weight.double()
    seen = seen if which == "output" else seen @ x.T
    seen = seen if which == "input" else g @ seen
    values = torch.linalg.svdvals(seen)
    for rank in (2, samples):
        approximation = LowRank(rank).fit(weight, **grams).to_dense()
        optimum = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert relative_error(weight, approximation, **grams) == pytest.approx(optimum, rel=1e-3, abs=1e-3)
        assert torch.isfinite(approximation).all()
        assert float(approximation.detach().norm()) <= 5 * float(weight.norm())


@pytest.mark.parametrize("kind", ["diagonal", "dense", "none"])
def test_the_error_curve_is_the_tail_of_the_whitened_singular_values(kind: str) -> None:
    weight = decaying(12, 16)
    gram = {"diagonal": DiagonalGram(gram_of(16).moment.diagonal()), "dense": gram_of(16), "none": None}[kind]
    root = np.eye(16) if gram is None else scipy.linalg.sqrtm(gram.dense().numpy()).real
    values = np.linalg.svd(weight.numpy() @ root, compute_uv=False)
    curve = LowRank.error_curve(weight, input_gram=gram)
    assert [point.structure for point in curve] == [LowRank(rank) for rank in range(1, len(curve) + 1)]
    for rank, point in enumerate(curve, start=1):
        expected = math.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
        assert point.error == pytest.approx(expected, rel=1e-6)
        assert point.error == pytest.approx(
            relative_error(weight, LowRank(rank).fit(weight, input_gram=gram).to_dense(), input_gram=gram),
            rel=1e-6,
        )


# ------------------------------------------------------------------------------------------------------------
# Methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("power", "factor"), [(1.0, 2.0), (3.0, 3.0)])
def test_every_method_is_within_a_factor_of_the_best(
    method: str, weighted: bool, power: float, factor: float
) -> None:
    weight = decaying(60, 48, power=power)
    grams: dict[str, Gram] = {"input_gram": gram_of(48, samples=200)} if weighted else {}
    for rank in (1, 4, 12, 30):
        best = relative_error(weight, LowRank(rank).fit(weight, **grams).to_dense(), **grams)
        error = relative_error(weight, LowRank(rank, method).fit(weight, **grams).to_dense(), **grams)
        assert best * (1 - 1e-9) <= error <= factor * best


@pytest.mark.parametrize("method", METHODS)
def test_every_method_recovers_a_matrix_of_lower_rank_than_asked_for(method: str) -> None:
    weight = drawn(20, 3) @ drawn(3, 30, seed=1)
    member = LowRank(7, method).fit(weight)
    torch.testing.assert_close(member.to_dense().detach(), weight, rtol=1e-9, atol=1e-9)
    assert member.left.shape == (20, 7)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_weight_gives_zero(method: str) -> None:
    member = LowRank(2, method).fit(torch.zeros(5, 6))
    assert torch.equal(member.to_dense(), torch.zeros(5, 6))
    assert LowRank.error_curve(torch.zeros(5, 6))[0].error == 0.0


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_scale_of_the_weight_does_not_matter(scale: float) -> None:
    weight = decaying(12, 10).float() * scale
    member = LowRank(3).fit(weight)
    expected = LowRank(3).fit(weight.double())
    torch.testing.assert_close(
        member.to_dense() / scale, expected.to_dense().float() / scale, rtol=1e-4, atol=1e-6
    )


def test_the_factors_carry_the_same_weight() -> None:
    member = LowRank(4).fit(decaying(12, 10), input_gram=gram_of(10))
    torch.testing.assert_close(member.left.norm(dim=0), member.right.norm(dim=1))


def test_a_grouped_convolutions_fit_is_the_optimum_for_its_right_factor() -> None:
    """Every group of rows has its own metric: L is optimal for the R found, by normal equations in NumPy."""
    weight = drawn(8, 5)
    blocks = torch.stack([gram_of(5, seed=seed).moment for seed in range(4)])
    gram = BlockDiagonalGram(blocks)
    member = LowRank(2).fit(weight, input_gram=gram)
    left, right = member.left.detach().numpy(), member.right.detach().numpy()
    for group in range(4):
        metric = blocks[group].numpy() + gram.ridge * np.eye(5)
        rows = slice(2 * group, 2 * group + 2)
        best = weight.numpy()[rows] @ metric @ right.T @ np.linalg.inv(right @ metric @ right.T)
        np.testing.assert_allclose(left[rows], best, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Counts and refusals


def test_a_convolution_is_two_convolutions_and_counts_them() -> None:
    geometry = Geometry(stride=(2, 1), padding=((1, 1), (0, 0)), dilation=(1, 1), groups=2, input_size=(9, 8))
    positions = 5 * 6
    structure = LowRank(3)
    inputs = 4 * 9  # channels of one group times the kernel
    assert structure.parameter_count((10, 4, 3, 3)) == 3 * (inputs + 10)
    assert structure.multiply_adds((10, 4, 3, 3), geometry) == positions * 3 * (2 * inputs + 10)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_one_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        LowRank(rank)


@pytest.mark.parametrize("rank", [2.0, "2", True, None])
def test_ranks_that_are_no_integers_are_refused(rank: object) -> None:
    with pytest.raises(TypeError, match="rank must be a whole number"):
        LowRank(rank)  # type: ignore[arg-type]


def test_ranks_beyond_the_smaller_side_and_unknown_methods_are_refused() -> None:
    message = r"rank must be between 1 and 6 for a \(6, 4, 3, 3\) weight, got 7; use rank <= 6"
    with pytest.raises(ValueError, match=message):
        LowRank(7).fit(torch.zeros(6, 4, 3, 3))
    with pytest.raises(ValueError, match=message):
        LowRank(7).initialise((6, 4, 3, 3))
    with pytest.raises(ValueError, match=message):
        LowRank(7).from_tensors((6, 4, 3, 3), {})
    with pytest.raises(
        ValueError, match="method must be one of 'svd', 'randomized', 'rrqr', 'aca', got 'qr'"
    ):
        LowRank(2, "qr")
