"""Tensor train: exact recovery, the weighted fit, chains of convolutions, and what is kept between calls."""

import math

import pytest
import torch
from tests.examples import CONVOLUTION_SHAPES, GEOMETRIES, name_of
from tests.test_structure_contract import dense_convolution, random_gram, random_weight
from torch import Tensor, nn

import weft
from weft.layers.convolution import StructuredConvolution
from weft.measure import network_cost
from weft.numerics.gram import DenseGram
from weft.structures import base, tensor_train
from weft.structures.base import Geometry, Shape, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.tensor_train import TensorTrain, TensorTrainMatrix

UNPADDED: tuple[Shape, ...] = ((64, 64), (32, 96), (24, 16, 3, 3), (16, 16, 5))


@pytest.mark.parametrize("shape", UNPADDED, ids=name_of)
@pytest.mark.parametrize("modes", ["skewed", "balanced"])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_a_planted_member_is_recovered(shape: Shape, modes: str, cores: int) -> None:
    structure = TensorTrain(3, cores=cores, modes=modes)
    planted = structure.initialise(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = planted.to_dense().detach()
    assert relative_error(dense, structure.fit(dense).to_dense()) < 1e-9


def test_full_rank_is_exact_for_sizes_that_are_padded() -> None:
    for shape in ((13, 7), (11, 5, 3, 3)):
        weight = random_weight(shape, torch.float64)
        limit = max(math.prod(core[:3]) for core in TensorTrain(1).core_shapes(shape))
        rank = max(rank for rank in range(1, 200) if _possible(rank, shape)) if limit else 1
        assert relative_error(weight, TensorTrain(rank).fit(weight).to_dense()) < 1e-9


def _possible(rank: int, shape: Shape) -> bool:
    try:
        TensorTrain(rank).check(shape)
    except ValueError:
        return False
    return True


def test_impossible_sizes_say_so() -> None:
    with pytest.raises(ValueError, match=r"rank must be between 1 and 64 for a \(64, 64\) weight in 4 cores"):
        TensorTrain(4096).fit(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="cores must be at least 2"):
        TensorTrain(3, cores=1)
    with pytest.raises(ValueError, match="modes must be one of"):
        TensorTrain(3, modes="other")


@pytest.mark.parametrize("shape", [(48, 64), (13, 37), (16, 12, 3, 3)], ids=name_of)
def test_a_weighted_fit_is_clearly_better_in_its_norm(shape: Shape) -> None:
    weight = random_weight(shape, torch.float64)
    inputs = weight[0].numel()
    x = torch.randn(4 * inputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.arange(1, inputs + 1) ** -1.0 @ torch.linalg.qr(x[:inputs]).Q
    grams = {"input_gram": DenseGram(x.T @ x / len(x), shrinkage=0.01)}
    structure = TensorTrain(4)
    errors = [
        relative_error(weight, structure.fit(weight, **given).to_dense(), **grams) for given in (grams, {})
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_start_is_gone_on_from() -> None:
    weight, grams = random_weight((32, 32), torch.float64), {"input_gram": random_gram(32)}
    structure = TensorTrain(3)
    member, errors = None, []
    for _ in range(4):
        member = structure.fit(weight, **grams, start=member)
        errors.append(relative_error(weight, member.to_dense(), **grams))
    assert all(after <= before + 1e-12 for before, after in zip(errors, errors[1:], strict=False))


# ------------------------------------------------------------------------------------------------------------
# Chains of convolutions


@pytest.fixture
def always_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small kernels run as chains too, as large ones do."""
    monkeypatch.setattr(tensor_train, "_WORTHWHILE", math.inf)


@pytest.mark.usefixtures("always_chained")
@pytest.mark.parametrize("shape", CONVOLUTION_SHAPES, ids=name_of)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("cores", [2, 4])
def test_a_chain_is_the_dense_convolution(shape: Shape, geometry: Geometry, cores: int) -> None:
    if geometry.groups != 1:
        pytest.skip("grouped convolutions run by the dense kernel")
    structure = TensorTrain(1 if min(shape[:2]) == 1 else 2, cores=cores)
    assert structure.runs_as_chain(shape, geometry)
    member = structure.initialise(shape, dtype=torch.float64).eval()
    assert geometry.input_size is not None
    x = torch.randn(2, shape[1], *geometry.input_size, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    expected = dense_convolution(x, member.to_dense(), bias, geometry)
    torch.testing.assert_close(member.convolve(x, geometry, bias), expected)
    with torch.no_grad():
        torch.testing.assert_close(member.convolve(x, geometry, bias), expected)


@pytest.mark.usefixtures("always_chained")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("space", [1, 3])
def test_chains_in_other_dimensions(space: int, transposed: bool) -> None:
    shape = (12, 8, *(3, 2, 2)[:space])
    geometry = Geometry((2,) * space, ((1, 1),) * space, (1,) * space, transposed=transposed)
    member = TensorTrain(3).initialise(shape, dtype=torch.float64)
    x = torch.randn(2, 8, *(5,) * space, dtype=torch.float64)
    expected = dense_convolution(x, member.to_dense(), None, geometry)
    torch.testing.assert_close(member.convolve(x, geometry), expected)


class Bare(torch.nn.Module):
    """Not a structured layer, so that torch's own counter counts what runs inside."""

    def __init__(self, member: TensorTrainMatrix, geometry: Geometry) -> None:
        super().__init__()
        self.member, self.geometry = member, geometry

    def forward(self, x: Tensor) -> Tensor:
        return self.member.convolve(x, self.geometry)


@pytest.mark.usefixtures("always_chained")
def test_the_counted_multiply_adds_are_those_that_run() -> None:
    for geometry in (GEOMETRIES["strided"], GEOMETRIES["transposed"], GEOMETRIES["plain"]):
        member = TensorTrain(3).initialise((16, 8, 3, 3)).eval()
        x = torch.randn(2, 8, *geometry.input_size)

        bare = Bare(member, geometry)
        # Beside a counter the cores are merged at every call, which is no matter of the number of images.
        more = (
            5 * network_cost(bare, x.repeat(5, 1, 1, 1)[:5]).multiply_adds
            - 2 * network_cost(bare, x).multiply_adds
        )
        assert more == pytest.approx(3 * member.multiply_adds(geometry), abs=4)  # rounded per image
        assert network_cost(StructuredConvolution(member, geometry), x) == member.cost(geometry)


def test_a_large_convolution_runs_as_a_chain_and_where_it_does_not_pay_by_the_dense_kernel() -> None:
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), input_size=(7, 7))
    shape, dense = (512, 512, 3, 3), 512 * 512 * 9 * 49
    cheap, dear = TensorTrain(60), TensorTrain(300)
    assert cheap.runs_as_chain(shape, geometry)
    assert cheap.multiply_adds(shape, geometry) < 0.3 * dense
    assert not dear.runs_as_chain(shape, geometry)
    assert dear.multiply_adds(shape, geometry) == dense
    # The hidden representation of the whole chain, with copies, is not R times the input but three times.
    assert cheap.peak_activation(shape, geometry) < 3 * 512 * 49


@pytest.mark.usefixtures("always_chained")
def test_large_batches_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    member = TensorTrain(3).initialise((16, 8, 3, 3)).eval()
    x = torch.randn(7, 8, 9, 10)
    with torch.no_grad():
        whole = member.convolve(x, GEOMETRIES["plain"]), member(torch.ones(7, 72))
        sizes = []
        own = base.Geometry.convolve

        def counted(self: Geometry, x: Tensor, *rest: object, **more: object) -> Tensor:
            sizes.append(len(x))
            return own(self, x, *rest, **more)

        monkeypatch.setattr(base.Geometry, "convolve", counted)
        monkeypatch.setattr(
            tensor_train, "PIECE", 3 * member.structure.peak_activation(member.shape, GEOMETRIES["plain"])
        )
        torch.testing.assert_close(member.convolve(x, GEOMETRIES["plain"]), whole[0])
        torch.testing.assert_close(member(torch.ones(7, 72)), whole[1])
    assert len(sizes) == 3


def test_cores_are_merged_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    member = TensorTrain(5).initialise((64, 64)).eval()
    calls = []
    own = tensor_train.merged
    monkeypatch.setattr(tensor_train, "merged", lambda *given: (calls.append(1), own(*given))[1])
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = member(x)
        steps = len(calls)
        assert torch.equal(member(x), before)
        assert len(calls) == steps
        member.core0.mul_(2)
        torch.testing.assert_close(member(x), 2 * before)
        assert len(calls) == 2 * steps
    member.train()
    member(x).sum().backward()
    assert all(core.grad is not None for core in member.train_cores())


def test_a_rank_that_saturates_the_outer_cores_is_one_truncated_svd() -> None:
    # With r₁ and r₃ at their limits the train is the sum of R Kronecker products, whose best one is an SVD's.
    weight = random_weight((64, 64), torch.float64)
    structure = TensorTrain(20)
    tensor = weight.reshape(16, 4, 4, 16).permute(0, 2, 1, 3).reshape(64, 64)
    assert [core[1:3] for core in structure.core_shapes((64, 64))] == [(4, 2), (4, 2), (2, 4), (2, 4)]
    best = LowRank(20).fit(tensor).to_dense()
    assert relative_error(weight, structure.fit(weight).to_dense()) == pytest.approx(
        relative_error(tensor, best), rel=1e-9
    )


@pytest.mark.parametrize(
    "dense",
    [
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Conv2d(32, 32, 3, padding="same", dilation=2, groups=4),
        nn.ConvTranspose2d(32, 16, 2, stride=2),
        nn.Conv2d(32, 4, 1),
    ],
    ids=["strided", "grouped", "transposed", "pointwise"],
)
def test_convolutions_compile_into_one_graph(dense: nn.Module) -> None:
    """Neither the search for the order of the cores nor the dense kernel may break the graph."""
    model, x = nn.Sequential(dense).eval(), torch.randn(2, dense.in_channels, 8, 8)
    small = weft.compress(model, {"0": TensorTrain(rank=2)}).model
    torch._dynamo.reset()  # noqa: SLF001
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-5)
