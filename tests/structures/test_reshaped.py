"""Reshapes: views and routes against index arithmetic, the published view of low rank, weighted fits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.gram import DenseGram
from weft.structures.base import relative_error
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.reshaped import Reshaped, ReshapedMatrix
from weft.structures.sparse_product import SparseProduct


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(size: int, seed: int = 3) -> DenseGram:
    x = torch.relu(drawn(40, size, seed=seed) @ drawn(size, size, seed=seed + 1)) + 0.1
    return DenseGram(x.T @ x / 40)


factors = st.integers(1, 4)


@given(factors, factors, factors, factors, st.permutations(range(4)), st.data())
@settings(deadline=None, max_examples=60)
def test_every_view_is_applied_as_the_dense_matrix(
    a: int, b: int, c: int, d: int, order: list[int], data
) -> None:
    """Any four axes of an (ab, cd) weight in any order, the rows at any place between them."""
    axes, shape = (a, b, c, d), (a * b, c * d)
    place = data.draw(st.integers(0, 4))
    rows = math.prod(axes[axis] for axis in order[:place])
    structure = Reshaped(LowRank(1), rows, axes, tuple(order))
    weight = drawn(*shape)
    viewed = weight.reshape(axes).permute(*order).reshape(rows, -1)
    assert torch.equal(structure.view(weight), viewed)
    assert torch.equal(structure.undo(viewed, shape), weight)
    for of in (LowRank(1), SparseProduct(1, 1, "random"), Dense()):
        member = Reshaped(of, rows, axes, tuple(order)).fit(weight)
        assert member.routing is not None
        for route in _routes(member):
            member.route = route
            x = drawn(3, shape[1], seed=5)
            torch.testing.assert_close(member(x), x @ member.to_dense().T)
        indices = torch.arange(shape[0])
        torch.testing.assert_close(member.rows(indices), member.to_dense())


def _routes(member: ReshapedMatrix) -> list[str]:
    return ["dense", "pieces", *(["right", "left"] if member.rank is not None else [])]


def test_twice_the_rows_share_the_right_factor_between_two_halves() -> None:
    """W = [L₁R  L₂R], the rows of L₁ and L₂ alternating in L."""
    member = Reshaped(LowRank(3), rows=12).fit(drawn(6, 10))
    left, right = member.of.left, member.of.right
    expected = torch.cat([left[::2] @ right, left[1::2] @ right], dim=1)
    torch.testing.assert_close(member.to_dense(), expected)
    assert int(torch.linalg.matrix_rank(member.to_dense())) == 6


def test_rank_one_in_kronecker_order_is_a_kronecker_product() -> None:
    first, second = drawn(2, 3), drawn(4, 5, seed=1)
    product = torch.kron(first, second)
    member = Reshaped(LowRank(1), 2 * 3, (2, 4, 3, 5), (0, 2, 1, 3)).fit(product)
    torch.testing.assert_close(member.to_dense(), product)
    # Through the smaller factor first or last, whatever is cheaper: never the dense product.
    assert member.route in {"left", "right"}
    assert member.cost().multiply_adds == min(15 * 4 + 8 * 3, 15 * 2 + 8 * 5)


@pytest.mark.parametrize(
    ("rows", "multiply_adds"),
    [
        (1000, 10 * (1280 + 1000)),
        (2000, 10 * (1280 + 2 * 1000)),  # x in two halves through R, then [L₁ L₂]
        (4000, 10 * (1280 + 4 * 1000)),
        (500, 10 * (2 * 1280 + 1000)),  # two rows of R each, then L
        (250, 10 * (4 * 1280 + 1000)),
    ],
)
def test_multiples_and_divisors_of_the_rows_take_two_small_products(rows: int, multiply_adds: int) -> None:
    structure = Reshaped(LowRank(10), rows)
    assert structure.multiply_adds((1000, 1280)) == multiply_adds
    member = structure.initialise((1000, 1280))
    assert member.cost().multiply_adds == multiply_adds
    with torch.no_grad():
        member(torch.zeros(2, 1280))
    assert member.derived_bytes() <= member.cost().bytes  # nothing dense is kept


def test_rows_across_the_axes_form_the_weight_once_and_say_what_that_costs() -> None:
    structure = Reshaped(LowRank(2), rows=8)
    member = structure.fit(drawn(6, 12)).eval()
    assert member.routing is None
    assert member.route == "dense"
    assert structure.multiply_adds((6, 12)) == member.cost().multiply_adds == 6 * 12
    x = drawn(3, 12, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(member(x), x @ member.to_dense().T)
    assert member.derived_bytes() == 8 * 6 * 12
    torch.testing.assert_close(member.rows(torch.tensor([5, 0])), member.to_dense()[[5, 0]])


@pytest.mark.parametrize("rows", [12, 24, 3, 8])
@pytest.mark.parametrize("both", [False, True])
def test_the_weighted_fit_comes_near_alternating_least_squares(rows: int, both: bool) -> None:
    weight, grams = drawn(6, 12), {"input_gram": gram_of(12)}
    grams |= {"output_gram": gram_of(6, seed=9)} if both else {}
    got = relative_error(weight, Reshaped(LowRank(2), rows).fit(weight, **grams).to_dense(), **grams)
    best = min(_alternating_least_squares(weight, rows, 2, seed, **grams) for seed in range(6))
    assert got <= 1.05 * best


def _alternating_least_squares(weight: Tensor, rows: int, rank: int, seed: int, **grams: DenseGram) -> float:
    """One factor after the other by the normal equations of the whole weight, with Kronecker products."""
    identity = torch.eye(len(weight), dtype=torch.float64)
    outer = grams["output_gram"].dense() if "output_gram" in grams else identity
    metric = torch.kron(outer, grams["input_gram"].dense())
    columns = weight.numel() // rows
    left, right = drawn(rows, rank, seed=seed), drawn(rank, columns, seed=seed + 100)
    for _ in range(60):
        basis = torch.kron(torch.eye(rows, dtype=torch.float64), right.T.contiguous())
        left = torch.linalg.lstsq(basis.T @ metric @ basis, basis.T @ metric @ weight.flatten()).solution
        left = left.reshape(rows, rank)
        basis = torch.kron(left, torch.eye(columns, dtype=torch.float64))
        right = torch.linalg.lstsq(basis.T @ metric @ basis, basis.T @ metric @ weight.flatten()).solution
        right = right.reshape(rank, columns)
    return relative_error(weight, (left @ right).reshape(weight.shape), **grams)


def test_a_start_is_refined() -> None:
    weight, gram = drawn(6, 12), gram_of(12)
    structure = Reshaped(LowRank(2), rows=12)
    start = structure.fit(weight + 0.3 * drawn(6, 12, seed=4), input_gram=gram)
    found = structure.fit(weight, input_gram=gram, start=start)
    errors = [relative_error(weight, member.to_dense(), input_gram=gram) for member in (start, found)]
    assert errors[1] < errors[0]


def test_candidates_view_products_of_factors_only() -> None:
    inner = [LowRank(2), SparseProduct(2, 3), Dense(), LowRank(100)]
    found = list(Reshaped.candidates((40, 48), inner))
    assert found
    assert {type(one.of) for one in found} == {LowRank}
    assert {one.rows for one in found} == {20, 80, 160}
    assert all(one.of.rank == 2 for one in found)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": 2, "axes": (2, 0)}, ValueError, "axes must be at least 1, got 0"),
        (
            {"rows": 2, "axes": (2, 6), "order": (0, 2)},
            ValueError,
            "order must be a permutation of the 2 axes",
        ),
        ({"rows": 2, "order": (0, 1)}, ValueError, "order must be a permutation of the 0 axes"),
        ({"rows": 2, "of": 3}, TypeError, "of must be a structure, got 3"),
    ],
)
def test_impossible_views_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Reshaped(**{"of": LowRank(1), **arguments})


def test_a_reshape_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="rows must be a divisor of 72, .* got 7; use a multiple or a divisor of 6"
    ):
        Reshaped(LowRank(1), rows=7).fit(drawn(6, 12))
    with pytest.raises(ValueError, match=r"axes must be of 72 entries together, .* got \(6, 6\) with 36"):
        Reshaped(LowRank(1), 6, (6, 6)).fit(drawn(6, 12))
    with pytest.raises(ValueError, match="rank must be between 1 and 3"):
        Reshaped(LowRank(4), rows=24).fit(drawn(6, 12))


def test_nesting_deeper_than_two_is_refused() -> None:
    Reshaped(Reshaped(Pruned(0.5), 6), 12)
    with pytest.raises(ValueError, match="Reshaped must be nested at most 2 deep, got 3"):
        Reshaped(Reshaped(Reshaped(LowRank(1), 6), 12), 24)
