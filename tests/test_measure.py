"""Accuracy, cost and latency, against counts by hand."""

import copy
import json
import math
from collections import UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from tests.examples import GEOMETRIES, Example, each_example
from weft.layers.convolution import StructuredConvolution
from weft.layers.linear import StructuredLinear
from weft.measure import (
    accuracy,
    batch_size,
    call,
    environment,
    evaluating,
    footprint,
    latencies,
    layer_rows,
    logits_of,
    network_cost,
    peak_activations,
    quality,
    r_squared,
    repeat_to,
    threads,
    time_alternating,
    to_device,
)
from weft.report.report import Report
from weft.structures.base import Cost, Geometry
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.sparse_product import SparseProduct


class Argmax(nn.Module):
    """Gives back its inputs as scores."""

    def forward(self, x: Tensor) -> Tensor:
        return x


# ------------------------------------------------------------------------------------------------------------
# Accuracy


@given(st.integers(1, 5), st.integers(2, 6), st.lists(st.integers(0, 7), min_size=1, max_size=4))
@settings(deadline=None)
def test_accuracy_is_the_share_of_labels_with_the_largest_score(
    seed: int, classes: int, sizes: list[int]
) -> None:
    torch.manual_seed(seed)
    data = [(torch.randn(size, classes), torch.randint(classes, (size,))) for size in sizes]
    right = sum(
        int(scores[index].argmax()) == int(labels[index])
        for scores, labels in data
        for index in range(len(labels))
    )
    if not sum(sizes):
        with pytest.raises(ValueError, match="data must be not empty, got no labelled samples"):
            accuracy(Argmax(), data)
    else:
        assert accuracy(Argmax(), data) == right / sum(sizes)


def test_accuracy_counts_every_position_of_a_sequence() -> None:
    scores = F.one_hot(torch.tensor([[0, 1, 2], [2, 1, 0]]), 3).float()
    labels = torch.tensor([[0, 1, 1], [2, 0, 0]])
    assert accuracy(Argmax(), [(scores, labels)]) == 4 / 6


def test_accuracy_takes_inputs_of_any_form_and_outputs_with_logits() -> None:
    Output = namedtuple("Output", ["logits", "hidden"])

    class Model(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Any:
            return Output(left + right, left)

    x, labels = torch.eye(3), torch.arange(3)
    for given_inputs in ((x, x), [x, x], {"left": x, "right": x}):
        assert accuracy(Model(), [(given_inputs, labels)]) == 1.0


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            TypeError,
            r"data must be an iterable of \(inputs, labels\) pairs, got Tensor of 2",
        ),
        ((torch.zeros(2, 3),), TypeError, "pairs, got tuple of 1"),
        ((torch.zeros(2, 3), [0, 1]), TypeError, "pairs, got labels that are list"),
        ((torch.zeros(2, 3), torch.zeros(2)), TypeError, "labels must be integers, got torch.float32"),
        ((torch.zeros(2, 3), torch.tensor([0, 3])), ValueError, "labels must be between 0 and 2, got 0 to 3"),
        (
            (torch.zeros(2, 3), torch.tensor([-100, 1])),
            ValueError,
            "labels must be between 0 and 2, got -100 to 1",
        ),
        ((torch.zeros(2, 3), torch.tensor([0])), ValueError, r"labels must be of shape \(2,\), got \(1,\)"),
        (
            (torch.zeros(2, 3), torch.zeros(2, 3).long()),
            ValueError,
            r"labels must be of shape \(2,\), got \(2, 3\)",
        ),
    ],
)
def test_data_without_fitting_labels_are_refused(batch: Any, error: type[Exception], message: str) -> None:
    model = Argmax().train()
    with pytest.raises(error, match=message):
        accuracy(model, [batch])
    assert model.training


@pytest.mark.parametrize("shape", [(8, 3, 5), (8, 3, 5, 4), (8, 3, 2, 4, 5)], ids=str)
def test_classes_on_axis_1_are_taken_as_torchs_losses_take_them(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape)
    labels = scores.argmax(1)
    labels[0] = (labels[0] + 1) % 3
    assert accuracy(Argmax(), [(scores, labels)]) == pytest.approx(7 / 8)
    last = scores.movedim(1, -1).contiguous()
    assert accuracy(Argmax(), [(last, labels)]) == pytest.approx(7 / 8)


@given(st.integers(1, 4), st.floats(-1e4, 1e4), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_r_squared_is_that_of_the_definition_in_any_batches(size: int, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(23, 3, generator=generator)
    y = x @ torch.randn(3, 2, generator=generator) + 0.3 * torch.randn(23, 2, generator=generator) + offset
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias += offset
        error = (y.double() - model(x).double()).square().sum()
    expected = float(1 - error / (y.double() - y.double().mean(0)).square().sum())
    batches = list(zip(x.split(size), y.split(size), strict=True))
    assert r_squared(model, batches) == pytest.approx(expected, rel=1e-6)
    assert quality(model, batches) == pytest.approx(expected, rel=1e-6)


def test_what_has_no_r_squared_is_refused() -> None:
    x = torch.randn(6, 3)
    one = nn.Linear(3, 1)
    assert r_squared(one, [(x, one(x).detach().squeeze(1))]) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"floating targets must be of shape \(6, 4\), got \(6,\)"):
        r_squared(nn.Linear(3, 4), [(x, torch.randn(6))])
    with pytest.raises(ValueError, match="targets must be of different values, got all equal"):
        r_squared(one, [(x, torch.ones(6))])
    for empty in ([], [(x[:0], torch.randn(0))]):
        with pytest.raises(ValueError, match="must be"):
            quality(one, empty)


def test_scores_are_found_by_their_name_in_a_dictionary() -> None:
    scores, hidden = torch.randn(2, 3), torch.randn(2, 9)
    assert logits_of({"hidden": hidden, "logits": scores}) is scores
    assert logits_of({"hidden": hidden}) is hidden


def test_nan_among_the_scores_is_never_right() -> None:
    scores = torch.tensor([[math.nan, 1.0], [0.0, 1.0], [0.0, math.nan]])
    assert accuracy(Argmax(), [(scores, torch.tensor([0, 1, 1]))]) == 1 / 3


def test_no_data_are_refused() -> None:
    with pytest.raises(ValueError, match="data must be not empty"):
        accuracy(Argmax(), [])


# ------------------------------------------------------------------------------------------------------------
# Calling


def test_call_unpacks_tuples_and_dictionaries() -> None:
    class Model(nn.Module):
        def forward(self, left: Tensor, right: Tensor | None = None, *, scale: float = 1) -> Tensor:
            return scale * (left if right is None else left - right)

    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(call(Model(), x), x)
    assert torch.equal(call(Model(), (x, y)), x)
    assert torch.equal(call(Model(), [x]), x)
    assert torch.equal(call(Model(), {"left": x, "scale": 2}), 2 * x)
    assert torch.equal(call(Model(), UserDict(left=x)), x)
    with pytest.raises(
        TypeError, match=r"batch must be what Model\.forward takes, got 3 inputs; if your batches are"
    ):
        call(Model(), (x, y, x))


def test_batches_keep_their_form_on_the_way_to_a_device_and_to_a_size() -> None:
    Pair = namedtuple("Pair", ["image", "index"])
    x = torch.arange(3)
    for batch in (x, (x, 2), [x, [x]], {"a": x, "b": "text"}, Pair(x, 3)):
        moved, repeated = to_device(batch, torch.device("cpu")), repeat_to(batch, 5)
        assert batch_size(moved) == 3
        assert batch_size(repeated) == 5
    assert torch.equal(repeat_to(x, 5), torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(repeat_to(x, 2), torch.tensor([0, 1]))


def test_logits_are_found_or_refused() -> None:
    x = torch.ones(2, 3)
    for output in (x, (x, 1), {"logits": x}, UserDict(scores=x), [torch.ones(2).long(), x]):
        assert logits_of(output) is x
    with pytest.raises(TypeError, match="model output must be a tensor or something that holds one, got int"):
        logits_of(3)


def test_evaluating_gives_every_module_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [module.training for module in model.modules()] == modes


# ------------------------------------------------------------------------------------------------------------
# Cost


class Attention(nn.Module):
    """Scaled dot-product attention written out as modules and one fused call."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.into(x).chunk(3, -1)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class SelfAttention(nn.MultiheadAttention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 6, batch_first=True), nn.GRU(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


COUNTED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(6, 4), torch.randn(5, 6), 24),
    "linear on sequences": (lambda: nn.Linear(6, 4, bias=False), torch.randn(5, 7, 6), 24 * 7),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9, 8), 8 * 27 * 5 * 4),
    "grouped": (lambda: nn.Conv2d(4, 8, (3, 1), groups=2), torch.randn(2, 4, 9, 8), 8 * 6 * 7 * 8),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), torch.randn(2, 4, 9), 4 * 3 * 7),
    "three axes": (lambda: nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4), 3 * 16 * 27),
    "attention": (lambda: Attention(8, 2), torch.randn(3, 5, 8), 5 * 8 * 8 * 4 + 2 * (5 * 5 * 8)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.randn(3, 5, 8),
        5 * (8 * 8 * 4 + 2 * 8 * 16) + 2 * (5 * 5 * 8),
    ),
    "multi-head attention": (
        lambda: SelfAttention(8, 2),
        torch.randn(3, 5, 8),
        5 * 8 * 8 * 4 + 2 * (5 * 5 * 8),
    ),
    "recurrent": (Recurrent, torch.randn(3, 5, 8), 5 * (4 * 6 * (8 + 6) + 3 * 4 * (6 + 4))),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), torch.randn(2, 3, 5, 5), 25 * 3 * 4 * 4),
    "two places": (lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2), torch.randn(5, 6), 72),
}


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_of_dense_networks_equal_the_hand_count(name: str) -> None:
    make, x, expected = COUNTED[name]
    assert network_cost(make(), x).multiply_adds == expected
    assert network_cost(make(), x[:1]).multiply_adds == expected  # per sample, whatever the batch


def test_parameters_and_bytes_are_those_of_the_stored_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6).half())
    norm = 2 * 4 * 4 + 2 * 4 * 4 + 8  # weight, bias, running mean and variance; one 64-bit counter
    assert network_cost(model) == Cost(4 * 27 + 4 + 8 + 36, 4 * (4 * 27 + 4) + norm + 2 * 36, 0)


def test_shared_tensors_count_once_and_their_work_every_time() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[2].weight = model[1].weight
    model[3].weight = model[0].weight
    x = torch.zeros(2, 3, dtype=torch.long)
    assert network_cost(model, x) == Cost(54 + 36 + 12, 4 * (54 + 36 + 12), 3 * (72 + 54))
    small, _ = weft.compress(model, {"1": LowRank(2)})
    assert network_cost(small, x) == Cost(54 + 24 + 12, 4 * (54 + 24 + 12), 3 * (48 + 54))


@each_example
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_structured_convolutions_count_their_own_cost(example: Example, geometry: Geometry) -> None:
    structure = example.structure((8, 4, 3, 3))
    if structure.refusal((8, 4, 3, 3), geometry) is not None:
        pytest.skip("the family refuses this convolution, and says so")
    matrix = structure.initialise((8, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    layer = StructuredConvolution(matrix, geometry)
    x = torch.randn(3, 4 * geometry.groups, *geometry.input_size)
    assert network_cost(layer, x) == matrix.cost(geometry)


@each_example
def test_structured_linear_layers_count_their_own_cost_whatever_runs_them(example: Example) -> None:
    matrix = example.structure((40, 48)).initialise((40, 48), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(StructuredLinear(matrix, torch.zeros(40)), nn.Linear(40, 5))
    cost = network_cost(model, torch.randn(3, 7, 48))
    assert cost.multiply_adds == 7 * (matrix.cost().multiply_adds + 200)
    assert cost.bytes == matrix.cost().bytes + 4 * (40 + 205)
    assert cost.parameters == matrix.cost().parameters + 40 + 205


def test_a_layer_called_by_keyword_counts_too() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=self.convolution(input=x))

    model, x = Keywords(), torch.randn(2, 3, 7, 7)
    found = weft.survey(model, [x])
    plan = {"convolution": LowRank(2), "linear": LowRank(1)}
    small, log = weft.compress(model, plan, found)
    assert network_cost(small, x).multiply_adds == sum(entry["multiply_adds"] for entry in log)


# ------------------------------------------------------------------------------------------------------------
# Latency


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    timed = time_alternating(
        {"one": lambda: order.append("one"), "two": lambda: order.append("two")}, seconds=0.0, least=4, most=9
    )
    assert order == ["one", "two"] * (len(order) // 2)
    for timing in timed.values():
        assert timing.calls == 4
        assert 0 <= timing.low <= timing.median <= timing.high


def test_latencies_have_a_row_per_batch_size_and_thread_count_and_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4)).train()
    small, _ = weft.compress(model, {"0": LowRank(1)})
    seen: list[int] = []
    small.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    before = torch.get_num_threads()
    rows = latencies(model, small, torch.randn(3, 8), batches=(1, 7), thread_counts=(1, 2), seconds=0.01)
    assert [(row.threads, row.batch) for row in rows] == [(1, 1), (1, 7), (2, 1), (2, 7)]
    assert set(seen) == {1, 7}
    assert torch.get_num_threads() == before
    assert model.training
    assert small.training
    for row in rows:
        assert row.dense.calls == row.compressed.calls >= 15
        assert row.speedup == row.dense.median / row.compressed.median > 0


def test_the_thread_count_comes_back_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with threads(before + 1):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_num_threads() == before


def test_the_environment_is_written_down() -> None:
    data = json.loads(json.dumps(environment()))
    assert data["torch"] == torch.__version__
    assert data["kernels"].split(" ")[0] in {"native", "reference"}
    assert data["processor"]


# ------------------------------------------------------------------------------------------------------------
# Side by side


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)).eval()
    return model, weft.compress(model, {"0": LowRank(2), "3": LowRank(2)}).model


def held_out() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 1, 6, 6, generator=generator), torch.arange(4)) for _ in range(2)]


def test_a_measurement_holds_both_networks_and_touches_neither(pair: tuple[nn.Module, nn.Module]) -> None:
    model, small = pair
    model[1].train()
    before = [copy.deepcopy(network.state_dict()) for network in pair]
    modes = [module.training for network in pair for module in network.modules()]
    report = weft.measure(small, against=model, data=held_out(), batches=(1, 3), seconds=0.01)
    assert report.metric == "accuracy"
    assert report.dense_value == accuracy(model, held_out())
    assert report.value == accuracy(small, held_out())
    x = held_out()[0][0]
    assert (report.dense_cost, report.cost) == (network_cost(model, x), network_cost(small, x))
    assert [row.batch for row in report.latencies] == [1, 3]
    assert [row.name for row in report.layers] == ["0", "3"]
    assert modes == [module.training for network in pair for module in network.modules()]
    for network, state in zip(pair, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_metric_of_ones_own_is_named_and_given_the_data(pair: tuple[nn.Module, nn.Module]) -> None:
    model, small = pair

    def agreement(network: nn.Module, data: Any) -> Tensor:
        return torch.stack([
            (network(x).argmax(-1) == model(x).argmax(-1)).float().mean() for x, _ in data
        ]).mean()

    report = weft.measure(small, against=model, data=held_out(), metric=agreement, batches=(1,), seconds=0.01)
    assert (report.metric, report.dense_value) == ("agreement", 1.0)
    named = weft.measure(
        small,
        against=model,
        data=held_out(),
        metric=agreement,
        metric_name="same",
        batches=(1,),
        seconds=0.01,
    )
    assert named.metric == "same"


def test_layers_that_share_a_matrix_have_one_row() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    small, _ = weft.compress(model, {"0": LowRank(2)})
    (row,) = layer_rows(small)
    assert (row.name, row.structure, row.shape) == ("0", "LowRank(rank=2)", (6, 6))
    assert (row.dense.parameters, row.cost.parameters) == (36, 24)
    assert row.picture[0]["kind"] == "low_rank"


def test_layers_are_compared_with_their_dense_twins() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Linear(20, 6))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    small, _ = weft.compress(model, {"0": LowRank(3), "2": LowRank(2), "3": LowRank(1)})
    plain, convolution, last = layer_rows(small, against=model)
    for row, weight in ((plain, model[0].weight), (convolution, model[2].weight.flatten(1))):
        expected = torch.linalg.svdvals(weight.detach())
        rank = int(row.structure[-2])
        assert row.singular_values is not None
        assert row.singular_values["place"] == list(range(1, min(weight.shape) + 1))
        assert row.singular_values["dense"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert row.singular_values["structured"][:rank] == pytest.approx(expected[:rank].tolist(), rel=1e-4)
        assert row.singular_values["structured"][rank:] == pytest.approx(
            [0.0] * (len(expected) - rank), abs=1e-4
        )
        assert row.distance == pytest.approx(float(expected[rank:].norm() / expected.norm()), rel=1e-4)
    # Only some of many values; none without a twin of this shape, or where a training ran away.
    wide = nn.Sequential(nn.Linear(300, 200))
    (row,) = layer_rows(weft.compress(wide, {"0": LowRank(2)}).model, against=wide)
    assert row.singular_values is not None
    places = row.singular_values["place"]
    assert (places[:5], places[-1], len(places) < 70) == ([1, 2, 3, 4, 5], 200, True)
    without = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Conv2d(3, 4, 1))
    assert [row.distance is None for row in layer_rows(small, against=without)] == [False, True, True]
    with torch.no_grad():
        next(small[3].matrix.parameters()).fill_(float("nan"))
    assert layer_rows(small, against=model)[2].distance is None
    assert last.distance is not None


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (iter(held_out()), TypeError, "data must be iterable more than once, got list_iterator; pass a list"),
        ((batch for batch in held_out()), TypeError, "data must be iterable more than once, got generator"),
        ([], ValueError, "data must be not empty, got no samples"),
        (
            [(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())],
            ValueError,
            "data must be not empty, got no samples",
        ),
    ],
    ids=["iterator", "generator", "none", "no samples"],
)
def test_data_that_cannot_be_measured_are_refused(
    pair: tuple[nn.Module, nn.Module], data: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        weft.measure(pair[1], against=pair[0], data=data, seconds=0.01)


def test_peak_activations_are_the_hand_count() -> None:
    x = torch.zeros(4, 8)
    wide = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))
    assert peak_activations(wide, x) == 2 * 400  # what the ReLU takes and what it gives
    wide[1] = nn.ReLU(inplace=True)
    assert peak_activations(wide, x) == 400 + 8
    assert peak_activations(wide, x[:1]) == 400 + 8


def test_a_convolution_by_its_dense_kernel_says_what_it_keeps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))
    small, log = weft.compress(model, {"0": SparseProduct(1, 2, "random"), "2": LowRank(1)})
    data = [(torch.randn(5, 4, 8, 8), torch.zeros(5, dtype=torch.long))]
    report = weft.measure(small, against=model, data=data, batches=(1,), thread_counts=(1,), seconds=0.01)
    assert [row.only_storage_shrinks for row in report.layers] == [True, False]
    assert [entry["only_storage_shrinks"] for entry in log] == [True, False]
    held = footprint(small).memory
    small[0].matrix.forget()
    assert held - footprint(small).memory == 8 * 36 * 4  # the kernel
    assert report.activations >= 8 * 36 * 4
    assert "peak activations" in str(report)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    page = report.write_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("only storage shrinks") == 1


def test_the_report_shows_itself_as_text_table_json_and_page(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    model, small = pair
    report = weft.measure(
        small, against=model, data=held_out(), batches=(1,), thread_counts=(1,), seconds=0.01
    )
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "accuracy",
        "parameters",
        "bytes",
        "bytes, entropy bound",
        "bytes in memory",
        "multiply-adds",
        "peak activations, bytes",
        "latency, batch 1, 1 thread",
    ]
    assert f"{report.dense_cost.parameters:,}" in lines[2]
    assert report.table().row_count == 8
    data = json.loads(json.dumps(report.to_json()))
    assert Report.from_json(data) == report
    page = report.write_html(tmp_path / "report.html", title="A title", command="weft report").read_text()
    assert "A title" in page
    assert f"{report.cost.parameters:,}" in page


def test_the_footprint_counts_what_is_stored_unpacked_and_at_the_entropy() -> None:
    small = weft.compress(nn.Sequential(nn.Linear(64, 50)), {"0": Pruned(0.1)}).model.eval()
    before = footprint(small)
    assert before.stored == network_cost(small).bytes
    unpacked = sum(buffer.nbytes for buffer in small.buffers()) - small[0].matrix.support.nbytes
    assert unpacked > 0
    assert before.memory == before.stored + unpacked + small[0].matrix.derived_bytes()
    assert 0.5 * before.stored < before.entropy_bound < before.stored
    tied = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    tied[1].weight = tied[0].weight
    assert footprint(tied).stored == footprint(tied).memory == 4 * (36 + 12)


def test_a_report_shows_the_bytes_in_memory_and_at_the_entropy(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    dense, small = pair
    report = weft.measure(small, against=dense, data=held_out(), batches=[1], seconds=0.01)
    assert report.footprint == footprint(small)
    named = {row[0]: row for row in report.rows()}
    assert named["bytes in memory"][2] == f"{report.footprint.memory:,}"
    assert named["bytes, entropy bound"][2] == f"{report.footprint.entropy_bound:,}"
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    old = {key: value for key, value in report.to_json().items() if "footprint" not in key}
    assert "bytes in memory" not in {row[0] for row in Report.from_json(old).rows()}
