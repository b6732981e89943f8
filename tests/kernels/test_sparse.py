"""The sparse chain: native against dense, in every use, and that no index leads it outside of its memory."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import SparseChain, dispatch, sparse, sparse_chain_apply

needs_native = pytest.mark.skipif(dispatch.native is None, reason="this process runs the reference")

SIZES = st.lists(st.sampled_from([1, 2, 3, 5, 8, 17, 64, 97, 300]), min_size=2, max_size=4)
BATCHES = st.sampled_from([(), (1,), (2,), (7,), (16,), (17,), (33,), (65,), (130,), (2, 3), (0,), (4, 0)])


def chain_of(sizes, density=0.3, seed=0):
    """A chain, its values and the dense product in float64, of drawn supports with empty rows among them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    product, counts, columns, values = None, [], [], []
    for rows, width in pairs:
        mask = torch.rand(rows, width, generator=generator) < density
        dense = torch.randn(rows, width, generator=generator) * mask
        counts.append(mask.sum(1))
        columns.append(mask.nonzero()[:, 1])
        values.append(dense[mask])
        product = dense.double() if product is None else product @ dense.double()
    return SparseChain(pairs, torch.cat(counts), torch.cat(columns)), torch.cat(values), product


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(y: Tensor, x: Tensor, product: Tensor, bias: Tensor | None, relative: float = 1e-5) -> None:
    expected = x.double() @ product.T + (0 if bias is None else bias.double())
    assert y.shape == expected.shape
    assert float((y.double() - expected).norm()) <= relative * max(
        float(x.double().norm() * product.norm()), float(expected.norm()), 1e-30
    )


@pytest.fixture(params=["AVX-512", "AVX2", "NEON", "portable"])
def instructions(request):
    if dispatch.native is None:
        pytest.skip("this process runs the reference")
    before = dispatch.native.instructions()
    if not dispatch.native.use_instructions(request.param):
        pytest.skip("not of this processor")
    yield request.param
    dispatch.native.use_instructions(before)


@given(
    sizes=SIZES,
    batch=BATCHES,
    bias=st.booleans(),
    threads=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def check_product(sizes, batch, bias, threads, density, seed):
    chain, values, product = chain_of(sizes, density, seed)
    x, b = drawn(*batch, sizes[-1]), drawn(sizes[0], seed=2) if bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(sparse_chain_apply(x, values, chain, b), x, product, b)
    finally:
        torch.set_num_threads(before)


def test_the_product_equals_the_dense_one_by_every_copy(instructions):
    check_product()


def test_the_reference_equals_the_dense_product():
    chain, values, product = chain_of([40, 30, 50])
    x, bias = drawn(3, 50), drawn(40)
    assert_close(sparse.reference(x, values, chain.supports(), bias), x, product, bias)


@needs_native
@pytest.mark.parametrize("columns", [65536, 65537])
def test_indices_take_16_bits_where_they_fit(columns, instructions):
    counts = torch.tensor([3, 0, 2])
    places = torch.tensor([0, 17, columns - 1, 5, columns - 1])
    chain = SparseChain([(3, columns)], counts, places)
    values, x = drawn(5), drawn(4, columns, seed=2)
    dense = torch.zeros(3, columns, dtype=torch.float64)
    dense[torch.tensor([0, 0, 0, 2, 2]), places] = values.double()
    for given_x in (x, x[0]):
        assert_close(sparse_chain_apply(given_x, values, chain), given_x, dense, None)
    packed = chain._packed.supports[0]
    assert packed.columns.dtype == (torch.uint16 if columns == 65536 else torch.int32)


@pytest.mark.parametrize("batch", [1, 2, 40, 300])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_work_is_shared_among_threads(batch, threads):
    chain, values, product = chain_of([700, 600, 500], 0.4)
    x, before = drawn(batch, 500), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(sparse_chain_apply(x, values, chain), x, product, None)
    finally:
        torch.set_num_threads(before)


def test_eight_threads_at_once_run_one_layer():
    chain, values, product = chain_of([300, 200, 257], 0.2)
    inputs = [drawn(1 + seed % 5 * 9, 257, seed=seed) for seed in range(8)]

    def work(x):
        return [sparse_chain_apply(x, values, chain) for _ in range(200)]

    with ThreadPoolExecutor(8) as executor:
        for x, results in zip(inputs, executor.map(work, inputs), strict=True):
            assert_close(results[0], x, product, None)
            assert all(torch.equal(result, results[0]) for result in results)


# ----------------------------------------------------------------------------------------------------
# Nothing but checked indices reaches the native code


@needs_native
def test_indices_changed_later_cannot_lead_the_native_code_outside():
    chain, values, product = chain_of([20, 30])
    x = drawn(4, 30)
    sparse_chain_apply(x, values, chain)
    for name in ("columns_0", "starts_0", "rows_0"):
        getattr(chain, name).data.fill_(1 << 30)
    assert_close(sparse_chain_apply(x, values, chain), x, product, None)


@needs_native
@pytest.mark.parametrize(
    ("name", "bad"),
    [("columns_0", -1), ("columns_0", 30), ("columns_0", 1 << 30), ("starts_0", -1), ("starts_0", 1 << 30)],
)
def test_indices_changed_before_the_first_call_are_refused(name, bad):
    chain, values, _ = chain_of([20, 30])
    getattr(chain, name)[3] = bad
    with pytest.raises(ValueError, match="support must be one of a 20 x 30 matrix"):
        sparse_chain_apply(drawn(4, 30), values, chain)


@needs_native
def test_the_operation_packs_again_when_its_indices_change():
    chain, values, product = chain_of([20, 30])
    x = drawn(4, 30)
    tensors = list(chain.support(0)[1:])
    for _ in range(2):
        assert_close(torch.ops.weft.sparse_chain_apply(x, values, tensors, [20, 30], None), x, product, None)
    kept = sparse._kept[tensors[0]]
    assert sparse._pack_once(chain.support(0)) is kept[2]
    tensors[0][0] = 29 if int(tensors[0][0]) != 29 else 28
    changed = torch.zeros(20, 30, dtype=torch.float64).index_put_(
        (tensors[2].long(), tensors[0].long()), values.double(), accumulate=True
    )
    assert_close(torch.ops.weft.sparse_chain_apply(x, values, tensors, [20, 30], None), x, changed, None)
    tensors[0][0] = 30
    with pytest.raises(ValueError, match="support must be"):
        torch.ops.weft.sparse_chain_apply(x, values, tensors, [20, 30], None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(4, 29)},
        {"x": torch.zeros(4, 31)},
        {"x": torch.tensor(1.0)},
        {"values": torch.zeros(5)},
        {"bias": torch.zeros(19)},
    ],
    ids=lambda wrong: "-".join(f"{name}{tuple(value.shape)}" for name, value in wrong.items()),
)
def test_shapes_that_do_not_fit_raise(wrong):
    chain, values, _ = chain_of([20, 30])
    given_tensors = {"x": torch.zeros(4, 30), "values": values, "bias": torch.zeros(20), **wrong}
    with pytest.raises((RuntimeError, ValueError)):
        sparse_chain_apply(chain=chain, **given_tensors)


def test_supports_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="sizes must be those of a chain"):
        SparseChain([(2, 3), (4, 5)], torch.ones(6), torch.zeros(6))
    with pytest.raises(ValueError, match="sizes must be those of a chain"):
        SparseChain([(2, 0)], torch.zeros(2), torch.zeros(0))
    with pytest.raises(ValueError, match="columns must be of shape"):
        SparseChain([(2, 3)], torch.tensor([1, 1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="columns must be below 3, got 3"):
        SparseChain([(2, 3)], torch.tensor([1, 1]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="columns must be at least 0, got -1"):
        SparseChain([(2, 3)], torch.tensor([1, 1]), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="counts must be"):
        SparseChain([(2, 3)], torch.tensor([-1, 2]), torch.tensor([0]))


def test_values_are_read_where_they_are():
    chain, values, product = chain_of([20, 10, 30])
    x = drawn(2, 30)
    sparse_chain_apply(x, values, chain)
    values.data.mul_(2)  # round the version counter
    assert_close(sparse_chain_apply(x, values, chain), x, 4 * product, None)


def test_copies_and_pickles_pack_for_themselves():
    chain, values, product = chain_of([20, 30])
    x = drawn(2, 30)
    sparse_chain_apply(x, values, chain)
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert other._packed is None
        assert_close(sparse_chain_apply(x, values, other), x, product, None)
    assert chain.state_dict() == {}


# ----------------------------------------------------------------------------------------------------
# The operation


def operation(x, values, chain, bias):
    tensors = [tensor for support in chain.supports() for tensor in support[1:]]
    return torch.ops.weft.sparse_chain_apply(
        x, values, tensors, [side for size in chain.sizes for side in size], bias
    )


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_the_operation_has_the_gradients_of_the_reference(batch, wanted):
    chain, values, _ = chain_of([11, 5, 8, 7])
    given_tensors = (drawn(*batch, 7), values, drawn(11, seed=3))
    ours, theirs = [[tensor.clone() for tensor in given_tensors] for _ in range(2)]
    for index in wanted:
        ours[index].requires_grad_()
        theirs[index].requires_grad_()
    y = operation(ours[0], ours[1], chain, ours[2])
    expected = sparse.reference(theirs[0], theirs[1], chain.supports(), theirs[2])
    direction = drawn(*y.shape, seed=4)
    torch.testing.assert_close(y, expected)
    y.backward(direction)
    expected.backward(direction)
    for index in wanted:
        torch.testing.assert_close(ours[index].grad, theirs[index].grad)


def test_gradients_equal_finite_differences():
    chain, values, _ = chain_of([6, 4, 5])
    x, bias = drawn(3, 5).double().requires_grad_(), drawn(6).double().requires_grad_()
    values = values.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: operation(given[0], given[1], chain, given[2]), (x, values, bias)
    )


def test_the_operation_obeys_the_dispatchers_rules():
    chain, values, _ = chain_of([6, 4, 5])
    tensors = [tensor for support in chain.supports() for tensor in support[1:]]
    for batch in [(3,), (2, 3), (0,), ()]:
        for bias in (drawn(6).requires_grad_(), None):
            x, sizes = drawn(*batch, 5).requires_grad_(), [6, 4, 4, 5]
            arguments = (x, values.clone().requires_grad_(), tensors, sizes, bias)
            torch.library.opcheck(torch.ops.weft.sparse_chain_apply.default, arguments)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.chain, values, self.product = chain_of([12, 9, 10])
        self.values, self.bias = torch.nn.Parameter(values), torch.nn.Parameter(drawn(12))

    def forward(self, x):
        return sparse_chain_apply(x, self.values, self.chain, self.bias)


def test_compiles_into_one_graph_that_holds_the_operation_and_packs_once(monkeypatch):
    layer, x, graphs, made = Layer(), drawn(3, 10), [], []
    packing = sparse._PackedSupport
    monkeypatch.setattr(sparse, "_PackedSupport", lambda support: made.append(1) or packing(support))

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert "torch.ops.weft.sparse_chain_apply" in graphs[0].code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(4):
            assert_close(compiled(x), x, layer.product, layer.bias.detach())
    assert len(made) == (0 if dispatch.native is None else 2)
    compiled(x).square().sum().backward()
    expected = torch.autograd.grad(layer(x).square().sum(), [layer.values, layer.bias])
    torch.testing.assert_close([layer.values.grad, layer.bias.grad], list(expected))


def test_exported_program_needs_no_operation_of_ours():
    layer, x = Layer(), drawn(3, 10)
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert not [node for node in program.graph.nodes if "weft" in str(node.target)]
    larger = drawn(9, 10)
    assert_close(program.module()(larger).detach(), larger, layer.product, layer.bias.detach())


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-7), (torch.bfloat16, 3e-2)])
def test_other_dtypes_take_the_reference(dtype, relative):
    chain, values, product = chain_of([12, 9, 10])
    x, bias = drawn(3, 10).to(dtype), drawn(12).to(dtype)
    y = sparse_chain_apply(x, values.to(dtype), chain, bias)
    assert y.dtype == dtype
    assert_close(y, x, product, bias, relative)
