"""What is particular to products of sparse matrices: storage, gradients, initialisation, quality."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.kernels.sparse import _gather_and_add
from weft.numerics.palm4msa import largest_entries, palm4msa
from weft.structures.base import DenseGram, Geometry, StructuredMatrix, relative_error
from weft.structures.sparse_product import (
    SparseProduct,
    SparseProductMatrix,
    _narrow,
    _widen,
)


def weight_of(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def initialised(structure: SparseProduct, shape: tuple[int, ...], **options) -> SparseProductMatrix:
    return structure.initialise(shape, **options)


def scipy_factors(member: SparseProductMatrix) -> list[np.ndarray]:
    """The factors decoded from the stored bytes alone, with numpy."""
    stored = {name: tensor.numpy() for name, tensor in member.stored().items()}

    def integers(packed: np.ndarray) -> np.ndarray:
        return packed.astype(np.int64) @ (256 ** np.arange(packed.shape[1]))

    columns, counts = integers(stored["columns"]), integers(stored["counts"])
    factors, row, entry = [], 0, 0
    for size in member.structure.factor_shapes(member.shape):
        factor = np.zeros(size)
        for i in range(size[0]):
            for _ in range(counts[row]):
                factor[i, columns[entry]] = stored["values"][entry]
                entry += 1
            row += 1
        factors.append(factor)
    assert (row, entry) == (len(counts), len(columns))
    return factors


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (300, 40), (7, 7)])
def test_the_stored_bytes_alone_give_the_matrix(shape: tuple[int, int]) -> None:
    member = initialised(SparseProduct(3, 2, "random"), shape, dtype=torch.float64)
    product = np.linalg.multi_dot(scipy_factors(member))
    np.testing.assert_allclose(member.to_dense().detach().numpy(), product, atol=1e-12)


@pytest.mark.parametrize(("inputs", "width"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_indices_take_the_smallest_integer_type(inputs: int, width: int) -> None:
    member = initialised(SparseProduct(1, 1, "random"), (3, inputs))
    assert member.columns.shape == (inputs, width)
    assert member.cost().parameters == inputs
    assert member.cost().bytes == member.values.nbytes + member.columns.nbytes + member.counts.nbytes
    assert set(member.state_dict()) == {"values", "columns", "counts"}
    assert [name for name, _ in member.named_parameters()] == ["values"]


def test_narrow_and_widen_are_inverse() -> None:
    numbers = torch.tensor([0, 1, 255, 256, 65535, 65536, 1 << 30])
    assert torch.equal(_widen(_narrow(numbers, 4)), numbers)


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20), (1, 5)])
def test_a_random_support_has_k_entries_in_every_row_and_column(shape: tuple[int, int]) -> None:
    sparsity = min(3, *shape)
    member = initialised(SparseProduct(2, sparsity, "random"), shape)
    for factor in member.dense_factors():
        present = factor != 0
        assert int(present.sum(0).min()) >= sparsity
        assert int(present.sum(1).min()) >= sparsity
        assert int(present.sum()) == sparsity * max(factor.shape)
    other = initialised(
        SparseProduct(2, sparsity, "random"), shape, generator=torch.Generator().manual_seed(1)
    )
    assert min(shape) == 1 or not torch.equal(other.columns, member.columns)


def test_initial_values_are_scaled_by_the_connections() -> None:
    member = initialised(SparseProduct(3, 16, "random"), (512, 512))
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    first = member.dense_factors()[-1].detach()
    # He on the factor that meets the input doubles the variance, Xavier on the others keeps it.
    assert float(first[first != 0].std()) == pytest.approx(math.sqrt(2 / 16), rel=0.05)
    assert float(member(x).detach().square().mean()) == pytest.approx(2.0, rel=0.2)


def test_reinitialised_values_stand_on_the_same_support() -> None:
    member = SparseProduct(2, 4).fit(weight_of((24, 30)))
    again = member.reinitialise(generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.columns, member.columns)
    assert torch.equal(again.counts, member.counts)
    assert not torch.equal(again.values, member.values)
    assert 0.1 < float(again.values.detach().square().mean().sqrt()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gathering_product_and_its_gradients_equal_the_dense_ones(dtype: torch.dtype) -> None:
    member = initialised(SparseProduct(3, 5, "random"), (40, 56), dtype=dtype)
    x = weight_of((17, 56), 1, dtype).requires_grad_()
    probe = weight_of((17, 40), 2, dtype)
    (member(x) * probe).sum().backward()
    gradients = (x.grad, member.values.grad)
    x.grad = member.values.grad = None
    ((x @ member.to_dense().T) * probe).sum().backward()
    for got, expected in zip(gradients, (x.grad, member.values.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_exported_composition_equals_the_eager_route() -> None:
    member = initialised(SparseProduct(1, 5, "random"), (40, 56))
    x = weight_of((56, 9))
    expected = member(x.T).T
    torch.testing.assert_close(_gather_and_add(member.values, x, member.chain.support(0)), expected)


def test_functorch_transforms_see_plain_operations() -> None:
    member = initialised(SparseProduct(2, 3, "random"), (8, 10), dtype=torch.float64)
    x = weight_of((4, 10), 1, torch.float64)
    torch.testing.assert_close(torch.func.vmap(member)(x), member(x))
    jacobian = torch.func.jacrev(member)(x[0])
    torch.testing.assert_close(jacobian, member.to_dense())
    _, tangent = torch.func.jvp(member, (x,), (x,))
    torch.testing.assert_close(tangent, member(x))


def test_training_lowers_the_loss_and_leaves_the_support() -> None:
    target = weight_of((20, 24))
    member = initialised(SparseProduct(2, 6, "random"), (20, 24))
    columns = member.columns.clone()
    optimiser = torch.optim.Adam(member.parameters(), lr=0.02)
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(150):
        loss = (member(x) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(member.columns, columns)


def test_the_member_moves_to_half_precision_and_back_with_its_indices() -> None:
    member = initialised(SparseProduct(2, 3, "random"), (20, 30))
    x = weight_of((5, 30))
    half = initialised(SparseProduct(2, 3, "random"), (20, 30)).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), member(x), rtol=0.05, atol=0.05)


def test_a_convolution_runs_on_the_matrix_of_its_patches() -> None:
    shape = (12, 5, 3, 3)
    member = SparseProduct(2, 6, "splitting").fit(weight_of(shape))
    assert member.to_dense().shape == shape
    geometry = Geometry(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), input_size=(8, 8))
    x = weight_of((2, 5, 8, 8), 3)
    expected = torch.nn.functional.conv2d(x, member.to_dense(), padding=1)
    torch.testing.assert_close(member.convolve(x, geometry), expected, rtol=1e-4, atol=1e-4)
    assert member.multiply_adds(geometry) == member.to_dense().numel() * 64  # it runs by the dense kernel


def test_one_factor_prunes_to_the_pattern() -> None:
    weight = weight_of((20, 30), dtype=torch.float64)
    member = SparseProduct(1, 5).fit(weight)
    torch.testing.assert_close(member.to_dense(), weight * largest_entries(weight.float(), 5))


def test_the_plain_palm4msa_fit_is_no_worse_than_the_published_algorithm() -> None:
    weight = weight_of((40, 50))
    published = palm4msa(weight, 5, 2)
    member = SparseProduct(2, 5).fit(weight)
    assert relative_error(weight, member.to_dense()) <= published.error + 1e-6


def test_the_weighted_fit_is_far_better_in_the_weighted_norm() -> None:
    weight = weight_of((48, 64))
    x = torch.relu(weight_of((400, 64), 1) @ weight_of((64, 64), 2) / 8 + 0.5)
    gram = DenseGram((x.T @ x / len(x)).double())
    structure = SparseProduct(2, 8)
    plain, weighted = structure.fit(weight), structure.fit(weight, input_gram=gram)
    errors = [relative_error(weight, member.to_dense(), input_gram=gram) for member in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def test_a_zero_weight_is_fitted_and_keeps_entries_to_train() -> None:
    member = SparseProduct(2, 2).fit(torch.zeros(6, 9))
    assert not bool(member.to_dense().any())
    assert member.values.numel() > 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (13, 1), (2, 400), (400, 2), (17, 19)])
@pytest.mark.parametrize("algorithm", ["palm4msa", "splitting", "hierarchical", "random"])
def test_odd_shapes_work(shape: tuple[int, int], algorithm: str) -> None:
    weight = weight_of(shape)
    member: StructuredMatrix = SparseProduct(2, 1, algorithm).fit(weight)
    assert torch.isfinite(member.to_dense()).all()
    assert relative_error(weight, member.to_dense()) <= 1 + 1e-6


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity must be between 1 and 5 for a \(5, 9\) weight, got 6"):
        SparseProduct(2, 6).fit(weight_of((5, 9)))
    with pytest.raises(ValueError, match="factors must be at least 1, got 0"):
        SparseProduct(0, 1)
    with pytest.raises(TypeError, match="sparsity must be a whole number"):
        SparseProduct(2, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="algorithm must be one of 'palm4msa'"):
        SparseProduct(2, 1, "magic")


def test_loaded_state_brings_its_own_support() -> None:
    structure = SparseProduct(2, 3, "random")
    member = initialised(structure, (20, 30))
    other = initialised(structure, (20, 30), generator=torch.Generator().manual_seed(5))
    x = weight_of((4, 30))
    member(x)
    member.load_state_dict(other.state_dict())
    torch.testing.assert_close(member(x), other(x))
    torch.testing.assert_close(member.to_dense(), other.to_dense())


def test_indices_that_do_not_fit_are_refused() -> None:
    member = initialised(SparseProduct(2, 3, "random"), (20, 30))
    stored = member.stored()
    wrong = {**stored, "columns": torch.full_like(stored["columns"], 255)}
    with pytest.raises(ValueError, match="columns must be below 20"):
        member.structure.from_tensors((20, 30), wrong)
    with pytest.raises(ValueError, match="columns must be of shape"):
        member.structure.from_tensors((20, 30), {**stored, "columns": stored["columns"][:-1]})


def test_the_random_count_is_known_before_the_fit() -> None:
    structure = SparseProduct(3, 4, "random")
    member = structure.fit(weight_of((20, 36)))
    assert structure.parameter_count((20, 36)) == member.cost().parameters == 4 * (20 + 20 + 36)
    assert SparseProduct(3, 4).parameter_count((20, 36)) is None
