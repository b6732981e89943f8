"""Sums: no worse than their terms, the classical splits found again, acceleration, nested storage."""

import pytest
import torch
from tests.examples import EXAMPLES, Example, name_of
from torch import Tensor, nn

import weft
from weft.numerics.gram import DenseGram
from weft.structures import from_json
from weft.structures.base import Structure, refine_values, relative_error
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.product_quantized import ProductQuantized
from weft.structures.pruned import Pruned
from weft.structures.reshaped import Reshaped
from weft.structures.sparse_product import SparseProduct
from weft.structures.sum_of import SumOf, _Alternation, _extrapolate

SHAPE = (24, 30)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(size: int, seed: int = 3) -> DenseGram:
    x = torch.relu(drawn(60, size, seed=seed) @ drawn(size, size, seed=seed + 1)) + 0.1
    return DenseGram(x.T @ x / 60)


def low_rank_plus_sparse(rank: int, entries: int) -> Tensor:
    weight = drawn(SHAPE[0], rank) @ drawn(rank, SHAPE[1], seed=1)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(2))[:entries]
    weight.view(-1)[places] += 12 * drawn(entries, seed=3).sign()
    return weight


PAIRS = [
    (LowRank(3), SparseProduct(1, 2, "splitting")),
    (Pruned(0.1), LowRank(4)),
    (ProductQuantized(15, 4), LowRank(2)),
    (ProductQuantized(15, 4), Pruned(0.05)),
    (LowRank(2), Reshaped(LowRank(2), rows=48)),
    (Pruned(0.05), Reshaped(LowRank(2), rows=12), ProductQuantized(10, 3)),
]


@pytest.mark.parametrize("terms", PAIRS, ids=lambda terms: "+".join(type(term).__name__ for term in terms))
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_is_better_than_each_of_its_terms(terms: tuple[Structure, ...], weighted: bool) -> None:
    weight = drawn(*SHAPE)
    grams = {"input_gram": gram_of(SHAPE[1])} if weighted else {}
    alone = [relative_error(weight, term.fit(weight, **grams).to_dense(), **grams) for term in terms]
    together = relative_error(weight, SumOf(terms).fit(weight, **grams).to_dense(), **grams)
    assert together < min(alone)


def test_low_rank_plus_sparse_is_taken_apart_again() -> None:
    weight = low_rank_plus_sparse(2, 20)
    member = SumOf((LowRank(2), Pruned(20 / 720))).fit(weight)
    assert relative_error(weight, member.to_dense()) < 1e-3
    # Either term alone, at the cost of both, is far away.
    numbers = member.cost().parameters
    assert relative_error(weight, LowRank(numbers // sum(SHAPE)).fit(weight).to_dense()) > 0.2
    assert relative_error(weight, Pruned(numbers / 720).fit(weight).to_dense()) > 0.2


def test_low_rank_on_two_reshapes_is_taken_apart_again() -> None:
    planted = SumOf((LowRank(1), Reshaped(LowRank(1), rows=48))).initialise(SHAPE, dtype=torch.float64)
    weight = planted.to_dense().detach()
    member = planted.structure.fit(weight)
    assert relative_error(weight, member.to_dense()) < 0.02
    assert relative_error(weight, LowRank(2).fit(weight).to_dense()) > 0.1


def test_values_solved_for_together_go_beyond_alternation() -> None:
    weight = low_rank_plus_sparse(3, 60) + 0.5 * drawn(*SHAPE, seed=9)
    terms = (LowRank(3), Pruned(60 / 720))
    alternation = _Alternation(terms, weight, None, None, None)
    members = alternation._first([0, 1])
    for _ in range(3):
        members = alternation._round(alternation._state(members), members)
    assert alternation._error(alternation.run([])) <= alternation._error(members)


def test_extrapolation_solves_a_linear_fixed_point() -> None:
    matrix, offset = 0.9 * torch.linalg.qr(drawn(3, 3)).Q, drawn(3, seed=1)
    fixed = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrix, offset)
    given = torch.zeros(3, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(12):
        reached = matrix @ given + offset
        history = [*history, (reached, reached - given)][-4:]
        given = _extrapolate(history)
    assert float((given - fixed).norm()) < 1e-4 * float(fixed.norm())
    assert 0.9**12 > 0.2  # what as many plain rounds leave


def test_one_term_is_that_term() -> None:
    weight = drawn(*SHAPE)
    member = SumOf((LowRank(3),)).fit(weight)
    torch.testing.assert_close(member.to_dense(), LowRank(3).fit(weight).to_dense())


def test_costs_add_up() -> None:
    terms = (LowRank(3), ProductQuantized(15, 4), Pruned(0.1))
    member = SumOf(terms).fit(drawn(*SHAPE))
    parts = [term.cost() for term in member.members()]
    assert member.cost() == parts[0] + parts[1] + parts[2]
    assert SumOf(terms).parameter_count(SHAPE) == member.cost().parameters
    assert SumOf((LowRank(3), SparseProduct(1, 2))).parameter_count(SHAPE) is None


def test_pictures_lie_over_each_other() -> None:
    member = SumOf((ProductQuantized(15, 4), LowRank(3))).fit(drawn(*SHAPE))
    assert {block.kind for block in member.picture()} == {"coded", "low_rank"}


def test_a_nested_sum_is_saved_and_loaded_bitwise(tmp_path) -> None:
    structure = SumOf((Reshaped(LowRank(2), rows=48), Pruned(0.2, of=LowRank(6)), ProductQuantized(5, 3)))
    model = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 5))
    small, _ = weft.compress(model, {"0": structure})
    again = weft.load(weft.save(small, tmp_path / "small.safetensors"), model=model)
    x = drawn(3, 30).float()
    assert torch.equal(again(x), small(x))
    assert from_json(structure.to_json()) == structure
    assert structure.to_json()["terms"][0] == {
        "family": "Reshaped",
        "of": {"family": "LowRank", "rank": 2},
        "rows": 48,
    }


def test_candidates_are_few_pairs_of_different_families() -> None:
    inner = [LowRank(rank) for rank in (1, 2, 3, 4)] + [Pruned(share / 100) for share in (1, 5, 10, 20)]
    found = list(SumOf.candidates((40, 48), inner))
    assert 1 <= len(found) <= 6
    assert all({type(term) for term in one.terms} == {LowRank, Pruned} for one in found)
    assert list(SumOf.candidates((40, 48))) == []


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(
        ValueError, match="terms must be at least one structure, got an empty sum; name a term"
    ):
        SumOf(())
    with pytest.raises(
        TypeError, match=r"terms must be a tuple of structures, got list; write SumOf\(\(a, b\)\)"
    ):
        SumOf([LowRank(1)])
    with pytest.raises(TypeError, match="terms must be structures, got 'LowRank'"):
        SumOf((LowRank(1), "LowRank"))


def test_nesting_deeper_than_two_is_refused() -> None:
    SumOf((Reshaped(LowRank(1), 6), Pruned(0.5, of=LowRank(2)), Pruned(0.5, of=Dense())))
    with pytest.raises(ValueError, match="SumOf must be nested at most 2 deep, got 3"):
        SumOf((SumOf((SumOf((LowRank(1),)),)),))


def test_rounds_that_no_longer_move_end_where_they_are() -> None:
    reached, still = drawn(*SHAPE), torch.zeros(SHAPE, dtype=torch.float64)
    assert torch.equal(_extrapolate([(reached + 1, still), (reached, still)]), reached)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_every_family_is_a_term_whose_values_can_be_refined(example: Example) -> None:
    weight, gram = drawn(*SHAPE), gram_of(SHAPE[1])
    member = SumOf((example.structure(SHAPE), LowRank(1))).initialise(SHAPE, dtype=torch.float64)
    before = relative_error(weight, member.to_dense(), input_gram=gram)
    refine_values(member, weight, input_gram=gram, steps=5)
    assert relative_error(weight, member.to_dense(), input_gram=gram) < before
