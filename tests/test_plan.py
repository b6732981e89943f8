"""Budgets, error curves, allocation against brute force, and plans as files."""

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from torch.nn.utils import parametrizations

import weft
from tests.examples import Example, each_example, each_family
from weft.measure import footprint, network_cost, peak_activations
from weft.plan.advice import advise
from weft.plan.allocate import allocate
from weft.plan.budget import Budget
from weft.plan.constraints import Constraints
from weft.plan.error_curves import error_curves, undominated
from weft.plan.latency import LatencyTable, layer_call
from weft.plan.memory import MemoryTable
from weft.plan.pareto import pareto
from weft.plan.plan import Plan, check_plan
from weft.plan.sensitivity import (
    Sensitivity,
    kullback_leibler_divergence,
    measure_sensitivity,
    predicted_sensitivity,
    rank_correlation,
    squared_divergence,
)
from weft.structures.base import Candidate, Cost, Geometry, Structure, StructuredMatrix, relative_error
from weft.structures.dense import Dense
from weft.structures.divided_rows import DividedRows
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized
from weft.structures.sparse_product import SparseProduct
from weft.survey import LayerSurvey, Survey


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 4, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    ).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def surveyed() -> tuple[nn.Sequential, Survey]:
    model = network()
    return model, weft.survey(model, batches())


# ------------------------------------------------------------------------------------------------------------
# Budgets

DENSE = Cost(parameters=1000, bytes=4000, multiply_adds=50_000)


@given(st.floats(0, 1, exclude_min=True), st.integers(2, 10**9))
def test_floats_are_shares_and_integers_absolute(share: float, absolute: int) -> None:
    limits = Budget(parameters=share, bytes=absolute).limits(DENSE)
    assert limits["bytes"] == absolute
    assert limits["parameters"] <= share * DENSE.parameters < limits["parameters"] + 1


def test_one_is_the_whole_network_whether_written_as_float_or_integer() -> None:
    assert Budget(parameters=1).limits(DENSE) == Budget(parameters=1.0).limits(DENSE) == {"parameters": 1000}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("bytes=0.25", Budget(bytes=0.25)),
        (" bytes = 0.1 , parameters=200000,", Budget(bytes=0.1, parameters=200_000)),
        ("multiply_adds=1", Budget(multiply_adds=1)),
        ("parameters=2.5e-1", Budget(parameters=0.25)),
    ],
)
def test_budgets_are_read_from_text(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "budget must be given as one of parameters, bytes, multiply_adds, latency, .*, got none"),
        ("size=0.1", "budget must be one of parameters, bytes, multiply_adds, latency, .*, got 'size'"),
        ("bytes", "budget bytes must be a number, got ''"),
        ("bytes=a quarter", "budget bytes must be a number, got 'a quarter'"),
        ("bytes=0.1,bytes=0.2", "budget bytes must be given once, got twice"),
        ("bytes=1.5", "budget bytes must be a share above 0 and at most 1, or a whole number, got 1.5"),
        ("bytes=nan", "budget bytes must be a share above 0 and at most 1"),
        ("bytes=inf", "budget bytes must be a share above 0 and at most 1"),
        ("bytes=-0.5", "budget bytes must be a share above 0 and at most 1"),
        ("bytes=0", "budget bytes must be at least 1, got 0"),
    ],
)
def test_text_that_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("limit", [True, False, "0.5", [1]], ids=repr)
def test_limits_that_are_no_numbers_are_refused(limit: Any) -> None:
    with pytest.raises(TypeError, match="budget bytes must be a whole number"):
        Budget(bytes=limit)


def test_multiply_adds_need_a_survey_with_data() -> None:
    with pytest.raises(ValueError, match="budget multiply_adds must be measurable, .*; survey with batches"):
        weft.allocate(weft.survey(network()), "LowRank", Budget(multiply_adds=0.5))


# ------------------------------------------------------------------------------------------------------------
# Error curves

costs = st.builds(Cost, st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))


@given(st.lists(st.builds(Candidate, st.just(Dense()), costs, st.integers(0, 4).map(float)), max_size=12))
def test_exactly_the_undominated_candidates_stay(candidates: list[Candidate]) -> None:
    def key(point: Candidate) -> tuple[float, ...]:
        return (point.error, point.cost.parameters, point.cost.bytes, point.cost.multiply_adds)

    def beaten(point: Candidate) -> bool:
        return any(
            key(other) != key(point) and all(a <= b for a, b in zip(key(other), key(point), strict=True))
            for other in candidates
        )

    kept = undominated(candidates)
    assert {key(point) for point in kept} == {key(point) for point in candidates if not beaten(point)}
    assert len({key(point) for point in kept}) == len(kept)
    assert [point.cost.parameters for point in kept] == sorted(point.cost.parameters for point in kept)


def test_every_layer_can_be_left_dense(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    for name, curve in error_curves(survey, [LowRank]).items():
        assert curve[-1] == Candidate(Dense(), survey.layers[name].cost, 0.0)
        assert [point.cost.parameters for point in curve] == sorted(point.cost.parameters for point in curve)
        assert all(before.error >= after.error for before, after in itertools.pairwise(curve))


@pytest.mark.parametrize("name", ["0", "3", "8"])
@each_family
def test_predicted_costs_and_errors_are_those_of_the_fitted_layers(
    example: Example, name: str, surveyed: tuple[nn.Sequential, Survey]
) -> None:
    model, survey = surveyed
    layer = survey.layers[name]
    family = type(example.structure((20, 48)))
    curve = [
        point
        for point in error_curves(Survey({layer.name: layer}, {}, survey.total), [family])[layer.name]
        if point.structure != Dense()
    ]
    for point in curve[:: max(1, len(curve) // 2)]:
        small, log = weft.compress(model, {name: point.structure}, survey)
        assert log[0]["parameters"] == point.cost.parameters
        assert log[0]["bytes"] == point.cost.bytes
        assert log[0]["multiply_adds"] == point.cost.multiply_adds
        assert log[0]["error"] == pytest.approx(point.error, rel=example.curve_tolerance, abs=1e-4)
        dense = network_cost(model, batches()[0])
        assert network_cost(small, batches()[0]) == dense - layer.cost + point.cost


def test_kept_curves_are_read_instead_of_computed(
    surveyed: tuple[nn.Sequential, Survey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, survey = surveyed
    first = error_curves(survey, [LowRank], cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(LowRank, "error_curve", None)  # would fail if it were called
        assert error_curves(survey, [LowRank], cache=tmp_path) == first
        changed = dict(survey.layers)
        changed["6"] = replace(changed["6"], weight=2 * changed["6"].weight)
        with pytest.raises(TypeError):  # another weight has no curve yet
            error_curves(Survey(changed, {}, survey.total), [LowRank], cache=tmp_path)
        changed["6"] = replace(survey.layers["6"], input_gram=None)
        with pytest.raises(TypeError):  # nor has another metric
            error_curves(Survey(changed, {}, survey.total), [LowRank], cache=tmp_path)
    for file in (tmp_path / "curves").iterdir():
        file.write_text("{")  # a damaged file is no error
    assert error_curves(survey, [LowRank], cache=tmp_path) == first
    assert error_curves(survey, [LowRank], cache=tmp_path) == first


def test_wrappers_fit_nothing_twice_and_nothing_that_is_dominated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    survey = weft.survey(model, [torch.randn(200, 64)])
    families = [LowRank, Quantized, DividedRows]
    fitted: list[Structure] = []
    fit = Structure.fit

    def counted(self: Structure, *arguments: Any, **options: Any) -> StructuredMatrix:
        fitted.append(self)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(Structure, "fit", counted)
    curve = error_curves(survey, families)["0"]
    asked = [structure for structure in fitted if isinstance(structure, Quantized)]
    assert len(asked) == len(set(asked))
    # Codes of low rank lose no less than low rank itself, which here loses more than fewer bits do.
    low_rank = {point.structure: point.error for point in curve if isinstance(point.structure, LowRank)}
    plain = [
        point for point in curve if isinstance(point.structure, Quantized) and point.structure.of == Dense()
    ]
    for structure in asked:
        cost = structure.predicted_cost((96, 64), 4)
        assert not any(
            point.error <= low_rank[structure.of]
            and point.cost.bytes <= cost.bytes
            and point.cost.multiply_adds <= cost.multiply_adds
            and point.cost.parameters <= cost.parameters
            for point in plain
        )
    assert any(isinstance(point.structure, DividedRows) for point in curve)


def test_families_are_combined_for_the_costs_that_the_budget_limits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(left * (values * 0.9 ** torch.arange(len(values))) @ right)
    survey = weft.survey(model, [torch.randn(200, 64)])
    families = [LowRank, Quantized]

    def combined(curves: dict[str, list[Candidate]]) -> int:
        made = [point.structure for curve in curves.values() for point in curve]
        return sum(structure.approximated is not None for structure in made)

    by_bytes = error_curves(survey, families, costs=["bytes"])
    assert combined(by_bytes) == 0  # fewer bits lose less than any rank of as many bytes
    both = weft.Budget(bytes=0.12, multiply_adds=0.6)
    assert combined(error_curves(survey, families, costs=both.costs())) > 0
    alone, plan = (weft.allocate(survey, families, both, curves=curves) for curves in (by_bytes, None))
    losses = [sum(point.error**2 for point in one.expected.values()) for one in (alone, plan)]
    assert losses[1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="costs must be one of 'parameters', 'bytes', 'multiply_adds', got"):
        error_curves(survey, families, costs=["seconds"])


def test_a_budget_says_which_costs_it_limits() -> None:
    assert weft.Budget(bytes=0.5).costs() == ("bytes",)
    assert weft.Budget(parameters=0.5, multiply_adds=100).costs() == ("parameters", "multiply_adds")
    for other in ({"latency": 0.5}, {"latency_seconds": 0.1}, {"peak_memory": 0.5}, {"keep": 0.9}):
        assert weft.Budget(bytes=0.5, **other).costs() == ("parameters", "bytes", "multiply_adds")


def test_wrappers_are_offered_the_useful_sizes_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = (
        torch.linalg.qr(torch.randn(96, 64)).Q @ torch.diag(0.7 ** torch.arange(64.0)) @ torch.randn(64, 64)
    )
    model = nn.Sequential(nn.Linear(64, 96))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    offered: list[Structure] = []

    def points(_: type, structures: Sequence[Structure], *__: Any, **___: Any) -> list[Candidate]:
        offered.extend(structures)
        return []

    monkeypatch.setattr(DividedRows, "points", classmethod(points))
    survey = weft.survey(model)
    error_curves(survey, [LowRank, Quantized, DividedRows])
    alone = {point.structure: point.error for point in error_curves(survey, [Quantized])["0"]}
    parts = {part for structure in offered if isinstance(structure, DividedRows) for part in structure.parts}
    sizes = {part for part in parts if isinstance(part, Quantized)}
    assert 5 <= len(sizes) <= 8  # also where another family has more sizes that nothing beats
    assert all(alone[part] < 0.7 for part in sizes)


def test_what_is_no_family_budget_or_structure_is_refused(surveyed: tuple[nn.Sequential, Survey]) -> None:
    model, survey = surveyed
    for wanted, message in (("lowrank", "got 'lowrank'; write LowRank"), ("Lowrank2", "check the spelling")):
        with pytest.raises(ValueError, match=message):
            weft.allocate(survey, wanted, weft.Budget(bytes=0.5))
    for wanted in (None, [3], [nn.Linear]):
        with pytest.raises(TypeError, match="families must be names or classes, got"):
            weft.allocate(survey, wanted, weft.Budget(bytes=0.5))
    with pytest.raises(TypeError, match=r"budget must be a Budget, got 'bytes=0\.5'; e\.g\. weft\.Budget"):
        weft.allocate(survey, "LowRank", "bytes=0.5")
    name = next(iter(survey.layers))
    with pytest.raises(TypeError, match=f"plan of layer {name} must be a structure, got 'LowRank'"):
        weft.compress(model, {name: "LowRank"}, survey)


def test_a_plan_reads_as_a_table(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    plan = weft.allocate(survey, "LowRank", weft.Budget(bytes=0.5))
    head, *lines = str(plan).splitlines()
    assert head == f"plan for at most 50 % of the bytes, {len(plan)} layers"
    for line, (name, structure) in zip(lines, plan.items(), strict=True):
        assert line.split()[0] == name
        assert str(structure) in line
        assert f"error {plan.expected[name].error:.4f}" in line


def test_processes_compute_the_same_curves(
    surveyed: tuple[nn.Sequential, Survey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.plan.error_curves.ALONE", 0.0)  # else they would not be needed
    _, survey = surveyed
    alone = error_curves(survey, [LowRank])
    together = error_curves(survey, [LowRank], workers=2)
    assert list(together) == list(alone)
    for name, curve in alone.items():
        assert [point.structure for point in together[name]] == [point.structure for point in curve]
        assert [point.cost for point in together[name]] == [point.cost for point in curve]
        errors = torch.tensor([
            [one.error, two.error] for one, two in zip(curve, together[name], strict=True)
        ])
        torch.testing.assert_close(errors[:, 0], errors[:, 1], rtol=1e-3, atol=1e-5)


def test_half_precision_weights_reach_the_workers_as_they_are() -> None:
    survey = weft.survey(nn.Linear(12, 10, dtype=torch.bfloat16))
    curve = error_curves(survey, [LowRank])[""]
    assert all(point.cost.bytes == 2 * point.cost.parameters for point in curve)


# ------------------------------------------------------------------------------------------------------------
# Constraints


def test_constraints_keep_layers_dense_and_restrict_families(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    rules = Constraints(keep_dense="0, 3", families={"6": "SparseProduct"})
    plan = allocate(survey, "LowRank", Budget(parameters=0.6), constraints=rules)
    assert plan["0"] == plan["3"] == Dense()
    assert type(plan["6"]).__name__ == "SparseProduct"
    assert type(plan["8"]).__name__ in {"LowRank", "Dense"}


def test_a_pattern_that_means_no_layer_is_refused(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    with pytest.raises(ValueError, match=r"constraints must be patterns of layer names, got 'encoder\.\*'"):
        error_curves(survey, [LowRank], constraints=Constraints(keep_dense=["encoder.*"]))


# ------------------------------------------------------------------------------------------------------------
# Latency


def test_a_latency_limit_is_met_in_the_measured_times(
    surveyed: tuple[nn.Sequential, Survey], tmp_path: Path
) -> None:
    model, survey = surveyed
    table = LatencyTable(model, survey, batches()[0], batch=2, thread_count=1, cache=tmp_path)
    assert table.dense_seconds > 0
    slow = {name: 1.0 for name in survey.layers}  # made-up times: real ones of so small layers are noise
    for name, layer in survey.layers.items():
        for point in error_curves(survey, [LowRank])[name]:
            share = point.cost.parameters / layer.cost.parameters
            table._known[table._key(layer, point.structure)] = slow[name] * share  # noqa: SLF001
    table.dense_seconds, table.rest_seconds = 4.5, 0.5
    plan = allocate(survey, "LowRank", Budget(latency=0.6), latency=table)
    assert plan.seconds is not None
    assert plan.seconds <= 0.6 * 4.5
    times = [table.seconds(survey.layers[name], structure) for name, structure in plan.items()]
    assert plan.seconds == pytest.approx(sum(times) + 0.5)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="budget latency must be at least .* s, the smallest possible"):
        allocate(survey, "LowRank", Budget(latency_seconds=0.4), latency=table)


def test_times_are_measured_once_per_machine(
    surveyed: tuple[nn.Sequential, Survey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, survey = surveyed
    layer = survey.layers["6"]
    table = LatencyTable(model, survey, batches()[0], cache=tmp_path)
    table.prepare([(layer, LowRank(2)), (survey.layers["0"], LowRank(2))])
    again = LatencyTable(model, survey, batches()[0], cache=tmp_path)
    monkeypatch.setattr(again, "_time", None)  # would fail if it were called
    assert again.seconds(layer, LowRank(2)) == table.seconds(layer, LowRank(2)) > 0
    with pytest.raises(TypeError):
        again.seconds(layer, LowRank(3))


def test_advice_names_the_fastest_quarter_or_why_to_leave_a_layer_dense(
    surveyed: tuple[nn.Sequential, Survey],
) -> None:
    model, survey = surveyed
    table = LatencyTable(model, survey, batches()[0])
    for name, layer in survey.layers.items():
        table._known[table._key(layer, Dense())] = 1e-3  # noqa: SLF001
        for structure in LowRank.candidates(layer.shape):
            seconds = 5e-4 if name == "6" else 2e-3
            table._known[table._key(layer, structure)] = seconds  # noqa: SLF001
    found = advise(table, survey, [LowRank, Dense])
    assert found["6"].reason is None
    assert found["6"].structure == LowRank(3)  # 3 * (48 + 20) of 960 / 4
    assert "takes 2.000 ms, the dense layer 1.000 ms" in (found["3"].reason or "")
    assert found["8"].structure == LowRank(1)
    assert advise(table, survey, [Dense])["8"].reason == "no family has a structure of 25% of its parameters"


class Wide(nn.Module):
    """One layer's activations make the peak, another's weight does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16 * 16, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.down(self.up(x))).flatten(1))


Remembered = tuple[nn.Module, Survey, MemoryTable, torch.Tensor]


@pytest.fixture(name="remembered", scope="module")
def _remembered() -> Remembered:
    torch.manual_seed(0)
    model = Wide().eval()
    x = torch.randn(8, 3, 16, 16)
    survey = weft.survey(model, [x])
    return model, survey, MemoryTable(model, survey, x), x[:1]


def test_the_dense_peak_is_what_one_call_takes(remembered: Remembered) -> None:
    model, survey, table, x = remembered
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert table.dense_bytes == pytest.approx(weights + peak_activations(model, x), rel=0.01)
    assert table.live(survey.layers["up"], Dense()) >= 32 * 16 * 16 * 4
    assert table.live(survey.layers["down"], Dense()) >= (32 + 4) * 16 * 16 * 4  # its input is still there


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_a_plan_for_a_peak_of_memory_keeps_it(remembered: Remembered, share: float) -> None:
    model, survey, table, x = remembered
    plan = allocate(survey, ["LowRank"], Budget(peak_memory=share), memory=table)
    assert plan.peak_memory is not None
    assert plan.peak_memory <= share * table.dense_bytes
    small, _ = weft.compress(model, plan, survey)
    taken = footprint(small).memory + peak_activations(small, x)
    assert taken == pytest.approx(plan.peak_memory, rel=0.05)
    assert taken <= 1.05 * share * table.dense_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_layers_are_measured_in_the_networks_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Wide().to(dtype).eval(), torch.randn(1, 3, 16, 16).to(dtype)
    survey = weft.survey(model, [x])
    for layer in survey.layers.values():
        for structure in (Dense(), LowRank(2)):
            assert layer_call(layer, structure, 1)[0]().dtype == dtype
    table = MemoryTable(model, survey, x)
    layer = survey.layers["head"]
    size = torch.empty((), dtype=dtype).element_size()
    assert table.resident(layer, LowRank(2)) == LowRank(2).parameter_count(layer.shape) * size
    plan = allocate(survey, ["LowRank"], Budget(peak_memory=0.6), memory=table)
    small, _ = weft.compress(model, plan, survey)
    taken = footprint(small).memory + peak_activations(small, x)
    assert taken == pytest.approx(plan.peak_memory, rel=0.05)


def test_times_are_those_of_the_processor(surveyed: tuple[nn.Sequential, Survey]) -> None:
    model, survey = surveyed
    elsewhere = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="model must be on the CPU, got meta; move it there to plan"):
        LatencyTable(elsewhere, survey, batches()[0])


def test_a_peak_that_nothing_can_meet_says_the_smallest_possible(remembered: Remembered) -> None:
    _, survey, table, _ = remembered
    expected = r"budget peak_memory must be at least (\d+), the smallest possible"
    with pytest.raises(ValueError, match=expected) as error:
        allocate(survey, ["LowRank"], Budget(peak_memory=1000), memory=table)
    least = int(re.findall(r"at least (\d+)", str(error.value))[0])
    allocate(survey, ["LowRank"], Budget(peak_memory=least), memory=table)
    with pytest.raises(ValueError, match="memory table"):
        allocate(survey, ["LowRank"], Budget(peak_memory=0.5))
    with pytest.raises(ValueError, match="one with data"):
        MemoryTable(Wide(), weft.survey(Wide()), torch.randn(1, 3, 16, 16))


def test_memory_and_multiply_adds_are_limited_together(remembered: Remembered) -> None:
    _, survey, table, _ = remembered
    plan = allocate(survey, ["LowRank"], Budget(peak_memory=0.7, multiply_adds=0.4), memory=table)
    assert plan.total is not None
    assert plan.total.multiply_adds <= 0.4 * survey.total.multiply_adds
    assert (plan.peak_memory or 0) <= 0.7 * table.dense_bytes


def test_latency_needs_times_and_times_need_data(surveyed: tuple[nn.Sequential, Survey]) -> None:
    model, survey = surveyed
    with pytest.raises(ValueError, match="budget latency must be measurable, got no times; pass latency="):
        allocate(survey, "LowRank", Budget(latency=0.5))
    with pytest.raises(ValueError, match="survey must be one with data"):
        LatencyTable(model, weft.survey(model), batches()[0])


# ------------------------------------------------------------------------------------------------------------
# Sensitivity


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("outputs", [4, 6])
def test_a_transposed_convolution_is_substituted_in_torchs_own_layout(outputs: int, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, outputs, 3, groups=groups))
    x = torch.randn(8, 2, 7, 7)
    survey = weft.survey(model, [x])
    curves = {"2": error_curves(survey, [LowRank])["2"]}
    found = measure_sensitivity(model, survey, curves, [x])
    square, cost = found.probes["2"][0]
    point = min(curves["2"], key=lambda point: abs(point.error**2 - square))
    small = weft.compress(model, {"2": point.structure}, survey, correct_biases=False).model
    with torch.no_grad():
        assert cost == pytest.approx(float(squared_divergence(small(x), model(x))), rel=1e-3)


def test_measured_sensitivity_finds_the_layer_that_matters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    with torch.no_grad():  # the middle layer's output is mostly thrown away
        model[2].weight *= 0.01
        model[2].weight += torch.eye(24)
        model[1].weight[1:] *= 1e-2
        model[2].weight[:, 1:] *= 1e-3
    x = [torch.randn(64, 24), torch.randn(32, 24)]
    survey = weft.survey(model, x)
    curves = error_curves(survey, [LowRank])
    state = copy.deepcopy(model.state_dict())
    found = measure_sensitivity(model, survey, curves, x)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    for probes in found.probes.values():
        squares, costs = zip(*probes, strict=True)
        assert list(squares) == sorted(squares)
        assert list(costs) == sorted(costs)
    # What was measured is what a network with that one layer replaced does.
    square, cost = found.probes["0"][1]
    point = min(curves["0"], key=lambda point: abs(point.error**2 - square))
    small = weft.compress(model, {"0": point.structure}, survey, correct_biases=False).model
    with torch.no_grad():
        direct = sum(float(squared_divergence(small(batch), model(batch))) for batch in x) / 2
    assert cost == pytest.approx(direct, rel=1e-3)
    assert found.loss("0", math.sqrt(square)) == pytest.approx(cost)
    assert found.loss("0", 0) == 0
    assert -1 <= found.correlation <= 1


def test_kullback_leibler_divergence_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(kullback_leibler_divergence(ours, theirs), expected)
    assert float(kullback_leibler_divergence(ours, ours)) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    assume(len(set(first)) > 1 and len(set(second)) > 1)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_layers_weigh_as_they_were_measured(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    kept = {}
    for important in ("3", "6"):
        scales = Sensitivity({name: ((1.0, 100.0 if name == important else 1.0),) for name in survey.layers})
        plan = allocate(survey, "LowRank", Budget(parameters=0.5), sensitivity=scales)
        kept[important] = plan.expected
    assert kept["3"]["3"].error < kept["6"]["3"].error
    assert kept["6"]["6"].error < kept["3"]["6"].error
    with pytest.raises(ValueError, match="sensitivity must be known for layer 0, got none"):
        allocate(survey, "LowRank", Budget(parameters=0.5), sensitivity=Sensitivity({}))


# ------------------------------------------------------------------------------------------------------------
# Allocation


def made_up(
    curves: Mapping[str, Sequence[tuple[int, ...]]], rest: int = 0
) -> tuple[Survey, dict[str, list[Candidate]]]:
    """A survey and curves from (parameters, [bytes,] error in tenths) triples, the dense one last."""
    made = {
        name: [
            Candidate(LowRank(index + 1), Cost(*point[:-1]), point[-1] / 10)
            for index, point in enumerate(curve)
        ]
        for name, curve in curves.items()
    }
    layers = {}
    total = Cost(rest, rest)
    for name, curve in made.items():
        cost = curve[-1].cost
        layers[name] = MadeUp(name, cost)
        total = total + cost
    return Survey(layers, {}, total), made


class MadeUp(LayerSurvey):
    """A layer whose cost is given instead of counted."""

    def __init__(self, name: str, cost: Cost) -> None:
        super().__init__(name, (name,), torch.empty(1, 1))
        object.__setattr__(self, "own_cost", cost)

    @property
    def cost(self) -> Cost:
        return self.own_cost  # type: ignore[attr-defined]


def loss_of(points: Sequence[Candidate]) -> float:
    return sum(point.error**2 for point in points)


def total_of(points: Sequence[Candidate], name: str) -> int:
    return sum(getattr(point.cost, name) for point in points)


@st.composite
def convexity_free_curves(draw: Any, costs_per_point: int = 1) -> dict[str, list[tuple[int, ...]]]:
    """Up to four layers with curves of any shape; cost rises and error falls to 0."""
    curves = {}
    for layer in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        axes = [sorted(draw(st.lists(st.integers(1, 60), min_size=size, max_size=size, unique=True)))]
        for _ in range(costs_per_point - 1):
            axes.append(draw(st.lists(st.integers(1, 60), min_size=size, max_size=size)))
        errors = sorted(
            draw(st.lists(st.integers(1, 30), min_size=size - 1, max_size=size - 1)), reverse=True
        )
        curves[f"layer{layer}"] = list(zip(*axes, [*errors, 0], strict=True))
    return curves


@given(convexity_free_curves(), st.floats(0.05, 1))
@settings(deadline=None, max_examples=150)
def test_one_limit_is_met_at_the_optimum(drawn: dict[str, list[tuple[int, ...]]], share: float) -> None:
    survey, curves = made_up(drawn, rest=7)
    limit = int(share * survey.total.parameters)
    choices = list(itertools.product(*curves.values()))
    within = [choice for choice in choices if 7 + total_of(choice, "parameters") <= limit]
    if not within:
        least = 7 + min(total_of(choice, "parameters") for choice in choices)
        with pytest.raises(
            ValueError, match=f"budget parameters must be at least {least}, the smallest possible"
        ):
            allocate(survey, "LowRank", Budget(parameters=share), curves=curves)
        plan = allocate(survey, "LowRank", Budget(parameters=least), curves=curves)  # and that is reachable
        assert plan.total is not None
        assert plan.total.parameters == least
        return
    optimum = min(loss_of(choice) for choice in within)
    plan = allocate(survey, "LowRank", Budget(parameters=share), curves=curves)
    uniform = allocate(survey, "LowRank", Budget(parameters=share), curves=curves, method="uniform")
    chosen = list(plan.expected.values())
    for found in (plan, uniform):
        assert found.total is not None
        assert found.total.parameters == 7 + total_of(list(found.expected.values()), "parameters") <= limit
    assert loss_of(chosen) <= loss_of(list(uniform.expected.values())) + 1e-12
    assert loss_of(chosen) == pytest.approx(optimum, abs=1e-9)
    # Nothing is left over that a single exchange could use.
    for name, curve in curves.items():
        for point in curve:
            if point.error < plan.expected[name].error:
                exchanged = (
                    plan.total.parameters - plan.expected[name].cost.parameters + point.cost.parameters
                )
                assert exchanged > limit


@given(convexity_free_curves(2), st.floats(0.05, 1), st.floats(0.05, 1), st.booleans())
@settings(deadline=None, max_examples=150)
def test_several_limits_are_met_together_or_refused(
    drawn: dict[str, list[tuple[int, ...]]], one: float, other: float, opposed: bool
) -> None:
    if not opposed:  # then the smallest member is the cheapest in every way
        for name, curve in drawn.items():
            parameters, sizes, errors = zip(*curve, strict=True)
            drawn[name] = list(zip(parameters, sorted(sizes), errors, strict=True))
    survey, curves = made_up(drawn)
    budget = Budget(parameters=one, bytes=other)
    assume(min(budget.limits(survey.total).values()) > 0)
    limits = budget.limits(survey.total)
    choices = [
        choice
        for choice in itertools.product(*curves.values())
        if all(total_of(choice, name) <= limit for name, limit in limits.items())
    ]
    if not choices:
        with pytest.raises(
            ValueError, match="budget .* must be|budget must be reachable in all its limits together"
        ):
            allocate(survey, "LowRank", budget, curves=curves)
        return
    try:
        plan = allocate(survey, "LowRank", budget, curves=curves)
    except ValueError:
        assume(
            not opposed
        )  # to meet opposed limits is a hard problem, and the search may not find the one way
        raise
    assert plan.total is not None
    assert all(getattr(plan.total, name) <= limit for name, limit in limits.items())


@pytest.mark.parametrize("method", ["lagrangian", "uniform"])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(parameters=0.5),
        Budget(bytes=0.4),
        Budget(multiply_adds=0.6),
        Budget(parameters=0.6, multiply_adds=0.5, bytes=5000),
        Budget(parameters=1.0),
    ],
    ids=str,
)
def test_the_compressed_network_costs_what_the_plan_predicted_and_no_more_than_the_budget(
    surveyed: tuple[nn.Sequential, Survey], budget: Budget, method: str
) -> None:
    model, survey = surveyed
    plan = weft.allocate(survey, "LowRank", budget, method=method)
    small, log = weft.compress(model, plan, survey)
    measured = network_cost(small, batches()[0])
    assert measured == plan.total
    for name, limit in budget.limits(survey.total).items():
        assert getattr(measured, name) <= limit
    for entry in log:
        point = plan.expected[entry["layer"]]
        assert entry["error"] == pytest.approx(point.error, rel=1e-3, abs=1e-5)


def test_limits_too_large_for_single_units_are_met_nearly_at_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for layer in range(5):
        sizes = (10**9 * torch.rand(6, generator=generator)).long().sort().values.tolist()
        errors = (30 * torch.rand(5, generator=generator)).sort(descending=True).values.tolist()
        curves[f"layer{layer}"] = list(zip(sizes, [*errors, 0], strict=True))
    survey, made = made_up(curves)
    plan = allocate(survey, "LowRank", Budget(parameters=0.5), curves=made)
    limit = 0.5 * survey.total.parameters
    choices = itertools.product(*made.values())
    optimum = min(loss_of(choice) for choice in choices if total_of(choice, "parameters") <= limit)
    assert loss_of(list(plan.expected.values())) <= 1.01 * optimum


def test_the_whole_budget_leaves_everything_dense(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    plan = weft.allocate(survey, "LowRank", Budget(parameters=1.0))
    assert set(plan.values()) == {Dense()}
    assert plan.total == survey.total


def test_output_grams_weigh_layers_by_the_predicted_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    with torch.no_grad():
        model[1].weight[1:] *= 1e-3  # only one output of the last layer matters
    x = [torch.randn(200, 24)]
    survey = weft.survey(model, x, loss=lambda output, batch: output.square().sum(-1).mean())
    plan = weft.allocate(survey, "LowRank", Budget(parameters=0.4))
    assert plan.expected["1"].cost.parameters < plan.expected["0"].cost.parameters


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_pareto_curves_are_the_lower_hull_of_all_choices(drawn: list[list[tuple[int, int]]]) -> None:
    names = [str(index) for index in range(len(drawn))]
    survey = Survey(
        {name: LayerSurvey(name, (name,), torch.zeros(10, 10)) for name in names}, {}, Cost(500, 500, 500)
    )
    curves = {
        name: [Candidate(LowRank(1), Cost(cost, cost, cost), math.sqrt(loss)) for cost, loss in points]
        for name, points in zip(names, drawn, strict=True)
    }
    found = pareto(survey, curves, {name: curve[0] for name, curve in curves.items()}, cost="parameters")
    rest = 500 - 100 * len(names)
    every = [
        (rest + sum(cost for cost, _ in choice), sum(loss for _, loss in choice))
        for choice in itertools.product(*drawn)
    ]
    line = found.curves["all"]
    assert line == found.curves["LowRank"]
    for cost, loss in line:  # every point can be had
        assert any(cost == other and loss == pytest.approx(lost, abs=1e-6) for other, lost in every)
    assert line[0][0] == min(cost for cost, _ in every)
    assert line[-1][1] == pytest.approx(min(loss for _, loss in every), abs=1e-6)
    for cost, loss in every:  # and none is below the line
        for (left, high), (right, low) in itertools.pairwise(line):
            if left <= cost <= right:
                assert loss >= high + (low - high) * (cost - left) / (right - left) - 1e-6
    assert found.chosen == (
        rest + sum(points[0][0] for points in drawn),
        pytest.approx(sum(points[0][1] for points in drawn), abs=1e-6),
    )


def test_what_a_lookups_error_costs_is_predicted_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6), nn.Flatten(), nn.Linear(18, 4))
    batches = [torch.randint(12, (400, 3)) for _ in range(20)]
    survey = weft.survey(model, batches, loss="squared", shrinkage=0.0)
    sensitivity = predicted_sensitivity(survey)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight += 0.1 * torch.randn(12, 6)
        changed[2].weight += 0.1 * torch.randn(4, 18)
        for name in ("0", "2"):
            layer = survey.layers[name]
            one = copy.deepcopy(model)
            one[int(name)].weight.copy_(changed[int(name)].weight)
            measured = sum(float((one(x) - model(x)).square().sum(1).mean()) for x in batches) / len(batches)
            error = relative_error(
                layer.weight,
                changed[int(name)].weight,
                input_gram=layer.input_gram,
                output_gram=layer.output_gram,
            )
            assert sensitivity.loss(name, error) == pytest.approx(measured, rel=0.3)


def test_a_budget_below_the_smallest_possible_names_it(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    with pytest.raises(
        ValueError, match=r"budget bytes must be at least \d+, the smallest possible"
    ) as caught:
        weft.allocate(survey, "LowRank", Budget(bytes=2))
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    plan = weft.allocate(survey, "LowRank", Budget(bytes=least))
    assert plan.total is not None
    assert plan.total.bytes == least


def test_a_plan_says_why_the_other_families_lost(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    families = [LowRank, SparseProduct, Quantized]
    curves = error_curves(survey, families)
    kinds = set()
    for share in (0.105, 0.15, 0.3, 0.6):
        plan = weft.allocate(survey, families, Budget(bytes=share), curves=curves)
        for name, chosen in plan.expected.items():
            if isinstance(chosen.structure, Dense):
                assert name not in plan.others or not plan.others[name]
                continue
            rivals = {family.__name__ for family in families} - {type(chosen.structure).__name__}
            assert set(plan.others[name]) <= rivals
            for family, reason in plan.others[name].items():
                own = [point for point in curves[name] if type(point.structure).__name__ == family]
                affordable = [point.error for point in own if point.cost.bytes <= chosen.cost.bytes]
                kinds.add(bool(affordable))
                if affordable:
                    assert reason.startswith(f"error {min(affordable):.4f} at no more cost")
                else:
                    assert reason == f"at least {min(point.cost.bytes for point in own):,} bytes"
    assert kinds == {True, False}


def test_unknown_methods_and_families_are_refused(surveyed: tuple[nn.Sequential, Survey]) -> None:
    _, survey = surveyed
    with pytest.raises(ValueError, match="method must be one of 'lagrangian', 'uniform', got 'greedy'"):
        weft.allocate(survey, "LowRank", Budget(parameters=0.5), method="greedy")
    with pytest.raises(ValueError, match="family must be one of .*LowRank.* got 'HighRank'"):
        weft.allocate(survey, "HighRank", Budget(parameters=0.5))
    with pytest.raises(ValueError, match="families must be named, got none"):
        weft.allocate(survey, [], Budget(parameters=0.5))


# ------------------------------------------------------------------------------------------------------------
# Plans


def test_a_plan_is_a_mapping_and_a_value() -> None:
    one = Plan({"a": LowRank(2), "b": Dense()})
    other = Plan({"b": Dense(), "a": LowRank(2)})
    assert dict(one) == {"a": LowRank(2), "b": Dense()}
    assert one == other
    assert hash(one) == hash(other)
    assert one != Plan({"a": LowRank(3), "b": Dense()})


def test_save_and_load_give_an_equal_plan(surveyed: tuple[nn.Sequential, Survey], tmp_path: Path) -> None:
    _, survey = surveyed
    plan = weft.allocate(survey, "LowRank", Budget(parameters=0.5, bytes=6000))
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.budget == plan.budget
    assert again.expected == plan.expected
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@each_example
def test_every_structure_survives_the_file(example: Example, tmp_path: Path) -> None:
    plan = Plan({"layer": example.structure((40, 48)), "other.name": example.structure((8, 4, 3, 3))})
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_the_curves_are_in_the_plans_file(surveyed: tuple[nn.Sequential, Survey], tmp_path: Path) -> None:
    plan = allocate(surveyed[1], ["LowRank"], Budget(parameters=0.5))
    assert plan.pareto is not None
    assert plan.pareto.cost == "parameters"
    assert plan.total is not None
    assert plan.pareto.chosen[0] == plan.total.parameters
    assert Plan.load(plan.save(tmp_path / "plan.json")).pareto == plan.pareto
    record = json.loads((tmp_path / "plan.json").read_text())
    record["pareto"]["curves"] = 3
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="pareto"):
        Plan.load(tmp_path / "plan.json")


def test_every_layers_curves_hold_what_was_chosen_and_sum_to_the_plans_loss(
    surveyed: tuple[nn.Sequential, Survey],
) -> None:
    plan = allocate(surveyed[1], ["LowRank", "SparseProduct"], Budget(parameters=0.4))
    assert plan.pareto is not None
    assert set(plan.pareto.layers) == set(plan)
    assert sum(layer.loss for layer in plan.pareto.layers.values()) == pytest.approx(plan.pareto.chosen[1])
    for name, layer in plan.pareto.layers.items():
        point = plan.expected[name]
        assert layer.dense == surveyed[1].layers[name].cost.parameters
        # Without output Grams a squared relative error counts as it is.
        assert (layer.sensitivity, layer.loss) == pytest.approx((1.0, point.error**2))
        for points in layer.curves.values():
            assert 2 <= len(points) <= 20
            assert [cost for cost, _, _ in points] == sorted(cost for cost, _, _ in points)
        if not isinstance(point.structure, Dense):
            own = layer.curves[type(point.structure).__name__]
            assert (point.cost.parameters, point.error, str(point.structure)) in own


def test_a_plan_written_by_hand_needs_only_structures(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({"weft_plan": 1, "layers": {"6": {"structure": {"family": "LowRank", "rank": 3}}}})
    )
    plan = Plan.load(path)
    assert plan == Plan({"6": LowRank(3)})
    small, log = weft.compress(network(), plan)
    assert small[6].matrix.structure == LowRank(3)
    assert [entry["layer"] for entry in log] == ["6"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"6": {"structure": {"family": "LowRank", "rank": 0}}},
            r"layer 6 of .*plan\.json: rank must be at least 1",
        ),
        ({"6": {"structure": {"family": "LowRank"}}}, "layer 6 of .*fields of LowRank must be complete"),
        ({"6": {"structure": {"family": "LowRank", "rang": 3}}}, "layer 6 of .*must be known, got rang"),
        ({"6": {"structure": {"family": "None"}}}, "layer 6 of .*family must be one of"),
        ({"6": {"structure": "LowRank"}}, "layer 6 of .*structure must be a dictionary"),
        ({"6": {"rank": 3}}, "layer 6 of .*entry must be a dictionary with the keys structure, cost, error"),
        ({"6": 3}, "layer 6 of .*entry must be a dictionary"),
        (
            {"6": {"structure": {"family": "Dense"}, "cost": {"size": 3}, "error": 0}},
            "layer 6 of .*unexpected keyword argument 'size'",
        ),
        ([1], "layers of .* must be a JSON dictionary"),
        (None, "layers of .* must be a JSON dictionary"),
    ],
)
def test_edited_plans_that_cannot_be_read_name_the_layer(tmp_path: Path, layers: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"weft_plan": 1, "layers": layers}))
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"weft_survey": 1}')
    with pytest.raises(ValueError, match='must be JSON with "weft_plan": 1'):
        Plan.load(path)
    path.write_text('{"weft_plan": 1, "layers": {}, "budget": {"size": 3}}')
    with pytest.raises(ValueError, match="budget, total, curves or scouting of .*'size'"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"6": LowRank(21)}, r"layer 6: rank must be between 1 and 20 for a \(20, 48\) weight, got 21"),
        ({"elsewhere": LowRank(2)}, "layer elsewhere must be one that can be replaced, got not in the model"),
        ({"1": LowRank(2)}, "layer 1 must be one that can be replaced, got not in the model"),
    ],
)
def test_impossible_plans_name_the_layer(plan: dict[str, Any], message: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        weft.compress(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_refused_layer_says_why() -> None:
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Conv2d(3, 3, 2)))
    with pytest.raises(
        ValueError, match="layer 1 must be .* got left dense, because its weight is computed by"
    ):
        weft.compress(model, {"1": LowRank(2)})

    class Picky(Dense):
        def refusal(self, shape: Any, geometry: Geometry | None = None) -> str:
            return "it is Tuesday"

    with pytest.raises(
        ValueError, match="layer 0 must be one that Picky.* takes, got refused, because it is Tuesday"
    ):
        check_plan({"0": Picky()}, weft.survey(model))


def test_a_plan_for_another_model_names_the_first_layer_that_differs(
    surveyed: tuple[nn.Sequential, Survey],
) -> None:
    _, survey = surveyed
    plan = weft.allocate(survey, "LowRank", Budget(parameters=0.5))
    other = network()
    other[6] = nn.Linear(48, 30)
    with pytest.raises(ValueError, match=r"layer 6 must be of shape \(20, 48\), as surveyed, got \(30, 48\)"):
        weft.compress(other, plan, survey)
    with pytest.raises(ValueError, match="layer 0 must be .*got none in the model"):
        weft.compress(nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), plan, survey)
