"""How families that know only matrices run convolutions: the dense kernel formed once, or patches."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.layers.convolution import StructuredConvolution
from weft.structures import base
from weft.structures.base import Geometry, matrix_multiply_adds, runs_dense
from weft.structures.sparse_product import SparseProduct, SparseProductMatrix

SHAPE = (8, 4, 3, 3)
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), input_size=(6, 5))
X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def member() -> SparseProductMatrix:
    made = SparseProduct(1, 4, "random").initialise(SHAPE, generator=torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture
def formed(member: SparseProductMatrix, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per time that the dense kernel is formed."""
    calls: list[int] = []
    own = type(member).to_dense

    def counted(self: SparseProductMatrix) -> Tensor:
        calls.append(1)
        return own(self)

    monkeypatch.setattr(SparseProductMatrix, "to_dense", counted)
    return calls


def test_the_kernel_is_formed_once_in_evaluation(member: SparseProductMatrix, formed: list[int]) -> None:
    with torch.inference_mode():
        first = member.convolve(X, GEOMETRY)
    with torch.no_grad():
        second = member.convolve(X, GEOMETRY)
    assert len(formed) == 1
    assert torch.equal(first, second)
    assert member.derived_bytes() == 4 * 8 * 4 * 9
    # What inference mode kept serves a call that needs the gradient of its input.
    member.requires_grad_(requires_grad=False)
    x = X.clone().requires_grad_()
    member.convolve(x, GEOMETRY).sum().backward()
    assert len(formed) == 1
    assert x.grad is not None


@pytest.mark.parametrize("change", ["in place", "optimiser", "load", "data", "dtype"])
def test_the_kernel_is_formed_again_when_a_tensor_has_changed(
    member: SparseProductMatrix, formed: list[int], change: str
) -> None:
    with torch.no_grad():
        member.convolve(X, GEOMETRY)
    x = X
    match change:
        case "in place":
            with torch.no_grad():
                member.values.mul_(2)
        case "optimiser":
            member.values.grad = torch.ones_like(member.values)
            torch.optim.SGD(member.parameters(), lr=0.1).step()
        case "load":
            member.load_state_dict({**member.state_dict(), "values": 2 * member.values.detach()})
        case "data":
            member.values.data = 2 * member.values.data
        case _:
            member.double()
            x = X.double()
    with torch.no_grad():
        got = member.convolve(x, GEOMETRY)
        assert len(formed) == 2
        torch.testing.assert_close(got, F.conv2d(x, member.to_dense(), padding=1))


def test_training_keeps_nothing_and_gives_gradients(member: SparseProductMatrix, formed: list[int]) -> None:
    with torch.no_grad():
        member.convolve(X, GEOMETRY)
    assert member.derived_bytes()
    member.train()
    assert not member.derived_bytes()
    for _ in range(2):
        member.zero_grad()
        member.convolve(X, GEOMETRY).square().sum().backward()
    assert not member.derived_bytes()
    dense = member.to_dense().detach().requires_grad_()
    F.conv2d(X, dense, padding=1).square().sum().backward()
    support = member.to_dense() != 0
    expected = dense.grad[support.reshape(SHAPE)]
    torch.testing.assert_close(member.values.grad.sum(), expected.sum(), rtol=1e-4, atol=1e-4)
    member.eval()
    before = len(formed)
    for _ in range(2):  # in evaluation too, while a gradient for the stored tensors is recorded
        assert member.convolve(X, GEOMETRY).requires_grad
    assert len(formed) == before + 2


def test_what_is_kept_is_no_part_of_state_copies_and_pickles(member: SparseProductMatrix) -> None:
    size, names = len(pickle.dumps(member)), set(member.state_dict())
    with torch.no_grad():
        member.convolve(X, GEOMETRY)
    assert member.derived_bytes()
    assert len(pickle.dumps(member)) < size + 100 < size + member.derived_bytes()
    assert set(member.state_dict()) == names
    for again in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
        assert not again.derived_bytes()
        with torch.no_grad():
            assert torch.equal(again.convolve(X, GEOMETRY), member.convolve(X, GEOMETRY))
    member.forget()
    assert not member.derived_bytes()


def test_a_compiler_sees_no_kept_kernel(member: SparseProductMatrix) -> None:
    layer = StructuredConvolution(member, GEOMETRY).eval()
    with torch.no_grad():
        expected = layer(X)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
        member.values.mul_(2)
        torch.testing.assert_close(compiled(X), 2 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_autocast_takes_the_same_route_with_as_exact_a_kernel(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    member = SparseProduct(2, 4, "random").initialise(SHAPE, generator=torch.Generator().manual_seed(0))
    member.train(training)
    kernel = member.to_dense().detach()
    monkeypatch.setattr(F, "unfold", None)
    with torch.autocast("cpu", torch.bfloat16):
        got = member.convolve(X, GEOMETRY)
        assert torch.equal(got, F.conv2d(X, kernel, padding=1))
    assert got.dtype == torch.bfloat16
    assert not member.derived_bytes()
    if training:
        got.sum().backward()
        assert all(value.grad is not None for value in member.parameters())


def test_few_multiply_adds_are_unfolded_in_pieces(formed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "UNFOLDED_SHARE", 1.0)
    member = SparseProduct(1, 4, "random").initialise((8, 4, 1, 1)).eval()
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    sizes = []
    own = F.unfold
    monkeypatch.setattr(F, "unfold", lambda x, *rest: (sizes.append(len(x)), own(x, *rest))[1])
    monkeypatch.setattr(base, "PIECE", 2 * 4 * 56)
    with torch.no_grad():
        got = member.convolve(X, geometry)
        assert sizes == [2, 1]
        assert not formed
        torch.testing.assert_close(got, F.conv2d(X, member.to_dense(), padding=1))


def test_counts_say_which_route_runs(member: SparseProductMatrix) -> None:
    dense = 8 * 4 * 9 * 30
    few, many, point = 3, 20, (8, 4, 1, 1)
    assert runs_dense(few, SHAPE, GEOMETRY)
    assert matrix_multiply_adds(few, SHAPE, GEOMETRY) == dense
    assert runs_dense(many, point, GEOMETRY)
    assert not runs_dense(few, point, GEOMETRY)
    assert matrix_multiply_adds(many, point, GEOMETRY) == 8 * 4 * 8 * 7  # with padding, more positions
    assert matrix_multiply_adds(few, point, GEOMETRY) == few * 8 * 7
    grouped = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), groups=2, input_size=(6, 5))
    assert matrix_multiply_adds(few, SHAPE, grouped) == dense  # a grouped one is not unfolded
    assert member.multiply_adds(GEOMETRY) == dense
    assert nn.Conv2d(4, 8, 3).weight.numel() * 30 == dense
