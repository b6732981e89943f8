"""What a survey finds and measures, against moments formed from explicitly collected inputs and gradients."""

import copy
import gc
import json
import math
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weft
from weft import survey as survey_of
from weft.layers.convolution import geometry_of
from weft.numerics import gram
from weft.numerics.gram import BlockDiagonalGram, DenseGram, DiagonalGram
from weft.structures.base import Cost
from weft.structures.low_rank import LowRank
from weft.survey import Survey, find_layers, patches, patches_in_pieces


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a survey must not touch."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "frozen": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "modules": [id(module) for module in model.modules()],
        "parameters": [id(parameter) for parameter in model.parameters()],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(tensor, after["state"][name]) for name, tensor in before["state"].items())
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


class Mixed(nn.Module):
    """Convolutions, batch norm, an in-place activation, a linear layer; some modes and weights set apart."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, (2, 1), groups=2, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 2 * 3, 5)
        self.norm.eval()
        self.grouped.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.convolution(x)), inplace=True)
        x = F.relu_(self.grouped(x))
        return self.head(self.dropout(x.flatten(1)))


@pytest.fixture
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


def images(count: int = 3, batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 6, 5, generator=generator) for _ in range(count)]


def moment(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.T @ rows / len(rows)


def assert_moment(got: Tensor, rows: Tensor) -> None:
    expected = moment(rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.diagonal().mean()))


# ------------------------------------------------------------------------------------------------------------
# Layers


def test_layers_are_found_by_name_with_shape_and_geometry(mixed: nn.Module) -> None:
    found = survey_of(mixed)
    assert list(found.layers) == ["convolution", "grouped", "head"]
    assert [layer.shape for layer in found.layers.values()] == [(4, 2, 3, 3), (6, 2, 2, 1), (5, 36)]
    geometry = found.layers["convolution"].geometry
    assert geometry is not None
    assert (geometry.stride, geometry.padding, geometry.input_size) == ((2, 2), ((1, 1), (1, 1)), None)
    assert found.layers["head"].geometry is None
    assert found.left_dense == {}
    assert found.samples == 0
    assert all(layer.input_gram is None for layer in found.layers.values())
    counted = sum(parameter.numel() for parameter in mixed.parameters())
    state = sum(tensor.nbytes for tensor in mixed.state_dict().values())
    assert found.total == Cost(counted, state, 0)


def test_a_bare_layer_has_the_empty_name() -> None:
    model = nn.Linear(4, 3)
    found = survey_of(model, [torch.randn(5, 4)])
    assert list(found.layers) == [""]
    assert found.layers[""].applications == 1


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.alone = nn.Linear(4, 4)
        self.kept = self.alone.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.alone(self.tied(torch.tanh(self.again(torch.tanh(self.first(self.embedding(x)))))))
        )


def test_shared_weights_are_one_entry_and_weights_shared_with_others_stay_dense() -> None:
    found = survey_of(Places())
    assert {name: layer.names for name, layer in found.layers.items()} == {
        "embedding": ("embedding", "head"),
        "first": ("first", "again", "tied"),
    }
    assert found.left_dense["alone"].startswith("its weight is shared with")


def test_an_embedding_is_measured_by_how_often_rows_are_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    found = survey_of(model, [torch.tensor([[0, 1], [1, 1]]), torch.tensor([[4, 1]])])
    table = found.layers["0"]
    assert table.lookup
    assert table.input_gram is None
    assert table.applications == 2
    assert table.cost == Cost(20, 80, 0)
    assert isinstance(table.output_gram, DiagonalGram)
    assert torch.equal(table.output_gram.moment, torch.tensor([1, 4, 0, 0, 1], dtype=torch.float64) / 6)
    assert found.total.multiply_adds == 16


def test_squared_output_metrics_are_those_of_the_outputs_distance() -> None:
    """E‖y(W₀ + E) − y(W₀)‖² = tr(H E G Eᵀ): for a linear network exactly, up to the drawn directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    batches = [torch.randn(500, 6) for _ in range(40)]
    found = survey_of(model, batches, loss="squared", shrinkage=0.0, shown=False)
    head = model[1].weight.detach().double()
    moment = found.layers["0"].output_gram
    assert isinstance(moment, DenseGram)
    expected = head.T @ head
    assert float((moment.moment - expected).norm()) < 0.05 * float(expected.norm())
    again = survey_of(model, batches, loss="squared", shrinkage=0.0, shown=False)
    assert again.layers["0"].output_gram.digest() == moment.digest()
    with pytest.raises(ValueError, match="loss"):
        survey_of(model, batches, loss="cubed")  # type: ignore[arg-type]


def test_an_embeddings_gradient_measures_its_columns() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 2))
    batch = torch.tensor([[0], [1], [1]])

    def loss(output: Tensor, _: object) -> Tensor:
        return output[:, 0].mean()  # its gradient at every looked-up row is the head's first row

    found = survey_of(model, [batch], loss=loss, shrinkage=0.0, shown=False)
    row = model[2].weight[0].detach().double()
    table = found.layers["0"]
    assert isinstance(table.input_gram, DenseGram)
    torch.testing.assert_close(table.input_gram.moment, torch.outer(row, row), rtol=1e-5, atol=1e-7)
    assert isinstance(table.output_gram, DiagonalGram)


def test_a_table_shared_with_a_head_is_measured_by_the_heads_input() -> None:
    model = Places()
    found = survey_of(model, [torch.tensor([0, 3, 6])])
    entry = found.layers["embedding"]
    assert not entry.lookup
    assert isinstance(entry.input_gram, DenseGram)
    assert entry.applications == 1
    assert entry.output_gram is None


def test_what_stays_dense_says_why() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).square()

    model = nn.ModuleDict({
        "plain": nn.Linear(4, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
        "lazy": nn.LazyLinear(4),
        "own": Own(4, 4),
        "bounded": nn.Embedding(4, 4, max_norm=1.0),
        "empty": nn.Linear(0, 4),
        "recurrent": nn.GRU(4, 4, bias=False),
        "bag": nn.EmbeddingBag(4, 4),
    })
    layers, left_dense = find_layers(model)
    assert list(layers) == ["plain"]
    reasons = {
        "attention.out_proj": "nn.MultiheadAttention reads its weight",
        "attention.in_proj_weight": "MultiheadAttention uses it",
        "bounded": "its max_norm changes rows",
        "normed": "computed by a parametrisation",
        "lazy": "it is lazy",
        "own": "Own computes in its own way",
        "empty": "its weight is empty",
        "recurrent.weight_ih_l0": "a recurrence written with nn.Linear can be compressed",
        "recurrent.weight_hh_l0": "GRU reads it in one fused call",
        "bag.weight": "EmbeddingBag reads it in one fused call; nn.Embedding and a sum can be compressed",
    }
    assert left_dense.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in left_dense[name]


def test_what_is_no_network_of_layers_says_what_to_pass() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    program = torch.export.export(model, (x,))
    remedy = "pass the Python module that it was made of"
    for made in (torch.jit.trace(model, x), program.module()):
        with pytest.raises(ValueError, match=f"scripted, traced or exported; {remedy}"):
            survey_of(made, [x])
    for nothing in (program, model.state_dict()):
        with pytest.raises(
            TypeError, match=f"model must be an nn.Module, got {type(nothing).__name__}; pass"
        ):
            survey_of(nothing, [x])
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"weight of layer 0 must be loaded, got none \(meta\); load its"):
        survey_of(empty)


def test_a_transformer_layer_offers_its_two_linear_layers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = survey_of(model, [torch.randn(3, 5, 8)])
    assert list(found.layers) == ["linear1", "linear2"]
    assert found.layers["linear1"].applications == 5  # seen although evaluation would take the fused path
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_that_no_data_reach_stay_dense(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_module("unused", nn.Linear(3, 3))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    found = survey_of(model, [torch.randn(2, 4)])
    assert list(found.layers) == ["0"]
    assert found.left_dense == {"unused": "no calibration data reached it"}
    again = Survey.load(found.save(tmp_path / "survey.json"), model)
    assert list(again.layers) == ["0"]
    assert again.left_dense == found.left_dense


# ------------------------------------------------------------------------------------------------------------
# Input moments


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_linear_moments_are_those_of_all_vectors(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [torch.randn(5, *shape), torch.randn(2, *shape)]
    layer = survey_of(model, batches, shrinkage=0.0).layers["0"]
    rows = torch.cat([batch.reshape(-1, 4) for batch in batches])
    assert isinstance(layer.input_gram, DenseGram)
    assert_moment(layer.input_gram.moment, rows)
    torch.testing.assert_close(layer.mean_input, rows.double().mean(0))
    torch.testing.assert_close(layer.mean_output, model(rows).detach().double().mean(0), rtol=1e-5, atol=1e-6)
    assert layer.applications == len(rows) / 7
    assert layer.cost.multiply_adds == round(12 * len(rows) / 7)


@st.composite
def planes(draw: Any) -> tuple[nn.Conv2d, Tensor]:
    groups = draw(st.sampled_from([1, 2]))

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    module = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * 2,
        pair(1, 3),
        stride=pair(1, 3),
        padding=pair(0, 2),
        dilation=pair(1, 2),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    return module, torch.randn(2, module.in_channels, *pair(5, 8), dtype=torch.float64)


@given(planes())
@settings(deadline=None, max_examples=60)
def test_patches_are_those_of_unfold(case: tuple[nn.Conv2d, Tensor]) -> None:
    module, x = case
    geometry = survey_of(module).layers[""].geometry
    assert geometry is not None
    padded, padding = geometry.pad(x)
    unfolded = F.unfold(padded, module.kernel_size, module.dilation, padding, module.stride)
    parts = unfolded.unflatten(1, (module.groups, -1))  # (batch, groups, inputs, positions)
    expected = parts.permute(1, 0, 3, 2).flatten(1, 2)
    assert torch.equal(patches(x, module.kernel_size, geometry), expected)


@given(planes())
@settings(deadline=None, max_examples=30)
def test_a_convolutions_matrix_applied_to_the_patches_is_the_convolution(
    case: tuple[nn.Conv2d, Tensor],
) -> None:
    module, x = case
    layer = survey_of(module, [x], shrinkage=0.0).layers[""]
    assert layer.geometry is not None
    vectors = patches(x, module.kernel_size, layer.geometry)
    weight = module.weight.flatten(1).unflatten(0, (module.groups, -1))
    outputs = (vectors @ weight.mT).permute(1, 0, 2).flatten(1) + module.bias
    expected = module(x)
    torch.testing.assert_close(outputs, expected.movedim(1, -1).flatten(0, 2))
    assert layer.geometry.input_size == tuple(x.shape[2:])
    assert layer.applications == math.prod(expected.shape[2:])
    torch.testing.assert_close(layer.mean_output, outputs.mean(0).detach())
    blocks = [moment(part) for part in vectors]
    got = layer.input_gram
    assert got is not None
    torch.testing.assert_close(got.moment, blocks[0] if module.groups == 1 else torch.stack(blocks))
    mean = vectors.mean(1)
    torch.testing.assert_close(layer.mean_input, mean[0] if module.groups == 1 else mean)


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv3d])
def test_other_spatial_dimensions_have_moments_too(make: type) -> None:
    module = make(2, 3, 2, stride=2, padding=1, dtype=torch.float64)
    space = len(module.kernel_size)
    x = torch.randn(2, 2, *(5,) * space, dtype=torch.float64)
    layer = survey_of(module, [x], shrinkage=0.0).layers[""]
    assert layer.geometry is not None
    vectors = patches(x, module.kernel_size, layer.geometry)[0]
    outputs = vectors @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(outputs, module(x).movedim(1, -1).flatten(0, space))
    assert layer.input_gram is not None
    assert_moment(layer.input_gram.moment, vectors)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolutions_matrix_applied_to_its_patches_is_the_convolution(
    make: type, groups: int
) -> None:
    module = make(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2, dtype=torch.float64
    )
    space = len(module.kernel_size)
    x = torch.randn(2, 4, *range(3, 3 + space), dtype=torch.float64)
    found = survey_of(module, [x], shrinkage=0.0)
    layer = found.layers[""]
    assert layer.geometry is not None
    vectors = patches(x, module.kernel_size, layer.geometry)
    outputs = (vectors @ layer.weight.flatten(1).unflatten(0, (groups, -1)).mT).permute(1, 0, 2).flatten(1)
    expected = module(x).movedim(1, -1).flatten(0, space)
    torch.testing.assert_close(outputs + module.bias, expected)
    blocks = [moment(part) for part in vectors]
    got = layer.input_gram
    assert got is not None
    torch.testing.assert_close(got.moment, blocks[0] if groups == 1 else torch.stack(blocks))
    # The kernel is applied once per input position, as torch's counter has it too.
    assert layer.applications == math.prod(x.shape[2:])
    assert layer.cost.multiply_adds == found.total.multiply_adds


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
@pytest.mark.parametrize("numbers", [1, 300, 10**6])
def test_patches_in_pieces_are_the_patches_and_small(make: type, numbers: int) -> None:
    module = make(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
    space = len(module.kernel_size)
    x = torch.randn(3, 4, *(7,) * space)
    geometry = geometry_of(module)
    pieces = list(patches_in_pieces(x, module.kernel_size, geometry, numbers))
    assert torch.equal(torch.cat(pieces, 1), patches(x, module.kernel_size, geometry))
    row = 4 * 3**space * math.prod(geometry.output_size(module.kernel_size, x.shape[2:])[1:])
    assert all(piece.numel() <= max(row, numbers) for piece in pieces)


def test_wide_inputs_get_a_diagonal_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(survey_of.__globals__, "WIDEST_DENSE_GRAM", 8)
    model = nn.Sequential(nn.Conv2d(2, 9, 3, groups=1), nn.Flatten(), nn.Linear(9 * 9, 9), nn.Linear(9, 2))
    x = torch.randn(6, 2, 5, 5)
    found = survey_of(model, [x], teacher=model, shrinkage=0.0)
    for name, rows in (
        ("0", patches(x, (3, 3), found.layers["0"].geometry)[0]),
        ("2", model[0](x).flatten(1)),
    ):
        gram = found.layers[name].input_gram
        assert isinstance(gram, DiagonalGram)
        torch.testing.assert_close(gram.moment, rows.detach().double().square().mean(0), rtol=1e-5, atol=1e-7)
    assert isinstance(found.layers["2"].output_gram, DiagonalGram)
    assert isinstance(found.layers["3"].output_gram, DenseGram)


def test_a_weight_used_twice_has_the_moments_of_both_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    twice = nn.Sequential(model[0], nn.Tanh(), model[0])
    x = torch.randn(6, 4)
    for network, layer in ((model, survey_of(model, [x])), (twice, survey_of(twice, [x]))):
        entry = layer.layers["0"]
        rows = torch.cat([x, torch.tanh(network[0](x))]).detach()
        assert entry.input_gram is not None
        assert_moment(entry.input_gram.moment, rows)
        assert entry.applications == 2
        assert layer.total.multiply_adds == 32


class TwoScales(nn.Module):
    """One kernel at two dilations and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(2, 3, 3, padding=1)
        self.far = nn.Conv2d(2, 3, 3, padding=2, dilation=2, stride=2)
        self.far.weight = self.near.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.near(x).flatten(1).sum(1) + self.far(x).flatten(1).sum(1)


def test_a_kernel_with_two_geometries_has_the_patches_of_both() -> None:
    model, x = TwoScales().double(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    found = survey_of(model, [x], shrinkage=0.0)
    unfolded = [
        F.unfold(x, 3, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)
        for layer in (model.near, model.far)
    ]
    entry = found.layers["near"]
    assert entry.input_gram is not None
    assert_moment(entry.input_gram.moment, torch.cat(unfolded))
    assert entry.applications == 36 + 9
    assert found.total.multiply_adds == 54 * 45


def test_moments_beyond_the_memory_limit_spill_and_agree(
    mixed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_memory = survey_of(mixed, images(), teacher=mixed)
    spilled = survey_of(mixed, images(), teacher=mixed, gram_memory=1000)
    assert not list(tmp_path.iterdir())  # the names are gone at once, whatever happens to the process
    for name, layer in in_memory.layers.items():
        other = spilled.layers[name]
        for role in ("input_gram", "output_gram"):
            assert torch.equal(getattr(layer, role).moment, getattr(other, role).moment)
            assert getattr(layer, role).ridge == getattr(other, role).ridge
    plan = {"convolution": LowRank(2), "grouped": LowRank(1)}
    one, two = (weft.compress(mixed, plan, found).model for found in (in_memory, spilled))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_large_inputs_are_taken_in_pieces_with_the_same_result(
    mixed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = survey_of(mixed, images())
    monkeypatch.setitem(survey_of.__globals__, "PIECE", 50)
    pieces = survey_of(mixed, images())
    for name, layer in whole.layers.items():
        torch.testing.assert_close(
            pieces.layers[name].input_gram.moment, layer.input_gram.moment, rtol=1e-5, atol=1e-6
        )
        assert pieces.layers[name].applications == layer.applications


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moments_of_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    x = (100 * torch.randn(64, 4)).to(dtype)  # squares would overflow float16's sums
    layer = survey_of(model, [x], shrinkage=0.0).layers["0"]
    assert layer.input_gram is not None
    assert_moment(layer.input_gram.moment, x)


# ------------------------------------------------------------------------------------------------------------
# Output moments


def per_sample_gradients(model: Mixed, x: Tensor, losses: Any) -> dict[str, Tensor]:
    """Every sample's own gradients by each layer's output, a backward pass each: (vectors, outputs)."""
    rows: dict[str, list[Tensor]] = {}
    for index in range(len(x)):
        outputs: dict[str, Tensor] = {}
        h = model.convolution(x[index : index + 1])
        outputs["convolution"] = h
        h = model.grouped(F.relu(model.norm(h)))
        outputs["grouped"] = h
        h = model.head(F.relu(h).flatten(1))
        outputs["head"] = h
        gradients = torch.autograd.grad(losses(h, index), list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            rows.setdefault(name, []).append(gradient.movedim(1, -1).reshape(-1, gradient.shape[1]))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_output_moments_from_a_loss_are_those_of_per_sample_gradients(mixed: nn.Module) -> None:
    x, labels = images(1, 8)[0], torch.arange(8) % 5
    found = survey_of(mixed, [x], loss=lambda output, batch: F.cross_entropy(output, labels), shrinkage=0.0)
    expected = per_sample_gradients(
        mixed.eval(), x, lambda h, index: F.cross_entropy(h, labels[index : index + 1])
    )
    for name, layer in found.layers.items():
        assert isinstance(layer.output_gram, DenseGram)
        assert_moment(layer.output_gram.moment, expected[name])


def test_output_moments_from_a_teacher_are_the_fisher_information_of_drawn_labels(mixed: nn.Module) -> None:
    mixed.eval()
    x = images(1, 8)[0]
    generator = torch.Generator().manual_seed(5)
    found = survey_of(mixed, [x], teacher=mixed, generator=torch.Generator().manual_seed(5), shrinkage=0.0)
    drawn = torch.multinomial(mixed(x).softmax(-1), 1, generator=generator).squeeze(1)
    expected = per_sample_gradients(mixed, x, lambda h, index: F.cross_entropy(h, drawn[index : index + 1]))
    for name, layer in found.layers.items():
        assert layer.output_gram is not None
        assert_moment(layer.output_gram.moment, expected[name])


def test_many_drawn_labels_give_the_fisher_matrix_of_the_softmax() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    x = torch.randn(1, 3).expand(4000, 3)
    found = survey_of(model, [x], teacher=model, shrinkage=0.0)
    chance = model(x[:1]).softmax(-1)[0].detach().double()
    expected = torch.diag(chance) - torch.outer(chance, chance)
    assert found.layers["0"].output_gram is not None
    torch.testing.assert_close(found.layers["0"].output_gram.moment, expected, rtol=0.2, atol=0.02)


def test_a_teacher_of_one_output_counts_by_its_square() -> None:
    """Softmax over one number knows nothing: its Fisher information would be zero everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(40, 6)
    by_teacher = survey_of(model, [x], teacher=model, generator=torch.Generator().manual_seed(3))
    squared = survey_of(model, [x], loss="squared", generator=torch.Generator().manual_seed(3))
    for name, layer in by_teacher.layers.items():
        assert torch.equal(layer.output_gram.moment, squared.layers[name].output_gram.moment)
        assert layer.output_gram.moment.abs().sum() > 0


def test_labels_of_images_are_drawn_from_the_classes_on_axis_1() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 1, bias=False), torch.randn(4, 2, 5, 6)
    found = survey_of(model, [x], teacher=model, generator=torch.Generator().manual_seed(5), shrinkage=0.0)
    flat = model(x).detach().movedim(1, -1).reshape(-1, 3).softmax(-1)
    labels = torch.multinomial(flat, 1, generator=torch.Generator().manual_seed(5)).squeeze(1)
    gradients = (flat - F.one_hot(labels, 3)).double()
    expected = gradients.T @ gradients / len(gradients)
    torch.testing.assert_close(found.layers[""].output_gram.moment, expected, rtol=1e-4, atol=1e-6)


def test_another_teacher_may_stand_beside_the_model(mixed: nn.Module) -> None:
    teacher = copy.deepcopy(mixed).train()
    before = snapshot(teacher)
    found = survey_of(mixed, images(1), teacher=teacher)
    assert_untouched(teacher, before)
    assert all(layer.output_gram is not None for layer in found.layers.values())


def test_an_in_place_activation_right_behind_a_layer_does_not_disturb() -> None:
    x = torch.randn(8, 4)
    layers = [nn.Linear(4, 4), nn.Linear(4, 3)]
    found = [
        survey_of(
            nn.Sequential(layers[0], nn.ReLU(inplace=inplace), layers[1]), [x], teacher=None, loss=loss_of_sum
        )
        for inplace in (False, True)
    ]
    for name in ("0", "2"):
        plain, in_place = (survey.layers[name] for survey in found)
        assert torch.equal(plain.output_gram.moment, in_place.output_gram.moment)
        assert torch.equal(plain.mean_output, in_place.mean_output)


def loss_of_sum(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().sum(-1).mean()


def test_a_wholly_frozen_model_has_output_moments() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).requires_grad_(False)
    found = survey_of(model, [torch.randn(8, 4)], loss=loss_of_sum)
    assert all(float(layer.output_gram.moment.norm()) > 0 for layer in found.layers.values())


# ------------------------------------------------------------------------------------------------------------
# Batches


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left + right)


def test_batches_are_tensors_tuples_lists_or_dictionaries() -> None:
    model, left, right = TwoInputs(), torch.randn(5, 4), torch.randn(5, 4)
    moments = [
        survey_of(model, [batch]).layers["layer"].input_gram.moment
        for batch in ((left, right), [left, right], {"left": left, "right": right})
    ]
    assert_moment(
        survey_of(nn.Linear(4, 3), [left + right], shrinkage=0.0).layers[""].input_gram.moment, left + right
    )
    assert all(torch.equal(moment, moments[0]) for moment in moments)


def test_labels_by_mistake_name_the_remedy(mixed: nn.Module) -> None:
    pairs = [(batch, torch.zeros(4, dtype=torch.long)) for batch in images()]
    with pytest.raises(TypeError, match=r"pass weft\.inputs\(batches\)"):
        survey_of(mixed, pairs)
    found = survey_of(mixed, weft.inputs(pairs))
    assert found.samples == 12
    assert torch.equal(
        found.layers["head"].input_gram.moment, survey_of(mixed, images()).layers["head"].input_gram.moment
    )


def test_generators_and_data_without_a_length_serve(mixed: nn.Module) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            return iter([(image, 0) for image in images(1, 6)[0]])

    loader = torch.utils.data.DataLoader(Endless(), batch_size=3)
    assert survey_of(mixed, (batch for batch in images())).samples == 12
    assert survey_of(mixed, weft.inputs((batch, 0) for batch in images())).samples == 12
    assert survey_of(mixed, weft.inputs(loader)).samples == 6


@pytest.mark.parametrize(
    "batches", [[], [torch.zeros(0, 2, 6, 5)], iter([])], ids=["none", "no samples", "used up"]
)
@pytest.mark.parametrize("with_teacher", [False, True])
def test_empty_data_are_refused(mixed: nn.Module, batches: Any, with_teacher: bool) -> None:
    with pytest.raises(ValueError, match="batches must be not empty, got no samples"):
        survey_of(mixed, batches, teacher=mixed if with_teacher else None)


def test_an_empty_batch_among_others_is_passed_over(mixed: nn.Module) -> None:
    empty = torch.zeros(0, 2, 6, 5)
    for options in ({}, {"teacher": mixed}):
        plain = survey_of(mixed, images(), **options)
        found = survey_of(mixed, [empty, *images(), empty], **options)
        assert found.samples == plain.samples
        assert found.total == plain.total
        assert torch.equal(found.layers["head"].input_gram.moment, plain.layers["head"].input_gram.moment)


def test_batches_of_the_wrong_shape_are_refused_with_their_shape(mixed: nn.Module) -> None:
    before = snapshot(mixed)
    with pytest.raises(ValueError, match=r"batches must be what the model takes, got \(4, 3, 6, 5\)"):
        survey_of(mixed, [torch.zeros(4, 3, 6, 5)])
    assert_untouched(mixed, before)
    with pytest.raises(TypeError, match="batch must be what Mixed.forward takes, got 2 inputs"):
        survey_of(mixed, [(torch.zeros(4, 2, 6, 5), torch.zeros(4))])


def test_nan_data_are_refused_naming_the_layer(mixed: nn.Module) -> None:
    bad = images(1)[0]
    bad[0, 0, 0, 0] = math.nan
    before = snapshot(mixed)
    with pytest.raises(ValueError, match="inputs of layer convolution must be finite, got NaN or infinite"):
        survey_of(mixed, [bad])
    assert_untouched(mixed, before)


def test_nan_weights_are_refused_naming_the_layer(mixed: nn.Module) -> None:
    with torch.no_grad():
        mixed.grouped.weight[0] = math.nan
    with pytest.raises(ValueError, match="weight of layer grouped must be finite everywhere, got 4 NaN"):
        survey_of(mixed, images())


def test_matrices_that_belong_to_no_layer_are_named() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(10, 8))
            self.scale = nn.Parameter(torch.ones(1, 1))
            self.attention = nn.MultiheadAttention(8, 2)
            self.rest = nn.Linear(8, 8)

    found = weft.survey(Tokens())
    assert list(found.layers) == ["rest"]
    assert found.left_dense == {
        "attention.out_proj": "nn.MultiheadAttention reads its weight instead of calling it; "
        "weft.split_attention(model) makes linear layers of it",
        "attention.in_proj_weight": "MultiheadAttention uses it in a way of its own",
        "places": "Tokens uses it in a way of its own",
    }
    assert "attention.in_proj_weight left dense, because" in str(found)
    assert str(found).startswith(f"a network with {found.total.parameters:,} parameters")
    with pytest.raises(ValueError, match=r"at least \d+, the smallest .* \((\d+) of it in what stays dense"):
        weft.allocate(found, "LowRank", weft.Budget(parameters=0.5))


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str; pass the network"):
        weft.survey("resnet18")


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(
        ValueError, match="model must be one with a layer that can be replaced, got none in ReLU"
    ):
        survey_of(nn.ReLU())
    with pytest.raises(ValueError, match="it is lazy"):
        survey_of(nn.Sequential(nn.LazyConvTranspose1d(3, 1)))


def test_arguments_that_do_not_go_together_are_refused(mixed: nn.Module) -> None:
    with pytest.raises(ValueError, match="loss and teacher must be one of the two"):
        survey_of(mixed, images(), loss=loss_of_sum, teacher=mixed)
    with pytest.raises(ValueError, match="batches must be given with loss or teacher"):
        survey_of(mixed, teacher=mixed)
    with pytest.raises(ValueError, match="shrinkage must be at least 0"):
        survey_of(mixed, images(), shrinkage=-1.0)


# ------------------------------------------------------------------------------------------------------------
# What a survey leaves behind


@pytest.mark.parametrize("options", [{}, {"loss": loss_of_sum}], ids=["inputs", "outputs"])
def test_the_model_is_not_touched(mixed: nn.Module, options: dict[str, Any]) -> None:
    mixed.head.weight.grad = torch.ones(5, 36)
    before = snapshot(mixed)
    survey_of(mixed, images(), **options)
    assert_untouched(mixed, before)
    assert torch.is_grad_enabled()


def test_the_model_is_not_touched_when_the_data_break_off(mixed: nn.Module) -> None:
    def breaking() -> Iterator[Tensor]:
        yield images(1)[0]
        raise OSError("the disk went away")

    before = snapshot(mixed)
    with pytest.raises(OSError, match="the disk went away"):
        survey_of(mixed, breaking(), loss=loss_of_sum)
    assert_untouched(mixed, before)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_global_random_state_is_not_touched(mixed: nn.Module) -> None:
    before = torch.get_rng_state()
    survey_of(mixed, images(), teacher=mixed)
    assert torch.equal(torch.get_rng_state(), before)


def test_activations_are_not_kept_alive(mixed: nn.Module) -> None:
    found = survey_of(mixed, images(), loss=loss_of_sum)
    gc.collect()
    for layer in found.layers.values():
        for tensor in (
            layer.input_gram.moment,
            layer.output_gram.moment,
            layer.mean_input,
            layer.mean_output,
        ):
            assert tensor.grad_fn is None


def test_totals_hold_for_batches_of_several_lengths() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [torch.randn(2, 3, 4), torch.randn(2, 9, 4)]  # sequences of 3 and of 9 vectors
    found = survey_of(model, batches)
    assert (
        found.total.multiply_adds
        == sum(layer.cost.multiply_adds for layer in found.layers.values())
        == 6 * 36
    )


# ------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load_give_the_same_survey(mixed: nn.Module, tmp_path: Path) -> None:
    found = survey_of(mixed, images(), teacher=mixed)
    path = found.save(tmp_path / "survey.json", source="file.py:make")
    again = Survey.load(path, mixed)
    assert again == found
    for name, layer in found.layers.items():
        other = again.layers[name]
        assert other.weight.data_ptr() == layer.weight.data_ptr()
        assert torch.equal(other.mean_input, layer.mean_input)
        assert torch.equal(other.mean_output, layer.mean_output)
        for role in ("input_gram", "output_gram"):
            assert type(getattr(other, role)) is type(getattr(layer, role))
            assert getattr(other, role).digest() == getattr(layer, role).digest()
    assert isinstance(again.layers["grouped"].input_gram, BlockDiagonalGram)
    assert json.loads(path.read_text())["source"] == "file.py:make"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["survey.json", "survey.safetensors"]


def test_a_survey_without_data_needs_no_second_file(mixed: nn.Module, tmp_path: Path) -> None:
    path = survey_of(mixed).save(tmp_path / "survey.json")
    assert [file.name for file in tmp_path.iterdir()] == ["survey.json"]
    assert Survey.load(path, mixed) == survey_of(mixed)


def test_files_that_do_not_fit_are_refused_by_name(mixed: nn.Module, tmp_path: Path) -> None:
    path = survey_of(mixed, images()).save(tmp_path / "survey.json")
    other = copy.deepcopy(mixed)
    other.head = nn.Linear(36, 7)
    with pytest.raises(ValueError, match=r"layer head must be a layer of shape \(5, 36\), got \(7, 36\)"):
        Survey.load(path, other)
    with pytest.raises(
        ValueError, match="layer convolution must be a layer of shape .* got none in the model"
    ):
        Survey.load(path, nn.Linear(3, 3))
    other = copy.deepcopy(mixed)
    other.more = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="layer more must be in the survey, got missing"):
        Survey.load(path, other)
    moments = path.with_suffix(".safetensors")
    moments.write_bytes(moments.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"survey\.safetensors must be a whole safetensors file"):
        Survey.load(path, mixed)
    moments.unlink()
    with pytest.raises(FileNotFoundError, match="moments must be in .*survey.safetensors"):
        Survey.load(path, mixed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", 'must be JSON with "weft_survey": 1'),
        ('{"weft_survey": 2}', '"weft_survey": 1'),
        ('{"weft_plan": 1}', '"weft_survey": 1'),
        ('{"weft_survey": 1}', "must be complete, got none for"),
    ],
)
def test_other_json_is_refused(mixed: nn.Module, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "survey.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Survey.load(path, mixed)
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        Survey.load(tmp_path / "none.json", mixed)


def test_the_moments_do_not_overwrite_the_summary(mixed: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be a JSON file's name"):
        survey_of(mixed, images()).save(tmp_path / "survey.safetensors")


def test_spilled_moments_are_mapped_by_workers_and_removed_with_their_grams(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 40), nn.ReLU(), nn.Linear(40, 30))
    batches = [torch.randn(50, 90) for _ in range(3)]
    in_memory = weft.survey(model, batches, teacher=model)
    spilled = weft.survey(model, batches, teacher=model, gram_memory=0, spill=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # one for every Gram
    layer = spilled.layers["0"]
    assert len(pickle.dumps(layer)) < 10_000 + layer.weight.nbytes < len(pickle.dumps(in_memory.layers["0"]))
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied.input_gram.moment, layer.input_gram.moment)
    assert copied.input_gram.ridge == layer.input_gram.ridge
    curves = [
        weft.error_curves(found, weft.structures.select("LowRank"), workers=count)
        for found, count in ((in_memory, 1), (spilled, 1), (spilled, 2))
    ]
    for name in curves[0]:
        points = [
            torch.tensor([point.error for point in curve[name]], dtype=torch.float64) for curve in curves
        ]
        for other in points[1:]:
            torch.testing.assert_close(points[0], other, rtol=1e-4, atol=1e-6)
    del spilled, layer, curves, copied
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", [1, 90, 400])
def test_a_moment_grows_by_pieces_and_is_applied_by_pieces(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = torch.randn(2, 17, 30, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gram, "_NUMBERS_AT_A_TIME", numbers)
    total = torch.ones(2, 30, 30, dtype=torch.float64)
    gram.add_products(total, vectors)
    expected = 1 + vectors.double().mT @ vectors.double()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    metric = DenseGram(total[0])
    torch.testing.assert_close(
        metric.matmul(vectors[0].double()),
        vectors[0].double() @ (expected[0] + metric.ridge * torch.eye(30, dtype=torch.float64)),
        rtol=1e-5,
        atol=1e-4,
    )
