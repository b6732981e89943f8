"""Layers that hold structured matrices, against torch's own dense layers."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import weft
from tests.examples import Example, each_example
from weft.kernels import dispatch
from weft.layers.base import StructuredLayer, harden, relax
from weft.layers.convolution import StructuredConvolution, geometry_of
from weft.layers.embedding import StructuredEmbedding
from weft.layers.linear import StructuredLinear
from weft.layers.replace import dense_weight, refusal, replace_layer, structured_layer
from weft.measure import network_cost
from weft.structures.base import Shape, Structure, StructuredMatrix, matrix_shape
from weft.structures.dense import Dense, DenseMatrix
from weft.structures.hierarchical import Hierarchical
from weft.structures.interpolative import Interpolative
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def full_rank(shape: Shape) -> LowRank:
    return LowRank(min(matrix_shape(shape)))


def full_rank_layer(module: nn.Module) -> StructuredLayer:
    """A structured layer that stores the dense layer's own weight, as two factors."""
    return structured_layer(module, full_rank(module.weight.shape).fit(module.weight))


# ------------------------------------------------------------------------------------------------------------
# The same function


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.lists(st.integers(0, 3), max_size=3))
@settings(deadline=None, max_examples=30)
def test_a_linear_layer_computes_what_the_dense_one_did(
    inputs: int, outputs: int, bias: bool, batch: list[int]
) -> None:
    module = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    torch.testing.assert_close(full_rank_layer(module)(x), module(x))


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    """A dense convolution of any geometry and an input that it takes."""
    space = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(space))

    kernel, dilation = per_axis(1, 4 if space < 3 else 2), per_axis(1, 2)
    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    stride = (1,) * space if padding == "same" else per_axis(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    module = CONVOLUTIONS[space](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=per_axis(0, 3) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    size = [
        draw(st.integers(spacing * (width - 1) + 4, spacing * (width - 1) + 6))
        for spacing, width in zip(dilation, kernel, strict=True)
    ]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return module, torch.randn(*batch, module.in_channels, *size, dtype=torch.float64)


@given(convolutions(), st.booleans())
@settings(deadline=None, max_examples=120)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_convolution_computes_what_the_dense_one_did(
    case: tuple[nn.Module, Tensor], factored: bool
) -> None:
    module, x = case
    structure = full_rank(module.weight.shape) if factored else Dense()
    layer = structured_layer(module, structure.fit(module.weight))
    torch.testing.assert_close(layer(x), module(x))
    assert layer.geometry.output_size(layer.kernel_size, x.shape[-len(layer.kernel_size) :]) == tuple(
        module(x).shape[-len(layer.kernel_size) :]
    )


@st.composite
def transposed_convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    """A dense transposed convolution of any geometry and an input that it takes."""
    space = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(space))

    kernel, dilation, stride = per_axis(1, 3), per_axis(1, 2), per_axis(1, 3)
    module = TRANSPOSED[space](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=per_axis(0, 2),
        output_padding=tuple(
            draw(st.integers(0, max(step, spacing) - 1))
            for step, spacing in zip(stride, dilation, strict=True)
        ),
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
        dtype=torch.float64,
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return module, torch.randn(*batch, module.in_channels, *per_axis(5, 6), dtype=torch.float64)


@given(transposed_convolutions(), st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_transposed_convolution_computes_what_the_dense_one_did(
    case: tuple[nn.Module, Tensor], factored: bool
) -> None:
    module, x = case
    kernel = dense_weight(module)
    layer = structured_layer(module, (full_rank(kernel.shape) if factored else Dense()).fit(kernel))
    expected = module(x)
    torch.testing.assert_close(layer(x), expected)
    space = tuple(x.shape[-len(layer.kernel_size) :])
    assert layer.geometry.output_size(layer.kernel_size, space) == tuple(expected.shape[-len(space) :])
    assert layer.weight.shape == module.weight.shape
    torch.testing.assert_close(layer.weight.clone(), module.weight.detach())


def test_a_transposed_convolution_takes_an_output_size() -> None:
    module = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, dtype=torch.float64)
    kernel = dense_weight(module)
    layer = structured_layer(module, full_rank(kernel.shape).fit(kernel))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for size in ((9, 11), (10, 11), (9, 12)):
        torch.testing.assert_close(layer(x, output_size=size), module(x, output_size=size))
    expected = r"output_size must be between \(9, 11\) and \(10, 12\), got \(11, 11\)"
    with pytest.raises(ValueError, match=expected):
        layer(x, output_size=(11, 11))


def test_a_transposed_convolution_goes_through_survey_compression_and_storage(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2))
    batches = [torch.randn(4, 2, 9, 9)]
    survey = weft.survey(model, batches)
    small, log = weft.compress(model, {"2": LowRank(3)}, survey, batches=batches)
    layer = survey.layers["2"]
    assert layer.shape == (4, 6, 3, 3)
    assert layer.cost.multiply_adds == 6 * 4 * 9 * 16  # once per input position
    # The first factor meets every input position, the second every output position.
    assert log[0]["multiply_adds"] == 3 * 6 * 9 * 16 + 4 * 3 * 81
    assert network_cost(small[2], torch.randn(1, 6, 4, 4)).multiply_adds == log[0]["multiply_adds"]
    again = weft.load(weft.save(small, tmp_path / "small.safetensors"), model=model)
    assert torch.equal(again(batches[0]), small(batches[0]))


@each_example
@pytest.mark.parametrize("groups", [1, 2])
def test_every_family_computes_as_a_layer_what_its_dense_weight_computes(
    example: Example, groups: int
) -> None:
    module = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=groups, dtype=torch.float64)
    structure = example.structure(tuple(module.weight.shape))
    matrix = structure.fit(module.weight)
    if structure.refusal(matrix.shape, geometry_of(module)) is not None:
        with pytest.raises(ValueError, match="matrix must be a family that takes this convolution"):
            structured_layer(module, matrix)
        return
    layer = structured_layer(module, matrix)
    with torch.no_grad():
        module.weight.copy_(layer.weight)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_stay_what_they_are(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 12)).to(dtype)
    small, _ = weft.compress(model, {"0": LowRank(8), "2": LowRank(12)})
    assert {tensor.dtype for tensor in small.state_dict().values()} == {dtype}
    x = torch.randn(5, 3, 6, 6).to(dtype)
    assert small(x).dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(small(x), model(x), rtol=tolerance, atol=tolerance)


def test_a_non_contiguous_weight_is_taken_by_value() -> None:
    module = nn.Linear(6, 8)
    module.weight = nn.Parameter(torch.randn(6, 8).T)
    images = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    assert not module.weight.is_contiguous()
    assert not images.weight.is_contiguous()
    for layer, x in ((module, torch.randn(3, 6)), (images, torch.randn(2, 4, 5, 5))):
        torch.testing.assert_close(full_rank_layer(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_bare_layer_is_a_model() -> None:
    for model, x in ((nn.Linear(6, 8), torch.randn(3, 6)), (nn.Conv1d(3, 5, 2), torch.randn(2, 3, 6))):
        small, log = weft.compress(model, {"": full_rank(model.weight.shape)})
        assert isinstance(small, StructuredLayer)
        assert [entry["layer"] for entry in log] == [""]
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What code that looks at layers sees


def test_attributes_are_those_of_the_dense_layer() -> None:
    linear = nn.Linear(6, 8)
    layer: Any = full_rank_layer(linear)
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.bias is linear.bias
    torch.testing.assert_close(layer.weight, linear.weight.detach(), rtol=1e-4, atol=1e-5, check_dtype=True)
    dense = nn.Conv2d(
        4, 6, (3, 1), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2, padding_mode="reflect"
    )
    layer = full_rank_layer(dense)
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    for name in names:
        assert getattr(layer, name) == getattr(dense, name), name
    assert layer.weight.shape == dense.weight.shape


@pytest.fixture
def weight_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type]]:
    """Counts every access to a structured layer's dense weight."""
    reads: list[type] = []
    own = StructuredLayer.weight.fget

    def count(layer: StructuredLayer) -> Tensor:
        reads.append(type(layer))
        return own(layer)

    monkeypatch.setattr(StructuredLayer, "weight", property(count))
    return reads


@each_example
def test_the_forward_pass_never_reads_the_dense_weight(example: Example, weight_reads: list[type]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 12))
    plan = {name: example.structure(tuple(model.get_submodule(name).weight.shape)) for name in ("0", "3")}
    matrices = {name: structure.fit(model.get_submodule(name).weight) for name, structure in plan.items()}
    small = copy.deepcopy(model)
    for name, matrix in matrices.items():
        small = replace_layer(small, [name], matrix)
    small.train()
    small(torch.randn(2, 3, 5, 5)).sum().backward()
    with torch.no_grad():
        small.eval()(torch.randn(2, 3, 5, 5))
    assert not weight_reads
    assert small[0].weight.shape == (8, 3, 3, 3)  # the counter counts
    assert len(weight_reads) == 1


@pytest.mark.parametrize("grad", [False, True])
def test_a_transformer_never_computes_with_the_rebuilt_dense_weight(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    small, _ = weft.compress(model, {"linear1": LowRank(2), "linear2": LowRank(2)})
    fused = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fused.append(args))
    called = []  # no hook counts the calls: a hooked layer never takes the fused path
    own = StructuredLinear.forward

    def forward(layer: StructuredLinear, input: Tensor) -> Tensor:  # noqa: A002
        called.append(layer)
        return own(layer, input)

    monkeypatch.setattr(StructuredLinear, "forward", forward)
    with torch.set_grad_enabled(grad):
        output = small(torch.randn(3, 5, 16))
    assert not fused
    assert called == [small.linear1, small.linear2]
    assert output.shape == (3, 5, 16)


def test_a_transformer_layer_that_looks_at_the_weight_does_not_form_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    small, _ = weft.compress(model, {"linear1": LowRank(2), "linear2": LowRank(2)})
    formed = []
    for layer in (small.linear1, small.linear2):
        own = layer.matrix.to_dense
        monkeypatch.setattr(layer.matrix, "to_dense", lambda own=own: (formed.append(1), own())[1])
    with torch.no_grad():
        small(torch.randn(3, 5, 16))
        assert small.linear1.weight.shape == (32, 16)
        assert small.linear1.weight.dtype == torch.float32
    assert not formed
    assert float(small.linear1.weight.norm()) > 0  # and here it is formed
    assert len(formed) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_transformer_layer_exports_and_compiles(strict: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    small, _ = weft.compress(model, {"linear1": LowRank(2), "linear2": LowRank(2)})
    x = torch.randn(3, 5, 16)
    program = torch.export.export(small, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), small(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-5)


def test_the_dense_weight_behaves_as_a_tensor_of_values() -> None:
    layer = full_rank_layer(nn.Conv2d(4, 6, 3))
    weight, dense = layer.weight, layer.matrix.to_dense().detach()
    for got, expected in (
        (weight + 1, dense + 1),
        (weight.flatten(1) @ torch.ones(36, 2), dense.flatten(1) @ torch.ones(36, 2)),
        (weight[2, 1], dense[2, 1]),
        (weight.detach().clone(), dense),
        (F.conv2d(torch.ones(1, 4, 5, 5), weight), F.conv2d(torch.ones(1, 4, 5, 5), dense)),
    ):
        assert type(got) is Tensor
        assert torch.equal(got, expected)
    assert not weight.requires_grad
    assert (weight.ndim, weight.numel(), weight.device) == (4, 216, dense.device)
    assert "DenseView" in repr(weight)


def test_a_whole_transformer_encoder_runs_in_evaluation_mode() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    plan = {
        f"layers.{index}.{name}": full_rank((32, 16)) for index in range(2) for name in ("linear1", "linear2")
    }
    small, _ = weft.compress(model, plan)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
        kept = ~mask
        got, expected = small(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got[kept], expected[kept])


# ------------------------------------------------------------------------------------------------------------
# What is kept


@each_example
def test_copies_and_pickles_of_a_compressed_model_agree(example: Example) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 12)).eval()
    small, _ = weft.compress(model, {"0": example.structure((8, 3, 3, 3)), "3": example.structure((12, 72))})
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = small(x)
        for again in (copy.deepcopy(small), pickle.load(io.BytesIO(pickle.dumps(small)))):
            assert torch.equal(again(x), expected)
            assert not {id(tensor) for tensor in again.parameters()} & {
                id(tensor) for tensor in small.parameters()
            }


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_frozen_weights_are_kept(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[2].train(training)
    model[3].train(not training)
    small, _ = weft.compress(model, {name: LowRank(2) for name in ("0", "2", "3")})
    for name, module in model.named_modules():
        assert small.get_submodule(name).training == module.training
    assert [parameter.requires_grad for parameter in small[0].matrix.parameters()] == [False, False]
    assert small[0].bias.requires_grad
    assert all(parameter.requires_grad for parameter in small[2].matrix.parameters())
    assert not small[2].bias.requires_grad
    assert small[2].matrix.training == training


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


DIRECT = [LowRank(2), Hierarchical(rank=1, leaf_size=4), Quantized(4), Interpolative(3)]


@pytest.mark.parametrize("structure", DIRECT, ids=str)
def test_a_linear_layer_sees_what_parametrisations_and_pruning_make_of_its_tensors(
    structure: Structure,
) -> None:
    x, weight, bias = torch.randn(3, 12), torch.randn(10, 12), torch.randn(10)
    for name, _ in structure.fit(weight).named_parameters():
        layer = StructuredLinear(structure.fit(weight), bias.clone())
        register_parametrization(layer.matrix, name, Doubled())
        register_parametrization(layer, "bias", Doubled())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.matrix.to_dense(), 2 * bias))
        layer = StructuredLinear(structure.fit(weight), bias.clone())
        prune.l1_unstructured(layer.matrix, name, 0.5)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.matrix.to_dense(), bias))


@pytest.mark.parametrize("structure", DIRECT, ids=str)
def test_a_linear_layer_follows_gradients_modes_compilers_and_new_tensors(structure: Structure) -> None:
    x = torch.randn(3, 12)
    layer = StructuredLinear(structure.fit(torch.randn(10, 12)), torch.randn(10))
    assert layer(x).requires_grad
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu"):
            layer(x)
        torch.testing.assert_close(torch.vmap(layer)(x), expected)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        swapped = torch.func.functional_call(layer, {"bias": torch.zeros(10)}, (x,))
        torch.testing.assert_close(swapped, expected - layer.bias)
        layer.bias = None
        torch.testing.assert_close(layer(x), swapped)
        with pytest.raises(ValueError, match="12"):
            layer(torch.randn(3, 11))


@pytest.mark.skipif(dispatch.native is None, reason="this process runs the reference")
def test_a_native_call_that_cannot_be_made_says_so() -> None:
    layer, x = StructuredLinear(LowRank(2).fit(torch.randn(5, 4))), torch.randn(4)
    for call, error in {("no_function",): KeyError, ("low_rank_apply",): TypeError, (): TypeError}.items():
        layer.matrix.native_call = call
        with torch.no_grad(), pytest.raises(error):
            layer(x)
    layer.requires_grad_(requires_grad=False)
    layer.matrix.native_call = ("low_rank_apply", "left", "missing", "bias", "threads")
    assert dispatch.native.apply_layer(layer, x) is None


def test_hooks_of_every_kind_are_kept() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layer = model[1]
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before with keywords"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_hook(
        lambda *_: calls.append("after with keywords"), with_kwargs=True, always_call=True
    )
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    layer.register_full_backward_hook(lambda *_: calls.append("after backward"))
    small, _ = weft.compress(model, {"1": LowRank(2)})
    assert not calls
    small(torch.randn(2, 4)).sum().backward()
    expected = [
        "before",
        "before with keywords",
        "after",
        "after with keywords",
        "before backward",
        "after backward",
    ]
    assert sorted(calls) == sorted(expected)


def test_one_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    small, log = weft.compress(model, {"0": LowRank(2)})
    assert small[0] is small[2]
    assert isinstance(small[0], StructuredLinear)
    assert len(log) == 1


def test_one_block_in_two_places_stays_one() -> None:
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.ModuleDict({"first": block, "second": block})
    small, _ = weft.compress(model, {"first.0": LowRank(2)})
    assert small["first"] is small["second"]
    assert isinstance(small["first"][0], StructuredLinear)
    x = torch.randn(2, 6)
    assert torch.equal(small["first"](x), small["second"](x))


def test_two_layers_with_one_weight_share_one_matrix_and_keep_their_biases() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    small, log = weft.compress(model, {"0": LowRank(2)})
    assert small[0].matrix is small[2].matrix
    assert small[0].bias is not small[2].bias
    assert torch.equal(small[2].bias, model[2].bias)
    assert len(log) == 1
    assert len(list(small.parameters())) == 4


def test_layers_that_share_a_weight_keep_their_own_geometry() -> None:
    model = nn.ModuleList([
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2, stride=2),
    ])
    model[1].weight = model[0].weight
    small, _ = weft.compress(model, {"0": full_rank((4, 3, 3, 3))})
    x = torch.randn(2, 3, 8, 8)
    for index in (0, 1):
        torch.testing.assert_close(small[index](x), model[index](x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What is refused


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight / weight.norm(), bias)


class Subclass(nn.Linear):
    """Changes nothing that matters."""


def patched() -> nn.Linear:
    layer = nn.Linear(3, 4)
    plain = layer.forward
    layer.forward = lambda input: plain(input) * 2  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnForward(3, 4), "OwnForward computes in its own way"),
        (OwnConvolution(3, 4, 1), "OwnConvolution computes in its own way"),
        (patched(), "Linear computes in its own way"),
        (parametrizations.weight_norm(nn.Linear(3, 4)), "computed by a parametrisation"),
        (parametrizations.orthogonal(nn.Conv2d(3, 4, 1)), "computed by a parametrisation"),
        (prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5), "computed by a parametrisation"),
        (nn.LazyLinear(4), "it is lazy"),
        (nn.LazyConv2d(4, 3), "it is lazy"),
        (nn.LazyConvTranspose2d(4, 3), "it is lazy"),
        (nn.Linear(3, 4, dtype=torch.complex64), "its weight is torch.complex64"),
        (StructuredLinear(LowRank(1).fit(torch.ones(3, 4))), "it is compressed already"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_that_cannot_be_replaced_say_why(module: nn.Module, reason: str) -> None:
    assert reason in (refusal(module) or "")
    with pytest.raises(ValueError, match="layer must be one that can be replaced"):
        structured_layer(module, LowRank(1).fit(torch.ones(4, 3)))


def test_other_modules_have_no_reason_and_plain_subclasses_none() -> None:
    for module in (
        nn.ReLU(),
        nn.BatchNorm2d(3),
        nn.EmbeddingBag(3, 4),
        nn.LSTM(3, 4),
        nn.Sequential(nn.Linear(2, 2)),
    ):
        assert refusal(module) == ""
    assert refusal(Subclass(3, 4)) is None


def test_what_does_not_fit_is_refused_by_name() -> None:
    matrix = LowRank(1).fit(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"matrix must be of shape \(5, 3\), got \(4, 3\)"):
        structured_layer(nn.Linear(3, 5), matrix)
    with pytest.raises(ValueError, match=r"bias must be of shape \(4,\), got \(3,\)"):
        StructuredLinear(matrix, torch.zeros(3))
    with pytest.raises(ValueError, match="layer middle must be a layer of the model, got none"):
        replace_layer(nn.Sequential(nn.Linear(3, 4)), ["middle"], matrix)
    with pytest.raises(ValueError, match=r"x must be of shape \(\*batch, 3\), got \(2, 4\)"):
        StructuredLinear(matrix)(torch.zeros(2, 4))
    layer = full_rank_layer(nn.Conv2d(4, 6, 3, groups=2))
    for shape in ((2, 2, 8, 8), (4, 8), (2, 4, 8), (1, 2, 4, 8, 8)):
        with pytest.raises(
            ValueError, match="input must be of shape \\(batch, 4, \\*space\\) with 2 spatial axes"
        ):
            layer(torch.zeros(shape))


def test_an_embedding_looks_rows_up_in_the_structured_table() -> None:
    dense = nn.Embedding(6, 4, padding_idx=2)
    layer = structured_layer(dense, LowRank(4).fit(dense.weight))
    indices = torch.tensor([[0, 5], [2, 2]])
    assert isinstance(layer, StructuredEmbedding)
    torch.testing.assert_close(layer(indices), dense(indices))
    assert layer(indices[:0]).shape == (0, 2, 4)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (6, 4, 2)
    torch.testing.assert_close(layer.weight + 0, dense.weight.detach())
    with pytest.raises(TypeError, match="input must be integers, got torch.float32"):
        layer(torch.zeros(3))


def test_a_table_shared_with_a_head_becomes_one_matrix() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    x = torch.tensor([0, 5, 3])
    before = model(x).detach()
    small = replace_layer(model, ["0", "1"], LowRank(4).fit(model[0].weight))
    assert small[0].matrix is small[1].matrix
    torch.testing.assert_close(small(x), before)


class Coded(StructuredMatrix):
    """A member whose stored codes do not train as they are; its stand-in is a dense matrix."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__(Dense(), codes.shape)
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.to_dense().T

    def to_dense(self) -> Tensor:
        return self.codes.to(torch.float32)

    def rows(self, indices: Tensor) -> Tensor:
        return self.to_dense()[indices]

    def multiply_adds(self, geometry: object = None) -> int:
        return self.codes.numel()

    def relax(self) -> StructuredMatrix:
        return Relaxed(Dense(), self.shape, self.to_dense())


class Relaxed(DenseMatrix):
    def harden(self) -> StructuredMatrix:
        return Coded(self.weight.round().to(torch.int8))


def test_relaxing_and_hardening_keep_tied_layers_tied() -> None:
    matrix = Coded(torch.arange(9, dtype=torch.int8).reshape(3, 3))
    model = nn.Sequential(StructuredLinear(matrix), nn.Sequential(StructuredLinear(matrix))).eval()
    relax(model)
    assert isinstance(model[0].matrix, Relaxed)
    assert model[0].matrix is model[1][0].matrix
    with torch.no_grad():
        model[0].matrix.weight += 1.2
    harden(model)
    assert model[0].matrix is model[1][0].matrix
    assert torch.equal(model[1][0].matrix.codes, matrix.codes + 1)
    assert not any(module.training for module in model.modules())


def test_gradients_reach_the_factors_and_the_bias_of_a_convolution() -> None:
    layer = full_rank_layer(nn.Conv2d(4, 6, 3, groups=2, padding=1))
    assert isinstance(layer, StructuredConvolution)
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name
