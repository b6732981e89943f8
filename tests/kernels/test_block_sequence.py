"""Programs of block products: native against float64, stale weights, wrong sizes, compilers, threads."""

import copy
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft.kernels import block_sequence, dispatch
from weft.kernels.block_sequence import Segment, Space, Step, write_program
from weft.layers.linear import StructuredLinear
from weft.structures.hierarchical import Hierarchical
from weft.structures.semiseparable import SequentiallySemiseparable

needs_native = pytest.mark.skipif(dispatch.native is None, reason="this process runs the reference")
INSTRUCTIONS = ["portable", "NEON", "AVX2", "AVX-512"]


def rank_two_states(outputs, inputs, rank, *, strided=False, orders=False):
    """A program with both phases: states from inputs, then outputs from both; and its flat tensors.

    The second block over the outputs is `strided`: a part of the columns of a wider one. With `orders`
    inputs are gathered in another order, with some more of them that the states' sums start from, and
    outputs are permuted.
    """
    generator = torch.Generator().manual_seed(outputs * 31 + inputs * 7 + rank)
    spare = 3 if strided else 0
    right = torch.randn(inputs * rank, generator=generator)
    both = torch.randn(inputs * outputs + rank * (outputs + spare), generator=generator)
    gathered = None
    if orders:
        more = torch.randint(inputs, (rank,), generator=generator)
        gathered = torch.cat([torch.randperm(inputs, generator=generator), more])
    source, first = (Space.STATE, inputs + rank) if orders else (Space.INPUT, 0)
    reduced = (Segment(0, 0, rank, source, 0, inputs),)
    states = [[Step(Space.STATE, first, rank, reduced, inputs if orders else None)]]
    direct = Segment(1, 0, outputs, source, 0, inputs)
    left = Segment(1, inputs * outputs, outputs + spare, Space.STATE, first, rank)
    middle = (outputs + 1) // 2
    written = [
        [Step(Space.OUTPUT, begin, end - begin, (moved(direct, begin), moved(left, begin)))]
        for begin, end in ((0, middle), (middle, outputs))
        if end > begin
    ]
    output_places = torch.randperm(outputs, generator=generator) if orders else None
    program = write_program(
        inputs,
        outputs,
        first + rank,
        [right.numel(), both.numel()],
        [states, written],
        gathered=gathered,
        output_places=output_places,
    )
    d = both[: inputs * outputs].view(inputs, outputs)
    lower = both[inputs * outputs :].view(rank, outputs + spare)[:, :outputs]
    picks = torch.zeros(inputs, rank, dtype=torch.float64)
    order = torch.arange(inputs)
    if orders:
        picks[gathered[inputs:], torch.arange(rank)] = 1.0
        order = gathered[:inputs].argsort()  # of the blocks' rows, for inputs as they come
    d, reduced = d.double()[order], right.view(inputs, rank).double()[order]
    dense = (d + (reduced + picks) @ lower.double()).T
    size = (d.abs() + (reduced.abs() + picks) @ lower.double().abs()).T
    if orders:
        dense, size = dense[output_places], size[output_places]
    return program, [right, both], dense, size


def moved(segment, columns):
    return segment._replace(start=segment.start + columns)


def refuse(x, bias):
    raise AssertionError("the composition ran where the native code should have")


def assert_close(y, x, bias, dense, size, relative=1e-5):
    expected = x.double() @ dense.T
    scale = x.double().abs() @ size.T
    if bias is not None:
        expected, scale = expected + bias, scale + bias.abs()
    assert y.shape == expected.shape
    # Rounding grows with the sum of absolute values, not with a result that may cancel.
    assert ((y.double() - expected).abs() <= relative * scale).all()


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 97, 130, 257])


@needs_native
@pytest.mark.parametrize("name", INSTRUCTIONS)
@settings(deadline=None, max_examples=60)
@given(
    batch=st.sampled_from([(), (0,), (1,), (2,), (3,), (5,), (7,), (2, 3), (13,), (16,), (29,), (200,)]),
    outputs=SIZES,
    inputs=SIZES,
    rank=SIZES,
    strided=st.booleans(),
    orders=st.booleans(),
    bias=st.booleans(),
)
def test_every_copy_of_the_kernel_equals_the_dense_product(
    name, batch, outputs, inputs, rank, strided, orders, bias
):
    before = dispatch.native.instructions()
    if not dispatch.native.use_instructions(name):
        pytest.skip(f"{name} instructions are not to be had here")
    try:
        program, matrices, dense, size = rank_two_states(
            outputs, inputs, rank, strided=strided, orders=orders
        )
        x = torch.randn(*batch, inputs)
        bias = torch.randn(outputs) if bias else None
        y = block_sequence.block_sequence_apply(x, matrices, program, bias, refuse)
        assert_close(y, x, bias, dense, size)
    finally:
        dispatch.native.use_instructions(before)


@settings(deadline=None, max_examples=40)
@given(outputs=SIZES, inputs=SIZES, rank=SIZES, orders=st.booleans(), bias=st.booleans())
def test_reference_equals_the_dense_product(outputs, inputs, rank, orders, bias):
    program, matrices, dense, size = rank_two_states(outputs, inputs, rank, strided=True, orders=orders)
    x, bias = torch.randn(2, 3, inputs), torch.randn(outputs) if bias else None
    assert_close(block_sequence.reference(x, matrices, program.code, bias), x, bias, dense, size)


def in_two_parts(outputs, inputs, own):
    """A program whose second phase reads outputs of the first, in another order; and its flat tensors."""
    generator = torch.Generator().manual_seed(outputs * 31 + inputs * 7 + own)
    rest = outputs - own
    first, second = (torch.randn(n, generator=generator) for n in (inputs * own, own * rest))
    phases = [
        [[Step(Space.OUTPUT, 0, own, (Segment(0, 0, own, Space.INPUT, 0, inputs),))]],
        [[Step(Space.OUTPUT, own, rest, (Segment(1, 0, rest, Space.OUTPUT, 0, own),))]],
    ]
    places = torch.randperm(outputs, generator=generator)
    sizes = [first.numel(), second.numel()]
    program = write_program(inputs, outputs, 0, sizes, phases, output_places=places)
    skeleton, combinations = first.view(inputs, own).double(), second.view(own, rest).double()
    dense = torch.cat([skeleton, skeleton @ combinations], 1)[:, places].T
    size = torch.cat([skeleton.abs(), skeleton.abs() @ combinations.abs()], 1)[:, places].T
    return program, [first, second], dense, size


@pytest.mark.parametrize("batch", [1, 2, 13, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_phase_reads_what_earlier_ones_gave_as_output(batch, bias):
    program, matrices, dense, size = in_two_parts(37, 21, 9)
    x, bias = torch.randn(batch, 21), torch.randn(37) if bias else None
    assert_close(block_sequence.reference(x, matrices, program.code, bias), x, bias, dense, size)
    if dispatch.native is not None:
        y = block_sequence.block_sequence_apply(x, matrices, program, bias, refuse)
        assert_close(y, x, bias, dense, size)


def test_gradients_pass_through_outputs_that_are_read():
    program, matrices, dense, _ = in_two_parts(11, 7, 4)
    x, first, second = (t.double().requires_grad_() for t in (torch.randn(3, 7), *matrices))
    own = x @ first.view(7, 4)
    both = torch.cat([own, own @ second.view(4, 7)], 1)
    # The program's output places, found again from its dense matrix.
    rows = (torch.cat([first.view(7, 4), first.view(7, 4) @ second.view(4, 7)], 1).T).detach()
    places = torch.cdist(dense, rows).argmin(1)
    g = torch.randn(3, 11, dtype=torch.float64)
    expected = torch.autograd.grad(both[:, places], [x, first, second], g)
    kept = g.clone()
    with torch.no_grad():
        by_x, by_matrix = block_sequence.gradients(g, x, [first, second], program.code)
    for mine, theirs in zip([by_x, *by_matrix], expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(g, kept)


def test_outputs_are_read_after_their_phase_and_before_their_bias_only():
    first = Step(Space.OUTPUT, 0, 3, (Segment(0, 0, 3, Space.INPUT, 0, 2),))
    second = Step(Space.OUTPUT, 3, 2, (Segment(1, 0, 2, Space.OUTPUT, 0, 3),))
    places = torch.arange(5)
    write_program(2, 5, 0, [6, 6], [[[first]], [[second]]], output_places=places)
    for phases in ([[[first], [second]]], [[[second]], [[first]]]):
        with pytest.raises(ValueError, match="reads outside"):
            write_program(2, 5, 0, [6, 6], phases, output_places=places)
    with pytest.raises(ValueError, match="reads outside"):
        write_program(2, 5, 0, [6, 6], [[[first]], [[second]]])


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_threads_share_the_work_and_give_the_same_product(threads, batch):
    # Large enough for every thread to be worth waking, with both a shared phase and a divided batch.
    member = Hierarchical(rank=20).initialise((1500, 1100), generator=torch.Generator().manual_seed(0))
    x = torch.randn(batch, 1100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y = member(x)
    finally:
        torch.set_num_threads(before)
    expected = x.double() @ member.to_dense().detach().double().T
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@needs_native
def test_native_product_writes_nothing_outside_its_output(results_go_to):
    program, matrices, _, _ = rank_two_states(37, 21, 5, orders=True)
    memory = torch.full((64 + 3 * 37 + 64,), 7.0)
    x = torch.randn(3, 21)
    results_go_to(memory[64:-64].view(3, 37))
    block_sequence.block_sequence_apply(x, matrices, program, None, refuse)
    assert (memory[:64] == 7).all()
    assert (memory[-64:] == 7).all()
    assert (memory[64:-64] != 7).all()


@pytest.mark.parametrize(
    ("step", "word"),
    [
        (Step(Space.OUTPUT, 3, 3, ()), "writes"),
        (Step(Space.OUTPUT, -1, 3, ()), "writes"),
        (Step(Space.INPUT, 0, 3, ()), "writes"),
        (Step(Space.STATE, 0, 3, ()), "writes"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, 0, 5, Space.INPUT, 0, 4),)), "reads"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, 1, 5, Space.INPUT, 0, 3),)), "reads"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, -1, 5, Space.INPUT, 0, 2),)), "reads"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, 0, -1, Space.INPUT, 0, 2),)), "reads"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, 0, 5, Space.STATE, 2, 3),)), "reads"),
        (Step(Space.OUTPUT, 0, 5, (Segment(0, 0, 5, Space.OUTPUT, 0, 3),)), "reads"),
        (Step(Space.STATE, 1, 1, ()), "writes"),
        (Step(Space.STATE, 2, 2, (), 1), "starts"),
        (Step(Space.STATE, 2, 2, (), -2), "starts"),
        (Step(Space.OUTPUT, 0, 2, (), 0), "starts"),
    ],
)
def test_program_that_leaves_its_arrays_is_refused(step, word):
    with pytest.raises(ValueError, match=word):
        write_program(3, 5, 4, [15], [[[step]]], gathered=torch.tensor([2, 0]))


@pytest.mark.parametrize("order", [torch.tensor([0, 3]), torch.tensor([0, 1, 2]), torch.tensor([-1, 0])])
def test_order_that_leaves_its_array_is_refused(order):
    with pytest.raises(ValueError, match="gathered"):
        write_program(3, 5, 2, [15], [], gathered=order)
    with pytest.raises(ValueError, match="places"):
        write_program(3, 2, 2, [15], [], output_places=order)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(4, 20)},
        {"x": torch.tensor(1.0)},
        {"x": torch.zeros(4, 21).double()},
        {"x": torch.zeros(21, 4).T},
        {"matrix": torch.zeros(21 * 5 - 1)},
        {"matrix": torch.zeros(21 * 5).double()},
        {"matrix": torch.zeros(2 * 21 * 5)[::2]},
        {"bias": torch.zeros(36)},
        {"bias": torch.zeros(37, 1)},
        {"x": torch.zeros(4, 21, device="meta")},
    ],
    ids=str,
)
def test_what_does_not_fit_never_reaches_the_native_code(wrong):
    program, (right, both), _, _ = rank_two_states(37, 21, 5)
    arguments = {"x": torch.zeros(4, 21), "matrix": right, "bias": torch.zeros(37), **wrong}
    result = block_sequence.block_sequence_apply(
        arguments["x"], [arguments["matrix"], both], program, arguments["bias"], lambda x, bias: "composed"
    )
    assert result == "composed"


MEMBERS = {
    "weak": (Hierarchical(rank=3, leaf_size=8), (61, 47)),
    "strong": (Hierarchical(rank=1, leaf_size=4, admissibility="strong"), (61, 47)),
    "uniform": (Hierarchical(rank=2, leaf_size=8, admissibility="uniform", clustering="principal"), (61, 47)),
    "adaptive": (Hierarchical(tolerance=0.3, leaf_size=4, admissibility="adaptive"), (40, 48)),
    "grid": (
        Hierarchical(rank=1, leaf_size=4, clustering="geometric", row_grid=(7, 9), column_grid=(6, 8)),
        (63, 48),
    ),
    "own columns": (Hierarchical(rank=24, leaf_size=32), (140, 136)),
    "own columns, moved": (Hierarchical(rank=24, leaf_size=32, clustering="principal"), (140, 136)),
    "semiseparable": (SequentiallySemiseparable(5, 3), (61, 47)),
    "few states": (SequentiallySemiseparable(4, ((0, 2, 1), (1, 0, 2))), (61, 47)),
    "no states": (SequentiallySemiseparable(5, 0), (61, 47)),
}
each_member = pytest.mark.parametrize("name", MEMBERS)


def member_of(name):
    structure, shape = MEMBERS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return structure.fit(weight)


@needs_native
def test_what_a_program_cannot_read_is_left_to_the_composition():
    step = Step(Space.OUTPUT, 0, 3, (Segment(0, 0, 3, Space.INPUT, 0, 2),))
    program = write_program(2, 3, 0, [6], [[[step]]], names=["flat"])
    x, flat = torch.randn(2), torch.randn(6)
    composed = torch.full((3,), 7.0)

    def apply(matrices):
        return block_sequence.block_sequence_apply(x, matrices, program, None, lambda x, bias: composed)

    assert torch.allclose(apply({"other": x, "flat": flat}), x @ flat.view(2, 3))
    for left_alone in (
        {"other": flat},
        {"flat": None},
        {"flat": flat[:5]},
        [],
        [flat, flat],
        {"flat": x.tolist()},
    ):
        assert apply(left_alone) is composed
    with pytest.raises(TypeError, match="matrices in a list, tuple or dict"):
        apply(flat)


def test_parametrised_members_and_copies_compute_the_same():
    member = Hierarchical(rank=2, leaf_size=8).fit(torch.randn(40, 30))
    x = torch.randn(3, 30)
    with torch.no_grad():
        y = member(x)
        for copied in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
            assert torch.equal(copied(x), y)
        torch.nn.utils.parametrize.register_parametrization(member, "strips", Doubled())
        expected = x.double() @ member.to_dense().double().T
        torch.testing.assert_close(
            member(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
        assert not torch.allclose(member(x), y)


class Doubled(torch.nn.Module):
    """A parametrisation."""

    def forward(self, values):
        return 2 * values


def dense_product(member, x):
    return x.double() @ member.to_dense().detach().double().T


@each_member
@pytest.mark.parametrize("batch", [(1,), (17,), (2, 2)])
def test_families_run_natively_and_equal_their_composition(name, batch):
    member = member_of(name)
    x, bias = torch.randn(*batch, member.inputs), torch.randn(member.outputs)
    recorded = member.affine(x, bias)  # a gradient is wanted, so PyTorch's operations run
    assert recorded.requires_grad
    with torch.no_grad():
        y = member.affine(x, bias)
        if dispatch.native is not None:
            program = member._program
            in_order = [member.get_parameter(name) for name in program.names]
            for matrices in (in_order, tuple(in_order), dict(member.named_parameters())):
                native = block_sequence.block_sequence_apply(x, matrices, program, bias, refuse)
                assert torch.equal(native, y)
    expected = dense_product(member, x) + bias
    for result in (y, recorded.detach()):
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@each_member
def test_weights_changed_in_any_way_count_at_once(name):
    member = member_of(name)
    x = torch.randn(1, member.inputs)

    def check():
        with torch.no_grad():
            expected = dense_product(member, x)
            torch.testing.assert_close(
                member(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-12
            )

    check()
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
    member(x).square().sum().backward()
    optimizer.step()
    check()
    for parameter in member.parameters():
        parameter.data.mul_(1.5)  # which no version counter shows
    check()
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.data = torch.randn_like(parameter)
    check()
    member.load_state_dict({
        key: value.flip(0) if value.is_floating_point() else value
        for key, value in member.state_dict().items()
    })
    check()
    member = copy.deepcopy(member)
    check()
    member = pickle.loads(pickle.dumps(member))
    check()
    member = member.double().float()
    check()
    for key, parameter in list(member.named_parameters()):
        setattr(member, key, torch.nn.Parameter(parameter * 2))
    check()


def test_parametrised_weights_are_read_through_their_parametrisation():
    class Doubled(torch.nn.Module):
        def forward(self, values):
            return 2 * values

    member = Hierarchical(rank=3, leaf_size=8).initialise((61, 47))
    x = torch.randn(2, 47)
    torch.nn.utils.parametrize.register_parametrization(member, "strips", Doubled())
    with torch.no_grad():
        expected = dense_product(member, x)
        torch.testing.assert_close(
            member(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


@each_member
def test_functional_call_uses_the_given_weights(name):
    member = member_of(name)
    x = torch.randn(3, member.inputs)
    given = {key: value * 3 for key, value in member.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(member, given, (x,))
    changed = copy.deepcopy(member)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(3)
        expected = dense_product(changed, x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["weak", "strong", "uniform", "semiseparable"])
def test_compiled_inference_holds_the_operation_and_training_does_not(name):
    layer = StructuredLinear(member_of(name), torch.randn(MEMBERS[name][1][0]))
    x = torch.randn(3, layer.in_features)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        expected = layer(x)
        torch.compile(layer, fullgraph=True, backend=backend)(x)
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    assert ("torch.ops.weft.block_sequence_apply" in graphs[0]) == (dispatch.native is not None)
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert "torch.ops.weft" not in graphs[-1]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_operation_differentiates_and_obeys_the_dispatchers_rules(orders, bias):
    program, matrices, dense, size = rank_two_states(7, 5, 2, strided=True, orders=orders)
    matrices = [matrix.requires_grad_() for matrix in matrices]
    x = torch.randn(3, 5, requires_grad=True)
    bias = torch.randn(7, requires_grad=True) if bias else None
    arguments = (x, matrices, program.code, bias, 7)
    torch.library.opcheck(torch.ops.weft.block_sequence_apply.default, arguments)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, *matrices)]

    def product(x, *matrices):
        return torch.ops.weft.block_sequence_apply(x, matrices, program.code, None, 7)

    assert torch.autograd.gradcheck(product, doubles)
    with torch.no_grad():
        assert_close(torch.ops.weft.block_sequence_apply(*arguments), x, bias, dense, size)


def test_second_derivative_of_the_operation_is_refused():
    program, matrices, _, _ = rank_two_states(7, 5, 2)
    x = torch.randn(3, 5, requires_grad=True)
    y = torch.ops.weft.block_sequence_apply(x, matrices, program.code, None, 7)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["weak", "semiseparable"])
def test_eight_threads_at_once_get_their_own_results(name):
    member = member_of(name)
    cases = [torch.randn(1 + seed % 5, member.inputs) for seed in range(8)]

    def work(x):
        with torch.no_grad():
            return [member(x) for _ in range(200)]

    with torch.no_grad():
        expected = [member(x) for x in cases]
    with ThreadPoolExecutor(8) as executor:
        for results, right in zip(executor.map(work, cases), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


@needs_native
def test_a_product_keeps_the_weights_that_another_thread_exchanges():
    member = Hierarchical(rank=30, leaf_size=64).initialise((1024, 1024)).requires_grad_(False)
    x, values = torch.randn(64, 1024), member.strips.clone()
    expected, ended = member(x), threading.Event()

    def exchange():
        while not ended.is_set():
            member._parameters["strips"] = nn.Parameter(values.clone(), requires_grad=False)
            torch.full_like(values, math.nan)  # likely in the memory that was given back

    with ThreadPoolExecutor(1) as executor:
        exchanging = executor.submit(exchange)
        try:
            wrong = sum(not torch.equal(member(x), expected) for _ in range(200))
        finally:
            ended.set()
        exchanging.result()
    assert wrong == 0


@needs_native
def test_offsets_beyond_32_bits_are_handled():
    # Two small blocks at either end of one tensor of 2^31 + 64 numbers; untouched pages take no memory.
    count = 2**31 + 64
    try:
        flat = torch.empty(count)
    except RuntimeError:
        pytest.skip("8 GB of addresses are not to be had")
    flat[:16], flat[-16:] = torch.arange(16.0), torch.arange(16.0) + 16
    step = Step(
        Space.OUTPUT,
        0,
        4,
        (Segment(0, 0, 4, Space.INPUT, 0, 4), Segment(0, count - 16, 4, Space.INPUT, 4, 4)),
    )
    program = write_program(8, 4, 0, [count], [[[step]]])
    x = torch.randn(1, 8)
    y = block_sequence.block_sequence_apply(x, [flat], program, None, refuse)
    torch.testing.assert_close(y, x @ torch.arange(32.0).view(8, 4))
