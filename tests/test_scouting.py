"""What is left out because layers of the same shape, or part of a matrix, showed it to be hopeless."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from tests.examples import Example, each_example
from weft.plan.error_curves import error_curves
from weft.plan.plan import Plan
from weft.plan.scouting import MARGIN, climb, part_of_rows, parties, ratios
from weft.structures.base import Candidate, Cost, Structure, StructuredMatrix
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.sparse_product import SparseProduct
from weft.survey import Survey


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def point(size: int, error: float, bytes_: int | None = None) -> Candidate:
    return Candidate(LowRank(size), Cost(0, size if bytes_ is None else bytes_, 0), error)


# ------------------------------------------------------------------------------------------------------------
# What is hopeless

amounts = st.integers(0, 4)
points = st.builds(
    Candidate, st.just(Dense()), st.builds(Cost, amounts, amounts, amounts), st.integers(0, 4).map(float)
)


@given(st.lists(points, max_size=10), st.sampled_from([["bytes"], ["parameters", "multiply_adds"]]))
def test_ratios_compare_with_what_others_reach_at_no_more_cost(
    candidates: list[Candidate], costs: list[str]
) -> None:
    for index, (own, ratio) in enumerate(zip(candidates, ratios(candidates, costs), strict=True)):
        rivals = [
            other.error
            for place, other in enumerate(candidates)
            if place != index and all(getattr(other.cost, name) <= getattr(own.cost, name) for name in costs)
        ]
        if not rivals or own.error == 0:
            assert ratio == 0
        else:
            assert ratio == (own.error / min(rivals) if min(rivals) else float("inf"))


def climbed(errors: Sequence[float], front: float = 1.0) -> tuple[list[int], list[int], float]:
    """The sizes that were fitted, in order; those that came back; the ratio that is told."""
    fitted: list[int] = []

    def fit(structure: Structure) -> Candidate:
        assert isinstance(structure, LowRank)
        fitted.append(structure.rank)
        return point(structure.rank, errors[structure.rank - 1])

    sizes = [LowRank(rank) for rank in range(1, len(errors) + 1)]
    found, hopeless = climb(sizes, fit, [Candidate(Dense(), Cost(0, 0, 0), front)], ["bytes"])
    return fitted, [one.structure.rank for one in found if isinstance(one.structure, LowRank)], hopeless


def test_a_climb_ends_where_sizes_are_hopeless_and_a_larger_one_is_too() -> None:
    fitted, kept, hopeless = climbed([1.1, 3.0, 2.0, 1.0, 1.0, 4.0, 1.0, 1.0])
    assert fitted == [1, 2, 3, 6]
    assert kept == [1, 2, 3, 6]
    assert hopeless == 2.0


def test_a_climb_goes_on_where_a_larger_size_is_promising() -> None:
    fitted, kept, hopeless = climbed([3.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0])
    assert fitted == [1, 2, 5, 3, 4, 6, 7]
    assert kept == [1, 2, 3, 4, 5, 6, 7]
    assert hopeless == 0


def test_a_climb_goes_on_while_not_two_in_a_row_are_hopeless() -> None:
    assert climbed([3.0, 1.0] * 4)[1] == list(range(1, 9))
    assert climbed([3.0, 1.0] * 4)[2] == 0
    assert climbed([MARGIN * 0.99] * 5)[1] == [1, 2, 3, 4, 5]
    assert climbed([MARGIN * 1.01] * 5)[1] == [1, 2, 4]
    assert climbed([3.0, 3.0])[1] == [1, 2]  # nothing is left out of two
    assert climbed([3.0, 3.0])[2] == 0


# ------------------------------------------------------------------------------------------------------------
# Who scouts


def network(weights: Sequence[Tensor]) -> nn.Sequential:
    """Linear layers with these weights, in a row."""
    model = nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(weight)
    return model


def falling(size: int, share: float, seed: int = 0) -> Tensor:
    """A square matrix whose singular values fall by a factor."""
    left, _, right = torch.linalg.svd(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
    return left * share ** torch.arange(size) @ right


def sparse_chain(size: int, seed: int) -> Tensor:
    """A product of two sparse matrices: flat in spectrum, of few numbers."""
    generator = torch.Generator().manual_seed(seed)
    factors = [
        sum(
            torch.eye(size)[torch.randperm(size, generator=generator)]
            * (1 + torch.rand(size, generator=generator))
            for _ in range(2)
        )
        for _ in range(2)
    ]
    return torch.linalg.multi_dot(factors)  # type: ignore[arg-type]


def test_the_two_layers_whose_spectra_differ_most_scout_where_there_are_four() -> None:
    shares = (0.8, 0.95, 0.7, 0.9)
    survey = weft.survey(network([*(falling(16, share) for share in shares), torch.randn(4, 16)]))
    allowed = {name: [LowRank] for name in survey.layers}
    (party,) = parties(survey.layers, allowed)
    assert party.scouts == ("2", "1")
    assert party.followers == ("0", "3")
    assert parties(survey.layers, {**allowed, "3": [Quantized]}) == []
    assert parties(survey.layers, {**allowed, "3": []}) == []


def test_part_of_a_tall_matrix_is_drawn_from_all_of_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 1000), nn.Linear(1000, 8))
    survey = weft.survey(model, [torch.randint(1000, (20,)) for _ in range(3)], loss="squared")
    for name in ("0", "1"):
        layer = survey.layers[name]
        part = part_of_rows(layer)
        assert part is not None
        assert part.shape == (32, 8)
        assert layer.output_gram is not None
        assert part.output_gram is not None
        rows = torch.linspace(0, 999, 32).round().long()
        torch.testing.assert_close(part.weight, layer.weight.detach()[rows])
        torch.testing.assert_close(part.output_gram.dense(), layer.output_gram.dense()[rows][:, rows])
    assert part_of_rows(survey.layers["2"]) is None


# ------------------------------------------------------------------------------------------------------------
# What comes out


class Counted:
    """How often structures of every family are fitted, and to how many different weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits: list[tuple[Structure, int]] = []
        self.shapes: list[tuple[Structure, tuple[int, ...]]] = []
        fit = Structure.fit

        def counted(one: Structure, weight: Tensor, **options: Any) -> StructuredMatrix:
            self.fits.append((one, hash(weight.detach().sum().item())))
            self.shapes.append((one, tuple(weight.shape)))
            return fit(one, weight, **options)

        monkeypatch.setattr(Structure, "fit", counted)

    def of(self, family: type[Structure]) -> int:
        return sum(type(one) is family for one, _ in self.fits)


# With the first seed that layer is a scout, with the second it is not, and what it tries is a surprise.
@pytest.mark.parametrize("seed", [1, 0])
def test_a_family_that_is_best_for_one_layer_of_a_shape_is_found_there(seed: int) -> None:
    torch.manual_seed(seed)
    weights = [falling(24, 0.6, seed) for seed in range(5)]
    weights[3] = sparse_chain(24, 0)
    survey = weft.survey(network(weights), [torch.randn(200, 24)])
    families, budget = [LowRank, SparseProduct], weft.Budget(parameters=0.4)
    quick, whole = (
        error_curves(survey, families, costs=budget.costs(), scout=scout) for scout in (True, False)
    )
    plans = [weft.allocate(survey, families, budget, curves=curves) for curves in (quick, whole)]
    for plan in plans:
        chosen = {name: type(structure) for name, structure in plan.items()}
        assert chosen == {**dict.fromkeys("0124", LowRank), "3": SparseProduct}
    losses = [sum(point.error**2 for point in plan.expected.values()) for plan in plans]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert whole.scouted == ()


def test_sizes_that_are_hopeless_on_the_scouts_are_not_tried_on_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    survey = weft.survey(network([falling(24, 0.6, seed) for seed in range(6)]), [torch.randn(200, 24)])
    families, costs = [LowRank, SparseProduct], ["parameters"]
    (party,) = parties(survey.layers, dict.fromkeys(survey.layers, families))
    whole = error_curves(survey, families, costs=costs, scout=False)
    near = {
        one.structure
        for name in party.scouts
        for one, ratio in zip(whole[name], ratios(whole[name], costs), strict=True)
        if ratio <= MARGIN
    }
    counted = Counted(monkeypatch)
    curves = error_curves(survey, families, costs=costs)
    fitted: dict[int, set[Structure]] = {}
    for one, weight in counted.fits:
        if isinstance(one, SparseProduct):
            fitted.setdefault(weight, set()).add(one)
    by_follower = [fitted[hash(survey.layers[name].weight.sum().item())] for name in party.followers]
    ladder = set(SparseProduct.candidates((24, 24)))
    for tried in by_follower:
        assert tried == by_follower[0]
        assert tried < ladder
        assert tried <= near
    (found,) = [found for found in curves.scouted if found.layers == party.followers]
    assert found.scouts == party.scouts
    assert set(found.left_out) == {"SparseProduct"}
    left = found.left_out["SparseProduct"]
    assert left.of - left.sizes == len(by_follower[0])


def digits_network() -> tuple[nn.Sequential, Tensor]:
    """Five layers of 20 by 20 among others, trained for a moment on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    hidden = itertools.chain.from_iterable((nn.ReLU(), nn.Linear(20, 20)) for _ in range(5))
    model = nn.Sequential(nn.Linear(64, 20), *hidden, nn.ReLU(), nn.Linear(20, 10))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model, images


@pytest.mark.parametrize(("limits", "work"), [({"bytes": 0.15}, 0.7), ({"multiply_adds": 0.3}, 1.0)])
def test_scouting_gives_a_trained_network_nearly_the_same_plan_for_less(
    limits: dict[str, float], work: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = digits_network()
    survey = weft.survey(model, [images[:300]])
    families = ["LowRank", "Quantized", "SparseProduct"]
    counted = Counted(monkeypatch)
    losses, fitted = [], []
    for scout in (True, False):
        counted.fits.clear()
        plan = weft.allocate(survey, families, weft.Budget(**limits), scout=scout)
        losses.append(sum(one.error**2 for one in plan.expected.values()))
        fitted.append(counted.of(SparseProduct))
    assert losses[0] <= 1.02 * losses[1]
    assert fitted[0] <= work * fitted[1]


def test_part_of_a_tall_matrix_tells_what_not_to_try_on_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(600, 12), nn.Linear(12, 12))
    with torch.no_grad():
        model[0].weight.mul_(torch.randint(0, 2, (600, 1)) + 0.2)  # rows that matter more and less
    survey = weft.survey(model, [torch.randint(600, (50,)) for _ in range(4)])
    families = [LowRank, Quantized, SparseProduct, Pruned]
    tall = (600, 12)
    counted = Counted(monkeypatch)
    quick = error_curves(survey, families, costs=["bytes"])
    assert not any(isinstance(one, SparseProduct) and shape == tall for one, shape in counted.shapes)
    assert any(isinstance(one, SparseProduct) and shape == (48, 12) for one, shape in counted.shapes)
    whole = error_curves(survey, families, costs=["bytes"], scout=False)
    assert any(isinstance(one.structure, SparseProduct) for one in whole["0"])
    told = {name: found for found in quick.scouted for name in found.left_out if found.layers == ("0",)}
    assert "SparseProduct" in told
    for share in (0.15, 0.3):
        plans = [
            weft.allocate(survey, families, weft.Budget(bytes=share), curves=one) for one in (quick, whole)
        ]
        losses = [sum(point.error**2 for point in plan.expected.values()) for plan in plans]
        assert losses[0] <= 1.02 * losses[1]


def test_a_single_family_is_tried_in_every_size() -> None:
    survey = weft.survey(network([falling(16, 0.8, seed) for seed in range(4)]), [torch.randn(50, 16)])
    for family in (LowRank, SparseProduct):
        assert error_curves(survey, [family]) == error_curves(survey, [family], scout=False)


def test_what_costs_do_not_tell_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def curves(*_: Any, scout: bool, **__: Any) -> Any:
        asked.append(scout)
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.plan.allocate.error_curves", curves)
    survey = weft.survey(network([torch.randn(8, 8)]))
    for budget, scout in itertools.product(
        (weft.Budget(bytes=0.5), weft.Budget(parameters=0.5, keep=None)), (True, False)
    ):
        with pytest.raises(KeyboardInterrupt):
            weft.allocate(survey, "LowRank", budget, scout=scout)
    assert asked == [True, False] * 2
    assert weft.Budget(latency=0.5).timed
    assert weft.Budget(bytes=0.5, latency_seconds=0.1).timed
    assert not weft.Budget(bytes=0.5, peak_memory=0.5, keep=0.9).timed


# ------------------------------------------------------------------------------------------------------------
# Kept, resumed, told


def small_survey() -> Survey:
    weights = [falling(16, 0.7 + 0.04 * seed, seed) for seed in range(5)]
    return weft.survey(network(weights), [torch.randn(100, 16)])


def test_what_was_fitted_is_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey, families = small_survey(), [LowRank, Quantized, SparseProduct, Pruned]
    first = error_curves(survey, families, costs=["bytes"], cache=tmp_path)
    counted = Counted(monkeypatch)
    again = error_curves(survey, families, costs=["bytes"], cache=tmp_path)
    assert counted.fits == []
    assert again == first
    assert again.scouted == first.scouted
    # Sizes that are fits of their own also serve where everything is tried.
    error_curves(survey, families, costs=["bytes"], cache=tmp_path, scout=False)
    rest = counted.of(SparseProduct)
    counted.fits.clear()
    error_curves(survey, families, costs=["bytes"], scout=False)
    assert 0 < rest < counted.of(SparseProduct)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey, families = small_survey(), [LowRank, SparseProduct]
    whole = error_curves(survey, families, costs=["bytes"])
    counted = Counted(monkeypatch)
    fit, calls = Structure.fit, itertools.count()

    def interrupted(one: Structure, *arguments: Any, **options: Any) -> StructuredMatrix:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return fit(one, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Structure, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            error_curves(survey, families, costs=["bytes"], cache=tmp_path)
    before = set(counted.fits)
    counted.fits.clear()
    assert error_curves(survey, families, costs=["bytes"], cache=tmp_path) == whole
    # All but the sizes of the one curve that was cut off.
    assert len(before & set(counted.fits)) <= len(list(SparseProduct.candidates((16, 16))))
    assert len(before - set(counted.fits)) > 0


def test_workers_leave_out_the_same() -> None:
    survey, families = small_survey(), [LowRank, Quantized, SparseProduct]
    alone = error_curves(survey, families, costs=["bytes"])
    together = error_curves(survey, families, costs=["bytes"], workers=2, worker_memory=2**31)
    assert together.scouted == alone.scouted
    for name, curve in alone.items():
        assert [one.structure for one in together[name]] == [one.structure for one in curve]


def test_a_plan_says_what_was_not_tried(tmp_path: Path) -> None:
    survey = small_survey()
    families = [LowRank, Quantized, SparseProduct]
    plan = weft.allocate(survey, families, weft.Budget(bytes=0.3))
    left_out = Counter(name for found in plan.scouted for name in found.left_out)
    assert left_out["SparseProduct"]
    found = next(found for found in plan.scouted if len(found.layers) > 1)
    assert set(found.layers) | set(found.scouts) == set(survey.layers)
    for name, left in found.left_out.items():
        assert left.ratio > MARGIN
        assert (left.sizes == left.of) == all(
            "not tried" in plan.others[layer].get(name, "") for layer in found.layers
        )
        # And what is said to be tried nowhere is not in the curves.
        curve = error_curves(survey, families, costs=["bytes"])[found.layers[0]]
        tried = {type(one.structure).__name__ for one in curve}
        assert (left.sizes == left.of) == (name not in tried)
    assert f"{len(found.layers)} like {found.layers[0]}" in str(found)
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path).scouted == plan.scouted
    data = json.loads(path.read_text(encoding="utf-8"))
    data["scouted"][0].pop("scouts")
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="scouting of .*: scouted must be complete"):
        Plan.load(path)


@each_example
@pytest.mark.parametrize("weighted", [True, False])
def test_part_of_a_curve_is_what_the_whole_one_has_there(example: Example, weighted: bool) -> None:
    shape = (20, 48)
    family = type(example.structure(shape))
    if family.curve_work(weighted=weighted) == "whole":
        pytest.skip("its curve comes at once")
    survey = weft.survey(network([torch.randn(*shape)]), [torch.randn(60, 48)] if weighted else None)
    layer = survey.layers["0"]
    whole = family.error_curve(layer.weight.detach(), input_gram=layer.input_gram)
    some = whole[:: max(1, len(whole) // 3)]
    part = family.points([one.structure for one in some], layer.weight.detach(), input_gram=layer.input_gram)
    for one, other in zip(some, part, strict=True):
        assert other.structure == one.structure
        assert other.cost == one.cost
        assert other.error == pytest.approx(one.error, rel=1e-4, abs=1e-6)
