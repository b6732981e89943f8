"""The laws of the contract, each for every example and shape. No family is named here."""

import copy
import dataclasses
import functools
import io
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.examples import (
    EXAMPLES,
    GEOMETRIES,
    Example,
    each_convolution_shape,
    each_example,
    each_family,
    each_shape,
)
from weft.kernels import dispatch
from weft.layers.linear import StructuredLinear
from weft.structures import families, from_json
from weft.structures.base import (
    BlockDiagonalGram,
    DenseGram,
    DiagonalGram,
    Geometry,
    Gram,
    Shape,
    StructuredMatrix,
    matrix_shape,
    relative_error,
)

ONE_SHAPE: Shape = (40, 48)


def random_weight(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight with decaying singular values, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = matrix_shape(shape)
    width = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, width, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, width, dtype=torch.float64, generator=generator))[0]
    decay = torch.arange(1, width + 1, dtype=torch.float64) ** -0.75
    return ((left * decay) @ right.T).reshape(shape).to(dtype)


def random_gram(size: int, seed: int = 1) -> DenseGram:
    """The second moment of correlated, non-negative inputs with a mean, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator) / math.sqrt(size)
    x = torch.relu(torch.randn(4 * size + 8, size, dtype=torch.float64, generator=generator) @ mixing)
    return DenseGram(x.T @ x / len(x))


def member_of(example: Example, shape: Shape, dtype: torch.dtype = torch.float32) -> StructuredMatrix:
    """A copy of the example's fit to `random_weight`, so that one fit serves many laws."""
    return copy.deepcopy(_fitted(EXAMPLES.index(example), shape, dtype))


@functools.cache
def _fitted(index: int, shape: Shape, dtype: torch.dtype) -> StructuredMatrix:
    return EXAMPLES[index].structure(shape).fit(random_weight(shape, dtype))


def dense_convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """torch's own convolution, by a route that shares nothing with `Geometry.convolve`."""
    kinds = {(1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d}
    kinds |= {(1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d}
    groups, more = geometry.groups, {}
    channels = kernel.shape[1] * groups
    padding = tuple(before for before, _ in geometry.padding)
    if geometry.transposed:
        own = torch.stack(kernel.chunk(groups)).transpose(1, 2).reshape(channels, -1, *kernel.shape[2:])
        more = {"output_padding": geometry.output_padding or 0}
    else:
        own = kernel
        sides = [side for pair in reversed(geometry.padding) for side in pair]
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x, padding = F.pad(x, sides, mode=mode), 0
    module = kinds[len(geometry.stride), geometry.transposed](
        channels,
        len(kernel),
        tuple(kernel.shape[2:]),
        geometry.stride,
        padding,
        dilation=geometry.dilation,
        groups=groups,
        bias=bias is not None,
        dtype=x.dtype,
        **more,
    )
    parameters = {"weight": own} if bias is None else {"weight": own, "bias": bias}
    return torch.func.functional_call(module, parameters, (x,))


def relative_difference(got: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm()
    return float((got.double() - expected.double()).norm() / scale.clamp_min(1e-30))


def test_the_folder_and_the_examples_name_the_same_families() -> None:
    own = {name for name, family in families().items() if family.__module__.startswith("weft.structures.")}
    shown = {type(example.structure(ONE_SHAPE)).__name__ for example in EXAMPLES}
    assert shown == own


@each_example
def test_source_names_a_paper_or_origin(example: Example) -> None:
    assert len(example.structure(ONE_SHAPE).source) > 5


@each_example
@each_shape
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_forward_equals_the_dense_product(example: Example, shape: Shape, batch: tuple[int, ...]) -> None:
    member = member_of(example, shape)
    x = torch.randn(*batch, member.inputs, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = x.double() @ member.to_dense().double().flatten(1).T
        got = member(x)
        scale = x.double().norm() * member.to_dense().double().norm()
    assert got.shape == (*batch, member.outputs)
    assert got.dtype == x.dtype
    assert float((got.double() - expected).norm()) <= example.forward_tolerance * max(float(scale), 1e-30)


@each_example
@each_shape
def test_kernels_and_their_references_give_the_same_product(example: Example, shape: Shape) -> None:
    """A gradient to record takes the composition of PyTorch's operations, its absence the native code."""
    member = member_of(example, shape)
    x = torch.randn(3, member.inputs, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        native = member(x)
        scale = float(x.norm() * member.to_dense().norm())
    composed = member(x.clone().requires_grad_())
    assert composed.requires_grad
    assert float((native - composed).norm()) <= 1e-5 * max(scale, 1e-30)


@each_example
@each_shape
def test_affine_adds_the_bias(example: Example, shape: Shape) -> None:
    member = member_of(example, shape, torch.float64)
    x = torch.randn(4, member.inputs, dtype=torch.float64)
    bias = torch.randn(member.outputs, dtype=torch.float64)
    torch.testing.assert_close(member.affine(x, bias), member(x) + bias)


@each_example
@each_shape
def test_a_linear_layer_gives_what_affine_gives(example: Example, shape: Shape) -> None:
    """By the family's `native_call` where it has one, which must then be taken."""
    member = member_of(example, shape)
    layer = StructuredLinear(member, torch.randn(member.outputs))
    x = torch.randn(3, member.inputs, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = member.affine(x, layer.bias)
        assert torch.equal(layer(x), expected)
        if dispatch.native is not None and member.native_call is not None and len(shape) == 2:
            assert torch.equal(dispatch.native.apply_layer(layer, x), expected)


@each_example
@each_convolution_shape
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolve_equals_the_dense_convolution(example: Example, shape: Shape, geometry: Geometry) -> None:
    structure = example.structure(shape)
    if shape[0] % geometry.groups:
        pytest.skip("no grouped convolution has this many outputs")
    if structure.refusal(shape, geometry) is not None:
        pytest.skip("the family refuses this convolution, and says so")
    member = structure.fit(random_weight(shape, torch.float64))
    x = torch.randn(2, shape[1] * geometry.groups, *geometry.input_size, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    expected = dense_convolution(x, member.to_dense(), bias, geometry)
    assert expected.shape[2:] == geometry.output_size(shape[2:])
    torch.testing.assert_close(member.convolve(x, geometry, bias), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # other routes may be open here, and the second call may find what the first kept
        for _ in range(2):
            got = member.eval().convolve(x, geometry, bias)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@each_example
@pytest.mark.parametrize("space", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolve_in_other_dimensions(example: Example, space: int, groups: int, transposed: bool) -> None:
    shape = (6, 4, *(3, 1, 2)[:space])
    geometry = Geometry(
        (2,) * space, ((1, 1),) * space, (1,) * space, groups, input_size=(5,) * space, transposed=transposed
    )
    structure = example.structure(shape)
    if structure.refusal(shape, geometry) is not None:
        pytest.skip("the family refuses this convolution, and says so")
    member = structure.fit(random_weight(shape, torch.float64)).eval()
    x = torch.randn(2, 4 * groups, *geometry.input_size, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    expected = dense_convolution(x, member.to_dense(), bias, geometry)
    torch.testing.assert_close(member.convolve(x, geometry, bias), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(member.convolve(x, geometry, bias), expected, rtol=1e-5, atol=1e-5)
    assert member.multiply_adds(geometry) > 0


@each_example
def test_a_convolution_follows_its_tensors_when_they_change(example: Example) -> None:
    shape, geometry = (8, 4, 3, 3), GEOMETRIES["plain"]
    member = member_of(example, shape, torch.float64).eval()
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        before = member.convolve(x, geometry)
        for parameter in member.parameters():
            parameter.mul_(1.5)
        after = member.convolve(x, geometry)
        torch.testing.assert_close(after, dense_convolution(x, member.to_dense(), None, geometry))
        assert not torch.allclose(after, before)
        again = copy.deepcopy(member)
        assert set(again.state_dict()) == set(member.state_dict())
        assert torch.equal(again.convolve(x, geometry), after)
    x.requires_grad_()
    member.convolve(x, geometry).square().sum().backward()  # those of the tensors themselves
    assert all(parameter.grad is not None for parameter in member.parameters())


@each_example
@each_shape
def test_rows_are_those_of_the_dense_weight(example: Example, shape: Shape) -> None:
    member = member_of(example, shape, torch.float64)
    indices = torch.tensor([[0, member.outputs - 1], [member.outputs // 2, 0]])
    torch.testing.assert_close(member.rows(indices), member.to_dense().flatten(1)[indices])


@each_example
@each_shape
def test_fit_with_a_start_is_no_worse_than_the_start(example: Example, shape: Shape) -> None:
    structure = example.structure(shape)
    weight = random_weight(shape, torch.float64)
    start = structure.fit(
        random_weight(shape, torch.float64) + 0.01 * random_weight(shape, torch.float64, seed=9)
    )
    member = structure.fit(weight, start=start)
    assert relative_error(weight, member.to_dense()) <= relative_error(weight, start.to_dense()) + 1e-12


@each_example
@each_shape
def test_exact_examples_recover_a_member(example: Example, shape: Shape) -> None:
    structure = example.structure(shape)
    planted = structure.initialise(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    dense = planted.to_dense().detach()
    recovered = planted.structure.fit(dense, start=None if example.exact else planted)
    assert recovered.to_dense().dtype == torch.float64
    assert relative_difference(recovered.to_dense(), dense) <= example.exact_tolerance


@each_example
@each_shape
def test_predicted_counts_equal_the_counted_ones(example: Example, shape: Shape) -> None:
    member = member_of(example, shape)
    geometries = [None] if len(shape) == 2 else [None, *GEOMETRIES.values()]
    for structure in (example.structure(shape), member.structure):
        parameters = structure.parameter_count(shape)
        assert parameters is None or parameters == member.cost().parameters
        for geometry in geometries:
            multiply_adds = structure.multiply_adds(shape, geometry)
            assert multiply_adds is None or multiply_adds == member.cost(geometry).multiply_adds


@each_example
@each_shape
def test_a_resized_structure_is_possible_and_at_one_itself(example: Example, shape: Shape) -> None:
    structure = example.structure(shape)
    try:
        same = structure.resized(1.0, shape)
    except ValueError as refusal:
        assert "of a size that can change" in str(refusal)  # noqa: PT017  (a family may say no)
        return
    assert same == structure
    for factor in (1e-3, 0.5, 2.0, 1e6):
        other = structure.resized(factor, shape)
        assert type(other) is type(structure)
        other.check(shape)


@each_example
def test_weights_share_a_size_or_the_family_says_no(example: Example) -> None:
    structure = example.structure(ONE_SHAPE)
    weights = [random_weight(ONE_SHAPE), 2 * random_weight(ONE_SHAPE)]
    try:
        shared = structure.share_out(weights)
    except ValueError as refusal:
        assert "of a size that weights can share" in str(refusal)  # noqa: PT017
        return
    members = [one.fit(weight) for one, weight in zip(shared, weights, strict=True)]
    sizes = [member.parameter_count() for member in members]
    assert sizes[0] <= sizes[1]
    whole = 2 * structure.fit(weights[0]).parameter_count()
    assert abs(sum(sizes) - whole) <= 2


@each_example
@each_shape
def test_bytes_are_those_of_the_saved_tensors(example: Example, shape: Shape) -> None:
    member = member_of(example, shape)
    counted = sum(tensor.nbytes for tensor in member.state_dict().values())
    assert member.cost().bytes == counted > 0


@each_example
@each_shape
def test_a_dearer_member_never_fits_worse(example: Example, shape: Shape) -> None:
    if not example.monotone:
        pytest.skip("the example does not claim it")
    weight = random_weight(shape, torch.float64)
    for argument, values in example.monotone.items():
        errors = []
        for value in values:
            structure = dataclasses.replace(example.structure(shape), **{argument: value})
            try:
                structure.check(shape)
            except ValueError:
                continue
            errors.append(relative_error(weight, structure.fit(weight).to_dense()))
        assert errors
        assert all(after <= before + 1e-9 for before, after in zip(errors, errors[1:], strict=False))


def _grams(shape: Shape) -> dict[str, dict[str, Gram]]:
    rows, columns = matrix_shape(shape)
    return {
        "input": {"input_gram": random_gram(columns)},
        "diagonal": {"input_gram": DiagonalGram(random_gram(columns).moment.diagonal())},
        "both": {"input_gram": random_gram(columns), "output_gram": random_gram(rows, seed=2)},
    }


@each_example
@each_shape
@pytest.mark.parametrize("kind", ["input", "diagonal", "both"])
def test_a_weighted_fit_is_no_worse_than_the_plain_one_in_the_weighted_norm(
    example: Example, shape: Shape, kind: str
) -> None:
    structure, weight, grams = example.structure(shape), random_weight(shape), _grams(shape)[kind]
    weighted = relative_error(weight, structure.fit(weight, **grams).to_dense(), **grams)
    plain = relative_error(weight, structure.fit(weight).to_dense(), **grams)
    assert weighted <= plain * (1 + example.weighted_tolerance) + 1e-6


@each_example
def test_a_singular_gram_works(example: Example) -> None:
    weight = random_weight(ONE_SHAPE)
    x = torch.randn(5, ONE_SHAPE[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grams = {"input_gram": DenseGram(x.T @ x, shrinkage=0.0)}
    member = example.structure(ONE_SHAPE).fit(weight, **grams)
    plain = example.structure(ONE_SHAPE).fit(weight)
    assert torch.isfinite(member.to_dense()).all()
    assert (
        relative_error(weight, member.to_dense(), **grams)
        <= relative_error(weight, plain.to_dense(), **grams) + 1e-5
    )


@each_example
def test_a_block_diagonal_gram_works(example: Example) -> None:
    shape = (8, 3, 3, 3)
    weight = random_weight(shape)
    gram = BlockDiagonalGram(torch.stack([random_gram(27, seed=seed).moment for seed in range(2)]))
    weighted = example.structure(shape).fit(weight, input_gram=gram)
    plain = example.structure(shape).fit(weight)
    errors = [relative_error(weight, member.to_dense(), input_gram=gram) for member in (weighted, plain)]
    assert errors[0] <= errors[1] * (1 + example.weighted_tolerance) + 1e-6


@each_example
@each_shape
def test_tensors_rebuild_the_member(example: Example, shape: Shape) -> None:
    member = member_of(example, shape)
    again = member.structure.from_tensors(shape, member.stored())
    x = torch.randn(3, member.inputs)
    assert torch.equal(again(x), member(x))
    assert again.structure == member.structure


@each_example
def test_a_loaded_state_is_the_other_member(example: Example) -> None:
    one, other = (
        example.structure(ONE_SHAPE).fit(
            torch.randn(ONE_SHAPE, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (1, 2)
    )
    sizes, others = ({name: tensor.shape for name, tensor in m.stored().items()} for m in (one, other))
    if sizes != others:
        pytest.skip("these two members are of different sizes")
    x = torch.randn(3, one.inputs)
    with torch.no_grad():
        one(x), one.rows(torch.tensor([0]))  # whatever is kept for later calls is there
        one.load_state_dict(other.state_dict())
        torch.testing.assert_close(one.to_dense(), other.to_dense())
        torch.testing.assert_close(one(x), other(x))
        indices = torch.arange(one.outputs)
        torch.testing.assert_close(one.rows(indices), other.rows(indices))


@each_example
def test_missing_surplus_and_misshapen_tensors_are_refused(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    stored = member.stored()
    name = next(iter(stored))
    without = {key: tensor for key, tensor in stored.items() if key != name}
    with pytest.raises(ValueError, match=name.rsplit(".", maxsplit=1)[-1]):
        member.structure.from_tensors(ONE_SHAPE, without)
    with pytest.raises(ValueError, match="surplus_tensor"):
        member.structure.from_tensors(ONE_SHAPE, {**stored, "surplus_tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be"):
        member.structure.from_tensors((ONE_SHAPE[0] + 3, ONE_SHAPE[1] + 5), stored)


@each_example
@each_shape
def test_json_gives_an_equal_structure_with_the_same_hash(example: Example, shape: Shape) -> None:
    for structure in (example.structure(shape), member_of(example, shape).structure):
        data = json.loads(json.dumps(structure.to_json()))
        assert from_json(data) == structure
        assert hash(from_json(data)) == hash(structure)
        with pytest.raises(ValueError, match="unknown_key"):
            from_json({**data, "unknown_key": 1})


@each_example
def test_a_structure_is_a_value(example: Example) -> None:
    structure = example.structure(ONE_SHAPE)
    assert structure == example.structure(ONE_SHAPE)
    assert pickle.loads(pickle.dumps(structure)) == structure
    assert structure.to_json()["family"] == type(structure).__name__
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.anything = 1


@each_family
@each_shape
def test_candidates_are_cheapest_first_possible_and_not_repeated(example: Example, shape: Shape) -> None:
    family = type(example.structure(shape))
    candidates = list(family.candidates(shape, inner=()))
    if not candidates:
        pytest.skip("a wrapper without inner candidates has none")
    for candidate in candidates:
        candidate.check(shape)
    assert len(set(candidates)) == len(candidates)
    sizes = [candidate.parameter_count(shape) for candidate in candidates]
    if None not in sizes:
        assert sizes == sorted(sizes)


@each_family
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_curve_is_what_the_fits_give(example: Example, weighted: bool) -> None:
    family = type(example.structure(ONE_SHAPE))
    weight = random_weight(ONE_SHAPE)
    grams = {"input_gram": random_gram(ONE_SHAPE[1])} if weighted else {}
    curve = family.error_curve(weight, **grams)
    if not curve:
        pytest.skip("a wrapper without inner candidates has none")
    for point in curve[:: max(1, len(curve) // 3)]:
        member = point.structure.fit(weight, **grams)
        assert point.cost == member.cost()
        error = relative_error(weight, member.to_dense(), **grams)
        assert error == pytest.approx(point.error, rel=example.curve_tolerance, abs=1e-4)


@each_example
def test_gradients_on_the_reference(example: Example) -> None:
    shape = (12, 10)
    member = member_of(example, shape, torch.float64).relax()
    names = [name for name, parameter in member.named_parameters() if parameter.requires_grad]
    values = [parameter.detach().clone().requires_grad_() for _, parameter in member.named_parameters()]
    x = torch.randn(3, member.inputs, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(member, dict(zip(names, parameters, strict=True)), (x,))

    if type(member) is type(member_of(example, shape, torch.float64)):
        assert torch.autograd.gradcheck(apply, (x, *values))
    else:  # straight-through gradients are not derivatives: only the input's is checked
        assert torch.autograd.gradcheck(lambda x: apply(x, *(value.detach() for value in values)), (x,))


@each_example
@each_shape
def test_gradients_in_single_precision_agree_with_double(example: Example, shape: Shape) -> None:
    member = member_of(example, shape)
    double = copy.deepcopy(member).double()
    x = torch.randn(4, member.inputs, generator=torch.Generator().manual_seed(5))
    results = []
    for module, given in ((member, x.requires_grad_()), (double, x.detach().double().requires_grad_())):
        output = module(given)
        probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * probe).sum().backward()
        results.append([given.grad, *(parameter.grad for parameter in module.parameters())])
    scale = max(float(gradient.norm()) for gradient in results[1])
    for single, reference in zip(*results, strict=True):
        assert float((single.double() - reference).norm()) <= 1e-4 * max(scale, 1e-30)


@each_example
def test_deepcopy_and_pickle_keep_the_output(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    x = torch.randn(3, member.inputs)
    member(x)  # whatever a kernel caches must not stand in the way
    assert torch.equal(copy.deepcopy(member)(x), member(x))
    buffer = io.BytesIO(pickle.dumps(member))
    assert torch.equal(pickle.load(buffer)(x), member(x))


@each_example
def test_compiles_into_one_graph(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    x = torch.randn(3, member.inputs)
    compiled = torch.compile(member, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), member(x), rtol=1e-4, atol=1e-5)


@each_example
def test_a_compiled_result_lies_in_memory_as_the_graph_takes_it(example: Example) -> None:
    """The graph views results by the strides that an operation's shape function promised."""
    member = member_of(example, ONE_SHAPE).double()
    x = torch.randn(3, 2, member.inputs, dtype=torch.float64).transpose(0, 1)

    def viewed(x: Tensor) -> Tensor:
        return (member(x) + 1).reshape(-1)

    with torch.no_grad():
        expected = viewed(x)
        torch._dynamo.reset()
        compiled = torch.compile(viewed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each_example
def test_compiles_with_inductor(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    x = torch.randn(3, member.inputs)
    torch.testing.assert_close(torch.compile(member, fullgraph=True)(x), member(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each_example
def test_exports(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    x = torch.randn(3, member.inputs)
    program = torch.export.export(member, (x,))
    torch.testing.assert_close(program.module()(x), member(x), rtol=1e-4, atol=1e-5)


@each_example
@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(example: Example, shape: Shape, dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    member = example.structure(shape).fit(weight)
    x = torch.randn(2, member.inputs, dtype=torch.float64).to(dtype)
    output = member(x)
    assert output.dtype == dtype
    assert member.to_dense().dtype == dtype
    if dtype == torch.float64:
        reference, tolerance = member, 1e-12
    else:  # a bfloat16 weight is fitted in float32, and only the result is rounded
        reference, tolerance = example.structure(shape).fit(weight.float()), 0.05
    expected = x.double() @ reference.to_dense().double().flatten(1).T
    scale = float(x.double().norm() * weight.double().norm())
    assert float((output.double() - expected).norm()) <= tolerance * max(scale, 1e-30)


@each_example
def test_a_non_contiguous_weight_is_fitted_as_its_values(example: Example) -> None:
    weight = random_weight(ONE_SHAPE)
    strided = weight.T.contiguous().T
    structure = example.structure(ONE_SHAPE)
    torch.testing.assert_close(structure.fit(strided).to_dense(), structure.fit(weight).to_dense())


@each_example
def test_a_fit_repeats(example: Example) -> None:
    weight = random_weight(ONE_SHAPE)
    structure = example.structure(ONE_SHAPE)
    first, second = structure.fit(weight), structure.fit(weight)
    for name, tensor in first.stored().items():
        assert torch.equal(tensor, second.stored()[name])


@each_example
@each_shape
def test_initialise_is_seeded_and_keeps_signals_in_size(example: Example, shape: Shape) -> None:
    structure = example.structure(shape)
    first = structure.initialise(shape, generator=torch.Generator().manual_seed(0))
    second = structure.initialise(shape, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, second.stored()[name]) for name, tensor in first.stored().items())
    x = torch.randn(64, first.inputs, generator=torch.Generator().manual_seed(1))
    size = float(first(x).detach().square().mean().sqrt())
    assert 0.01 < size < 10


@each_example
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused(example: Example, bad: float) -> None:
    weight = random_weight(ONE_SHAPE)
    weight[3, 4] = bad
    with pytest.raises(ValueError, match="weight must be finite everywhere, got 1 NaN or infinite"):
        example.structure(ONE_SHAPE).fit(weight)


@each_example
def test_wrong_shapes_are_refused(example: Example) -> None:
    structure, weight = example.structure(ONE_SHAPE), random_weight(ONE_SHAPE)
    member = structure.fit(weight)
    with pytest.raises(ValueError, match=r"x must be of shape \(\*batch, 48\), got \(2, 47\)"):
        member(torch.zeros(2, 47))
    with pytest.raises(ValueError, match="weight must be of shape"):
        structure.fit(torch.zeros(5))
    with pytest.raises(ValueError, match="input_gram must be of size 48"):
        structure.fit(weight, input_gram=random_gram(40))
    with pytest.raises(ValueError, match="output_gram must be of size 40"):
        structure.fit(weight, output_gram=random_gram(48))
    with pytest.raises(TypeError, match="floating-point"):
        structure.fit(torch.zeros(ONE_SHAPE, dtype=torch.int32))


@each_example
@each_shape
def test_the_picture_lies_inside_the_matrix(example: Example, shape: Shape) -> None:
    member = member_of(example, shape)
    picture = member.picture()
    assert picture
    for block in picture:
        assert block.rows >= 1
        assert block.columns >= 1
        assert block.row >= 0
        assert block.column >= 0
        if block.factor == 0:
            assert block.row + block.rows <= member.outputs
            assert block.column + block.columns <= member.inputs


@each_example
def test_relax_and_harden_keep_the_matrix(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    again = member.relax().harden()
    assert isinstance(again, nn.Module)
    torch.testing.assert_close(again.to_dense(), member.to_dense(), rtol=1e-5, atol=1e-6)
    assert again.structure == member.structure


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@each_example
def test_cuda_agrees_with_the_processor(example: Example) -> None:
    member = member_of(example, ONE_SHAPE)
    x = torch.randn(3, member.inputs)
    torch.testing.assert_close(copy.deepcopy(member).cuda()(x.cuda()).cpu(), member(x), rtol=1e-4, atol=1e-5)
