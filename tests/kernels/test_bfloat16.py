"""Products with weights of bfloat16 against float64: summed in float, rounded once at the end."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from weft.kernels import dispatch
from weft.kernels import low_rank as low_rank_kernel
from weft.layers.linear import StructuredLinear
from weft.measure import threads
from weft.structures import from_text
from weft.structures.base import StructuredMatrix

pytestmark = pytest.mark.skipif(dispatch.native is None, reason="no native kernels here")

MEMBERS = [
    "LowRank(rank=1)",
    "LowRank(rank=21)",
    "Hierarchical(rank=5, leaf_size=16)",
    "Hierarchical(rank=3, leaf_size=5, admissibility=strong)",
    "SequentiallySemiseparable(stages=4, state_dimension=6)",
    "SparseProduct(factors=2, sparsity=5)",
    "Pruned(density=0.1)",
    "Quantized(bits=8)",
    "Quantized(bits=4, group=25, zero=free)",
    "Quantized(bits=3, codebook=kmeans)",
    "ProductQuantized(subspaces=25, codewords=16)",
]


@pytest.fixture(params=["portable", "AVX2", "AVX-512", "NEON"])
def _copy_of_the_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    usual = dispatch.native.instructions()
    if not dispatch.native.use_instructions(request.param):
        pytest.skip(f"{request.param} instructions are not to be had here")
    yield
    dispatch.native.use_instructions(usual)


def member(text: str, shape: tuple[int, int]) -> StructuredMatrix:
    return from_text(text).initialise(shape).to(torch.bfloat16).eval()


def exact(matrix: StructuredMatrix, x: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ copy.deepcopy(matrix).double().to_dense().T + bias.double()


@pytest.mark.usefixtures("_copy_of_the_kernels")
@pytest.mark.parametrize("text", MEMBERS)
@pytest.mark.parametrize("batch", [(1,), (2, 4), (70,)])
def test_results_are_the_exact_ones_rounded_once(text: str, batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((*batch, 75), (101,)))
    layer = StructuredLinear(member(text, (101, 75)), bias).eval()
    expected = exact(layer.matrix, x, bias)
    for count in (1, 2):
        with torch.inference_mode(), threads(count):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        if text.startswith("LowRank") and len(x.flatten(0, -2)) > 8:
            continue  # PyTorch's own products of halves, which round twice
        error = (y.double() - expected).abs()
        assert (error <= 2.0**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()


@pytest.mark.usefixtures("_copy_of_the_kernels")
@pytest.mark.parametrize("batch", [(1,), (2, 4), (70,)])
def test_whole_numbers_come_from_the_vectors_as_floats(batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 75, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix = member("Quantized(bits=8, activations=int8)", (101, 75))
    wide = copy.deepcopy(matrix).float()
    with torch.inference_mode():
        assert torch.equal(matrix(x), wide(x.float()).bfloat16())


@pytest.mark.parametrize("text", MEMBERS)
def test_compiled_graphs_give_the_same(text: str) -> None:
    if text.startswith("LowRank"):
        pytest.skip("PyTorch's own products of halves, which round twice")
    layer = StructuredLinear(member(text, (20, 75)), torch.randn(20).bfloat16()).eval()
    x = torch.randn(2, 75).bfloat16()
    with torch.inference_mode():
        expected = layer(x)
        torch.compiler.reset()  # every family is a new compilation of the same forward
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)


def test_plain_inference_takes_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Tensor | None] = []

    def record(*given: object) -> Tensor | None:
        answers.append(dispatch.native.low_rank_apply(*given))
        return answers[-1]

    monkeypatch.setattr(low_rank_kernel, "_native_apply", record)
    matrix, x = member("LowRank(rank=3)", (10, 8)), torch.randn(2, 8).bfloat16()
    with torch.inference_mode():
        matrix(x)
        assert answers[-1] is not None
        with pytest.raises(RuntimeError):
            matrix(x.float())  # PyTorch's own error: numbers of two kinds
        assert answers[-1] is None
    matrix(x)
    assert answers[-1] is None  # a gradient is recorded
    with torch.inference_mode(), torch.autocast("cpu"):
        matrix(x)
        assert answers[-1] is None


@pytest.mark.parametrize("text", ["LowRank(rank=3)", "Hierarchical(rank=2, leaf_size=4)"])
def test_versions_of_torch_without_shortcuts_give_the_same(text: str) -> None:
    matrix, x = member(text, (20, 16)), torch.randn(2, 16).bfloat16()
    with torch.inference_mode():
        expected = matrix(x)
        dispatch._introduce_torch(by_exchange=False, empty_strided=dispatch._by_dispatcher)
        try:
            assert torch.equal(matrix(x), expected)
        finally:
            dispatch._introduce_torch()


def test_numbers_that_are_none_stay_so_and_large_ones_overflow_to_infinity() -> None:
    matrix = member("LowRank(rank=1)", (3, 4))
    with torch.no_grad():
        matrix.left.fill_(1.0)
        matrix.right.fill_(1.0)
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[float("nan"), 0, 0, 0], [largest, largest, 0, 0], [1, 2**-8, 0, 0]]).bfloat16()
    with torch.inference_mode():
        y = matrix(x)
    assert y[0].isnan().all()
    assert (y[1] == float("inf")).all()
    assert (y[2] == 1).all()  # a tie goes to the even number
