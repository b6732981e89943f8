"""Products with packed codes: storage, reference, gradients, graphs, and every copy of the native kernels."""

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import kernels
from weft.kernels import dispatch, quantized
from weft.kernels.quantized import codebook_apply, pack, quantized_apply, unpack

ALL_BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def drawn_codes(outputs, inputs, bits, seed=0):
    return torch.randint(0, 1 << bits, (outputs, inputs), generator=generator_of(seed))


def uniform(batch, outputs, inputs, bits, *, group=None, zeros=False, bias=True, dtype=torch.float32, seed=0):
    """Arguments of quantized_apply, and the weights by an independent route: from the codes as drawn."""
    group = group or inputs
    generator = generator_of(seed + 1)
    codes = drawn_codes(outputs, inputs, bits, seed)
    scales = (torch.rand(outputs, inputs // group, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
    zero = None
    if zeros:
        zero = torch.rand(outputs, inputs // group, generator=generator, dtype=torch.float64) * (1 << bits)
        zero = zero.to(dtype)
    x = torch.randn(*batch, inputs, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(outputs, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    centre = 2.0 ** (bits - 1) if zero is None else zero.double().repeat_interleave(group, 1)
    weight = scales.double().repeat_interleave(group, 1) * (codes.double() - centre)
    return (x, pack(codes, bits), scales, zero, bits, group, inputs, b), weight


def with_codebook(batch, outputs, inputs, bits, *, per_row=False, bias=True, dtype=torch.float32, seed=0):
    generator = generator_of(seed + 1)
    codes = drawn_codes(outputs, inputs, bits, seed)
    book = torch.randn(outputs if per_row else 1, 1 << bits, generator=generator, dtype=torch.float64).to(
        dtype
    )
    x = torch.randn(*batch, inputs, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(outputs, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    weight = torch.stack([
        book[row if per_row else 0].double()[codes[row]] for row in range(outputs)
    ]).reshape(outputs, inputs)
    return (x, pack(codes, bits), book, bits, inputs, b), weight


def rounded(x):
    """Activations of 8 bits by the definition, in x's own precision up to the rounding."""
    largest = x.abs().amax(-1, keepdim=True)
    whole = torch.round(x * (127 / largest))
    assert whole.abs().max() <= 127
    return whole.double() * (largest / 127).double()


def assert_close(y, x, weight, bias, relative=1e-6):
    """Rounding grows with the sum of absolute values, not with a result that may cancel."""
    expected, scale = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= relative * scale + 1e-30).all()


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from(ALL_BITS),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_unpack_undoes_pack(bits, outputs, inputs, seed):
    codes = drawn_codes(outputs, inputs, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (outputs, -(-inputs * bits // 8))
    assert torch.equal(unpack(packed, bits, inputs).long(), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_row_is_one_little_endian_number(bits):
    codes = drawn_codes(3, 29, bits)
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        number = sum(code << (j * bits) for j, code in enumerate(row))
        assert bytes(packed) == number.to_bytes(len(packed), "little")


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="codes must be from 0 to 7, got 0 to 8"):
        pack(torch.tensor([[0, 8]]), 3)
    with pytest.raises(ValueError, match="codes must be from 0 to 7, got -1 to 3"):
        pack(torch.tensor([[-1, 3]]), 3)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        pack(torch.tensor([[0, 8]]), 9)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [None, 7])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_uniform_reference_equals_the_dense_product(batch, bits, group, zeros):
    arguments, weight = uniform(batch, 11, 35, bits, group=group, zeros=zeros)
    assert_close(quantized.reference(*arguments), arguments[0], weight, arguments[-1])


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_reference_equals_the_product_of_the_rounded_vectors(bits):
    arguments, weight = uniform((5,), 11, 35, bits, group=7)
    y = quantized.reference(*arguments, activations="int8")
    assert_close(y, rounded(arguments[0]), weight, arguments[-1])
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantized.quantize_activations(ties)[0].tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_codebook_reference_equals_the_dense_product(batch, bits, per_row):
    arguments, weight = with_codebook(batch, 11, 35, bits, per_row=per_row)
    assert_close(quantized.codebook_reference(*arguments), arguments[0], weight, arguments[-1])


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_other_dtypes(dtype, relative):
    arguments, weight = uniform((3,), 11, 35, 4, group=7, zeros=True, dtype=dtype)
    y = quantized_apply(*arguments)
    assert y.dtype == dtype
    assert_close(y, arguments[0], weight, arguments[-1], relative)
    arguments, weight = with_codebook((3,), 11, 35, 4, dtype=dtype)
    y = codebook_apply(*arguments)
    assert y.dtype == dtype
    assert_close(y, arguments[0], weight, arguments[-1], relative)


def recorded(arguments, wanted):
    return [
        a.clone().requires_grad_() if i in wanted and isinstance(a, torch.Tensor) else a
        for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("zeros", [False, True])
def test_uniform_gradients_equal_finite_differences(zeros):
    arguments, _ = uniform((2, 3), 5, 6, 3, group=3, zeros=zeros, dtype=torch.float64)
    arguments = recorded(arguments, {0, 2, 3, 7})
    for route in (quantized_apply, lambda *a: torch.ops.weft.quantized_apply(*a, False)):
        assert torch.autograd.gradcheck(route, arguments)
        assert torch.autograd.gradgradcheck(route, arguments)


@pytest.mark.parametrize("per_row", [False, True])
def test_codebook_gradients_equal_finite_differences(per_row):
    arguments, _ = with_codebook((2, 3), 5, 6, 2, per_row=per_row, dtype=torch.float64)
    arguments = recorded(arguments, {0, 2, 5})
    for route in (codebook_apply, torch.ops.weft.codebook_apply):
        assert torch.autograd.gradcheck(route, arguments)
        assert torch.autograd.gradgradcheck(route, arguments)


def test_gradients_of_int8_pass_the_rounding_unchanged():
    arguments, weight = uniform((4,), 5, 6, 4, group=3, zeros=True, dtype=torch.float64)
    ours, theirs = recorded(arguments, {0, 2, 3, 7}), recorded(arguments, {0, 2, 3, 7})
    direction = torch.randn(4, 5, generator=generator_of(3), dtype=torch.float64)
    torch.ops.weft.quantized_apply(*ours, True).backward(direction)
    quantized_apply(*theirs, activations="int8").backward(direction)
    torch.testing.assert_close(theirs[0].grad, direction @ weight)
    for place in (0, 2, 3, 7):
        torch.testing.assert_close(ours[place].grad, theirs[place].grad)


def test_operations_obey_the_dispatchers_rules():
    for batch in [(3,), (2, 3), (0,), ()]:
        for more in (True, False):
            arguments, _ = uniform(batch, 5, 6, 3, group=3, zeros=more, bias=more)
            for int8 in (False, True):
                operation = torch.ops.weft.quantized_apply.default
                torch.library.opcheck(operation, (*recorded(arguments, {0, 2, 3, 7}), int8))
            arguments, _ = with_codebook(batch, 5, 6, 3, per_row=more, bias=more)
            torch.library.opcheck(
                torch.ops.weft.codebook_apply.default, tuple(recorded(arguments, {0, 2, 5}))
            )


CALLS = {
    "uniform": (lambda *a: quantized_apply(*a), lambda: uniform((3,), 5, 14, 3, group=7, zeros=True)),
    "int8": (lambda *a: quantized_apply(*a, "int8"), lambda: uniform((3,), 5, 14, 4, group=7)),
    "codebook": (lambda *a: codebook_apply(*a), lambda: with_codebook((3,), 5, 14, 3)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_compiles_into_one_graph_that_holds_the_operation(kind):
    call, make = CALLS[kind]
    arguments, _ = make()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(call, fullgraph=True, backend=backend)(*arguments)
    assert "torch.ops.weft." in graphs[0].code
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(y, call(*arguments))


class Layer(torch.nn.Module):
    def __init__(self, call, arguments):
        super().__init__()
        self.call, self.arguments = call, arguments

    def forward(self, x):
        return self.call(x, *self.arguments)


@pytest.mark.parametrize("kind", CALLS)
def test_exported_program_needs_no_operation_of_ours(kind):
    call, make = CALLS[kind]
    (x, *others), _ = make()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(Layer(call, others), (x,), dynamic_shapes=({0: batch},))
    assert not [node for node in program.graph.nodes if "weft" in str(node.target)]
    larger = torch.randn(9, 14, generator=generator_of(5))
    torch.testing.assert_close(program.module()(larger), call(larger, *others))


def test_transforms_and_autocast():
    arguments, weight = uniform((4,), 5, 14, 3, group=7)
    others = arguments[1:]
    y = torch.func.vmap(lambda x: quantized_apply(x, *others))(arguments[0])
    assert_close(y, arguments[0], weight, arguments[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantized_apply(*arguments).dtype == torch.bfloat16


def faults():
    (x, codes, scales, zeros, bits, group, inputs, bias), _ = uniform((4,), 5, 14, 4, group=7, zeros=True)
    good = {
        "x": x,
        "codes": codes,
        "scales": scales,
        "zeros": zeros,
        "bits": bits,
        "group": group,
        "inputs": inputs,
        "bias": bias,
    }
    wrong = [
        ({"x": torch.zeros(4, 13)}, ValueError, r"x must be of shape \(\*batch, 14\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be of shape"),
        (
            {"codes": codes[:, :-1]},
            ValueError,
            r"codes must be of shape \(outputs, 7\) for 14 codes",
        ),
        ({"codes": codes[0]}, ValueError, "codes must be of shape"),
        ({"codes": codes.int()}, TypeError, "codes must be of dtype torch.uint8"),
        ({"scales": scales[:, :1]}, ValueError, r"scales must be of shape \(5, 2\)"),
        ({"zeros": zeros[:4]}, ValueError, r"zeros must be of shape \(5, 2\)"),
        ({"bits": 0}, ValueError, "bits must be between 1 and 8, got 0"),
        ({"bits": 17}, ValueError, "bits must be between 1 and 8, got 17"),
        ({"group": 5}, ValueError, "group must be a divisor of 14 inputs, got 5"),
        ({"group": 0}, ValueError, "group must be between 1 and 14"),
        ({"bias": bias[:-1]}, ValueError, r"bias must be of shape \(5,\)"),
        ({"activations": "int4"}, ValueError, "activations must be one of 'float', 'int8'"),
    ]
    return [(good, *each) for each in wrong]


@pytest.mark.parametrize(("good", "wrong", "error", "message"), faults())
def test_sizes_that_do_not_fit_raise(good, wrong, error, message):
    with pytest.raises(error, match=message):
        quantized_apply(**{**good, **wrong})


def test_codebook_of_the_wrong_size_is_refused():
    (x, codes, book, bits, inputs, bias), _ = with_codebook((4,), 5, 14, 4)
    with pytest.raises(ValueError, match=r"codebook must be of shape \(1, 16\) or \(5, 16\), got \(1, 15\)"):
        codebook_apply(x, codes, book[:, :-1], bits, inputs, bias)


def test_public_names():
    assert kernels.quantized_apply is quantized_apply
    assert kernels.codebook_apply is codebook_apply


# ------------------------------------------------------------------------------------------------------------
# The native kernels

needs_native = pytest.mark.skipif(dispatch.native is None, reason="this process runs the reference")


@pytest.fixture(params=["portable", "NEON", "AVX2", "AVX-512"])
def copy_of_the_kernels(request):
    """Every copy that build and processor have, one after the other."""
    if dispatch.native is None:
        pytest.skip("this process runs the reference")
    before = dispatch.native.instructions()
    if not dispatch.native.use_instructions(request.param):
        pytest.skip(f"{request.param} instructions are not to be had here")
    yield request.param
    dispatch.native.use_instructions(before)


# Outputs, inputs, group: single codes, rows that end inside a byte, a step, a block; groups below, between
# and above the registers' widths, and such as lanes and registers do not divide into.
SHAPES = [
    (1, 1, 1),
    (5, 7, 7),
    (9, 35, 35),
    (13, 64, 8),
    (7, 128, 16),
    (6, 192, 24),
    (33, 257, 257),
    (10, 640, 40),
    (9, 1280, 64),
    (3, 1024, 256),
    (6, 36, 12),
    (5, 96, 4),
    (6, 35, 5),
    (9, 130, 10),
    (7, 1000, 125),
    (6, 333, 37),
    (3, 30, 3),
    (3, 30, 2),
    (3, 9, 1),
]
VECTORS = [(1,), (2, 3)]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_copy_equals_the_dense_product(copy_of_the_kernels, shape, bits):
    outputs, inputs, group = shape
    for batch in VECTORS:
        for zeros in (False, True):
            arguments, weight = uniform(batch, outputs, inputs, bits, group=group, zeros=zeros)
            assert_close(quantized_apply(*arguments), arguments[0], weight, arguments[-1])
            y = quantized_apply(*arguments, activations="int8")
            assert_close(y, rounded(arguments[0]), weight, arguments[-1])
        for per_row in (False, True):
            arguments, weight = with_codebook(batch, outputs, inputs, bits, per_row=per_row)
            assert_close(codebook_apply(*arguments), arguments[0], weight, arguments[-1])


def test_small_entries_beside_a_large_one_keep_their_digits(copy_of_the_kernels):
    """Float vectors become whole numbers only where nothing is lost that a float product would keep."""
    for bits in (2, 4, 8):
        (x, *rest), weight = uniform((4,), 9, 640, bits, bias=False)
        x[0, 5] = 1e6
        x[1, 5] = 300.0
        x[2] *= 1e-36
        x[3] = 0.0
        weight[:, 5] = 0.0
        codes = unpack(rest[0], bits, 640)
        codes[:, 5] = 1 << (bits - 1)  # stands for zero: all of the result comes from the small entries
        y = quantized_apply(x, pack(codes, bits), *rest[1:])
        assert_close(y, x, weight, None)
        assert not y[3].any()


def test_large_batches_equal_the_dense_product(copy_of_the_kernels):
    for bits in ALL_BITS:
        # Beyond one slice of the vectors, and not a multiple of it.
        arguments, weight = uniform((301,), 9, 80, bits, group=16, zeros=True)
        assert_close(quantized_apply(*arguments), arguments[0], weight, arguments[-1])
        y = quantized_apply(*arguments, activations="int8")
        assert_close(y, rounded(arguments[0]), weight, arguments[-1])
        arguments, weight = with_codebook((301,), 9, 80, bits)
        assert_close(codebook_apply(*arguments), arguments[0], weight, arguments[-1])


def test_long_rows_of_the_largest_numbers_do_not_overflow(copy_of_the_kernels):
    """70000 · 255 · 127 is beyond 32 bits."""
    inputs = 70_000
    codes, x = torch.full((2, inputs), 255), torch.ones(1, inputs)
    zeros, scales = torch.zeros(2, 1), torch.ones(2, 1)
    y = quantized_apply(x, pack(codes, 8), scales, zeros, 8, inputs, inputs, None, "int8")
    torch.testing.assert_close(y, torch.full((1, 2), 255.0 * inputs), rtol=1e-6, atol=0)


def test_vectors_are_rounded_as_the_reference_rounds_them(copy_of_the_kernels):
    """With the identity for a matrix the rounded vector itself comes out."""
    inputs = 96
    generator = generator_of(0)
    codes = 128 + torch.eye(inputs, dtype=torch.int64)
    x = torch.randn(200, inputs, generator=generator)
    halves = torch.arange(-48, 48) + 0.5
    x[0, :-1], x[0, -1] = halves[:-1], 127.0  # steps of one: every entry but the last is a tie
    x[1] = 0.0
    x[2] *= 1e-36
    x[3] *= 1e30
    arguments = (x, pack(codes, 8), torch.ones(inputs, 1), None, 8, inputs, inputs)
    expected = quantized.reference(*arguments, activations="int8")
    torch.testing.assert_close(quantized_apply(*arguments, activations="int8"), expected, rtol=3e-7, atol=0)
    assert expected[0, :4].tolist() == [-48.0, -46.0, -46.0, -44.0]


@pytest.mark.parametrize("inputs", [65536, 70016])
def test_the_largest_sums_of_long_rows_do_not_overflow(copy_of_the_kernels, inputs):
    """Whole numbers of 127 against codes of 255: beyond 2^31 from 66,312 inputs on."""
    codes = torch.full((4, inputs), 255, dtype=torch.uint8)
    arguments = (torch.ones(4, inputs), codes, torch.ones(4, 1), torch.zeros(4, 1), 8, inputs, inputs)
    y = quantized_apply(*arguments, activations="int8")
    torch.testing.assert_close(y, torch.full((4, 4), 255.0 * inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_spoil_their_own_vector_only(copy_of_the_kernels, bad):
    arguments, weight = uniform((3,), 5, 64, 8)
    x = arguments[0].clone()
    x[1, 7] = bad
    for activations in ("float", "int8"):
        y = quantized_apply(x, *arguments[1:], activations=activations)
        expected = quantized.reference(x, *arguments[1:], activations=activations)
        assert not y[1].isfinite().any()
        assert not expected[1].isfinite().any()
        torch.testing.assert_close(y[::2], expected[::2], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_nothing_is_read_beyond_the_codes_nor_written_beyond_the_output(
    copy_of_the_kernels, bits, results_go_to
):
    """The codes end where the process's memory does; the output lies between marks."""
    page = mmap.PAGESIZE
    for inputs in (1, 9, 64, 65, 129, 200, 257):
        (x, codes, scales, _, _, group, _, bias), weight = uniform((2,), 6, inputs, bits)
        length = codes.numel()
        pages = -(-length // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        every = torch.frombuffer(memory, dtype=torch.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(every.data_ptr() + pages * page, page, 0) == 0
        at_the_end = every[pages * page - length : pages * page].view(codes.shape)
        at_the_end.copy_(codes)
        for count in (2, 70):  # codes by themselves, and decoded rows
            many = x.repeat(count // 2, 1)
            marked = torch.full((count * 6 + 64,), 7.0)
            inside = marked[32:-32].view(count, 6)
            for int8 in (False, True):
                results_go_to(inside)
                y = dispatch.native.quantized_apply(
                    many, at_the_end, scales, None, bias, bits, group, inputs, int8, 1
                )
                assert y.data_ptr() == marked[32:].data_ptr()
                assert (marked[:32] == 7).all()
                assert (marked[-32:] == 7).all()
                assert_close(inside, rounded(many) if int8 else many, weight, bias)
        protect(every.data_ptr() + pages * page, page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_several_threads_give_what_one_gives():
    arguments, _ = uniform((3,), 1001, 1280, 4, group=64)
    book, _ = with_codebook((3,), 1001, 1280, 4)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((
                quantized_apply(*arguments),
                quantized_apply(*arguments, activations="int8"),
                codebook_apply(*book),
            ))
    finally:
        torch.set_num_threads(before)
    for more in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(more, results[0], strict=True))


def test_eight_threads_at_once_get_their_own_results():
    cases = [uniform((1 + seed % 5,), 300, 264, 1 + seed, group=24, seed=seed) for seed in range(8)]

    def work(case):
        arguments, _ = case
        return [
            (quantized_apply(*arguments), quantized_apply(*arguments, activations="int8")) for _ in range(100)
        ]

    with ThreadPoolExecutor(8) as executor:
        for (arguments, weight), results in zip(cases, executor.map(work, cases), strict=True):
            assert_close(results[0][0], arguments[0], weight, arguments[-1])
            assert_close(results[0][1], rounded(arguments[0]), weight, arguments[-1])
            for plain, int8 in results[1:]:
                assert torch.equal(plain, results[0][0])
                assert torch.equal(int8, results[0][1])


def test_strided_tensors_and_subclasses_give_the_same_product():
    arguments, weight = uniform((6,), 5, 64, 4, group=16, zeros=True)

    class Tagged(torch.Tensor):
        pass

    for place in (0, 1, 2, 3, 7):
        strided = list(arguments)
        if place == 7:
            strided[place] = arguments[place].repeat_interleave(2)[::2]
        else:
            strided[place] = arguments[place].T.contiguous().T
        assert not strided[place].is_contiguous()
        assert_close(quantized_apply(*strided), arguments[0], weight, arguments[-1])
    tagged = list(arguments)
    tagged[1] = arguments[1].as_subclass(Tagged)
    assert_close(quantized_apply(*tagged), arguments[0], weight, arguments[-1])


@needs_native
def test_plain_inference_takes_the_native_kernels(monkeypatch):
    arguments, _ = uniform((2,), 5, 64, 4)
    scales = torch.nn.Parameter(arguments[2])
    answers = []

    def record(*given):
        answers.append(dispatch.native.quantized_apply(*given))
        return answers[-1]

    monkeypatch.setattr(quantized, "_native_quantized", record)
    quantized_apply(*arguments)
    assert answers[-1] is not None
    trained = (*arguments[:2], scales, *arguments[3:])
    quantized_apply(*trained)
    assert answers[-1] is None
    with torch.inference_mode():
        quantized_apply(*trained)
    assert answers[-1] is not None


def test_the_operations_themselves_refuse_sizes_that_do_not_fit() -> None:
    codes = pack(torch.zeros(4, 16, dtype=torch.long), 4)
    x, scales = torch.ones(2, 16), torch.ones(4, 1)
    apply, look_up = torch.ops.weft.quantized_apply, torch.ops.weft.codebook_apply
    assert apply(x, codes, scales, None, 4, 16, 16, None, False).shape == (2, 4)
    for inputs, group, bad in ((32, 32, scales), (16, 8, scales), (16, 16, scales[:2])):
        with pytest.raises(ValueError, match="must be of shape|bytes"):
            apply(x, codes, bad, None, 4, group, inputs, None, False)
    with pytest.raises(ValueError, match="codebook must be of shape"):
        look_up(x, codes, torch.ones(1, 8), 4, 16, None)
    with pytest.raises(ValueError, match="bias must be of shape"):
        look_up(x, codes, torch.ones(1, 16), 4, 16, torch.ones(3))
